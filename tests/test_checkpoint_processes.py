"""Checkpoints and adapters of several real processes: bits, errors that all of them raise, and no process that waits.

One pair of processes makes all checks, each in a row of `CHECKS`: to start them takes longer than the checks.
"""

import dataclasses
import faulthandler
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType

import jlora
from experiments.launch.local import free_port
from jlora.checkpoint import Checkpoints, adapter, fingerprint, on_disk, seal, steps
from jlora.checkpoint.lock import Lock
from jlora.checkpoint.processes import of_first, together, whole
from jlora.sharding import MODELS, put, put_rows, row_numbers

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)
BASE = {
    "mlp": {
        "fc": {"kernel": RNG.normal(size=(8, 16)).astype("f")},
        "proj": {"kernel": RNG.normal(size=(16, 8)).astype("f")},
    }
}
ROWS = RNG.normal(size=(8, 8)).astype("f")


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["mlp"]["fc"]["kernel"]) @ params["mlp"]["proj"]["kernel"] - 1) ** 2)


def mesh_of(kind=AxisType.Auto, **axes):
    count = int(np.prod([*axes.values()]))
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes), devices=jax.devices()[:count]
    )


def quantised():
    weight = np.sin(np.arange(4096.0, dtype="f")).reshape(64, 64)
    return jlora.quantize({"mlp": {"fc": {"kernel": weight}}}, "nf4", block=32, double=False)


STEP = jlora.train_step(loss, optax.adam(1e-2), donate=False)


def start(mesh=None, base=BASE, rank=2):
    """The state before the first step."""
    placed = base if mesh is None else put(base, MODELS.shardings(base, mesh))
    return jlora.TrainState.create(jlora.apply(placed, rank=rank, key=0), STEP.tx)


def after(state, mesh, count=1):
    place = MODELS.rows(mesh)
    for _ in range(count):
        state, _ = STEP(state, put_rows(ROWS[row_numbers(place, len(ROWS))], place))
    return state


def digest(state) -> str:
    """All that a checkpoint holds of a state, bit for bit."""
    parts = (state.adapted.factors, state.opt_state, state.step, jax.random.key_data(state.key), state.loss)
    return hashlib.sha256(b"".join(whole(x).tobytes() for x in jax.tree.leaves(parts))).hexdigest()


def specs(state) -> list:
    return [str(x.sharding.spec) for x in jax.tree.leaves(state.adapted.factors)]


def raised(act) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# -- what each of the two processes does -------------------------------------------------------------------------------


@functools.cache
def over():
    """The mesh of all checks, "tp" over the processes: each step and each start on another is compiled anew."""
    return mesh_of(tp=2, fsdp=2)


@functools.cache
def trained(count):
    return after(trained(count - 1), over()) if count else start(over())


def restored(folder: Path) -> dict:
    """Onto the processes, from one; on, and on the disk again."""
    mesh = over()
    with Checkpoints(folder / "one") as checkpoints:
        state, position = checkpoints.restore(trained(0))  # whose arrays each process has for itself
        found = {"latest": checkpoints.latest, "position": position, "restored": digest(state)}
    found["kept"] = all(x.is_fully_addressable for x in jax.tree.leaves((state.adapted.factors, state.opt_state)))
    state = after(state, mesh)
    found |= {"specs": specs(state), "fingerprint": fingerprint(state.adapted.base), "trained": digest(state)}
    found["quantised"] = fingerprint(put(quantised(), MODELS.shardings(quantised(), mesh)))
    with Checkpoints(folder / "two") as checkpoints:
        checkpoints.save(trained(0), "start")
        checkpoints.save(state, "on")
        checkpoints.wait()
        again, _ = checkpoints.restore(state)
        found |= {"again": digest(again), "placed": specs(again)}
        explicit = start(mesh_of(AxisType.Explicit, fsdp=4))
        found["explicit"] = digest(checkpoints.restore(explicit)[0])
    return found


