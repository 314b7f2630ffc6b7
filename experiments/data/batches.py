"""Batches of rows through Grain: one order from one seed, another in each epoch, the same wherever a run is resumed."""

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import grain
import numpy as np

from experiments.data.files import DataError

Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Rows by number: a list, `Rows`, `TokenWindows`, an `ImageFolder`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches as a function of the step: each row once per epoch, in another order each time.

    The order and what a batch holds do not depend on the number of processes: each of several reads some rows of every
    batch, `rows_of(step, jlora.sharding.row_numbers(place, batch))`. A run may be resumed with another number of them.

    Attributes:
      rows: of one shape.
      batch: rows in a batch, of all processes together.
      seed: of the order; None for the rows as they come.
      epochs: how often all rows are shown; None for without end.
      last: what becomes of rows that fill no batch. "drop" leaves them out, other ones in each epoch. "pad" fills the
        last batch with copies of the first row, and a key `valid` (batch,) bool says which rows count: for evaluation.
    """

    rows: Source
    batch: int
    seed: int | None = None
    epochs: int | None = None
    last: Literal["drop", "pad"] = "drop"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise DataError(f"a batch has at least 1 row, got {self.batch}")
        if self.last == "pad" and self.seed is not None:
            raise DataError("last='pad' shows all rows in order: leave out the seed")
        if self.steps_per_epoch < 1:
            raise DataError(
                f"{self.examples} rows do not fill a batch of {self.batch}: take a smaller batch, or last='pad'"
            )

    @property
    def examples(self) -> int:
        """Rows per epoch."""
        return len(self.rows)

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return -(-self.examples // self.batch) if self.last == "pad" else self.examples // self.batch

    def __len__(self) -> int:
        return sys.maxsize if self.epochs is None else self.epochs * self.steps_per_epoch

    def __call__(self, step: int) -> Batch:
        """The batch of a step: arrays (batch, ...)."""
        self._check(step)
        return self.dataset[step]

    def rows_of(self, step: int, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Some rows of the batch of a step, by their numbers in it: arrays (numbers, ...). No others are read."""
        self._check(step)
        rows = [self._rows[step * self.batch + int(number)] for number in numbers]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _check(self, step: int) -> None:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")

    def __iter__(self) -> "Stream":
        return self.stream()

    def stream(self, state: Mapping[str, Any] | None = None, *, threads: int = 0, ahead: int = 2) -> "Stream":
        """Batches one after the other, from the first step or from where a saved stream was.

        Args:
          state: of `Stream.state()`.
          threads: that read and decode; 0 reads when a batch is asked for. The order is the same.
          ahead: batches that they read in advance.

        Raises:
          DataError: if the state is of other batches.
        """
        return Stream(self, state, grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0))

    def identity(self) -> dict[str, Any]:
        """Arguments that the order depends on."""
        return {"examples": self.examples, "batch": self.batch, "seed": self.seed, "last": self.last}

    @functools.cached_property
    def dataset(self) -> grain.MapDataset:
        """Grain's data set of the batches."""
        return self._epoch.batch(self.batch).repeat(self.epochs)

    @functools.cached_property
    def _rows(self) -> grain.MapDataset:
        """The rows of all batches, one after the other."""
        return self._epoch.repeat(self.epochs)

    @functools.cached_property
    def _epoch(self) -> grain.MapDataset:
        rows: Source = self.rows
        if self.last == "pad":
            rows = _Filled(rows, self.steps_per_epoch * self.batch)
        dataset = grain.MapDataset.source(rows)
        if self.seed is not None:
            # Grain adds the epoch to the seed: with small seeds, one run's second epoch would be another's first.
            dataset = dataset.shuffle(seed=int(np.random.SeedSequence(self.seed).generate_state(1)[0]))
        return dataset[: self.steps_per_epoch * self.batch]


class Stream(Iterator[Batch]):
    """An iterator over `Batches` whose position is saved and restored."""

    def __init__(self, batches: Batches, state: Mapping[str, Any] | None, options: grain.ReadOptions) -> None:
        self._batches = batches
        self._iterator = iter(batches.dataset.to_iter_dataset(options))
        if state is not None:
            mine, saved = batches.identity(), state.get("of")
            if saved != mine:
                raise DataError(f"the saved position is of the batches {saved}, these are {mine}: the data has changed")
            self._iterator.set_state(state["position"])

    def __next__(self) -> Batch:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """The position, as JSON. `batches.stream(state)` goes on with the batch that would have come next."""
        return {"of": self._batches.identity(), "position": self._iterator.get_state()}


@dataclass(frozen=True, eq=False)
class _Filled:
    """Rows with a key `valid`, and copies of the first row at the end, of which it is False."""

    rows: Source
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        valid = index < len(self.rows)
        return {**self.rows[index if valid else 0], "valid": np.bool_(valid)}
