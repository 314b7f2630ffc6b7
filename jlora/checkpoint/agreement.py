"""Common parts of two optimizers' states: their nodes are compared, in order, not its tree as a whole.

A node is a state of one transformation (`ScaleByAdamState`, any named tuple or dataclass) with the leaves that are its
own. Moments lie one level deeper when a clipping is put before them; the nodes that hold something are still the same,
in the same order.
"""

import dataclasses
import difflib
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax

from jlora import tree

Role = Literal["", "constant", "counter"]
_COUNTS = ("count", "gradient_step")  # Optax's names for the number of updates


class Leaf(NamedTuple):
    """A leaf of a node: its place among all leaves of the state, its path in the node, and what it is.

    `role` is "constant" for a number that `optax.inject_hyperparams` was given, "counter" for a schedule's count.
    """

    place: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role = ""


@dataclasses.dataclass(frozen=True)
class Node:
    """A transformation's state: its path, the name of its type, and its own leaves."""

    path: str
    type: str
    leaves: tuple[Leaf, ...]

    @property
    def layout(self) -> tuple[Any, ...]:
        """Common part of two nodes that can take each other's place."""
        return (self.type, *(leaf[1:4] for leaf in self.leaves))

    @property
    def accumulates(self) -> bool:
        """Whether it holds more than numbers: moments, an average, gradients."""
        return any(leaf.shape != () and leaf.role != "constant" for leaf in self.leaves)

    def full(self, leaf: Leaf) -> str:
        """The path of one of its leaves in the whole state."""
        return f"{self.path}/{leaf.name}" if self.path else leaf.name

    def __str__(self) -> str:
        what = "" if self.leaves else " (which holds nothing itself, as clipping and weight decay)"
        return f"{self.type} at {self.path!r}{what}"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Nodes on both sides, and on one. Nodes without leaves are in `there` and `here` alone."""

    pairs: tuple[tuple[Node, Node], ...]
    there: tuple[Node, ...]
    here: tuple[Node, ...]

    @property
    def complete(self) -> bool:
        """Whether all that accumulates, on either side, is on both."""
        return not any(node.accumulates for node in (*self.there, *self.here))


def nodes(state: Any) -> list[Node]:
    """The nodes of an optimizer's state, in its order."""
    found = [Node("", "the state", ())]  # leaves that are in no node of their own
    _collect(state, "", "", 0, found, itertools.count())
    return found if found[0].leaves else found[1:]


def as_json(some: Sequence[Node]) -> list[Any]:
    """Nodes, as a checkpoint keeps them."""
    return [[node.path, node.type, [list(leaf) for leaf in node.leaves]] for node in some]


def from_json(some: Sequence[Any]) -> list[Node]:
    """The nodes that `as_json` was given."""
    return [
        Node(path, type_, tuple(Leaf(i, name, tuple(shape), dtype, role) for i, name, shape, dtype, role in leaves))
        for path, type_, leaves in some
    ]


def agreement(there: Sequence[Node], here: Sequence[Node]) -> Agreement:
    """Pairs nodes of the same layout, in order: first those that accumulate, then the others that hold something."""
    pairs: list[tuple[Node, Node]] = []
    for accumulates in (True, False):
        some, others = ([n for n in side if n.leaves and n.accumulates == accumulates] for side in (there, here))
        matcher = difflib.SequenceMatcher(None, [n.layout for n in some], [n.layout for n in others], autojunk=False)
        for block in matcher.get_matching_blocks():
            a, b, size = block
            pairs += zip(some[a : a + size], others[b : b + size], strict=True)
    paired = {id(node) for pair in pairs for node in pair}
    rest = (tuple(node for node in side if node.leaves and id(node) not in paired) for side in (there, here))
    return Agreement(tuple(pairs), *rest)


def first_difference(there: Sequence[Node], here: Sequence[Node]) -> str | None:
    """Where two states begin to differ, in words; None if they hold the same in the same places.

    What accumulates comes first: a schedule more or less says little about another optimizer.
    """
    moments = [[node for node in side if node.accumulates] for side in (there, here)]
    return _difference(*moments) or _difference(there, here) or _moved(there, here)


