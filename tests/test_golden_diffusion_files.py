"""The files of golden/diffusers against NumPy: the base's rule and the weights that LoRA files give, by the published formulas."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden" / "diffusers"
STYLES = ("sd1", "sd2", "sdxl")
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def base(component, layer, shape):
    """The weight of a layer, from the rule of make_diffusion_files.py."""
    draw = np.random.RandomState(zlib.crc32(f"{component}.{layer}.weight".encode())).standard_normal(shape)
    return (0.2 * draw).astype(np.float32)


def update(factors, shape):
    """alpha / r times the product of a kohya or LyCORIS layer's factors."""
    alpha = factors.get("alpha")
    if "diff" in factors:
        return factors["diff"]
    if "lora_down.weight" in factors:
        down, up = factors["lora_down.weight"], factors["lora_up.weight"]
        flat = np.tensordot(up.reshape(len(up), -1), down, 1)
        if "lora_mid.weight" in factors:
            down = np.einsum("rskl,si->rikl", factors["lora_mid.weight"], down[..., 0, 0])
            flat = np.tensordot(up[..., 0, 0], down, 1)
        return alpha / len(factors["lora_down.weight"]) * flat.reshape(shape)
    if "hada_w1_a" in factors:
        halves = []
        for i in "12":
            a, b = factors[f"hada_w{i}_a"], factors[f"hada_w{i}_b"]
            core = factors.get(f"hada_t{i}")
            halves.append(a @ b if core is None else np.einsum("pqkl,po,qi->oikl", core, a, b))
        return alpha / len(factors["hada_w1_b"]) * (halves[0] * halves[1]).reshape(shape)
    w1 = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
    if "lokr_w2" in factors:
        w2, rank = factors["lokr_w2"], None
    elif "lokr_t2" in factors:
        a, b, rank = factors["lokr_w2_a"], factors["lokr_w2_b"], len(factors["lokr_w2_b"])
        w2 = np.einsum("pqkl,po,qi->oikl", factors["lokr_t2"], a, b)
    else:
        w2, rank = factors["lokr_w2_a"] @ factors["lokr_w2_b"], len(factors["lokr_w2_b"])
    if rank is None:
        rank = len(factors["lokr_w1_b"]) if "lokr_w1_b" in factors else alpha  # whole: no scale
    w2 = w2.reshape(shape[0] // len(w1), shape[1] // w1.shape[1], *shape[2:])
    return alpha / rank * np.kron(w1.reshape(*w1.shape, *(1 for _ in shape[2:])), w2)


def magnitudes(weight, scale):
    """`scale` of one row's or one column's size: the axes of which it has one are those of the norm."""
    axes = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
    return weight * scale / np.sqrt((weight**2).sum(axes, keepdims=True))


def written(style, component, layer):
    prefix = "lora_te1" if (style, component) == ("sdxl", "text_encoder") else PREFIXES[component]
    older = component != "unet" and not layer.startswith(("text_model.", "text_projection"))
    return f"{prefix}_{'text_model_' if older else ''}{layer.replace('.', '_')}"


FILES = [
    (style, path.stem)
    for style in STYLES
    for path in sorted((GOLDEN / style).glob("*.safetensors"))
    if path.stem.startswith(("kohya", "loc", "loh", "lok", "dora_", "full")) and path.stem != "kohya_sgm"
]


@pytest.mark.parametrize(("style", "name"), FILES)
def test_the_weights_are_those_of_the_formulas(style, name):
    tensors = load_file(GOLDEN / style / f"{name}.safetensors")
    with np.load(GOLDEN / style / "outputs.npz") as arrays:
        merged = {key.split("/", 2)[2]: arrays[key] for key in arrays if key.startswith(f"{name}/merged/")}
    assert len(merged) > 3
    for path, weight in merged.items():
        component, layer = path.split(".", 1)
        start = written(style, component, layer) + "."
        factors = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        expected = base(component, layer, weight.shape) + update(factors, weight.shape)
        if "dora_scale" in factors:
            expected = magnitudes(expected, factors["dora_scale"])
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=2e-6, err_msg=path)  # float32 sums, sizes up to 5


@pytest.mark.parametrize("style", STYLES)
def test_the_layers_are_those_of_the_files(style):
    names = {written(style, path.stem, json.loads(line)["name"])
             for path in (GOLDEN / style).glob("*.jsonl") for line in path.read_text().splitlines()}  # fmt: skip
    for path in (GOLDEN / style).glob("kohya*.safetensors"):
        if path.stem != "kohya_sgm":
            assert {key.split(".")[0] for key in load_file(path)} <= names
