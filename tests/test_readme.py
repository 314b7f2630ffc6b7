"""The README's Python runs: every fenced block, each on its own, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


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


# A README that is missing, or holds no example, is one failing case: without parameters the test would be skipped.
EXAMPLES = blocks(README.read_text()) if README.exists() else {}


@pytest.mark.parametrize("name", EXAMPLES or ["README.md holds no Python"])
def test_example_runs(name: str, tmp_path: Path):
    assert EXAMPLES, name
    # As a person would: plain promotion, one device, an empty folder. Nothing deprecated is shown.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(README.parent)
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", EXAMPLES[name]]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{EXAMPLES[name]}\n{result.stderr}"


def test_blocks_are_found():
    text = "# A\n```bash\n# no heading\n```\n```python\nx = 1\n```\n## B c\n``` py title\ny = 2\n\nz = 3\n```\n```\nno\n```\n"
    assert blocks(text) == {"A-1": "x = 1", "B c-2": "y = 2\n\nz = 3"}
    assert blocks("`python`\n```json\n{}\n```\n") == {}
