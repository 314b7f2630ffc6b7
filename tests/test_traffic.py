"""Traffic of a step over devices: gradients of factors alone, in float32; each weight gathered twice.

The programs are compiled for 16 H100 that are not there, in a process of its own; skipped without the extra `plan-gpu`.
Those for TPUs take minutes: `pytest -m tpu`, with the extra `plan`.
"""

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import jlora
from jlora.models.llama import PRESETS, Llama
from jlora.planning import DEVICES, targets
from jlora.sharding import MODELS
from tests.test_placed import build, shapes_of
from tests.test_sharding import mesh_of

ROOT = Path(__file__).resolve().parent.parent
CONFIG = dataclasses.replace(
    PRESETS["llama-7b"], layers=2, scan=True, remat=True, dtype="bfloat16", param_dtype="bfloat16"
)
MODEL = Llama(CONFIG)
TOKENS = jax.ShapeDtypeStruct((16, 2048), jnp.int32)
MESHES = {"data": {"data": 16}, "fsdp": {"fsdp": 16}, "fsdp and tp": {"fsdp": 4, "tp": 4}}


def loss(params, batch):
    logits = MODEL.apply({"params": params}, batch)
    hot = jax.nn.one_hot(batch[:, 1:], 32000, dtype=logits.dtype)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits)[:, :-1] * hot, -1))


def of_labels(params, batch):
    """Where tokens are split over devices, labels come with them."""
    return jnp.mean(MODEL.apply({"params": params}, batch["tokens"], labels=batch["labels"]))


def shapes():
    return jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)["params"]


def adapted(method: str):
    if method == "full":
        return jlora.apply(shapes(), method=jlora.full())
    return jlora.apply(shapes(), rank=16, targets="attn|mlp", sites=jlora.sites(loss, shapes(), TOKENS))


def main(device: str) -> None:
    """Prints the plans of LoRA and of full fine-tuning on each mesh, and the shapes that loops reduce."""
    from jlora.planning import planned

    found = {}
    if device != "16xh100":
        for method in ("lora", "full"):
            plan = jlora.plan(loss, adapted(method), optax.adamw(1e-4), TOKENS, {"fsdp": 16}, device, rule=MODELS)
            found[method] = plan.as_dict()
        print("FOUND", json.dumps(found))
        return
    texts = []
    read = planned.read
    planned.read = lambda text: (texts.append(text), read(text))[1]
    for name, mesh in MESHES.items():
        for method in ("lora", "full"):
            plan = jlora.plan(loss, adapted(method), optax.adamw(1e-4), TOKENS, mesh, "16xh100", rule=MODELS)
            sums = re.findall(r"= \(*bf16\[4,2048,4096\].* all-reduce(?:-start)?\(.*/while/body/", texts[-1])
            found[f"{name}, {method}"] = plan.as_dict() | {"sums": len(sums)}
    batch = {"tokens": TOKENS, "labels": TOKENS}
    mesh = {"fsdp": 4, "sequence": 4}
    plan = jlora.plan(of_labels, adapted("lora"), optax.adamw(1e-4), batch, mesh, "16xh100", rule=MODELS)
    found["fsdp and sequence, lora"] = plan.as_dict()
    print("FOUND", json.dumps(found))


@pytest.fixture(scope="module")
def plans() -> dict:
    return planned_for("16xh100", "h100")


def planned_for(device: str, name: str) -> dict:
    if not targets.has_compiler(DEVICES[name]):
        pytest.skip(f"the compiler of {name} is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    # On the CPU JAX does not look for CUDA's other libraries, without which cuDNN's attention is in one piece.
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, __file__, device],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("FOUND ")[1])


def sent(plan: dict, kind: str) -> int:
    return plan["collectives"].get(kind, {"bytes": 0})["bytes"]


def received(plan: dict) -> float:
    return sum(each["wire"] for each in plan["collectives"].values())


SMALL = 4096  # bytes of losses, norms and tokens


def test_data_parallel_sends_the_gradients_of_the_factors_alone(plans):
    plan = plans["data, lora"]
    trainable = jlora.count(adapted("lora")).trainable
    assert 4 * trainable <= sent(plan, "all-reduce") <= 4 * trainable + SMALL
    assert received(plan) - plan["collectives"]["all-reduce"]["wire"] <= SMALL


def test_fully_sharded_each_weight_is_gathered_twice(plans):
    plan, full = plans["fsdp, lora"], plans["fsdp, full"]
    trainable, total = jlora.count(adapted("lora"))
    assert 4 * trainable <= sent(plan, "all-reduce") <= 4 * trainable + SMALL
    assert sent(plan, "reduce-scatter") == 0
    assert sent(plan, "all-gather") <= 2 * 2 * (total - trainable)
    assert received(plan) <= 0.75 * received(full)