def saved(folder: Path) -> dict:
    state = trained(1)
    spread = [not x.is_fully_replicated for x in jax.tree.leaves(state.adapted.factors)]
    jlora.save(folder / "adapter", state.adapted)
    names = sorted(path.name for path in (folder / "adapter").iterdir())
    loaded = jlora.load(folder / "adapter", state.adapted.base)
    jlora.save("memory://adapter", state.adapted)  # whose memory is that of each process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "_LOOKS", 2)
        mine = folder / ("of another host" if jax.process_index() == 1 else "adapter")
        unseen = raised(lambda: jlora.load(mine, state.adapted.base))
    return {
        "spread": any(spread),
        "names": names,
        "same": digest(state) == digest(dataclasses.replace(state, adapted=loaded)),
        "trained": specs(after(jlora.TrainState.create(loaded, STEP.tx), over())) == specs(state),
        "merged": [float(jnp.sum(x)) for x in jax.tree.leaves(jlora.merge(loaded))],
        "in the way": raised(lambda: jlora.save(folder / "file", state.adapted)),
        "elsewhere": raised(lambda: jlora.load(folder / "nothing", state.adapted.base)),
        "unseen": unseen,
        "objects": len(fsspec.filesystem("memory").find("/adapter")) == (2 if jax.process_index() == 0 else 0),
        "unseen object": raised(lambda: jlora.load("memory://adapter", state.adapted.base)),
    }


def wrong(folder: Path) -> dict:
    state = trained(1)
    found = {
        "in the way": raised(lambda: Checkpoints(folder / "file")),
        "in use": raised(lambda: Checkpoints(folder / "used")),
    }
    on_disk.PATIENCE = 0.0
    found["own folders"] = raised(lambda: Checkpoints(folder / f"of {int(jax.process_index() == 1)}"))
    on_disk.PATIENCE = 60.0
    with Checkpoints(folder / "one") as checkpoints:
        other = jax.tree.map(lambda x: x + 1, BASE)
        found["nothing there"] = raised(lambda: checkpoints.restore(state, 17))
        found["there already"] = raised(lambda: checkpoints.save(trained(3)))
        found["later ones"] = raised(lambda: checkpoints.save(state))
        found["another base"] = raised(lambda: checkpoints.restore(start(over(), other)))
        found["another adapter"] = raised(lambda: checkpoints.restore(start(over(), rank=3)))
        own = trained(4), trained(5)
        found["another step"] = raised(lambda: checkpoints.save(own[jax.process_index() == 1]))
        other = start(rank=2 + (jax.process_index() == 1))
        other = dataclasses.replace(other, step=own[0].step)
        found["own adapters"] = raised(lambda: checkpoints.save(other))
    with Checkpoints(folder / "damaged") as checkpoints:
        found["damaged"] = raised(lambda: checkpoints.restore(trained(0)))
        checkpoints.save(trained(3), "in its place")
    return found


def full(folder: Path) -> dict:
    """Disks that are full where a process writes its part, and where the first one makes a checkpoint of them."""
    first, found, begin = jax.process_index() == 0, {}, time.monotonic()

    class Full:
        def result(self, timeout=None):
            raise OSError(28, "No space left on device")

    async def write(self, *args, write=ocp.StandardCheckpointHandler.async_save, **options):
        return [*await write(self, *args, **options), Full()]

    with Checkpoints(folder / "full") as checkpoints:
        checkpoints.save(trained(1))
        checkpoints.wait()
        with pytest.MonkeyPatch.context() as patch:
            if jax.process_index() == 1:
                patch.setattr(ocp.StandardCheckpointHandler, "async_save", write)
            checkpoints.save(trained(2))
            found["part"] = raised(checkpoints.wait)
        found["left"] = checkpoints.latest
        with pytest.MonkeyPatch.context() as patch:
            if first:
                patch.setattr(seal, "seal", lambda folder: Full().result())
            checkpoints.save(trained(2))
            found["whole"] = raised(checkpoints.wait)
        found["soon"] = time.monotonic() - begin < 60
        checkpoints.save(trained(3))
        found["in the end"] = digest(checkpoints.restore(trained(0))[0]) == digest(trained(3))
    return found | {"steps": steps.found(folder / "full")}


