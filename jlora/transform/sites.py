"""Which weights a function multiplies by, and along which of their axes: read from the program, not from names."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.transform.follow import follow
from jlora.transform.lift import Lazy
from jlora.transform.trace import Use

ADAPTABLE = ("linear", "conv", "embedding")
KINDS = (*ADAPTABLE, "unknown", "other")
ATTENTION = ("query", "key", "value", "out")


@dataclasses.dataclass(frozen=True)
class Site:
    """One parameter, and what it is used for.

    Attributes:
      path: "h_0/attn/query/kernel".
      shape, dtype: of the stored parameter.
      in_axes: the axes that a product contracts: A spans them.
      out_axes: the axes that stay in the result: B spans them.
      stack_axes: the axes along which there is one weight per index (scanned layers, experts): A and B both have them.
      kind: "linear", "conv" or "embedding"; "unknown" where the axes cannot be told; "other" where no product has it.
      uses: the operations that read it, in program order.
      materialised: the operation before the product (a rounding, a norm, a concatenation) for which the adapted weight
        is built; "" where input and factors meet one by one.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    kind: str
    uses: tuple[str, ...] = ()
    materialised: str = ""

    def __post_init__(self) -> None:
        """One that is written by hand is as one that was found: hashable, and its own JSON."""
        for name in ("shape", "in_axes", "out_axes", "stack_axes"):
            object.__setattr__(self, name, tuple(map(operator.index, getattr(self, name))))
        dtype: Any = self.dtype
        if not isinstance(dtype, str):
            object.__setattr__(self, "dtype", str(jnp.dtype(dtype)))

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B in broadcast form: W's axes, size 1 where not spanned, and the rank."""
        a = tuple(1 if i in self.out_axes else n for i, n in enumerate(self.shape))
        b = tuple(1 if i in self.in_axes else n for i, n in enumerate(self.shape))
        return (*a, rank), (*b, rank)