def counted(agreed: Agreement, node: Node) -> int | None:
    """The leaf of the checkpoint that counts what a new schedule counts, the nearest counter; None if there is none.

    Under `optax.MultiSteps` the counters inside of it and its own `gradient_step` count updates, unlike the run's step.
    """
    best: tuple[int, int] | None = None
    for old, new in agreed.pairs:
        for leaf, own in zip(old.leaves, new.leaves, strict=True):
            if leaf.shape == () and own.name.rsplit("/", 1)[-1] in _COUNTS:
                near = _shared(new.full(own), node.path)
                if best is None or near > best[0]:
                    best = near, leaf.place
    return None if best is None else best[1]


def _collect(
    x: Any, path: str, inner: str, owner: int, found: list[Node], indices: Iterator[int], role: Any = None
) -> None:
    children = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)[0]
    if len(children) == 1 and children[0][0] == ():
        name = inner or "value"
        shape, dtype = tuple(map(int, getattr(x, "shape", ()))), str(getattr(x, "dtype", type(x).__name__))
        leaf = Leaf(next(indices), name, shape, dtype, role(name) if role else "")
        found[owner] = dataclasses.replace(found[owner], leaves=(*found[owner].leaves, leaf))
        return
    if x is None:
        return
    if type(x) not in (dict, list, tuple):
        owner, inner, role = len(found), "", _roles(x)
        found.append(Node(path, type(x).__name__, ()))
    for keys, child in children:
        name = tree.name(keys)
        _collect(child, _join(path, name), _join(inner, name), owner, found, indices, role)


def _roles(node: Any) -> Any:
    """Name of a leaf of a node -> its role."""
    constants: set[str] = set()
    if isinstance(node, optax.InjectStatefulHyperparamsState):
        constants = {f"hyperparams/{name}" for name in node.hyperparams if name not in node.hyperparams_states}
    counts = isinstance(node, optax.ScaleByScheduleState | optax.InjectStatefulHyperparamsState | _schedule())
    return lambda name: "constant" if name in constants else "counter" if counts and name == "count" else ""


@functools.cache
def _schedule() -> type:
    """The state of a schedule in `optax.inject_hyperparams`: Optax gives no name to its type."""
    return type(jax.eval_shape(optax.schedules.WrappedSchedule(optax.constant_schedule(0.0)).init))


def _difference(there: Sequence[Node], here: Sequence[Node]) -> str | None:
    matcher = difflib.SequenceMatcher(None, [n.layout for n in there], [n.layout for n in here], autojunk=False)
    for tag, a, _, b, _ in matcher.get_opcodes():
        if tag == "insert":
            return f"{here[b]} is in the state alone"
        if tag == "delete":
            return f"{there[a]} is in the checkpoint alone"
        if tag == "replace":
            old, new = there[a], here[b]
            if old.type == new.type:
                return _leaf_difference(old, new)
            return f"{new.path!r} is {_a(old.type)} in the checkpoint and {_a(new.type)} in the state"
    return None


def _moved(there: Sequence[Node], here: Sequence[Node]) -> str | None:
    moved = ((old, new) for old, new in zip(there, here, strict=True) if old.path != new.path)
    return next((f"{old} of the checkpoint is at {new.path!r} in the state" for old, new in moved), None)


def _leaf_difference(old: Node, new: Node) -> str:
    mine, theirs = {leaf.name: leaf for leaf in new.leaves}, {leaf.name: leaf for leaf in old.leaves}
    for leaf in old.leaves:
        other = mine.get(leaf.name)
        if other is None:
            return f"{old.full(leaf)!r} is in the checkpoint alone"
        if leaf[2:4] != other[2:4]:
            return f"{new.full(other)!r} is {_what(leaf)} in the checkpoint and {_what(other)} in the state"
    return next(f"{new.full(leaf)!r} is in the state alone" for leaf in new.leaves if leaf.name not in theirs)


def _what(leaf: Leaf) -> str:
    return f"{leaf.dtype} of shape {leaf.shape}"


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'AEIOU' else 'a'} {word}"


def _shared(one: str, other: str) -> int:
    """Number of leading parts that two paths share."""
    parts = list(zip(one.split("/"), other.split("/"), strict=False))
    return next((i for i, (a, b) in enumerate(parts) if a != b), len(parts))


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
