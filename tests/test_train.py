"""`train_step` and `TrainState`: the same numbers as a loop written by hand, under jit, pmap, micro-batches and meshes."""

import dataclasses
import functools
import logging
import re
from collections.abc import Iterator
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.state import TrainState
from jlora.train import Step, train_step

IN, HIDDEN, OUT, BATCH = 20, 28, 12, 16
# Sums in another order (over micro-batches, devices, factors instead of merged weights): a few float32 roundings.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
    "up": {"kernel": random(1, IN, HIDDEN) / 4, "bias": random(2, HIDDEN) / 4},
    "down": {"kernel": random(3, HIDDEN, OUT) / 4, "bias": random(4, OUT) / 4},
}
DATA = {"x": random(5, BATCH, IN), "y": random(6, BATCH, OUT)}
TX = optax.sgd(0.1, momentum=0.9)


def predict(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])  # (batch, hidden)
    return hidden @ params["down"]["kernel"] + params["down"]["bias"][None]  # (batch, out)


def loss_fn(params, batch):
    return jnp.mean(jnp.square(predict(params, batch["x"]) - batch["y"]))


@functools.cache
def adapt(*, method: jlora.Method | None = None, extras: str = "up/bias") -> jlora.Adapted:
    """LoRA of rank 4 and a trained bias; B is random, as after some steps, so that every factor has a gradient."""
    adapted = jlora.apply(jax.tree.map(jnp.asarray, PARAMS), method=method or jlora.lora(4, 8), extras=extras)
    factors = {path: dict(arrays) for path, arrays in adapted.factors.items()}
    for site in adapted.sites:
        factors[site.path]["B"] = jnp.asarray(random(len(site.path), *factors[site.path]["B"].shape)) / 4
    return adapted.replace(factors=factors)


def merged(factors):
    """`W0 + (alpha/r) B A`, written out."""

    def weight(name):
        a, b = factors[f"{name}/kernel"]["A"][:, 0, :], factors[f"{name}/kernel"]["B"][0].T  # (in, r), (r, out)
        return PARAMS[name]["kernel"] + 8 / 4 * a @ b

    return {
        "up": {"kernel": weight("up"), "bias": factors["up/bias"]["value"]},
        "down": {"kernel": weight("down"), "bias": PARAMS["down"]["bias"]},
    }


def by_hand(factors, tx, steps, loss=lambda factors: loss_fn(merged(factors), DATA)):
    @jax.jit
    def update(factors, opt_state):
        value, gradient = jax.value_and_grad(loss)(factors)
        updates, opt_state = tx.update(gradient, opt_state, factors)
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
        return optax.apply_updates(factors, updates), opt_state, value, norm

    opt_state, losses, norms = tx.init(factors), [], []
    for _ in range(steps):
        factors, opt_state, value, norm = update(factors, opt_state)
        losses.append(float(value))
        norms.append(float(norm))
    return factors, losses, norms


@functools.cache
def expected(steps):
    """What training of `adapt()` with `TX` on `DATA` gives."""
    return by_hand(adapt().factors, TX, steps)


@functools.cache
def shared_step(**options: Any) -> Step:
    """The step of `loss_fn` and `TX`, so that the tests compile it once for each set of options."""
    return train_step(loss_fn, TX, **options)


def train(step, state, steps, batch=DATA):
    losses, norms = [], []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return state, losses, norms


# -- the same numbers as by hand ---------------------------------------------------------------------------------------


WAYS = [
    {},
    {"accumulate": 4},
    {"parallel": "pmap"},
    {"parallel": "pmap", "accumulate": 2},
    {"donate": False},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_trains_as_a_loop_by_hand_on_merged_weights(options):
    adapted = adapt()
    factors, losses, norms = expected(4)
    step = shared_step(**options)
    state, got_losses, got_norms = train(step, TrainState.create(adapted, step.tx), 4)
    state.check()
    chex.assert_trees_all_close(state.adapted.factors, factors, **CLOSE)
    np.testing.assert_allclose(got_losses, losses, rtol=1e-5)
    np.testing.assert_allclose(got_norms, norms, rtol=1e-5)
    assert int(state.step) == 4
    assert float(state.loss) == got_losses[-1]
    chex.assert_trees_all_equal_shapes_and_dtypes(state, TrainState.create(adapted, step.tx))


@pytest.mark.loose_promotion  # optax multiplies integers and floats
def test_trains_with_adamw():
    adapted, tx = adapt(), optax.adamw(optax.linear_schedule(1e-2, 0.0, 10), weight_decay=0.1)
    factors, losses, _ = by_hand(adapted.factors, tx, 4)
    step = train_step(loss_fn, tx)
    state, got, _ = train(step, TrainState.create(adapted, tx), 4)  # the bare tx is wrapped as the step's is
    chex.assert_trees_all_close(state.adapted.factors, factors, **CLOSE)
    np.testing.assert_allclose(got, losses, rtol=1e-5)


def test_full_fine_tuning_is_plain_training():
    adapted = jlora.apply(jax.tree.map(jnp.asarray, PARAMS), targets=(), extras=".*")
    params, losses, norms = by_hand(jax.tree.map(jnp.asarray, PARAMS), TX, 4, lambda params: loss_fn(params, DATA))
    step = shared_step()
    state, got_losses, got_norms = train(step, TrainState.create(adapted, step.tx), 4)
    chex.assert_trees_all_close(jlora.merge(state.adapted), params, **CLOSE)
    np.testing.assert_allclose(got_losses, losses, rtol=1e-5)
    np.testing.assert_allclose(got_norms, norms, rtol=1e-5)
    chex.assert_trees_all_equal(state.adapted.base, PARAMS)


def test_dora_keeps_its_buffers():
    step = shared_step()
    before = TrainState.create(adapt(method=jlora.dora(2)), step.tx)
    after, losses, _ = train(step, before, 8)
    assert losses[-1] < losses[0]
    for path, arrays in before.adapted.buffers.items():
        for name, array in arrays.items():
            assert after.adapted.buffers[path][name] is array


def test_a_bf16_base_trains_float32_factors():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    data = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), DATA)
    step = shared_step()
    state, losses, _ = train(step, TrainState.create(jlora.apply(params, rank=4), step.tx), 8, data)
    assert losses[-1] < losses[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.adapted.base)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.adapted.factors)} == {"float32"}
    assert state.loss.dtype == jnp.float32


