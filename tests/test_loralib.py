"""Adapters of loralib: a tiny one against transformers (golden/make_loralib.py), and the LoRA authors' own for MNLI.

The latter is read where the environment variable JLORA_WEIGHTS names a folder with
real_loras/microsoft_roberta_base_lora_mnli.bin, from examples/NLU of https://github.com/microsoft/LoRA.
"""

import dataclasses
import functools
import os
import pickle
import re
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import models
from jlora.interop import loralib, tensor_file, torch_file
from jlora.models.roberta import PRESETS, Roberta

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "loralib.bin"
MNLI = Path(os.environ.get("JLORA_WEIGHTS", "")) / "real_loras" / "microsoft_roberta_base_lora_mnli.bin"
KEY = "roberta.encoder.layer.{}.attention.self.{}.lora_{}"


def adapt(params, rank=3, alpha=6, extras="classifier", targets="attn/(query|value)", sites=None):
    return jlora.apply(params, rank=rank, alpha=alpha, targets=targets, extras=extras, sites=sites)


@functools.cache
def tiny(scan=False):
    return models.load(GOLDEN / "models" / "roberta_sequence_classification", scan=scan)


@pytest.mark.parametrize("scan", [False, True], ids=["", "scanned"])
def test_logits_are_those_of_transformers_with_the_adapter_merged(scan):
    model, params = tiny(scan).model, tiny(scan).params
    golden = np.load(GOLDEN / "loralib.npz")

    def forward(params):
        return model.apply({"params": params}, jnp.asarray(golden["tokens"]), mask=jnp.asarray(golden["mask"] == 1))

    sites = jlora.sites(forward, params) if scan else None
    adapted = loralib.load(TINY, model, adapt(params, sites=sites), pickled=True)
    assert len(adapted.extras) == 4
    out = jax.jit(jlora.lift(forward, strict=True))(adapted)
    np.testing.assert_allclose(out, golden["out"], rtol=2e-5, atol=2e-5)


@pytest.mark.skipif("JLORA_WEIGHTS" not in os.environ, reason="JLORA_WEIGHTS names no folder of weights")
def test_the_mnli_adapter_of_the_paper_is_placed_whole():
    model = Roberta(dataclasses.replace(PRESETS["roberta-base"], head="sequence_classification", labels=3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    base = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)  # pages that nobody touches cost nothing
    own = np.random.default_rng(0).normal(size=(768, 768)).astype(np.float32)
    base["h_3"]["attn"]["query"]["kernel"] = own
    adapted = loralib.load(MNLI, model, adapt(base, rank=8, alpha=16), pickled=True)
    head = 768 * 768 + 768 + 768 * 3 + 3
    assert jlora.count(adapted).trainable == 294_912 + head
    tensors = torch_file.read(MNLI)
    assert len(tensors) == 2 * 24 + 4 and sum(x.size for x in tensors.values()) == 294_912 + head
    merged, placed = jlora.merge(adapted), set()
    for i in range(12):
        for name in ("query", "value"):
            a, b = (tensors[KEY.format(i, name, part)] for part in "AB")
            w = base[f"h_{i}"]["attn"][name]["kernel"]
            assert np.abs(b).max() > 0
            np.testing.assert_allclose(merged[f"h_{i}"]["attn"][name]["kernel"], w + 16 / 8 * (b @ a).T, atol=1e-6)
            placed |= {KEY.format(i, name, part) for part in "AB"}
    for path, key in {"dense": "dense", "out": "out_proj"}.items():
        layer = merged["classifier"][path]
        np.testing.assert_array_equal(layer["kernel"], tensors[f"classifier.{key}.weight"].T)
        np.testing.assert_array_equal(layer["bias"], tensors[f"classifier.{key}.bias"])
        placed |= {f"classifier.{key}.weight", f"classifier.{key}.bias"}
    assert placed == set(tensors)


def test_all_that_does_not_fit_is_in_one_error():
    tensors = torch_file.read(TINY)
    tensors["other.lora_A"] = tensors.pop(KEY.format(1, "query", "A"))
    tensors[KEY.format(0, "value", "B")] = np.zeros((16, 4), np.float32)
    with pytest.raises(ValueError, match="the adapter does not fit; rank=, targets= and extras= of apply") as error:
        loralib.placed(tensors, tiny().model, adapt(tiny().params))
    assert str(error.value).splitlines()[1:] == [
        "  'roberta.encoder.layer.1.attention.self.query.lora_A' is missing, expected shape (3, 16)",
        "  'other.lora_A' is unexpected, shape (3, 16)",
        "  'roberta.encoder.layer.0.attention.self.value.lora_B' has shape (16, 4), expected (16, 3)",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extras": ()}, "'classifier.dense.weight' is unexpected, shape (16, 16)"),
        (
            {"targets": "attn/query"},
            "'roberta.encoder.layer.0.attention.self.value.lora_A' is unexpected, shape (3, 16)",
        ),
        ({"targets": "attn"}, "'roberta.encoder.layer.0.attention.self.key.lora_A' is missing, expected shape (3, 16)"),
        ({"rank": 4}, "'roberta.encoder.layer.0.attention.self.query.lora_A' has shape (3, 16), expected (4, 16)"),
        ({"extras": {"wte": [5]}}, "loralib has no part of a leaf such as of 'wte/embedding': train all of it"),
    ],
    ids=lambda x: x if isinstance(x, str) else str(*x),
)
def test_another_adapter_than_the_files_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        loralib.load(TINY, tiny().model, adapt(tiny().params, **changes), pickled=True)
    assert str(TINY) in str(error.value)


