"""`quantize`: a parameter tree whose weights are held in 4 or 8 bits, and back."""

import dataclasses
import functools
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jlora import tree
from jlora.adapted.adapted import Adapted, from_arrays, to_arrays
from jlora.adapted.select import Pattern, known_sites, listing, matching, nearest, search, select
from jlora.methods.residual import is_taken_out, taken_out
from jlora.quant.choice import check_block, check_double, is_head
from jlora.quant.formats import Format, format_of
from jlora.quant.layout import Layout, layout_of
from jlora.quant.nested import Nested
from jlora.quant.place import shardings_of
from jlora.quant.quantised import Quantised, Remark, encode
from jlora.transform.explicit import on_auto_axes
from jlora.transform.sites import ATTENTION, Site, Target


def quantize(
    params: Any,
    number_format: str | Format = "nf4",
    *,
    block: int | None = None,
    double: bool | None = None,
    targets: Pattern | None = None,
    sites: Iterable[Site | Target] | None = None,
) -> Any:
    """The same tree with its linear weights in 4 or 8 bits: `W ~ decode(codes) * scale`, the scale being max |W|.

    A function takes such a tree through `jlora.lift`, adapted or not: each weight is dequantised where it is used, and
    what is kept for the backward pass are the codes. The dequantised weight is `decode(codes) * scale` in float32, cast
    once to the dtype that the weight had.

    Of an `Adapted` the base is quantised, the factors stay. A method that takes its start out of the weight (PiSSA,
    OLoRA, CorDA, LoRA-GA) becomes plain LoRA on the quantised residual, `Q(W - s A0 B0) + s A B`, which is QPiSSA: the
    largest part of W is never quantised. `jlora.loftq` starts plain LoRA from what quantising loses.

    Bytes, of n weights: n / 2 + 4 n / block of the 4-bit formats; with `double` n / 2 + n / block + 4 n / (256 block)
    and 4 for each matrix, at block 64 4.127 bits a weight; n + 4 for each output channel of the 8-bit formats. The sum
    is in `jlora.count` and `jlora.summary`.

    Args:
      params: any tree, of arrays or of shapes (`jax.eval_shape`), of which shapes of codes and scales come, or an
        `Adapted`. On a mesh, codes and scales lie along the axes of their weight.
      number_format: "nf4" (quantiles of the normal distribution), "fp4" (bitsandbytes' 4-bit float), "int4" (-7 to 7),
        each with a scale for each block; "int8" (-127 to 127), "fp8" (e4m3), with a scale for each output channel.
      block: weights to a scale, a power of two from 32 to 4096; 64 when None. The blocks lie along the inputs, in
        row-major (outputs, inputs), as bitsandbytes has them. Not of the 8-bit formats.
      double: whether the scales are held in 8 bits themselves, in groups of 256. True when None, for 4 bits.
      targets: pattern, list of patterns or predicate on `Site`, as of `apply`. When None all linear weights but the
        model's head (a module called head, lm_head, score, classifier, ...); no embeddings, norms or convolutions. What
        may be a convolution's kernel is left as it is, too, with a warning; what may be a stack of layers is an error.
      sites: `jlora.sites(fn, params, *args)`, where names do not tell the axes: stacked layers, kernels of many axes.

    Returns:
      The tree, with a `jlora.quant.Quantised` in the place of each chosen leaf. The others are what they were.

    Raises:
      ValueError: for an unknown format or block, a target that is not of floating point, quantised already, not finite
        (an array; under `jit` a NaN gives NaN), or whose axes its name does not tell; a mesh that cuts through a block.
      TypeError: for a format, targets or sites of another type.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3; Meng et al.,
    "PiSSA", arXiv 2404.02948, section 4.

    Example:
      >>> import jax, jlora
      >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (128, 64))}}
      >>> jlora.quantize(params, "nf4")["dense"]["kernel"]
      Quantised(nf4, blocks of 64 twice, float32[128, 64])
    """
    how = Storage.parse(number_format, block, double)
    if isinstance(params, Adapted):
        return _of_adapted(params, how, targets, sites)
    named, structure = tree.leaves(params)
    _check_params(params, named)
    chosen = {site.path: site for site in choose(params, named, targets, sites, read=sites is not None, stacklevel=3)}
    for path in chosen:
        check_quantisable(path, named[path])
    leaves = [how.quantise(leaf, chosen[path]) if path in chosen else leaf for path, leaf in named.items()]
    return jax.tree.unflatten(structure, leaves)


