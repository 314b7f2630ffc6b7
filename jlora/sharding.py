"""Where arrays lie on a mesh: a `Layout` says it of the weights and the batch, and the factors follow the weights.

    layout = jlora.sharding.MODELS                               # of all of jlora.models, by the names of their weights
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"))
    params = jlora.models.load(folder, sharding=layout.on(mesh)).params   # each process reads its parts alone
    batch = jlora.sharding.put_rows(rows, layout.rows(mesh))              # each process gives its own rows

`jlora.train_step` keeps what lies on the mesh where it lies, and puts the factors there: see `beside`.
"""

import functools
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jlora import tree
from jlora.quant.place import shardings_of
from jlora.quant.quantised import Quantised
from jlora.transform.explicit import names_of

PyTree = Any
Tree = TypeVar("Tree")
Axes = Sequence[str | tuple[str, ...] | None]
Place = Callable[[str, Any], NamedSharding]


@dataclass(frozen=True)
class Layout:
    """Over which axes of a mesh the axes of weights are split, and the rows of a batch.

    Attributes:
      rules: (pattern, axes): the first pattern that is found in a path, as by `re.search`, says how the last axes of
        the array are split: `("fsdp", "tp")` those of a matrix, whether it stands alone or in a stack of scanned layers
        or experts, whose leading axes stay whole. An axis is the name of one of the mesh, several of them, or None.
      batch: the axes of the mesh over which the rows of a batch are split, the outermost first.
      lenient: pattern of the paths whose axes stay whole where the mesh does not divide them, as GPT-2's vocabulary of
        50,257 does not divide by 2; of all others that is an error.

    Axes that are named here and not on a mesh have one device: a layout with "fsdp" and "tp" is good for data parallel
    training on a mesh of "data" alone, for either of the two, and for all three.
    """

    rules: tuple[tuple[str, Axes], ...]
    batch: tuple[str, ...] = ("dcn", "data", "fsdp")
    lenient: str = r"(?!)"

    @property
    def axes(self) -> list[str]:
        """The axes that it knows, in the order in which it names them."""
        named = [name for _, axes in self.rules for part in axes for name in names_of(part)]
        return list(dict.fromkeys([*self.batch, *named]))

    def on(self, mesh: Mesh) -> Place:
        """(path, array or shape) -> where it lies on a mesh.

        This is what `jlora.models.load(sharding=)` takes. The function raises a ValueError for a path that no rule
        covers, and for an axis that the mesh does not divide, with the sizes that would.

        Raises:
          ValueError: for a mesh with an axis that the layout does not know.
        """
        unknown = [name for name in mesh.axis_names if name not in self.axes]
        if unknown:
            raise ValueError(
                f"the mesh has the axis {unknown[0]!r}, and the layout knows {', '.join(map(repr, self.axes))}: rename "
                "it, or name it in the layout's rules or its batch="
            )

        def place(path: str, x: Any) -> NamedSharding:
            axes = self._axes_of(path)
            if axes is None:
                raise ValueError(f"no rule of the layout covers {path!r}")
            return NamedSharding(mesh, self._spec(path, x, axes, mesh))

        return place

    def shardings(self, params: PyTree, mesh: Mesh) -> PyTree:
        """The tree of `NamedSharding` of a tree of arrays or shapes; that of a quantised leaf has one for each array.

        A leaf that is no array (a module's function) stands for itself.

        Raises:
          ValueError: for all leaves that no rule covers, and as `on`.
        """
        leaves, structure = tree.leaves(params)
        place = self.on(mesh)
        bare = [path for path, leaf in leaves.items() if hasattr(leaf, "dtype") and self._axes_of(path) is None]
        if bare:
            raise ValueError(
                f"no rule of the layout covers {len(bare)} of {len(leaves)} leaves: {', '.join(bare[:10])}"
                f"{', ...' if len(bare) > 10 else ''}. A last rule of ('', ()) leaves all others whole"
            )
        places = [
            _of_leaf(path, leaf, place(path, leaf)) if hasattr(leaf, "dtype") else leaf for path, leaf in leaves.items()
        ]
        return jax.tree.unflatten(structure, places)

    def rows(self, mesh: Mesh) -> NamedSharding:
        """Where a batch lies: its rows split over the axes of `batch` that the mesh has."""
        names = tuple(name for name in self.batch if name in mesh.axis_names)
        return NamedSharding(mesh, PartitionSpec(names) if names else PartitionSpec())

    def _axes_of(self, path: str) -> Axes | None:
        return next((axes for pattern, axes in self.rules if re.search(pattern, path)), None)

    def _spec(self, path: str, x: Any, axes: Axes, mesh: Mesh) -> PartitionSpec:
        if len(axes) > len(x.shape):
            raise ValueError(f"{path!r} has shape {x.shape}, and its rule {tuple(axes)} has more axes")
        of = [tuple(name for name in names_of(part) if name in mesh.axis_names) for part in axes]
        entries: list[Any] = [None] * (len(x.shape) - len(axes))
        for axis, names in enumerate(of, len(entries)):
            fits = x.shape[axis] % math.prod(mesh.shape[name] for name in names) == 0
            if not fits and not re.search(self.lenient, path):
                raise ValueError(indivisible(path, x.shape, axis, names, mesh))
            entries.append((names if len(names) > 1 else names[0]) if names and fits else None)
        return PartitionSpec(*entries)