def stored(folder: Path) -> dict:
    """An object store that all processes see, as files of a folder."""
    state = trained(1)

    def deny(self, path, *rest):
        raise PermissionError("403")

    with pytest.MonkeyPatch.context() as patch:
        files = fsspec.filesystem("file", auto_mkdir=True)
        patch.setattr("fsspec.core.url_to_fs", lambda address: (files, str(folder / address.partition("://")[2])))
        jlora.save("gs://bucket/adapter", state.adapted)
        loaded = jlora.load("gs://bucket/adapter", state.adapted.base)
        found = {"adapter": digest(dataclasses.replace(state, adapted=loaded)) == digest(state)}
        with Checkpoints("gs://bucket/run", keep=1) as checkpoints:
            checkpoints.save(trained(0), "start")
            checkpoints.save(state, "on")
            again, position = checkpoints.restore(trained(0))
            found |= {"restored": digest(again) == digest(state), "position": position}
            found["placed"] = digest(checkpoints.restore(state)[0]) == digest(state)
            with pytest.MonkeyPatch.context() as denied:
                denied.setattr(type(files), "pipe_file", deny)
                checkpoints.save(trained(2))
                found["denied"] = raised(checkpoints.wait).replace(str(folder), "")
            found["latest"] = checkpoints.latest
    found["objects"] = sorted(path.suffix for path in (folder / "bucket").glob("*/*"))
    return found | {"digest": digest(state)}