def dequantize(params: Any, targets: str | Sequence[str] | None = None) -> Any:
    """The same tree with plain arrays in the place of quantised leaves: `decode(codes) * scale`, in the leaf's dtype.

    Args:
      params: any tree, or an `Adapted`, whose base is meant.
      targets: pattern or patterns of the quantised leaves; None for all of them.

    Raises:
      ValueError: if codes and scales of a leaf contradict each other, naming it; for a pattern that matches nothing
        quantised.
      TypeError: for targets that are no patterns.

    Example:
      >>> import jax, jlora
      >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (128, 64))}}
      >>> jlora.dequantize(jlora.quantize(params))["dense"]["kernel"].dtype
      dtype('float32')
    """
    if isinstance(params, Adapted):
        return params.replace(base=dequantize(params.base, targets))
    named, structure = tree.leaves(params)
    stored = [path for path, leaf in named.items() if tree.is_stored(leaf)]
    chosen = stored if targets is None else _stored_ones(named, stored, targets)
    leaves = [tree.dense(leaf, path) if path in chosen else leaf for path, leaf in named.items()]
    return jax.tree.unflatten(structure, leaves)


def _stored_ones(named: dict[str, Any], stored: list[str], targets: Any) -> set[str]:
    patterns = [targets] if isinstance(targets, str | re.Pattern) else targets
    if not isinstance(patterns, list | tuple) or not all(isinstance(one, str | re.Pattern) for one in patterns):
        raise TypeError(f"dequantize: targets= is a pattern or a list of patterns, not {targets!r:.200}")
    if patterns and not stored:
        raise ValueError(
            f"dequantize: none of the {len(named)} leaves is quantised, and targets={targets!r:.200} is to name such: "
            "jlora.quantize(params) makes them"
        )
    for pattern in patterns:
        plain = [path for path in named if search(pattern, path, "targets")]
        if plain and not set(plain) & set(stored):
            raise ValueError(
                f"dequantize: targets={getattr(pattern, 'pattern', pattern)!r} matches {plain[0]!r}, which is not "
                f"quantised; what is: {', '.join(map(repr, nearest(pattern, stored)))}"
            )
    return matching(stored, patterns, "targets")


def quantize_again(w: jax.Array, like: Quantised, path: str) -> Quantised:
    """A weight in the format, blocks and order of axes of another one of its shape."""
    layout = like.layout.of_ndim(w.ndim)
    scales = like.scales.codes if isinstance(like.scales, Nested) else like.scales
    # Of one scale for all inputs, which outputs of size 1 beside them do not change.
    kept = [axis for axis in range(layout.stack, w.ndim) if axis < scales.ndim and scales.shape[axis] != 1]
    inputs = w.ndim - max(kept, default=layout.stack - 1) - 1
    return _encoded(w, like.number, layout, inputs, isinstance(like.scales, Nested), path)


@dataclasses.dataclass(frozen=True)
class Storage:
    """Arguments of `quantize`: the format, the size of blocks, and whether the scales are quantised themselves."""

    number: Format
    block: int
    double: bool

    @classmethod
    def parse(cls, number_format: Any, block: Any, double: Any) -> "Storage":
        """The arguments, checked.

        Raises:
          ValueError: as `quantize` says.
        """
        number = format_of(number_format)
        return cls(number, check_block(number, block), check_double(number, double))

    def quantise(self, leaf: Any, site: Site | Target) -> Quantised:
        """One weight."""
        # A table's rows stay rows: blocks lie along the width, which a tied head contracts.
        out_axes, in_axes = (site.out_axes, site.in_axes)[:: -1 if site.kind == "embedding" else 1]
        layout = layout_of(leaf.shape, out_axes, in_axes, site.stack_axes, self.number, self.block)
        return _encoded(leaf, self.number, layout, len(in_axes), self.double, site.path)


