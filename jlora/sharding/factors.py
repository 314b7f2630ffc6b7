"""Where factors lie: beside their weights."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora import tree
from jlora.quant.place import spec_of_weight
from jlora.quant.quantised import Quantised
from jlora.transform.explicit import names_of

PyTree = Any


def beside(
    factors: PyTree, base: PyTree, batch: Collection[str], stacks: Mapping[str, Collection[int]] | None = None
) -> PyTree:
    """Where factors lie: along the axes of their weight, whole over the axes of the batch. None where it says nothing.

    A has W's input axes and B its output axes; the rank is whole. Over an axis of tensor parallelism a factor is split
    as its weight is: its product is then of the device's own part, and so is its gradient. Over the axes of the batch
    each device has other rows, and a factor of n numbers either lies there whole, for one all-reduce of its gradient, 8
    n bytes a device, or is split, for two gathers and one scatter, 12 n: whole is cheaper at any size. What has the
    shape of its weight (full fine-tuning, extras) lies as that does.

    Along the axes of a stack each copy of a weight has factors of its own: those of an expert lie where the expert
    lies, even if the batch is split over the same axis of the mesh, as its tokens are sent there.

    On Explicit axes factors are whole, as `jlora.apply` starts them there: optimizers that take matrices apart (Muon)
    or all factors as one vector (L-BFGS) say of no array where it lies.

    Args:
      factors: path -> arrays of `Adapted.factors`.
      base: the weights.
      batch: the axes of the mesh over which rows are split, and tokens.
      stacks: path -> the axes of the weight that count its copies, `stack_axes` of a site: layers, experts.

    Returns:
      A `NamedSharding` in the place of each array, where the weight of its path lies on a mesh.
    """
    weights, _ = tree.leaves(base)
    stacks = {} if stacks is None else stacks

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
        kept = [part if i in stacks.get(path, ()) else _without(part, batch) for i, part in enumerate(axes)]
        pairs = zip(kept, weight.shape, x.shape[: len(axes)], strict=True)
        return NamedSharding(place.mesh, PartitionSpec(*(part if n == m else None for part, n, m in pairs)))

    return {path: jax.tree.map(lambda x, path=path: along(path, x), own) for path, own in factors.items()}


def axes_of_rows(batch: PyTree) -> tuple[str, ...]:
    """The axes of a mesh over which the rows of a batch lie, and the tokens of each row."""
    places = (tree.placement(x) for x in jax.tree.leaves(batch))
    specs = [place.spec for place in places if isinstance(place, NamedSharding) and place.spec]
    return tuple(dict.fromkeys(name for spec in specs for part in spec[:2] for name in names_of(part)))


def _place_of(weight: Any) -> NamedSharding | None:
    """Where a weight lies; of a quantised one, where its codes do."""
    if isinstance(weight, Quantised):
        place = tree.placement(weight.codes)
        if not isinstance(place, NamedSharding):
            return None
        return NamedSharding(place.mesh, spec_of_weight(weight, place.spec))
    place = tree.placement(weight)
    return place if isinstance(place, NamedSharding) else None


def _without(part: Any, names: Collection[str]) -> Any:
    kept = tuple(name for name in names_of(part) if name not in names)
    return (kept if len(kept) > 1 else kept[0]) if kept else None
