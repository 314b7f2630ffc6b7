"""Examples as tokens, one after the other in one array."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.data.files import DataError


class Item(NamedTuple):
    """One example.

    Attributes:
      tokens: (n,) int32.
      mark: where the second part begins: the other sentence of a pair, or the completion. n where there is none.
      label: its class or value, None without one.
      counted: (n,) bool, which tokens count as targets, where that is not all of them from `mark` on.
    """

    tokens: np.ndarray
    mark: int
    label: int | float | None
    counted: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Tokenised:
    """Items by number, held in four arrays: 393,000 examples of MNLI take 70 MB, not a gigabyte of small objects.

    Attributes:
      flat: (tokens,) int32, all items one after the other.
      ends: (items,) int64, where each ends.
      marks: (items,) int32.
      labels: (items,) int32 or float32, None without labels.
      cut: how many items were longer than the context and were cut.
      longest: tokens of the longest item before it was cut.
      counted: (tokens,) bool, `Item.counted` of all; None where the marks say it.
    """

    flat: np.ndarray
    ends: np.ndarray
    marks: np.ndarray
    labels: np.ndarray | None
    cut: int
    longest: int
    counted: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        start = int(self.ends[index - 1]) if index else 0
        label = None if self.labels is None else self.labels[index].item()
        place = slice(start, int(self.ends[index]))
        counted = None if self.counted is None else self.counted[place]
        return Item(self.flat[place], int(self.marks[index]), label, counted)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each item: (items,) int64."""
        return np.diff(self.ends, prepend=0)

    def summary(self) -> str:
        """One line for the head of a run: how many items and tokens, and what was cut."""
        cut = f"; {self.cut:,} were cut, the longest had {self.longest:,}" if self.cut else ""
        mean = len(self.flat) / max(len(self), 1)
        return f"{len(self):,} examples, {len(self.flat):,} tokens, {mean:.1f} on average{cut}"


def gather(items: Iterable[Item], *, labels: type | None, cut: int, longest: int) -> Tokenised:
    """Items in one array.

    Args:
      items: read once, one at a time.
      labels: NumPy's type of the labels, None without labels.
      cut, longest: as in `Tokenised`.
    """
    parts, marks, values, counted = [], [], [], []
    for item in items:
        parts.append(item.tokens)
        marks.append(item.mark)
        values.append(item.label)
        if item.counted is not None:
            counted.append(item.counted)
    return Tokenised(
        flat=np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32),
        ends=np.cumsum([len(part) for part in parts], dtype=np.int64),
        marks=np.array(marks, np.int32),
        labels=None if labels is None else np.array(values, labels),
        cut=cut,
        longest=longest,
        counted=np.concatenate(counted) if counted else None,
    )


def cut_to(items: Tokenised, length: int, places: Sequence[str]) -> Tokenised:
    """The first tokens of each item.

    Args:
      items: whole.
      length: tokens that stay, at most.
      places: where each stands, for errors.

    Raises:
      DataError: for items of which nothing that counts would stay: how many, and the first.
    """
    lost = np.flatnonzero(items.marks >= length)
    if len(lost):
        more = f"; so it is with {len(lost):,} examples of {len(items):,}" if len(lost) > 1 else ""
        raise DataError(
            f"{places[lost[0]]}: what is to be learned begins after {items.marks[lost[0]]} tokens, and a row has "
            f"{length}{more}. Remove them, or write a larger task.length"
        )
    lengths = items.lengths
    stays = np.arange(len(items.flat)) - np.repeat(items.ends - lengths, lengths) < length
    return Tokenised(
        flat=items.flat[stays],
        ends=np.cumsum(np.minimum(lengths, length)),
        marks=items.marks,
        labels=items.labels,
        cut=int((lengths > length).sum()),
        longest=int(lengths.max(initial=0)),
        counted=None if items.counted is None else items.counted[stays],
    )
