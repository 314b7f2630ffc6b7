"""Adapters of golden/make_diffusion_files.py, made by diffusers and LyCORIS, onto the weights that they have there."""

import functools
import json
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora import tree
from jlora.interop import diffusers, kohya, modules
from jlora.interop.layer import merged
from jlora.interop.pipeline import File

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "golden" / "diffusers"
OF_DIFFUSERS = ("attn_processor", "dora", "metadata", "plain", "up_down")
REFUSED = {"diag_oft": "OFT", "glora": "GLoRA"}
FILES = sorted(f"{path.parent.name}/{path.stem}" for path in GOLDEN.glob("sd*/*.safetensors"))
READ = [file for file in FILES if Path(file).name not in REFUSED]


@functools.cache
def models(style: str) -> dict[str, dict[str, tuple[int, ...]]]:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for path in sorted(GOLDEN.glob(f"{style}/*.jsonl"), key=lambda path: (path.stem != "unet", path.stem)):
        own = found.setdefault(path.stem, {})
        for line in path.read_text().splitlines():
            layer = json.loads(line)
            own[f"{layer['name']}.weight"] = tuple(layer["weight"])
            if layer["bias"]:
                own[f"{layer['name']}.bias"] = (layer["weight"][0],)
    return found


def base(component: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    values = 0.2 * np.random.RandomState(zlib.crc32(f"{component}.{key}".encode())).standard_normal(shape)
    return (values + (len(shape) == 1 and key.endswith(".weight"))).astype(np.float32)


def read(file: str) -> File:
    style, name = file.split("/")
    reader = diffusers if name in OF_DIFFUSERS else kohya
    return reader.read(GOLDEN / f"{file}.safetensors", models(style))


def test_the_files_are_there():
    assert len(FILES) == 30 and {Path(file).name for file in FILES} >= {
        *OF_DIFFUSERS,
        *REFUSED,
        "kohya_sgm",
        "lokr_tucker",
    }


@pytest.mark.parametrize("file", [file for file in READ if not file.endswith("/ia3")])
def test_merged_weights_are_theirs(file):
    style, _ = file.split("/")
    found, tensors = read(file), load_file(GOLDEN / f"{file}.safetensors")
    golden = np.load(GOLDEN / style / "outputs.npz")
    layers = {f"{component}.{layer.key}": layer for component, own in found.layers.items() for layer in own}
    expected = {
        key.split("/merged/")[1]: golden[key] for key in golden.files if key.startswith(f"{Path(file).name}/merged/")
    }
    assert len(expected) > 1
    for name, weight in expected.items():
        component, _, module = name.partition(".")
        key = f"{module}.weight"
        start = base(component, key, models(style)[component][key])
        end = merged(layers[f"{component}.{key}"], start)
        assert np.abs(weight - start).max() > 0.01
        np.testing.assert_allclose(end, weight, rtol=1e-5, atol=2e-6, err_msg=name)
    scalars = sum(key.endswith((".alpha", ".on_input")) for key in tensors)
    assert sum(len(layer.tensors) for layer in layers.values()) == len(tensors) - scalars


@pytest.mark.parametrize("file", [file for file in READ if Path(file).name not in OF_DIFFUSERS])
def test_kohya_files_come_back_bit_for_bit(file):
    expected = load_file(GOLDEN / f"{file}.safetensors")
    name = Path(file).name
    found = kohya.tensors_of(read(file).layers, models(file.split("/")[0]))
    if name == "lokr_whole":  # an alpha that nobody reads
        expected = {key: x for key, x in expected.items() if not key.endswith(".alpha")}
    if file == "sdxl/kohya_alphas":  # diffusers' names, where jlora writes those of SDXL's authors, as kohya does
        other = lambda tensors: sorted(x.tobytes() for x in tensors.values())
        assert other(found) == other(expected)
        return
    assert set(found) == set(expected)
    for key, x in expected.items():
        if name == "ia3" and key.endswith(".weight"):
            np.testing.assert_allclose(found[key], x, atol=1e-7)  # the file has l - 1
            continue
        np.testing.assert_array_equal(found[key], x, err_msg=key)
        assert found[key].shape == x.shape, key


@pytest.mark.parametrize("file", [file for file in READ if Path(file).name in OF_DIFFUSERS])
def test_diffusers_files_are_written_again(file):
    style = file.split("/")[0]
    found = read(file)
    tensors, metadata = diffusers.tensors_of(found.layers, models(style))
    again = diffusers.layers_of(tensors, metadata, models(style))
    for component, own in found.layers.items():
        for one, other in zip(own, again.layers[component], strict=True):
            assert (one.key, one.scale, one.rank) == (other.key, other.scale, other.rank)
            for part, x in one.tensors.items():
                np.testing.assert_array_equal(other.tensors[part], x)
    expected = load_file(GOLDEN / f"{file}.safetensors")
    if Path(file).name in ("plain", "metadata", "dora"):
        inner = lambda tensors: {key.replace(".text_model.", "."): x.tobytes() for key, x in tensors.items()}
        assert inner(tensors) == inner(expected)


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(name):
    file = GOLDEN / "sd1" / f"{name}.safetensors"
    tensors = load_file(file)
    with pytest.raises(ValueError, match="cannot be placed") as error:
        kohya.read(file, models("sd1"))
    lines = str(error.value).splitlines()
    assert lines[1].endswith(f"is of {REFUSED[name]}, which jlora does not read")
    assert lines[0].startswith(f"'{file}': ") and len(lines) == 1 + min(len(tensors), 21)


def test_a_file_of_sdxl_is_not_one_of_sd1():
    file = GOLDEN / "sdxl" / "plain.safetensors"
    with pytest.raises(ValueError, match="cannot be placed") as error:
        diffusers.read(file, models("sd1"))
    lines = str(error.value).splitlines()
    assert lines[1] == (
        "  'text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight' and 21 more are of the text_encoder_2, which is "
        "not here: without= leaves out what is not wanted"
    )
    assert lines[2] == "  'unet.add_embedding.linear_1.lora_A.weight' is of the unet, which has no such module"


def parameters(style: str) -> tuple[dict, dict]:
    """The base of a style as trees, and its key tables."""
    names = {component: modules.table(shapes) for component, shapes in models(style).items()}
    trees: dict = {}
    for component, rows in names.items():
        for row in rows:
            tensor = base(component, row.keys[0], models(style)[component][row.keys[0]])
            *path, last = [component, *row.path.split("/")]
            at = trees
            for part in path:
                at = at.setdefault(part, {})
            at[last] = jnp.asarray(tensor.transpose(row.order) if row.order else tensor)
    return trees, names


@pytest.mark.parametrize("name", ["locon_tucker", "lokr_dora_out", "full"])
def test_they_are_trained_as_what_they_are(name):
    params, names = parameters("sd1")
    found = kohya.load(GOLDEN / "sd1" / f"{name}.safetensors", params, names)
    golden = np.load(GOLDEN / "sd1" / "outputs.npz")
    for component, adapted in found.items():
        result = tree.leaves(jlora.merge(adapted))[0]
        for row in names[component]:
            key = f"{name}/merged/{component}.{row.keys[0].removesuffix('.weight')}"
            if key in golden.files:
                weight = np.asarray(result[row.path]).transpose(np.argsort(row.order))
                np.testing.assert_allclose(weight, golden[key], rtol=1e-5, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("file", ["sd1/dora_in", "sd1/loha_dora_in", "sd2/kohya_alphas", "sd1/dora"])
def test_any_file_is_merged_into_parameters(file):
    """Those of which jlora has no method, too: magnitudes of inputs."""
    style, name = file.split("/")
    params, names = parameters(style)
    merge = diffusers.merge if name in OF_DIFFUSERS else kohya.merge
    result = merge(GOLDEN / f"{file}.safetensors", params, names)
    golden, compared = np.load(GOLDEN / style / "outputs.npz"), 0
    for component, merged_tree in result.items():
        leaves, before = tree.leaves(merged_tree)[0], tree.leaves(params[component])[0]
        adapted = {layer.key for layer in read(file).layers[component]}
        for row in names[component]:
            (key,) = row.keys
            if key not in adapted:
                assert leaves[row.path] is before[row.path]
            weight = golden.get(f"{name}/merged/{component}.{key.removesuffix('.weight')}")
            if weight is not None and key in adapted:
                found = np.asarray(leaves[row.path]).transpose(np.argsort(row.order))
                np.testing.assert_allclose(found, weight, rtol=1e-5, atol=2e-6, err_msg=key)
                compared += 1
    assert compared > 1
