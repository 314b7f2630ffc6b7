"""A stored weight (`tree.Stored`) that a model casts, turns or reshapes: done when it is dequantised, not before."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Step = tuple[Callable[..., jax.Array], tuple[Any, ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A stored weight after some steps, stored itself.

    Attributes:
      stored: the leaf as it was given.
      steps: functions of an array with their further arguments, all of them hashable.
      shape, dtype: of the result.
    """

    stored: Any
    steps: tuple[Step, ...] = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    def dequantise(self) -> jax.Array:
        array = self.stored.dequantise()
        for fn, args in self.steps:
            array = fn(array, *args)
        return array


def then(w: Any, fn: Callable[..., jax.Array], *args: Any) -> View:
    """`fn(w, *args)` of a stored weight."""
    result = jax.eval_shape(lambda x: fn(x, *args), jax.ShapeDtypeStruct(w.shape, w.dtype))
    stored, steps = (w.stored, w.steps) if isinstance(w, View) else (w, ())
    return View(stored, (*steps, (fn, args)), result.shape, result.dtype)


def leading(w: Any, act: Callable[[jax.Array], jax.Array]) -> Any:
    """`act`, a slice along the first axis, of every array of a stored weight; of the whole once it was changed."""
    return act(w.dequantise()) if isinstance(w, View) else jax.tree.map(act, w)
