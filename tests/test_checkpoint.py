"""Adapters and training states on disk: what is written, what is refused, and what survives a kill."""

import errno
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save

import jlora
from jlora.checkpoint import Checkpoints, fingerprint
from jlora.checkpoint.adapter import NAME
from tests.conformance import normal, randomised

METHODS = {
    "lora": jlora.lora(2, alpha=3.0, dropout=0.25),
    "rslora": jlora.rslora(3, init="kaiming_uniform"),
    "dora": jlora.dora(jlora.rslora(2)),
}


def params(seed: int = 0) -> dict:
    return {
        "embed": {"embedding": normal(10, 6, seed=seed)},
        "up": {"kernel": normal(6, 8, seed=seed), "bias": normal(8, seed=seed)},
        "down": {"kernel": normal(8, 6, seed=seed).astype(jnp.bfloat16)},
    }


BASE = fingerprint(params(), without=["up/bias"])  # which is replaced wholly


def predict(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return h @ params["down"]["kernel"].astype(jnp.float32)


def adapter(method: str = "lora", **options) -> jlora.Adapted:
    extras = {"up/bias": None, "embedding": (1, 7)}
    return randomised(jlora.apply(params(), method=METHODS[method], extras=extras, **options))


def saved(folder: Path, **options) -> tuple[jlora.Adapted, dict, dict]:
    """An adapter on disk: itself, its JSON, its tensors."""
    adapted = adapter(**options)
    jlora.save(folder, adapted)
    record = json.loads((folder / NAME).read_text())
    return adapted, record, load_file(folder / record["tensors"]["file"])


def rewrite(folder: Path, record: dict, tensors: dict | None = None) -> None:
    """Another content under the same names, its checksum right."""
    if tensors is not None:
        content = save(tensors)
        (folder / record["tensors"]["file"]).write_bytes(content)
        record["tensors"]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / NAME).write_text(json.dumps(record))


# -- the adapter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_is_what_was_saved(method, tmp_path):
    adapted, _, _ = saved(tmp_path, method=method, ranks={"down": 1}, alphas={"up": 5.0})
    loaded = jlora.load(tmp_path, params())
    chex.assert_trees_all_equal(loaded, adapted)
    assert (loaded.method, loaded.sites, loaded.extras) == (adapted.method, adapted.sites, adapted.extras)
    assert loaded.base["up"]["kernel"].dtype == jnp.float32
    x = normal(3, 6)
    chex.assert_trees_all_equal(jlora.lift(predict)(loaded, x), jlora.lift(predict)(adapted, x))


def test_the_file_holds_the_factors_and_nothing_else(tmp_path):
    adapted, record, tensors = saved(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NAME, record["tensors"]["file"]])
    flat = {f"{path}/{name}": x for path, arrays in adapted.factors.items() for name, x in arrays.items()}
    chex.assert_trees_all_equal(tensors, jax.device_get(flat))
    assert sum(x.nbytes for x in tensors.values()) == 4 * jlora.count(adapted).trainable
    assert set(tensors) == {
        "up/kernel/A", "up/kernel/B", "down/kernel/A", "down/kernel/B", "up/bias/value", "embed/embedding/rows",
    }  # fmt: skip


def test_the_json_says_what_the_factors_are(tmp_path):
    _, record, _ = saved(tmp_path, ranks={"down": 1})
    assert {key: record[key] for key in ("format", "version", "method", "base")} == {
        "format": "jlora adapter",
        "version": 1,
        "method": {"name": "lora", "rank": 2, "alpha": 3.0, "init": "gaussian", "dropout": 0.25},
        "base": BASE,
    }
    down, up = record["sites"]
    assert (down["path"], down["rank"], down["alpha"], down["dtype"]) == ("down/kernel", 1, 3.0, "bfloat16")
    assert (up["in_axes"], up["out_axes"], up["stack_axes"], up["shape"]) == ([0], [1], [], [6, 8])
    assert record["extras"] == [{"path": "embed/embedding", "rows": [1, 7]}, {"path": "up/bias", "rows": None}]