def _of_adapted(adapted: Adapted, how: Storage, targets: Any, sites: Any) -> Adapted:
    named, structure = tree.leaves(adapted.base)
    chosen = {site.path: site for site in choose_of_adapted(adapted, targets, sites, stacklevel=4)}
    for path in chosen:
        check_quantisable(path, named[path])
    residual = {
        site.path: taken_out(named[site.path], site, adapted.buffers[site.path])
        for site in adapted.sites
        for method in (adapted.method.of(site),)
        if is_taken_out(method)
    }
    for path, leaf in named.items():
        wide = residual.get(path, leaf)
        if path in chosen:
            codes, dtype = how.quantise(wide, chosen[path]), jnp.dtype(leaf.dtype)
            named[path] = dataclasses.replace(codes, dtype=dtype, remark=Remark(residual=path in residual))
        elif path in residual:
            named[path] = wide.astype(leaf.dtype)
    base = jax.tree.unflatten(structure, named.values())
    arrays = {path: dict(part) for path, part in to_arrays(adapted).items()}
    for path in residual:
        arrays[path] = dict(adapted.factors[path])
    method = adapted.method.acts.without_start(adapted.method)
    return from_arrays(base, arrays, method, adapted.sites, adapted.extras).replace(key=adapted.key)


def choose_of_adapted(adapted: Adapted, targets: Any, sites: Any, *, stacklevel: int) -> list[Site]:
    """The sites of an adapter's base that are to be quantised: its own tell their axes.

    Args:
      adapted: whose base it is.
      targets: as `quantize` has them.
      sites: as `quantize` has them.
      stacklevel: of a warning, as seen from here.

    Raises:
      ValueError: for one that is trained as it is.
    """
    named, _ = tree.leaves(adapted.base)
    own = {site.path: site.site for site in adapted.sites}
    known = [own.get(site.path, site) for site in known_sites(adapted.base, named, sites)]
    known += [site for path, site in own.items() if path not in {site.path for site in known}]
    trained = {extra.path for extra in adapted.extras}
    if targets is None:
        known = [site for site in known if site.path not in trained]
    chosen = choose(adapted.base, named, targets, known, read=sites is not None, stacklevel=stacklevel + 1)
    both = [site.path for site in chosen if site.path in trained]
    if both:
        raise ValueError(f"quantize: {both[0]!r} is trained as it is (extras=): leave it out with targets=")
    return chosen


def _check_params(params: Any, named: dict[str, Any]) -> None:
    if any(isinstance(x, Adapted) for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Adapted))):
        raise TypeError(
            f"quantize: an Adapted is inside of what was given, {type(params).__name__}: jlora.quantize(adapted) takes "
            "the Adapted itself (state.adapted of a state), before a state is made of it"
        )
    if not any(hasattr(leaf, "dtype") for leaf in named.values()):
        raise ValueError("quantize: the tree holds no arrays")


def choose(params: Any, named: dict[str, Any], targets: Any, sites: Any, *, read: bool, stacklevel: int) -> list[Site]:
    """The sites that are to be quantised: see `quantize`. `read` says whether `sites` are those of a program."""
    known = known_sites(params, named, sites)
    if targets is not None:
        chosen = select(known, targets, read_from_program=read, caller="quantize", done="quantised")
        if not chosen:
            raise ValueError(
                f"quantize: targets={targets!r:.200} holds no pattern: leave it out for the linear weights"
            )
    else:
        # A table that is the head as well, looked up and multiplied, is no linear weight here.
        linear = [site for site in known if site.kind == "linear" and "gather" not in site.uses]
        chosen = [site for site in linear if not is_head(site.path)]
        unknown = [site for site in known if site.kind == "unknown"]
        left = unknown if read else _no_layers(unknown, known)
        odd = [site for site in unknown if site not in left]
        if odd:  # which raises, naming the first: of a stack of layers nothing would be quantised
            select(odd, None, read_from_program=read, caller="quantize", done="quantised")
        linear = [site for site in known if site.kind == "linear"]
        if not linear:
            raise ValueError(
                "quantize: none of the leaves is a linear weight of floating point: choose others with targets=, or "
                f"pass sites=jlora.sites(fn, params, *args) to read them from the program. Leaves: {listing(known)}"
            )
    if not chosen:
        raise ValueError(
            f"quantize: the linear weights are heads alone ({', '.join(s.path for s in known if s.kind == 'linear')}), "
            "which are no default targets: choose them with targets="
        )
    if targets is None and left:
        how = "the program uses their axes in several ways" if read else "their names do not tell which axes are inputs"
        warnings.warn(
            f"quantize leaves {len(left)} ambiguous kernels as they are, since {how}: {listing(left)}. Choose the "
            f"weights with targets={'' if read else ', or pass sites=jlora.sites(fn, params, *args)'}",
            stacklevel=stacklevel,
        )
    return chosen


