"""Folders that jlora wrote in 4 bits, read by transformers with bitsandbytes in a process of its own; skipped without.

`PEFT_PYTHON=/path/to/python pytest tests/test_bnb_live.py` takes another environment's interpreter, as tests/test_peft_live.py.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import models

PYTHON = os.environ.get("PEFT_PYTHON", sys.executable)
HERE = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "bitsandbytes", "accelerate"))
GOLDEN = Path(__file__).parent / "golden"
# Widths are whole blocks, or no multiple of 32: between them bitsandbytes' kernel for AVX-512 takes other blocks' scales.
ROWS = {
    "read, llama": (GOLDEN / "quant/models/llama_nf4", {}, "nf4 True"),
    "read, blocks that cross rows": (GOLDEN / "quant/models/llama_nf4_straddling", {"scan": True}, "nf4 True"),
    "read, fp4": (GOLDEN / "quant/models/llama_fp4", {}, "fp4 False"),
    "read, gpt2": (GOLDEN / "quant/models/gpt2_nf4", {"scan": True}, "nf4 "),
    "quantised, llama": (GOLDEN / "quant/models/llama_nf4_straddling/source", {"quantize": "nf4"}, "nf4 True"),
    "quantised, gpt2": (
        GOLDEN / "quant/models/gpt2_nf4/source",
        {"quantize": "fp4", "block": 32, "double": False, "scan": True},
        "fp4 False",
    ),
    "some of them": (
        GOLDEN / "quant/models/gpt2_nf4/source",
        {"quantize": lambda path, like: "nf4" if "h_1/mlp" in path else None},
        "nf4 True",
    ),
}


def available():
    if "PEFT_PYTHON" not in os.environ:
        return HERE
    found = subprocess.run((PYTHON, "-c", "import bitsandbytes, accelerate, transformers"), capture_output=True)
    return found.returncode == 0


@pytest.mark.skipif(not HERE and "PEFT_PYTHON" not in os.environ, reason="needs torch, transformers and bitsandbytes")
@pytest.mark.parametrize("row", ROWS)
def test_transformers_computes_the_same_logits(row, tmp_path):
    if not available():
        pytest.skip("the other environment has no bitsandbytes")
    source, options, kind = ROWS[row]
    found = models.load(source, param_dtype="float32", **options)
    tokens = np.random.default_rng(0).integers(4, 40, (2, 8)).astype(np.int32)
    models.save(tmp_path / "folder", found.model, found.params, source=source)
    np.savez(tmp_path / "inputs.npz", tokens=tokens)
    script = GOLDEN / "quant" / "run_bnb.py"
    command = (PYTHON, script, tmp_path / "folder", tmp_path / "inputs.npz", tmp_path / "result.npz")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run(tuple(map(str, command)), check=True, capture_output=True, env=environment)
    theirs = np.load(tmp_path / "result.npz")
    ours = jlora.lift(found.model.apply)({"params": found.params}, jnp.asarray(tokens))
    np.testing.assert_allclose(ours, theirs["out"], atol=2e-5, rtol=2e-5)
    linears = {"llama": 14, "gpt2": 8}["llama" if "llama" in str(source) else "gpt2"]
    assert len(theirs["types"]) == (2 if row == "some of them" else linears)
    assert all(each.startswith(kind) for each in theirs["types"])
