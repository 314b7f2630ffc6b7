"""`jlora.plan`: XLA's own figures, hand counts of bytes and FLOPs, collectives of each backend, errors and advice."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.cli import main, workload
from jlora.planning import DEVICES, Plan, flops, placing, planned, targets
from jlora.planning.advice import Facts, advice
from jlora.planning.collectives import Collective, collectives
from jlora.planning.devices import find
from jlora.state import TrainState
from jlora.train import train_step
from tests.test_stored import Codes

ROOT = Path(__file__).resolve().parent.parent
IN, HIDDEN, OUT, ROWS = 16, 32, 8, 64
GIB = 2**30
TX = optax.sgd(0.1, momentum=0.9)


def shape(*sizes: int, dtype: Any = jnp.float32, **options: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype, **options)


def mlp() -> dict[str, Any]:
    return {"up": shape(IN, HIDDEN, dtype=jnp.bfloat16), "down": shape(HIDDEN, OUT, dtype=jnp.bfloat16)}


def loss_fn(params: Any, batch: Any) -> jax.Array:
    hidden = jnp.tanh(batch["x"] @ params["up"])  # (rows, hidden)
    return jnp.mean(jnp.square(hidden @ params["down"]).astype(jnp.float32))


BATCH = {"x": shape(ROWS, IN, dtype=jnp.bfloat16)}


def adapt(params: Any, rank: int = 2, fn: Any = loss_fn, batch: Any = None) -> jlora.Adapted:
    sites = jlora.sites(fn, params, batch or BATCH)
    return jlora.apply(params, rank=rank, sites=sites)


FACTORS = 4 * 2 * ((IN + HIDDEN) + (HIDDEN + OUT))  # float32, r = 2
WEIGHTS = 2 * (IN * HIDDEN + HIDDEN * OUT)


@functools.cache
def plain() -> Plan:
    return jlora.plan(loss_fn, adapt(mlp()), TX, BATCH)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_is_what_xla_says_of_the_step_of_arrays():
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), mlp())
    step = train_step(loss_fn, TX)
    state = TrainState.create(adapt(params), step.tx)
    memory = step.lower(state, {"x": jnp.ones((ROWS, IN), jnp.bfloat16)}).compile().memory_analysis()
    found = plain()
    assert found.arguments == memory.argument_size_in_bytes
    assert found.temporaries == memory.temp_size_in_bytes > 0
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert found.peak == memory.argument_size_in_bytes + memory.temp_size_in_bytes + results


def test_parts_are_those_counted_by_hand():
    found = plain()
    assert (found.weights, found.factors, found.gradients) == (WEIGHTS, FACTORS, FACTORS)
    assert found.batch == ROWS * IN * 2
    assert found.optimizer_state == FACTORS  # the momentum
    assert found.arguments == WEIGHTS + 2 * FACTORS + found.batch + 4 + 4  # counters
    assert (found.device, found.compiler, found.devices, found.mesh) == ("cpu", "cpu", 1, {})
    assert found.fits and found.advice == () and found.notes == () and found.unused == 0
    assert found.flops == 2 * ROWS * (IN * HIDDEN + 2 * HIDDEN * OUT) + _of_factors()  # no gradient of x


def _of_factors() -> int:
    """x A, (x A) B; g B^T, (.) A^T where x has a gradient; A's and B's gradients, for which x A is made again. r = 2."""
    sizes = ((IN, HIDDEN, False), (HIDDEN, OUT, True))
    return sum(2 * ROWS * 2 * ((n + m) + m + (n if deep else 0) + n + m + n) for n, m, deep in sizes)


def test_nothing_is_allocated_and_the_environment_stays():
    environment, before = dict(os.environ), len(jax.live_arrays())
    jlora.plan(loss_fn, adapt(mlp(), 1), TX, BATCH)
    assert len(jax.live_arrays()) == before and dict(os.environ) == environment


def test_arrays_shapes_and_a_state_give_one_plan():
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), mlp())
    adapted = adapt(params)
    batch = {"x": np.ones((ROWS, IN), jnp.bfloat16)}
    assert jlora.plan(loss_fn, adapted, TX, batch) == plain()
    state = TrainState.create(adapt(mlp()), train_step(loss_fn, TX).tx)
    assert jlora.plan(loss_fn, state, TX, BATCH) == plain()


def test_codes_of_a_quantised_base_are_its_weights():
    params = {"up": Codes(shape(IN, HIDDEN, dtype=jnp.int8), shape(1, HIDDEN)), "down": shape(HIDDEN, OUT)}
    loss = lambda params, batch: loss_fn(params, {"x": batch["x"].astype(jnp.float32)})
    found = jlora.plan(loss, adapt(params, fn=loss), TX, BATCH)
    assert found.weights == IN * HIDDEN + 4 * HIDDEN + 4 * HIDDEN * OUT
    assert found.arguments == found.weights + 2 * FACTORS + found.batch + 8


def test_what_the_step_does_not_read_is_on_the_device_too():
    params = mlp() | {"unread": shape(300, 1000)}
    sites = jlora.sites(loss_fn, mlp(), BATCH)
    found = jlora.plan(loss_fn, jlora.apply(params, rank=2, sites=sites), TX, BATCH)
    assert (found.unused, found.peak) == (1_200_000 + 12, plain().peak)  # and the key, and the last loss
    assert "  unused by the step    1.14 MiB" in str(found).splitlines()


NO_SHAPES = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11)
of_arrays_alone = pytest.mark.skipif(NO_SHAPES, reason="JAX 0.10 has no shapes of arrays on the host")


@of_arrays_alone
def test_a_state_on_the_host_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    here, there = plain(), jlora.plan(loss_fn, adapt(mlp()), TX, BATCH, memory_kind="pinned_host")
    assert (here.optimizer_state, here.optimizer_state_on_host, here.host) == (FACTORS, 0, 0)
    assert (there.optimizer_state, there.optimizer_state_on_host, there.host) == (0, FACTORS, FACTORS)
    assert there.arguments == here.arguments - FACTORS and there.unused == 0
    assert there.notes == ("a CPU's memory is the host's: what waits there is in the peak, too",)
    lines = [" ".join(line.split()) for line in str(there).splitlines()]
    assert f"on the host {FACTORS} B optimizer state of {FACTORS} B among them" in lines
    monkeypatch.setattr(targets, "_cuda_plugins", list)
    instead = jlora.plan(loss_fn, adapt(mlp()), TX, BATCH, device="a6000", memory_kind="pinned_host")
    assert (instead.host, instead.peak) == (FACTORS, there.peak - FACTORS)


@of_arrays_alone
def test_a_state_says_where_it_lies_or_is_told():
    expected = jlora.plan(loss_fn, adapt(mlp()), TX, BATCH, memory_kind="pinned_host")
    create = lambda kind: TrainState.create(adapt(mlp()), train_step(loss_fn, TX).tx, memory_kind=kind)
    assert jlora.plan(loss_fn, create("pinned_host"), TX, BATCH) == expected
    assert jlora.plan(loss_fn, create(None), TX, BATCH, memory_kind="pinned_host") == expected
    assert jlora.plan(loss_fn, create("pinned_host"), TX, BATCH, memory_kind="device") == plain()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("pinned-host", r"memory_kind='pinned-host' is not None or one of device, pinned_host; did you mean 'pinned_host'\?"),
        pytest.param(
            "pinned_host", r"JAX 0\.10\.\d does not tell a program that the array of a shape lies in 'pinned_host': .*",
            marks=pytest.mark.skipif(not NO_SHAPES, reason="what JAX 0.10 cannot do"),
        ),
    ],
)  # fmt: skip
def test_a_memory_that_cannot_be_planned(kind: str, text: str):
    with pytest.raises(ValueError, match=f"^{text}$"):
        jlora.plan(loss_fn, adapt(mlp()), TX, BATCH, memory_kind=kind)


def test_options_are_the_steps():
    whole = jlora.plan(lambda p, b, key: loss_fn(p, b), adapt(mlp()), TX, BATCH, pass_key=True)
    assert whole.flops == plain().flops
    parts = jlora.plan(loss_fn, adapt(mlp()), TX, BATCH, accumulate=4)
    assert parts.flops == plain().flops and parts.temporaries != plain().temporaries


# -- FLOPs -------------------------------------------------------------------------------------------------------------

N = 8
X = shape(N, N)


def counted(fn: Any, *args: Any) -> int:
    return flops(jax.make_jaxpr(fn)(*args))


@jax.custom_vjp
def doubled(x: jax.Array) -> jax.Array:
    return x @ x


doubled.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g + x @ x,))


@jax.custom_jvp
def squared(x: jax.Array) -> jax.Array:
    return x @ x


squared.defjvp(lambda primals, tangents: (squared(*primals), tangents[0] @ primals[0]))


def looped(x: jax.Array) -> jax.Array:
    inner = lambda c, _: jax.lax.scan(lambda c, _: (c @ x, None), c, None, length=3)
    return jax.lax.scan(inner, x, None, length=5)[0]


def branched(x: jax.Array) -> jax.Array:
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)


def mapped(x: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    return jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows"))(x, x)


def while_loop(x: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x)


ONE = 2 * N**3
PROGRAMS: dict[str, tuple[Any, int]] = {
    "batched": (lambda x: jnp.einsum("bij,bjk->bik", jnp.ones((5, N, N)), jnp.ones((5, N, N))), 5 * ONE),
    "jit": (jax.jit(lambda x: x @ x), ONE),
    "scans": (looped, 15 * ONE),
    "cond": (branched, 2 * ONE),
    "while": (while_loop, ONE),
    "custom_vjp": (doubled, ONE),
    "its gradient": (jax.value_and_grad(lambda x: doubled(x).sum()), 4 * ONE),
    "custom_jvp": (squared, ONE),
    "gradient": (jax.value_and_grad(lambda x: jnp.sin(x @ x).sum()), 3 * ONE),
    "remat": (jax.value_and_grad(jax.checkpoint(lambda x: jnp.sin(x @ x).sum())), 4 * ONE),
    "remat of two": (jax.value_and_grad(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ x) @ x).sum())), 8 * ONE),
    "shard_map": (mapped, ONE),
    "vmap of scan": (lambda x: jax.vmap(looped)(jnp.ones((2, N, N))), 30 * ONE),
    "dead": (lambda x: (x @ x, x)[1], 0),
    "dead carry": (
        lambda x: jax.lax.scan(lambda c, _: ((c[0] @ x, c[1] @ x), None), (x, x), None, length=3)[0][0],
        3 * ONE,
    ),
    "carry of a carry": (
        lambda x: jax.lax.scan(lambda c, _: ((c[1], c[1] @ x), None), (x, x), None, length=3)[0][0],
        3 * ONE,
    ),
    "ragged": (lambda x: jax.lax.ragged_dot(x, jnp.ones((3, N, 5)), jnp.array([2, 3, 3])), 2 * N * N * 5),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_flops_are_those_counted_by_hand(name: str):
    fn, expected = PROGRAMS[name]
    assert counted(fn, X) == expected


@pytest.mark.parametrize(("groups", "strides"), [(1, 1), (2, 1), (1, 2)])
def test_flops_of_a_convolution(groups: int, strides: int):
    x, kernel = shape(2, 12, 12, 4), shape(3, 3, 4 // groups, 6)
    conv = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(strides, strides), padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip
    size = 12 // strides
    assert counted(conv, x, kernel) == 2 * (2 * size * size * 6) * (3 * 3 * 4 // groups)


def test_a_loop_of_unknown_length_is_noted():
    loss = lambda params, batch: loss_fn(params, {"x": jax.lax.while_loop(lambda x: x[0, 0] > 9, jnp.sin, batch["x"])})
    assert jlora.plan(loss, adapt(mlp()), TX, BATCH).notes == (
        "FLOPs count the body of a while loop once: how often it runs is not known",
    )


# -- collectives -------------------------------------------------------------------------------------------------------

GPU = """HloModule jit_program, is_scheduled=true

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  ROOT %all = bf16[] add(%a, %b)
}