def test_saving_again_replaces_the_adapter(tmp_path):
    adapted, record, _ = saved(tmp_path)
    changed = adapted.replace(factors=jax.tree.map(lambda x: x + 1, adapted.factors))
    jlora.save(tmp_path, changed)
    chex.assert_trees_all_equal(jlora.load(tmp_path, params()).factors, changed.factors)
    assert len(list(tmp_path.iterdir())) == 2
    assert not (tmp_path / record["tensors"]["file"]).exists()


def test_a_full_disk_leaves_the_old_adapter(tmp_path):
    """A limit on the size of files stands for the full disk: the write itself fails, half-way."""
    adapted, _, _ = saved(tmp_path)
    changed = adapted.replace(factors=jax.tree.map(lambda x: x + 1, adapted.factors))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match="saving the adapter: .*; the adapter that was there is unchanged") as caught:
            jlora.save(tmp_path, changed)
        with pytest.raises(OSError, match="saving the adapter: .*; no adapter was written"):
            jlora.save(tmp_path / "new", changed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    chex.assert_trees_all_equal(jlora.load(tmp_path, params()), adapted)
    assert len(list(tmp_path.rglob("*"))) == 3  # the old pair and the folder of the new one: nothing temporary


def test_where_no_adapter_can_be(tmp_path):
    (tmp_path / "folder" / NAME).mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("folder", "file", "file/inner", "a" * 300):
        with pytest.raises(OSError, match="^.*saving the adapter: .*; no adapter was written"):
            jlora.save(tmp_path / name, adapter("rslora"))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [NAME]
    with pytest.raises(FileNotFoundError, match="^no adapter in '.*a': there is no adapter.json$"):
        jlora.load(tmp_path / ("a" * 300), params())


def test_interrupted_before_the_last_rename_the_old_adapter_stays(tmp_path, monkeypatch):
    adapted, _, _ = saved(tmp_path)
    replace = Path.replace

    def dies(self, target):
        if Path(target).name == NAME:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        jlora.save(tmp_path, adapted.replace(factors=jax.tree.map(lambda x: x + 1, adapted.factors)))
    chex.assert_trees_all_equal(jlora.load(tmp_path, params()), adapted)


def other_shape(p):
    p["up"]["kernel"] = normal(6, 9)
    return p


def without_up(p):
    del p["up"]
    return p


def refusals():
    """name -> (what is done to the folder, what is loaded onto, the error)."""

    def record_with(**changes):
        return lambda folder, record, tensors: rewrite(folder, record | changes)

    def tensors_with(change):
        return lambda folder, record, tensors: rewrite(folder, record, change(tensors))

    def drop(tensors):
        return {name: x for name, x in tensors.items() if name != "up/kernel/B"}

    def delete(folder, record, tensors):
        (folder / record["tensors"]["file"]).unlink()

    def flip(folder, record, tensors):
        file = folder / record["tensors"]["file"]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))

    same = lambda p: p
    nothing = lambda *_: None
    return {
        "missing tensor": (tensors_with(drop), same, r"safetensors': 'up/kernel/B' is missing$"),
        "unexpected tensor": (
            tensors_with(lambda t: t | {"up/kernel/C": np.zeros(2, np.float32)}), same,
            r"safetensors': 'up/kernel/C' is unexpected$",
        ),
        "misshaped tensor": (
            tensors_with(lambda t: t | {"up/kernel/A": np.zeros((6, 2), np.float32)}), same,
            r"'up/kernel/A' is float32 of shape \(6, 2\), expected float32 of shape \(6, 1, 2\)$",
        ),
        "tensor of another type": (
            tensors_with(lambda t: t | {"up/bias/value": np.zeros(8, np.float16)}), same,
            r"'up/bias/value' is float16 of shape \(8,\), expected float32 of shape \(8,\)$",
        ),
        "not finite": (
            tensors_with(lambda t: t | {"embed/embedding/rows": np.full((2, 6), np.nan, np.float32)}), same,
            r"'embed/embedding/rows' has values that are not finite$",
        ),
        "several at once": (
            tensors_with(lambda t: drop(t) | {"x": np.zeros(1)}), same, r"'up/kernel/B' is missing; 'x' is unexpected$"
        ),
        "tensors gone": (delete, same, r"factors-\w+\.safetensors' is missing: '.*adapter.json' names it$"),
        "a flipped bit": (flip, same, r"factors-\w+\.safetensors' is damaged: it is not the file that .* \(sha256\)$"),
        "another base": (
            nothing, lambda p: jax.tree.map(lambda x: x * 2, p),
            rf"adapter.json': the adapter was trained on another base: its fingerprint is {BASE}, that of "
            r"these parameters \w{32}\. Load it onto its own base; any_base=True takes a cast or changed copy$",
        ),
        "a base of other shapes": (
            nothing, other_shape,
            r"trained on another base: 'up/kernel' has shape \(6, 9\) in the parameters and \(6, 8\) in the adapter$",
        ),
        "a base without the weight": (
            nothing, without_up, r"another base: 'up/kernel' is not among the parameters \(the closest is 'down/kernel'\); 'up",
        ),
        "unknown method": (
            record_with(method={"name": "lara", "rank": 2}), same,
            r"adapter.json': unknown method 'lara'; the nearest is 'lora' of adalora, bitfit, .*, vera. A method of y",
        ),
        "unknown option": (
            record_with(method={"name": "lora", "rank": 2, "gamma": 1}), same, r"adapter.json': method 'lora': .*'gamma'$"
        ),
        "unknown version": (
            record_with(version=2), same, r"adapter.json' has format version 2, this jlora reads version 1: update jlora$"
        ),
        "unknown format": (record_with(format="peft"), same, r"adapter.json' is no adapter of jlora: its 'format' is not"),
        "odd site": (record_with(sites=[{"path": "up/kernel", "axis": 1}]), same, r"adapter.json': .*'axis'$"),
        "no JSON": (lambda f, r, t: (f / NAME).write_text("{"), same, r"adapter.json' is no JSON: "),
        "half a JSON": (lambda f, r, t: (f / NAME).write_text('{"format": "jlora adapter", "version": 1}'), same, "lacks"),
        "no safetensors": (
            lambda f, r, t: rewrite(f, r | {"tensors": {"file": NAME + ".old", "sha256": ""}}), same, "is missing: "
        ),
    }  # fmt: skip


