"""`jlora.plan`: XLA's own figures, hand counts of bytes and FLOPs, collectives of each backend."""

import functools
import os
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
from jlora.planning import Plan, flops, placing, targets
from jlora.planning.collectives import Collective, collectives
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


on_cpu = functools.partial(jlora.plan, device="cpu")


@functools.cache
def plain() -> Plan:
    return on_cpu(loss_fn, adapt(mlp()), TX, BATCH)


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
    assert found.arguments == WEIGHTS + 2 * FACTORS + found.batch + 4 + 4 + 4  # counters, and the last loss
    assert (found.device, found.compiler, found.devices, found.mesh) == ("cpu", "cpu", 1, {})
    assert found.fits and found.advice == () and found.notes == () and found.unused == 0
    assert found.flops == 2 * ROWS * (IN * HIDDEN + 2 * HIDDEN * OUT) + _of_factors()  # no gradient of x


def _of_factors() -> int:
    """x A, (x A) B; g B^T, (.) A^T where x has a gradient; A's and B's gradients, for which x A is made again. r = 2."""
    sizes = ((IN, HIDDEN, False), (HIDDEN, OUT, True))
    return sum(2 * ROWS * 2 * ((n + m) + m + (n if deep else 0) + n + m + n) for n, m, deep in sizes)


def test_nothing_is_allocated_and_the_environment_stays():
    environment, before = dict(os.environ), len(jax.live_arrays())
    on_cpu(loss_fn, adapt(mlp(), 1), TX, BATCH)
    assert len(jax.live_arrays()) == before and dict(os.environ) == environment


def test_arrays_shapes_and_a_state_give_one_plan():
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), mlp())
    adapted = adapt(params)
    batch = {"x": np.ones((ROWS, IN), jnp.bfloat16)}
    assert on_cpu(loss_fn, adapted, TX, batch) == plain()
    state = TrainState.create(adapt(mlp()), train_step(loss_fn, TX).tx)
    assert on_cpu(loss_fn, state, TX, BATCH) == plain()


def test_codes_of_a_quantised_base_are_its_weights():
    params = {"up": Codes(shape(IN, HIDDEN, dtype=jnp.int8), shape(1, HIDDEN)), "down": shape(HIDDEN, OUT)}
    loss = lambda params, batch: loss_fn(params, {"x": batch["x"].astype(jnp.float32)})
    found = on_cpu(loss, adapt(params, fn=loss), TX, BATCH)
    assert found.weights == IN * HIDDEN + 4 * HIDDEN + 4 * HIDDEN * OUT
    assert found.arguments == found.weights + 2 * FACTORS + found.batch + 12


def test_what_the_step_does_not_read_is_on_the_device_too():
    params = mlp() | {"unread": shape(300, 1000)}
    sites = jlora.sites(loss_fn, mlp(), BATCH)
    found = on_cpu(loss_fn, jlora.apply(params, rank=2, sites=sites), TX, BATCH)
    assert (found.unused, found.peak) == (1_200_000 + 8, plain().peak)  # and the key
    assert "  unused by the step    1.14 MiB" in str(found).splitlines()


NO_SHAPES = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11)
of_arrays_alone = pytest.mark.skipif(NO_SHAPES, reason="JAX 0.10 has no shapes of arrays on the host")


@of_arrays_alone
def test_a_state_on_the_host_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    here, there = plain(), on_cpu(loss_fn, adapt(mlp()), TX, BATCH, memory_kind="pinned_host")
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
    expected = on_cpu(loss_fn, adapt(mlp()), TX, BATCH, memory_kind="pinned_host")
    create = lambda kind: TrainState.create(adapt(mlp()), train_step(loss_fn, TX).tx, memory_kind=kind)
    assert on_cpu(loss_fn, create("pinned_host"), TX, BATCH) == expected
    arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), adapt(mlp()))
    held = TrainState.create(arrays, train_step(loss_fn, TX).tx, memory_kind="pinned_host")
    assert on_cpu(loss_fn, held, TX, BATCH) == expected
    assert on_cpu(loss_fn, create(None), TX, BATCH, memory_kind="pinned_host") == expected
    assert on_cpu(loss_fn, create("pinned_host"), TX, BATCH, memory_kind="device") == plain()


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
        on_cpu(loss_fn, adapt(mlp()), TX, BATCH, memory_kind=kind)