%region_0 (arg: (s32[], bf16[3,32,256])) -> (s32[], bf16[3,32,256]) {
  %all-gather-start.1 = ((bf16[32]{0}, bf16[32,256]{1,0}), (bf16[256]{0}, /*index=1*/bf16[256,256]{1,0})) all-gather-start(%p.1, %p.2), channel_id=1, replica_groups=mesh['fsdp'=8,'tp'=2] {'fsdp'}, dimensions={0}
  %all-gather-done.1 = (bf16[256]{0}, bf16[256,256]{1,0}) all-gather-done(%all-gather-start.1)
  %all-reduce-start = ((bf16[1000]{0}), bf16[1000]{0}) all-reduce-start(%w), channel_id=2, replica_groups=[2,8]<=[16], to_apply=%add
  %all-reduce-done = bf16[1000]{0} all-reduce-done(%all-reduce-start)
  %async = ((f32[64]{0}), f32[8]{0}) async-start(%q), calls=%wrapped
  %async.2 = f32[8]{0} async-done(%async), calls=%wrapped
}

%region_1 (arg: (s32[], bf16[3,32,256])) -> pred[] {
  %constant.9 = s32[] constant(9)
}

%wrapped (p: f32[64]) -> f32[8] {
  ROOT %reduce-scatter = f32[8]{0} reduce-scatter(%p), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, dimensions={0}, to_apply=%add
}

