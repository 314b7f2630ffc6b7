"""Files that nobody vouches for: regular ones within their folder alone, and JSON whose size, depth and numbers end.

A folder of a checkpoint may hold a pipe, which never ends a read, a device, which never ends at all, or a link to some
file of the machine. A link is followed within the folder; and from a snapshot in a cache of the Hugging Face hub, whose
files are links to ../../blobs, to those of the same repository.
"""

import json
import math
import re
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LARGEST = 2**23  # bytes of a JSON file; those of vocabularies and indices may be larger
DEEPEST = 64  # lists and objects within one another
HALF = re.compile(r"\\u[dD][89a-fA-F]")
DIGITS = 20  # of a whole number
NO_LIMIT = str(int(1e30))  # which transformers writes for the model_max_length of a tokenizer without one


def has(file: Path) -> bool:
    """Whether there is such a file.

    Raises:
      FileNotFoundError: if it is a link to nothing.
      ValueError: if it is no regular file, or a link that leads out of the folder.
    """
    if not (file.exists() or file.is_symlink()):
        return False
    regular(file)
    return True


def regular(file: Path) -> Path:
    """Where a file lies, links followed.

    Raises:
      FileNotFoundError: if there is none, or a link to nothing.
      ValueError: if it is no regular file, or a link that leads out of the folder.
    """
    try:
        target, folder = file.resolve(strict=True), file.parent.resolve()
        mode = target.stat().st_mode
    except FileNotFoundError as error:
        why = "is a link to a file that is not there" if file.is_symlink() else "is not there"
        raise FileNotFoundError(f"'{file}' {why}") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, before Python 3.13
        raise ValueError(f"'{file}' cannot be read: {error}") from error
    if not any(target.is_relative_to(within) for within in (folder, *_blobs(folder))):
        raise ValueError(f"'{file}' is a link to '{target}', out of its folder: put the file itself there")
    if not stat.S_ISREG(mode):
        raise ValueError(f"'{file}' is no regular file")
    return target


def _blobs(folder: Path) -> Iterable[Path]:
    """Where the files of a hub's snapshot lie; `folder` has no links in it, and its blobs are to lie beside it."""
    return (parent.parent.parent / "blobs" for parent in (folder, *folder.parents) if parent.parent.name == "snapshots")


def read(file: Path, largest: int) -> bytes:
    """All bytes of a file. Errors are those of `regular`; and a ValueError for more than `largest`."""
    target = regular(file)
    try:
        with target.open("rb") as opened:
            content = opened.read(largest + 1)
    except OSError as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error
    if len(content) > largest:
        raise ValueError(f"'{file}' has more than the {largest} bytes that are read of such a file")
    return content


def read_text(file: Path, largest: int = LARGEST, *, what: str = "text") -> str:
    """A file in UTF-8, its ends of lines as they are. Errors are those of `read`; `what` it should have been."""
    try:
        return read(file, largest).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is no {what}: {error}") from error


def read_json(file: Path, largest: int = LARGEST) -> dict[str, Any]:
    """A JSON object.

    Raises:
      FileNotFoundError, ValueError: as `read`.
      ValueError: for what is no JSON or no object, a key that an object has twice, whole numbers of over 20 digits,
        others beyond the largest float, halves of characters, and lists or objects more than 64 deep. NaN and
        infinities are JSON to Python and pass: where a number is used, it is checked.
    """
    text = read_text(file, largest, what="JSON")
    try:
        return parsed(text)
    except ValueError as error:
        raise ValueError(f"'{file}' {error}") from error


def parsed(text: str) -> dict[str, Any]:
    """The JSON object of a text. Raises a ValueError, "is no JSON: ...", where `read_json` does."""
    try:
        content = json.loads(text, object_pairs_hook=_object, parse_int=_whole, parse_float=_real)
    except _Refused:
        raise
    except RecursionError as error:
        raise ValueError(f"has lists or objects more than {DEEPEST} deep") from error
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from error
    _check_depth(content)
    if HALF.search(text):
        _check_characters(content)
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected an object")
    return content


def _check_characters(content: Any) -> None:
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("has half of a character, a surrogate without its other half") from error


class _Refused(ValueError):
    """JSON that is refused."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _Refused(f"has the key {counts.most_common(1)[0][0][:80]!r} twice")
    return content


def _whole(digits: str) -> int:
    if len(digits.removeprefix("-")) > DIGITS and digits != NO_LIMIT:
        raise _Refused(f"has a whole number of {len(digits)} digits, {digits[:8]}...")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _Refused(f"has a number beyond the largest float, {digits[:20]}")
    return number


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise _Refused(f"has lists or objects more than {DEEPEST} deep")
