"""Which tests run: the default tier, the thorough one, and the part of it that rides along."""

import subprocess
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PARTS = 20


class Share(NamedTuple):
    """A part of the thorough tier: number `part` of `of`, or nothing where `of` is 0.

    A test belongs to the part that its name's checksum says, so that a new test moves no other.
    """

    part: int
    of: int

    @classmethod
    def parse(cls, text: str | None) -> "Share":
        """`"7/20"`; `"none"`; `"4"` for the quarter that the commit's hash chooses; None as "20", without git the first."""
        if text == "none":
            return cls(0, 0)
        part, slash, of = f"{PARTS if text is None else text}".rpartition("/")
        if not slash and of.isdecimal() and int(of):
            known = commit()
            if text is not None and not known:
                raise pytest.UsageError(f"--share={text!r} lets the commit choose the part, and git names none here")
            part = str(int(known or "0", 16) % int(of))
        if not (part.isdecimal() and of.isdecimal() and int(part) < int(of)):
            raise pytest.UsageError(
                f"--share must be 'none', a number of parts as '20', or a part as '7/20', counted from 0, not {text!r}"
            )
        return cls(int(part), int(of))

    def has(self, nodeid: str) -> bool:
        """Whether the test belongs to this part."""
        return self.of > 0 and zlib.crc32(nodeid.encode()) % self.of == self.part

    def __str__(self) -> str:
        return f"{self.part}/{self.of}" if self.of else "none"


SHARE = pytest.StashKey[Share]()
COLLECTED = pytest.StashKey[list[pytest.Item]]()


def commit() -> str:
    """The hash of the commit that is checked out; "" where git or its folder is absent."""
    try:
        out = subprocess.run(
            ("git", "rev-parse", "HEAD"), cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return out.stdout.strip() if out.returncode == 0 else ""


def is_default(item: pytest.Item) -> bool:
    """Whether the default run has it on every commit."""
    return not any(item.get_closest_marker(name) for name in TIERS)


def is_run(item: pytest.Item, config: pytest.Config) -> bool:
    """Whether this run has it, before `-m` selects."""
    if is_default(item) or any(m.name in config.option.markexpr for m in item.iter_markers() if m.name in TIERS):
        return True
    asked = any(item.get_closest_marker(name) for name in ON_REQUEST)
    return not asked and config.stash[SHARE].has(item.nodeid)


ON_REQUEST = ("endless", "tpu")
TIERS = ("thorough", *ON_REQUEST)


def thorough(rows: Iterable[Any], stand_in: str, default: Collection[Any] = ()) -> list[Any]:
    """Rows for `parametrize`: those of `default` in the default run, the others in the thorough tier.

    Args:
      rows: of a table.
      stand_in: the test that the default run has for the others: of the same file, or as "tests/test_methods.py::test_of_all".
      default: rows of the table; one that is not there is an error.
    """
    rows = list(rows)
    unknown = [row for row in default if row not in rows]
    if unknown:
        raise ValueError(f"rows that are not in the table: {unknown}")
    return [row if row in default else pytest.param(row, marks=pytest.mark.thorough(stand_in)) for row in rows]


def others(rows: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Rows of a table that are not in `default`: those that need a stand-in."""
    return [row for row in rows if row not in default]
