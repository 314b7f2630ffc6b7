"""The table of methods in this folder's README, from the docstrings: `python -m jlora.methods.table` writes it anew."""

import inspect
import re
from pathlib import Path

from jlora.methods import METHODS

README = Path(__file__).parent / "README.md"
_BEGIN, _END = "<!-- from the docstrings: python -m jlora.methods.table -->", "<!-- end -->"


def table() -> str:
    """One row per method: its signature, the first sentence of its docstring, its paper."""
    rows = ["| method | what it does | source |", "|---|---|---|"]
    for name, constructor in METHODS.items():
        text = inspect.getdoc(constructor) or ""
        first = " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
        papers = dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text.partition("Source:")[2]))
        links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
        rows.append(f"| `{name}({_arguments(constructor)})` | {first} | {links} |")
    return "\n".join(rows)


def written(text: str) -> str:
    """The README with the table as it is now.

    Raises:
      ValueError: if it has no place for it.
    """
    begin, end = text.find(_BEGIN), text.find(_END)
    if begin < 0 or end < begin:
        raise ValueError(f"{README} has no lines {_BEGIN!r} and {_END!r}")
    return f"{text[:begin]}{_BEGIN}\n{table()}\n{text[end:]}"


def _arguments(constructor: object) -> str:
    parameters = inspect.signature(constructor).parameters.values()  # type: ignore[arg-type]
    return ", ".join(p.name if p.default is p.empty else f"{p.name}=" for p in parameters)


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
