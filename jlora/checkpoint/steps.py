"""The folders of a run's checkpoints: which are jlora's own, and what is wrong with one, found without Orbax.

Orbax opens whatever lies in a folder that is named by a number. A pipe there never ends a read, and what is no JSON
ends in as many kinds of errors as there are readers; so it is shown jlora's own folders alone, and asked to read none
of them before `damage` has looked.
"""

import datetime
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jlora.checkpoint import seal
from jlora.checkpoint.agreement import from_json

_NAME = re.compile("0|[1-9][0-9]{0,17}")  # neither "02" nor "²": no step is written under those
_RECORD = "record/metadata"
_DESCRIBED = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/_sharding")  # Orbax's own, read whole
_LARGEST = 1 << 26  # bytes of the record, and of these


class Step(ocp.path.step.Metadata):
    """A checkpoint as Orbax knows it. Its time is not looked up in a file of it, since nothing here depends on it."""

    @property
    def commit_timestamp(self) -> datetime.datetime:
        """One time for all."""
        return datetime.datetime.fromtimestamp(0, tz=datetime.UTC)


class Steps(ocp.path.step.NameFormat[Step]):
    """Orbax's view of a run's folder: the checkpoints that are jlora's own, with nothing in them opened."""

    def build_name(self, step: int) -> str:
        """The name of a step's folder."""
        return str(step)

    def find_all(self, base_path: Any) -> Iterator[Step]:
        """The checkpoints that Orbax may count, and delete when there are too many."""
        folder = Path(os.fspath(base_path))
        return (self.find_step(base_path, step) for step in found(folder) if is_own(folder / str(step)))

    def find_step(self, base_path: Any, step: int) -> Step:
        """One of them. Raises a ValueError if it is not there."""
        folder = ocp.path.step.build_step_path(base_path, self, step)
        if not folder.is_dir():
            raise ValueError(f"there is no checkpoint of step {step} in '{base_path}'")
        return Step(step, folder)


def found(folder: Path) -> list[int]:
    """The steps that folders are named by, jlora's own or not, in order."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if _NAME.fullmatch(name) and (folder / name).is_dir())


def is_own(folder: Path) -> bool:
    """Whether a folder is a checkpoint that jlora wrote, whole or damaged: it has a seal or a record."""
    return not folder.is_symlink() and any(os.path.lexists(folder / name) for name in (seal.NAME, _RECORD))


def is_sealed(folder: Path) -> bool:
    """Whether all that is in it is known to be what was written, if `damage` finds nothing."""
    return os.path.lexists(folder / seal.NAME)


def record(folder: Path) -> Any:
    """The record of a checkpoint, which `damage` finds nothing wrong with."""
    return json.loads((folder / _RECORD).read_bytes())


def damage(folder: Path) -> str | None:
    """Fault of a checkpoint's files, in one line; None if there is none.

    Earlier versions of jlora wrote no seal. Of those the record is checked, and of the state that it is there.
    """
    wrong = _irregular(folder)
    if wrong or is_sealed(folder):
        return wrong or seal.damage(folder)
    try:
        with (folder / _RECORD).open("rb") as content:
            text = content.read(_LARGEST + 1)
        found = json.loads(text) if len(text) <= _LARGEST else None
    except (FileNotFoundError, NotADirectoryError):
        return f"'{_RECORD}' is missing"
    except (OSError, ValueError, RecursionError):
        return f"'{_RECORD}' is no JSON"
    if isinstance(found, dict) and found.get("sealed"):
        return f"'{seal.NAME}' is missing"
    if not _is_record(found):
        return f"'{_RECORD}' is not what was written"
    large = [name for name in _DESCRIBED if (folder / name).exists() and (folder / name).stat().st_size > _LARGEST]
    if large:
        return f"'{large[0]}' is too large"
    return None if (folder / "state").is_dir() else "'state' is missing"


def _irregular(folder: Path) -> str | None:
    """The first thing in a folder, at any depth, that is neither a folder nor a regular file."""
    rest = [folder]
    while rest:
        inside = rest.pop()
        try:
            with os.scandir(inside) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    mode = entry.stat(follow_symlinks=False).st_mode
                    if stat.S_ISDIR(mode):
                        rest.append(Path(entry.path))
                    elif not stat.S_ISREG(mode):
                        return f"{Path(entry.path).relative_to(folder).as_posix()!r} is no regular file"
        except OSError as error:
            return f"{inside.relative_to(folder).as_posix()!r} cannot be read: {error.strerror}"
    return None


def _is_record(record: Any) -> bool:
    """Whether all is there that `Checkpoints.restore` looks up, in the kinds that it takes."""
    if not isinstance(record, dict) or not {"adapter", "position", "optimizer"} <= set(record):
        return False
    adapter, optimizer, key, skipped = (record.get(name) for name in ("adapter", "optimizer", "key", "skipped"))
    try:
        if not isinstance(optimizer, str):  # the text of a tree's structure, in the earliest versions
            from_json(optimizer or ())
    except (TypeError, ValueError):
        return False
    return (
        (isinstance(adapter, dict) and isinstance(adapter.get("base"), str))
        and (isinstance(optimizer, str | list))
        and (key is None or isinstance(key, str))
        and (skipped is None or isinstance(skipped, int))
    )
