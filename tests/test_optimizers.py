"""Every optimizer of Optax with `train_step`: what it is given, and those that tell matrices from other arrays."""

import functools
import inspect
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.matrices import form_of, forms_of, on_matrices
from tests.conformance import close, normal, randomised

pytestmark = pytest.mark.loose_promotion  # optax multiplies integers and floats
contrib = optax.contrib
X = normal(8, 6)


def params() -> dict:
    return {"up": normal(6, 4), "stack": normal(2, 4, 4), "heads": normal(4, 2, 3), "bias": normal(4)}


def loss(params, x):
    h = jnp.tanh(x @ params["up"] + params["bias"][None])
    h, _ = jax.lax.scan(lambda h, kernel: (jnp.tanh(h @ kernel), None), h, params["stack"])
    return jnp.mean((jnp.einsum("bd,dhk->bhk", h, params["heads"]) - 1) ** 2)


@functools.cache
def adapt(method: jlora.Method | None = None) -> jlora.Adapted:
    sites = jlora.sites(loss, params(), X)
    linear = lambda site: site.kind == "linear"
    adapted = jlora.apply(params(), method=method or jlora.lora(2), sites=sites, targets=linear, extras="bias")
    return randomised(adapted)


# -- all of them -------------------------------------------------------------------------------------------------------

PLAIN = (
    "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad", "fromage",
    "lamb", "lars", "lion", "nadam", "nadamw", "novograd", "optimistic_gradient_descent", "radam",
    "rmsprop", "rprop", "sgd", "sign_sgd", "sm3", "yogi",
)  # fmt: skip
NEW = ("acprop", "ademamix", "adopt", "galore", "madgrad", "momo", "momo_adam", "simplified_ademamix", "sophia", "muon")
OWN_RATE = ("cocob", "dadapt_adamw", "prodigy")


def sam(opaque: bool) -> Any:
    ascent = optax.chain(contrib.normalize(), optax.sgd(1e-2))
    return contrib.sam(optax.sgd(1e-2), ascent, sync_period=2, opaque_mode=opaque)


def noisy_sgd() -> Any:
    return optax.noisy_sgd(1e-2, **({"key": 0} if "key" in inspect.signature(optax.noisy_sgd).parameters else {}))


OTHERS = {
    "lbfgs": lambda: optax.lbfgs(memory_size=2, linesearch=optax.scale_by_zoom_linesearch(3)),
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3)),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "noisy_sgd": noisy_sgd,
    "dog": lambda: contrib.dog(1.0),
    "dowg": lambda: contrib.dowg(1.0),
    "mechanize": lambda: contrib.mechanize(optax.adam(1e-2)),
    "reduce_on_plateau": lambda: optax.chain(optax.adam(1e-2), contrib.reduce_on_plateau()),
    "sam": lambda: sam(False),
    "sam, opaque": lambda: sam(True),
    "schedule_free": lambda: contrib.schedule_free(optax.adam(1e-2), 1e-2),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(1e-2),
    "schedule_free_sgd": lambda: contrib.schedule_free_sgd(1e-2),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(1e-2)),
    "lookahead": lambda: optax.lookahead(optax.sgd(1e-2), 5, 0.5),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.adam(1e-2)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(contrib.muon)(learning_rate=1e-2),
    "ema": lambda: optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    "masked": lambda: optax.masked(optax.adam(1e-2), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "partition": lambda: optax.partition(
        {"A": contrib.muon(1e-2), "B": optax.adam(1e-2), "value": optax.sgd(1e-2)},
        {path: {name: name for name in arrays} for path, arrays in adapt().factors.items()},
    ),
}
ALL = (
    {name: functools.partial(getattr(optax, name), 1e-2) for name in PLAIN if hasattr(optax, name)}
    | {name: functools.partial(getattr(contrib, name), 1e-2) for name in NEW if hasattr(contrib, name)}
    | {name: getattr(contrib, name) for name in OWN_RATE}
    | OTHERS
)


