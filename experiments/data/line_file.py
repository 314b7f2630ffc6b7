"""Lines of a file that is larger than memory, by number."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.data.files import DataError, existing

_STRIDE = 64  # lines between two places that are remembered: 8 bytes for 64 lines
_BLOCK = 1 << 20  # bytes looked at once while counting


class LineFile:
    r"""A text file as a sequence of lines, of which none is held in memory.

    Only the place of every 64th line is: 8 bytes for 64 lines. The file is mapped, so that the operating system keeps
    what is read often and drops it when memory is short. Threads may read at once. `Batches(Rows(len(file), make))`
    makes rows of its lines as they are asked for.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w") as file:
    ...     print("one", "two", "three", sep="\n", file=file, flush=True)
    ...     numbers = LineFile(file.name)
    ...     len(numbers), numbers[2], numbers[-2]
    (3, 'three', 'two')
    """

    def __init__(self, path: str | Path, stride: int = _STRIDE) -> None:
        self.path = existing(path)
        self.stride = stride
        if not self.path.stat().st_size:
            raise DataError(f"{path}: no lines in this file")
        with self.path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._places, self._count = _index(self._bytes, stride)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        if not -self._count <= index < self._count:
            raise IndexError(f"line {index} of {self._count}")
        block, rest = divmod(index % self._count, self.stride)
        start = int(self._places[block])
        for _ in range(rest):
            start = self._bytes.find(b"\n", start) + 1
        end = self._bytes.find(b"\n", start)
        line = self._bytes[start : end if end >= 0 else len(self._bytes)]
        try:
            return line.decode("utf-8-sig" if start == 0 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}, line {index % self._count + 1}: not UTF-8 ({error.reason} at byte {error.start})"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(self._count))


def _index(content: mmap.mmap, stride: int) -> tuple[np.ndarray, int]:
    """The places of lines 0, stride, 2 stride ..., and how many lines there are."""
    places, count = [np.zeros(1, np.int64)], 0
    for start in range(0, len(content), _BLOCK):
        ends = np.flatnonzero(np.frombuffer(content[start : start + _BLOCK], np.uint8) == ord("\n"))
        numbers = np.arange(count + 1, count + 1 + len(ends))  # of the lines that begin behind them
        places.append(start + 1 + ends[numbers % stride == 0])
        count += len(ends)
    return np.concatenate(places), count + (content[len(content) - 1] != ord("\n"))