REFUSALS = refusals()


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_wrong_is_named_and_nothing_loaded(name, tmp_path):
    change, base, message = REFUSALS[name]
    change(tmp_path, *saved(tmp_path)[1:])
    with pytest.raises(ValueError, match=message):
        jlora.load(tmp_path, base(params()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.replace(factors=jax.tree.map(lambda x: x * jnp.nan, a.factors)), "has values that are not finite"),
        (
            lambda a: a.replace(factors=jax.tree.map(lambda x: x.astype(jnp.bfloat16), a.factors)),
            "is bfloat16 of shape",
        ),
        (lambda a: jlora.partition(a)[1], "'down/kernel/A' is missing"),
    ],
    ids=["not finite", "bfloat16", "no factors"],
)
def test_what_could_not_be_loaded_is_not_saved_over_what_can(spoil, message, tmp_path):
    good, *_ = saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        jlora.save(tmp_path, spoil(good))
    chex.assert_trees_all_equal(jlora.load(tmp_path, params()), good)


def test_files_of_others_stay(tmp_path):
    (tmp_path / "factors-mine.safetensors").write_text("mine")
    saved(tmp_path)
    jlora.save(tmp_path, adapter("rslora"))
    assert len(list(tmp_path.glob("factors-*"))) == 2 and (tmp_path / "factors-mine.safetensors").exists()