@dataclasses.dataclass(frozen=True)
class Target:
    """A weight that is adapted: the site that was found, and what `apply` chose for it.

    Attributes:
      site: of the weight. What it knows can be read from the target, too.
      rank: r; 0 of a method that has none.
      alpha: the numerator of the scale, dimensionless; 0 of a method that has none.
      part: which of several methods (`together`) adapts it, from 0.
    """

    site: Site
    rank: int
    alpha: float
    part: int = 0

    @property
    def path(self) -> str:
        """The leaf's path."""
        return self.site.path

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored parameter."""
        return self.site.shape

    @property
    def dtype(self) -> str:
        """Dtype of the stored parameter."""
        return self.site.dtype

    @property
    def in_axes(self) -> tuple[int, ...]:
        """The axes that A spans."""
        return self.site.in_axes

    @property
    def out_axes(self) -> tuple[int, ...]:
        """The axes that B spans."""
        return self.site.out_axes

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The axes along which there is one weight per index."""
        return self.site.stack_axes

    @property
    def kind(self) -> str:
        """Kind of the site, as in `Site`."""
        return self.site.kind

    @property
    def uses(self) -> tuple[str, ...]:
        """The operations that read it."""
        return self.site.uses

    @property
    def materialised(self) -> str:
        """Operation that builds the weight, as in `Site`."""
        return self.site.materialised

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Target":
        """The inverse of `to_json`."""
        own = ("rank", "alpha", "part")
        found = {name: value for name, value in fields.items() if name not in own}
        rank, alpha, part = fields.get("rank"), fields.get("alpha"), fields.get("part", 0)
        return cls(Site(**found), rank, alpha, part)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """The site's fields, and what was chosen for it, as JSON-able data."""
        part = {"part": self.part} if self.part else {}
        return dataclasses.asdict(self.site) | {"rank": self.rank, "alpha": self.alpha} | part

    def of_dtype(self, dtype: str) -> "Target":
        """The same target of a base of this dtype."""
        return dataclasses.replace(self, site=dataclasses.replace(self.site, dtype=dtype))

    def factor_shapes(self, rank: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B in broadcast form, of this rank where none is given."""
        return self.site.factor_shapes(self.rank if rank is None else rank)


def sites(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> tuple[Site, ...]:
    """Finds by dataflow what `fn(params, *args)` uses every parameter for.

    The function is traced on shapes: nothing is computed, and `params` and `args` may be `jax.ShapeDtypeStruct`s. Each
    leaf is followed to where it meets an input in a product, whatever lies between. Where that is more than casts,
    reshapes, scans, remat and branches, the adapted weight is built there (`Site.materialised`): exact, and slower.

    Args:
      fn: a function of a parameter tree and further arguments.
      params: the tree.
      *args, **kwargs: the further arguments, as `fn` takes them.

    Returns:
      One `Site` per leaf, in tree order.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"w": jnp.ones((4, 3)), "bias": jnp.ones(4)}
      >>> found = jlora.sites(lambda p, x: x @ p["w"].T + p["bias"], params, jnp.ones((2, 3)))
      >>> [(site.path, site.kind, site.in_axes, site.out_axes) for site in found]
      [('bias', 'other', (), ()), ('w', 'linear', (1,), (0,))]
    """
    is_lazy = lambda x: isinstance(x, Lazy)
    if any(map(is_lazy, jax.tree.leaves(params, is_leaf=is_lazy))):
        raise TypeError("sites: the parameters are adapted already: `adapted.sites` are theirs; or give `adapted.base`")
    named, structure = tree.leaves(params)
    followed = [path for path, leaf in named.items() if _is_float(leaf)]
    if not followed:
        raise ValueError("sites: the tree of parameters holds no floating-point arrays")
    uses: list[Use] = []

    def run(weights: dict[str, jax.Array], *args: Any, **kwargs: Any) -> None:
        def of_weights(arrays: dict[str, jax.Array]) -> Any:
            fresh = jax.tree.map(lambda x: x, (args, kwargs))  # NNX forbids updates of variables made outside a trace
            return fn(jax.tree.unflatten(structure, (named | arrays).values()), *fresh[0], **fresh[1])

        uses.extend(follow(of_weights, weights))

    dtype_of = lambda path: jax.dtypes.canonicalize_dtype(named[path].dtype)  # NumPy's float64 is computed in float32
    shapes = {path: jax.ShapeDtypeStruct(named[path].shape, dtype_of(path)) for path in followed}
    tree.on_shapes(run, shapes, *args, **kwargs)
    return tuple(_site(path, leaf, [use for use in uses if use.path == path]) for path, leaf in named.items())


def conventional(params: Any) -> tuple[Site, ...]:
    """Sites by Flax's names and ranks, for `apply` without a function.

    A 2-D `kernel` is (in, out), unless a bias somewhere in the tree shows that kernels are kept (out, in); a 2-D
    `embedding` (vocabulary, width). The 3-D kernels of attention are (in, heads, width) for query, key and value and
    (heads, width, in) for out, if those of one module fit together. A 4-D or 5-D one is a convolution's (*window, in,
    out), if a bias of (out,) is beside it. Any other kernel, as those of stacked layers, is "unknown".
    """
    named, _ = tree.leaves(params)
    shapes = {path: tuple(leaf.shape) for path, leaf in named.items() if _is_array(leaf)}
    out_in = any(_is_out_in(path, shapes) for path in shapes)
    return tuple(_by_convention(path, leaf, shapes, out_in) for path, leaf in named.items())


def _is_out_in(path: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a 2-D kernel's bias has the length of its first axis alone."""
    folder, _, last = path.rpartition("/")
    shape, bias = shapes[path], shapes.get(f"{folder}/bias" if folder else "bias")
    return last == "kernel" and len(shape) == 2 and shape[0] != shape[1] and bias == shape[:1]


def _by_convention(path: str, leaf: Any, shapes: Mapping[str, tuple[int, ...]], out_in: bool) -> Site:
    shape = tuple(jnp.shape(leaf)) if _is_array(leaf) else ()
    dtype = str(leaf.dtype) if _is_array(leaf) else type(leaf).__name__
    folder, _, last = path.rpartition("/")
    module, _, part = folder.rpartition("/")
    ndim = len(shape)

    def site(kind: str, in_axes: tuple[int, ...] = (), out_axes: tuple[int, ...] = ()) -> Site:
        return Site(path, shape, dtype, in_axes, out_axes, (), kind)

    if not _is_float(leaf):
        return site("other")
    if last == "embedding" and ndim == 2:
        return site("embedding", (0,), (1,))
    if last != "kernel" or ndim < 2:
        return site("other")
    if ndim == 2:
        return site("unknown") if out_in else site("linear", (0,), (1,))
    if ndim == 3 and part in ATTENTION and _is_attention(f"{module}/" if module else "", shapes):
        return site("linear", (0, 1), (2,)) if part == "out" else site("linear", (0,), (1, 2))
    if ndim in (4, 5) and _is_convolution(shape, shapes.get(f"{folder}/bias" if folder else "bias")):
        return site("conv", tuple(range(ndim - 1)), (ndim - 1,))
    return site("unknown")