def agreed(folder: Path) -> dict:
    process = jax.process_index()

    def fail():
        with together():
            if process == 1:
                raise FileNotFoundError(2, "No such file", "x")

    def local():
        class Odd(Exception):
            pass

        with together():
            if process == 1:
                raise Odd("of its own")

    found = {"value": of_first(lambda: {"of": process, "long": "x" * 3000})["of"], "raised": raised(fail)}
    return found | {"odd": raised(local).rpartition(": ")[2], "first": raised(lambda: of_first(lambda: 1 // process))}


CHECKS = {check.__name__: check for check in (agreed, restored, saved, wrong, full, stored)}


def main(process: int, processes: int, port: int, folder: str) -> None:
    """One of the processes: prints what it found, by check."""
    faulthandler.dump_traceback_later(250, exit=True)
    warnings.simplefilter("error", UserWarning)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    found = {}
    for name, check in CHECKS.items():
        begin = time.monotonic()
        found[name] = check(Path(folder))
        print(f"{name}: {time.monotonic() - begin:.1f} s", file=sys.stderr)
    print("FOUND", json.dumps(found), flush=True)


# -- and what one process has beside them ------------------------------------------------------------------------------


@pytest.mark.loose_promotion  # of Optax
def test_two_processes(tmp_path):
    check(tmp_path, 2)


@pytest.mark.loose_promotion
@pytest.mark.thorough("test_two_processes")
def test_four_processes(tmp_path):
    check(tmp_path, 4)


def check(folder: Path, processes: int) -> None:
    mesh = mesh_of(fsdp=2, tp=2)
    one = after(start(mesh), mesh, 3)
    for name in ("one", "damaged"):
        with Checkpoints(folder / name) as checkpoints:
            checkpoints.save(one, {"row": 7})
    spoilt = next((folder / "damaged" / "3" / "state" / "d").iterdir())
    size = spoilt.stat().st_size
    spoilt.write_bytes(b"x")
    (folder / "file").touch()
    with Lock(folder / "used"):
        first, *others = started(folder, processes)

    assert first["agreed"] == {
        "value": 0,
        "raised": "FileNotFoundError: [Errno 2] No such file: 'x'",
        "odd": "of its own",
        "first": "ZeroDivisionError: integer division or modulo by zero",
    }
    # Onto other processes and another layout, and back onto other devices: with the same bits.
    found = first["restored"]
    assert (found["latest"], found["position"], found["restored"]) == (3, {"row": 7}, digest(one))
    assert found["kept"]
    assert (found["fingerprint"], found["quantised"]) == (fingerprint(BASE), fingerprint(quantised()))
    assert list((folder / "two").glob(".*")) == []
    assert "P(None, 'tp')" in found["specs"] == found["placed"]
    assert found["trained"] == found["again"] == found["explicit"] != found["restored"]
    for mesh in (mesh_of(fsdp=2), mesh_of(tp=4), None):
        with Checkpoints(folder / "two") as checkpoints:
            state, position = checkpoints.restore(start(mesh))
            assert (digest(state), position) == (found["trained"], "on")
            state, position = checkpoints.restore(start(mesh), 0)
            assert (digest(state), position) == (digest(start()), "start")

    found = first["saved"]
    loaded = jlora.load(folder / "adapter", BASE)
    sums = [float(jnp.sum(x)) for x in jax.tree.leaves(jlora.merge(loaded))]
    np.testing.assert_allclose(found["merged"], sums, rtol=1e-5)  # sums of 128 float32, in another order
    (tensors,) = (path.name for path in (folder / "adapter").glob("factors*"))
    assert found == {
        "spread": True,
        "names": ["adapter.json", tensors],
        "same": True,
        "trained": True,
        "merged": found["merged"],
        "in the way": f"FileExistsError: [Errno 17] saving the adapter: File exists; no adapter was written: '{folder}/file'",
        "elsewhere": f"FileNotFoundError: no adapter in '{folder}/nothing': there is no adapter.json",
        "unseen": f"FileNotFoundError: process 1 does not find '{folder}/of another host/{tensors}', which process 0 does: "
        "several processes load an adapter from a folder that all of them see",
        "objects": True,
        "unseen object": found["unseen object"],
    }
    assert re.fullmatch(
        r"ValueError: 'memory://adapter/factors-\w+.safetensors' is missing: 'memory://adapter/adapter.json' names it",
        found["unseen object"],
    )

    found = first["wrong"]
    assert found["in use"].startswith(f"ValueError: '{folder}/used' is in use by process {os.getpid()} on ")
    at = f"the checkpoint in '{folder}/one' belongs to another"
    other = jax.tree.map(lambda x: x + 1, BASE)
    assert found == {
        "in the way": f"FileExistsError: [Errno 17] File exists: '{folder}/file'",
        "in use": found["in use"],
        "own folders": f"ValueError: '{folder}/of 1' is another folder in process 1 than in process 0: several processes keep "
        "their checkpoints in one that all of them see, such as a network's",
        "nothing there": f"FileNotFoundError: no checkpoint of step 17 in '{folder}/one'",
        "there already": f"ValueError: '{folder}/one' holds a checkpoint of step 3 already",
        "later ones": f"ValueError: '{folder}/one' holds a checkpoint of step 3, which would still be the newest after this "
        "one of step 1: keep this run in another folder, or delete the later ones",
        "another base": f"ValueError: {at} base: its fingerprint is {fingerprint(BASE)}, that of the state {fingerprint(other)}",
        "another adapter": f"ValueError: {at} adapter: method, sites differ (method.rank is 2 in the checkpoint and 3 in the state)",
        "another step": "ValueError: process 1 saves the state of step 5, and process 0 that of step 4: all save the same one",
        "own adapters": "ValueError: process 1 trains another adapter than process 0, or another base: it was started with "
        "another config, or another version of the code",
        "damaged": f"DamagedCheckpoint: the checkpoint of step 3 in '{folder}/damaged' is damaged: 'state/d/{spoilt.name}' has "
        f"1 of {size} bytes; there is none before it that is whole",
    }
    with Checkpoints(folder / "damaged") as checkpoints:
        assert checkpoints.restore(start())[1] == "in its place"

    whole_disk = "OSError: [Errno 28] No space left on device"
    of_part = f"OSError: the checkpoint of step 2 was not written: process 1 could not write its part: {whole_disk[9:]}"
    assert first["full"] == {
        "part": of_part,
        "left": 1,
        "whole": whole_disk,
        "soon": True,
        "in the end": True,
        "steps": [1, 3],
    }
    found = first["stored"]
    words = r"OSError: 'gs://bucket/run/state-\w+.bin' cannot be written: PermissionError: 403"
    assert re.fullmatch(words, found["denied"])
    assert found == {
        "adapter": True, "restored": True, "placed": True, "position": "on", "latest": 1, "denied": found["denied"],
        "objects": [".bin", ".json", ".json", ".safetensors"], "digest": found["digest"],
    }  # fmt: skip
    for second in others:  # the same errors in all, but for the one whose disk was full
        own = {"part": whole_disk} if second is others[0] else {}
        assert second == first | {"full": first["full"] | own}


def started(folder: Path, processes: int) -> list[dict]:
    """What each of so many processes found."""
    flags = f"--xla_force_host_platform_device_count={4 // processes}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, (process, processes, port, folder))],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for process in range(processes)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, err) in zip(running, ended, strict=True):
        assert process.returncode == 0, err
    return [json.loads(out.split("FOUND ")[1].splitlines()[0]) for out, _ in ended]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
