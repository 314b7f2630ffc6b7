"""A loop of one's own: derivatives of a whole `Adapted`, Flax's TrainState, `jax.export`, forward mode, NumPy bases."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax import export

import jlora
from tests.conformance import close, normal, randomised

X = normal(5, 6)


def params() -> dict:
    return {"up": {"kernel": normal(6, 8), "bias": normal(8)}, "down": {"kernel": normal(8, 4)}, "steps": jnp.int32(3)}


def loss(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return jnp.mean((h @ params["down"]["kernel"]) ** 2)


def adapt(method: jlora.Method | None = None) -> jlora.Adapted:
    return randomised(jlora.apply(params(), method=method or jlora.lora(2), extras="bias"))


METHODS = {m.name: m for m in (jlora.lora(2), jlora.dora(2), jlora.pissa(2), jlora.ia3(), jlora.full())}


# -- derivatives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_derivative_of_the_whole_is_that_of_the_factors(name):
    where = jlora.lift(loss) if name != "dora" else lambda p, x: loss(jlora.merge(p), x)
    adapted = jlora.apply(params(), method=METHODS[name], extras=() if name == "full" else "bias")
    adapted = randomised(adapted)
    whole = jax.jit(jax.grad(where, allow_int=True))(adapted, X)
    alone = jax.jit(jax.grad(lambda factors: where(adapted.replace(factors=factors), X)))(adapted.factors)
    close(whole.factors, alone)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(alone))
    frozen = [g for g in jax.tree.leaves((whole.base, whole.buffers)) if g.dtype != jax.dtypes.float0]
    assert len(frozen) >= 3 and not any(np.any(g) for g in frozen)


def test_a_derivative_of_the_base_alone_is_there():
    adapted = adapt()
    of_base = jax.jit(jax.grad(lambda base: jlora.lift(loss)(adapted.replace(base=base), X), allow_int=True))
    got, expected = of_base(adapted.base), jax.jit(jax.grad(loss, allow_int=True))(jlora.merge(adapted), X)
    close(got["up"]["kernel"], expected["up"]["kernel"])
    close(got["down"]["kernel"], expected["down"]["kernel"])


@pytest.mark.loose_promotion  # optax multiplies integers and floats
def test_a_plain_optimizer_on_the_whole_leaves_the_base():
    adapted = adapt().replace(base={k: v for k, v in params().items() if k != "steps"})
    tx = optax.adam(1e-2)

    @jax.jit
    def update(adapted, state):
        gradient = jax.grad(jlora.lift(loss))(adapted, X)
        updates, state = tx.update(gradient, state, adapted)
        return optax.apply_updates(adapted, updates), state

    moved, state = adapted, tx.init(adapted)
    for _ in range(2):
        moved, state = update(moved, state)
    chex.assert_trees_all_equal(moved.base, adapted.base)
    assert float(jnp.abs(moved.factors["up/kernel"]["B"] - adapted.factors["up/kernel"]["B"]).max()) > 1e-2


def test_vmapped_factors_keep_one_base():
    adapted = adapt()
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapted.factors)
    of = lambda factors: jlora.lift(loss)(adapted.replace(factors=factors), X)
    jaxpr = jax.make_jaxpr(jax.vmap(of))(many)
    shapes = [v.aval.shape for e in jaxpr.eqns for v in e.outvars]
    assert (2, 6, 8) not in shapes and (2, 8, 4) not in shapes
    first, second = (jax.tree.map(lambda x: x[i], many) for i in range(2))
    of_one = jax.jit(jax.grad(of))
    close(jax.jit(jax.vmap(jax.grad(of)))(many), jax.tree.map(lambda *x: jnp.stack(x), *map(of_one, (first, second))))


# -- Flax's TrainState -------------------------------------------------------------------------------------------------


def test_flax_train_state_of_an_adapted_says_what_to_do():
    message = (
        "an Adapted is no dict of parameters. jlora.TrainState and jlora.train_step train it; a loop of your own or "
        "flax.training's TrainState holds what is trained alone: `factors, frozen = jlora.partition(adapted)`, "
        "TrainState.create(apply_fn=..., params=factors, tx=jlora.optimizer(tx, adapted)), and a loss of "
        "`jlora.combine(factors, frozen)`"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        TrainState.create(apply_fn=loss, params=adapt(), tx=optax.adam(1e-2))


def test_flax_train_state_of_the_factors_trains():
    adapted = adapt()
    factors, frozen = jlora.partition(adapted)
    lifted = jlora.lift(loss)
    state = TrainState.create(apply_fn=lifted, params=factors, tx=jlora.optimizer(optax.sgd(1e-1)))
    value, gradient = jax.value_and_grad(lambda factors: lifted(jlora.combine(factors, frozen), X))(state.params)
    state = state.apply_gradients(grads=gradient)
    assert float(lifted(jlora.combine(state.params, frozen), X)) < float(value)


# -- the method, the scale ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("other", "name"), [(jlora.lora(2, 32), "alpha"), (jlora.lora(3), "rank")])
def test_another_alpha_or_rank_is_not_taken_in_silence(other, name):
    mine, theirs = getattr(jlora.lora(2), name), getattr(other, name)
    message = (
        f"replace(method=): {name} is {mine} in {jlora.lora(2)!r} and {theirs} in {other!r}, and would stay what it is: "
        "every site holds its own. jlora.scale(adapted, s) multiplies the update by s; for another rank, apply anew"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adapt().replace(method=other)


def test_another_dropout_may_be_set():
    assert adapt().replace(method=jlora.lora(2, dropout=0.5)).method.config[-1] == ("dropout", 0.5)


def test_another_scale_compiles_nothing_and_may_be_traced():
    adapted = adapt()
    merged = jax.jit(lambda s: jlora.merge(jlora.scale(adapted, s)))
    got = merged(jnp.float32(-2.0))["up"]
    base, whole = adapted.base["up"], jlora.merge(adapted)["up"]
    close(got, jax.tree.map(lambda w0, w: w0 - 2 * (w - w0), base, whole))
    assert jax.tree.structure(jlora.scale(adapted, 0.5)) == jax.tree.structure(adapted)
    chex.assert_trees_all_equal(jlora.scale(adapted, 1).factors, adapted.factors)


@pytest.mark.parametrize(
    ("method", "s", "message"),
    [
        (jlora.dora(2), 0.5, "scale: the weight of dora is not the base plus an update that one of its factors multiplies"),
        (jlora.oft(2), 0.5, "scale: the weight of oft is not the base plus an update"),
        (jlora.lora(2), float("nan"), "scale: s must be a finite number, not nan"),
        (jlora.lora(2), "2", "scale: s must be a finite number, not '2'"),
        (jlora.lora(2), jnp.ones(2), "scale: s is one number for all weights, not an array of shape (2,)"),
        (jlora.pissa(2), -1.0, "scale: s must be at least 0 for a method that starts from the weight itself, not -1.0; "
         "jlora.to_lora(adapted) is a plain LoRA, which has any"),
    ],
)  # fmt: skip
def test_what_cannot_be_scaled_is_refused(method, s, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        jlora.scale(adapt(method), s)


def test_a_scaled_adapter_is_saved_and_loaded(tmp_path):
    for s in (0.5, 0):
        for method in (jlora.lora(2), jlora.pissa(2)):
            scaled = jlora.scale(adapt(method), s)
            jlora.save(tmp_path, scaled)
            chex.assert_trees_all_equal(jlora.merge(jlora.load(tmp_path, params())), jlora.merge(scaled))


# -- jax.export, forward mode ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [jlora.lora(2, 8), jlora.dora(jlora.rslora(2)), jlora.adalora(2, 1, total_steps=9)])
def test_an_exported_function_takes_an_adapted(method):
    adapted = adapt(method)
    exported = export.export(jax.jit(jlora.lift(loss)))(adapted, X)
    again = export.deserialize(exported.serialize())
    assert again.in_tree == jax.tree.structure(((adapted, X), {}))
    close(again.call(adapted, X), jlora.lift(loss)(adapted, X))


def test_forward_mode_is_named():
    adapted = adapt()
    factors, frozen = jlora.partition(adapted)
    of = lambda **options: lambda factors: jlora.lift(loss, **options)(jlora.combine(factors, frozen), X)
    for forward in (jax.jacfwd(of()), lambda factors: jax.jvp(of(), (factors,), (factors,))):
        with pytest.raises(
            TypeError, match=r"^jax.jvp and jax.jacfwd of a lifted function need jlora.lift\(fn, forward_m"
        ):
            forward(factors)
    _, slope = jax.jvp(of(forward_mode=True), (factors,), (factors,))
    gradient = jax.grad(of())(factors)
    close(slope, sum(jnp.vdot(x, g) for x, g in zip(*map(jax.tree.leaves, (factors, gradient)), strict=True)))


def test_a_type_error_of_the_function_stays_its_own():
    with pytest.raises(TypeError, match="^this is mine"):
        jlora.lift(lambda params, x: (_ for _ in ()).throw(TypeError("this is mine")))(adapt(), X)


# -- one canonical leaf ------------------------------------------------------------------------------------------------


def test_a_float64_base_is_one_base_before_and_after_it_was_on_the_device(tmp_path):
    wide = {"kernel": np.random.default_rng(0).normal(size=(16, 8)), "bias": np.zeros(8), "n": np.int64(3)}
    adapted = jlora.apply(wide, rank=2, extras="bias")
    assert {str(x.dtype) for x in jax.tree.leaves(adapted.base)} == {"float32", "int32"}
    assert [site.dtype for site in adapted.sites] == ["float32"] and wide["kernel"].dtype == np.float64
    step = jlora.train_step(lambda p, x: jnp.mean((x @ p["kernel"] + p["bias"][None]) ** 2), optax.sgd(1e-2))
    state, _ = step(jlora.TrainState.create(adapted, step.tx), np.ones((4, 16), np.float32))
    jlora.save(tmp_path, state.adapted)
    for base in (wide, jax.tree.map(jnp.asarray, wide)):
        again = jlora.load(tmp_path, base)
        assert again.sites == state.adapted.sites
        chex.assert_trees_all_equal(jlora.merge(again), jlora.merge(state.adapted))
    changed = wide | {"kernel": wide["kernel"] + 1e-3}
    with pytest.raises(ValueError, match="the adapter was trained on another base"):
        jlora.load(tmp_path, changed)


def test_numpy_leaves_that_jax_takes_as_they_are_stay_the_same_objects():
    base = {"kernel": np.ones((4, 3), np.float32)}
    assert jlora.apply(base, rank=1).base is base
