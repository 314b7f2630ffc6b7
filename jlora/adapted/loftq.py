"""LoftQ: a LoRA that starts from what quantising its base loses; and what is lost."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.adapted.adapted import Adapted, check_adapted, from_arrays, to_arrays
from jlora.adapted.compress import dense_of
from jlora.adapted.differences import check_same_leaves
from jlora.adapted.quantize import Storage, check_quantisable, choose_of_adapted
from jlora.adapted.select import Pattern, check_axes_known, known_sites
from jlora.methods import Method
from jlora.methods.acts import Arrays, OnWeights
from jlora.methods.checks import whole
from jlora.methods.lora import low_rank
from jlora.methods.matrix import a_form, a_matrix, b_form, check_fits, matrices, one_by_one
from jlora.methods.method import factor_shapes
from jlora.methods.pissa import principal
from jlora.quant.formats import Format
from jlora.quant.quantised import Quantised, Remark
from jlora.transform.explicit import on_auto_axes
from jlora.transform.sites import ADAPTABLE, Site, Target
from jlora.transform.weight import Trained, Weight

_MOST = 100  # of the alternation's steps, each of which has an SVD for every weight


def loftq(
    adapted: Adapted,
    number_format: str | Format = "nf4",
    *,
    iterations: int = 5,
    block: int | None = None,
    double: bool | None = None,
    targets: Pattern | None = None,
    sites: Iterable[Site | Target] | None = None,
) -> Adapted:
    """`Q + s A B` that starts close to W: `min |W - Q - s A B|`, Q quantised, A and B trained from there.

    In turn, from A B = 0: `Q = quantise(W - s A B)`, and `s A B` the r largest singular values of `W - Q`, each of
    A and B with their root. The function at the start is near to that of W, not equal to it. `jlora.quantize` of an
    adapted tree is the other start: plain for LoRA, and QPiSSA for PiSSA.

    Args:
      adapted: from `apply`, on the full weights, of a method that trains A and B of `W + s A B`: lora, rslora,
        loraplus, dylora. Its factors are replaced where the weight is quantised.
      iterations: of the alternation, 1 to 100; 1 is a quantised W with the best A and B for what that loses.
      number_format, block, double, targets, sites: as in `jlora.quantize`.

    Raises:
      ValueError: for another method; a rank above a weight's own; and what `quantize` says.

    Source: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659,
    algorithm 1.

    Example:
      >>> import jax, jlora
      >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (128, 64))}}
      >>> adapted = jlora.loftq(jlora.apply(params, rank=16), "nf4")
      >>> plain = jlora.quantization_error(params, jlora.quantize(params, "nf4"))
      >>> jlora.quantization_error(params, adapted)["dense/kernel"] < 0.9 * plain["dense/kernel"]
      True
    """
    check_adapted(adapted, "loftq")
    number = whole(iterations)
    if number is None or not 1 <= number <= _MOST:
        raise ValueError(f"loftq: iterations must be an integer from 1 to {_MOST}, not {iterations!r:.50}")
    how = Storage.parse(number_format, block, double)
    named, structure = tree.leaves(adapted.base)
    chosen = {site.path: site for site in choose_of_adapted(adapted, targets, sites, stacklevel=3)}
    for path in chosen:
        check_quantisable(path, named[path])
    arrays = {path: dict(part) for path, part in to_arrays(adapted).items()}
    adapting = {site.path: site for site in adapted.sites}
    if tree.is_abstract(adapted):
        raise TypeError("loftq: this adapter holds shapes (jax.ShapeDtypeStruct) and no arrays to quantise")
    for path, site in chosen.items():
        if path not in adapting:
            named[path] = how.quantise(named[path], site)
            continue
        target = adapting[path]
        scale = _scale(adapted.method.of(target), target)
        check_fits(target.rank, target, "loftq")
        named[path], arrays[path] = _alternate(named[path], target, arrays[path], scale, how, number)
    base = jax.tree.unflatten(structure, named.values())
    return from_arrays(base, arrays, adapted.method, adapted.sites, adapted.extras).replace(key=adapted.key)


def _alternate(
    w: Any, target: Target, start: Arrays, scale: float, how: Storage, iterations: int
) -> tuple[Quantised, Arrays]:
    """The quantised weight, and A and B."""
    wide = jnp.asarray(w).astype(jnp.float32)
    arrays = start | {"B": jnp.zeros_like(start["B"])}
    for _ in range(iterations):
        residual = low_rank(wide, target, arrays["A"] * -jnp.float32(scale), arrays["B"]).dense()
        codes = dataclasses.replace(how.quantise(residual, target), dtype=jnp.dtype(w.dtype))
        best = lambda wide, near, start: _best(wide - near.astype(jnp.float32), target, start, scale)
        arrays = on_auto_axes(best, wide, codes.dequantise(), start)
    return dataclasses.replace(codes, remark=Remark(residual=iterations > 1)), arrays  # the first are the weight's own


def _best(lost: jax.Array, target: Target, start: Arrays, scale: float) -> Arrays:
    """A and B with `s A B` nearest to what is lost. Columns that are not needed have the A of the start, and B zero."""
    stacked = matrices(lost, target)
    u, s, vt = principal(stacked, target.rank, None, jax.random.split(jax.random.key(0), len(stacked)))
    root = jnp.sqrt(s / abs(scale))
    a = jnp.where(s[:, None, :] > 0, u * root[:, None, :], a_matrix(start["A"], target))
    b = jnp.where(s[:, :, None] > 0, vt * (root * math.copysign(1.0, scale))[:, :, None], 0.0)
    return {"A": a_form(a, target), "B": b_form(b, target)}


def _scale(method: Method, target: Target) -> float:
    """The number s of `W + s A B`.

    Raises:
      ValueError: if the method's weight is another, or A or B is not trained.
    """
    acts = method.acts
    shapes = factor_shapes(method, target)
    if isinstance(acts, OnWeights) and set(shapes) == {"A", "B"} and not acts.frozen:
        w: Any = jax.ShapeDtypeStruct(target.shape, jnp.float32)
        with jax.ensure_compile_time_eval():  # a number under jit, too
            weight = acts.weight(w, target, {name: jnp.ones(shape) for name, shape in shapes.items()}, {})
            if weight.w is w and weight.gain is None and weight.a is not None and weight.b is not None:
                return float(weight.a.ravel()[0] * weight.b.ravel()[0])
    raise ValueError(
        f"loftq: the weight of {method.name} ({target.path!r}) is not W + s A B with A and B trained: take jlora.lora, "
        "rslora, loraplus or dylora; jlora.quantize(adapted) quantises the base of any method, and that of PiSSA "
        "without the part that is trained"
    )


def quantization_error(
    params: Any, quantized: Any, *, nuclear: bool = False, sites: Iterable[Site | Target] | None = None
) -> dict[str, float]:
    """Relative error of each quantised weight: `|W - W'|_F / |W|_F`, W' being the weight that a function uses.

    Args:
      params: the full weights.
      quantized: the tree that `jlora.quantize` made of them, or an `Adapted` with such a base (`loftq`, QPiSSA), of
        which W' has the factors in it.
      nuclear: the nuclear norm, the sum of the singular values, in the place of Frobenius': the PiSSA paper's measure.
      sites: as in `jlora.quantize`, for the nuclear norm of weights whose names do not tell their axes.

    Returns:
      The error by path, of each leaf that is quantised.

    Raises:
      ValueError: if the trees differ in their leaves or shapes, or nothing in the second one is quantised.
      TypeError: if one of them holds shapes and no arrays, or is traced: these are numbers of Python.

    Source: Meng et al., "PiSSA", arXiv 2404.02948, section 4; Li et al., "LoftQ", arXiv 2310.08659, eq. 6.

    Example:
      >>> import jax, jlora
      >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (128, 64))}}
      >>> round(jlora.quantization_error(params, jlora.quantize(params, "nf4"))["dense/kernel"], 2)
      0.09
    """
    base = quantized.base if isinstance(quantized, Adapted) else quantized
    if isinstance(params, Adapted):
        raise TypeError("quantization_error: the first argument is the tree of full weights, got an Adapted")
    for which, given in (("params", params), ("the quantised tree", quantized)):
        _check_arrays(given, which)
    params = tree.canonical(params)
    check_same_leaves(params, base, "quantization_error", ("params", "the quantised tree"))
    full, _ = tree.leaves(params)
    stored, _ = tree.leaves(base)
    weights = stored
    if isinstance(quantized, Adapted):
        weights, _ = tree.leaves(
            quantized.replace(key=None).as_weights(), lambda leaf: isinstance(leaf, Weight | Trained)
        )
    paths = [path for path, leaf in stored.items() if tree.is_stored(leaf)]
    if not paths:
        raise ValueError("quantization_error: nothing in the second tree is quantised: jlora.quantize(params) first")
    known: dict[str, Site] = {}
    if nuclear:
        own = quantized.sites if isinstance(quantized, Adapted) else ()
        found = known_sites(params, full, sites)
        known = {site.path: site for site in found if site.kind in ADAPTABLE} | {s.path: s.site for s in own}
        check_axes_known(found, set(paths) - set(known), "quantization_error(nuclear=True)")
    try:
        return {path: _error(full[path], _used(weights[path]), known.get(path)) for path in paths}
    except jax.errors.ConcretizationTypeError as error:
        raise TypeError(
            "quantization_error: one of the trees is traced (jit, grad, vmap), and the errors are numbers of Python: "
            "call it outside, on arrays"
        ) from error


def _check_arrays(given: Any, which: str) -> None:
    if tree.is_abstract(given):
        raise TypeError(
            f"quantization_error: {which} holds shapes (jax.ShapeDtypeStruct), of which no error can be computed: pass "
            "arrays"
        )


def _used(leaf: Any) -> jax.Array:
    return dense_of(leaf) if isinstance(leaf, Weight) else tree.dense(leaf)


def _error(w: Any, near: jax.Array, site: Site | None) -> float:
    norm = jnp.linalg.norm if site is None else lambda x: jnp.sum(one_by_one(_singular_values, matrices(x, site)))

    def of(w: jax.Array, near: jax.Array) -> tuple[jax.Array, jax.Array]:
        w, near = w.astype(jnp.float32), near.astype(jnp.float32)
        return norm((w - near) if site else (w - near).ravel()), norm(w if site else w.ravel())

    error, size = map(float, on_auto_axes(of, jnp.asarray(tree.dense(w)), near))
    return error / size if size else error


def _singular_values(m: jax.Array) -> jax.Array:
    return jnp.linalg.svd(m, compute_uv=False)
