"""A stored weight (`tree.Stored`) that a model casts, turns, reshapes or cuts: done when it is dequantised."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, reshard

from jlora import tree

_PLACE: dict[str, Callable[[jax.Array, NamedSharding], jax.Array]] = {
    "constrain": lax.with_sharding_constraint,
    "reshard": reshard,
}


class Step(NamedTuple):
    """One operation on the last axes of an array, whatever stands before them: what follows keeps its leading axes.

    Attributes:
      op: "cast", "transpose", "reshape", "slice", "constrain" (`lax.with_sharding_constraint`) or "reshard" (to another
        place on an explicit mesh).
      what: the dtype, permutation, shape, or (start, limit, stride) of each axis, of the last axes alone; the sharding.
    """

    op: str
    what: Any

    def apply(self, x: jax.Array, lead: int) -> jax.Array:
        """The operation on all axes of x but the first `lead`."""
        if self.op == "cast":
            return lax.convert_element_type(x, self.what)
        if self.op == "transpose":
            return lax.transpose(x, (*range(lead), *(axis + lead for axis in self.what)))
        if self.op == "reshape":
            return lax.reshape(x, (*x.shape[:lead], *self.what))
        if self.op in _PLACE:
            return _PLACE[self.op](x, _behind(self.what, lead))
        bounds = (*((0, n, 1) for n in x.shape[:lead]), *self.what)
        return lax.slice(x, *zip(*bounds, strict=True)) if bounds else x

    def below(self, sizes: Sequence[int]) -> "Step":
        """The same operation on these many more axes, of these sizes, before its own."""
        if self.op == "cast" or not sizes:
            return self
        if self.op in _PLACE:
            return self._replace(what=_behind(self.what, len(sizes)))
        if self.op == "transpose":
            return self._replace(what=(*range(len(sizes)), *(axis + len(sizes) for axis in self.what)))
        before = tuple(sizes) if self.op == "reshape" else tuple((0, n, 1) for n in sizes)
        return self._replace(what=(*before, *self.what))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A stored weight after some steps, stored itself.

    Attributes:
      stored: the leaf as it was given, or a slice of it along leading axes.
      steps: operations on its last `inner` axes.
      inner: their number.
    """

    stored: Any
    steps: tuple[Step, ...] = dataclasses.field(metadata={"static": True})
    inner: int = dataclasses.field(metadata={"static": True})

    @property
    def lead(self) -> int:
        """Number of axes before those that the steps act on."""
        return len(self.stored.shape) - self.inner

    @property
    def leading(self) -> int:
        """Number of leading axes along which the arrays can be cut."""
        return min(self.lead, self.stored.leading)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._result().shape

    @property
    def dtype(self) -> Any:
        return self._result().dtype

    @property
    def words(self) -> str:
        """How the leaf is held."""
        return str(getattr(self.stored, "words", type(self.stored).__name__))

    def _result(self) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(self._after, jax.ShapeDtypeStruct(self.stored.shape, self.stored.dtype))

    def _after(self, array: jax.Array) -> jax.Array:
        for step in self.steps:
            array = step.apply(array, self.lead)
        return array

    def dequantise(self) -> jax.Array:
        view = self.gathered()
        return view._after(view.stored.dequantise())

    def as_held(self) -> tuple[jax.Array, tuple[int, ...]]:
        view = self.gathered()
        if any(step.op != "cast" for step in view.steps):
            return view.dequantise(), tuple(range(len(self.shape)))
        array, order = tree.as_held(view.stored)
        return view._after(array), order

    def gathered(self) -> "View":
        """The same, where a gather comes before all but casts: what is stored is gathered, few bits of each number."""
        first = next((i for i, step in enumerate(self.steps) if step.op != "cast"), None)
        if first is None or self.steps[first].op != "reshard" or not hasattr(self.stored, "gathered"):
            return self
        stored = self.stored.gathered(_behind(self.steps[first].what, self.lead))
        if stored is None:
            return self
        return dataclasses.replace(self, stored=stored, steps=(*self.steps[:first], *self.steps[first + 1 :]))


def cast(w: Any, dtype: Any) -> Any:
    """A stored weight in another dtype."""
    view = _view(w)
    return dataclasses.replace(view, steps=(*view.steps, Step("cast", jnp.dtype(dtype))))


def transpose(w: Any, permutation: tuple[int, ...]) -> Any:
    """A stored weight with its axes permuted, by itself if it knows how."""
    if hasattr(w, "transpose"):
        return w.transpose(permutation)
    view = _keep(_view(w), next((i for i, axis in enumerate(permutation) if axis != i), len(permutation)))
    own = tuple(axis - view.lead for axis in permutation[view.lead :])
    return dataclasses.replace(view, steps=(*view.steps, Step("transpose", own)))


def reshape(w: Any, shape: tuple[int, ...]) -> Any:
    """A stored weight in another shape."""
    same = [n == m for n, m in zip(w.shape, shape, strict=False)]
    view = _keep(_view(w), same.index(False) if False in same else len(same))
    # Leading axes of size 1 may be as many as one likes: those that stay have to leave the same number of elements.
    while math.prod(shape[view.lead :]) != math.prod(w.shape[view.lead :]):
        view = _keep(view, view.lead - 1)
    return dataclasses.replace(view, steps=(*view.steps, Step("reshape", shape[view.lead :])))


def cut(w: Any, bounds: Sequence[tuple[int, int, int]]) -> Any:
    """A static slice of a stored weight, `(start, limit, stride)` of each axis."""
    whole = [bound == (0, n, 1) for bound, n in zip(bounds, w.shape, strict=True)]
    if whole[0] is False and w.leading:
        w = leading(w, lambda x: lax.slice_in_dim(x, *bounds[0]))
        bounds, whole = [(0, w.shape[0], 1), *bounds[1:]], [True, *whole[1:]]
    if all(whole):
        return w
    view = _keep(_view(w), whole.index(False))
    return dataclasses.replace(view, steps=(*view.steps, Step("slice", tuple(bounds[view.lead :]))))


def placed(w: Any, op: str, sharding: NamedSharding) -> Any:
    """A stored weight that lies somewhere else once it is dequantised; `op` is "constrain" or "reshard"."""
    spec = (*sharding.spec, *[None] * (len(w.shape) - len(sharding.spec)))
    view = _keep(_view(w), next((i for i, name in enumerate(spec) if name is not None), len(spec)))
    own = NamedSharding(sharding.mesh, PartitionSpec(*spec[view.lead :]))
    return dataclasses.replace(view, steps=(*view.steps, Step(op, own)))


def _behind(sharding: NamedSharding, lead: int) -> NamedSharding:
    """The sharding with so many axes before its own, which are whole."""
    return NamedSharding(sharding.mesh, PartitionSpec(*[None] * lead, *sharding.spec))


def leading(w: Any, act: Callable[[jax.Array], jax.Array]) -> Any:
    """`act`, a slice along the first axis, of every array of a stored weight; of the whole, where it has none."""
    return jax.tree.map(act, w) if w.leading else act(w.dequantise())


def _view(w: Any) -> View:
    return w if isinstance(w, View) else View(w, (), len(w.shape) - w.leading)


def _keep(view: View, lead: int) -> View:
    """The same view, its steps on all axes but the first `lead`, if they are on fewer."""
    if lead >= view.lead:
        return view
    taken = view.stored.shape[lead : view.lead]
    return View(view.stored, tuple(step.below(taken) for step in view.steps), view.inner + len(taken))