def trace(step: Any, state: jlora.TrainState) -> Any:
    """The shapes of what a step returns; nothing is compiled."""
    arguments = step.arguments(state, X)
    rest = (arguments.carry, arguments.kept, arguments.key, arguments.batch)
    return jax.eval_shape(lambda *rest: step.program(*rest, arguments.skeleton, arguments.loss), *rest)


@pytest.mark.parametrize("name", ALL)
def test_a_step_with_every_optimizer(name):
    step = jlora.train_step(loss, ALL[name]())
    state = jlora.TrainState.create(adapt(), step.tx)
    carry, remembered, metrics = trace(step, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(carry.factors, state.adapted.factors)
    chex.assert_trees_all_equal_shapes_and_dtypes(carry.opt_state, state.opt_state)
    assert remembered.shape == () and set(metrics) == {"loss", "grad_norm"}


def take(tx: Any, steps: int = 3, **options: Any) -> jlora.TrainState:
    step = jlora.train_step(loss, tx, **options)
    state = jlora.TrainState.create(adapt(), step.tx)
    for _ in range(steps):
        state, _ = step(state, X)
    return state


def by_hand(tx: Any, steps: int = 3) -> Any:
    """`tx` on the factors as they are, without jlora.optimizer."""
    factors, frozen = jlora.partition(adapt())
    gradient = jax.jit(jax.grad(lambda factors: jlora.lift(loss)(jlora.combine(factors, frozen), X)))
    state = tx.init(factors)
    for _ in range(steps):
        updates, state = tx.update(gradient(factors), state, factors)
        factors = optax.apply_updates(factors, updates)
    return factors


def test_multi_steps_is_taken_as_it_is():
    state = take(optax.MultiSteps(optax.sgd(0.1), 2), steps=4)
    close(state.adapted.factors, by_hand(optax.chain(optax.sgd(0.1)), steps=2), 1e-4)


def test_a_line_search_lowers_the_loss_of_the_factors():
    tx = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8))
    step = jlora.train_step(loss, tx, accumulate=2)
    state = jlora.TrainState.create(adapt(), step.tx)
    losses = []
    for _ in range(4):
        state, metrics = step(state, X)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]
    # The search remembers the loss that it found: it is that of the next step, over both micro-batches.
    found = float(optax.tree.get(state.opt_state, "value"))
    np.testing.assert_allclose(found, step(state, X)[1]["loss"], rtol=1e-5)


def test_lookahead_keeps_its_slow_factors():
    state = take(optax.lookahead(optax.sgd(0.1), 2, 0.5), steps=2)
    start, fast = adapt().factors, by_hand(optax.sgd(0.1), steps=2)
    half = jax.tree.map(lambda x, y: 0.5 * (x + y), start, fast)
    close(state.adapted.factors, half, 1e-4)
    chex.assert_trees_all_close(state.opt_state.inner.slow, state.adapted.factors)


def test_lookahead_shows_matrices_to_what_it_leads():
    muon = lambda: contrib.muon(0.1, weight_decay=0.0)
    state = take(optax.lookahead(muon(), 1, 0.5), steps=1)
    half = jax.tree.map(lambda x, y: 0.5 * (x + y), adapt().factors, take(muon(), steps=1).adapted.factors)
    close(state.adapted.factors, half, 1e-3)


def lookahead() -> Any:
    return optax.lookahead(optax.sgd(0.1), 2, 0.5)


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: optax.apply_if_finite(tx, 3), lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
        lambda tx: optax.masked(tx, jax.tree.map(lambda _: True, adapt().factors)),
    ],
    ids=["apply_if_finite", "MultiSteps", "masked by a function", "masked by a tree"],
)  # fmt: skip
def test_lookahead_inside_of_what_cannot_pass_on_its_pairs_is_an_error(around):
    message = (
        "optax.lookahead is inside a transformation that cannot pass on its pairs of parameters: put it around, as in "
        "optax.lookahead(optax.apply_if_finite(optax.sgd(0.1), 3), 5, 0.5)"
    )
    step = jlora.train_step(loss, around(lookahead()))
    with pytest.raises(ValueError, match=re.escape(message)):
        trace(step, jlora.TrainState.create(adapt(), step.tx))


