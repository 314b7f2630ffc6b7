"""Rows of JSON lines, JSON, CSV and TSV files, each with the line that it stands on.

A JSON-lines file has an object on each line, a JSON file one list of objects. CSV and TSV have a header; a cell of CSV
may stand in double quotes, with line breaks in it and a double quote written twice (RFC 4180); in TSV a quote is a
character like others, as in the GLUE download. All are UTF-8, with or without a byte order mark, their ends of lines
those of any system.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data.files import DataError, existing, lines, shown

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_LARGEST_CELL = 1 << 27  # characters


class Record(NamedTuple):
    """A row: where it stands, "mine.jsonl, line 3", and its cells by the names of their columns."""

    place: str
    cells: Mapping[str, Any]

    def text(self, column: str) -> str:
        """A cell that is text, and not blank.

        Raises:
          DataError: if it is missing, of another type or blank.
        """
        value = self.value(column)
        if not isinstance(value, str):
            raise DataError(f"{self.place}: {column!r} is {named(value)}, expected text: {shown(json_of(value))}")
        if not value.strip():
            raise DataError(f"{self.place}: {column!r} is empty: remove the row or fill it")
        return value

    def value(self, column: str) -> Any:
        """A cell.

        Raises:
          DataError: if it is missing.
        """
        if column not in self.cells:
            raise DataError(f"{self.place}: no {column!r}; there is {', '.join(map(repr, self.cells)) or 'nothing'}")
        return self.cells[column]


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Attributes:
      name: of the file, for errors.
      columns: all names that rows have, in order of appearance.
      records: in order.
    """

    name: str
    columns: tuple[str, ...]
    records: Sequence[Record]


def read_table(path: str | Path) -> Table:
    """A `.jsonl`, `.json`, `.csv` or `.tsv` file.

    Raises:
      DataError: with the file and the line: for what is not of its format, rows of another width than the header,
        columns or keys that occur twice, quotes that do not end; for a file without rows or of another suffix.
    """
    path = existing(path)
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _delimited, ".tsv": _delimited}
    if path.suffix.lower() not in readers:
        raise DataError(f"'{path}' is no file of rows: its name has to end in {', '.join(SUFFIXES)}")
    return table(str(path), readers[path.suffix.lower()](path))


def table(name: str, records: Iterator[Record]) -> Table:
    """The table of some records.

    Raises:
      DataError: if there is none.
    """
    found = list(records)
    if not found:
        raise DataError(f"{name}: no rows in this file")
    return Table(name, tuple(dict.fromkeys(column for record in found for column in record.cells)), found)


def named(value: Any) -> str:
    """Type of a JSON value in words."""
    kinds = {type(None): "nothing (null)", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return kinds.get(type(value), "a list" if isinstance(value, list | tuple) else "an object")


def json_of(value: Any) -> str:
    """A value as JSON, for errors."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in lines(path):
        if line.strip():
            place = f"{path}, line {number}"
            yield _record(place, _parsed(place, line))


def _json(path: Path) -> Iterator[Record]:
    content = _parsed(str(path), "\n".join(line for _, line in lines(path)))
    if not isinstance(content, list):
        raise DataError(f"{path}: it holds {named(content)}, expected a list of objects; name JSON lines .jsonl")
    for number, item in enumerate(content, 1):
        yield _record(f"{path}, item {number}", item)


def _record(place: str, item: Any) -> Record:
    if not isinstance(item, dict):
        hint = "; a file that is one list is named .json" if place.endswith("line 1") and isinstance(item, list) else ""
        raise DataError(f"{place}: {named(item)}, expected an object with the columns: {shown(json_of(item))}{hint}")
    return Record(place, item)


def _parsed(place: str, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise DataError(f"{place}: the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except DataError:
        raise
    except RecursionError as error:
        raise DataError(f"{place}: lists or objects too deep within one another") from error
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error}): {shown(text)}") from error


def _delimited(path: Path) -> Iterator[Record]:
    rows = _rows(path, quoted=path.suffix.lower() == ".csv")
    header = next(rows, None)
    if header is None:
        raise DataError(f"{path}: no rows in this file")
    number, names = header[0], [name.strip() for name in header[1]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if "" in names or twice:
        what = f"the column {twice[0]!r} occurs twice" if twice and twice[0] else "a column without a name"
        raise DataError(f"{path}, line {number}: {what} in the header: {shown(', '.join(names))}")
    for number, row in rows:
        if len(row) != len(names):
            why = (
                "; a quote that does not end takes the lines below with it" if any("\n" in cell for cell in row) else ""
            )
            raise DataError(
                f"{path}, line {number}: {len(row)} cells, and the header has {len(names)} ({', '.join(names)})"
                f"{why}: {shown(str(row[0]))}"
            )
        yield Record(f"{path}, line {number}", dict(zip(names, row, strict=True)))


def _rows(path: Path, *, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with the line on which each begins."""
    if not quoted:
        yield from ((number, line.split("\t")) for number, line in lines(path) if line.strip())
        return
    numbered = lines(path)
    last = 0

    def fed() -> Iterator[str]:
        nonlocal last
        for number, line in numbered:
            last = number
            yield line + "\n"

    before = csv.field_size_limit(_LARGEST_CELL)
    try:
        reader = csv.reader(fed(), strict=True)
        while True:
            begins = last + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"{path}, line {begins}: {_unquoted(str(error))} (the row begins here and was read up to line "
                    f"{last})"
                ) from error
            if row is None:
                return
            if any(cell.strip() for cell in row):
                yield begins, row
    finally:
        csv.field_size_limit(before)


def _unquoted(message: str) -> str:
    if "unexpected end" in message:
        return "a double quote opens a cell and none closes it: write the quotes within a cell twice"
    if "expected after" in message:
        return "text stands behind a cell's closing double quote: write the quotes within a cell twice"
    return message
