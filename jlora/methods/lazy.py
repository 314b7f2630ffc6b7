"""The lazy weight of a target, wherever its arrays lie."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jlora import tree
from jlora.transform.explicit import explicit_mesh, on_auto_axes, spec_of
from jlora.transform.sites import Target
from jlora.transform.weight import Weight

Arrays = dict[str, jax.Array]


def lazy_weight(
    of: Callable[[Any, Target, Arrays, Arrays], Weight],
    w: Any,
    target: Target,
    factors: Arrays,
    buffers: Arrays,
    stored: bool = False,
) -> Weight:
    """The weight `of(w, target, factors, buffers)`, wherever the arrays lie; its `w` is `w` itself if not changed.

    On a mesh of explicit axes a changed `w` lies as `w` does. The other parts lie along a stack axis as `w` does, since
    a product asks for that of what it is batched over, and along the other axes as the factors that span these.

    A stored w is dequantised for `of`, whose result holds the stored one if it is not changed; `stored` says that `of`
    takes it as it is, which it gets but on a mesh of explicit axes.
    """
    if tree.is_stored(w):
        if stored and explicit_mesh((w, factors, buffers)) is None:
            return of(w, target, factors, buffers)
        array = tree.dense(w, target.path)
        weight = lazy_weight(of, array, target, factors, buffers)
        return weight.replace(w=w) if weight.w is array else weight

    def make(w: jax.Array, factors: Arrays, buffers: Arrays) -> Weight:
        weight = of(w, target, factors, buffers)
        return weight.replace(w=None) if weight.w is w else weight

    def place(weight: Weight) -> Weight:
        stack = PartitionSpec(*(axis if i in target.stack_axes else None for i, axis in enumerate(spec_of(w))))
        known = [(w.shape, stack), *((x.shape, spec_of(x)) for x in (*factors.values(), *buffers.values()))]
        beside = {name: _beside(getattr(weight, name), target, known) for name in ("unscaled", "b", "gain")}
        return weight.replace(w=None if weight.w is None else spec_of(w), **beside)

    weight = on_auto_axes(make, w, factors, buffers, place=place)
    return weight.replace(w=w) if weight.w is None else weight


def _beside(
    part: jax.Array | None, target: Target, known: Sequence[tuple[tuple[int, ...], PartitionSpec]]
) -> PartitionSpec | None:
    """Where a part in broadcast form lies: along each axis as the first array in that form that spans it."""
    if part is None:
        return None
    axes: list[Any] = [None] * part.ndim
    used: set[str] = set()
    for shape, spec in known:
        if len(shape) >= len(target.shape) and all(n in (1, m) for n, m in zip(shape, target.shape, strict=False)):
            for i, axis in enumerate(spec[: len(target.shape)]):
                if axes[i] is None and part.shape[i] == shape[i] and not used & (names := _names(axis)):
                    axes[i] = axis
                    used |= names
    return PartitionSpec(*axes)


def _names(axis: Any) -> set[str]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return set() if axis is None else set(axis) if isinstance(axis, tuple) else {axis}
