"""How a run goes on from a checkpoint: what of the optimizer's state is taken, which key it has, what is damaged."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.checkpoint.agreement import Agreement, Leaf, Node, agreement, counted, first_difference, from_json, nodes
from jlora.sharding import put_whole


class DamagedCheckpoint(ValueError):
    """A checkpoint one of whose files is missing or is not what was written.

    Attributes:
      step: of the checkpoint.
      before: the step of the newest one before it that is whole, for `restore(state, step=...)`; None if there is none.
    """

    def __init__(self, folder: str | Path, step: int, wrong: str, before: int | None) -> None:
        self.step, self.before, self._made_of = step, before, (folder, step, wrong, before)
        way = "there is none before it that is whole"
        if before is not None:
            way = f"restore(state, step={before}) takes the one before it"
        super().__init__(f"the checkpoint of step {step} in '{folder}' is damaged: {wrong}; {way}")

    def __reduce__(self) -> Any:  # to be raised in other processes, too
        return type(self), self._made_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """Parts that are taken of a checkpoint's optimizer state.

    Attributes:
      what: names the checkpoint.
      leaves: what it has.
      taken: leaf of the checkpoint -> leaf of the state.
      agreed: the nodes behind it.
      difference: where the two optimizers begin to differ, None if they do not.
    """

    what: str
    leaves: tuple[Leaf, ...]
    taken: dict[int, int]
    agreed: Agreement
    difference: str | None

    @classmethod
    def of(cls, what: str, recorded: Any, opt_state: Any, choice: str) -> "Plan":
        """The plan for `restore(optimizer=choice)`.

        Args:
          what: names the checkpoint.
          recorded: `as_json` of its nodes; in checkpoints of earlier versions the text of the tree's structure.
          opt_state: of the state that is restored.
          choice: "all", "matching" or "none".

        Raises:
          ValueError: if something that accumulates is on one side alone, and `choice` is "all".
        """
        here = nodes(opt_state)
        if isinstance(recorded, str):
            if recorded != str(jax.tree.structure(opt_state)):
                raise ValueError(
                    f"{what} was written with another optimizer, and by a version of jlora that did not keep what its "
                    "state is made of: make the state with the optimizer that it was trained with"
                )
            there: Sequence[Node] = here
        else:
            there = from_json(recorded)
        leaves = tuple(sorted(leaf for node in there for leaf in node.leaves))
        if choice == "none":
            return cls(what, leaves, {}, Agreement((), (), ()), None)
        agreed, difference = agreement(there, here), first_difference(there, here)
        if choice == "all" and not agreed.complete:
            raise ValueError(
                f"{what} was written with another optimizer: {difference}. optimizer='matching' takes what both have "
                "and begins the rest anew, optimizer='none' takes the factors alone"
            )
        taken = {
            old.place: new.place
            for one, other in agreed.pairs
            for old, new in zip(one.leaves, other.leaves, strict=True)
        }
        return cls(what, leaves, taken, agreed, difference)

    def like(self, own: Sequence[Any]) -> list[Any]:
        """Shapes and places of the checkpoint's leaves: those of the state's `own`; on the host what is not taken."""
        return [own[self.taken[leaf.place]] if leaf.place in self.taken else _on_host(leaf) for leaf in self.leaves]

    def filled(self, opt_state: Any, arrays: Sequence[Any], step: Any, hyperparams: str) -> Any:
        """The state's own structure with the checkpoint's arrays in it. What it decides is said in warnings.

        Args:
          opt_state: of the state that is restored.
          arrays: the checkpoint's leaves; those that are not taken are never looked at.
          step: the checkpoint's.
          hyperparams: "state" or "checkpoint".
        """
        before, structure = jax.tree.flatten(opt_state)
        leaves: list[Any] = [None] * len(before)
        for there, here in self.taken.items():
            leaves[here] = arrays[there]
        leaves = [jnp.copy(old) if new is None else new for old, new in zip(before, leaves, strict=True)]
        notes = [*self._counters(before, leaves, arrays, step), *self._rest()]
        if self.difference is not None:
            text = f"{self.what} was written with another optimizer: {self.difference}. What both have is taken"
            warnings.warn("; ".join([text, *notes]), UserWarning, stacklevel=3)
        if hyperparams == "state":
            self._constants(before, leaves)
        return jax.tree.unflatten(structure, leaves)

    def _counters(self, before: list[Any], leaves: list[Any], arrays: Sequence[Any], step: Any) -> list[str]:
        """A schedule that the checkpoint does not have is read where it would be, had it been there from the start."""
        notes = []
        for node in self.agreed.here:
            nearest = counted(self.agreed, node)
            value = int(step if nearest is None else arrays[nearest])
            for leaf in node.leaves:
                if leaf.role == "counter":
                    old = before[leaf.place]
                    leaves[leaf.place] = put_whole(np.asarray(value, old.dtype), getattr(old, "sharding", None))
                    notes.append(f"{node.full(leaf)!r} goes on from {value}")
        return notes

    def _rest(self) -> list[str]:
        anew = [str(node) for node in self.agreed.here if any(leaf.role == "" for leaf in node.leaves)]
        left = [str(node) for node in self.agreed.there if any(leaf.role == "" for leaf in node.leaves)]
        return [
            *([f"{_some(anew)} begins anew"] if anew else []),
            *([f"{_some(left)} of the checkpoint is left out"] if left else []),
        ]

    def _constants(self, before: list[Any], leaves: list[Any]) -> None:
        """Hyperparameters that `optax.inject_hyperparams` has in this run, in place of the last one's."""
        different = []
        for _, node in self.agreed.pairs:
            for leaf in node.leaves:
                if leaf.role == "constant" and not _equal(before[leaf.place], leaves[leaf.place]):
                    different.append(_both(leaf, leaves[leaf.place], before[leaf.place]))
                    leaves[leaf.place] = jnp.copy(before[leaf.place])
        if different:
            text = f"{self.what} and the optimizer of the state have other hyperparameters: {_some(different)}"
            way = "Those of the state are taken; hyperparams='checkpoint' takes the others"
            warnings.warn(f"{text}. {way}", UserWarning, stacklevel=4)


