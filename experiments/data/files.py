"""Files as they are read: what is missing or malformed is said with the file's name and the line."""

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

Read = TypeVar("Read")
Malformed = Literal["raise", "skip"]
"""Treatment of a malformed line: an error, or a warning that counts all of them."""


class DataError(ValueError):
    """Data is missing, malformed or does not fit what it is used for. Shown without a traceback."""


def existing(path: str | Path, kind: Literal["file", "folder", "file or folder"] = "file") -> Path:
    """The path, if it is what it has to be.

    Raises:
      DataError: if it is not there, listing names that are near; or if it is a folder in place of a file.
    """
    path = Path(path)
    if {"file": path.is_file(), "folder": path.is_dir()}.get(kind, path.exists()):
        return path
    if path.exists():
        raise DataError(f"'{path}' is a {'folder' if path.is_dir() else 'file'}, expected a {kind}")
    if not path.parent.is_dir():
        raise DataError(f"{kind} '{path}' does not exist, nor does the folder '{path.parent}'")
    names = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, 3, 0.4) or names[:3]
    if not near:
        raise DataError(f"{kind} '{path}' does not exist: the folder '{path.parent}' is empty")
    raise DataError(f"{kind} '{path}' does not exist; near it are {', '.join(map(repr, near))}")


def lines(path: str | Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    r"""The lines of a text file with their numbers from 1, without `\n` or `\r\n` and without a byte order mark.

    Other characters that Unicode calls line breaks stay within their line: some data sets have them in sentences.

    Raises:
      DataError: if the file is missing, or for a line in another encoding.
    """
    path = existing(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode(encoding).removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not {encoding} ({error.reason} at byte {error.start} of the line)"
                ) from error
            yield number, text.removesuffix("\n").removesuffix("\r")


def read_lines(
    path: str | Path,
    read: Callable[[str], Read],
    *,
    skip_header: bool = False,
    malformed: Malformed = "raise",
    encoding: str = "utf-8",
) -> list[Read]:
    """Results of `read` for each line that is not blank.

    Args:
      path: of the file.
      read: makes an example of a line; a `DataError` of its own says what is wrong with the line.
      skip_header: leave out the first line.
      malformed: "raise" stops at the first malformed line; "skip" leaves them out and warns, with their number.
      encoding: of the file.

    Raises:
      DataError: with the file and the line; or if no line is left.
    """
    numbered = lines(path, encoding)
    rows = ((number, line) for number, line in numbered if line.strip() and not (skip_header and number == 1))
    return collect(path, rows, read, malformed=malformed)


def collect(
    path: str | Path,
    items: Iterable[tuple[int, Read]],
    read: Callable[[Read], "Other"],
    *,
    unit: str = "line",
    malformed: Malformed = "raise",
) -> list["Other"]:
    """Results of `read` for numbered items of a file, as in `read_lines`.

    Raises:
      DataError: with the file and the item's number; or if no item is left.
    """
    found, wrong = [], []
    for number, item in items:
        try:
            found.append(read(item))
        except DataError as error:
            message = f"{path}, {unit} {number}: {error}"
            if malformed == "raise":
                raise DataError(message) from error
            wrong.append(message)
    if wrong:
        warnings.warn(f"{len(wrong)} malformed {unit}s were left out; the first: {wrong[0]}", stacklevel=3)
    if not found:
        raise DataError(f"{path}: no examples in this file")
    return found


Other = TypeVar("Other")


def columns(line: str, names: tuple[str, ...], separator: str = "\t") -> dict[str, str]:
    """The fields of a line of a table, by the names of the columns.

    Raises:
      DataError: if their number is another.
    """
    fields = line.split(separator)
    if len(fields) != len(names):
        raise DataError(f"{len(fields)} columns, expected {len(names)} ({', '.join(names)}): {shown(line)}")
    return dict(zip(names, fields, strict=True))


def filled(text: str, what: str = "text") -> str:
    """The text, without blanks around it.

    Raises:
      DataError: if nothing is left.
    """
    text = text.strip()
    if not text:
        raise DataError(f"empty {what}: remove the line or fill it")
    return text


def shown(text: str, width: int = 60) -> str:
    """The beginning of a text, as it appears in an error."""
    return repr(text if len(text) <= width else text[: width - 3] + "...")
