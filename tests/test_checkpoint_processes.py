"""Checkpoints and adapters of several real processes: bits, errors that all of them raise, and no process that waits.

One pair of processes makes all checks, each in a row of `CHECKS`: to start them takes longer than the checks.
"""

import faulthandler
import hashlib
import json
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType

import jlora
from jlora.checkpoint import Checkpoints, fingerprint, run, seal, steps
from jlora.checkpoint.processes import of_first, together, whole
from jlora.sharding import MODELS, put, put_rows, row_numbers

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


def restored(folder: Path) -> dict:
    """Onto the processes, from one; on, and on the disk again."""
    mesh = mesh_of(tp=2, fsdp=2)  # "tp" over the processes
    with Checkpoints(folder / "one") as checkpoints:
        state, position = checkpoints.restore(start(mesh))  # whose arrays each process has for itself
        found = {"latest": checkpoints.latest, "position": position, "restored": digest(state)}
    state = after(state, mesh)
    found |= {"specs": specs(state), "fingerprint": fingerprint(state.adapted.base), "trained": digest(state)}
    with Checkpoints(folder / "two") as checkpoints:
        checkpoints.save(start(mesh_of(data=4)), "start")
        checkpoints.save(state, "on")
        checkpoints.wait()
        again, _ = checkpoints.restore(state)
        found |= {"again": digest(again), "placed": specs(again)}
        explicit = start(mesh_of(AxisType.Explicit, fsdp=4))
        found["explicit"] = digest(checkpoints.restore(explicit)[0])
    return found


def saved(folder: Path) -> dict:
    mesh = mesh_of(tp=2, fsdp=2)
    state = after(start(mesh), mesh)
    spread = [not x.is_fully_replicated for x in jax.tree.leaves(state.adapted.factors)]
    jlora.save(folder / "adapter", state.adapted)
    names = sorted(path.name for path in (folder / "adapter").iterdir())
    loaded = jlora.load(folder / "adapter", state.adapted.base)
    return {
        "spread": any(spread),
        "names": names,
        "same": digest(state) == digest(jlora.TrainState(loaded, state.opt_state, state.step, state.key, state.loss)),
        "trained": digest(after(jlora.TrainState.create(loaded, STEP.tx), mesh)),
        "merged": [float(x.sum()) for x in jax.tree.leaves(jlora.merge(loaded))],
        "in the way": raised(lambda: jlora.save(folder / "file", state.adapted)),
        "elsewhere": raised(lambda: jlora.load(folder / "nothing", state.adapted.base)),
    }


def wrong(folder: Path) -> dict:
    mesh = mesh_of(fsdp=4)
    state = after(start(mesh), mesh)
    first = jax.process_index() == 0
    found = {
        "in the way": raised(lambda: Checkpoints(folder / "file")),
        "in use": raised(lambda: Checkpoints(folder / "used")),
    }
    run.PATIENCE = 0.0
    found["own folders"] = raised(lambda: Checkpoints(folder / f"of {jax.process_index()}"))
    run.PATIENCE = 60.0
    with Checkpoints(folder / "one") as checkpoints:
        other = jax.tree.map(lambda x: x + 1, BASE)
        found["nothing there"] = raised(lambda: checkpoints.restore(state, 17))
        found["there already"] = raised(lambda: checkpoints.save(after(start(mesh), mesh, 3)))
        found["later ones"] = raised(lambda: checkpoints.save(state))
        found["another base"] = raised(lambda: checkpoints.restore(start(mesh, other)))
        found["another adapter"] = raised(lambda: checkpoints.restore(start(mesh, rank=3)))
    with Checkpoints(folder / "damaged") as checkpoints:
        found["damaged"] = raised(lambda: checkpoints.restore(start(mesh)))
        checkpoints.save(after(state, mesh, 2), "in its place")
    return found


def full(folder: Path) -> dict:
    """Disks that are full where a process writes its part, and where the first one makes a checkpoint of them."""
    mesh, first = mesh_of(fsdp=4), jax.process_index() == 0
    state, found, begin = after(start(mesh), mesh), {}, time.monotonic()

    class Full:
        def result(self, timeout=None):
            raise OSError(28, "No space left on device")

    async def write(self, *args, write=ocp.StandardCheckpointHandler.async_save, **options):
        return [*await write(self, *args, **options), Full()]

    with Checkpoints(folder / "full") as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        with pytest.MonkeyPatch.context() as patch:
            if not first:
                patch.setattr(ocp.StandardCheckpointHandler, "async_save", write)
            checkpoints.save(after(state, mesh))
            found["part"] = raised(checkpoints.wait)
        found["left"] = checkpoints.latest
        with pytest.MonkeyPatch.context() as patch:
            if first:
                patch.setattr(seal, "seal", lambda folder: Full().result())
            checkpoints.save(after(state, mesh))
            found["whole"] = raised(checkpoints.wait)
        found["soon"] = time.monotonic() - begin < 60
        checkpoints.save(after(state, mesh, 2))
        found["in the end"] = digest(checkpoints.restore(start(mesh))[0]) == digest(after(state, mesh, 2))
    return found | {"steps": steps.found(folder / "full")}


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
    return found | {"odd": raised(local).rpartition("Odd")[2], "first": raised(lambda: of_first(lambda: 1 // process))}


CHECKS = {check.__name__: check for check in (agreed, restored, saved, wrong, full)}


def main(process: int, processes: int, port: int, folder: str) -> None:
    """One of the processes: prints what it found, by check."""
    faulthandler.dump_traceback_later(100, exit=True)
    warnings.simplefilter("error", UserWarning)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    seconds = {}
    found = {}
    for name, check in CHECKS.items():
        begin = time.monotonic()
        found[name] = check(Path(folder))
        print(name, found[name], file=sys.stderr, flush=True)
        seconds[name] = round(time.monotonic() - begin, 1)
    print(seconds, file=sys.stderr)
    print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
