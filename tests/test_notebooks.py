"""The notebooks: each agrees with its text, holds the outputs of its full form, and runs to the end in its small form."""

import json
import os
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
TEXTS = sorted((ROOT / "notebooks").glob("*.py"))
LARGEST = 1_000_000  # bytes of a committed notebook


def test_every_notebook_has_its_text():
    assert [path.stem for path in TEXTS] == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert "rank_vs_accuracy" in {path.stem for path in TEXTS}


@pytest.fixture(params=TEXTS, ids=lambda path: path.stem)
def text(request) -> Path:
    return request.param


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_the_pair_agrees(text: Path):
    """`jupytext --sync notebooks/*.py` mends it; changed code has to be executed again."""
    source, notebook = jupytext.read(text), nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    assert cells(source) == cells(notebook)
    assert source.metadata.jupytext.formats == notebook.metadata.jupytext.formats == "ipynb,py:percent"


def test_the_outputs_are_those_of_one_full_execution(text: Path):
    path = text.with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}  # no "error"
    assert "stderr" not in {output.name for output in outputs if output.output_type == "stream"}  # no warnings
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert path.stat().st_size < LARGEST
    assert str(Path.home()) not in path.read_text() and "/tmp/" not in path.read_text()


def test_the_ranks_of_the_full_form_are_in_the_outputs():
    notebook = nbformat.read(ROOT / "notebooks" / "rank_vs_accuracy.ipynb", as_version=4)
    printed = json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    assert all(f"r = {r} |" in printed for r in (1, 2, 4, 8, 16, 32, 64))  # the small form has two
    assert printed.count("image/png") == 6 and "shows here" in printed


@pytest.mark.thorough("test_the_outputs_are_those_of_one_full_execution")
def test_the_small_form_runs_to_the_end(text: Path, tmp_path: Path, monkeypatch):
    """The notebook runs in an empty folder, in a kernel of this interpreter, whatever kernels are installed."""
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "test"}
    kernel = tmp_path / "jupyter" / "kernels" / "this-interpreter" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps(spec | {"language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "work").mkdir()

    notebook = jupytext.read(text)
    resources = {"metadata": {"path": str(tmp_path / "work")}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="this-interpreter", resources=resources)
    client.execute(env=small_form(tmp_path))

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    errors = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert errors == []
    assert list((tmp_path / "work").iterdir()) == []  # nothing is left behind


def small_form(folder: Path) -> dict[str, str]:
    """The environment of a person at one device."""
    others = "MPLBACKEND", "PYTHONWARNINGS", "XLA_FLAGS"
    environment = {key: value for key, value in os.environ.items() if key not in others}
    return environment | {
        "JLORA_NOTEBOOK": "small",
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "ipython"),
    }