%small (p: f32[4]) -> f32[4] {
  ROOT %collective-permute = f32[4]{0} collective-permute(%p), source_target_pairs={{0,1}}
}

%large (p: f32[4]) -> f32[400] {
  ROOT %all-to-all = f32[400]{0} all-to-all(%p), replica_groups={}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.1 = (s32[], bf16[3,32,256]{2,1,0}) while(%tuple), condition=%region_1, body=%region_0, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce-start.7 = (f32[10]{0}, f32[20]{0}) all-reduce-start(%a, %b), replica_groups={}, to_apply=%add
  %conditional = f32[4]{0} conditional(%i, %a, %b), branch_computations={%small, %large}
  ROOT %collective-permute-start = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
}
"""
TPU = """HloModule jit_program

fused.1 (p: bf16[1,32,256]) -> bf16[1,256,256] {
  %all-gather.1 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=52, replica_groups=mesh['fsdp'=8] {'fsdp'}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
}

fused.2 (p: bf16[1,32,256]) -> bf16[1,256,256] {
  %all-gather.2 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=52, replica_groups=mesh['fsdp'=8] {'fsdp'}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

fused.3 (p: bf16[1,8]) -> bf16[1,64] {
  %all-gather.3 = bf16[1,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=53, replica_groups=mesh['fsdp'=8] {'fsdp'}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

body (p: s32[]) -> s32[] {
  %fusion.1 = bf16[1,256,256]{2,1,0} fusion(%p), kind=kCustom, calls=%fused.1
  %fusion.2 = bf16[1,256,256]{2,1,0} fusion(%p), kind=kCustom, calls=%fused.2
  %all-reduce.3 = (bf16[16,16]{1,0:T(8,128)(2,1)}, s4[10]{0}) all-reduce(%a, %b), channel_id=60, replica_groups={{0,1}}, to_apply=%add
  %fusion.3 = bf16[1,64]{1,0} fusion(%p), kind=kCustom, calls=%fused.3
  %recv = (f32[6]{0}, u32[]{:S(2)}, token[]) recv(%token), channel_id=7, is_host_transfer=true
}

condition (p: s32[]) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(24), metadata={op_name="lt"}
  %constant.2 = s32[]{:T(128)} constant(1)
  %element = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%element, %constant.1), direction=LT
}

ENTRY main (p: s32[]) -> s32[] {
  %fusion.4 = bf16[1,64]{1,0} fusion(%p), kind=kCustom, calls=%fused.3
  ROOT %while = s32[] while(%p), condition=%condition, body=%body
}
"""


def test_collectives_of_a_gpu():
    gathered, reduced = 3 * 2 * (256 + 256 * 256), 3 * 2000 + 120
    assert collectives(GPU, 16) == {
        "all-gather": Collective(3, gathered, gathered * 7 // 8),
        "all-reduce": Collective(4, reduced, 3 * 2 * 2000 * 7 // 8 + 2 * 120 * 15 // 16),
        "reduce-scatter": Collective(3, 3 * 32, 3 * 32 * 7),
        "all-to-all": Collective(1, 1600, 1500),
        "collective-permute": Collective(1, 16, 16),
    }


def test_collectives_of_a_tpu():
    """Trip counts stand in the condition; a fused gather is written several times, and is one."""
    gathered, reduced = 24 * 2 * 256 * 256 + 128, 24 * (512 + 5)  # channel 53 goes on in the loop
    assert collectives(TPU, 8) == {
        "all-gather": Collective(25, gathered, gathered * 7 // 8),
        "all-reduce": Collective(24, reduced, reduced),
        "recv": Collective(24, 24 * 24, 24 * 24),
    }


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match=r"^this text has no ENTRY: pass compiled.as_text\(\)"):
        collectives("module @jit_f {}", 8)


STACK = {"w": shape(3, IN, IN), "out": shape(IN, OUT)}


def scanned(params: Any, batch: Any) -> jax.Array:
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch["x"], params["w"])[0]
    return jnp.mean(jnp.square(h @ params["out"]))


def test_collectives_of_eight_devices():
    """Data parallel: what is reduced are the factors' gradients, once, and scalars."""
    adapted = jlora.apply(STACK, rank=2, targets="out", sites=jlora.sites(scanned, STACK, {"x": shape(ROWS, IN)}))
    mesh = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rule = lambda path, x: P("data") if path.startswith("batch") else None
    found = jlora.plan(scanned, adapted, TX, {"x": shape(ROWS, IN)}, mesh, rule=rule)
    factors = 4 * 2 * (IN + OUT)
    assert set(found.collectives) == {"all-reduce"}
    assert factors <= found.collectives["all-reduce"].bytes <= factors + 16
    assert found.collectives["all-reduce"].wire == round(found.collectives["all-reduce"].bytes * 7 / 4)
    assert (found.devices, found.mesh, found.batch) == (8, {"data": 8}, ROWS * IN * 4 // 8)
    assert found.factors == factors and found.weights == 4 * (3 * IN * IN + IN * OUT)
    alone = jlora.plan(scanned, adapted, TX, {"x": shape(ROWS, IN)})
    assert found.flops == alone.flops / 8 and alone.collectives == {}


@pytest.mark.parametrize("kinds", [AxisType.Auto, AxisType.Explicit])
def test_weights_without_a_place_are_fully_sharded(kinds: AxisType):
    """The stack's first axis stays whole, and each layer is gathered in its turn: by hand, in both passes."""
    adapted = adapt(STACK, fn=scanned, batch={"x": shape(ROWS, IN)})
    mesh = AbstractMesh((8,), ("fsdp",), axis_types=(kinds,))
    found = jlora.plan(_gathering, adapted, TX, {"x": shape(ROWS, IN)}, mesh)
    assert found.weights == 4 * (3 * IN * IN + IN * OUT) // 8
    assert found.arguments == found.weights + 2 * found.factors + found.batch + 8
    assert found.collectives["all-gather"].bytes >= 4 * (3 * IN * IN + IN * OUT)
    assert found.collectives["all-gather"].count >= 4


def test_the_rule_where_nothing_says_anything():
    rule = placing.fully_sharded(jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2))
    both = ("data", "model")
    assert rule("base/w", shape(64, 16, 32)) == P(None, None, both)  # a stack of 64 layers stays whole
    assert rule("base/w", shape(64, 32)) == P(both, None)
    assert rule("base/w", shape(50257, 24)) == P(None, both)
    assert rule("batch/x", shape(16, 3)) == P(both)
    assert [rule(*of) for of in (("base/b", shape(7)), ("batch/x", shape(3, 8)), ("factors/w/A", shape(64, 8)))] == [
        None
    ] * 3


def _gathering(params: Any, batch: Any) -> jax.Array:
    """As the models do on Explicit axes: a weight comes to the activations."""
    mesh = jax.typeof(batch["x"]).sharding.mesh
    explicit = bool(not mesh.empty and mesh.explicit_axes)
    whole = lambda w: jax.sharding.reshard(w, NamedSharding(mesh, P(*[None] * w.ndim))) if explicit else w
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ whole(w)), None), batch["x"], params["w"])[0]
    return jnp.mean(jnp.square(h @ whole(params["out"])))