def test_a_module_with_functions_as_leaves():
    def loss(model, batch):
        return jnp.mean(jnp.square(jax.vmap(model)(batch["x"]) - batch["y"]))

    model = eqx.nn.MLP(IN, OUT, HIDDEN, 1, activation=jnp.tanh, key=jax.random.key(0))
    assert any(callable(leaf) for leaf in jax.tree.leaves(model))
    sites = jlora.sites(loss, model, jax.tree.map(jnp.asarray, DATA))
    adapted = jlora.apply(model, rank=4, sites=[site for site in sites if site.kind == "linear"])
    assert [site.path for site in adapted.sites] == ["layers/0/weight", "layers/1/weight"]
    for options in ({}, {"parallel": "pmap"}):
        step = train_step(loss, TX, **options)
        state, losses, _ = train(step, TrainState.create(adapted, step.tx), 8)
        assert losses[-1] < losses[0]
        assert jlora.merge(state.adapted).activation is model.activation


# -- what is differentiated, donated, compiled -------------------------------------------------------------------------


def is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those inside it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn
        for param in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr):
            if is_jaxpr(param):
                yield from equations(param)


def shapes_made(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of all that is computed, axes sorted, as a transposed gradient is one too. stop_gradient computes nothing."""
    made = [var.aval for eqn in equations(jaxpr) if eqn.primitive.name != "stop_gradient" for var in eqn.outvars]
    return {tuple(sorted(aval.shape)) for aval in made if hasattr(aval, "shape")}


def constants(jaxpr: Any) -> list[Any]:
    """The arrays that a jaxpr, or one inside it, has closed over."""
    inner = [leaf for eqn in equations(jaxpr) for leaf in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr)]
    return [const for one in (jaxpr, *inner) for const in getattr(one, "consts", ())]


def trace(step: Any, adapted: jlora.Adapted) -> Any:
    arguments = step.arguments(TrainState.create(adapted, step.tx), DATA)
    return jax.make_jaxpr(step.program, static_argnums=4)(*arguments)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("method", [jlora.lora(4), jlora.dora(4)], ids=["lora", "dora"])
def test_no_gradient_of_the_base_is_formed(method, accumulate):
    kernels = {tuple(sorted(PARAMS[name]["kernel"].shape)) for name in PARAMS}
    step = shared_step(accumulate=accumulate)
    assert not kernels & shapes_made(trace(step, adapt(method=method)))
    # The same look at full fine-tuning does find them.
    assert kernels <= shapes_made(trace(step, jlora.apply(PARAMS, targets=(), extras=".*")))


def test_the_base_is_an_argument_and_no_output():
    kernels = {PARAMS[name]["kernel"].shape for name in PARAMS}
    closed = jnp.ones((IN, HIDDEN))
    leaky = train_step(lambda params, batch: loss_fn(params, batch) + jnp.sum(closed), TX)
    assert kernels & {const.shape for const in constants(trace(leaky, adapt()))}  # so that the next line can fail
    program = trace(shared_step(), adapt())
    assert not kernels & {const.shape for const in constants(program)}
    assert kernels <= {aval.shape for aval in program.in_avals}
    assert not kernels & {aval.shape for aval in program.out_avals}


def test_donates_the_trained_part_and_never_the_base():
    step = shared_step()
    adapted = adapt(method=jlora.dora(2))
    first = TrainState.create(adapted, step.tx)
    second, metrics = step(first, DATA)
    third, _ = step(second, DATA)
    for old, new in ((first, second), (second, third)):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.adapted.factors, old.opt_state)))
        for one, other in zip(jax.tree.leaves(old.adapted.base), jax.tree.leaves(new.adapted.base), strict=True):
            assert one is other and not one.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((third, metrics, first.key, second.loss)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(adapted)), "the caller's factors were copied"
    assert isinstance(second.adapted.base, dict) and second.adapted.key is None


def test_full_fine_tuning_leaves_the_base_alone():
    params = jax.tree.map(jnp.asarray, PARAMS)
    step = shared_step()
    state = TrainState.create(jlora.apply(params, targets=(), extras=".*"), step.tx)
    train(step, state, 2)
    chex.assert_trees_all_equal(params, PARAMS)


def test_without_donation_the_old_state_stays():
    step = shared_step(donate=False)
    state = TrainState.create(adapt(), step.tx)
    one, other = step(state, DATA), step(state, DATA)
    chex.assert_trees_all_equal(one[0].adapted.factors, other[0].adapted.factors)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def compilations(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]


def mesh(**axes: int) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(tuple(axes.values())), tuple(axes))


def on_mesh(base: P, batch: P) -> tuple[jlora.Adapted, Any]:
    """The kernels and the batch on a mesh of 2 x 4 devices, the factors wherever `apply` left them."""
    axes = mesh(data=2, model=4)
    adapted = adapt()
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(axes, base if x.ndim == 2 else P())), adapted.base)
    return adapted.replace(base=placed), jax.device_put(DATA, NamedSharding(axes, batch))


def single() -> tuple[jlora.Adapted, Any]:
    return adapt(), DATA


PLACES = {
    "single": single,
    "committed": lambda: (adapt(), jax.device_put(DATA, jax.devices()[3])),
    "data-parallel": lambda: on_mesh(P(), P(("data", "model"))),
    "tensor-sharded": lambda: on_mesh(P(None, "model"), P("data")),
    "rows-sharded": lambda: on_mesh(P("model", None), P()),
    "sharded-batch-alone": lambda: (adapt(), jax.device_put(DATA, NamedSharding(mesh(data=8), P("data")))),
}


@pytest.mark.parametrize(
    ("place", "accumulate"), [*((place, 1) for place in PLACES), ("data-parallel", 2), ("tensor-sharded", 2)]
)
def test_meshes_give_the_same_numbers_and_compile_once(place, accumulate, caplog):
    adapted, batch = PLACES[place]()
    if place == "sharded-batch-alone":
        adapted = adapted.replace(base=jax.device_put(adapted.base, NamedSharding(batch["x"].sharding.mesh, P())))
    if place == "committed":
        adapted = adapted.replace(base=jax.device_put(adapted.base, jax.devices()[3]))
    factors, losses, _ = expected(3)
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    step = train_step(counted, TX, accumulate=accumulate)
    state, first, _ = train(step, TrainState.create(adapted, step.tx), 1, batch)
    placed = [leaf.sharding for leaf in jax.tree.leaves((state.adapted.factors, state.opt_state, state.step))]
    count = len(traces)
    with jax.log_compiles(), caplog.at_level(logging.WARNING), jax.transfer_guard("disallow"):
        for _ in range(2):
            state, metrics = step(state, batch)
    assert compilations(caplog) == []
    assert len(traces) == count
    chex.assert_trees_all_close(jax.device_get(state.adapted.factors), factors, **CLOSE)
    np.testing.assert_allclose([first[0], metrics["loss"]], [losses[0], losses[2]], rtol=1e-5)
    assert [leaf.sharding for leaf in jax.tree.leaves((state.adapted.factors, state.opt_state, state.step))] == placed
    for one, other in zip(jax.tree.leaves(state.adapted.base), jax.tree.leaves(adapted.base), strict=True):
        assert one is other


def test_a_new_shape_of_the_batch_does_compile(caplog):
    step = shared_step()
    state, _ = step(TrainState.create(adapt(), step.tx), DATA)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        step(state, jax.tree.map(lambda x: x[:8], DATA))
    assert len(compilations(caplog)) == 1  # so that the count above can fail


def test_sharded_factors_stay_sharded():
    adapted, batch = on_mesh(P(None, "model"), P("data"))
    sharding = NamedSharding(adapted.base["up"]["kernel"].sharding.mesh, P(None, "model", None))
    arrays = adapted.factors["up/kernel"]
    up = {"up/kernel": arrays | {"B": jax.device_put(arrays["B"], sharding)}}
    adapted = adapted.replace(factors=adapted.factors | up)
    step = shared_step()
    state, _, _ = train(step, TrainState.create(adapted, step.tx), 2, batch)
    assert state.adapted.factors["up/kernel"]["B"].sharding == sharding


def test_pmap_moves_the_state_once(caplog):
    step = shared_step(parallel="pmap")
    adapted = adapt()
    state, _ = step(TrainState.create(adapted, step.tx), DATA)
    with jax.log_compiles(), caplog.at_level(logging.WARNING), jax.transfer_guard_device_to_device("disallow"):
        again, _ = step(state, DATA)
    assert compilations(caplog) == []
    for one, other in zip(jax.tree.leaves(state.adapted.base), jax.tree.leaves(again.adapted.base), strict=True):
        assert one is other and one.sharding.is_fully_replicated and len(one.sharding.device_set) == 8
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.adapted.factors, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(adapted))
    chex.assert_trees_all_equal(jlora.merge(again.adapted)["down"]["bias"], PARAMS["down"]["bias"])


def test_a_state_goes_from_pmap_to_jit_and_back():
    factors, losses, _ = expected(3)
    steps = [shared_step(parallel=parallel) for parallel in ("pmap", "jit", "pmap")]
    state = TrainState.create(adapt(), TX)
    for step, loss in zip(steps, losses, strict=True):
        state, metrics = step(state, DATA)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    chex.assert_trees_all_close(jax.device_get(state.adapted.factors), factors, **CLOSE)


def test_a_numpy_base_is_sent_to_the_device_once():
    step = shared_step()
    state = TrainState.create(jlora.apply(PARAMS, rank=4), step.tx)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    state, _ = step(state, DATA)
    with jax.transfer_guard("disallow"):
        state, _ = step(state, DATA)
        state.check()


def test_lower_gives_the_cost_of_the_compiled_step():
    for parallel in ("jit", "pmap"):
        step = shared_step(parallel=parallel)
        compiled = step.lower(TrainState.create(adapt(), step.tx), DATA).compile()
        assert compiled.cost_analysis()["flops"] > 0
        assert compiled.memory_analysis().temp_size_in_bytes >= 0


# -- keys --------------------------------------------------------------------------------------------------------------


def test_dropout_has_a_mask_of_its_own_at_every_step():
    adapted = adapt(method=jlora.lora(4, 8, dropout=0.5))
    step = train_step(loss_fn, optax.set_to_zero())  # the factors stay: only the masks differ
    _, losses, _ = train(step, TrainState.create(adapted, step.tx, key=7), 3)
    _, again, _ = train(step, TrainState.create(adapted, step.tx, key=jax.random.key(7)), 3)
    _, other, _ = train(step, TrainState.create(adapted, step.tx, key=8), 3)
    assert losses == again
    assert len({*losses, *other}) == 6
    np.testing.assert_raises(AssertionError, np.testing.assert_allclose, losses[0], expected(1)[1], rtol=1e-3)


def test_without_dropout_no_random_number_is_drawn():
    def drawn(dropout):
        jaxpr = trace(train_step(loss_fn, optax.sgd(0.1)), adapt(method=jlora.lora(4, dropout=dropout)))
        return [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "random_bits"]

    assert len(drawn(0.5)) >= 2
    assert drawn(0.0) == []


def test_micro_batches_and_devices_have_masks_of_their_own():
    adapted = adapt(method=jlora.lora(4, 8, dropout=0.5))
    same = jax.tree.map(lambda x: np.repeat(x[:1], BATCH, 0), DATA)

    def first_of(params, batch):
        return loss_fn(params, jax.tree.map(lambda x: x[:1], batch))

    losses = []
    for options in ({}, {"accumulate": 2}, {"parallel": "pmap"}):
        step = train_step(first_of, TX, **options)
        losses.append(float(step(TrainState.create(adapted, step.tx), same)[1]["loss"]))
    assert len(set(losses)) == 3  # with one mask for all, the mean over equal micro-batches would be that of one


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2}, {"parallel": "pmap"}, {"parallel": "pmap", "accumulate": 2}], ids=str
)
def test_the_loss_gets_a_key_of_step_device_and_micro_batch(options):
    def loss(params, batch, key):
        return loss_fn(params, batch), {"draw": jax.random.uniform(key)}

    step = train_step(loss, TX, has_aux=True, pass_key=True, **options)
    state = TrainState.create(adapt(), step.tx, key=3)
    for t in range(2):
        state, metrics = step(state, DATA)
        keys = [jax.random.fold_in(jax.random.key(3), t)]
        if options.get("parallel") == "pmap":
            keys = [jax.random.fold_in(key, device) for key in keys for device in range(8)]
        keys = [jax.random.fold_in(key, i) for key in keys for i in range(options.get("accumulate", 1))]
        draws = [float(jax.random.uniform(jax.random.split(key)[1])) for key in keys]
        assert len(set(draws)) == len(keys)
        np.testing.assert_allclose(metrics["draw"], np.mean(draws), rtol=1e-6)
    assert bool(jnp.array_equal(jax.random.key_data(state.key), jax.random.key_data(jax.random.key(3))))


def test_an_optimizer_with_random_state_and_hyperparameters(caplog):
    tx = optax.inject_hyperparams(
        lambda learning_rate: optax.chain(optax.sgd(learning_rate), optax.add_noise(0.1, 0.5, 0))
    )
    step = train_step(loss_fn, tx(0.1))
    with jax.numpy_dtype_promotion("standard"):
        state, _ = step(TrainState.create(adapt(), step.tx), DATA)
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            step(state, DATA)
    assert compilations(caplog) == []


@pytest.mark.loose_promotion  # optax multiplies integers and floats
def test_an_optimizer_that_reads_the_loss():
    step = train_step(loss_fn, optax.chain(optax.sgd(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1)))
    state, _, _ = train(step, TrainState.create(adapt(), step.tx), 4)
    assert (
        float(optax.tree.get(state.opt_state, "scale")) == 0.125
    )  # the loss stays the same: halved at every step but the first


# -- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", WAYS[:-1], ids=str)
def test_aux_joins_the_metrics(options):
    def loss(params, batch):
        error = jnp.abs(predict(params, batch["x"]) - batch["y"])
        return jnp.mean(jnp.square(error)), {"error": {"mean": jnp.mean(error)}}

    step = train_step(loss, TX, has_aux=True, **options)
    _, metrics = step(TrainState.create(adapt(), step.tx), DATA)
    assert set(metrics) == {"loss", "grad_norm", "error"}
    expected = np.mean(np.abs(predict(merged(adapt().factors), DATA["x"]) - DATA["y"]))
    np.testing.assert_allclose(metrics["error"]["mean"], expected, rtol=1e-5)


def test_aux_of_any_kind_without_micro_batches():
    step = train_step(lambda p, b: (loss_fn(p, b), {"rows": jnp.arange(3)}), TX, has_aux=True)
    _, metrics = step(TrainState.create(adapt(), step.tx), DATA)
    assert metrics["rows"].tolist() == [0, 1, 2]


# -- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_loss_that_is_not_finite_stops_training_and_says_where(options):
    bad = DATA | {"x": np.where(np.arange(BATCH)[:, None] == 5, np.float32(np.nan), DATA["x"])}
    step = shared_step(**options)
    state, _, _ = train(step, TrainState.create(adapt(), step.tx), 2)
    before = jax.device_get((state.adapted.factors, state.opt_state))
    state, metrics = step(state, bad)
    assert np.isnan(metrics["loss"])
    message = (
        "loss is nan at step 3 (nan also where the gradient alone is not finite): that update was not applied, the "
        "factors are those before it. Lower the learning rate, clip the gradient (optax.clip_by_global_norm), or look "
        "at this step's batch; jax.config.update('jax_debug_nans', True) names the operation."
    )
    state, metrics = step(state, DATA)  # which is started before anyone has looked
    assert np.isnan(metrics["loss"]) and np.isnan(state.loss) and (int(state.step), int(state.skipped)) == (3, 1)
    for _ in range(2):  # it stays stopped, and the state stays whole
        with pytest.raises(FloatingPointError, match=f"^{re.escape(message)}$"):
            step(state, DATA)
    with pytest.raises(FloatingPointError, match=f"^{re.escape(message)}$"):
        state.check()
    chex.assert_trees_all_equal(jax.device_get((state.adapted.factors, state.opt_state)), before)


def test_an_infinite_loss_is_named():
    step = train_step(lambda p, b: loss_fn(p, b) / 0.0, TX)
    state, _ = step(TrainState.create(adapt(), step.tx), DATA)
    with pytest.raises(FloatingPointError, match="^loss is inf at step 1 "):
        state.check()


def test_a_gradient_that_is_not_finite_stops_training_too():
    def loss(params, batch):
        return jnp.sqrt(loss_fn(params, batch) * 0.0)  # 0, with the gradient inf * 0

    step = train_step(loss, TX)
    state = TrainState.create(adapt(), step.tx)
    before = jax.device_get(state.adapted.factors)
    state, metrics = step(state, DATA)
    assert float(metrics["loss"]) == 0.0 and not np.isfinite(metrics["grad_norm"])
    state, _ = step(state, DATA)
    with pytest.raises(FloatingPointError, match="^loss is nan at step 1 "):
        step(state, DATA)
    chex.assert_trees_all_equal(jax.device_get(state.adapted.factors), before)


# -- parts of unequal weight -------------------------------------------------------------------------------------------

REAL = np.arange(5)[None] < np.array([5, 1, 4, 0, 3, 0, 0, 0, 2, 5, 5, 0, 1, 0, 4, 0])[:, None]  # (batch, tokens)
TOKENS = {"x": random(7, BATCH, 5, IN), "y": random(8, BATCH, 5, OUT), "real": REAL}


def token_loss(params, batch):
    """The mean over the real tokens, their number, and another mean of them."""
    hidden = jnp.tanh(jnp.einsum("bti,ih->bth", batch["x"], params["up"]["kernel"]) + params["up"]["bias"][None, None])
    error = jnp.einsum("bth,ho->bto", hidden, params["down"]["kernel"]) - batch["y"]
    real = batch["real"].astype(jnp.float32)
    count = jnp.sum(real)
    mean = lambda each: jnp.sum(each * real) / count  # 0 / 0 where no token is real, and so is its gradient
    return mean(jnp.mean(error**2, -1)), jnp.sum(batch["real"]), {"error": mean(jnp.mean(jnp.abs(error), -1))}


@functools.cache
def whole_batch():
    step = train_step(token_loss, TX, weighted=True, has_aux=True)
    state, metrics = step(TrainState.create(adapt(), step.tx), TOKENS)
    assert float(metrics["weight"]) == REAL.sum() and np.isfinite(metrics["loss"])
    loss, _, _ = token_loss(merged(adapt().factors), TOKENS)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    return state.adapted.factors, metrics


@pytest.mark.parametrize(
    "options", [{"accumulate": 8}, {"parallel": "pmap"}, {"parallel": "pmap", "accumulate": 2}], ids=str
)
def test_weighted_parts_are_the_whole_batch(options):
    factors, expected = whole_batch()
    parts = 8 * options.get("accumulate", 1) if "parallel" in options else options["accumulate"]
    counts = [REAL[i::parts].sum() for i in range(parts)] if "parallel" not in options else REAL.sum(1)
    assert len(set(counts)) > 2 and min(counts) == 0  # unequal, and one without a token
    step = train_step(token_loss, TX, weighted=True, has_aux=True, **options)
    state, metrics = step(TrainState.create(adapt(), step.tx), TOKENS)
    chex.assert_trees_all_close(jax.device_get(state.adapted.factors), factors, **CLOSE)
    chex.assert_trees_all_close(jax.device_get(metrics), jax.device_get(expected), rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weighted_parts_on_a_mesh_are_the_whole_batch(accumulate):
    factors, expected = whole_batch()
    axes = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    adapted = adapt().replace(base=jax.device_put(adapt().base, NamedSharding(axes, P())))
    batch = jax.device_put(TOKENS, NamedSharding(axes, P("data")))
    step = train_step(token_loss, TX, weighted=True, has_aux=True, accumulate=accumulate)
    state, metrics = step(TrainState.create(adapted, step.tx), batch)
    chex.assert_trees_all_close(jax.device_get(state.adapted.factors), factors, **CLOSE)
    chex.assert_trees_all_close(jax.device_get(metrics), jax.device_get(expected), rtol=1e-5)


@pytest.mark.parametrize("options", [{"accumulate": 8}, {"parallel": "pmap", "accumulate": 2}], ids=str)
@pytest.mark.parametrize("clamped", [False, True])
def test_a_plain_mean_of_tokens_is_averaged_by_its_count(options, clamped):
    def loss(params, batch):
        hidden = jnp.einsum("bti,ih->bth", batch["x"], params["up"]["kernel"]) + params["up"]["bias"][None, None]
        each = jnp.mean(jnp.einsum("bth,ho->bto", jnp.tanh(hidden), params["down"]["kernel"]) ** 2, -1)
        real = batch["real"].astype(jnp.float32)
        return jnp.sum(each * real) / (jnp.maximum(jnp.sum(real), 1) if clamped else jnp.sum(real))

    whole, parts = train_step(loss, TX), train_step(jax.jit(loss), TX, **options)
    expected, metrics = whole(TrainState.create(adapt(), whole.tx), TOKENS)
    got, of_parts = parts(TrainState.create(adapt(), parts.tx), TOKENS)
    chex.assert_trees_all_close(*jax.device_get((got.adapted.factors, expected.adapted.factors)), **CLOSE)
    np.testing.assert_allclose(of_parts["loss"], metrics["loss"], rtol=1e-5)
    assert float(of_parts["weight"]) == REAL.sum()


def test_a_mean_that_is_zero_without_a_token_stays_it():
    def loss(params, batch):
        each = jnp.mean(jnp.einsum("bti,ih->bth", batch["x"], params["up"]["kernel"]) ** 2, -1)
        hidden = jnp.einsum("bth,ho->bto", jnp.tanh(batch["y"] @ params["down"]["kernel"].T), params["down"]["kernel"])
        real = batch["real"].astype(jnp.float32)
        return jnp.sum((each + jnp.mean(hidden, -1)) * real) / jnp.maximum(jnp.sum(real), 1)

    step = train_step(loss, TX, accumulate=2)
    state, metrics = step(TrainState.create(adapt(), step.tx), TOKENS | {"real": np.zeros_like(REAL)})
    state.check()
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0


def test_a_batch_without_a_token_stops_training():
    step = train_step(token_loss, TX, weighted=True, has_aux=True, accumulate=2)
    state, _ = step(TrainState.create(adapt(), step.tx), TOKENS | {"real": np.zeros_like(REAL)})
    with pytest.raises(FloatingPointError, match="^loss is nan at step 1 "):
        state.check()


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (loss_fn, {}, "weighted=True: loss_fn returns (loss, weight), got"),
        (lambda p, b: (loss_fn(p, b), 3, {}), {}, "weighted=True: loss_fn returns (loss, weight), got a tuple of 3"),
        (lambda p, b: (loss_fn(p, b), {}), {"has_aux": True},
         "weighted=True and has_aux=True: loss_fn returns (loss, weight, dict of metrics), got a tuple of 2"),
        (lambda p, b: (loss_fn(p, b), jnp.ones(3)), {},
         "weighted=True: the weight is a real scalar, the number of tokens or examples, got an array of shape (3,) and "
         "type float32"),
        (lambda p, b: (loss_fn(p, b), {}), {}, "weighted=True: the weight is a real scalar, the number of tokens or"),
    ],
)  # fmt: skip
def test_weights_are_checked(loss, options, message):
    step = train_step(loss, TX, weighted=True, **options)
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        step(TrainState.create(adapt(), step.tx), DATA)


# -- going on after a step that is not finite --------------------------------------------------------------------------


def spoilt(value: float) -> Any:
    return DATA | {"x": np.where(np.arange(BATCH)[:, None] == 5, np.float32(value), DATA["x"])}


@pytest.mark.parametrize("options", [{}, {"parallel": "pmap", "accumulate": 2}], ids=str)
def test_steps_that_are_not_finite_are_skipped_and_counted(options):
    factors, losses, _ = expected(2)
    step = shared_step(nonfinite="skip", **options)
    state, first, _ = train(step, TrainState.create(adapt(), step.tx), 1)
    for value in (np.nan, np.inf):
        state, metrics = step(state, spoilt(value))
        assert not np.isfinite(metrics["loss"]) and float(state.loss) == first[0]
    state, second, _ = train(step, state, 1)
    state.check()
    chex.assert_trees_all_close(jax.device_get(state.adapted.factors), factors, **CLOSE)
    np.testing.assert_allclose([*first, *second], losses, rtol=1e-5)
    assert (int(state.skipped), int(state.step)) == (2, 4)


def test_the_count_is_in_a_checkpoint(tmp_path):
    step = shared_step(nonfinite="skip")
    state, _ = step(TrainState.create(adapt(), step.tx), spoilt(np.nan))
    with jlora.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        state, _ = checkpoints.restore(TrainState.create(adapt(), step.tx))
    assert (int(state.skipped), int(state.step)) == (1, 1)
    assert state.skipped.dtype == jnp.int32


HANDLED = {
    "apply_if_finite": (lambda: optax.apply_if_finite(TX, 2), "total_notfinite", 1),
    "in a chain": (lambda: optax.chain(optax.clip(1e3), optax.apply_if_finite(TX, 2)), "total_notfinite", 1),
    "MultiSteps": (
        lambda: optax.MultiSteps(TX, 1, should_skip_update_fn=optax.skip_not_finite),
        "num_not_finite",
        None,
    ),
}


@pytest.mark.loose_promotion  # optax multiplies integers and floats
@pytest.mark.parametrize("name", HANDLED)
def test_an_optimizer_that_deals_with_it_keeps_its_state(name):
    make, field, count = HANDLED[name]
    step = train_step(loss_fn, make())
    state, _, _ = train(step, TrainState.create(adapt(), step.tx), 1)
    state, metrics = step(state, spoilt(np.nan))
    assert np.isnan(metrics["loss"]) and np.isfinite(state.loss)
    if count is not None:
        assert int(optax.tree.get(state.opt_state, field)) == count
    state, _, _ = train(step, state, 1)
    state.check()
    chex.assert_trees_all_close(jax.device_get(state.adapted.factors), expected(2)[0], **CLOSE)
    assert int(state.skipped) == 1


@pytest.mark.loose_promotion  # optax multiplies integers and floats
def test_what_the_optimizer_lets_through_stops_training():
    step = train_step(loss_fn, optax.apply_if_finite(TX, 1))
    state = TrainState.create(adapt(), step.tx)
    before = jax.device_get(state.adapted.factors)
    for batch in (spoilt(np.nan), spoilt(np.nan), DATA):
        state, _ = step(state, batch)
    with pytest.raises(FloatingPointError, match="^loss is nan at step 2 "):
        step(state, DATA)
    chex.assert_trees_all_equal(jax.device_get(state.adapted.factors), before)
    strict = train_step(loss_fn, optax.apply_if_finite(TX, 2), nonfinite="raise")
    state, _ = strict(TrainState.create(adapt(), strict.tx), spoilt(np.nan))
    state, _ = strict(state, DATA)
    with pytest.raises(FloatingPointError, match="^loss is nan at step 1 "):
        strict(state, DATA)


def test_a_step_is_started_before_the_one_before_it_is_looked_at():
    """The last loss is not asked for: it may still be computed. A state that no step made is looked at itself."""
    step = shared_step()
    state, _, _ = train(step, TrainState.create(adapt(), step.tx), 2)

    class Unread(float):
        def __float__(self):
            raise AssertionError("somebody waits for the last step")

    waiting = dataclasses.replace(state, loss=jnp.float32(np.inf)).after(dataclasses.replace(state, loss=Unread()))
    assert waiting.before is not None and jax.tree.structure(waiting) == jax.tree.structure(state)
    with pytest.raises(AssertionError, match="^somebody waits"):
        waiting.check(last=False)  # of the step before, and of no other
    late = dataclasses.replace(state, loss=Unread()).after(state)
    late.check(last=False)
    with pytest.raises(AssertionError, match="^somebody waits"):
        late.check()
    for copy in (dataclasses.replace(late, loss=state.loss), jax.tree.map(lambda x: x, late)):
        assert copy.before is None


def test_a_dynamic_loss_scale_of_ones_own():
    def init(factors):
        return {"scale": jnp.float32(2.0**126)}

    def update(gradients, state, factors=None):
        finite = jnp.isfinite(optax.tree.norm(gradients))
        updates = jax.tree.map(lambda g: jnp.where(finite, -0.1 * g / state["scale"], 0.0), gradients)
        return updates, {"scale": jnp.where(finite, state["scale"], state["scale"] / 2.0**126)}

    def loss(params, batch):
        return loss_fn(params, batch) * batch["scale"]

    step = train_step(loss, optax.GradientTransformation(init, update), nonfinite="optimizer")
    state = TrainState.create(adapt(), step.tx)
    for _ in range(2):
        state, _ = step(state, DATA | {"scale": state.opt_state.inner["scale"] * 1e3})
    assert int(state.skipped) == 1 and float(state.opt_state.inner["scale"]) == 1.0
    assert np.isfinite(state.loss)


# -- where things lie --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_that_lies_nowhere_in_particular_is_moved_once(sharded):
    with jax.default_device(jax.devices()[0 if sharded else 5]):
        base = jax.tree.map(jnp.array, PARAMS)
    batch = jax.device_put(DATA, NamedSharding(mesh(data=8), P("data"))) if sharded else DATA
    assert not base["up"]["kernel"].committed
    step = shared_step()
    state, _ = step(TrainState.create(adapt().replace(base=base), step.tx), batch)
    with jax.transfer_guard_device_to_device("disallow"):
        again, metrics = step(state, batch)
    for one, other in zip(jax.tree.leaves(state.adapted.base), jax.tree.leaves(again.adapted.base), strict=True):
        assert one is other and one.sharding.device_set == metrics["loss"].sharding.device_set
    assert len(metrics["loss"].sharding.device_set) == (8 if sharded else 1)
    if not sharded:
        assert metrics["loss"].devices() == {jax.devices()[5]}
        assert (
            again.adapted.base["up"]["kernel"].unsafe_buffer_pointer() == base["up"]["kernel"].unsafe_buffer_pointer()
        )
    assert float(metrics["loss"]) == pytest.approx(expected(2)[1][1], rel=1e-5)


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        (np.array(["one", "two"] * 8), "batch['text'] is an array of <U3, and a step takes numbers: leave this column out"),
        (["one", "two"] * 8, "batch['text'][0] is the text 'one', and a step takes numbers: leave this column out of the"),
        (np.array([None, 1] * 8), "batch['text'] is an array of object, and a step takes numbers"),
    ],
)  # fmt: skip
def test_a_column_of_texts_is_named(column, message, parallel):
    step = shared_step(parallel=parallel)
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        step(TrainState.create(adapt(), step.tx), DATA | {"text": column})


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": "xmap"}, "parallel='xmap' is unknown: choose 'jit' or 'pmap'"),
        ({"accumulate": 0}, "accumulate is the number of micro-batches, an integer of at least 1, got 0"),
        ({"accumulate": 2.0}, "accumulate is the number of micro-batches, an integer of at least 1, got 2.0"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore' is unknown: choose 'raise', 'skip' or 'optimizer'"),
        ({"accumulate": True}, "accumulate is the number of micro-batches, an integer of at least 1, got True"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_step(loss_fn, TX, **options)


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (lambda p, b: predict(p, b["x"]), {}, ValueError,
         f"loss_fn returns a scalar, got an array of shape ({BATCH}, {OUT}): take its mean"),
        (lambda p, b: loss_fn(p, b).astype(jnp.int32), {}, TypeError, "loss_fn returns a real scalar, got one of type int32"),
        (lambda p, b: loss_fn(p, b).astype(jnp.complex64), {}, TypeError, "loss_fn returns a real scalar, got one of type complex64"),
        (lambda p, b: {"loss": loss_fn(p, b)}, {}, TypeError, "loss_fn returns a real scalar, got dict"),
        (lambda p, b: (loss_fn(p, b), {}), {}, TypeError,
         "loss_fn returns a real scalar, got a tuple of 2; pass has_aux=True for a pair of loss and metrics"),
        (loss_fn, {"has_aux": True}, TypeError, "has_aux=True: loss_fn returns (loss, dict of metrics), got"),
        (lambda p, b: (loss_fn(p, b), loss_fn(p, b)), {"has_aux": True}, TypeError,
         "has_aux=True: loss_fn returns (loss, dict of metrics), got a tuple of 2"),
        (lambda p, b: (loss_fn(p, b), {"loss": loss_fn(p, b)}), {"has_aux": True}, ValueError,
         "the aux of loss_fn has ['loss'], which the metrics hold already: rename them"),
        (lambda p, b: (loss_fn(p, b), {"all": jnp.mean(predict(p, b["x"]), 1)}), {"has_aux": True, "accumulate": 2}, ValueError,
         "aux ['all'] has shape (8,) and type float32: over micro-batches and devices only means can be averaged"),
        (lambda p, b: (loss_fn(p, b), {"n": jnp.sum(b["x"] > 0.0)}), {"has_aux": True, "parallel": "pmap"}, ValueError,
         "aux ['n'] has shape () and type int32: over micro-batches and devices only means can be averaged"),
    ],
)  # fmt: skip
def test_losses_are_checked(loss, options, error, message):
    step = train_step(loss, TX, **options)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        step(TrainState.create(adapt(), step.tx), DATA)


@pytest.mark.parametrize(
    ("options", "batch", "message"),
    [
        ({"parallel": "pmap"}, {"x": np.ones((12, IN))},
         "the batch has 12 examples (batch['x'] (12, 20)), which 8 devices do not divide"),
        ({"parallel": "pmap", "accumulate": 3}, DATA,
         "the batch has 16 examples (batch['x'] (16, 20)), which 8 devices times 3 micro-batches = 24 parts do not divide"),
        ({"accumulate": 3}, DATA,
         "the batch has 16 examples (batch['x'] (16, 20)), which 3 micro-batches (accumulate=3) do not divide"),
        ({"accumulate": 2}, DATA | {"at": np.arange(IN)},
         "the leaves of the batch have different leading axes: batch['at'] (20,), batch['x'] (16, 20); all are divided"),
        ({"accumulate": 2}, DATA | {"scale": np.float32(1)},
         "batch['scale'] has no leading axis to divide over 2 micro-batches (accumulate=2)"),
        ({"parallel": "pmap"}, {}, "the batch has no arrays to divide over 8 devices"),
    ],
)  # fmt: skip
def test_batches_are_checked(options, batch, message):
    step = shared_step(**options)
    state = TrainState.create(adapt(), step.tx)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        step(state, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_weights_that_no_gradient_reaches_are_named():
    def loss(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["up"]["kernel"] + params["up"]["bias"][None])
        return jnp.mean((jax.lax.stop_gradient(hidden) @ params["down"]["kernel"] - batch["y"]) ** 2), {
            "h": hidden.mean()
        }

    message = "no gradient of 'loss' reaches 1 of 2 adapted weights: 'up/kernel'. They are behind a stop_gradient"
    step = train_step(loss, TX, has_aux=True)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        step(TrainState.create(adapt(), step.tx), DATA)


def test_a_state_of_another_optimizer_is_refused():
    step = shared_step()
    message = (
        "the state's opt_state was made by another optimizer, or for other factors: make the state with "
        "TrainState.create(adapted, step.tx). Expected"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        step(TrainState.create(adapt(), optax.adam(0.1)), DATA)
    state = TrainState.create(adapt(), step.tx)
    other = TrainState.create(adapt(extras="bias"), step.tx)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        step(TrainState(other.adapted, state.opt_state, state.step, state.key, state.loss), DATA)


def test_a_step_takes_a_state():
    with pytest.raises(
        TypeError, match=r"^a step takes a TrainState and a batch, got Adapted: TrainState.create\(adapted, s"
    ):
        jlora.train_step(loss_fn, TX)(adapt(), DATA)


def test_create_is_checked():
    with pytest.raises(TypeError, match=r"^TrainState.create takes an Adapted \(from jlora.apply\), got dict$"):
        TrainState.create(PARAMS, TX)  # ty: ignore
    with pytest.raises(TypeError, match=r"^key is a seed or a key \(jax.random.key, jax.random.PRNGKey\), got 'seed'$"):
        TrainState.create(adapt(), TX, key="seed")
    with pytest.raises(TypeError, match=r"^tx is an Optax transformation, such as optax.adamw\(2e-4\), got 0.001$"):
        TrainState.create(adapt(), 1e-3)
    with pytest.raises(ValueError, match="^there is nothing to train: no factors and no extras"):
        TrainState.create(jlora.apply(PARAMS, targets=()), TX)


def test_a_state_that_was_used_up_is_refused():
    step = shared_step()
    state = TrainState.create(adapt(), step.tx)
    step(state, DATA)
    with pytest.raises(ValueError, match="^this state was used up: a step donates the buffers of the state"):
        step(state, DATA)


def test_a_step_inside_jit_is_refused():
    step = shared_step()
    with pytest.raises(ValueError, match="^the step is compiled already: call it outside of jit, vmap and scan"):
        jax.jit(lambda state, batch: step(state, batch))(TrainState.create(adapt(), step.tx), DATA)


def test_the_step_takes_an_optimizer():
    with pytest.raises(TypeError, match=r"^tx is an Optax transformation, such as optax.adamw\(2e-4\), got 0.001$"):
        train_step(loss_fn, 1e-3)


def test_pmap_refuses_a_sharded_base():
    adapted, _ = on_mesh(P(None, "model"), P())
    step = shared_step(parallel="pmap")
    with pytest.raises(
        ValueError, match=r"^an array of shape \(28, 12\) is sharded as .*: parallel='pmap' keeps a whole copy"
    ):
        step(TrainState.create(adapted, step.tx), DATA)
