"""Checkpoints that are damaged, foreign, sharded over devices, or given another head."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from experiments.bench.load import measured
from jlora import models
from jlora.models import files
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.tensors import LINEAR, Leaf, Part, layered, leaf, linear, tensor_shape, tensor_slices, to_tensors

GOLDEN = Path(__file__).parent / "golden" / "models"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of GPT-2 to damage."""
    copy = tmp_path / "gpt2"
    shutil.copytree(GOLDEN / "gpt2_causal_lm", copy)
    return copy


def change(folder, **values):
    """Changes the config; None removes an entry."""
    path = folder / "config.json"
    record = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def retensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# -- what is no checkpoint ---------------------------------------------------------------------------------------------


def error_of(call, kind=ValueError):
    with pytest.raises(kind) as found:
        call()
    return str(found.value)


def test_a_folder_without_a_config(tmp_path):
    assert error_of(lambda: models.load(tmp_path), FileNotFoundError) == (
        f"'{tmp_path}' is no checkpoint: there is no config.json in it"
    )
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text("{}")
    assert error_of(lambda: models.load(tmp_path), FileNotFoundError).endswith("; its folders 'inner' hold one")


def test_a_folder_that_does_not_exist(tmp_path):
    path = tmp_path / "absent"
    assert (
        error_of(lambda: models.load(path), FileNotFoundError) == f"'{path}' is no checkpoint: there is no such folder"
    )


def test_a_repository_that_cannot_be_had(monkeypatch):
    import huggingface_hub

    def snapshot_download(*_, **options):
        assert options["revision"] == "main" and "model*.safetensors" in options["allow_patterns"]
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert error_of(lambda: models.load("someone/model", revision="main"), FileNotFoundError) == (
        "'someone/model' is no folder here, and the hub did not deliver it: ConnectionError: no route"
    )


def test_a_repository_that_can_be_had(monkeypatch, folder):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(folder))
    assert models.load("someone/model").folder == folder


