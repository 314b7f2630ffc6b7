"""Layouts of many GPUs and of a TPU slice, by their own compilers, in a process of their own; skipped without those."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jlora.planning import DEVICES, targets
from jlora.planning.devices import find
from tests.test_plan import ROOT

CHILD = """
import json, sys
import jax, jax.numpy as jnp, optax
import jlora
from jlora.models.sizes import model_of
from jlora.planning import layouts
module, inputs = model_of("llama-7b", scan=True, remat=True, layers=2, width=256, heads=4, hidden=512, vocab_size=512,
                          context=64, dtype="bfloat16", param_dtype="bfloat16")
params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
def loss(params, tokens):
    return jnp.asarray(module.apply({"params": params}, tokens, labels=jnp.roll(tokens, -1, axis=1))).mean()
tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32)
adapted = jlora.apply(params, rank=4, targets="attn|mlp", sites=jlora.sites(loss, params, tokens))
device, cache, *tried = sys.argv[1:]
found = layouts(loss, adapted, optax.adamw(1e-3), tokens, device, tried=map(json.loads, tried), heads=(4,), cache=cache)
print(json.dumps({"trained": jlora.count(adapted).trainable, "text": str(found), **found.as_dict()}))
"""


def real(device: str, cache: Path, *tried: dict[str, int]) -> dict[str, Any]:
    if not targets.has_compiler(DEVICES[find(device).device.target]):
        pytest.skip(f"the compiler of {device} is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", CHILD, device, str(cache), *map(json.dumps, tried)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_sixteen_h100(tmp_path: Path):
    """Sharded over all, and inside of each node: there the gradients alone leave it. Not compiled a second time."""
    tried = ({"fsdp": 16}, {"data": 2, "fsdp": 8}, {"fsdp": 2, "tp": 8})
    found = real("16xh100", tmp_path, *tried)
    whole, copies, odd = (one["plan"] for one in found["layouts"])
    assert odd is None and found["layouts"][2]["reason"] == "tp=8 does not divide 4 heads"
    for plan in (whole, copies):
        assert plan["fits"] and plan["moved"] > plan["weights"] and plan["dcn"] < plan["wire"]
        best = plan["roofline"]
        assert best["compute"] == pytest.approx(plan["flops"] / 989e12)
        assert best["memory"] == pytest.approx(plan["moved"] / 3352e9)
        assert best["dcn"] == pytest.approx(plan["dcn"] / 50e9, rel=0.01)
        assert best["ici"] == pytest.approx((plan["wire"] - plan["dcn"]) / 450e9, rel=0.01)
    gradients = 2 * 4 * found["trained"]  # float32, an all-reduce over 16 devices on two nodes
    assert gradients / 16 <= copies["dcn"] <= gradients / 16 + 1024
    gathered = whole["collectives"]["all-gather"]
    assert gathered["dcn"] == pytest.approx(gathered["bytes"] / 16, rel=0.01)
    assert found["recommended"] in tried and "at best, limited by" in found["text"]
    again = real("16xh100", tmp_path, *tried)
    of = lambda plan: {name: value for name, value in plan.items() if name != "compiled_in"}
    assert [of(one["plan"]) for one in again["layouts"][:2]] == [of(whole), of(copies)]
    assert all(one["plan"]["compiled_in"] < 1 for one in again["layouts"][:2])


@pytest.mark.thorough("test_sixteen_h100")
def test_a_slice_of_v5e(tmp_path: Path):
    """All on one slice: over its links, two axes of a torus that are not closed."""
    (plan,) = (one["plan"] for one in real("v5e-16", tmp_path, {"fsdp": 16})["layouts"])
    best = plan["roofline"]
    assert plan["dcn"] == best["dcn"] == 0 and plan["fits"] and len(list(tmp_path.iterdir())) == 1
    assert best["ici"] == pytest.approx(plan["wire"] / (2 * 50e9), rel=0.05)
    assert best["compute"] == pytest.approx(plan["flops"] / 197e12)
