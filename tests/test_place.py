"""Addresses of folders: what is local is a path, all else is refused before anything is written."""

import re
from pathlib import Path, PurePosixPath

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import models
from jlora.checkpoint import place as core
from jlora.models import place
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import llama2c

BERT = Path(__file__).resolve().parent / "golden" / "models" / "tokenizers" / "bert"
BOTH = pytest.mark.parametrize("folder_of", [core.folder_of, place.folder_of], ids=["core", "models"])


@BOTH
@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("runs/a", "runs/a"), ("/data/a", "/data/a"), ("", "."), ("a:b/c", "a:b/c"), ("./gs:", "gs:"), ("c:/a", "c:/a"),
        ("/data/gs:/a", "/data/gs:/a"), (Path("runs/a"), "runs/a"), (PurePosixPath("/a"), "/a"),
        ("file:///data/a", "/data/a"), ("file:/data/a", "/data/a"), ("FILE://localhost/a", "/a"), (Path("file:///a"), "/a"),
        ("file:///my%20run", "/my run"), ("file:///my run", "/my run"), ("file:///100%25", "/100%"), (Path("/a b#c?").as_uri(), "/a b#c?"),
    ],
)  # fmt: skip
def test_what_is_local(address, path, folder_of):
    assert folder_of(address) == Path(path)


@BOTH
@pytest.mark.parametrize(
    "address",
    [
        "gs://bucket/a", "s3://bucket", "GS://bucket/a", "hf://datasets/a", "memory://a", "https://host/a", "s3a://a", "my_store://a",
        "gcs+cached://a", "gs:/bucket", "gs:", "dbfs:/a", " gs://a", "runs/gs://bucket/a", Path("gs://bucket/a"), "://a", "gs:\\bucket",
        "c://bucket",
    ],
)  # fmt: skip
def test_what_lies_elsewhere_is_refused(address, folder_of):
    text = re.escape(repr(str(address)))
    with pytest.raises(ValueError, match=rf"^{text} is no local folder: jlora reads and writes local folders .* Copy"):
        folder_of(address)


@BOTH
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("file://host/a", "names the machine 'host': a local folder is file:///path, with three slashes"),
        ("file://data", "names the machine 'data'"),
        ("file://", "names no folder: a file:// URL holds an absolute path"),
        ("file:", "names no folder"),
        ("file:///a?b", "has a '?' or '#': in a file:// URL they are written %3F and %23"),
        ("file:///a#b", "has a '?' or '#'"),
        ("file:///a%00b", "names no folder"),
        ("a\0b", "is no folder: a path holds no NUL character"),
    ],
)
def test_a_url_that_names_no_folder_here(address, reason, folder_of):
    with pytest.raises(ValueError, match=re.escape(reason)):
        folder_of(address)


@BOTH
@pytest.mark.parametrize("address", [None, 3, b"a", ["a"], Path])
def test_a_folder_is_text(address, folder_of):
    with pytest.raises(TypeError, match="^a folder is named by a string or a path, not by "):
        folder_of(address)


def test_adapters_at_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {"kernel": jnp.ones((4, 3))}
    adapted = jlora.apply(params, rank=1)
    for address in ("az://bucket/adapter", Path("gs://bucket/adapter")):  # a Path has lost a slash
        with pytest.raises(ValueError, match="is no local folder"):
            jlora.save(address, adapted)
        with pytest.raises(ValueError, match="is no local folder"):
            jlora.load(address, params)
    with pytest.raises(ValueError, match="^'gs:/bucket/run' is no local folder: "):
        jlora.checkpoint.Checkpoints(Path("gs://bucket/run"))
    assert list(tmp_path.iterdir()) == []
    jlora.save((tmp_path / "an adapter").as_uri(), adapted)
    assert [path.name for path in tmp_path.iterdir()] == ["an adapter"]
    assert jlora.load((tmp_path / "an adapter").as_uri(), params).sites == adapted.sites


def test_models_at_addresses(tmp_path, monkeypatch):
    """An address such as gs:// is neither made into a local folder nor asked for at the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    model = GPT2(GPT2Config(vocab_size=8, context=4, width=4, layers=1, heads=1))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params)
    for address in ("gs://bucket/m", "s3://bucket", "hf://owner/name", "gs://x/y/z", Path("gs://bucket/m")):
        for call in (
            lambda at: models.load(at), models.build, models.Tokenizer.load, llama2c.load, llama2c.load_tokenizer,
            lambda at: models.save(at, model, params), lambda at: models.save("m", model, params, source=at),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"^{re.escape(repr(str(address)))} is no local folder: "):
                call(address)
    assert list(tmp_path.iterdir()) == []
    models.save((tmp_path / "a model").as_uri(), model, params)
    assert [path.name for path in tmp_path.iterdir()] == ["a model"]
    assert models.build((tmp_path / "a model").as_uri()).config.width == 4
    assert models.Tokenizer.load(BERT.as_uri()).pad == 0
    models.save("file:" + str(tmp_path / "b"), model, params, source=(tmp_path / "a model").as_uri())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a model", "b"]