def test_shardings_of_leaves_are_kept_on_the_devices_of_the_plan():
    mesh = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = lambda x, spec: x.update(sharding=NamedSharding(mesh, spec))
    params = {"up": split(mlp()["up"], P(None, "model")), "down": mlp()["down"]}
    batch = {"x": split(BATCH["x"], P("data"))}
    found = jlora.plan(loss_fn, adapt(params), TX, batch, mesh)
    assert found.weights == 2 * (IN * HIDDEN // 4 + HIDDEN * OUT) and found.batch == ROWS * IN * 2 // 2
    assert found.mesh == {"data": 2, "model": 4}


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h100", ("h100", None, "")), ("H100 80GB", ("h100", None, "")), ("NVIDIA H100 SXM5 80 GB", ("h100", None, "")),
        ("8xH100", ("h100", 8, "")), ("h100-8", ("h100", 8, "")), ("A100-40GB", ("a100-40gb", None, "")),
        ("NVIDIA A100-SXM4-80GB", ("a100", None, "")), ("RTX 4090", ("rtx4090", None, "")),
        ("GeForce RTX 4090", ("rtx4090", None, "")), ("RTX A6000", ("a6000", None, "")), ("Tesla V100", ("v100", None, "")),
        ("v5e", ("v5e", None, "")), ("v5e-16", ("v5e", 16, "")), ("v5litepod-16", ("v5e", 16, "")),
        ("TPU v5 lite", ("v5e", None, "")), ("v5e:4x4", ("v5e", None, "4x4")), ("v5p-128", ("v5p", 64, "")),
        ("v4-8", ("v4", 4, "")), ("7x", ("7x", None, "")), ("tpu7x-16", ("7x", 16, "")), ("trillium", ("v6e", None, "")),
        ("cpu", ("cpu", None, "")),
    ],
)  # fmt: skip
def test_names_of_devices(name: str, expected: tuple[str, int | None, str]):
    found = find(name)
    assert (found.device.name, found.number, found.topology) == expected