@pytest.mark.parametrize(
    "tx",
    [
        lambda: optax.chain(optax.clip(9.0), lookahead()),
        lambda: optax.lookahead(optax.apply_if_finite(optax.sgd(0.1), 3), 2, 0.5),
    ],
    ids=["in a chain", "around"],
)
def test_lookahead_passes_on_its_pairs(tx):
    """Neither the clipping, which is far off, nor the guard changes a step."""
    close(take(tx(), steps=2).adapted.factors, take(lookahead(), steps=2).adapted.factors)


def test_schedule_free_gives_the_average():
    state = take(contrib.schedule_free_sgd(0.1), steps=2)
    average = contrib.schedule_free_eval_params(state.opt_state.inner, state.adapted.factors)
    chex.assert_trees_all_equal_shapes_and_dtypes(average, state.adapted.factors)
    assert float(jnp.abs(average["up"]["B"] - state.adapted.factors["up"]["B"]).max()) > 0


class Mine:
    """An optimizer with init and update that is no transformation of Optax's."""

    def init(self, factors):
        return jnp.zeros(())

    def update(self, gradients, state, factors, *, value):
        return jax.tree.map(lambda g: -0.1 * g, gradients), state + value


def test_an_object_with_init_and_update_is_taken():
    state = take(Mine(), steps=1)
    close(state.adapted.factors, by_hand(optax.sgd(0.1), steps=1), 1e-4)
    assert float(state.opt_state.inner) == float(state.loss)
    for wrong in (Mine, optax.adamw, object()):
        with pytest.raises(TypeError, match="^tx is an Optax transformation, such as optax.adamw"):
            jlora.train_step(loss, wrong)


# -- matrices ----------------------------------------------------------------------------------------------------------


def orthogonal(update: jax.Array) -> bool:
    """Whether Newton and Schulz had it: the singular values are between 0.5 and 1.3 of the largest's scale."""
    values = np.linalg.svd(np.asarray(update), compute_uv=False)
    return bool(values.min() > 0.4 * values.max())


def test_muon_sees_every_factor_as_a_matrix():
    adapted = adapt()
    tx = contrib.muon(1.0, weight_decay=0.0)
    state = take(tx, steps=1)
    moved = jax.tree.map(lambda x, y: np.asarray(x - y), state.adapted.factors, adapted.factors)
    matrices = {
        "up/A": moved["up"]["A"][:, 0], "up/B": moved["up"]["B"][0].T,
        "heads/A": moved["heads"]["A"][:, 0, 0], "heads/B": moved["heads"]["B"][0].reshape(6, 2).T,
    } | {f"stack/{i}/{n}": moved["stack"][n][i].reshape(4, 2) for i in range(2) for n in "AB"}  # fmt: skip
    assert {name: orthogonal(m) for name, m in matrices.items()} == dict.fromkeys(matrices, True)
    # By hand, on matrices that are written out here: the same updates.
    arrays = {name: jnp.zeros(m.shape) for name, m in matrices.items()}
    factors, frozen = jlora.partition(adapted)
    gradient = jax.jit(jax.grad(lambda factors: jlora.lift(loss)(jlora.combine(factors, frozen), X)))(factors)
    up = {"up/A": gradient["up"]["A"][:, 0], "up/B": gradient["up"]["B"][0].T}
    zeros = {name: arrays[name] for name in up}
    updates, _ = jax.jit(tx.update)(up, tx.init(zeros), zeros)
    close(matrices["up/A"], np.asarray(updates["up/A"]), 1e-3)
    close(matrices["up/B"], np.asarray(updates["up/B"]), 1e-3)
    # The bias is no matrix, and Adam's.
    np.testing.assert_allclose(np.abs(moved["bias"]["value"]), np.abs(moved["bias"]["value"]).max(), rtol=1e-3)