def _is_attention(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether query (in, heads, width) and out (heads, width, in) fit together; kernels of stacked layers do not."""
    query, *others, out = (shapes.get(f"{prefix}{name}/kernel", ()) for name in ATTENTION)
    return all(len(shape) == 3 and shape[1] == query[1] for shape in (query, *others)) and query[1:] == out[:2]


def _is_convolution(shape: tuple[int, ...], bias: tuple[int, ...] | None) -> bool:
    """A bias of (out,) tells; with as many inputs, a window of even size may be a transposed convolution's."""
    return bias == shape[-1:] and (shape[-2] != shape[-1] or all(size % 2 for size in shape[:-2]))


def _site(path: str, leaf: Any, uses: Sequence[Use]) -> Site:
    shape = tuple(jnp.shape(leaf)) if _is_array(leaf) else ()
    dtype = str(leaf.dtype) if _is_array(leaf) else type(leaf).__name__
    names = tuple(dict.fromkeys(use.op for use in uses))
    products = [use for use in uses if use.in_axes and use.out_axes]
    products.sort(key=lambda use: use.op != "gather")  # a tied embedding is a table first
    factored = [use for use in products if use.factored]
    if not products or len(shape) < 2:
        return Site(path, shape, dtype, (), (), (), "other", names)
    ones = tuple(i for i, n in enumerate(shape) if n == 1)
    partition = _partition(factored[0], shape) if factored else None
    if partition is None:
        return _materialised(path, shape, dtype, products, names)
    if not all(_agrees(use, partition, ones) for use in factored):
        return Site(path, shape, dtype, (), (), (), "unknown", names)
    return _of(factored[0], shape, dtype, partition, names)


def _partition(use: Use, shape: Sequence[int]) -> tuple[set[int], set[int], set[int]] | None:
    """Inputs, outputs and stack, if they are each of the axes once; those of size 1 that no product names go out."""
    inputs, outputs, stack = set(use.in_axes), set(use.out_axes), set(use.stack_axes)
    outputs |= {i for i, n in enumerate(shape) if n == 1 and i not in inputs | outputs | stack}
    complete = len(inputs) + len(outputs) + len(stack) == len(shape) and len(inputs | outputs | stack) == len(shape)
    return (inputs, outputs, stack) if complete else None


def _materialised(
    path: str, shape: tuple[int, ...], dtype: str, products: Sequence[Use], names: tuple[str, ...]
) -> Site:
    """The weight is built in any case, so that every split of its axes is exact: the first use that has one says."""
    clean = [(use, split) for use in products if (split := _partition(use, shape)) is not None]
    last = len(shape) - 1
    use, split = clean[0] if clean else (products[0], (set(range(last)), {last}, set()))
    return dataclasses.replace(_of(use, shape, dtype, split, names), materialised=use.reason or use.op)


def _of(use: Use, shape: tuple[int, ...], dtype: str, partition: Sequence[set[int]], names: tuple[str, ...]) -> Site:
    in_axes, out_axes, stack_axes = (tuple(sorted(part)) for part in partition)
    kind = {"gather": "embedding", "conv_general_dilated": "conv"}.get(use.op, "linear")
    return Site(use.path, shape, dtype, in_axes, out_axes, stack_axes, kind, names)


def _agrees(use: Use, partition: Sequence[set[int]], ones: Sequence[int]) -> bool:
    """Whether another use splits the axes in the same way, or with inputs and outputs exchanged (a tied head)."""
    mine = [set(axes) - set(ones) for axes in (use.in_axes, use.out_axes, use.stack_axes)]
    theirs = [axes - set(ones) for axes in partition]
    if use.op == "conv_general_dilated" and mine[2] == theirs[2] and mine[1] <= theirs[0] and theirs[1] <= mine[0]:
        return True  # the window stays with the inputs when a gradient exchanges the channels
    return mine == theirs or mine == [theirs[1], theirs[0], theirs[2]]


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_float(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
