"""Adapters in object stores, here that of fsspec's which lies in memory: the old one or the new one is read, whole."""

import json
import re

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.checkpoint import store as stores
from jlora.checkpoint.store import Store, is_stored

PARAMS = {"kernel": jnp.ones((4, 3))}
AT = "memory://bucket/adapter"


@pytest.fixture(autouse=True)
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def adapted(seed: int = 0, rank: int = 1) -> jlora.Adapted:
    made = jlora.apply(PARAMS, rank=rank)
    draw = lambda x: jax.random.normal(jax.random.key(seed), x.shape)
    return made.replace(factors=jax.tree.map(draw, made.factors))


def names(files) -> list[str]:
    return sorted(path.rpartition("/")[2] for path in files.find("/bucket"))


def same(some, other) -> bool:
    return all(map(np.array_equal, *(jax.tree.leaves(x.factors) for x in (some, other))))


def test_an_adapter_is_read_back_bit_for_bit_and_replaced(memory):
    jlora.save(AT, adapted(0))
    first = names(memory)
    assert first[0] == "adapter.json"
    assert re.fullmatch(r"factors-[0-9a-f]{16}\.safetensors", first[1])
    assert same(jlora.load(AT + "/", PARAMS), adapted(0))
    jlora.save(AT, adapted(1))
    assert same(jlora.load(AT, PARAMS), adapted(1))
    assert len(names(memory)) == 2
    assert names(memory)[1] != first[1]


def test_a_reader_beside_a_writer_has_the_new_adapter(memory, monkeypatch):
    """The JSON was read, and the tensors that it names are gone."""
    jlora.save(AT, adapted(0))
    read, rest = Store.read, [1]

    def reading(self, name, limit, of):
        if name != "adapter.json" and rest:
            jlora.save(AT, adapted(rest.pop(), rank=2))
        return read(self, name, limit, of)

    monkeypatch.setattr(Store, "read", reading)
    assert same(jlora.load(AT, PARAMS), adapted(1, rank=2))
    assert rest == []


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("fails", ["tensors", "JSON", "answer"])
def test_a_writer_that_fails_leaves_the_old_adapter_or_the_new_one(memory, monkeypatch, fails, there):
    if there:
        jlora.save(AT, adapted(0))
    put = type(memory).pipe_file

    def failing(self, path, value, **options):
        json_ = path.endswith("adapter.json")
        if fails == "answer" or json_ != (fails == "JSON"):
            put(self, path, value, **options)
        if fails == "tensors" or json_:
            raise PermissionError("403 of the store")

    monkeypatch.setattr(type(memory), "pipe_file", failing)
    words = "the adapter that was there is unchanged" if there else "no adapter was written"
    words = "the new adapter is there" if fails == "answer" else words
    error = f"saving the adapter to '{AT}': PermissionError: 403 of the store; {words}"
    with pytest.raises(OSError, match=f"^{re.escape(error)}$"):
        jlora.save(AT, adapted(1))
    monkeypatch.undo()
    if there or fails == "answer":
        assert same(jlora.load(AT, PARAMS), adapted(1 if fails == "answer" else 0))
    else:
        assert "adapter.json" not in names(memory)


def test_a_writer_that_may_not_delete_still_writes(memory, monkeypatch):
    jlora.save(AT, adapted(0))
    monkeypatch.setattr(type(memory), "rm_file", _forbidden)
    jlora.save(AT, adapted(1))
    assert same(jlora.load(AT, PARAMS), adapted(1))
    assert len(names(memory)) == 3


def _forbidden(*_, **__):
    raise PermissionError("403")


def test_two_writers_leave_the_adapter_of_the_last(memory, monkeypatch):
    """One saves while the other is between its tensors and its JSON: none deletes what the JSON names."""
    jlora.save(AT, adapted(0))
    put, rest = type(memory).pipe_file, [1]

    def putting(self, path, value, **options):
        if path.endswith("adapter.json") and rest:
            jlora.save(AT, adapted(rest.pop()))
        put(self, path, value, **options)

    monkeypatch.setattr(type(memory), "pipe_file", putting)
    jlora.save(AT, adapted(2))
    assert same(jlora.load(AT, PARAMS), adapted(2))
    assert len(names(memory)) == 3  # the tensors of the first of the two are left


def spoil(files, content) -> None:
    """Puts other tensors in the place of those that are there, None for none."""
    (tensors,) = (path for path in files.find("/bucket") if path.endswith(".safetensors"))
    files.rm_file(tensors) if content is None else files.pipe_file(tensors, content)


def test_what_is_no_adapter(memory, monkeypatch):
    with pytest.raises(FileNotFoundError, match=f"^no adapter in '{AT}': there is no adapter.json$"):
        jlora.load(AT, PARAMS)
    jlora.save(AT, adapted())
    name = names(memory)[1]
    file = re.escape(f"{AT}/{name}")
    with pytest.raises(ValueError, match=f"^'{AT}/adapter.json': the adapter was trained on another base: its finger"):
        jlora.load(AT, {"kernel": jnp.zeros((4, 3))})
    spoil(memory, b"x" * 100)
    with pytest.raises(ValueError, match=f"^'{file}' is damaged: it is not the file that '{AT}/adapter.json' was "):
        jlora.load(AT, PARAMS)
    spoil(memory, b"x" * 10**6)
    given, cat = [], type(memory).cat_file
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "cat_file", lambda *a, **k: given.append(len(cat(*a, **k))) or cat(*a, **k))
        with pytest.raises(
            ValueError, match=rf"^'{file}' has more than (\d+) bytes, and the tensors .* take at most \1$"
        ):
            jlora.load(AT, PARAMS)
    assert max(given) < 10**5  # no more is read than that
    spoil(memory, None)
    with pytest.raises(ValueError, match=f"^'{file}' is missing: '{AT}/adapter.json' names it$"):
        jlora.load(AT, PARAMS)
    memory.pipe_file("/bucket/adapter/adapter.json", json.dumps({"format": "?"}).encode())
    with pytest.raises(ValueError, match=f"^'{AT}/adapter.json' is no adapter of jlora: its 'format' is not "):
        jlora.load(AT, PARAMS)
    jlora.save(AT, adapted())  # in its place
    assert same(jlora.load(AT, PARAMS), adapted())


def test_a_store_that_does_not_answer(memory, monkeypatch):
    jlora.save(AT, adapted())
    monkeypatch.setattr(type(memory), "cat_file", _forbidden)
    with pytest.raises(OSError, match=f"^'{AT}/adapter.json' cannot be read: PermissionError: 403$"):
        jlora.load(AT, PARAMS)


@pytest.mark.parametrize(("address", "package"), [("gs://bucket/a", "gcsfs"), ("s3://bucket/a", "s3fs")])
def test_a_package_that_is_missing(monkeypatch, address, package):
    def absent(address):
        raise ImportError(f"install {package}")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    error = (
        f"'{address}' lies in an object store, for which jlora needs the package {package}: pip install 'jlora[remote]'"
    )
    for act in (lambda: jlora.save(address, adapted()), lambda: jlora.load(address, PARAMS)):
        with pytest.raises(ImportError, match=f"^{re.escape(error)}$"):
            act()


def test_which_addresses_are_those_of_stores():
    assert all(map(is_stored, ["gs://b/a", "GS://b", "gcs://b/a", "s3://b/a", "s3a://b", "memory://b"]))
    assert not any(map(is_stored, ["gs:/b", "gs://", "runs/gs://b", "hf://o/n", "http://b", "/a", "", None, 3]))
    assert set(stores._PACKAGES) == {"gs", "gcs", "s3", "s3a", "memory"}
