"""E2E NLG: restaurant descriptions from meaning representations, in both forms that are in use.

Sources: Novikova et al., "The E2E Dataset: New Challenges For End-to-End Generation", arXiv 1706.09254; the form with
`||` is that of microsoft/LoRA, examples/NLG/data/e2e; the cleaned csv is that of Dusek et al., "Semantic Noise
Matters for Neural Natural Language Generation", arXiv 1911.03905.
"""

import csv
from pathlib import Path

from experiments.data.examples import References, grouped
from experiments.data.files import DataError, collect, existing, filled, lines, read_lines, shown


def read_e2e(path: str | Path) -> list[References]:
    """References by meaning representation.

    Args:
      path: a `.csv` with the columns `mr` and `ref` (others are left out), or a text file with lines `mr||text`.

    Raises:
      DataError: with the file and the line, if the line is malformed, or a text or an mr is empty.
    """
    if Path(path).suffix == ".csv":
        return grouped(_read_csv(existing(path)))
    return grouped(read_lines(path, _read_line))


def _read_line(line: str) -> tuple[str, str, str]:
    source, separator, text = line.partition("||")
    if not separator:
        raise DataError(f"no '||' between meaning representation and text: {shown(line)}")
    return filled(source, "meaning representation"), filled(text), ""


def _read_csv(path: Path) -> list[tuple[str, str, str]]:
    rows = csv.reader(line for _, line in lines(path))  # E2E has no line breaks within its fields
    header = next(rows, [])
    for name in ("mr", "ref"):
        if name not in header:
            raise DataError(f"{path}, line 1: no column {name!r}; there are {', '.join(map(repr, header)) or 'none'}")

    def read(row: list[str]) -> tuple[str, str, str]:
        if len(row) != len(header):
            raise DataError(f"{len(row)} columns, expected {len(header)} ({', '.join(header)})")
        fields = dict(zip(header, row, strict=True))
        return filled(fields["mr"], "meaning representation"), filled(fields["ref"]), ""

    return collect(path, ((number, row) for number, row in enumerate(rows, 2) if row), read)
