"""Addresses of folders: what is local is a path, all else is refused before anything is written."""

import re
from pathlib import Path, PurePosixPath

import jax.numpy as jnp
import pytest

import jlora
from jlora.checkpoint.place import folder_of


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("runs/a", "runs/a"), ("/data/a", "/data/a"), ("", "."), ("a:b/c", "a:b/c"), ("./gs:", "gs:"), ("c:/a", "c:/a"),
        ("/data/gs:/a", "/data/gs:/a"), (Path("runs/a"), "runs/a"), (PurePosixPath("/a"), "/a"),
        ("file:///data/a", "/data/a"), ("file:/data/a", "/data/a"), ("FILE://localhost/a", "/a"), (Path("file:///a"), "/a"),
        ("file:///my%20run", "/my run"), ("file:///my run", "/my run"), ("file:///100%25", "/100%"), (Path("/a b#c?").as_uri(), "/a b#c?"),
    ],
)  # fmt: skip
def test_what_is_local(address, path):
    assert folder_of(address) == Path(path)


@pytest.mark.parametrize(
    "address",
    [
        "gs://bucket/a", "s3://bucket", "GS://bucket/a", "hf://datasets/a", "memory://a", "https://host/a", "s3a://a", "my_store://a",
        "gcs+cached://a", "gs:/bucket", "gs:", "dbfs:/a", " gs://a", "runs/gs://bucket/a", Path("gs://bucket/a"), "://a", "gs:\\bucket",
        "c://bucket",
    ],
)  # fmt: skip
def test_what_lies_elsewhere_is_refused(address):
    text = re.escape(repr(str(address)))
    with pytest.raises(ValueError, match=rf"^{text} is no local folder: jlora reads and writes local folders .* Copy"):
        folder_of(address)


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
def test_a_url_that_names_no_folder_here(address, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        folder_of(address)


@pytest.mark.parametrize("address", [None, 3, b"a", ["a"], Path])
def test_a_folder_is_text(address):
    with pytest.raises(TypeError, match="^a folder is named by a string or a path, not by "):
        folder_of(address)


def test_adapters_at_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {"kernel": jnp.ones((4, 3))}
    adapted = jlora.apply(params, rank=1)
    for address in ("gs://bucket/adapter", Path("gs://bucket/adapter")):
        with pytest.raises(ValueError, match="is no local folder"):
            jlora.save(address, adapted)
        with pytest.raises(ValueError, match="is no local folder"):
            jlora.load(address, params)
    assert list(tmp_path.iterdir()) == []
    jlora.save((tmp_path / "an adapter").as_uri(), adapted)
    assert [path.name for path in tmp_path.iterdir()] == ["an adapter"]
    assert jlora.load((tmp_path / "an adapter").as_uri(), params).sites == adapted.sites