def test_a_folder_without_an_adapter(tmp_path):
    saved(tmp_path / "mine")
    with pytest.raises(
        FileNotFoundError, match=r"no adapter in '.*': there is no adapter.json; its folders 'mine' hold one"
    ):
        jlora.load(tmp_path, params())


def test_a_new_head_may_have_any_initial_values(tmp_path):
    """A leaf that an extra replaces wholly is not part of the base's fingerprint; all others are."""
    trained = randomised(jlora.apply(params(), 2, extras="up/(bias|kernel)"))
    assert {site.path for site in trained.sites} == {"down/kernel"}
    jlora.save(tmp_path, trained)
    other_head = params() | {"up": params(1)["up"]}
    chex.assert_trees_all_equal(jlora.merge(jlora.load(tmp_path, other_head)), jlora.merge(trained))
    with pytest.raises(ValueError, match="the adapter was trained on another base"):
        jlora.load(tmp_path, other_head | {"down": params(1)["down"]})


def test_a_state_is_no_adapter(tmp_path):
    with pytest.raises(
        TypeError, match=r"^save takes a folder and an Adapted \(state.adapted of a state\), got TrainState$"
    ):
        jlora.save(tmp_path, state())


def test_any_base_takes_a_changed_copy(tmp_path):
    adapted, _, _ = saved(tmp_path, method="dora")
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    loaded = jlora.load(tmp_path, cast, any_base=True)
    chex.assert_trees_all_equal(loaded.factors, adapted.factors)
    assert loaded.base["up"]["kernel"].dtype == jnp.bfloat16
    assert loaded.buffers["up/kernel"]["square"].dtype == jnp.float32


# -- the fingerprint ---------------------------------------------------------------------------------------------------


def test_fingerprints_tell_bases_apart():
    base = params()
    kernel = base["up"]["kernel"]
    changed = {
        "same": base,
        "one bit": base | {"up": base["up"] | {"kernel": kernel.at[0, 0].add(1e-7)}},
        "rows exchanged": base | {"up": base["up"] | {"kernel": kernel[::-1]}},
        "transposed": base | {"up": base["up"] | {"kernel": kernel.T}},
        "another name": {("down2" if k == "down" else k): v for k, v in base.items()},
        "another type": base | {"down": {"kernel": base["down"]["kernel"].astype(jnp.float32)}},
        "a leaf more": base | {"x": jnp.zeros(3)},
    }
    prints = {name: fingerprint(tree) for name, tree in changed.items()}
    assert len(set(prints.values())) == len(prints)
    assert prints["same"] == fingerprint(jax.device_get(base))


def test_a_fingerprint_is_that_of_all_shardings():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    x = normal(16, 8)
    there = [jax.device_put(x, NamedSharding(mesh, spec)) for spec in (P(), P("x"), P(None, "x"))]
    assert {fingerprint({"w": w}) for w in there} == {fingerprint({"w": x})}


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "int8", "uint8", "int4", "bool", "complex64", "float8_e4m3fn"]
)
def test_every_type_has_a_fingerprint(dtype):
    x = jnp.asarray([0, 1, 1, 0, 1]).astype(dtype)
    assert fingerprint({"w": x}) != fingerprint({"w": x.at[0].set(jnp.ones((), dtype))})


def test_counters_keys_and_functions_take_no_part():
    base = {"w": jnp.ones(3)}
    more = {"count": jnp.uint32(4), "key": jax.random.key(1), "fn": jnp.tanh, "none": None}
    assert fingerprint(base | more) == fingerprint(base)


# -- the training state ------------------------------------------------------------------------------------------------


def loss_fn(params, batch):
    return jnp.mean((predict(params, batch) - 1.0) ** 2)


STEP = jlora.train_step(loss_fn, optax.sgd(1e-2, momentum=0.9))


