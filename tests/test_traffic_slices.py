"""Traffic between slices: over the data-center network go the gradients of the factors, in float32, and nothing else.

The program is compiled for two slices of four v5e that are not there, in a process of its own; skipped without the
extra `plan`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.planning import DEVICES, targets
from jlora.planning.collectives import collectives
from jlora.sharding import MODELS, row_numbers
from tests.test_sharding import mesh_of

ROOT = Path(__file__).resolve().parent.parent
CHIPS = 4  # of a slice
MODEL = GPT2(GPT2Config(vocab_size=512, context=128, width=512, layers=2, heads=4, scan=True, remat=True))
TOKENS = jax.ShapeDtypeStruct((16, 128), jnp.int32)
BATCH = {"tokens": TOKENS, "labels": TOKENS}


def loss(params, batch):
    return jnp.mean(MODEL.apply({"params": params}, batch["tokens"], labels=batch["labels"]))


def adapted():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)["params"]
    return jlora.apply(shapes, rank=8, targets="attn|mlp", sites=jlora.sites(loss, shapes, BATCH))


def main() -> None:
    """Prints what the program's devices send, and in which groups."""
    import optax
    from jax.experimental import mesh_utils, topologies

    with targets.loading(DEVICES["v5e"]):
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2)
        devices = mesh_utils.create_hybrid_device_mesh((1, CHIPS), (2, 1), list(topology.devices))
        mesh = jax.sharding.Mesh(devices, ("dcn", "fsdp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
        step = jlora.train_step(loss, optax.adamw(1e-4), mesh=mesh)
        state = jlora.TrainState.create(adapted(), step.tx)
        text = step.lower(state, BATCH).compile().as_text()
    plan = jlora.plan(loss, adapted(), optax.adamw(1e-4), BATCH, {"dcn": 2, "fsdp": CHIPS}, "2xv5e:2x2", rule=MODELS)
    transfers = re.findall(r"= \((\w+)\[[\d,]*\].* (send|recv)\(.*_xla_host_transfer_handler_name=\"(\w+)\".*", text)
    found = {
        "slices": [[device.slice_index for device in row] for row in devices],
        "bytes": {kind: one.bytes for kind, one in collectives(text, CHIPS).items()},
        "transfers": sorted({*map(tuple, transfers)}),
        "what": sorted({*re.findall(r"_xla_megascale_transfer_type=\"(\w+)\"", text)}),
        "groups": sorted({*re.findall(r"replica_groups=(\{\{.*?\}\}|\[.*?\]<=\[.*?\]\S*)", text)}),
    }
    found["plan"] = [plan.devices, plan.mesh, plan.dcn, plan.roofline.dcn]
    print("FOUND", json.dumps(found))


@pytest.fixture(scope="module")
def found() -> dict:
    if not targets.has_compiler(DEVICES["v5e"]):
        pytest.skip("the compiler of v5e is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("FOUND ")[1])


@pytest.mark.once
def test_slices_exchange_the_gradients_of_the_factors_alone(found):
    """They are summed in each slice first, so that each chip sends its part of them."""
    assert found["slices"] == [[0] * CHIPS, [1] * CHIPS]
    assert found["what"] == ["ALL_REDUCE"]
    assert found["transfers"] == [["f32", kind, "xla_megascale_runtime"] for kind in ("recv", "send")]
    assert found["groups"] == ["{{0,1,2,3}}"]  # of each slice's own chips: every other collective stays in a slice
    own = 4 * jlora.count(adapted()).trainable // CHIPS
    assert own <= found["bytes"]["send"] == found["bytes"]["recv"] <= own + 1024  # and the loss
    assert found["bytes"]["all-gather"] > 50 * own  # weights, in the slices


@pytest.mark.once
def test_a_plan_of_two_slices_says_what_goes_between_them(found):
    devices, mesh, dcn, seconds = found["plan"]
    assert (devices, mesh, dcn) == (2 * CHIPS, {"dcn": 2, "fsdp": CHIPS}, found["bytes"]["recv"])
    assert seconds == pytest.approx(dcn / DEVICES["v5e"].speed.dcn)


def test_rows_are_split_over_slices_and_weights_are_not():
    """The same layout here: a batch over dcn and fsdp, every weight and factor whole over dcn."""
    mesh = mesh_of(dcn=2, fsdp=4)
    assert MODELS.rows(mesh).spec == jax.sharding.PartitionSpec(("dcn", "fsdp"))
    np.testing.assert_array_equal(row_numbers(MODELS.rows(mesh), 16), np.arange(16))
    places = jax.tree.leaves(MODELS.shardings(adapted().base, mesh))
    assert all("dcn" not in str(place.spec) for place in places)
    assert any("fsdp" in str(place.spec) for place in places)


if __name__ == "__main__":
    main()