def indivisible(path: str, shape: Sequence[int], axis: int, names: Sequence[str], mesh: Any) -> str:
    """The error of an axis of an array that axes of a mesh do not divide: it says what would."""
    size, parts = shape[axis], math.prod(mesh.shape[name] for name in names)
    nearest = max(n for n in range(1, parts) if size % n == 0)
    return (
        f"{path!r} has shape {tuple(shape)}, and its axis {axis} of {size} is not a multiple of {parts}, the devices "
        f"of {' x '.join(names)}: the nearest that fits is {nearest}"
    )


_COLUMNS = r"(attn\w*/(query|key|value|to_q|to_k|to_v)|mlp/(fc|gate|up))"
_ROWS = r"(attn\w*/(out|to_out)|mlp/(proj|down))"

MODELS = Layout(
    (
        (rf"{_COLUMNS}/kernel$", ("fsdp", "tp")),
        (rf"{_COLUMNS}/bias$", ("tp",)),
        (rf"{_ROWS}/kernel$", ("tp", "fsdp")),
        (r"wte/embedding$", ("tp", "fsdp")),
        (r"head/kernel$", ("fsdp", "tp")),
        (r"(patch|conv_in)/kernel$", ("fsdp",)),
        (r"(kernel|embedding)$", ("fsdp", None)),
        (r"", ()),
    ),
    lenient=r"embedding|head|conv|patch|classifier|projection|pooler|dense|ff/|proj_|emb",
)
"""The layout of all of jlora.models: fully sharded over "fsdp", tensor parallel over "tp", rows over "data" and "fsdp".

A block's first products are split by columns over "tp" and its last by rows, so that one all-reduce ends each of
attention and MLP (Shoeybi et al., arXiv 1909.08053); everything with two axes lies over "fsdp" along one of them (Zhao
et al., arXiv 2304.11277). "tp" has to divide the heads, those of keys and values as well.
"""


# -- arrays ------------------------------------------------------------------------------------------------------------


def put(params: Tree, shardings: PyTree) -> Tree:
    """The tree on the devices of its shardings, `Layout.shardings(params, mesh)` or one for all.

    Over several processes each puts the parts of its own devices: every process gives the same whole arrays, and none
    sends anything. `jlora.models.load(sharding=layout.on(mesh))` does not even read the others' parts.
    """
    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda x: put_whole(x, shardings), params)
    return jax.tree.map(put_whole, params, shardings)


def put_whole(x: Any, place: Sharding | None) -> Any:
    """`jax.device_put`, also onto devices of several processes, each of which has the same array."""
    if not hasattr(x, "dtype"):
        return x
    if place is None or place.is_fully_addressable:
        return jax.device_put(x, place)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=place)(x)
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put_whole(jax.random.key_data(x), place)  # a key lies on every device, and so its numbers do
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    array = np.asarray(x)
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def put_rows(batch: Tree, place: NamedSharding) -> Tree:
    """The arrays of a batch over all devices, from the rows that each process has read.

    In one process the rows are all there are. In several, each gives those that its own devices hold: in the order of
    `row_numbers(place, rows)`, which says which rows of a batch of this size they are; processes whose devices hold the
    same rows (of one "tp" group) give the same ones.

    Args:
      batch: arrays with the process's rows along their first axes.
      place: where the rows lie: `Layout.rows(mesh)`.
    """

    def put(x: Any) -> Any:
        if not np.ndim(x):
            return x
        if isinstance(x, jax.Array) and (place.is_fully_addressable or not x.is_fully_addressable):
            return put_whole(x, place)
        if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return jax.make_array_from_process_local_data(place, np.asarray(x))

    return jax.tree.map(put, batch)