def key_like(state_key: jax.Array, kind: str | None) -> jax.ShapeDtypeStruct:
    """Shape and place of the data of a checkpoint's key, which may be of another kind than the state's."""
    data = jax.random.key_data(state_key)
    shape = data.shape
    if kind is not None and kind != kind_of(state_key):
        shape = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=kind))).shape
    return jax.ShapeDtypeStruct(shape, data.dtype, sharding=data.sharding)


def key_of(what: str, data: jax.Array, kind: str | None, state_key: jax.Array) -> jax.Array:
    """The checkpoint's key, of its own kind. A warning says where that is not the state's."""
    if kind is None or kind == kind_of(state_key):
        typed = jnp.issubdtype(state_key.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(state_key)) if typed else data
    warnings.warn(
        f"{what} has a key of the kind {kind!r}, the state one of {kind_of(state_key)!r}: the checkpoint's is taken. "
        "dataclasses.replace(restored, key=...) sets another",
        UserWarning,
        stacklevel=3,
    )
    return jax.random.wrap_key_data(data, impl=kind)


def kind_of(key: jax.Array) -> str:
    """The name of a key's generator, "threefry2x32". An old-style key (`jax.random.PRNGKey`) is of the default's."""
    return str(jax.random.key_impl(key))


def _on_host(leaf: Leaf) -> Any:
    if leaf.dtype.startswith("key<"):  # which NumPy does not have
        return jax.random.key(0)
    return np.broadcast_to(np.zeros((), jnp.dtype(leaf.dtype)), leaf.shape)


def _equal(some: Any, other: Any) -> bool:
    return bool(np.array_equal(np.asarray(some), np.asarray(other)))


def _both(leaf: Leaf, there: Any, here: Any) -> str:
    name = leaf.name.removeprefix("hyperparams/")
    return f"{name} is {_number(there)} in the checkpoint and {_number(here)} in the state"


def _number(x: Any) -> str:
    return f"{float(x):g}" if np.shape(x) == () else f"an array of shape {np.shape(x)}"


def _some(texts: list[str], limit: int = 4) -> str:
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
