"""A run that goes on with another optimizer, key or adapter: what is taken, what begins anew, and what is said of it."""

import dataclasses
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.checkpoint import Checkpoints
from jlora.checkpoint.agreement import as_json, from_json, nodes
from tests.conformance import normal

PARAMS = {"one": {"kernel": normal(4, 3)}, "two": {"kernel": normal(3, 2)}}
ADAPTED = jlora.apply(PARAMS, rank=2)
COSINE = lambda count: jnp.float32(1e-3) * jnp.cos(count.astype(jnp.float32))  # Optax's own promote
CLIP, DECAY, MOMENTUM = optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), optax.sgd(1e-2, momentum=0.9)
ADAMW, SCHEDULED = optax.adamw(1e-2), optax.adamw(COSINE)
INJECTED = optax.inject_hyperparams(optax.adamw)
MASKED = optax.masked(ADAMW, lambda factors: jax.tree.map(lambda _: True, factors))


def every(k: int, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.MultiSteps(tx, k).gradient_transformation()


def state(tx=ADAMW, key=5, adapted=ADAPTED) -> jlora.TrainState:
    return jlora.TrainState.create(adapted, tx, key=key)


def used(state: jlora.TrainState, step: int = 70, **hyperparams: float) -> jlora.TrainState:
    """After `step` steps: every leaf of the optimizer's state has a value of its own, constants theirs."""
    numbers = iter(range(1, 1000))
    values = {
        leaf.place: leaf.role == "constant" for node in nodes(state.opt_state) for leaf in node.leaves
    }  # fmt: skip
    leaves, structure = jax.tree.flatten(state.opt_state)
    new = [x if values[i] else jnp.full(x.shape, next(numbers), x.dtype) for i, x in enumerate(leaves)]
    factors = jax.tree.map(lambda x: x + 1, state.adapted.factors)
    return dataclasses.replace(
        state,
        opt_state=jax.tree.unflatten(structure, new),
        adapted=state.adapted.replace(factors=factors),
        step=jnp.int32(step),
    )


def restored(folder, before: jlora.TrainState, after: jlora.TrainState, **options):
    """State `after` restored from a checkpoint of `before`, and the warnings' texts without the checkpoint's name."""
    with Checkpoints(folder) as checkpoints, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        checkpoints.save(before, "here")
        result, position = checkpoints.restore(after, **options)
    assert position == "here" and result.step == before.step
    chex.assert_trees_all_equal(result.adapted.factors, before.adapted.factors)
    chex.assert_trees_all_equal_structs(result.opt_state, after.opt_state)
    texts = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert {warning.filename for warning in caught if warning.category is UserWarning} <= {__file__}
    name = f"the checkpoint of step {int(before.step)} in '{folder}' "
    assert all(text.startswith(name) for text in texts)
    return result, [text.removeprefix(name) for text in texts]


def numbers(state: jlora.TrainState) -> list[float]:
    return [float(np.ravel(x)[0]) for x in jax.tree.leaves(state.opt_state)]


EMPTY = " (which holds nothing itself, as clipping and weight decay) is in the state alone"
CONSTANTS = [pytest.approx(x) for x in (0.9, 0.999, 1e-8, 0.0, 1e-2, 1e-4)]  # b1, b2, eps, eps_root, rate, weight decay
MOMENTS = [2, 3, 4, 5, 6, 7, 8, 9]  # of ADAMW after `used`; its count is 1
# name -> (the optimizer before, the one after, the leaves of its state, what differs, what is said of the rest)
TAKEN = {
    "a schedule": (
        ADAMW, SCHEDULED, [1, *MOMENTS, 1],
        "'inner/2' is an EmptyState in the checkpoint and a ScaleByScheduleState in the state",
        "; 'inner/2/count' goes on from 1",
    ),
    "no schedule": (
        SCHEDULED, ADAMW, [1, *MOMENTS],
        "'inner/2' is a ScaleByScheduleState in the checkpoint and an EmptyState in the state", "",
    ),
    "another schedule": (SCHEDULED, optax.adamw(lambda count: jnp.float32(0.1)), [1, *MOMENTS, 10], "", ""),
    "a schedule where nothing else counts": (
        optax.sgd(0.1), optax.sgd(COSINE), [70],
        "'inner/1' is an EmptyState in the checkpoint and a ScaleByScheduleState in the state",
        "; 'inner/1/count' goes on from 70",
    ),
    "a schedule inside MultiSteps": (
        every(4, optax.sgd(0.1)), every(4, optax.sgd(COSINE)), [1, 2, 2, 3, 4, 5, 6],
        "'inner/inner_opt_state/1' is an EmptyState in the checkpoint and a ScaleByScheduleState in the state",
        "; 'inner/inner_opt_state/1/count' goes on from 2",
    ),
    "clipping": (ADAMW, optax.chain(CLIP, ADAMW), [1, *MOMENTS], "EmptyState at 'inner/0'" + EMPTY, ""),
    "no clipping": (
        optax.chain(CLIP, ADAMW), ADAMW, [1, *MOMENTS],
        "EmptyState at 'inner/0'" + EMPTY.replace("the state alone", "the checkpoint alone"), "",
    ),
    "weight decay": (MOMENTUM, optax.chain(DECAY, MOMENTUM), [1, 2, 3, 4], "EmptyState at 'inner/0'" + EMPTY, ""),
    "clipping and a schedule": (
        ADAMW, optax.chain(CLIP, SCHEDULED), [1, *MOMENTS, 1], "EmptyState at 'inner/0'" + EMPTY,
        "; 'inner/1/2/count' goes on from 1",
    ),
    "a mask of everything": (
        ADAMW, MASKED, [1, *MOMENTS], "MaskedState at 'inner'" + EMPTY, "",
    ),
    "constants in the state": (
        ADAMW, INJECTED(learning_rate=1e-2), [1, *CONSTANTS, 1, *MOMENTS],
        "InjectStatefulHyperparamsState at 'inner' is in the state alone", "; 'inner/count' goes on from 1",
    ),
    "a schedule in place of a constant": (
        INJECTED(learning_rate=1e-2), INJECTED(learning_rate=COSINE),
        [1, *CONSTANTS[:4], pytest.approx(1e-2), CONSTANTS[5], 2, 2, *range(3, 11)],
        "WrappedScheduleState at 'inner/hyperparams_states/learning_rate' is in the state alone",
        "; 'inner/hyperparams_states/learning_rate/count' goes on from 2",
    ),
    "other constants": (
        INJECTED(learning_rate=1e-2), optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        [2, *CONSTANTS[:4], pytest.approx(1e-3), 2, *range(3, 11)],
        "'inner/hyperparams/weight_decay' is in the checkpoint alone",
        "; 'inner/count' goes on from 2",
    ),
    "a guard": (
        ADAMW, optax.apply_if_finite(ADAMW, 3), [0, 1, 0, 1, *MOMENTS], "ApplyIfFiniteState at 'inner' is in the state alone",
        "; ApplyIfFiniteState at 'inner' begins anew",
    ),
    "no guard": (
        optax.apply_if_finite(ADAMW, 3), ADAMW, [4, *range(5, 13)], "ApplyIfFiniteState at 'inner' is in the checkpoint alone",
        "; ApplyIfFiniteState at 'inner' of the checkpoint is left out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_accumulates_is_taken_and_the_rest_is_named(name, tmp_path):
    before, after, expected, difference, rest = TAKEN[name]
    result, warned = restored(tmp_path, used(state(before)), state(after))
    assert numbers(result) == expected
    assert warned == (
        [f"was written with another optimizer: {difference}. What both have is taken{rest}"] if difference else []
    )


REFUSED = {
    "no momentum": (MOMENTUM, optax.sgd(0.1), "TraceState at 'inner/0' is in the checkpoint alone", []),
    "momentum": (optax.sgd(0.1), MOMENTUM, "TraceState at 'inner/0' is in the state alone", [0] * 4),
    "another kind": (
        ADAMW, MOMENTUM, "'inner/0' is a ScaleByAdamState in the checkpoint and a TraceState in the state", [0] * 4
    ),
    "another type of moments": (
        ADAMW, optax.adamw(1e-2, mu_dtype=jnp.bfloat16),
        "'inner/0/mu/one/kernel/A' is float32 of shape (4, 1, 2) in the checkpoint and bfloat16 of shape (4, 1, 2) in the "
        "state",
        [0] * 9,
    ),
    "an average more": (
        ADAMW, optax.chain(ADAMW, optax.ema(0.9)), "EmaState at 'inner/1' is in the state alone", [1, *MOMENTS, *[0] * 5]
    ),
    "parts of the factors": (
        ADAMW,
        optax.masked(ADAMW, lambda factors: jax.tree.map_with_path(lambda keys, _: keys[-1].key == "A", factors)),
        "'inner/0/mu/one/kernel/B' is in the checkpoint alone", [0] * 5,
    ),
    "gradients of several steps": (
        ADAMW, every(4, ADAMW), "MultiStepsState at 'inner' is in the state alone", [0, 0, 1, *MOMENTS, *[0] * 4]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_accumulates_on_one_side_alone_is_an_error_until_it_is_allowed(name, tmp_path):
    before, after, difference, matching = REFUSED[name]
    old, new = used(state(before)), state(after)
    with pytest.raises(ValueError, match="another optimizer") as caught:
        restored(tmp_path, old, new)
    assert str(caught.value) == (
        f"the checkpoint of step 70 in '{tmp_path}' was written with another optimizer: {difference}. "
        "optimizer='matching' takes what both have and begins the rest anew, optimizer='none' takes the factors alone"
    )
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match="What both have is taken") as warned:
            result, position = checkpoints.restore(new, optimizer="matching")
        assert difference in str(warned[0].message) and len(warned) == 1
        assert numbers(result) == matching and int(result.step) == 70
        result, position = checkpoints.restore(new, optimizer="none")  # it was asked for: no warning
    assert numbers(result) == numbers(new) and int(result.step) == 70 and position == "here"
    chex.assert_trees_all_equal(result.adapted.factors, old.adapted.factors)


def test_the_factors_alone_come_with_a_state_of_their_own(tmp_path):
    new = state(SCHEDULED)
    result, warned = restored(tmp_path, used(state(SCHEDULED)), new, optimizer="none")
    assert warned == [] and numbers(result) == [0] * 10
    pairs = zip(jax.tree.leaves(result.opt_state), jax.tree.leaves(new.opt_state), strict=True)
    assert not any(x is y for x, y in pairs)  # a step donates the one and not the other


def test_a_schedule_goes_on_as_if_it_had_been_there_from_the_start(tmp_path):
    """Ten times smaller from step 3 on: with that schedule from the start, or with a constant up to there."""
    batch = normal(2, 4)
    loss_fn = lambda params, x: jnp.mean((x @ params["one"]["kernel"] @ params["two"]["kernel"]) ** 2)
    falling = lambda count: jnp.where(count < 3, jnp.float32(1e-2), jnp.float32(1e-3))
    whole, before = (jlora.train_step(loss_fn, optax.sgd(rate, momentum=0.9)) for rate in (falling, 1e-2))

    def trained(step, state, until):
        while int(state.step) < until:
            state, _ = step(state, batch)
        return state

    result, warned = restored(tmp_path, trained(before, state(before.tx), 3), state(whole.tx))
    assert len(warned) == 1
    chex.assert_trees_all_equal(trained(whole, result, 5), trained(whole, state(whole.tx), 5))


# -- constants that lie in the optimizer's state -----------------------------------------------------------------------


def test_the_constants_are_those_of_the_new_optimizer(tmp_path):
    result, warned = restored(tmp_path, used(state(INJECTED(learning_rate=1e-2))), state(INJECTED(learning_rate=1e-4)))
    assert float(result.opt_state.inner.hyperparams["learning_rate"]) == pytest.approx(1e-4)
    assert int(result.opt_state.inner.count) == 1 and numbers(result)[7:] == [2, *range(3, 11)]
    assert warned == [
        "and the optimizer of the state have other hyperparameters: learning_rate is 0.01 in the checkpoint and 0.0001 in "
        "the state. Those of the state are taken; hyperparams='checkpoint' takes the others"
    ]


def test_a_loop_that_sets_its_rate_asks_for_that_of_the_checkpoint(tmp_path):
    before = used(state(INJECTED(learning_rate=1e-2)))
    before.opt_state.inner.hyperparams["learning_rate"] = jnp.float32(2e-3)  # on a plateau
    result, warned = restored(tmp_path, before, state(INJECTED(learning_rate=1e-2)), hyperparams="checkpoint")
    assert warned == [] and float(result.opt_state.inner.hyperparams["learning_rate"]) == pytest.approx(2e-3)
    chex.assert_trees_all_equal(result.opt_state, before.opt_state)


def test_what_a_schedule_made_is_no_constant(tmp_path):
    before = used(state(INJECTED(learning_rate=COSINE)))
    result, warned = restored(tmp_path, before, state(INJECTED(learning_rate=COSINE)))
    assert warned == []
    chex.assert_trees_all_equal(result.opt_state, before.opt_state)


def test_a_constant_in_place_of_a_schedule(tmp_path):
    before, after = used(state(INJECTED(learning_rate=COSINE))), state(INJECTED(learning_rate=1e-4))
    result, (optimizer, constants) = restored(tmp_path, before, after)
    assert float(result.opt_state.inner.hyperparams["learning_rate"]) == pytest.approx(1e-4)
    assert "WrappedScheduleState at 'inner/hyperparams_states/learning_rate' is in the checkpoint alone" in optimizer
    assert "learning_rate is 2 in the checkpoint and 0.0001 in the state" in constants


def test_a_rate_for_each_weight_is_a_constant(tmp_path):
    scale = optax.inject_hyperparams(lambda rates: optax.scale(rates[0]))
    result, warned = restored(tmp_path, used(state(scale(jnp.ones(2)))), state(scale(jnp.zeros(2))))
    assert result.opt_state.inner.hyperparams["rates"].tolist() == [0, 0]
    assert "rates is an array of shape (2,) in the checkpoint and an array of shape (2,) in the state" in warned[0]


# -- keys, adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [("threefry2x32", "rbg"), ("rbg", "threefry2x32"), ("unsafe_rbg", "rbg")])
def test_the_key_stays_that_of_the_run(before, after, tmp_path):
    keys = [jax.random.key(seed, impl=kind) for seed, kind in enumerate((before, after))]
    result, warned = restored(tmp_path, state(key=keys[0]), state(key=keys[1]))
    assert result.key == keys[0] and jax.random.key_impl(result.key) == before
    assert warned == [
        f"has a key of the kind {before!r}, the state one of {after!r}: the checkpoint's is taken. "
        "dataclasses.replace(restored, key=...) sets another"
    ]


def test_a_key_of_the_old_style_is_the_same_key(tmp_path):
    old = jax.random.PRNGKey(4)
    result, warned = restored(tmp_path / "a", state(key=old), state(key=jax.random.key(1)))
    assert warned == [] and result.key == jax.random.key(4)
    raw = dataclasses.replace(state(), key=old)  # a loop of one's own may hold it as it is
    result, warned = restored(tmp_path / "b", raw, dataclasses.replace(state(), key=jax.random.PRNGKey(1)))
    assert warned == [] and result.key.tolist() == old.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "method, sites differ (method.rank is 2 in the checkpoint and 3 in the state)"),
        ({"rank": 2, "targets": "one"}, "sites differ (sites.two/kernel is in the checkpoint alone)"),
        ({"rank": 2, "alphas": {"one": 8.0}}, "sites differ (sites.one/kernel.alpha is 2.0 in the checkpoint and 8.0 in the state)"),
        ({"method": jlora.rslora(2)}, "method differ (method.name is 'lora' in the checkpoint and 'rslora' in the state)"),
        ({"method": jlora.lora(2, dropout=0.1)}, "method differ (method.dropout is 0.0 in the checkpoint and 0.1 in the state)"),
    ],
)  # fmt: skip
def test_another_adapter_is_no_other_optimizer(options, message, tmp_path):
    for choice in ("all", "none"):
        with pytest.raises(ValueError, match="another adapter") as caught:
            restored(tmp_path / choice, used(state()), state(adapted=jlora.apply(PARAMS, **options)), optimizer=choice)
        assert str(caught.value) == f"the checkpoint in '{tmp_path / choice}' belongs to another adapter: {message}"


def test_choices_are_listed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="^optimizer='some' is unknown: choose 'all', 'matching', 'none'$"):
            checkpoints.restore(state(), optimizer="some")
        with pytest.raises(ValueError, match="^hyperparams='new' is unknown: choose 'state', 'checkpoint'$"):
            checkpoints.restore(state(), hyperparams="new")


def test_nodes_are_written_as_they_are_read():
    found = nodes(state(every(2, optax.chain(CLIP, INJECTED(learning_rate=COSINE)))).opt_state)
    assert from_json(as_json(found)) == found
    places = [leaf.place for node in found for leaf in node.leaves]
    assert sorted(places) == list(range(len(places)))
    assert [re.sub("/.*", "", leaf.name) for leaf in found[1].leaves][:2] == ["mini_step", "gradient_step"]


def test_a_state_of_plain_containers_has_nodes_too(tmp_path):
    tx = optax.GradientTransformation(lambda p: {"sum": p, "n": jnp.zeros(())}, lambda u, s, p=None: (u, s))
    result, warned = restored(tmp_path, used(state(tx)), state(tx))
    assert warned == [] and numbers(result) == [1, 2, 3, 4, 5]
    bare = nodes((jnp.zeros(2), {"a": jnp.zeros(())}))
    assert [(node.path, [leaf.name for leaf in node.leaves]) for node in bare] == [("", ["0", "1/a"])]
