"""Run folders: what belongs to which config, and files that are whole or absent."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments import hosts
from experiments.configfile import ConfigError
from jlora.checkpoint import lock
from jlora.checkpoint.lock import Lock
from jlora.checkpoint.place import folder_of

_CLAIM = "experiment.json"


def located(given: str | None, name: str) -> Path:
    """Folder of a run: the one that the command line names, a local one or its `file://` URL, or `runs/<name>`.

    Raises:
      ConfigError: for other addresses, such as `gs://bucket/run`.
    """
    try:
        return Path("runs") / name if given is None else folder_of(given)
    except ValueError as error:
        raise ConfigError(f"--folder: {error}") from error


def open_run_folder(folder: Path, description: dict[str, Any], *, resume: bool) -> Lock:
    """Makes `folder` the folder of an experiment, or finds that it is already, and locks it.

    Without `resume` an earlier run of the same experiment in it is deleted.

    Args:
      folder: made if absent.
      description: the config and the data, as JSON; kept in the folder.
      resume: keep what an interrupted run left.

    Returns:
      The lock. It is held until its `close`, the end of the object or that of the process.

    Raises:
      ConfigError: if the folder is in use, belongs to another config or data, is no run folder, or if there is nothing
        to resume.
    """
    known = folder / _CLAIM
    if not known.exists():
        if resume:
            raise ConfigError(f"--resume: there is no run in '{folder}'; start it without --resume")
        own = (lock.NAME, temporary_of(known).name)  # a run that was killed while it claimed the folder left them
        if folder.exists() and any(path.name not in own for path in folder.iterdir()):
            raise ConfigError(
                f"'{folder}' is not empty and no run folder (it has no {_CLAIM}): choose another --folder"
            )
    held = locked(folder)
    try:
        if not known.exists():
            write_json(known, description)
        difference = _difference(read_json(known), json.loads(json.dumps(description)))
        if difference:
            raise ConfigError(
                f"'{folder}' belongs to another config: {'; '.join(difference[:4])}. Choose another --folder, or "
                "delete it"
            )
        if not resume:
            clear(folder, known.name)
    except BaseException:
        held.close()
        raise
    return held


@contextlib.contextmanager
def run_folder_of_all(folder: Path, description: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """`open_run_folder` by the first process, for all processes of the run, until the end of the context."""
    with _closed(hosts.by_first_alone(lambda: open_run_folder(folder, description, resume=resume))):
        yield


@contextlib.contextmanager
def by_first_locked(folder: Path) -> Iterator[None]:
    """Exclusive use of a folder, which is made if absent, for all processes of the run: the first one has its lock.

    Raises:
      ConfigError: if another run uses it.
    """
    with _closed(hosts.by_first_alone(lambda: locked(folder))):
        yield


@contextlib.contextmanager
def _closed(held: Lock | None) -> Iterator[None]:
    try:
        yield
    finally:
        if held is not None:
            held.close()


def is_run_folder(folder: Path) -> bool:
    """Whether a run has been begun in a folder, so that there is something to resume."""
    return (folder / _CLAIM).is_file()


def locked(folder: Path) -> Lock:
    """Exclusive use of a folder, which is made if absent.

    Raises:
      ConfigError: if another process, or this one, uses it.
    """
    try:
        return Lock(folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def clear(folder: Path, *keep: str) -> None:
    """Deletes what lies in a folder, but for its lock and the names to keep."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (lock.NAME, *keep):
            path.unlink()


def _difference(there: Any, here: Any, path: str = "") -> list[str]:
    """First difference of two JSON values, as 'train.steps is 100 there and 200 here'."""
    if isinstance(there, list) and isinstance(here, list):
        there, here = (
            {item.get("name", i) if isinstance(item, dict) else i: item for i, item in enumerate(x)}
            for x in (there, here)
        )
    if isinstance(there, dict) and isinstance(here, dict):
        names = sorted({*there, *here}, key=str)
        return [
            line
            for name in names
            for line in _difference(there.get(name), here.get(name), f"{path}.{name}" if path else str(name))
        ]
    return [] if there == here else [f"{path} is {there!r} there and {here!r} here"]


def read_json(path: Path, build: Callable[[Any], Any] = lambda value: value) -> Any:
    """Reads what `write_json` wrote, and makes something of it.

    Raises:
      ConfigError: if the file is damaged.
    """
    try:
        return build(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"'{path}' is damaged ({error}): delete '{path.parent}' to begin anew what lies there"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file: afterwards it is there as a whole, or as it was before."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, as `replace` does."""
    replace(path, lambda temporary: temporary.write_text(text))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file by way of a temporary name: it is whole, or as it was. Of several processes the first does."""
    if not hosts.is_first():
        return
    temporary = temporary_of(path)
    write(temporary)
    os.replace(temporary, path)


def temporary_of(path: Path) -> Path:
    """The name that a file has while it is written; what lies there was left by a process that was killed."""
    return path.with_name(f".{path.name}.tmp")


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)
