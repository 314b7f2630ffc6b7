"""Checkpoints in bitsandbytes' 4 bits, read and written, and checkpoints that are quantised while they are read."""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jlora
from experiments.bench.load import measured
from jlora import models
from jlora.models import files
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.quant import Nested, Quantised
from tests.tiers import thorough

GOLDEN = Path(__file__).parent / "golden" / "quant" / "models"
READ = ("llama_nf4", "llama_nf4_straddling", "llama_fp4", "gpt2_nf4")


def leaves(params):
    return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantised))


def small(params):
    return [leaf for leaf in leaves(params) if isinstance(leaf, Quantised)]


@pytest.mark.once
@pytest.mark.parametrize("scan", thorough([False, True], "test_what_was_read_is_written_byte_for_byte", [True]))
@pytest.mark.parametrize("name", READ)
def test_what_transformers_saved_computes_what_it_computed(name, scan):
    golden = load_file(GOLDEN / name / "golden.safetensors")
    found = models.load(GOLDEN / name, scan=scan)
    assert len(small(found.params)) == (7 if "llama" in name else 6) * (1 if scan else 2)
    out = jlora.lift(found.model.apply)({"params": found.params}, golden["tokens"])
    np.testing.assert_allclose(out, golden["out"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", READ)
def test_what_was_read_is_written_byte_for_byte(name, scan, tmp_path):
    found = models.load(GOLDEN / name, scan=scan)
    models.save(tmp_path, found.model, found.params, source=GOLDEN / name, largest_shard=40_000)
    theirs = load_file(GOLDEN / name / "model.safetensors")
    ours = {key: tensor for path in tmp_path.glob("*.safetensors") for key, tensor in load_file(path).items()}
    split = "c_attn.weight" if name == "gpt2_nf4" else "nothing"  # thirds of 64 scales, and the groups are of 256
    assert {key for key in theirs if split not in key} == {key for key in ours if split not in key}
    for key in (key for key in ours if split not in key):
        np.testing.assert_array_equal(ours[key], theirs[key], key)
    for key in (key for key in ours if key.endswith(split)):
        np.testing.assert_array_equal(ours[key], theirs[key], key)
        state = json.loads(bytes(theirs[f"{key}.quant_state.bitsandbytes__nf4"]))
        second = np.repeat(theirs[f"{key}.nested_absmax"], 256)[: theirs[f"{key}.absmax"].size]
        scales = theirs[f"{key}.nested_quant_map"][theirs[f"{key}.absmax"]] * second + np.float32(
            state["nested_offset"]
        )
        np.testing.assert_array_equal(ours[f"{key}.absmax"], scales)
    said, origin = (json.loads((path / "config.json").read_text()) for path in (tmp_path, GOLDEN / name))
    for key in ("quant_method", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        assert said["quantization_config"][key] == origin["quantization_config"][key]
    assert "lm_head" in said["quantization_config"]["llm_int8_skip_modules"]
    again = models.load(tmp_path, scan=scan)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


def test_a_third_that_has_groups_of_its_own_keeps_its_scales_in_8_bits(tmp_path):
    """GPT-2 of width 128: 256 blocks of 64 to a third, as all real ones have a multiple of."""
    config = GPT2Config(vocab_size=8, context=4, width=128, layers=1, heads=2)
    model, rng, key = GPT2(config), np.random.default_rng(0), "transformer.h.0.attn.c_attn.weight"
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    models.save(tmp_path, model, jlora.quantize(params))
    tensors = load_file(tmp_path / "model.safetensors")
    golden = load_file(GOLDEN / "gpt2_nf4" / "model.safetensors")
    tensors[f"{key}.absmax"] = rng.integers(0, 256, 768).astype(np.uint8)
    tensors[f"{key}.nested_absmax"] = rng.uniform(0.1, 0.2, 3).astype(np.float32)
    tensors[f"{key}.nested_quant_map"] = golden[f"{key}.nested_quant_map"]
    state = json.loads(bytes(tensors[f"{key}.quant_state.bitsandbytes__nf4"]))
    state |= {"nested_offset": 0.25, "nested_blocksize": 256, "nested_dtype": "float32"}
    tensors[f"{key}.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    found = models.load(tmp_path)
    parts = [found.params["h_0"]["attn"][name]["kernel"] for name in ("query", "key", "value")]
    assert all(isinstance(part.scales, Nested) and part.scales.offset == 0.25 for part in parts)
    table, codes = tensors[f"{key}.quant_map"], tensors[key].reshape(-1)
    scales = tensors[f"{key}.nested_quant_map"][tensors[f"{key}.absmax"]]
    scales = scales * np.repeat(tensors[f"{key}.nested_absmax"], 256) + np.float32(0.25)
    whole = table[np.stack([codes >> 4, codes & 15], 1).reshape(-1)] * np.repeat(scales, 64)
    for part, rows in zip(parts, np.split(whole.reshape(384, 128), 3), strict=True):
        np.testing.assert_array_equal(part.dequantise(), rows.T)
    models.save(tmp_path / "again", model, found.params)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert set(again) == set(tensors)
    for name in tensors:
        if ".quant_state." in name:
            assert json.loads(bytes(again[name])) == json.loads(bytes(tensors[name]))
        else:
            np.testing.assert_array_equal(again[name], tensors[name], name)


def test_plain_parameters_from_a_quantised_source_say_nothing_of_a_quantisation(tmp_path):
    found = models.load(GOLDEN / "llama_fp4")
    models.save(tmp_path, found.model, jlora.dequantize(found.params), source=GOLDEN / "llama_fp4")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path).params, jlora.dequantize(found.params))


# -- what cannot be read -----------------------------------------------------------------------------------------------

FC = "model.layers.0.mlp.up_proj.weight"
STATE = f"{FC}.quant_state.bitsandbytes__nf4"


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "llama"
    shutil.copytree(GOLDEN / "llama_nf4", copy)
    return copy


def error_of(folder, change, **options):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=".") as found:
        models.load(folder, **options)
    return str(found.value)


def restated(**changes):
    def change(tensors):
        said = json.loads(bytes(tensors[STATE])) | changes
        tensors[STATE] = np.frombuffer(json.dumps(said).encode(), np.uint8)

    return change


def renamed(name):
    return lambda tensors: tensors.update({name: tensors.pop(STATE)})


def put(key, value):
    return lambda tensors: tensors.update({key: value})


WRONG = {
    "no quant_state": (
        lambda tensors: tensors.pop(STATE),
        f"'FOLDER' has '{FC}.absmax' and no quant_state of '{FC}': expected '{FC}.quant_state.bitsandbytes__nf4' or "
        f"'{FC}.quant_state.bitsandbytes__fp4'",
    ),
    "an unknown type": (
        renamed(f"{FC}.quant_state.bitsandbytes__nf3"),
        f"'{FC}' is of the unknown type 'nf3': read are nf4 and fp4; the nearest is 'nf4'",
    ),
    "another type within": (restated(quant_type="fp4"), f"'{STATE}' has quant_type='fp4', expected 'nf4'"),
    "a block": (
        restated(blocksize=48),
        f"'{STATE}' has blocksize=48, expected one of (32, 64, 128, 256, 512, 1024, 2048, 4096)",
    ),
    "three axes": (restated(shape=[2, 4, 8]), f"'{STATE}' has shape=[2, 4, 8], expected that of a matrix"),
    "a huge shape": (restated(shape=[2**30, 2**30]), f"'{STATE}' has shape=[1073741824, 1073741824], expected that of"),
    "a dtype": (restated(dtype="int8"), f"'{STATE}' has dtype='int8', expected one of float32, float16, bfloat16"),
    "another group": (restated(nested_blocksize=128), f"'{STATE}' has nested_blocksize=128, expected 256"),
    "no number": (restated(nested_offset="x"), f"'{STATE}' has nested_offset='x', expected a number"),
    "not finite": (restated(nested_offset=float("nan")), f"'{STATE}' has nested_offset=nan, expected a finite number"),
    "no JSON": (put(STATE, np.frombuffer(b"{", np.uint8)), f"'{STATE}' is no JSON: "),
    "codes too few": (
        put(FC, np.zeros((10_000, 1), np.uint8)),
        f"'{FC}' is U8 (10000, 1), and its quant_state says a weight of shape (320, 64) in 4 bits: expected U8 (10240, 1)",
    ),
    "scales too few": (
        put(f"{FC}.absmax", np.zeros(319, np.uint8)),
        f"'{FC}.absmax' is U8 (319,), and the quant_state says 320 blocks of 64: expected U8 (320,)",
    ),
    "scales of scales": (
        lambda tensors: tensors.pop(f"{FC}.nested_absmax"),
        f"'{FC}.absmax' is U8 (320,), and the quant_state says 320 blocks of 64: expected F32 (320,)",
    ),
    "another table": (
        put(f"{FC}.quant_map", np.linspace(-1, 1, 16, dtype=np.float32)),
        f"'{FC}.quant_map' holds other numbers than those of nf4: made by another library?",
    ),
    "the shape of another layer": (restated(shape=[64, 320]), f"'{FC}' has shape (64, 320), the config says (320, 64)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_spoilt_weight_says_what_is_wrong(case, folder):
    change, expected = WRONG[case]
    assert expected.replace("FOLDER", str(folder)) in error_of(folder, change)


@pytest.mark.parametrize(
    ("config", "how"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, and no tensor has a quant_state"),
    ],
)
def test_another_quantiser_is_named(config, how, tmp_path):
    copy = tmp_path / "plain"
    shutil.copytree(GOLDEN / "gpt2_nf4" / "source", copy)
    said = json.loads((copy / "config.json").read_text()) | {"quantization_config": config}
    (copy / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="is quantised") as found:
        models.load(copy)
    assert str(found.value) == (
        f"'{copy}' is quantised ({how}), and jlora reads bitsandbytes' 4 bits alone: load the checkpoint that it was "
        "made from, with quantize= for a base in few bits"
    )


@pytest.mark.parametrize("name", ["gpt2_fp4", "gpt2_nf4_straddling"])
def test_blocks_that_cross_from_query_to_key_are_refused(name):
    with pytest.raises(ValueError, match="blocks of 64 cross from one to the next") as found:
        models.load(GOLDEN / name)
    assert str(found.value).startswith("'transformer.h.0.attn.c_attn.weight' of shape (44, 132) is 3 parameters, and ")


def test_layers_in_other_formats_are_loaded_one_by_one(folder):
    weight = np.zeros((320, 64), np.float32)

    def change(tensors):
        for key in [key for key in tensors if key.startswith(FC)]:
            del tensors[key]
        tensors[FC] = weight

    assert error_of(folder, change, scan=True) == (
        f"'{FC}' and the other layers of 'h/mlp/up/kernel' are not in the same format and blocks: load them one by one, "
        "with scan=False"
    )
    assert len(small(models.load(folder).params)) == 13


def test_another_map_of_8_bits_gives_the_scales_in_float32(folder):
    tensors = load_file(folder / "model.safetensors")
    table = tensors[f"{FC}.nested_quant_map"].copy()
    table[0] = -1.0
    codes = tensors[f"{FC}.absmax"]
    codes[:3] = 0
    put(f"{FC}.nested_quant_map", table)(tensors)
    save_file(tensors, folder / "model.safetensors")
    leaf = models.load(folder).params["h_0"]["mlp"]["up"]["kernel"]
    offset = json.loads(bytes(tensors[STATE]))["nested_offset"]
    expected = table[codes] * np.repeat(tensors[f"{FC}.nested_absmax"], 256)[:320] + np.float32(offset)
    np.testing.assert_array_equal(np.asarray(leaf.scales).reshape(-1), expected)


def test_what_bitsandbytes_cannot_hold_is_not_saved(tmp_path):
    found = models.load(GOLDEN / "gpt2_nf4" / "source", quantize="int8", param_dtype="float32")
    leaf = found.params["h_0"]["attn"]["query"]["kernel"]
    with pytest.raises(ValueError, match="save") as error:
        models.save(tmp_path, found.model, found.params)
    assert str(error.value) == (
        f"save: 'h_0/attn/query/kernel' is {leaf!r}, and transformers' files hold nf4 and fp4 of bitsandbytes alone: "
        "jlora.dequantize(params) first"
    )
    one = models.load(
        GOLDEN / "gpt2_nf4" / "source",
        quantize=lambda path, like: "nf4" if "query" in path else None,
        param_dtype="float32",
    )
    with pytest.raises(
        ValueError, match="are one tensor, 'transformer.h.0.attn.c_attn.weight', and not quantised alike"
    ):
        models.save(tmp_path, one.model, one.params)
    assert not list(tmp_path.iterdir())


# -- quantised while it is read ----------------------------------------------------------------------------------------

FORMATS = {
    "nf4": {"quantize": "nf4"},
    "fp4, blocks of 32": {"quantize": "fp4", "block": 32, "double": False},
    "blocks of 128": {"quantize": "nf4", "block": 128},
    "int8": {"quantize": "int8"},
}


def same(ours, theirs):
    """Code for code; scales in 8 bits to the order in which their mean is summed."""
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        if not isinstance(a, Quantised) or not isinstance(a.scales, Nested):
            jax.tree.map(np.testing.assert_array_equal, a, b)
            continue
        assert a.shape == b.shape and a.number == b.number and a.dtype == b.dtype
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_allclose(a.scales.offset, b.scales.offset, rtol=3e-7)
        np.testing.assert_allclose(a.scales.scales, b.scales.scales, rtol=0, atol=1e-6)
        assert np.mean(np.asarray(a.scales.codes) != np.asarray(b.scales.codes)) < 0.02


@pytest.mark.once
@pytest.mark.parametrize("name", ["llama_nf4_straddling", "gpt2_nf4"])
@pytest.mark.parametrize("case", thorough(FORMATS, "test_codes_are_those_that_transformers_makes", ["nf4", "int8"]))
def test_quantised_on_the_way_is_quantised_afterwards(case, name, monkeypatch):
    monkeypatch.setattr("jlora.models.quantised.CHUNK", 1000)  # rows of a matrix in several parts
    source, options = GOLDEN / name / "source", FORMATS[case]
    found = models.load(source, **options, param_dtype="float32")
    rest = {key: value for key, value in options.items() if key != "quantize"}
    theirs = jlora.quantize(models.load(source, param_dtype="float32").params, options["quantize"], **rest)
    assert len(small(found.params)) == (14 if "llama" in name else 12)
    same(found.params, theirs)


def test_stacked_layers_are_the_single_ones():
    source = GOLDEN / "gpt2_nf4" / "source"
    load = functools.partial(models.load, source, quantize="nf4", param_dtype="float32")
    single, stacked = (load(scan=scan).params for scan in (False, True))
    each = [jax.tree.map(lambda x, i=i: x[i], stacked["h"]) for i in range(2)]
    same({"h_0": each[0], "h_1": each[1]}, {name: single[name] for name in ("h_0", "h_1")})


def test_codes_are_those_that_transformers_makes():
    """bitsandbytes quantises the whole of GPT-2's c_attn, so that its scales in 8 bits are others."""
    found = models.load(GOLDEN / "llama_nf4_straddling" / "source", quantize="nf4", param_dtype="float32")
    same(found.params, models.load(GOLDEN / "llama_nf4_straddling").params)


def test_what_cannot_be_quantised_is_refused(tmp_path):
    source = GOLDEN / "gpt2_nf4" / "source"
    wrong = {
        "unknown format 'nf5'": {"quantize": "nf5"},
        "block=48 does not fit": {"quantize": "nf4", "block": 48},
        "int8 has one scale for each output channel: leave out block=64": {"quantize": "int8", "block": 64},
        "load: block=64, double=None say how to quantize=, which is None": {"block": 64},
    }
    for text, options in wrong.items():
        with pytest.raises(ValueError, match=re.escape(text)):
            models.load(source, **options)
    with pytest.raises(ValueError, match="'h_0/mlp/fc/kernel' is quantised already .*: leave out quantize="):
        models.load(GOLDEN / "gpt2_nf4", quantize="nf4")
    shutil.copytree(source, tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = np.nan
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(ValueError, match=r"'transformer.h.1.mlp.c_fc.weight' is not finite: a block with a NaN"):
        models.load(tmp_path / "bad", quantize="nf4", param_dtype="float32")


@pytest.mark.parametrize("case", ["read", "nf4", "int8"])
def test_each_device_is_given_its_own_part(case, monkeypatch):
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    out = lambda path: "attn/out" in path or "proj" in path

    def place(path, like):
        if not path.endswith("kernel"):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(
            mesh, PartitionSpec(None, None, "a") if out(path) else PartitionSpec(None, None, ("a", "b"))
        )

    folder = GOLDEN / "gpt2_nf4" if case == "read" else GOLDEN / "gpt2_nf4" / "source"
    options = {} if case == "read" else FORMATS[case] | {"param_dtype": "float32"}
    whole = models.load(folder, scan=True, **options).params
    elements = []
    plain = files.read_into
    monkeypatch.setattr(files, "read_into", lambda out, *rest: (elements.append(out.size), plain(out, *rest)))
    found = models.load(folder, scan=True, sharding=place, **options).params
    same(found, whole)
    leaf = found["h"]["mlp"]["fc"]["kernel"]  # (2, 64, 256)
    assert {shard.data.shape for shard in leaf.codes.addressable_shards} == {(2, 64, 64 if case == "int8" else 32)}
    assert leaf.dequantise().shape == (2, 64, 256)
    half = 64 * 256 // 2  # of mlp/proj, the largest part of a layer that a device has
    assert max(elements) == (half // 2 if case == "read" else half)


def test_a_mesh_that_cuts_through_a_block_is_refused():
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("a",))
    place = lambda path, like: NamedSharding(mesh, PartitionSpec("a") if len(like.shape) == 2 else PartitionSpec())
    with pytest.raises(
        ValueError, match=r"'h_0/.*/kernel' of shape .*: axis 0 of size 64 .* cut through its blocks of 64"
    ):
        models.load(GOLDEN / "gpt2_nf4", sharding=place)


# The whole in 16 bits would be 3.5 times what may be held.
def test_quantising_never_holds_the_16_bits(tmp_path):
    model = GPT2(GPT2Config(vocab_size=64, context=64, width=1024, layers=8, heads=8))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda x: np.broadcast_to(np.ones((), x.dtype), x.shape), shapes)
    models.save(tmp_path, model, params, largest_shard=10**8)
    found = measured(tmp_path, scan=True, quantize="nf4", param_dtype="bfloat16")
    assert 5e7 < found["parameters"] < 5.5e7
    assert found["peak"] < 1.15 * found["parameters"] + 45e6  # the compiler's, whatever the size