@pytest.mark.parametrize(
    ("name", "near"), [("h1000", "h100"), ("v5ee-16", "v5e"), ("a600", "a6000"), ("h100:4x4", "h100"), ("gpu", "cpu")]
)
def test_an_unknown_device_has_a_nearest_one(name: str, near: str):
    with pytest.raises(ValueError, match=rf"^device='{name}' is unknown; the nearest is '{near}'. There are cpu, v4, "):
        jlora.plan(loss_fn, adapt(mlp()), TX, BATCH, device=name)


@pytest.mark.parametrize(("name", "extra"), [("v5e", "plan"), ("h100", "plan-gpu")])
def test_a_compiler_that_is_not_there(name: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=rf"^a plan for '{name}' is made by its own .*pip install \"jlora\[{extra}\]\""
    ):
        jlora.plan(loss_fn, adapt(mlp()), TX, BATCH, device=name)


def test_a_device_of_the_table_is_compiled_for_the_cpu_where_no_compiler_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets, "has_compiler", lambda device: device.compiler == "cpu")
    found = jlora.plan(loss_fn, adapt(mlp()), TX, BATCH, device="RTX A6000")
    assert (found.device, found.compiler, found.limit) == ("a6000", "cpu", int(47.5 * GIB))
    assert found.notes == (
        "compiled for the CPU, whose temporaries are others, and judged by a6000's memory: pip install "
        '"jlora[plan-gpu]" for the compiler of a100',
    )


