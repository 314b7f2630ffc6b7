"""What a worker's memory may be, and how it is kept there: programs and arrays of earlier files are dropped.

A plugin of pytest, since examples in docstrings are bounded, too, and lie outside of this folder's conftest.
"""

import ctypes
import functools
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

LIMIT = 1500  # MB that a worker may take at any time: two of them and the run's own process fit in 4 GB
ENOUGH = 700  # MB above which a file starts anew; below, what is compiled already is worth more than the room
FULL = 1000  # MB above which a test's programs are dropped before the file ends
SOME = 50  # MB more than the last start left: a file of small examples leaves less
GROWN = 250  # MB more than the last dropping left: what cannot be dropped is not tried again and again
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def megabytes(field: str) -> float:
    """`VmRSS`, what the process takes now, or `VmHWM`, the most since `forget_peak`; 0 where there is no /proc."""
    if not STATUS.exists():
        return 0.0
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Sets `VmHWM` to what is taken now. Where it is not allowed, a later file answers for an earlier one."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return


def drop() -> None:
    """Drops compiled programs, the caches of jlora and the tests', and what they held."""
    jax.clear_caches()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("jlora", "experiments", "tests"):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # free pages go back: glibc keeps them else


class Bound:
    """Drops what tests left, before a file and between two of its tests, where it is worth it."""

    def __init__(self) -> None:
        self.base = self.left = 0.0

    def start(self) -> None:
        """Before a file: drops what earlier ones left. The peak and the bound from here on are its own."""
        if megabytes("VmRSS") > max(ENOUGH, self.base + SOME):
            drop()
            self.base = megabytes("VmRSS")
        forget_peak()
        self.left = megabytes("VmRSS")
        self.base = min(self.base, self.left)

    def between(self) -> None:
        """Between two tests of the file."""
        if megabytes("VmRSS") > max(FULL, self.left + GROWN):
            drop()
            self.left = megabytes("VmRSS")
            self.base = min(self.base, self.left)


def check(name: str, limit: float = LIMIT) -> None:
    """Raises AssertionError with the file's `name` where the peak since `forget_peak` was above `limit` MB."""
    peak = megabytes("VmHWM")
    assert peak <= limit, f"{name} took its worker to {peak:.0f} MB; at most {limit:.0f} are allowed (tests/memory.py)"


BOUND = Bound()


@pytest.fixture(autouse=True, scope="module")
def bounded_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """No file's tests take a worker above `LIMIT`: before each is dropped what others left, if it is much."""
    BOUND.start()
    yield
    check(request.node.nodeid)


@pytest.fixture(autouse=True)
def bounded_within_the_file() -> Iterator[None]:
    yield
    BOUND.between()
