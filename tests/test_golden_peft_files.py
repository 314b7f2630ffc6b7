"""The folders of golden/peft are those of the table in golden/make_peft.py, whole, and say nothing of the machine that made them."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
PEFT = GOLDEN / "peft"
FOLDERS = sorted(path.parent.name for path in PEFT.glob("*/adapter_config.json"))


def rows():
    """Names of the script's tables, read without torch: keys whose values are a Row, or a row without outputs."""
    tables = ast.walk(ast.parse((GOLDEN / "make_peft.py").read_text()))
    pairs = [
        pair for table in tables if isinstance(table, ast.Dict) for pair in zip(table.keys, table.values, strict=True)
    ]
    named = [(key.value, value) for key, value in pairs if isinstance(key, ast.Constant)]
    whole = {name for name, value in named if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "Row"}
    return whole, {name for name, value in named if isinstance(value, ast.Tuple)}


def test_there_is_a_folder_for_each_row():
    whole, names = rows()
    assert len(whole) > 100 and len(names) > 20
    assert set(FOLDERS) == whole | names
    assert {path.parent.name for path in PEFT.glob("*/outputs.npz")} == whole


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_names_its_base_and_no_path(name):
    config = json.loads((PEFT / name / "adapter_config.json").read_text())
    base = config["base_model_name_or_path"]
    if base is None:
        assert config["auto_mapping"]["parent_library"] == "__main__"  # the networks of the script
    else:
        folder = base.removeprefix("tiny/")
        assert any((place / folder / "model.safetensors").exists() for place in (GOLDEN / "models", PEFT / "bases"))
    assert not any(isinstance(value, str) and value.startswith("/") for value in config.values())
    assert len(list((PEFT / name).glob("adapter_model.*"))) == 1


def test_outputs_are_finite_and_small():
    for path in PEFT.glob("*/outputs.npz"):
        with np.load(path) as arrays:
            assert {"tokens", "pixels"} & set(arrays) and "out" in arrays
            assert all(np.isfinite(arrays[key]).all() for key in arrays), path
    size = sum(path.stat().st_size for path in PEFT.rglob("*") if path.is_file())
    assert size < 2_500_000