def test_a_pickle_is_read_only_when_asked_for():
    with pytest.raises(ValueError, match="is a pickle, .*: pickled=True reads it, without running what it says"):
        loralib.load(TINY, tiny().model, adapt(tiny().params))


def test_the_same_tensors_as_safetensors(tmp_path):
    tensor_file.write(tmp_path / "x.safetensors", torch_file.read(TINY), {"format": "pt"})
    ours, theirs = (
        loralib.load(file, tiny().model, adapt(tiny().params), pickled=file == TINY)
        for file in (tmp_path / "x.safetensors", TINY)
    )
    jax.tree.map(np.testing.assert_array_equal, ours.factors, theirs.factors)


def test_other_methods_are_refused():
    adapted = jlora.apply(tiny().params, method=jlora.dora(3), targets="attn/query")
    with pytest.raises(ValueError, match="loralib has no A and B of 'h_0/attn/query/kernel'"):
        loralib.load(TINY, tiny().model, adapted, pickled=True)


# -- files of torch.save -----------------------------------------------------------------------------------------------


def test_tensors_are_read_with_their_strides_and_dtypes():
    tensors = torch_file.read(TINY)
    assert len(tensors) == 12 and tensors["classifier.dense.bias"].dtype == jnp.bfloat16
    assert {x.dtype.name for x in tensors.values()} == {"float32", "bfloat16"}
    assert all(x.flags.writeable for x in tensors.values())


def archive(path, pickled, storage=b"\0" * 16):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", storage)
    return path


def state_dict(offset, shape, strides):
    """A pickle of {"x": a tensor of a storage of four float32}, as torch writes it."""
    numbers = lambda values: b"(" + b"".join(b"J" + value.to_bytes(4, "little", signed=True) for value in values) + b"t"
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuJ\4\0\0\0tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J" + offset.to_bytes(4, "little", signed=True)
    tensor += numbers(shape) + numbers(strides) + b"\x89N" + b"tR"
    return b"\x80\2}X\1\0\0\0x" + tensor + b"s."


def test_a_tensor_may_be_a_view(tmp_path):
    storage = np.arange(4, dtype=np.float32).tobytes()
    read = lambda *view: torch_file.read(archive(tmp_path / "x.bin", state_dict(*view), storage))["x"].tolist()
    assert read(0, (2, 2), (2, 1)) == [[0, 1], [2, 3]]
    assert read(0, (2, 2), (1, 2)) == [[0, 2], [1, 3]]
    assert read(1, (3,), (1,)) == [1, 2, 3]
    assert read(3, (2,), (0,)) == [3, 3]
    assert read(4, (0, 5), (5, 1)) == []


@pytest.mark.parametrize(
    "view", [(0, (5,), (1,)), (2, (2, 2), (2, 1)), (-1, (1,), (1,)), (3, (2,), (-1,)), (0, (-4,), (1,))]
)
def test_a_tensor_outside_of_its_storage_is_refused(view, tmp_path):
    with pytest.raises(ValueError, match="is no file of tensors by torch.save, or is damaged: "):
        torch_file.read(archive(tmp_path / "x.bin", state_dict(*view)))


class Malicious:
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def test_a_pickle_that_names_a_function_is_refused(tmp_path):
    made = tmp_path / "made"
    file = archive(tmp_path / "x.bin", pickle.dumps({"x": Malicious(made)}))
    with pytest.raises(ValueError, match="it names (posix|nt).mkdir, which no tensor needs"):
        torch_file.read(file)
    assert not made.exists()


@pytest.mark.parametrize(
    "content", [b"", b"no zip at all", TINY.read_bytes()[:3000]], ids=["empty", "text", "truncated"]
)
def test_what_is_no_file_of_tensors_is_refused(content, tmp_path):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match="is no file of tensors by torch.save, or is damaged"):
        torch_file.read(tmp_path / "x.bin")
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "absent.bin")


def test_something_else_than_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds something else than a dict of tensors"):
        torch_file.read(archive(tmp_path / "x.bin", pickle.dumps({"x": 1})))
