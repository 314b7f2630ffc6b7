"""Adapters and checkpoints in object stores, here in fsspec's that lies in memory: each is there whole or not at all."""

import dataclasses
import json
import re

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.checkpoint import Checkpoints, DamagedCheckpoint
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
    acts = lambda: jlora.save(address, adapted()), lambda: jlora.load(address, PARAMS), lambda: Checkpoints(address)
    for act in acts:
        with pytest.raises(ImportError, match=f"^{re.escape(error)}$"):
            act()


def test_which_addresses_are_those_of_stores():
    assert all(map(is_stored, ["gs://b/a", "GS://b", "gcs://b/a", "s3://b/a", "s3a://b", "memory://b"]))
    assert not any(map(is_stored, ["gs:/b", "gs://", "runs/gs://b", "hf://o/n", "http://b", "/a", "", None, 3]))
    assert set(stores._PACKAGES) == {"gs", "gcs", "s3", "s3a", "memory"}


# -- checkpoints -------------------------------------------------------------------------------------------------------

STEP = jlora.train_step(
    lambda params, x: jnp.mean((x @ params["kernel"] - 1) ** 2), optax.adam(0.1, mu_dtype=jnp.bfloat16)
)


def start(params=PARAMS, rank: int = 1) -> jlora.TrainState:
    return jlora.TrainState.create(jlora.apply(params, rank=rank, key=0), STEP.tx, key=5)


def after(state: jlora.TrainState, steps: int) -> jlora.TrainState:
    """With copies of what a step donates."""
    state = jax.tree.map(lambda x: x, dataclasses.replace(state))
    for _ in range(steps):
        arrays, rest = jax.tree.flatten(state)
        state, _ = STEP(jax.tree.unflatten(rest, [jnp.copy(x) for x in arrays]), jnp.ones((2, 4)))
    return state


def bits(state: jlora.TrainState) -> list[bytes]:
    """All that a checkpoint holds."""
    parts = (
        state.adapted.factors,
        state.opt_state,
        state.step,
        jax.random.key_data(state.key),
        state.loss,
        state.skipped,
    )
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(parts)]


@pytest.mark.loose_promotion  # of Optax
def test_a_run_goes_on_from_a_store(memory):
    one, two, three = (after(start(), steps) for steps in (1, 2, 3))
    with Checkpoints("memory://bucket/run", keep=2) as checkpoints:
        assert checkpoints.latest is None
        with pytest.raises(FileNotFoundError, match="^no checkpoint in 'memory://bucket/run'$"):
            checkpoints.restore(start())
        for state in (one, two, three):
            checkpoints.save(state, {"row": int(state.step)})
        checkpoints.wait()
        assert [name for name in names(memory) if name.endswith(".json")] == ["2.json", "3.json"]
        assert len(names(memory)) == 4
        restored, position = checkpoints.restore(two)
        assert (bits(restored), position, checkpoints.latest) == (bits(three), {"row": 3}, 3)
        with pytest.raises(ValueError, match="^'memory://bucket/run' holds a checkpoint of step 3 already$"):
            checkpoints.save(three)
    with Checkpoints("memory://bucket/run") as checkpoints:
        restored, _ = checkpoints.restore(start(), 2)
        assert bits(restored) == bits(two)
        assert bits(after(checkpoints.restore(start())[0], 1)) == bits(after(three, 1))
        with pytest.raises(ValueError, match="^the checkpoint in 'memory://bucket/run' belongs to another base: its "):
            checkpoints.restore(start({"kernel": jnp.zeros((4, 3))}))
        with pytest.raises(ValueError, match="^the checkpoint in 'memory://bucket/run' belongs to another adapter: "):
            checkpoints.restore(start(rank=2))


@pytest.mark.loose_promotion
@pytest.mark.parametrize(
    ("which", "content", "wrong"),
    [
        (".bin", None, "'FILE' is missing"),
        (".bin", b"", r"'FILE' has 0 of \d+ bytes"),
        (".bin", b"x" * 10**4, r"'memory://bucket/run/FILE' has more than \d+ bytes, and its record says at most \d+"),
        (".bin", "turned", r"'FILE' has other bytes than were written \(sha256\)"),
        (".json", b"{}", "'FILE' is not what was written"),
        (".json", b"[1", "'FILE' is not what was written"),
    ],
)
def test_a_damaged_checkpoint_in_a_store(memory, which, content, wrong):
    one, two = after(start(), 1), after(start(), 2)
    with Checkpoints("memory://bucket/run") as checkpoints:
        checkpoints.save(one)
        checkpoints.wait()
        before = {*memory.find("/bucket")}
        checkpoints.save(two)
        checkpoints.wait()
        (spoilt,) = (path for path in {*memory.find("/bucket")} - before if path.endswith(which))
        if content == "turned":
            content = memory.cat_file(spoilt)[::-1]
        memory.rm_file(spoilt) if content is None else memory.pipe_file(spoilt, content)
        error = f"the checkpoint of step 2 in 'memory://bucket/run' is damaged: {wrong}; restore(state, step=1) takes the one before it"
        error = error.replace("FILE", spoilt.rpartition("/")[2]).replace("(state, step=1)", r"\(state, step=1\)")
        with pytest.raises(DamagedCheckpoint, match=f"^{error}$"):
            checkpoints.restore(one)
        state, _ = checkpoints.restore(one, 1)
        checkpoints.save(after(state, 1), "in its place")
        assert (bits(checkpoints.restore(one)[0]), checkpoints.restore(one)[1]) == (bits(two), "in its place")


@pytest.mark.loose_promotion
@pytest.mark.parametrize("fails", [".bin", ".json"])
def test_a_checkpoint_that_the_store_does_not_take(memory, monkeypatch, fails):
    one, two = after(start(), 1), after(start(), 2)
    put = type(memory).pipe_file
    with Checkpoints("memory://bucket/run", keep=1) as checkpoints:
        checkpoints.save(one)
        checkpoints.wait()
        fail = lambda self, path, *rest: _forbidden() if path.endswith(fails) else put(self, path, *rest)
        monkeypatch.setattr(type(memory), "pipe_file", fail)
        checkpoints.save(two)
        with pytest.raises(
            OSError, match=rf"^'memory://bucket/run/\S+{fails}' cannot be written: PermissionError: 403$"
        ):
            checkpoints.wait()
        assert checkpoints.latest == 1  # and nothing of it was deleted
        assert bits(checkpoints.restore(two)[0]) == bits(one)
        monkeypatch.undo()
        checkpoints.save(two)
        assert bits(checkpoints.restore(one)[0]) == bits(two)
