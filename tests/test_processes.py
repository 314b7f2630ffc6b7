"""Several real processes on this machine, as the hosts of a pod: `jax.distributed` over loopback, CPU collectives.

Each has some of four devices. The numbers are those of one process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from experiments.launch.local import free_port
from jlora.sharding import MODELS, row_numbers
from tests import test_sharding as one

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
MESHES = {
    "rows over processes": ({"fsdp": 2, "tp": 2}, AxisType.Auto),
    "tensor parallel over processes": ({"tp": 2, "fsdp": 2}, AxisType.Explicit),
    "tokens over processes": ({"sequence": 2, "data": 2}, AxisType.Auto),
}


def numbers(mesh) -> dict:
    """Losses, and the norms of all factors, of a run in this process or of this process's part."""
    rows = one.TOKENS[row_numbers(MODELS.rows(mesh), len(one.TOKENS))]
    losses, state = one.trained(rows, STEPS, mesh=mesh)
    norms = jax.jit(lambda factors: [jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(factors)])(state.adapted.factors)
    return {"losses": losses, "norms": [float(x) for x in norms], "rows": len(rows)}


def main(process: int, processes: int, port: int) -> None:
    """One of the processes: prints what it has, by mesh."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    found = {name: numbers(one.mesh_of(kind, **axes)) for name, (axes, kind) in MESHES.items()}
    try:
        one.trained(mesh=None, base=one.placed(one.mesh_of(data=4)))
    except ValueError as error:
        found["unplaced"] = str(error)
    print("FOUND", json.dumps(found), flush=True)


@pytest.mark.loose_promotion  # of Optax
def test_two_processes_have_the_numbers_of_one():
    check(2)


@pytest.mark.loose_promotion
@pytest.mark.thorough("test_two_processes_have_the_numbers_of_one")
def test_four_processes_have_the_numbers_of_one():
    check(4)


def check(processes: int) -> None:
    port = free_port()
    flags = f"--xla_force_host_platform_device_count={4 // processes}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    start = lambda process: subprocess.Popen(
        [sys.executable, __file__, *map(str, (process, processes, port))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    started = [start(process) for process in range(processes)]
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    found = []
    for process, (out, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, err
        found.append(json.loads(out.split("FOUND ")[1]))
    for name, (axes, kind) in MESHES.items():
        alone = numbers(one.mesh_of(kind, **axes))
        for mine in found:
            np.testing.assert_allclose(mine[name]["losses"], alone["losses"], rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(mine[name]["norms"], alone["norms"], rtol=1e-4, err_msg=name)
    assert [mine["rows over processes"]["rows"] for mine in found] == [4] * processes
    assert [mine["tokens over processes"]["rows"] for mine in found] == [8 if processes == 2 else 4] * processes
    whole = 8 if processes == 2 else 4
    assert [mine["tensor parallel over processes"]["rows"] for mine in found] == [whole] * processes
    assert {mine["unplaced"] for mine in found} == {
        f"batch does not say where its rows lie, and the base lies over {processes} processes: "
        "jlora.sharding.put_rows(batch, layout.rows(mesh)) makes a batch of the rows that each process has"
    }


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
