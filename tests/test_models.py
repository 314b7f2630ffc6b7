"""Every model of jlora.models beside transformers, from its own checkpoints; see golden/make_models.py."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import models
from jlora.models.catalogue import ARCHITECTURES
from tests.tiers import thorough

GOLDEN = Path(__file__).parent / "golden" / "models"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
WITH_OUTPUTS = [name for name in CASES if (GOLDEN / name / "golden.safetensors").exists()]
# float32 sums in another order; the outputs are of size 1 to 10, and a wrong epsilon or mask moves them by 1e-3 or more.
TOLERANCE = 2e-5
# transformers 5, which wrote the files, leaves these prefixes out and reads both; 4 wants them, so jlora writes them.
PREFIXES = {"clip_text": "text_model.", "clip_text_eos": "text_model.", "clip_vision": "vision_model."}


def calls(name):
    """The calls of a golden file: their inputs and outputs."""
    found = {}
    for key, value in load_file(GOLDEN / name / "golden.safetensors").items():
        call, part = key.split("/")
        found.setdefault(call, {})[part] = value
    return found


def inputs(call):
    """What jlora's model takes, from what transformers' took."""
    if "pixels" in call:
        return {"images": jnp.asarray(call["pixels"].transpose(0, 2, 3, 1))} | inputs(
            {k: v for k, v in call.items() if k != "pixels"}
        )
    found = {name: jnp.asarray(call[name]) for name in ("tokens", "types", "positions") if name in call}
    return found | ({"mask": jnp.asarray(call["mask"] == 1)} if "mask" in call else {})


def outputs(out):
    """A model's outputs by the golden file's names."""
    return out if isinstance(out, dict) else {"out": out}


@functools.cache
def loaded(name, scan=False):
    # computed in float32, from parameters in bfloat16 too
    return models.load(GOLDEN / name, dtype="float32", **({"scan": True} if scan else {}))


SAVED = "test_saving_writes_the_checkpoint_again"  # of scanned parameters too, bit for bit


@pytest.mark.parametrize("scan", thorough([False, True], SAVED, [False]), ids=["", "scanned"])
@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_outputs_are_those_of_transformers(name, scan):
    pretrained = loaded(name, scan)
    apply = pretrained.model.apply
    for call, arrays in calls(name).items():
        out = outputs(apply({"params": pretrained.params}, **inputs(arrays)))
        compared = [part for part in out if part in arrays]
        assert "out" in compared, (call, list(out))
        for part in compared:
            got, expected = np.asarray(out[part]), arrays[part]
            assert got.shape == expected.shape, (call, part)
            if "mask" in arrays and got.shape[:2] == arrays["mask"].shape:
                real = arrays["mask"] == 1
                got, expected = got[real], expected[real]
            np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE, err_msg=f"{call}/{part}")


@pytest.mark.once
@pytest.mark.parametrize("scan", [False, True], ids=["", "scanned"])
@pytest.mark.parametrize("name", CASES)
def test_saving_writes_the_checkpoint_again(name, scan, tmp_path):
    """Every tensor bit for bit under its key, but for those that are no parameters of the model, which are listed."""
    pretrained = loaded(name, scan)
    models.save(tmp_path, pretrained.model, pretrained.params, source=GOLDEN / name, largest_shard=20_000)
    tensors = [load_file(path) for path in (GOLDEN / name).glob("model*.safetensors")]
    original = {PREFIXES.get(name, "") + key: tensor for part in tensors for key, tensor in part.items()}
    written = {k: v for path in tmp_path.glob("model*.safetensors") for k, v in load_file(path).items()}
    assert set(written) <= set(original)
    assert set(original) - set(written) <= set(pretrained.unused)
    for key, tensor in written.items():
        assert tensor.dtype == original[key].dtype
        np.testing.assert_array_equal(tensor, original[key], key)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN / name, tmp_path))
    assert {k: after.get(k) for k in before} == before
    again = models.load(tmp_path, dtype="float32")
    assert again.model.config == loaded(name).model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded(name).params)


def test_every_architecture_has_goldens_of_all_its_heads():
    """Golden files cover each architecture's heads; the Llamas share one module and table, and have fewer."""
    seen = {
        (record["model_type"], record["architectures"][0])
        for record in (json.loads((GOLDEN / name / "config.json").read_text()) for name in CASES)
    }
    others = [a for a in ARCHITECTURES if a.library == "transformers"]  # diffusers' have tests/test_diffusion_models.py
    known = {(a.model_type, name) for a in others for name in a.classes.values()}
    assert seen <= known
    by_hand = {"llama": ("Llama", ["ForTokenClassification", "Model"])}
    for family in ("Mistral", "Qwen2", "Qwen3"):
        by_hand[family.lower()] = (family, ["ForSequenceClassification", "ForTokenClassification", "Model"])
    assert known - seen == {(t, name + end) for t, (name, ends) in by_hand.items() for end in ends}
