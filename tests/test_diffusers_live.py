"""Folders and LoRA files that jlora wrote, in diffusers, in a process of its own; skipped where diffusers is absent.

`DIFFUSERS_PYTHON=/path/to/python pytest tests/test_diffusers_live.py` takes another environment's interpreter for diffusers.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.interop import diffusers, kohya
from jlora.models import diffusion
from tests import small_pipelines
from tests.test_diffusion_pipelines import single

PYTHON = os.environ.get("DIFFUSERS_PYTHON", sys.executable)
HERE = all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "peft", "transformers"))
PROMPTS = small_pipelines.cases("sd1")["prompts"]
CLOSE = 1e-4


@pytest.mark.skipif(not HERE and "DIFFUSERS_PYTHON" not in os.environ, reason="needs diffusers, transformers and peft")
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_reads_folders_and_adapters_that_jlora_wrote(family, tmp_path):
    """Without a warning, and with the same images; single files convert to the same tensors."""
    source = small_pipelines.write(family, tmp_path / "source")
    pipeline = diffusion.load(source, param_dtype="float32")
    diffusion.save(tmp_path / "saved", pipeline)
    adapted = {
        part: factors_drawn(jlora.apply(params, rank=2, alpha=3, targets="attn"))
        for part, params in pipeline.adaptable.items()
    }
    files = {
        "peft": lambda file: diffusers.save(file, adapted, pipeline.tables, style="peft"),
        "folded": lambda file: diffusers.save(file, adapted, pipeline.tables, style="peft", fold_alpha=True),
        "kohya": lambda file: kohya.save(file, adapted, pipeline.tables),
    }
    for name, save in files.items():
        save(tmp_path / f"{name}.safetensors")
    single(family, pipeline, tmp_path / "single.safetensors")
    noise = np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", noise=noise.transpose(0, 3, 1, 2), prompts=np.asarray(PROMPTS))
    script = Path(__file__).parent / "golden" / "run_diffusers.py"
    paths = [tmp_path / name for name in ("saved", "inputs.npz", "result.npz")]
    command = (PYTHON, script, *paths, *(tmp_path / f"{name}.safetensors" for name in files))
    environment = {**os.environ, "SINGLE": str(tmp_path / "single.safetensors"), "PYTHONPATH": ""}
    done = subprocess.run(tuple(map(str, command)), check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(tmp_path / "result.npz") as opened:
        theirs = dict(opened)
    assert theirs["converted"] == 0
    run = lambda pipeline, **options: diffusion.generate(
        pipeline, PROMPTS, key=jax.random.key(0), steps=3, height=16, width=24, latents=jnp.asarray(noise), **options
    )
    np.testing.assert_allclose(run(pipeline), theirs["images"], atol=CLOSE)
    lifted = run(pipeline.with_params(**adapted), lift=jlora.lift)
    assert np.abs(lifted - theirs["images"]).max() > 1e-2
    for name in files:
        np.testing.assert_allclose(lifted, theirs[f"images/{name}"], atol=CLOSE, err_msg=name)


def factors_drawn(adapted):
    leaves, structure = jax.tree.flatten(adapted.factors)
    rng = np.random.default_rng(1)
    drawn = [jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return adapted.replace(factors=jax.tree.unflatten(structure, drawn))