def test_a_checkpoint_without_tensors(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert error_of(lambda: models.load(folder), FileNotFoundError) == (
        f"'{folder}' holds neither model.safetensors nor model.safetensors.index.json; pytorch_model.bin is a pickle: "
        "load it with transformers, and save it again"
    )
    (folder / "pytorch_model.bin").unlink()
    assert error_of(lambda: models.load(folder), FileNotFoundError) == (
        f"'{folder}' holds neither model.safetensors nor model.safetensors.index.json; if its repository has pickles "
        "alone: load it with transformers, and save it again"
    )


@pytest.mark.parametrize("size", [0, 5, 300, -100])
def test_a_file_that_is_cut_short(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert error_of(lambda: models.load(folder)).startswith(f"'{path}' is damaged or no safetensors file: ")


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")
    assert error_of(lambda: models.load(folder)).startswith(f"'{folder / 'config.json'}' is no JSON: ")
    (folder / "config.json").write_text("[]")
    assert error_of(lambda: models.load(folder)) == f"'{folder / 'config.json'}' holds a list, expected an object"


# -- what is not supported ---------------------------------------------------------------------------------------------


def test_an_architecture_that_is_not_here(folder):
    change(folder, model_type="mamba")
    assert error_of(lambda: models.load(folder)).startswith(
        f"'{folder / 'config.json'}' is of model_type 'mamba'; supported are gpt2, "
    )
    change(folder, model_type=None)
    assert "has no model_type; supported are gpt2, " in error_of(lambda: models.load(folder))


def test_a_class_that_is_not_here(folder):
    change(folder, architectures=["GPT2DoubleHeadsModel"])
    assert error_of(lambda: models.load(folder)) == (
        f"'{folder / 'config.json'}' is of GPT2DoubleHeadsModel; supported are GPT2Model, GPT2LMHeadModel, "
        "GPT2ForSequenceClassification, GPT2ForTokenClassification. Pass head= to put one of none, causal_lm, "
        "sequence_classification, token_classification on its body"
    )
    assert models.load(folder, head="causal_lm").fresh == ()


def test_a_setting_that_the_model_does_not_have(folder):
    change(folder, scale_attn_by_inverse_layer_idx=True)
    assert error_of(lambda: models.load(folder)) == (
        f"'{folder / 'config.json'}': config.json has scale_attn_by_inverse_layer_idx=True; jlora's model has False"
    )


def test_a_config_that_lacks_a_size(folder):
    change(folder, n_embd=None)
    assert error_of(lambda: models.load(folder)) == f"'{folder / 'config.json'}' lacks 'n_embd'"


def test_an_option_that_the_config_does_not_have(folder):
    assert error_of(lambda: models.load(folder, remats=True), TypeError).startswith(
        "load: GPT2Config has no field 'remats'; it has vocab_size, context, "
    )
    with pytest.raises(ValueError, match="remat='all' is not False, True or one of dots_saveable"):
        models.load(folder, remat="all")
    with pytest.raises(ValueError, match="head='masked_lm' is not one of 'none', 'causal_lm'"):
        models.load(folder, head="masked_lm")


# -- tensors that are not the config's ---------------------------------------------------------------------------------


def test_a_config_that_contradicts_the_tensors(folder):
    change(folder, n_inner=40, vocab_size=60)
    text = error_of(lambda: models.load(folder))
    assert text.splitlines()[0] == f"'{folder}' is not the gpt2 of its config.json:"
    assert len(text.splitlines()) == 1 + 1 + 2 * 3  # the embedding; in each of two layers fc's kernel and bias, proj's
    assert "  'transformer.wte.weight' has shape (64, 16), the config says (60, 16)" in text
    assert "  'transformer.h.1.mlp.c_fc.weight' has shape (16, 64), the config says (16, 40)" in text


def test_tensors_that_are_missing_and_unexpected(folder):
    def edit(tensors):
        del tensors["transformer.ln_f.bias"]
        tensors["transformer.h.0.extra"] = np.zeros(3, np.float32)
        tensors["transformer.h.0.attn.masked_bias"] = np.zeros((), np.float32)  # a buffer of old checkpoints

    retensor(folder, edit)
    assert error_of(lambda: models.load(folder)).splitlines()[1:] == [
        "  'transformer.ln_f.bias' is missing, expected shape (16,)",
        "  'transformer.h.0.extra' is unexpected, shape (3,)",
    ]


def test_an_index_that_names_what_is_not_there(tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(GOLDEN / "gpt2_sharded", folder)
    names = sorted(path.name for path in folder.glob("model-*"))
    (folder / names[0]).rename(folder / "away")
    assert error_of(lambda: models.load(folder), FileNotFoundError) == (
        f"'{folder / files.INDEX}' names files that are missing: {names[0]}"
    )
    (folder / "away").rename(folder / names[0])
    index = json.loads((folder / files.INDEX).read_text())
    key = next(key for key, name in index["weight_map"].items() if name == names[0])
    index["weight_map"][key] = names[1]
    (folder / files.INDEX).write_text(json.dumps(index))
    assert error_of(lambda: models.load(folder)) == (
        f"'{folder / files.INDEX}' places {key!r} in {names[1]!r}, and it is not there"
    )


# -- heads, dtypes, devices --------------------------------------------------------------------------------------------


def test_a_new_head_is_random_by_its_seed_and_said_to_be(folder):
    options = {"head": "sequence_classification", "labels": 5}
    first, again, other = (models.load(folder, seed=seed, **options) for seed in (1, 1, 2))
    assert first.fresh == ("score/kernel",) and first.unused == ()
    assert first.params["score"]["kernel"].shape == (16, 5)
    same = lambda a, b: bool((a.params["score"]["kernel"] == b.params["score"]["kernel"]).all())
    assert same(first, again) and not same(first, other)
    np.testing.assert_array_equal(first.params["wte"]["embedding"], other.params["wte"]["embedding"])


def test_a_head_of_other_labels_is_new_and_the_same_is_kept():
    path = GOLDEN / "gpt2_sequence_classification"
    kept = models.load(path)
    assert kept.fresh == () and kept.model.config.labels == 3
    assert models.load(path, labels=3).fresh == ()
    assert models.load(path, labels=7).fresh == ("score/kernel",)
    assert models.load(path, head="causal_lm").unused == ("score.weight",)


@pytest.mark.loose_promotion  # Flax's LayerNorm promotes bfloat16 to float32 by itself
@pytest.mark.parametrize("scan", [False, True])
def test_dtypes(folder, scan):
    pretrained = models.load(folder, param_dtype="bfloat16", scan=scan)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(pretrained.params)} == {"bfloat16"}
    assert pretrained.model.config.dtype == "bfloat16"
    whole = models.load(folder, scan=scan).params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), pretrained.params, whole)