def test_every_device_has_a_target_that_can_be_compiled_for():
    own = {name for name, device in DEVICES.items() if device.target == name}
    assert own == {"cpu", "v4", "v5e", "v5p", "v6e", "7x", "a100", "h100", "h200", "b200"}
    assert {device.target for device in DEVICES.values()} == own
    assert all(device.memory > 9 * GIB for name, device in DEVICES.items() if name != "cpu")


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("v5e", 1, "v5e:1x1"), ("v5e", 2, "v5e:1x2"), ("v5e", 8, "v5e:2x4"), ("v5e", 16, "v5e:4x4"),
        ("v6e", 256, "v6e:16x16"), ("v5p", 1, "v5p:1x1x1"), ("v5p", 4, "v5p:2x2x1"), ("v5p", 8, "v5p:2x2x2"),
        ("v4", 64, "v4:4x4x4"), ("v5p", 12, "v5p:2x2x3"), ("7x", 2, "tpu7x:1x1x1"), ("7x", 8, "tpu7x:2x2x1"),
    ],
)  # fmt: skip
def test_topologies(name: str, count: int, expected: str):
    found, options = targets._tpu(name, count, "")
    assert found == expected
    assert ("chips_per_host_bounds" in options) == (count * (0.5 if name == "7x" else 1) < 4)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no adapted": ({"adapted": {}}, TypeError, r"plan takes an Adapted, jlora.apply\(params, ...\), or a TrainState"),
    "pmap": ({"parallel": "pmap"}, ValueError, "a plan is made for parallel='jit': give it a mesh"),
    "mesh": ({"mesh": 8}, TypeError, r"mesh is a jax.sharding.Mesh, an AbstractMesh or a dict .* got 8"),
    "zero": ({"mesh": {"x": 0}}, TypeError, "mesh is a jax.sharding.Mesh"),
    "size": ({"mesh": {"x": 4}, "device": "cpu-8"}, ValueError, "the device's name says 8 devices, and mesh x=4 has 4"),
    "many": ({"mesh": {"x": 64}}, ValueError, "a plan for 64 CPU devices, and this process has 8: start it with XLA"),
    "divides": (
        {"mesh": {"x": 3}, "rule": lambda path, x: P("x") if path == "base/up" else None}, ValueError,
        r"base/up has shape \(16, 32\), and its axis 0 of 16 is not a multiple of 3, the devices of x: leave",
    ),
    "axis": (
        {"mesh": {"x": 2}, "rule": lambda path, x: P("y")}, ValueError, r"base/\w+: .* names 'y', and the mesh has 'x'",
    ),
    "spec": (
        {"mesh": {"x": 2}, "rule": lambda path, x: P(None, None, None, "x") if path == "batch/x" else None}, ValueError,
        r"batch/x has shape \(64, 16\), and its spec .* has more axes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    options, kind, text = REFUSED[name]
    adapted = options.get("adapted", adapt(mlp()))
    with pytest.raises(kind, match=f"^{text}"):
        jlora.plan(loss_fn, adapted, TX, BATCH, **{key: value for key, value in options.items() if key != "adapted"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v5e-6", "no topology has 6 chips of v5e: whole hosts of 4 do, such as 8"),
        ("v5e:2x2x2", "v5e:2x2x2: a topology of v5e has 2 axes"),
    ],
)
def test_refused_topologies(name: str, text: str):
    wanted = find(name)
    with pytest.raises(ValueError, match=f"^{text}$"):
        targets._tpu(wanted.device.name, wanted.number or 1, wanted.topology)


# -- what is said ------------------------------------------------------------------------------------------------------


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
        "all-gather": {"count": 2, "bytes": 2048, "wire": 1024}
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
    found = jlora.plan(loss_fn, adapt(params, batch=batch), TX, batch)
    assert not found.fits and found.limit == 10**6
    assert any(text.startswith("weights are 1.92 MiB of") for text in found.advice)
    assert f"It does not fit: {(found.peak - 10**6) / 2**20:.3g} MiB too much." in str(found).splitlines()


# -- real compilers, each in a process of its own ----------------------------------------------------------------------

CHILD = """
import json, sys
import jax, jax.numpy as jnp, optax
import jlora
from jlora.models.sizes import model_of
module, inputs = model_of("gpt2", scan=True, remat=True, layers=2, width=64, heads=2, vocab_size=128, context=64,
                          dtype="bfloat16", param_dtype="bfloat16")
params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
def loss(params, tokens):
    logits = module.apply({"params": params}, tokens)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()
tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32)
adapted = jlora.apply(params, rank=4, sites=jlora.sites(loss, params, tokens))
out = []
for device in sys.argv[1:]:
    out.append(jlora.plan(loss, adapted, optax.adamw(1e-3), tokens, device=device).as_dict())
print(json.dumps(out))
"""


def real(*names: str) -> list[dict[str, Any]]:
    if not targets.has_compiler(DEVICES[find(names[0]).device.target]):
        pytest.skip(f"the compiler of {names[0]} is not installed")
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = str(ROOT)  # as a person would: JAX looks for devices itself
    found = subprocess.run(
        [sys.executable, "-c", CHILD, *names], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def _check_real(one: dict[str, Any], many: dict[str, Any]) -> None:
    parts = ("weights", "factors", "optimizer_state", "batch")
    padding = one["arguments"] - sum(one[part] for part in parts)
    assert 0 <= padding <= 24 or (one["device"] == "v5e" and 0 <= padding < one["arguments"] / 2)  # tiles of 8 x 128
    assert one["fits"] and one["arguments"] < one["peak"] and one["collectives"] == {}
    assert (
        many["devices"] == 4
        and many["mesh"] == {"fsdp": 4}
        and many["flops"] == pytest.approx(one["flops"] / 4, rel=0.02)
    )
    assert many["weights"] < one["weights"] / 3 and many["factors"] == one["factors"]
    gathered = many["collectives"]["all-gather"]["bytes"]
    assert one["weights"] < gathered < 2.5 * one["weights"]  # forward, backward
    assert many["collectives"]["all-reduce"]["bytes"] <= one["factors"] + 1024


def test_h100():
    one, many = real("h100", "4xh100")
    _check_real(one, many)
    assert one["limit"] == 84942979072 and one["compiler"] == "h100" and one["notes"] == []


@pytest.mark.thorough("test_h100")
def test_other_gpus():
    table, *others = real("a6000", "h200", "b200")
    assert table["compiler"] == "a100" and table["limit"] == int(47.5 * GIB)
    assert table["notes"] == ["compiled for a100, whose compiler is nearest, and judged by a6000's memory"]
    assert all(one["fits"] and one["compiler"] == one["device"] for one in others)


@pytest.mark.thorough("test_h100")
def test_v5e():
    _check_real(*real("v5e", "v5e-4"))


# -- the command -------------------------------------------------------------------------------------------------------

SMALL = ("configs/llama2_7b_gsm8k_lora.py", "--small", "--json")


@pytest.fixture
def command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Runs `jlora plan` in the repository: its output, or its one line of error."""
    monkeypatch.chdir(ROOT)

    def call(*arguments: str, status: int = 0) -> str:
        found = main(["plan", *arguments])
        out, err = capsys.readouterr()
        assert found == status, (found, out, err)
        return out if status == 0 else err.removeprefix("jlora plan: ").rstrip("\n")

    return call


def test_a_model_that_says_nothing_of_places_is_planned_on_automatic_axes():
    params = {"a": {"kernel": jnp.ones((64, 32))}, "b": {"kernel": jnp.ones((32, 64))}}
    loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"])
    found = jlora.plan(loss, jlora.apply(params, rank=2), optax.sgd(0.1), jnp.ones((8, 64)), mesh={"fsdp": 4})
    assert found.weights == 2 * 64 * 32 * 4 // 4
    assert found.notes == ("the model does not say where its products lie, so that XLA decided it (axes of kind Auto)",)


@pytest.mark.loose_promotion
def test_the_command_plans_a_config(command: Any):
    told = json.loads(command(*SMALL, "train.batch=2", "--accumulate", "2"))
    assert told["command"] == "plan" and told["model"] == "llama2_7b_gsm8k_lora_small" and told["fits"]
    assert told["batch_shapes"] == {"tokens": [2, 96], "mask": [2, 96], "loss_mask": [2, 96], "share": [2]}
    assert told["method"].startswith("lora(rank=8, alpha=16")
    assert told["batch"] == 2 * (96 * 6 + 4) and told["factors"] > 0


def gpt2(folder: Path) -> str:
    """The folder with a config.json of two layers of width 16."""
    config = {
        "model_type": "gpt2", "vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.loose_promotion
def test_the_command_plans_a_model(command: Any, tmp_path: Path):
    text = command(
        gpt2(tmp_path), "--method", "lora(2)", "--batch", "4x16", "--targets", "query", "--remat", "--mesh", "fsdp=4"
    )
    lines = text.splitlines()
    assert lines[0].endswith("inputs 4x16") and lines[1] == "A training step on cpu (4 devices, fsdp=4); per device:"
    assert lines[3] == f"  factors            {f'{2 * 2 * 32 * 4} B':>11}" and lines[-1] == "It fits."


@pytest.mark.loose_promotion
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("gpt2", "--batch", "512"), "--batch of 'gpt2' is rows x length, such as 1x512; got '512'"),
        (("gpt2", "--batch", "1x4096"), "--batch 1x4096: 4096 tokens are more than the context of 'gpt2', 1024"),
        (("gpt2", "--mesh", "8"), "--mesh is name=size, several with commas: fsdp=8,tp=2; got '8'"),
        (("gpt2", "train.batch=1"), "train.batch=1: for a config (.py), and 'gpt2' is a model"),
        (("gpt2", "--method", "lara(8)"), "--method: there is no method 'lara'; the nearest is 'lora'"),
        (("gpt2", "--optimizer-memory", "pinned"), "memory_kind='pinned' is not None or one of device, pinned_host; did you mean 'pinned_host'?"),
        ((*SMALL, "train.optimizer_memory=host"), "train.optimizer_memory is one of 'device', 'pinned_host', got 'host'"),
        (("gpt22",), "'gpt22' is no published size, no folder and no config.json; the nearest size is 'gpt2'"),
        ((*SMALL, "--batch", "1x8"), "--batch: of a model; a config has its own, and fields are set as in train.batch=4"),
        ((*SMALL, "--run", "lara"), "there is no run 'lara' in 'llama2_7b_gsm8k_lora_small': choose one with --run, lora"),
        (("configs/minilm_sst2.py",), "'configs/minilm_sst2.py' is no task of completions on a checkpoint: call jlora.plan with its loss, or name a model"),
    ],
)  # fmt: skip
def test_the_command_refuses(command: Any, arguments: tuple[str, ...], text: str):
    assert command(*arguments, status=2) == text


@of_arrays_alone
@pytest.mark.loose_promotion
def test_the_command_has_the_state_on_the_host(command: Any, tmp_path: Path):
    of = lambda *arguments: json.loads(command(*arguments, "--json"))
    model, place = (gpt2(tmp_path), "--method", "lora(2)", "--batch", "1x8"), ("--optimizer-memory", "pinned_host")
    here, there = of(*model), of(*model, *place)
    assert here["optimizer_state_on_host"] == here["host"] == 0 and here["optimizer_state"] == 2 * here["factors"] + 4
    assert there["optimizer_state_on_host"] == there["host"] == 2 * there["factors"] and there["optimizer_state"] == 4
    config = ("configs/qlora_llama_65b.py", "--small", "train.optimizer_memory=pinned_host")
    held, back = of(*config), of(*config, "--optimizer-memory", "device")
    assert held["optimizer_state_on_host"] == held["host"] == 2 * held["factors"] > 0
    assert back["host"] == 0 and back["optimizer_state"] == held["optimizer_state"] + held["host"]


@pytest.mark.loose_promotion
def test_the_command_holds_the_base_in_few_bits(command: Any, tmp_path: Path):
    model = gpt2(tmp_path)
    bytes_of = lambda *form: placing.bytes_of(
        workload.of_model(model, "lora(2)", "1x8", quantised=form[0]).adapted.base
    )
    kernels, outputs = 2 * 12 * 16 * 16, 2 * (16 + 16 + 16 + 16 + 64 + 16)  # of two layers
    assert bytes_of(None) - bytes_of("int8") == kernels * (2 - 1) - 4 * outputs
    said = "unknown format 'nf3': it is one of nf4, fp4, int4, int8, fp8; the nearest is 'nf4'"
    assert command(model, "--quantize", "nf3", "--batch", "1x8", status=2) == said


def test_a_config_without_the_experiments(command: Any, monkeypatch: pytest.MonkeyPatch):
    found = workload.importlib.util.find_spec
    monkeypatch.setattr(
        workload.importlib.util, "find_spec", lambda name: None if "experiments" in name else found(name)
    )
    assert command(*SMALL, status=2).startswith(
        "a config is one of jlora's experiments, which are in its repository and not"
    )
