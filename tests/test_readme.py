"""The Python of every README runs, each fenced block on its own; what they point to is there.

The thorough tier gives each block a process of its own.
"""

import importlib.util
import os
import re
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest

from jlora.methods import table
from tests import memory

ROOT = Path(__file__).resolve().parent.parent
READMES = (
    "README.md",
    "jlora/README.md",
    "jlora/cli/README.md",
    "jlora/methods/README.md",
    "jlora/interop/README.md",
    "jlora/models/README.md",
    "jlora/models/diffusion/README.md",
    "jlora/planning/README.md",
    "jlora/quant/README.md",
    "experiments/README.md",
    "experiments/launch/README.md",
    "tests/README.md",
)
LARGEST = 8000  # bytes of the first page


def blocks(text: str) -> dict[str, str]:
    """The blocks fenced as ```python, named by the heading above them and a number."""
    found: dict[str, str] = {}
    heading, fence, lines = "top", "", []
    for line in text.splitlines():
        if fence and line.strip() == "```":
            if fence.strip("` ").split()[:1] in (["python"], ["py"]):
                found[f"{heading}-{len(found) + 1}"] = "\n".join(lines)
            fence = ""
        elif fence:
            lines.append(line)
        elif line.startswith("```"):
            fence, lines = line, []
        elif line.startswith("#"):
            heading = line.strip("# ")
    return found


EXAMPLES = {
    f"{name}:{heading}": block for name in READMES for heading, block in blocks((ROOT / name).read_text()).items()
}

LARGE = ("jlora/models/diffusion/README.md",)  # whose programs take JAX 0.10 above what a worker may hold


@pytest.mark.loose_promotion
@pytest.mark.filterwarnings("default", "error::DeprecationWarning:__main__")
@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.startswith(LARGE)])
def test_example_runs_here(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In this process, which has imported everything before: starting another is most of what an example takes."""
    memory.drop()  # no example takes up a program of another
    monkeypatch.chdir(tmp_path)
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)  # where its classes are looked for
    exec(compile(EXAMPLES[name], name, "exec"), vars(main))


@pytest.mark.once
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith(LARGE)])
def test_example_runs_apart(name: str, tmp_path: Path):
    _run(EXAMPLES[name], tmp_path, os.environ)


@pytest.mark.thorough("test_example_runs_here")
@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.startswith(LARGE)])
def test_example_runs(name: str, tmp_path: Path):
    # As a person would: plain promotion, one device, an empty folder. Nothing deprecated is shown.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    _run(EXAMPLES[name], tmp_path, environment)


def _run(example: str, folder: Path, environment: Mapping[str, str]) -> None:
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", example]
    result = subprocess.run(
        command, cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{example}\n{result.stderr}"


def test_blocks_are_found():
    text = "# A\n```bash\n# no heading\n```\n```python\nx = 1\n```\n## B c\n``` py title\ny = 2\n\nz = 3\n```\n```\nno\n```\n"
    assert blocks(text) == {"A-1": "x = 1", "B c-2": "y = 2\n\nz = 3"}
    assert blocks("`python`\n```json\n{}\n```\n") == {}


def test_the_pages_with_examples_have_some():
    assert {name.partition(":")[0] for name in EXAMPLES} == {*READMES} - {
        "experiments/README.md",
        "experiments/launch/README.md",
        "jlora/cli/README.md",
        "tests/README.md",
    }


def test_the_first_page_is_one_page():
    assert len((ROOT / "README.md").read_bytes()) <= LARGEST


@pytest.mark.parametrize("name", [*READMES, "CHANGELOG.md"])
def test_what_it_points_to_is_there(name: str):
    text = (ROOT / name).read_text()
    files = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)]
    files += [
        f"{'../' * name.count('/')}{path}" for path in re.findall(r"(?<![\w/.])(?:configs|notebooks)/\w+\.py\b", text)
    ]
    assert [file for file in files if not (ROOT / name).parent.joinpath(file).exists()] == []


def test_names_of_jlora_exist():
    """`jlora.name` in a text, whether or not the example runs it."""
    import jlora

    named = {
        found for name in READMES for found in re.findall(r"\bjlora\.([a-z_A-Z]+)\b(?!/)", (ROOT / name).read_text())
    }
    unknown = {name for name in named if not hasattr(jlora, name) and importlib.util.find_spec(f"jlora.{name}") is None}
    assert unknown <= {"git"}


def test_the_table_of_methods_is_that_of_the_docstrings():
    assert table.written(table.README.read_text()) == table.README.read_text(), "python -m jlora.methods.table"
    with pytest.raises(ValueError, match="has no lines"):
        table.written("no table")
