"""Batches that are read while the device computes, and how long a step waited for them all the same."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

Batch = Any


class Ahead(Iterator[Batch]):
    """The batches of the steps from `begin` to `end`, made one after the other in a thread of its own.

    Their order and what is in them is that of the function, a function of the step alone: nothing depends on the time.

    Attributes:
      waited: seconds that `next` has waited so far.
      given: the step after that of the batch that it gave last.

    >>> with Ahead(lambda step: step * step, 2, 5) as batches:
    ...     list(batches)
    [4, 9, 16]
    """

    def __init__(self, make: Callable[[int], Batch], begin: int, end: int, *, ahead: int = 2) -> None:
        """`ahead` is how many batches are made before they are asked for."""
        self.waited, self.given = 0.0, begin
        self._make, self._steps = make, iter(range(begin, end))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._made: deque[Future[Batch]] = deque()
        for _ in range(ahead):
            self._begin_one()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __next__(self) -> Batch:
        """The next batch. Raises what its making raised."""
        if not self._made:
            raise StopIteration
        began, first = time.monotonic(), self._made.popleft()
        batch = first.result()
        self.waited += time.monotonic() - began
        self.given += 1
        self._begin_one()
        return batch

    def _begin_one(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._made.append(self._thread.submit(self._make, step))
