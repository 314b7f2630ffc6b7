"""Inputs of any dtype, and arrays whose type says where they lie: the factors meet them as the merged weights do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from tests.conformance import close, measured, normal, randomised

P = PartitionSpec
IN, OUT, ROWS = 8, 6, 16


def forward(params, x):
    return lax.dot_general(x, params["kernel"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def loss_fn(params, x):
    return jnp.mean((x @ params["kernel"] - 1) ** 2)


def adapted(method: jlora.Method | None = None, dtype=jnp.float32) -> jlora.Adapted:
    return randomised(jlora.apply({"kernel": normal(IN, OUT).astype(dtype)}, method=method or jlora.lora(2)))


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bool, jnp.int8, jnp.uint8, jnp.int32, jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize("method", [jlora.lora(2), jlora.dora(2)], ids=lambda method: method.name)
def test_an_input_of_any_dtype_meets_float32_weights_in_float32(method, dtype):
    """One-hot rows, counts, pixels, half activations: the factors are not rounded to the input's dtype."""
    trained = adapted(method)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2 if dtype == jnp.bool else 5, (ROWS, IN)), dtype)
    close(jlora.lift(forward)(trained, x), forward(jlora.merge(trained), x))

    def loss(factors, merged):
        params = trained.replace(factors=factors)
        return jnp.mean((forward(jlora.merge(params), x) if merged else jlora.lift(forward)(params, x)) ** 2)

    close(*(jax.grad(loss)(trained.factors, merged) for merged in (False, True)))


def test_a_small_change_of_doras_magnitude_is_not_swallowed_by_bf16():
    start = jlora.apply({"kernel": normal(64, 64).astype(jnp.bfloat16)}, method=jlora.dora(2))
    moved = jax.tree.map(lambda x: x, start.factors)
    moved["kernel"]["magnitude"] = moved["kernel"]["magnitude"] * 1.003
    x = normal(ROWS, 64).astype(jnp.bfloat16)
    forward = jlora.lift(lambda params, x: x @ params["kernel"])
    before, after = (np.asarray(forward(a, x), np.float32) for a in (start, start.replace(factors=moved)))
    assert np.mean(after / before) == pytest.approx(1.003, abs=0.001)


@pytest.mark.parametrize("method", [jlora.lora(2), jlora.dora(2)], ids=lambda method: method.name)
def test_rows_out_of_bounds_are_filled_as_the_model_says(method):
    table = {"e": normal(10, 6)}
    look_up = lambda params: params["e"].at[jnp.asarray([1, 20, 3])].get(mode="fill", fill_value=3.0)
    trained = randomised(jlora.apply(table, method=method, sites=jlora.sites(look_up, table), targets="e"))
    close(jlora.lift(look_up)(trained), look_up(jlora.merge(trained)))


@pytest.mark.parametrize(
    "method", [jlora.eva(2), jlora.corda(2), jlora.lora_ga(2), jlora.pissa(2), jlora.vera(4)], ids=str
)
def test_an_adapter_made_in_a_program_of_64_bits_is_saved_and_loaded(method, tmp_path):
    with jax.enable_x64(True):
        params = {"kernel": normal(IN, OUT)}
        start = jlora.apply(params, method=method, **measured(method, loss_fn, params, [normal(ROWS, IN)]))
        assert {x.dtype for x in jax.tree.leaves((start.factors, start.buffers))} == {jnp.dtype("float32")}
        jlora.save(tmp_path, start)
        chex.assert_trees_all_equal(jlora.load(tmp_path, params), start)


def test_what_a_method_computes_in_64_bits_is_kept_in_32():
    wide = lambda key, w, site: {
        name: array.astype(jnp.float64) for name, array in jlora.lora(2).acts.init(key, w, site).items()
    }
    with jax.enable_x64(True):
        start = jlora.apply(
            {"kernel": normal(IN, OUT)}, method=jlora.lora(2)._replace(acts=jlora.lora(2).acts.replace(init=wide))
        )
    assert {x.dtype for x in jax.tree.leaves(start.factors)} == {jnp.dtype("float32")}


# -- meshes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    """A mesh with JAX's default axes: the types of arrays say how they are sharded."""
    return jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_on_a_mesh_of_explicit_axes(mesh, accumulate):
    x = normal(ROWS, IN)
    step = jlora.train_step(loss_fn, optax.sgd(0.1), accumulate=accumulate)
    start = adapted()
    expected, metrics = step(jlora.TrainState.create(start, step.tx), x)
    state = jlora.TrainState.create(start, step.tx)
    sharded, their = step(state, jax.device_put(x, NamedSharding(mesh, P("data"))))
    close(jax.device_get(sharded.adapted.factors), jax.device_get(expected.adapted.factors))
    assert float(their["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)


@pytest.mark.parametrize("inside", [True, False], ids=["grad inside", "grad outside"])
def test_lift_inside_shard_map_is_differentiable(mesh, inside):
    factors, frozen = jlora.partition(adapted())
    x = normal(ROWS, IN)
    lifted = jlora.lift(loss_fn)
    loss = lambda factors, x: lax.pmean(lifted(jlora.combine(factors, frozen), x), "data")
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
        inner = jax.grad(loss) if inside else loss
        mapped = jax.shard_map(inner, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        gradient = (mapped if inside else jax.grad(mapped))(factors, sharded)
    expected = jax.grad(lambda factors: lifted(jlora.combine(factors, frozen), x))(factors)
    close(jax.device_get(gradient), jax.device_get(expected))


# -- programs that differ by platform ----------------------------------------------------------------------------------


def test_a_branch_of_another_platform_is_not_lowered():
    def fn(params, x):
        return lax.platform_dependent(x, params["kernel"], cpu=jnp.matmul, tpu=only_elsewhere)

    def only_elsewhere(x, w):
        return jax.ffi.ffi_call("nowhere", jax.ShapeDtypeStruct((ROWS, OUT), x.dtype))(x, w)

    trained, x = adapted(), normal(ROWS, IN)
    close(jax.jit(jlora.lift(fn))(trained, x), x @ jlora.merge(trained)["kernel"])
    (row,) = jlora.explain(fn, trained, x).materialised
    assert row.reason == "branches by platform, of which this one cannot lower all"
