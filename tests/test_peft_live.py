"""Folders that jlora wrote, read by Hugging Face PEFT in a process of its own; skipped where torch or PEFT are absent.

`PEFT_PYTHON=/path/to/python pytest tests/test_peft_live.py` takes another environment's interpreter for PEFT.
"""

import importlib.util
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.test_peft import GOLDEN, base_of, called, outputs, read, trained

PYTHON = os.environ.get("PEFT_PYTHON", sys.executable)
HERE = all(importlib.util.find_spec(name) for name in ("torch", "peft", "transformers"))
ROWS = (
    "lora", "lora_llama", "rslora", "patterns_regex", "dora", "bias_all", "ia3_llama", "pissa", "oft_neumann", "lokr",
    "tokens", "modules_to_save", "every_linear_mistral", "every_linear_qwen2", "every_linear_qwen3", "every_linear_bert",
    "every_linear_roberta", "every_linear_deberta",
)  # fmt: skip


@pytest.mark.skipif(not HERE and "PEFT_PYTHON" not in os.environ, reason="needs torch, peft and transformers")
@pytest.mark.parametrize("row", ROWS)
def test_peft_reads_what_jlora_wrote_and_trains_on(row, tmp_path):
    """The same logits, adapted and merged, the same next losses, and the same function after them."""
    model, adapted = read(row)
    given = {name: x for name, x in outputs(row).items() if name in ("tokens", "labels")}
    if row in ("every_linear_bert", "every_linear_roberta", "every_linear_deberta"):
        given["labels"] = np.asarray([0, 1], np.int32)
    np.savez(tmp_path / "inputs.npz", **given)
    jlora.peft.save(tmp_path / "adapter", adapted, model=model)
    script, source = GOLDEN / "run_peft.py", GOLDEN / "models" / base_of(row)
    command = (PYTHON, script, source, tmp_path / "adapter", tmp_path / "inputs.npz", tmp_path / "result.npz")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run(tuple(map(str, command)), check=True, capture_output=True, env=environment)
    theirs = np.load(tmp_path / "result.npz")
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)
    close(called(model, adapted, given, row), theirs["out"])
    plain = lambda adapted: model.apply({"params": jlora.merge(adapted)}, jnp.asarray(given["tokens"]))
    close(plain(adapted), theirs["merged"])
    losses, after = trained(model, adapted, given, optax.sgd(0.1))
    close(losses, theirs["sgd"])
    np.testing.assert_allclose(plain(after), theirs["after"], atol=1e-4, rtol=1e-4)
