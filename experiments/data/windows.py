"""Batches of windows of a text, as a function of the step alone."""

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a text in random order, every one once per epoch.

    A batch depends on nothing but the fields and the step: the position in the data is the step number, and a resumed
    run sees the same batches. Each epoch shifts the cuts by a random offset, so that they do not always fall alike.

    Attributes:
      text: (n,) uint8.
      length: of a window, in bytes, without the byte after it that is its last target.
      batch: windows per batch.
      seed: of the order.
    """

    text: np.ndarray
    length: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise ValueError(f"the text has {len(self.text)} bytes: too few for windows of {self.length}")

    @property
    def examples(self) -> int:
        """Windows per epoch, one less than there is room for, because of the offset."""
        return (len(self.text) - 1) // self.length - 1

    def __call__(self, step: int) -> np.ndarray:
        """The batch of a step: (batch, length + 1) int32."""
        rows = []
        for example in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(example, self.examples)
            offset, order = _order(self.seed, epoch, self.examples, self.length)
            start = offset + self.length * order[place]
            rows.append(self.text[start : start + self.length + 1])
        return np.stack(rows).astype(np.int32)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, examples: int, length: int) -> tuple[int, np.ndarray]:
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(length)), rng.permutation(examples)


def spread(text: np.ndarray, length: int, count: int) -> np.ndarray:
    """At most `count` windows, evenly spread over a text and disjoint in their targets: (count, length + 1) int32."""
    available = (len(text) - 1) // length
    if available < 1:
        raise ValueError(f"the text has {len(text)} bytes: too few for a window of {length}")
    places = np.unique(np.linspace(0, available - 1, min(count, available)).astype(np.int64))
    return np.stack([text[i * length : (i + 1) * length + 1] for i in places]).astype(np.int32)