def state(method: str = "lora", seed: int = 0, step=STEP) -> jlora.TrainState:
    base = params(seed)
    return jlora.TrainState.create(jlora.apply(base, method=METHODS[method]), step.tx, key=5)


def trained(state: jlora.TrainState, steps: int) -> jlora.TrainState:
    for _ in range(steps):
        state, _ = STEP(state, normal(4, 6, seed=int(state.step)))
    return state


def test_a_restored_state_goes_on_with_the_same_bits(tmp_path):
    expected = trained(state("dora"), 7)
    with Checkpoints(tmp_path) as checkpoints:
        some = trained(state("dora"), 3)
        checkpoints.save(some, {"epoch": 1, "rows": [3, 4]})
        trained(some, 2)  # donates what is still being written
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 3
        restored, position = checkpoints.restore(state("dora"))
    assert position == {"epoch": 1, "rows": [3, 4]}
    chex.assert_trees_all_equal(trained(restored, 4), expected)


def test_the_base_is_not_written(tmp_path):
    wide = {"kernel": normal(512, 512)}
    step = jlora.train_step(lambda p, x: jnp.mean(x @ p["kernel"]), optax.sgd(0.1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(jlora.TrainState.create(jlora.apply(wide, rank=1), step.tx))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < wide["kernel"].nbytes / 10


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        some = state()
        for _ in range(4):
            some = trained(some, 1)
            checkpoints.save(some)
        checkpoints.wait()
        assert checkpoints.latest == 4
        assert int(checkpoints.restore(state(), step=3)[0].step) == 3
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 1 in"):
            checkpoints.restore(state(), step=1)
        with pytest.raises(ValueError, match="holds a checkpoint of step 4 already"):
            checkpoints.save(some)


@pytest.mark.parametrize("keep", [0, -1, True, "2", 1.5], ids=repr)
def test_at_least_one_checkpoint_is_kept(keep, tmp_path):
    """Orbax takes 0, and deletes what it has just written."""
    with pytest.raises(ValueError, match="^keep must be "):
        Checkpoints(tmp_path, keep=keep)
    Checkpoints(tmp_path, keep=None).close()  # nor was the folder taken


def test_a_checkpoint_is_of_a_state(tmp_path):
    adapted = jlora.apply({"kernel": jnp.ones((3, 2))}, 1)
    message = r"^a checkpoint holds a TrainState, got {}; jlora\.save writes an Adapted alone$"
    with Checkpoints(tmp_path) as checkpoints:
        for use in (checkpoints.save, checkpoints.restore):
            for other in (adapted, adapted.factors):
                with pytest.raises(TypeError, match=message.format(type(other).__name__)):
                    use(other)


def test_closed_checkpoints_do_not_lose_what_they_are_given(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.close()
    message = f"^these Checkpoints of '{tmp_path}' are closed: make others for the folder$"
    for use in (checkpoints.save, checkpoints.restore):
        with pytest.raises(ValueError, match=message):
            use(state())


def test_a_state_is_refused_where_it_does_not_belong(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            checkpoints.restore(state())
        checkpoints.save(trained(state(), 1))
        other = fingerprint(params(1))
        with pytest.raises(
            ValueError, match=f"belongs to another base: its fingerprint is .*, that of the state {other}"
        ):
            checkpoints.restore(state(seed=1))
        with pytest.raises(ValueError, match="belongs to another adapter: method, sites differ"):
            checkpoints.restore(state("rslora"))
        mine = state()
        checkpoints.restore(mine)
        same_base = jlora.apply(mine.adapted.base, method=jlora.lora(4))
        with pytest.raises(ValueError, match="belongs to another adapter: method, sites differ"):
            checkpoints.restore(jlora.TrainState.create(same_base, STEP.tx))
        sgd = jlora.train_step(loss_fn, optax.sgd(0.1))
        with pytest.raises(ValueError, match="checkpoint of step 1 in .* was written with another optimizer"):
            checkpoints.restore(state(step=sgd))
        # The leaves of its state are the same, weight decay has none: the moments are taken, and it is said.
        decay = jlora.train_step(loss_fn, optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1e-2, momentum=0.9)))
        with pytest.warns(UserWarning, match="checkpoint of step 1 in .* was written with another optimizer"):
            checkpoints.restore(state(step=decay))


def test_a_position_that_is_no_json_is_refused_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="^position is JSON .* int64 is not JSON serializable"):
            checkpoints.save(trained(state(), 1), {"row": np.int64(3)})
        assert checkpoints.latest is None


def test_a_state_that_is_not_finite_is_not_kept(tmp_path):
    some, _ = STEP(state(), jnp.full((4, 6), jnp.nan))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        checkpoints.save(some)


def test_shardings_are_kept(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("x",))
    place = NamedSharding(mesh, P())
    some = jax.tree.map(lambda x: jax.device_put(x, place), state())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(some)
        restored, _ = checkpoints.restore(some)
    assert {x.sharding for x in jax.tree.leaves(restored.adapted.factors)} == {place}


RUN = """
import sys
import numpy as np
import jax, jax.numpy as jnp, optax
import jlora
from jlora.checkpoint import Checkpoints

folder, out, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
rng = np.random.default_rng(0)
base = {"kernel": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32), "bias": jnp.zeros(8)}
method = jlora.lora(2, dropout=0.1)
step = jlora.train_step(lambda p, x: jnp.mean((x @ p["kernel"] + p["bias"] - 1) ** 2), optax.adam(1e-2))
state = jlora.TrainState.create(jlora.apply(base, method=method, extras="bias"), step.tx, key=3)
with Checkpoints(folder) as checkpoints:
    row = 0
    if checkpoints.latest is not None:
        state, position = checkpoints.restore(state)
        row = position["row"]
    print("started", int(state.step), flush=True)
    while int(state.step) < steps:
        batch = np.random.default_rng(row).normal(size=(4, 6)).astype(np.float32)  # the data has a position of its own
        state, _ = step(state, batch)
        row += 3
        if int(state.step) % 5 == 0:
            checkpoints.save(state, {"row": row})
            print("saved", int(state.step), flush=True)
np.savez(out, **{f"{p}/{n}": x for p, f in state.adapted.factors.items() for n, x in f.items()})
"""


@pytest.mark.thorough("test_what_is_loaded_is_what_was_saved")  # tests/test_experiment.py kills a run by default
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    """kill -9 at random moments, mostly while a checkpoint is being written, until the run has ended.

    JLORA_KILLS=seed draws the moments of a failure again.
    """
    seed = int(os.environ.get("JLORA_KILLS") or random.randrange(2**32))
    print(f"JLORA_KILLS={seed}")  # pytest shows it where the test fails
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    steps = "200"

    def start(name):
        command = [sys.executable, str(script), str(tmp_path / name), str(tmp_path / f"{name}.npz"), steps]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    with start("whole") as whole:
        whole.wait(timeout=120)
    kills, starts, rng = 0, [], random.Random(seed)
    for attempt in range(12):
        with start("cut") as run:
            assert run.stdout is not None
            starts.append(int(run.stdout.readline().split()[1]))
            if attempt < 4:
                for _ in range(rng.randint(1, 6)):
                    run.stdout.readline()
                time.sleep(rng.uniform(0, 0.03))
                run.send_signal(signal.SIGKILL)
            run.wait(timeout=120)
            kills += run.returncode == -signal.SIGKILL
            if run.returncode == 0:
                break
            assert run.returncode == -signal.SIGKILL
    assert kills >= 2 and max(starts) > 0, (kills, starts)
    expected, got = (np.load(tmp_path / f"{name}.npz") for name in ("whole", "cut"))
    assert set(got) == set(expected) == {"kernel/A", "kernel/B", "bias/value"}
    for name in expected:
        assert got[name].tobytes() == expected[name].tobytes(), name