def test_others_see_factors_as_they_are():
    for tx in (optax.adamw(1e-2), optax.adafactor(1e-2), contrib.prodigy()):
        state = jlora.TrainState.create(adapt(), tx)
        shapes = {x.shape for x in jax.tree.leaves(state.opt_state)}
        assert (6, 1, 2) in shapes and (6, 2) not in shapes
    shown = jlora.TrainState.create(adapt(), jlora.optimizer(optax.adamw(1e-2), matrices=True))
    assert (6, 2) in {x.shape for x in jax.tree.leaves(shown.opt_state)}
    kept = jlora.TrainState.create(adapt(), jlora.optimizer(contrib.muon(1e-2), matrices=False))
    assert (6, 1, 2) in {x.shape for x in jax.tree.leaves(kept.opt_state)}


def projected() -> Any:
    """GaLore's form of state: a projector for each matrix, an empty one for all else."""
    projector = lambda x: jnp.zeros((x.shape[0], 1) if x.ndim == 2 else (0, 0))
    return optax.GradientTransformation(lambda factors: jax.tree.map(projector, factors), lambda g, s, p=None: (g, s))


def test_a_state_of_other_sizes_tells_matrices():
    with pytest.raises(ValueError, match="this optimizer treats matrices in a way of its own"):
        jlora.optimizer(projected()).init(adapt())
    state = jlora.optimizer(projected(), adapt()).init(adapt()).inner
    assert state["up"]["A"].shape == (6, 1) and [x.shape for x in state["stack"]["B"]] == [(2, 1)] * 2
    memory = jlora.optimizer(optax.scale_by_lbfgs(3), adapt())  # a row of moments: as many numbers for either form
    assert (3, 6, 1, 2) in {x.shape for x in jax.tree.leaves(jax.eval_shape(memory.init, adapt().factors))}


def test_matrices_change_nothing_for_an_optimizer_of_single_numbers():
    shown = take(jlora.optimizer(optax.adam(1e-2), matrices=True))
    close(shown.adapted.factors, take(optax.adam(1e-2)).adapted.factors, 1e-5)


def test_adaptive_clipping_of_matrices_is_that_of_their_columns():
    adapted, ones = adapt(), jax.tree.map(jnp.ones_like, adapt().factors)
    clip = optax.adaptive_grad_clip(0.01)
    tx = jlora.optimizer(clip, adapted, matrices=True)
    updates, _ = tx.update(ones, tx.init(adapted), adapted)
    b = adapted.factors["up"]["B"][0].T  # (r, outputs)
    expected, _ = clip.update({"B": jnp.ones_like(b)}, clip.init({"B": b}), {"B": b})
    close(updates["up"]["B"][0].T, expected["B"], 1e-6)
    assert len(set(np.asarray(updates["up"]["B"]).ravel().tolist())) == 4  # one for each output


def test_factors_that_are_read_from_a_state_keep_their_shapes():
    adapted, ones = adapt(), jax.tree.map(jnp.ones_like, adapt().factors)
    shape_of = lambda tree: jax.tree.map(jnp.shape, tree)
    free = contrib.schedule_free(optax.sgd(0.5), 0.5)
    led = optax.lookahead(contrib.schedule_free(optax.sgd(0.5), 0.5), 1, 0.5)
    found = []
    for matrices in (True, False):
        tx = jlora.optimizer(free, adapted, matrices=matrices)
        factors, state = adapted.factors, tx.init(adapted)
        for _ in range(2):
            updates, state = tx.update(ones, state, factors)
            factors = optax.apply_updates(factors, updates)
        found.append(contrib.schedule_free_eval_params(state.inner, factors))
        assert shape_of(state.inner.z) == shape_of(found[-1]) == shape_of(ones)
        tx = jlora.optimizer(led, adapted, matrices=matrices)
        _, state = tx.update(ones, tx.init(adapted), adapted)
        assert shape_of(state.inner.slow) == shape_of(state.inner.inner.fast_state.z) == shape_of(ones)
    close(found[0], found[1], 1e-6)
    part = {path: {name: "A" if name == "A" else "other" for name in arrays} for path, arrays in ones.items()}
    tx = jlora.optimizer(optax.partition({"A": free, "other": optax.sgd(0.5)}, part), adapted, matrices=True)
    _, state = tx.update(ones, tx.init(adapted), adapted)
    z = state.inner.inner_states["A"].inner_state.z
    assert shape_of(z["stack"]["A"]) == shape_of(ones["stack"]["A"]) and not jax.tree.leaves(z["stack"]["B"])
    masked = optax.masked(free, {path: path == "stack" for path in ones})
    state = jax.eval_shape(jlora.optimizer(masked, adapted, matrices=True).init, adapted.factors)
    assert shape_of(state.inner.inner_state.z["stack"]) == shape_of(ones["stack"])


