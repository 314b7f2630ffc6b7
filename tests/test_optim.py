"""`jlora.optimizer`: state for the factors alone, and no way for the base to be updated."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.optim import OptimizerState, optimizer

PARAMS = {
    "up": {"kernel": jnp.linspace(-1, 1, 30).reshape(5, 6), "bias": jnp.zeros(6)},
    "down": {"kernel": jnp.linspace(1, -1, 24).reshape(6, 4), "bias": jnp.zeros(4)},
}
HOW = (
    "Differentiate the factors alone: `factors, frozen = jlora.partition(adapted)`, then "
    "`jax.grad(lambda factors: loss(jlora.combine(factors, frozen), batch))(factors)`."
)


@pytest.fixture
def adapted() -> jlora.Adapted:
    return jlora.apply(PARAMS, rank=2, extras="up/bias")


def ones_like(factors):
    return jax.tree.map(jnp.ones_like, factors)


def loss(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["down"]["kernel"] + params["down"]["bias"][None]))


def test_state_is_that_of_the_factors_alone(adapted):
    state = optimizer(optax.adam(1e-3)).init(adapted)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state))
    factors = [(5, 1, 2), (1, 6, 2), (6, 1, 2), (1, 4, 2), (6,)]
    assert shapes == sorted([*factors, *factors, ()])  # adam's two moments and its counter


def test_init_reads_the_factors_of_an_adapted(adapted):
    tx = optimizer(optax.adam(1e-3))
    chex.assert_trees_all_equal(tx.init(adapted), tx.init(adapted.factors))
    assert isinstance(tx.init(adapted), OptimizerState)


@pytest.mark.loose_promotion  # optax multiplies integers and floats
@pytest.mark.parametrize("with_adapted", [True, False])
def test_updates_are_those_of_the_transformation_itself(adapted, with_adapted):
    raw, tx = optax.adamw(1e-2, weight_decay=0.1), optimizer(optax.adamw(1e-2, weight_decay=0.1))
    gradients = ones_like(adapted.factors)
    expected, _ = raw.update(gradients, raw.init(adapted.factors), adapted.factors)
    got, _ = tx.update(gradients, tx.init(adapted), adapted if with_adapted else adapted.factors)
    chex.assert_trees_all_equal(got, expected)
    new = optax.apply_updates(adapted.factors, got)
    assert jax.tree.structure(new) == jax.tree.structure(adapted.factors)
    assert float(jnp.abs(new["up/kernel"]["B"]).max()) == pytest.approx(
        1e-2, rel=1e-4
    )  # Adam's first step is the learning rate


def test_params_may_be_left_out_where_the_transformation_needs_none(adapted):
    tx = optimizer(optax.sgd(0.5))
    updates, _ = tx.update(ones_like(adapted.factors), tx.init(adapted))
    assert all(bool((leaf == -0.5).all()) for leaf in jax.tree.leaves(updates))


def test_wrapping_twice_is_wrapping_once():
    tx = optimizer(optax.sgd(0.1))
    assert optimizer(tx) is tx


def test_works_under_jit_in_a_chain_and_with_labels(adapted):
    label = {path: {name: name for name in arrays} for path, arrays in adapted.factors.items()}
    groups = {"A": optax.sgd(1.0), "B": optax.sgd(16.0), "value": optax.set_to_zero()}
    tx = optax.chain(optax.clip(0.5), optimizer(optax.multi_transform(groups, label)))
    gradients = ones_like(adapted.factors)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(adapted.factors), adapted.factors)
    assert {name: float(leaf.min()) for name, leaf in updates["up/kernel"].items()} == {"A": -0.5, "B": -8.0}
    assert float(jnp.abs(updates["up/bias"]["value"]).max()) == 0.0


@pytest.mark.loose_promotion  # optax multiplies integers and floats
def test_extra_arguments_reach_the_transformation(adapted):
    tx = optimizer(optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)))
    state = tx.init(adapted)
    gradients = ones_like(adapted.factors)
    for _ in range(4):
        updates, state = tx.update(gradients, state, adapted, value=jnp.float32(1.0))
    assert float(updates["up/kernel"]["A"][0, 0, 0]) > -1.0


def test_hyperparameters_can_be_read_and_set(adapted):
    tx = optimizer(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    state = optax.tree.set(tx.init(adapted), learning_rate=jnp.float32(0.25))
    updates, _ = tx.update(ones_like(adapted.factors), state, adapted)
    assert float(updates["up/kernel"]["A"][0, 0, 0]) == -0.25


def test_a_gradient_of_an_adapted_is_refused(adapted):
    tx = optimizer(optax.sgd(0.1))
    gradients = jax.grad(lambda adapted: jlora.lift(loss)(adapted, jnp.ones((2, 5))))(adapted)
    message = f"the gradients are an Adapted, with 4 arrays of the base that would be updated too. {HOW}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tx.update(gradients, tx.init(adapted), adapted)


def test_a_gradient_of_the_plain_parameters_is_refused(adapted):
    tx = optimizer(optax.sgd(0.1))
    gradients = jax.grad(loss)(PARAMS, jnp.ones((2, 5)))
    message = (
        "the gradients have 4 leaves and not the structure of the 5 factors that the optimizer was initialised with: "
        "unexpected 'down/bias', 'down/kernel', 'up/bias', 'up/kernel', missing 'down/kernel/A', 'down/kernel/B', "
        f"'up/bias/value', 'up/kernel/A' and 1 more. {HOW}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tx.update(gradients, tx.init(adapted), adapted)


def test_a_base_beside_the_factors_is_refused(adapted):
    tx = optimizer(optax.sgd(0.1))
    gradients = ones_like(adapted.factors)
    with pytest.raises(ValueError, match="unexpected 'base/kernel', missing none"):
        tx.update({**gradients, "base": {"kernel": jnp.ones((5, 6))}}, tx.init(adapted), adapted)


def test_a_missing_factor_is_refused(adapted):
    tx = optimizer(optax.sgd(0.1))
    gradients = {path: arrays for path, arrays in ones_like(adapted.factors).items() if path != "up/bias"}
    with pytest.raises(ValueError, match="unexpected none, missing 'up/bias/value'"):
        tx.update(gradients, tx.init(adapted), adapted)


def test_the_same_paths_in_other_containers_are_refused(adapted):
    tx = optimizer(optax.sgd(0.1))
    gradients = {path: tuple(arrays.values()) for path, arrays in ones_like(adapted.factors).items()}
    state = tx.init({path: list(arrays.values()) for path, arrays in adapted.factors.items()})
    with pytest.raises(ValueError, match="the gradients are a dict with the same paths in other containers"):
        tx.update(gradients, state)


def test_params_of_another_tree_are_refused(adapted):
    tx = optimizer(optax.sgd(0.1))
    other = jlora.apply(PARAMS, rank=2, targets="up")
    with pytest.raises(ValueError, match="^the params have 2 leaves and not the structure of the 5 factors"):
        tx.update(ones_like(adapted.factors), tx.init(adapted), other)


def test_a_gradient_of_another_rank_is_refused(adapted):
    tx = optimizer(optax.sgd(0.1))
    gradients = ones_like(jlora.apply(PARAMS, rank=1, extras="up/bias").factors)
    message = "the gradient of 'down/kernel/A' has shape (6, 1, 1), the factor (6, 1, 2)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tx.update(gradients, tx.init(adapted), adapted)


def test_a_state_of_the_bare_transformation_is_refused(adapted):
    tx = optimizer(optax.sgd(0.1))
    with pytest.raises(ValueError, match="the optimizer's state is a tuple, not one that this optimizer's init made"):
        tx.update(ones_like(adapted.factors), optax.sgd(0.1).init(adapted.factors), adapted)


def test_nothing_to_train_is_an_error():
    message = "there is nothing to train: no factors and no extras (see `targets=` of jlora.apply)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        optimizer(optax.sgd(0.1)).init(jlora.apply(PARAMS, targets=()))


def test_the_base_is_never_changed(adapted):
    before = jax.tree.map(np.array, PARAMS)
    tx = optimizer(optax.sgd(0.1))
    factors, frozen = jlora.partition(adapted)
    gradients = jax.grad(lambda factors: jlora.lift(loss)(jlora.combine(factors, frozen), jnp.ones((2, 5))))(factors)
    updates, _ = tx.update(gradients, tx.init(factors), factors)
    new = jlora.combine(optax.apply_updates(factors, updates), frozen)
    chex.assert_trees_all_equal(new.base, before)
    assert float(jnp.abs(new.factors["up/kernel"]["B"]).max()) > 0


@pytest.mark.parametrize("method", [jlora.loraplus(2), jlora.adalora(2, 1, total_steps=9)], ids=lambda m: m.name)
def test_what_a_method_adds_is_not_left_out_in_silence(method):
    adapted = jlora.apply(PARAMS, method=method)
    message = f"{method.name} trains with an optimizer of its own: jlora.optimizer(tx, adapted)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        optimizer(optax.adam(1e-3)).init(adapted)
    assert optimizer(optax.adam(1e-3), adapted).init(adapted)