@functools.lru_cache(maxsize=32)
def parts_here(place: NamedSharding) -> tuple[int, str]:
    """In how many parts the rows of a batch lie on the devices of this process, and the axes that part them."""
    names = names_of(place.spec[0]) if place.spec else ()
    return len(row_numbers(place, math.prod(place.mesh.shape[name] for name in names))), " x ".join(names)


def row_numbers(place: NamedSharding, rows: int) -> np.ndarray:
    """Which rows of a batch of so many the devices of this process hold, ascending: (own rows,), int64.

    Raises:
      ValueError: if the devices do not divide the rows.
    """
    names = names_of(place.spec[0]) if place.spec else ()
    parts = math.prod(place.mesh.shape[name] for name in names)
    if rows % parts:
        raise ValueError(
            f"a batch of {rows} rows is not a multiple of {parts}, the devices of {' x '.join(names)}: take "
            f"{rows - rows % parts or parts} or {rows - rows % parts + parts}"
        )
    held = place.addressable_devices_indices_map((rows,)).values()
    numbers = np.arange(rows)
    return np.unique(np.concatenate([numbers[index] for index in held if index is not None]))


# -- factors -----------------------------------------------------------------------------------------------------------


def beside(factors: PyTree, base: PyTree, batch: Collection[str]) -> PyTree:
    """Where factors lie: along the axes of their weight, whole over the axes of the batch. None where it says nothing.

    A has W's input axes and B its output axes; the rank is whole. Over an axis of tensor parallelism a factor is split
    as its weight is: its product is then of the device's own part, and so is its gradient. Over the axes of the batch
    each device has other rows, and a factor of n numbers either lies there whole, for one all-reduce of its gradient, 8
    n bytes a device, or is split, for two gathers and one scatter, 12 n: whole is cheaper at any size. What has the
    shape of its weight (full fine-tuning, extras) lies as that does.

    On Explicit axes factors are whole, as `jlora.apply` starts them there: optimizers that take matrices apart (Muon)
    or all factors as one vector (L-BFGS) say of no array where it lies.

    Args:
      factors: path -> arrays of `Adapted.factors`.
      base: the weights.
      batch: the axes of the mesh over which rows are split.

    Returns:
      A `NamedSharding` in the place of each array, where the weight of its path lies on a mesh.
    """
    weights, _ = tree.leaves(base)

    def along(path: str, x: Any) -> NamedSharding | None:
        weight: Any = weights.get(path)
        place = None if weight is None else _place_of(weight)
        if place is None:
            return None
        if x.shape == weight.shape:
            return place
        if AxisType.Explicit in place.mesh.axis_types:
            return NamedSharding(place.mesh, PartitionSpec())
        axes = [*place.spec, *[None] * (len(weight.shape) - len(place.spec))]
        if len(x.shape) < len(axes):
            return NamedSharding(place.mesh, PartitionSpec())
        pairs = zip(axes, weight.shape, x.shape[: len(axes)], strict=True)
        return NamedSharding(place.mesh, PartitionSpec(*(_without(a, batch) if n == m else None for a, n, m in pairs)))

    return {path: jax.tree.map(lambda x, path=path: along(path, x), own) for path, own in factors.items()}


def axes_of_rows(batch: PyTree) -> tuple[str, ...]:
    """The axes of a mesh over which the rows of a batch lie."""
    places = (tree.placement(x) for x in jax.tree.leaves(batch))
    specs = [place.spec for place in places if isinstance(place, NamedSharding) and place.spec]
    return tuple(dict.fromkeys(name for spec in specs for name in names_of(spec[0])))


def _place_of(weight: Any) -> NamedSharding | None:
    """Where a weight lies; of a quantised one, where its codes do."""
    if isinstance(weight, Quantised):
        place = tree.placement(weight.codes)
        if not isinstance(place, NamedSharding):
            return None
        spec: list[Any] = [None] * len(weight.shape)
        for axis, entry in zip(weight.layout.order_of(weight.ndim), place.spec, strict=False):
            spec[axis] = entry
        return NamedSharding(place.mesh, PartitionSpec(*spec))
    place = tree.placement(weight)
    return place if isinstance(place, NamedSharding) else None


def _of_leaf(path: str, leaf: Any, place: NamedSharding) -> Any:
    return shardings_of(leaf, place, path) if isinstance(leaf, Quantised) else place


def _without(part: Any, names: Collection[str]) -> Any:
    kept = tuple(name for name in names_of(part) if name not in names)
    return (kept if len(kept) > 1 else kept[0]) if kept else None
