"""Run folders: what belongs to which config, and files that are whole or absent."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from experiments.config import ConfigError

_CLAIM = "experiment.json"


def claim(folder: Path, description: dict[str, Any], *, resume: bool) -> None:
    """Makes `folder` the folder of an experiment, or finds that it is already.

    Without `resume` an earlier run of the same experiment in it is deleted.

    Args:
      folder: made if absent.
      description: the config and the data, as JSON; kept in the folder.
      resume: keep what an interrupted run left.

    Raises:
      ConfigError: if the folder belongs to another config or data, is no run folder, or if there is nothing to resume.
    """
    known = folder / _CLAIM
    if not known.exists():
        if resume:
            raise ConfigError(f"--resume: there is no run in '{folder}'; start it without --resume")
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"'{folder}' is not empty and no run folder (it has no {_CLAIM}): choose another --folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(known, description)
        return
    difference = _difference(json.loads(known.read_text()), json.loads(json.dumps(description)))
    if difference:
        raise ConfigError(
            f"'{folder}' belongs to another config: {'; '.join(difference[:4])}. Choose another --folder, or delete it"
        )
    if not resume:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != known:
                path.unlink()


def _difference(there: Any, here: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, as 'train.steps is 100 there and 200 here'."""
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


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file: afterwards it is there as a whole, or as it was before."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, by way of a temporary name."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)