def test_options_are_the_steps():
    whole = on_cpu(lambda p, b, key: loss_fn(p, b), adapt(mlp()), TX, BATCH, pass_key=True)
    assert whole.flops == plain().flops
    parts = on_cpu(loss_fn, adapt(mlp()), TX, BATCH, accumulate=4)
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
    assert on_cpu(loss, adapt(mlp()), TX, BATCH).notes == (
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
    found = on_cpu(scanned, adapted, TX, {"x": shape(ROWS, IN)}, mesh, rule=rule)
    factors = 4 * 2 * (IN + OUT)
    assert set(found.collectives) == {"all-reduce"}
    assert factors <= found.collectives["all-reduce"].bytes <= factors + 16
    assert found.collectives["all-reduce"].wire == round(found.collectives["all-reduce"].bytes * 7 / 4)
    assert (found.devices, found.mesh, found.batch) == (8, {"data": 8}, ROWS * IN * 4 // 8)
    assert found.factors == factors and found.weights == 4 * (3 * IN * IN + IN * OUT)
    alone = on_cpu(scanned, adapted, TX, {"x": shape(ROWS, IN)})
    assert found.flops == alone.flops / 8 and alone.collectives == {}


@pytest.mark.parametrize("kinds", [AxisType.Auto, AxisType.Explicit])
def test_weights_without_a_place_are_fully_sharded(kinds: AxisType):
    """The stack's first axis stays whole, and each layer is gathered in its turn: by hand, in both passes."""
    adapted = adapt(STACK, fn=scanned, batch={"x": shape(ROWS, IN)})
    mesh = AbstractMesh((8,), ("fsdp",), axis_types=(kinds,))
    found = on_cpu(_gathering, adapted, TX, {"x": shape(ROWS, IN)}, mesh)
    assert found.weights == 4 * (3 * IN * IN + IN * OUT) // 8
    assert found.arguments == found.weights + 2 * found.factors + found.batch + 12
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
    found = on_cpu(loss_fn, adapt(params), TX, batch, mesh)
    assert found.weights == 2 * (IN * HIDDEN // 4 + HIDDEN * OUT) and found.batch == ROWS * IN * 2 // 2
    assert found.mesh == {"data": 2, "model": 4}


def test_axes_along_which_nothing_is_split_are_noted():
    """Sizes of 3 that 2 and 4 do not divide; an axis of one device has nothing to split."""
    params, batch = {"w": shape(3, 3)}, {"x": shape(3, 3)}
    loss = lambda p, b: jnp.mean(jnp.square(b["x"] @ p["w"]))
    adapted = adapt(params, 1, loss, batch)
    note = "the mesh's axis {!r} shards nothing: every leaf of state and batch lies whole on each of its {} devices"
    idle = (note.format("x", 2), note.format("y", 4))
    assert on_cpu(loss, adapted, TX, batch, {"x": 2, "y": 4, "z": 1}).notes == idle
    rule = lambda path, x: P(("x", "z")) if path == "batch/x" else None
    batch = {"x": shape(4, 3)}
    assert on_cpu(loss, adapted, TX, batch, {"x": 2, "y": 4, "z": 1}, rule=rule).notes == idle[1:]


def test_a_model_that_says_nothing_of_places_is_planned_on_automatic_axes():
    params = {"a": {"kernel": jnp.ones((64, 32))}, "b": {"kernel": jnp.ones((32, 64))}}
    loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"])
    found = on_cpu(loss, jlora.apply(params, rank=2), optax.sgd(0.1), jnp.ones((8, 64)), mesh={"fsdp": 4})
    assert found.weights == 2 * 64 * 32 * 4 // 4
    assert found.notes == ("the model does not say where its products lie, so that XLA decided it (axes of kind Auto)",)
