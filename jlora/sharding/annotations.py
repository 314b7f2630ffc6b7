"""How a model's own annotations split its weights: linen's boxes (`nn.with_partitioning`), NNX's metadata."""

from collections.abc import Iterator, Sequence
from typing import Any

from jlora import tree
from jlora.transform.explicit import names_of

PyTree = Any
Axes = tuple[str | tuple[str, ...] | None, ...]
Rules = Sequence[tuple[str, str | Sequence[str] | None]]


def axes_of(annotated: PyTree, rules: Rules | None) -> dict[str, Axes]:
    """Path -> the mesh axes of each axis of the array, of the leaves that say something; see `Layout.of`."""
    boxes, _ = tree.leaves(annotated, is_leaf=_is_box)
    named = {path: names for path, box in boxes.items() if (names := _names(box)) is not None}
    tables = {path: (*_own_rules(boxes[path]), *(rules or ())) for path in named}
    if not named:
        raise ValueError(
            f"none of the {len(boxes)} leaves has an annotation (nn.with_logical_partitioning, nn.with_partitioning, "
            "nnx.with_partitioning): give the tree as model.init or nnx.split returns it, before nn.unbox"
        )
    unruled = list(dict.fromkeys(name for path in named for name in _unruled(boxes[path], tables[path], rules)))
    if unruled:
        raise ValueError(
            f"rules= says nothing of the logical axes {', '.join(map(repr, unruled))}: ({unruled[0]!r}, None) leaves "
            "one whole, and another word than None is an axis of the mesh"
        )
    return {path: _assigned(path, names, tables[path]) for path, names in named.items()}


def _is_box(x: Any) -> bool:
    """`nn.Partitioned` and its kin, and `nnx.Variable`: by what they can be asked, which needs no Flax."""
    return hasattr(type(x), "get_partition_spec") or hasattr(type(x), "get_metadata")


def _metadata(box: Any) -> dict[str, Any]:
    return box.get_metadata() if hasattr(type(box), "get_metadata") else {}


def _names(box: Any) -> list[tuple[str, ...]] | None:
    """The names that an annotation gives each axis, logical ones or the mesh's; None where it gives none."""
    if hasattr(type(box), "get_partition_spec"):
        said = box.get_partition_spec()
    else:
        said = _metadata(box).get("out_sharding") or None
        said = getattr(getattr(said, "sharding", said), "spec", said)  # NNX takes layouts and shardings, too
    return None if said is None else [names_of(part) for part in said]


def _own_rules(box: Any) -> Rules:
    return tuple(getattr(box, "rules", None) or _metadata(box).get("sharding_rules") or ())


def _unruled(box: Any, table: Rules, rules: Rules | None) -> Iterator[str]:
    """Names of a box that are in no rule. Without rules all are the mesh's own, but for linen's logical ones."""
    if rules is None and not hasattr(box, "rules"):
        return
    known = {logical for logical, _ in table} | {name for _, axes in table for name in names_of(_tuple(axes))}
    yield from (name for part in _names(box) or () for name in part if name not in known)


def _assigned(path: str, names: list[tuple[str, ...]], table: Rules) -> Axes:
    """The mesh axes of an array, as Flax gives them out: rule by rule, each axis of the mesh once, to the first that
    asks for it; a name that is in no rule is itself one.
    """
    flat = [name for part in names for name in part]
    twice = [name for name in flat if flat.count(name) > 1]
    if twice:
        raise ValueError(f"{path!r} names {twice[0]!r} for two of its axes, {tuple(names)}: a name stands for one")
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in flat if all(name != logical for logical, _ in table)}
    for logical, axes in table:
        taken = {axis for own in found.values() for axis in own}
        if logical in flat and logical not in found and not taken & set(names_of(_tuple(axes))):
            found[logical] = names_of(_tuple(axes))
    return tuple(_entry([axis for name in part for axis in found.get(name, ())]) for part in names)


def _entry(axes: Sequence[str]) -> str | tuple[str, ...] | None:
    return (tuple(axes) if len(axes) > 1 else axes[0]) if axes else None


def _tuple(axes: Any) -> Any:
    return tuple(axes) if isinstance(axes, list) else axes
