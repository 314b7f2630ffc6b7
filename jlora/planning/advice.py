"""Changes that help where a step does not fit, chosen from the part that is largest."""

import math
from typing import NamedTuple

from jlora.planning.devices import DEVICES
from jlora.planning.report import Plan, size

_NF4 = 4.127 / 8  # bytes a parameter: codes, and scales quantised again


class Facts(NamedTuple):
    """Facts of a step beside its sizes.

    Attributes:
      rows: of the batch that are computed at a time, on all devices.
      accumulate: micro-batches of a step.
      remat: whether something is computed again in the backward pass.
      dense: parameters of the base per device that are stored as plain floats, of matrices.
      dense_bytes: theirs.
    """

    rows: int
    accumulate: int
    remat: bool
    dense: int
    dense_bytes: int


def advice(plan: Plan, facts: Facts) -> tuple[str, ...]:
    """Sentences, the one on the largest part first; none where it fits."""
    if plan.fits:
        return ()
    over = plan.peak + plan.unused - plan.limit
    parts = {
        plan.temporaries: _on_activations(plan, facts, over),
        plan.weights: _on_weights(plan, facts, over),
        plan.optimizer_state + plan.factors: _on_factors(plan),
    }
    found = [one for part in sorted(parts, reverse=True) if part > plan.limit / 10 for one in parts[part]]
    return (*found, *_on_devices(plan))


def _on_activations(plan: Plan, facts: Facts, over: int) -> list[str]:
    found, what = [], f"temporaries are {size(plan.temporaries)} of {size(plan.peak)}"
    if not facts.remat:
        found.append(
            f"{what}: compute activations again in the backward pass, with the model's remat=True, or jax.checkpoint "
            "around each block"
        )
    if facts.rows > 1 and facts.rows > plan.devices:
        keep = plan.temporaries - over
        share = next((n for n in _divisors(facts.rows) if keep > 0 and plan.temporaries / n <= keep), facts.rows)
        share = min(share, facts.rows // plan.devices) or 1
        if share > 1:
            times = facts.accumulate * share
            found.append(
                f"{what}: take the batch in parts, train_step(accumulate={times}), so that {facts.rows // share} rows "
                f"of {facts.rows} are computed at a time"
            )
    elif facts.remat:
        found.append(f"{what} for {facts.rows} rows: shorten the sequences, or split them over more devices")
    return found


def _on_weights(plan: Plan, facts: Facts, over: int) -> list[str]:
    if not facts.dense:
        return []
    after = int(facts.dense * _NF4)
    saved = facts.dense_bytes - after
    if saved <= plan.weights / 10:  # what is left is norms, or an embedding beside codes
        return []
    enough = "which is enough" if saved >= over else f"which is {size(over - saved)} short of enough"
    return [
        f"weights are {size(plan.weights)} of {size(plan.peak)}: hold the frozen base in 4 bits, "
        f"jlora.quantize(params, 'nf4'), about {size(plan.weights - saved)}, {enough}"
    ]


def _on_factors(plan: Plan) -> list[str]:
    state, less = plan.optimizer_state, "train less (a smaller rank, fewer targets)"
    if plan.optimizer_state_on_host:
        return [f"factors are {size(plan.factors)}, the optimizer state is on the host already: {less}"]
    if not state:
        return []
    return [
        f"factors and optimizer state are {size(plan.factors + state)}: offload the state, which takes {size(state)} "
        "off the device (memory_kind='pinned_host' of TrainState.create and jlora.plan, "
        f"train.optimizer_memory=pinned_host of a config, --optimizer-memory pinned_host of jlora plan), or {less}"
    ]


def _on_devices(plan: Plan) -> list[str]:
    need = plan.peak + plan.unused
    times = 2 ** math.ceil(math.log2(need / plan.limit)) if plan.limit else 2
    count = plan.devices * times
    mesh = {"dcn": plan.slices, "fsdp": count // plan.slices} if plan.slices > 1 else {"fsdp": count}
    found = [f"more devices: about {count} of {plan.device}, over which weights and batch are split (mesh={mesh})"]
    kind = DEVICES[plan.device].compiler
    larger = [d for d in DEVICES.values() if d.compiler == kind and d.memory >= need and d.name == d.target]
    if kind != "cpu" and larger:
        least = min(larger, key=lambda d: d.memory)
        found.append(f"a larger device: {least.name} has {size(least.memory)}")
    return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
