"""Where a config's data lies: in a folder below the one that JLORA_DATA names (`data` when it is not set), or a hub."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from experiments.data.files import DataError

Read = TypeVar("Read")


def folder(name: str, holds: str) -> Path:
    """The folder of a data set.

    Args:
      name: of the folder.
      holds: what lies in it and where that comes from, for the error.

    Raises:
      DataError: if there is none.
    """
    path = _place(name)
    if not path.is_dir():
        raise DataError(f"there is no folder '{path}' with {holds}; JLORA_DATA names the folder that {name}/ lies in")
    return path


def folder_or_hub(name: str, local: Callable[[Path], Read], hub: Callable[[], Read]) -> Read:
    """Data of the folder of a data set, or from the hub where there is no such folder.

    Raises:
      DataError: if there is neither.
    """
    path = _place(name)
    if path.is_dir():
        return local(path)
    try:
        return hub()
    except (DataError, ImportError) as error:
        raise DataError(
            f"there is no folder '{path}' (JLORA_DATA names the folder that {name}/ lies in), and from the hub: {error}"
        ) from error


def _place(name: str) -> Path:
    return Path(os.environ.get("JLORA_DATA", "data")) / name