def test_tensor_parallel_adds_no_all_reduce_of_an_activation(plans):
    plan, full = plans["fsdp and tp, lora"], plans["fsdp and tp, full"]
    assert plan["sums"] == full["sums"] == 5  # two forward, one of remat, two backward
    assert received(plan) < received(full)


def test_split_tokens_have_keys_and_values_gathered(plans):
    """Forward and in remat; their gradients are summed, and those of the factors once, over rows and tokens."""
    plan = plans["fsdp and sequence, lora"]
    trainable, total = jlora.count(adapted("lora"))
    pairs = 2 * 2 * 4 * 2048 * 4096 * 2  # bytes of K and V of both layers, for the rows of a device
    assert sent(plan, "all-gather") <= 2 * 2 * (total - trainable) + 2 * pairs + SMALL
    assert 4 * trainable <= sent(plan, "all-reduce") <= 4 * trainable + pairs + SMALL
    assert sent(plan, "all-to-all") <= SMALL  # the embedding comes to the tokens


def test_arguments_are_those_of_the_plan(plans):
    for plan in (plan for name, plan in plans.items() if name.endswith("lora")):
        parts = sum(plan[part] for part in ("weights", "factors", "optimizer_state", "batch"))
        assert 0 <= plan["arguments"] - parts <= 64


@pytest.mark.tpu
@pytest.mark.parametrize(("device", "name"), [("v5e:4x4", "v5e"), ("v5p:2x2x4", "v5p")])
def test_slices_of_tpus_gather_each_weight_twice_and_sum_the_factors_alone(device, name):
    """Minutes of a compiler: `pytest -m tpu`."""
    found = planned_for(device, name)
    plan, full = found["lora"], found["full"]
    trainable, total = jlora.count(adapted("lora"))
    assert 4 * trainable <= sent(plan, "all-reduce") <= 4 * trainable + SMALL
    assert sent(plan, "reduce-scatter") == 0 and sent(plan, "all-gather") <= 2 * 2 * (total - trainable)
    assert received(plan) <= 0.75 * received(full)
    parts = sum(plan[part] for part in ("weights", "factors", "optimizer_state", "batch"))
    assert 0 <= plan["arguments"] - parts <= 4096  # tiles of TPUs


# -- the same of the program itself ------------------------------------------------------------------------------------


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("axes", [{"fsdp": 4, "tp": 2}, {}])
def test_gradients_of_factors_are_float32_before_they_are_summed(axes):
    """On Explicit axes, where autodiff makes them, and else, where jlora does."""
    held = adapted("lora")
    base, batch = held.base, TOKENS
    if axes:
        mesh = mesh_of(AxisType.Explicit, **axes)
        places = MODELS.shardings(base, mesh)
        base = jax.tree.map(lambda x, place: x.update(sharding=place), base, places)
        batch = TOKENS.update(sharding=MODELS.rows(mesh))
    lifted = jlora.lift(loss)
    of_factors = lambda factors, base, batch: lifted(held.replace(factors=factors, base=base), batch)
    context = jax.set_mesh(mesh) if axes else jax.numpy_rank_promotion("raise")
    with context:
        jaxpr = jax.make_jaxpr(jax.grad(of_factors))(held.factors, base, batch).jaxpr
    thin = {tuple(np.squeeze(np.empty(x.shape[1:])).shape) for x in jax.tree.leaves(held.factors)}
    thin |= {shape[::-1] for shape in thin}
    found = collections.Counter(
        str(eqn.outvars[0].aval.dtype)
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape in thin
    )
    assert found == {"float32": 2 * 14}  # A and B of seven layers, on the CPU and elsewhere
    copies = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "copy"]
    assert (len(copies) > 0) == bool(axes)  # an input of their own for the factors of query, key and value


@pytest.mark.once
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_a_unet_sends_the_gradients_of_its_factors_and_gathers_what_is_split(axis):
    """Compiled for CPUs. Its convolutions want whole kernels, gathered once where nothing is computed again."""
    model, inputs, _ = build("unet")
    loss = lambda params, inputs: jnp.mean(model.apply({"params": params}, *inputs)["out"] ** 2)
    params = shapes_of(model, inputs)
    adapted = jlora.apply(params, rank=2, targets="attn", sites=jlora.sites(loss, params, inputs))
    plan = jlora.plan(loss, adapted, optax.sgd(0.1), inputs, {axis: 2}, "cpu", rule=MODELS)
    assert not any("Auto" in note for note in plan.notes)
    sent = {kind: found.bytes for kind, found in plan.collectives.items()}
    assert sent.pop("all-reduce") == 4 * (jlora.count(adapted).trainable + 1)  # the loss
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert (sent == {}) if axis == "data" else (set(sent) == {"all-gather"} and sent["all-gather"] <= whole)


if __name__ == "__main__":
    main(sys.argv[1])
