"""Labels as people write them: names, numbers, or values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.data.files import DataError, shown
from experiments.data.table import json_of, named


@dataclass(frozen=True)
class Labels:
    """Labels of a data set: classes or values.

    Attributes:
      classes: their names in order: alphabetical, numbers by size; None for values.
      notes: what may be a mistake, in words.
    """

    classes: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    def number(self, place: str, label: Any) -> int | float:
        """The class of a label, or its value."""
        return _value(place, label) if self.classes is None else self.classes.index(_name(place, label))


def labels_of(found: Mapping[str, Sequence[tuple[str, Any]]]) -> Labels:
    """Kind of labels, by those of all splits: (place, label) of each example.

    They are values, for a regression, if all are numbers and one has a fractional part; classes otherwise.

    Raises:
      DataError: for labels of different types, none at all, one class alone, or classes that the training split lacks.
    """
    rows = [row for part in found.values() for row in part]
    first, sort = rows[0], _sort(*rows[0])
    for place, label in rows:
        if _sort(place, label) != sort:
            raise DataError(
                f"{place}: the label is {named(label)} ({shown(json_of(label))}), and in {first[0]} it is "
                f"{named(first[1])} ({shown(json_of(first[1]))}): write all of them in one way"
            )
    numbers = [_number(label) for _, label in rows]
    if all(x is not None for x in numbers) and any(not float(x or 0).is_integer() for x in numbers):
        return Labels(None)
    seen = {split: {_name(*row): row[0] for row in reversed(part)} for split, part in found.items()}
    classes = tuple(sorted(seen["train"], key=lambda name: (_whole(name), name)))
    for split, names in seen.items():
        if unknown := sorted(set(names) - set(classes)):
            raise DataError(
                f"{names[unknown[0]]}: the class {unknown[0]!r} of the {split} split is not in the training split, "
                f"which has {_few(classes)}"
            )
    if len(classes) < 2:
        raise DataError(
            f"{first[0]}: all {len(found['train'])} labels are {classes[0]!r}: there is nothing to tell apart"
        )
    return Labels(classes, tuple(_notes(found, classes, seen)))


def _notes(found: Mapping[str, Sequence[Any]], classes: Sequence[str], seen: Mapping[str, Any]) -> list[str]:
    notes = [
        f"the {split} split lacks the classes {_few(missing)}"
        for split, names in seen.items()
        if (missing := [name for name in classes if name not in names])
    ]
    count = len(found["train"])
    if len(classes) > max(20, count // 2):
        notes.append(f"{len(classes):,} different labels in {count:,} examples: are these classes?")
    return notes


def _sort(place: str, label: Any) -> str:
    if label is None or label == "":
        raise DataError(f"{place}: the label is empty: remove the row or fill it")
    if not isinstance(label, str | bool | int | float):
        raise DataError(f"{place}: the label is {named(label)}, expected a name or a number")
    return "text" if isinstance(label, str) else "flag" if isinstance(label, bool) else "number"


def _name(place: str, label: Any) -> str:
    _sort(place, label)
    if isinstance(label, bool):
        return str(label).lower()
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label).strip()


def _number(label: Any) -> float | None:
    if isinstance(label, bool):
        return None
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _value(place: str, label: Any) -> float:
    value = _number(label)
    if value is None:
        raise DataError(f"{place}: the label {shown(json_of(label))} is no finite number, and others are values")
    return value


def _whole(name: str) -> tuple[bool, int]:
    """Numbers by size, before names."""
    digits = name.removeprefix("-").isdecimal()
    return not digits, int(name) if digits else 0


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