@pytest.mark.parametrize(
    "method",
    [
        jlora.lora(1), jlora.dora(2), jlora.adalora(2, 1, total_steps=9), jlora.vera(3), jlora.loha(2),
        jlora.lokr(1), jlora.oft(2), jlora.ia3(),
    ],
)  # fmt: skip
def test_forms_are_inverted(method):
    adapted = adapt(method)
    forms = forms_of(adapted.factors, adapted.sites)
    for path, arrays in forms.items():
        for name, form in arrays.items():
            x = adapted.factors[path][name]
            parts = form.split(x)
            assert isinstance(parts, tuple) == (path == "stack")
            assert all(part.shape == form.part for part in (parts if form.stacked else [parts]))
            chex.assert_trees_all_equal(form.join(parts), x)
    tx = on_matrices(optax.sgd(1.0), adapted)
    updates, _ = tx.update(adapted.factors, tx.init(adapted.factors), adapted.factors)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.negative, adapted.factors))


def test_magnitudes_and_scales_are_vectors():
    site = {s.path: s for s in adapt().sites}
    assert form_of((1, 4), site["up"]).part == (4,)
    assert form_of((1, 2, 3), site["heads"]).part == (6,)
    assert form_of((2, 1, 4), site["stack"])[2:] == ((4,), True)
    assert form_of((2, 1, 1, 2), site["stack"])[2:] == ((2,), True)  # AdaLoRA's E


def test_a_loop_of_ones_own_is_told_to_show_matrices():
    message = (
        "this optimizer treats matrices in a way of its own (Muon gives all else to Adam), and factors have an axis for "
        "each of the weight's: jlora.optimizer(tx, adapted) shows it matrices, as jlora.train_step does; matrices=False "
        "leaves them as they are"
    )
    tx = contrib.muon(1.0, weight_decay=0.0)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        jlora.optimizer(tx).init(adapt())
    adapted = adapt()
    shown = jlora.optimizer(tx, adapted)
    of_factors = jax.jit(jax.grad(lambda factors: jlora.lift(loss)(adapted.replace(factors=factors), X)))
    updates, _ = jax.jit(shown.update)(of_factors(adapted.factors), shown.init(adapted), adapted.factors)
    close(optax.apply_updates(adapted.factors, updates), take(tx, steps=1).adapted.factors, 1e-3)
    assert jlora.optimizer(shown) is shown and jlora.optimizer(shown, adapted) is shown


def test_an_optimizer_for_an_adapter_has_what_its_method_adds():
    adapted = adapt(jlora.loraplus(2, ratio=4.0))
    tx = jlora.optimizer(optax.sgd(1.0), adapted)
    ones = jax.tree.map(jnp.ones_like, adapted.factors)
    updates, _ = tx.update(ones, tx.init(adapted), adapted)
    assert float(updates["up"]["B"].max()) == -4.0 and float(updates["up"]["A"].max()) == -1.0
    step = jlora.train_step(loss, tx)  # not a second time
    assert step.tx is tx
    state = jlora.TrainState.create(adapted, step.tx)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(tx.init(adapted))