@pytest.mark.parametrize("axes", [None, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("scan", [False, True])
def test_each_device_is_given_its_own_slices(folder, scan, axes, monkeypatch):
    mesh = jax.make_mesh((4, 2), ("data", "model"), **({"axis_types": (axes, axes)} if axes else {}))
    read: dict[str, list[int]] = {}
    original = files.read_into

    def read_into(out, tensor, index):
        read.setdefault(tensor.key, []).append(out.size)
        original(out, tensor, index)

    monkeypatch.setattr(files, "read_into", read_into)

    def place(path, like):
        kernel = path.endswith("kernel")
        spec = [None] * len(like.shape)
        if kernel:
            spec[-2:] = ["model", "data"]
        return NamedSharding(mesh, PartitionSpec(*spec))

    sharded = models.load(folder, scan=scan, sharding=place).params
    whole = models.load(folder, scan=scan).params
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)
    kernel = (sharded["h"] if scan else sharded["h_0"])["attn"]["query"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(*([None] if scan else []), "model", "data")
    assert kernel.addressable_shards[0].data.shape[-2:] == (8, 4)
    sizes = read["transformer.h.0.attn.c_proj.weight"]
    assert sizes == [8 * 4] * 8 + [16 * 16]  # a part of it for each of eight devices; then all of it, for `whole`
    assert read["transformer.ln_f.bias"] == [16, 16]  # the same for all devices: read once


def test_a_new_head_is_placed_too(folder):
    mesh = jax.make_mesh((2,), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    params = models.load(folder, head="token_classification", sharding=replicated).params
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {replicated}


# The whole file (64 MB) is far above what the process allocates beside it (1 to 3 MB).
@pytest.mark.parametrize("options", [{}, {"scan": True}, {"param_dtype": "bfloat16"}], ids=str)
def test_loading_holds_no_second_copy(options, tmp_path):
    model = GPT2(GPT2Config(vocab_size=8192, context=64, width=512, layers=4, heads=8))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    models.save(tmp_path, model, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes))
    found = measured(tmp_path, **options)
    assert found["parameters"] > (30e6 if options.get("param_dtype") else 60e6)
    assert found["peak"] < 1.2 * found["parameters"] + 8e6


# -- saving ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_must_be_the_models(tmp_path, folder):
    pretrained = models.load(folder)
    params = dict(pretrained.params)
    params["ln_f"] = {"scale": jnp.ones(3), "shift": jnp.ones(16)}
    assert error_of(lambda: models.save(tmp_path / "out", pretrained.model, params)).splitlines() == [
        "save: the parameters are not the model's:",
        "  'ln_f/bias' is missing",
        "  'ln_f/shift' is unexpected",
        "  'ln_f/scale' has shape (3,), expected (16,)",
    ]
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_goes_along(tmp_path, folder):
    pretrained = models.load(folder)
    models.save(tmp_path / "out", pretrained.model, pretrained.params, source=folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    models.save(folder, pretrained.model, pretrained.params, source=folder)  # onto itself
    assert (folder / "tokenizer.json").exists()


def test_labels_are_named_where_there_are_none(tmp_path, folder):
    pretrained = models.load(folder, head="token_classification", labels=3)
    models.save(tmp_path, pretrained.model, pretrained.params, source=folder)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert record["architectures"] == ["GPT2ForTokenClassification"]
    assert models.load(tmp_path).model.config.labels == 3


# -- the algebra of rows -----------------------------------------------------------------------------------------------


def test_slices_of_a_part_of_a_transposed_stack():
    row = Leaf("h/query/kernel", ("a", "b"), LINEAR, Part(0, 2, 3), stacked=True)
    assert tensor_shape(row, (2, 4, 5)) == (15, 4)
    index = (slice(1, 2), slice(1, 3), slice(None))
    assert tensor_slices(row, (2, 4, 5), index) == (slice(10, 15), slice(1, 3))


def test_tensors_are_put_together_again():
    rng = np.random.default_rng(0)
    fused = {f"h.{i}.qkv.weight": rng.normal(size=(6, 4)) for i in range(2)}
    parts = [leaf(name, "h.{i}.qkv.weight", LINEAR, Part(0, n, 3)) for n, name in enumerate(("q", "k", "v"))]
    rows = layered(parts, 2, scan=True)
    everything = (slice(None),) * 3
    params = {
        row.path: np.stack([fused[key][tensor_slices(row, (2, 4, 2), everything)].T for key in row.keys])
        for row in rows
    }
    written = to_tensors(rows, params)
    for key, value in fused.items():
        np.testing.assert_array_equal(written[key], value)


def test_a_layer_is_named_by_its_number():
    rows = layered(linear("fc", "h.{i}.fc"), 3, scan=False, name="layers")
    assert [(row.path, row.keys) for row in rows[2:4]] == [
        ("layers_1/fc/kernel", ("h.1.fc.weight",)),
        ("layers_1/fc/bias", ("h.1.fc.bias",)),
    ]


def test_a_save_that_cannot_be_leaves_what_was_there(tmp_path):
    small = LlamaConfig(vocab_size=16, context=8, width=8, layers=1, heads=2, hidden=8)
    model = Llama(small)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    models.save(tmp_path, model, params)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = Llama(dataclasses.replace(small, qk_norm=True))
    more = other.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    with pytest.raises(ValueError, match="a model of family 'llama' is not saved with qk_norm=True"):
        models.save(tmp_path, other, more)
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        models.save(tmp_path, model, params, source=tmp_path / "absent")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_quantised_checkpoint_is_refused(folder):
    change(folder, quantization_config={"quant_method": "gptq"})
    assert error_of(lambda: models.load(folder)) == (
        f"'{folder}' is quantised (gptq), and jlora reads bitsandbytes' 4 bits alone: load the checkpoint that it was "
        "made from, with quantize= for a base in few bits"
    )
    change(folder, quantization_config=None)
    retensor(folder, lambda tensors: tensors.update({"transformer.ln_f.bias": np.ones(16, np.int8)}))
    assert error_of(lambda: models.load(folder)).splitlines()[1:] == [
        "  'transformer.ln_f.bias' is of I8, expected one of F32, BF16, F16, F64"
    ]


@pytest.mark.loose_promotion
def test_float16_is_computed_in_float32_and_dtypes_may_be_spelt_as_jax_does(folder):
    retensor(folder, lambda tensors: tensors.update({k: v.astype(np.float16) for k, v in tensors.items()}))
    config = models.load(folder).model.config
    assert (config.param_dtype, config.dtype) == ("float16", "float32")
    config = models.load(folder, dtype=jnp.bfloat16, param_dtype=np.float32).model.config
    assert (config.param_dtype, config.dtype) == ("float32", "bfloat16")


def test_labels_are_of_a_classification(folder):
    with pytest.raises(ValueError, match=r"^load: labels=3 are of a classification, and the head is 'causal_lm'$"):
        models.load(folder, labels=3)


def test_the_number_of_labels_that_is_saved_makes_no_head_new(folder, tmp_path):
    classifier = models.load(folder, head="sequence_classification", labels=3)
    models.save(tmp_path / "own", classifier.model, classifier.params)
    retensor(tmp_path / "own", lambda tensors: tensors.pop("score.weight"))
    assert "'score.weight' is missing" in error_of(lambda: models.load(tmp_path / "own", labels=3), ValueError)
    assert models.load(tmp_path / "own", labels=2).fresh == ("score/kernel",)


def test_what_goes_along_comes_from_the_revision_that_is_named(folder, tmp_path, monkeypatch):
    """The snapshot's files but the tensors are copied, the chat template among them."""
    import huggingface_hub

    (folder / "chat_template.jinja").write_text("{{ messages }}")
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or str(folder)
    )
    pretrained = models.load("someone/model", revision="v1")
    assert {"*.jinja", "vocab.bpe", "model*.safetensors"} <= set(asked["allow_patterns"])
    models.save(tmp_path / "out", pretrained.model, pretrained.params, source="someone/model", revision="v1")
    assert asked["revision"] == "v1" and not any("safetensors" in pattern for pattern in asked["allow_patterns"])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_labels_of_none_are_no_labels(folder):
    with pytest.raises(ValueError, match="labels must be at least 1, got 0"):
        models.load(folder, head="sequence_classification", labels=0)
