"""What a plan says: JSON, the table, advice where a step does not fit."""

import json
import math

import jax.numpy as jnp
import pytest

from jlora.planning import DEVICES, planned
from jlora.planning.advice import Facts, advice
from jlora.planning.collectives import Collective
from tests.test_plan import GIB, OUT, TX, adapt, loss_fn, on_cpu, plain, shape


def test_json_and_the_table():
    found = plain()
    told = json.loads(json.dumps(found.as_dict()))
    assert told["peak"] == found.peak and told["fits"] is True and told["advice"] == [] and told["collectives"] == {}
    assert {"weights", "factors", "gradients", "optimizer_state", "temporaries", "arguments", "flops", "limit", "device", "devices", "mesh"} <= set(told)  # fmt: skip
    lines = str(found).splitlines()
    assert lines[0] == "A training step on cpu (one device); per device:"
    assert lines[1] == "  weights                1.5 KiB" and lines[-1] == "It fits."
    assert f"{found.flops:.3e}" in lines[-2]


def test_a_collective_in_json():
    found = planned.dataclasses.replace(plain(), collectives={"all-gather": Collective(2, 2048, 1024)})
    assert json.loads(json.dumps(found.as_dict()))["collectives"] == {
        "all-gather": {"count": 2, "bytes": 2048, "wire": 1024, "dcn": 0}
    }
    assert "  all-gather               2 KiB  2 of them, 1 KiB received" in str(found).splitlines()


NO_FIT: dict[str, tuple[dict[str, int], Facts, list[str]]] = {
    "activations": (
        {"weights": 2, "temporaries": 40}, Facts(16, 1, False, GIB, 2 * GIB),
        ["temporaries are 40.00 GiB of 42.00 GiB: compute activations again", "train_step(accumulate=4), so that 4 rows of 16"],
    ),
    "one row": (
        {"temporaries": 40}, Facts(1, 8, True, 0, 0), ["temporaries are 40.00 GiB of 40.00 GiB for 1 rows: shorten the seq"],
    ),
    "weights": (
        {"weights": 24, "temporaries": 1}, Facts(1, 1, True, 12 * GIB, 24 * GIB),
        ["weights are 24.00 GiB of 25.00 GiB: hold the frozen base in 4 bits, jlora.quantize(params, 'nf4'), about 6.19 GiB, which is enough"],
    ),
    "codes already": (
        {"weights": 24, "temporaries": 1}, Facts(1, 1, True, GIB // 2, GIB), ["more devices: about 2 of v5e"],
    ),
    "too many weights": (
        {"weights": 100}, Facts(1, 1, True, 50 * GIB, 100 * GIB), ["about 25.79 GiB, which is 10.04 GiB short of enough"],
    ),
    "optimizer": (
        {"optimizer_state": 20, "factors": 10}, Facts(1, 1, True, 0, 0),
        ["factors and optimizer state are 30.00 GiB: offload the state, which takes 20.00 GiB off the device (memory_kind='pinned_host' of TrainState.create and jlora.plan, train.optimizer_memory=pinned_host of a config, --optimizer-memory pinned_host of jlora plan), or train less"],
    ),
    "optimizer on the host": (
        {"factors": 20, "optimizer_state_on_host": 40}, Facts(1, 1, True, 0, 0),
        ["factors are 20.00 GiB, the optimizer state is on the host already: train less (a smaller rank, fewer targets)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_FIT)
def test_advice_begins_with_the_largest_part(name: str):
    sizes, facts, expected = NO_FIT[name]
    parts = {part: n * GIB for part, n in sizes.items()}
    limit = DEVICES["v5e"].memory
    found = planned.dataclasses.replace(
        plain(), device="v5e", limit=limit, **{"weights": 0, "factors": 0, "optimizer_state": 0, **parts},
        peak=sum(n for part, n in parts.items() if not part.endswith("on_host")),
    )  # fmt: skip
    told = advice(found, facts)
    assert len(told) >= len(expected) and all(text in line for text, line in zip(expected, told, strict=False)), told
    times = 2 ** math.ceil(math.log2(found.peak / limit))
    assert (
        f"more devices: about {times} of v5e, over which weights and batch are split (mesh={{'fsdp': {times}}})" in told
    )
    larger = next((n for n in ("v4", "v6e", "7x", "v5p") if DEVICES[n].memory >= found.peak), None)
    assert (larger is None) == (told[-1].startswith("more devices"))
    assert larger is None or told[-1].startswith(f"a larger device: {larger} has ")


def test_a_step_that_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planned, "_memory_here", lambda: 10**6)
    params = {"up": shape(1000, 1000, dtype=jnp.bfloat16), "down": shape(1000, OUT, dtype=jnp.bfloat16)}
    batch = {"x": shape(4, 1000, dtype=jnp.bfloat16)}
    found = on_cpu(loss_fn, adapt(params, batch=batch), TX, batch)
    assert not found.fits and found.limit == 10**6
    assert any(text.startswith("weights are 1.92 MiB of") for text in found.advice)
    assert f"It does not fit: {(found.peak - 10**6) / 2**20:.3g} MiB too much." in str(found).splitlines()