_LARGEST_WINDOW = 32


def _no_layers(unknown: list[Site], known: Sequence[Site]) -> list[Site]:
    """Those ambiguous kernels that are a convolution's rather than a stack of linear layers.

    Before its last two axes a convolution has those of a window, equal and small, and its bias is (out,). That of a
    stack is stacked as well; without one, the kernels of stacked dense layers have three axes, and those of stacked
    attention the width beside the layers.
    """
    shapes = {site.path: site.shape for site in known}
    found = []
    for site in unknown:
        folder = site.path.rpartition("/")[0]
        bias, window = shapes.get(f"{folder}/bias" if folder else "bias"), site.shape[:-2]
        of_window = len(set(window)) == 1 and window[0] <= _LARGEST_WINDOW
        biased = bias == site.shape[-1:] or (bias is None and len(window) > 1)
        if of_window and biased and folder.rpartition("/")[2] not in ATTENTION:
            found.append(site)
    return found


def check_quantisable(path: str, leaf: Any) -> None:
    """Raises ValueError for a leaf that has no quantised form: see `quantize`."""
    if tree.is_stored(leaf):
        raise ValueError(f"{path!r} is quantised already ({leaf!r}): jlora.dequantize(params) first, or leave it out")
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{path!r} has dtype {dtype}: only floating-point weights can be quantised")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return
    try:
        finite = _is_finite(leaf) if isinstance(leaf, np.ndarray) else bool(_all_finite(leaf))
    except jax.errors.ConcretizationTypeError:  # under jit a NaN gives a NaN
        return
    if not finite:
        raise ValueError(f"{path!r} is not finite: a block with a NaN or an infinity has no scale")


@jax.jit
def _all_finite(w: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(w.astype(jnp.float32)))


def _is_finite(w: np.ndarray) -> bool:
    """Whether all numbers are finite in float32, in which the codes are computed."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(w.astype(np.float32, copy=False)).all())


def _encoded(leaf: Any, number: Format, layout: Layout, inputs: int, double: bool, path: str) -> Quantised:
    shape = jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
    shapes = jax.eval_shape(lambda w: encode(w, number, layout, inputs, double), shape)
    where = _where(leaf, shapes, path)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        if where is None:
            return shapes
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)
    return _compiled(number, layout, inputs, double, _Fixed(where))(leaf)


def _where(leaf: Any, shapes: Quantised, path: str) -> Quantised | None:
    """Shardings of codes and scales, if the weight was put onto a mesh; under jit XLA or the types decide."""
    try:
        sharding = tree.placement(leaf)
    except jax.errors.ConcretizationTypeError:
        return None
    return shardings_of(shapes, sharding, path) if isinstance(sharding, NamedSharding) else None


class _Fixed:
    """Shardings as a key of a cache: their tree is one of dataclasses, which cannot be hashed."""

    def __init__(self, where: Any) -> None:
        self.where = where
        self.key = tuple(jax.tree.leaves(where))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fixed) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@functools.lru_cache(maxsize=64)
def _compiled(number: Format, layout: Layout, inputs: int, double: bool, place: _Fixed) -> Any:
    """The program for weights of one layout: one compilation serves all layers of a shape."""

    def run(w: jax.Array) -> Quantised:
        # On explicit axes, which a traced weight's type tells as well as an array's.
        specs = lambda of: jax.tree.map(lambda at: at.spec, shardings_of(of, jax.typeof(w).sharding, "a weight"))
        return on_auto_axes(lambda w: encode(w, number, layout, inputs, double), w, place=specs)

    return jax.jit(run, out_shardings=place.where)
