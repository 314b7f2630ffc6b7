"""What each paper fixes: initial values, schedules, budgets, scales; and every option that is refused, by its text."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.methods.adalora import Schedule, budget, lowest
from jlora.methods.lokr import small_side
from jlora.methods.oft import cayley, rotation
from jlora.methods.selective import BIAS, LAYER, NORM
from jlora.transform.jaxprs import bodies
from tests.conformance import close, measured, normal, randomised

D, F, L = 16, 24, 3
X, Y = normal(10, D), normal(10, F, seed=1)


def one(method: jlora.Method, shape=(D, F), axes=((0,), (1,), ()), kind="linear", **options) -> jlora.Adapted:
    site = jlora.Site("w", shape, "float32", *axes, kind)
    return jlora.apply({"w": normal(*shape)}, method=method, sites=[site], targets="w", **options)


def factor(adapted: jlora.Adapted, name: str) -> np.ndarray:
    return np.asarray(
        adapted.factors["w"][name] if name in adapted.factors["w"] else adapted.buffers["w"][name], np.float64
    )


def from_data(params, method: jlora.Method, fn, batches) -> jlora.Adapted:
    sites = jlora.sites(on_x, PARAMS, X)
    return jlora.apply(params, method=method, sites=sites, **measured(method, fn, params, batches, sites))


def forward(params, x):
    return x @ params["w"]


def loss_fn(params, batch):
    return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)


def trained(adapted: jlora.Adapted, tx, steps: int = 5) -> tuple[jlora.Adapted, list[float]]:
    step = jlora.train_step(loss_fn, tx)
    state, losses = jlora.TrainState.create(adapted, step.tx), []
    for _ in range(steps):
        state, metrics = step(state, (X, Y))
        losses.append(float(metrics["loss"]))
    return state.adapted, losses


# -- where learning rates differ ---------------------------------------------------------------------------------------


def test_loraplus_trains_b_with_a_multiple_of_the_learning_rate():
    start = one(jlora.loraplus(2, ratio=16.0))
    plain = one(jlora.lora(2))
    (fast, _), (slow, _) = (trained(adapted, optax.sgd(1e-3), 1) for adapted in (start, plain))
    moved = lambda after, name: after.factors["w"][name] - start.factors["w"][name]
    close(moved(fast, "B"), 16 * moved(slow, "B"))
    fast, slow = (trained(randomised(adapted), optax.sgd(1e-3), 1)[0] for adapted in (start, plain))
    close(fast.factors["w"]["A"], slow.factors["w"]["A"])


def test_lora_fa_trains_b_alone_and_keeps_x_a_in_place_of_x():
    start = one(jlora.lora_fa(2))
    assert set(start.factors["w"]) == {"B"} and set(start.buffers["w"]) == {"A"}
    factors, frozen = jlora.partition(start)
    _, backward = jax.vjp(lambda factors: jlora.lift(forward)(jlora.combine(factors, frozen), X), factors)
    shapes = {leaf.shape for leaf in jax.tree.leaves(backward) if hasattr(leaf, "shape")}
    kept = {tuple(n for n in shape if n != 1) for shape in shapes}
    assert X.shape not in kept and (len(X), 2) in kept


@pytest.mark.loose_promotion  # optax multiplies integers and floats
@pytest.mark.parametrize(("p", "q"), [(2.0, 4.0), (0.5, 8.0)])
def test_lora_has_two_degrees_of_freedom_fewer_than_hyperparameters(p, q):
    """Under Adam without eps, (alpha / (p q), p init_A, p lr_A, q lr_B) trains alike ("LoRA Without Regret")."""

    def run(alpha, scale_a, rate_a, rate_b):
        start = one(jlora.lora(2, alpha=alpha), key=1)
        start = start.replace(factors={"w": start.factors["w"] | {"A": start.factors["w"]["A"] * scale_a}})
        adam = lambda rate: optax.adam(rate, eps=1e-20)  # at 0, the first gradient of A, 0 / 0
        name = lambda path, _: path[-1].key
        groups = optax.multi_transform(
            {"A": adam(rate_a), "B": adam(rate_b)}, lambda factors: jax.tree.map_with_path(name, factors)
        )
        return trained(start, groups)[1]

    assert run(4.0 / (p * q), p, p * 1e-2, q * 1e-2) == pytest.approx(run(4.0, 1.0, 1e-2, 1e-2), rel=1e-4)


# -- AdaLoRA -----------------------------------------------------------------------------------------------------------


def test_the_budget_falls_as_a_cubic():
    """`b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_f - t_i))^3`, rounded down: continuous at t_i, unlike eq. 12."""
    schedule = Schedule(total=100, warmup=10, final=20, interval=1)
    at = [int(budget(jnp.int32(t), 24, 16, schedule)) for t in (0, 10, 11, 45, 80, 81, 100)]
    assert at == [24, 24, math.floor(16 + 8 * (1 - 1 / 70) ** 3), math.floor(16 + 8 * 0.5**3), 16, 16, 16]


def test_the_lowest_scores_are_pruned_and_none_without_need():
    values = jnp.asarray([3.0, 1.0, 2.0, 5.0])
    for count, expected in ((0, [1, 1, 1, 1]), (-1, [1, 1, 1, 1]), (1, [1, 0, 1, 1]), (3, [0, 0, 0, 1])):
        assert lowest(values, jnp.int32(count)).tolist() == [bool(e) for e in expected]


@pytest.mark.loose_promotion
def test_adalora_ends_with_its_budget_and_scores_that_stand_still():
    start = one(jlora.adalora(6, 2, total_steps=12, warmup=2, final=4), (L, D, F), ((1,), (2,), (0,)))
    stack_loss = lambda params, batch: sum(
        jnp.mean((batch[0] @ w - batch[1]) ** 2) * (i + 1) for i, w in enumerate(params["w"])
    )
    step = jlora.train_step(stack_loss, optax.adam(1e-2))
    state, alive, scores = jlora.TrainState.create(start, step.tx), [], []
    for _ in range(12):
        state, metrics = step(state, (X, Y))
        alive.append(int((state.adapted.factors["w"]["E"] != 0).sum()))
        scores.append(np.asarray(state.opt_state.inner.importance["w"]["E"]))
    assert alive[1] == 18 and alive[-4:] == [6, 6, 6, 6] and alive == sorted(alive, reverse=True)
    np.testing.assert_array_equal(scores[7], scores[-1])
    assert float(metrics["regulariser"]) > 0
    survivors = jlora.to_lora(state.adapted)
    assert survivors.sites[0].rank <= 6
    close(jlora.merge(survivors), jlora.merge(state.adapted))


def test_adalora_starts_small_and_scales_by_alpha_over_the_first_rank():
    start = one(jlora.adalora(64, 8, alpha=32.0, total_steps=10))
    for name in "AB":
        assert factor(start, name).std() == pytest.approx(0.02, rel=0.1)
    assert not factor(start, "E").any()
    moved = randomised(start)
    a, b, e = factor(moved, "A")[:, 0], factor(moved, "B")[0], factor(moved, "E")[0, 0]
    expected = np.asarray(start.base["w"], np.float64) + 32 / (64 + 1e-5) * (a * e) @ b.T
    np.testing.assert_allclose(jlora.merge(moved)["w"], expected, rtol=1e-4, atol=1e-5)


# -- starts from the weight --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [None, 40], ids=["exact", "fast"])
def test_pissa_takes_the_largest_singular_values_out(iterations):
    start = one(jlora.pissa(3, alpha=6.0, iterations=iterations), (60, 80))
    w = np.asarray(start.base["w"], np.float64)
    u, s, vt = np.linalg.svd(w)
    a, b = factor(start, "A")[:, 0], factor(start, "B")[0].T
    np.testing.assert_allclose(2.0 * a @ b, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-3 if iterations else 1e-5)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-3)  # sqrt(S) on each side
    np.testing.assert_array_equal(factor(start, "A0"), factor(start, "A"))


@pytest.mark.parametrize("iterations", [None, 40], ids=["exact", "fast"])
def test_lora_xs_trains_what_lies_between_the_singular_vectors(iterations):
    start = one(jlora.lora_xs(3, alpha=6.0, std=1e-5, iterations=iterations), (60, 80))
    w, between = np.asarray(start.base["w"], np.float64), normal(3, 3)
    u, s, vt = np.linalg.svd(w)
    a, b = np.asarray(start.buffers["w"]["A"])[:, 0], np.asarray(start.buffers["w"]["B"])[0].T
    np.testing.assert_allclose(a @ b, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-3 if iterations else 1e-5)  # U_r S_r V_r^T
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), s[:3], rtol=1e-4)  # S on A's side alone
    drawn = np.asarray(one(jlora.lora_xs(60, std=1e-5), (60, 80)).factors["w"]["R"])
    assert drawn.std() == pytest.approx(1e-5, rel=0.1) and set(start.factors["w"]) == {"R"}
    trained = start.replace(factors={"w": {"R": between[None]}})
    np.testing.assert_allclose(jlora.merge(trained)["w"], w + 2.0 * a @ np.asarray(between) @ b, atol=1e-4)
    signs = [np.sign(a[:, i] @ u[:, i]) for i in range(3)]  # an SVD is one up to the signs of its pairs
    np.testing.assert_allclose(a * signs, u[:, :3] * s[:3], atol=1e-2 if iterations else 1e-4)


def test_olora_is_the_same_for_either_orientation():
    w = normal(D, F)
    site = lambda shape, i, o: [jlora.Site("w", shape, "float32", (i,), (o,), (), "linear")]
    stored = [
        jlora.apply({"w": w}, method=jlora.olora(4), sites=site((D, F), 0, 1)),
        jlora.apply({"w": w.T}, method=jlora.olora(4), sites=site((F, D), 1, 0)),
    ]
    q, r = np.linalg.qr(np.asarray(w, np.float64).T)
    for adapted, turn in zip(stored, (lambda x: x, lambda x: x.transpose(1, 0, 2)), strict=True):
        np.testing.assert_allclose(turn(factor(adapted, "A"))[:, 0], r[:4].T, atol=1e-5)
        np.testing.assert_allclose(turn(factor(adapted, "B"))[0], q[:, :4], atol=1e-5)


# -- shared, nested, structured ----------------------------------------------------------------------------------------


def test_veras_projections_are_shared_and_come_back_from_the_seed():
    params = {"kernel": normal(D, F), "wide": {"kernel": normal(2 * D, F)}, "other": {"kernel": normal(D, 2 * F)}}
    adapted = jlora.apply(params, method=jlora.vera(7, seed=3))
    small, wide, other = (adapted.buffers[path] for path in ("kernel", "wide/kernel", "other/kernel"))
    np.testing.assert_array_equal(small["A"], other["A"])
    np.testing.assert_array_equal(small["B"], wide["B"])
    np.testing.assert_allclose(wide["A"][:D] * math.sqrt(2), small["A"], rtol=1e-6)  # the variance is 2 / inputs
    assert np.asarray(wide["A"]).std() == pytest.approx(math.sqrt(2 / (2 * D)), rel=0.1)
    again, else_ = (jlora.apply(params, method=jlora.vera(7, seed=seed), key=9) for seed in (3, 4))
    np.testing.assert_array_equal(again.buffers["kernel"]["A"], small["A"])
    assert (else_.buffers["kernel"]["A"] != small["A"]).all()
    assert jlora.count(adapted).trainable == 3 * 7 + F + F + 2 * F
    assert (np.asarray(adapted.factors["kernel"]["d"]) == np.float32(0.1)).all() and not adapted.factors["kernel"][
        "b"
    ].any()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_dyloras_first_ranks_are_an_adapter(rank):
    adapted = randomised(one(jlora.dylora(4, alpha=6.0)))
    a, b = factor(adapted, "A")[:, 0, :rank], factor(adapted, "B")[0, :, :rank].T
    expected = np.asarray(adapted.base["w"], np.float64) + 6.0 / rank * a @ b
    np.testing.assert_allclose(jlora.merge(jlora.truncate(adapted, rank))["w"], expected, rtol=1e-4, atol=1e-5)


def test_dylora_trains_every_rank_from_its_minimum_on():
    adapted = randomised(one(jlora.dylora(4, alpha=6.0, minimum=2)))
    outputs = {b: jlora.lift(forward)(jlora.truncate(adapted, b), X) for b in (1, 2, 3, 4)}
    drawn = set()
    for key in range(24):
        out = jlora.lift(forward)(jlora.with_dropout(adapted, key), X)
        drawn |= {b for b, expected in outputs.items() if np.allclose(out, expected, atol=1e-4)}
    assert drawn == {2, 3, 4}
    close(jlora.lift(forward)(adapted, X), outputs[4])


def test_loha_is_the_hadamard_product():
    adapted = randomised(one(jlora.loha(3, alpha=6.0)))
    a1, a2 = factor(adapted, "A1")[:, 0], factor(adapted, "A2")[:, 0]
    b1, b2 = factor(adapted, "B1")[0].T, factor(adapted, "B2")[0].T
    expected = np.asarray(adapted.base["w"], np.float64) + 2.0 * (a1 @ b1) * (a2 @ b2)
    np.testing.assert_allclose(jlora.merge(adapted)["w"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "factor", "side"), [(768, -1, 24), (768, 8, 8), (7, -1, 1), (36, -1, 6), (768, 7, 6), (1, -1, 1)]
)
def test_the_small_side_of_a_kronecker_product(n, factor, side):
    assert small_side(n, factor) == side


def test_cayley_gives_rotations():
    r = np.asarray(cayley(normal(2, 3, 10), 5), np.float64)
    np.testing.assert_allclose(r @ r.swapaxes(-1, -2), np.broadcast_to(np.eye(5), r.shape), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(r), 1.0, atol=1e-5)


def test_cayley_is_the_papers_formula_and_so_is_its_derivative():
    """`(I - Q) (I + Q)^-1`, also where Q is large: no pivot of the elimination is below 1."""
    one = np.eye(6)
    for size in (0.1, 1.0, 100.0):
        triangle = size * normal(3, 15)
        q = np.zeros((3, 6, 6))
        q[:, *np.triu_indices(6, 1)] = triangle
        q -= q.swapaxes(1, 2)
        np.testing.assert_allclose(cayley(triangle, 6), (one - q) @ np.linalg.inv(one + q), atol=2e-5)
    solved = lambda q: jnp.linalg.solve(jnp.eye(6)[None] + q, jnp.eye(6)[None] - q)
    q, moved = (x - jnp.swapaxes(x, 1, 2) for x in (normal(3, 6, 6), normal(3, 6, 6, seed=1)))
    close(jax.jvp(rotation, (q,), (moved,)), jax.jvp(solved, (q,), (moved,)), 1e-5)
    close(jax.vjp(rotation, q)[1](moved), jax.vjp(solved, q)[1](moved), 1e-5)


@pytest.mark.parametrize(
    "method",
    [jlora.oft(8), jlora.pissa(2), jlora.pissa(2, iterations=1), jlora.olora(2), jlora.lora_xs(2)],
    ids=repr,
)
def test_no_batched_call_of_lapack_is_compiled(method):
    """On the CPU, jaxlib 0.10's batched calls of LAPACK can wait for ever for the threads that they block: `one_by_one`."""
    base = {f"h_{i}": {"kernel": normal(4, 64, 64, seed=i)} for i in range(2)}
    sites = [jlora.Site(f"h_{i}/kernel", (4, 64, 64), "float32", (1,), (2,), (0,), "linear") for i in range(2)]

    def start_and_merge(base):
        return jlora.merge(jlora.apply(base, method=method, sites=sites, targets="kernel"))

    text = jax.jit(start_and_merge).lower(base).as_text()
    calls = [line for line in text.splitlines() if "lapack_" in line]
    assert not any("tensor<4x64" in line for line in calls), calls
    assert bool(calls) == (method.name != "oft")


@pytest.mark.parametrize(
    "inner",
    [jlora.vera(4), jlora.loha(2), jlora.lokr(2), jlora.pissa(2), jlora.olora(2), jlora.lora_xs(2), jlora.dylora(2)],
    ids=repr,
)
def test_dora_goes_around_whatever_is_added_to_the_base(inner):
    start = one(jlora.dora(inner))
    np.testing.assert_allclose(jlora.merge(start)["w"], start.base["w"], atol=1e-4)  # LoRA-XS is near the base
    trained = randomised(start)
    (target,), buffers = trained.sites, trained.buffers["w"]
    v = np.asarray(inner.acts.weight(trained.base["w"], target, trained.factors["w"], buffers).dense(), np.float64)
    gain = factor(trained, "magnitude") / np.linalg.norm(v, axis=0, keepdims=True)
    np.testing.assert_allclose(jlora.merge(trained)["w"], gain * v, rtol=1e-3, atol=1e-4)


def test_oft_turns_the_weight_in_float32_on_any_device():
    """By default GPUs and TPUs round what they multiply to 10 or 7 bits: with a rotation of I, too, the base."""

    def precisions(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield eqn.params["precision"]
            for body in bodies(eqn):
                yield from precisions(body)

    found = list(precisions(jax.make_jaxpr(jlora.merge)(one(jlora.oft(8))).jaxpr))
    assert found == [(jax.lax.Precision.HIGHEST,) * 2]


def test_oft_keeps_the_angles_between_outputs():
    adapted = randomised(one(jlora.oft(8)))
    w, turned = (np.asarray(x, np.float64) for x in (adapted.base["w"], jlora.merge(adapted)["w"]))
    np.testing.assert_allclose(turned.T @ turned, w.T @ w, atol=1e-4)
    assert np.abs(turned - w).max() > 0.1


def test_ia3_rescales_outputs_and_the_inputs_of_the_feed_forward():
    params = {"value": {"kernel": normal(D, F)}, "mlp": {"kernel": normal(D, F)}}
    adapted = jlora.apply(params, method=jlora.ia3("mlp"))
    shapes = {path: arrays["scale"].shape for path, arrays in adapted.factors.items()}
    assert shapes == {"value/kernel": (1, F), "mlp/kernel": (D, 1)}


# -- leaves as they are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "fits", "others"),
    [
        (BIAS, ["up/bias", "bias", "mlp/~/linear_0/b", "layers/0/bias", "h.0.c_attn.bias", "q_bias"], ["up/kernel", "embed", "bulb", "b/kernel"]),
        (NORM, ["ln_1/scale", "LayerNorm_0/bias", "encoder_norm/scale", "layers/0/input_layernorm/weight", "h.0.ln_1.weight"],
         ["up/kernel", "up/bias", "attn/scale_up/kernel", "column/bias"]),
        (LAYER, ["h_11/attn/kernel", "layers/3/w", "encoderblock_2/mlp/kernel", "layer.7.weight", "blocks/0/w", "h/0/w"],
         ["head/kernel", "embed/kernel", "ch_1/kernel"]),
    ],
    ids=["bias", "norm", "layer"],
)  # fmt: skip
def test_names_of_biases_norms_and_layers(pattern, fits, others):
    assert all(re.search(pattern, path) for path in fits), [p for p in fits if not re.search(pattern, p)]
    assert not any(re.search(pattern, path) for path in others), [p for p in others if re.search(pattern, p)]


def test_the_top_layers_of_numbered_and_of_stacked_ones():
    numbered = {f"h_{i}": {"kernel": normal(D, D), "bias": normal(D)} for i in (0, 1, 2, 10)} | {
        "head": {"kernel": normal(D, F)}
    }
    adapted = jlora.apply(numbered, method=jlora.top_layers(2))
    assert set(adapted.factors) == {"h_10/bias", "h_10/kernel", "h_2/bias", "h_2/kernel"}
    stacked = {"h": {"kernel": normal(4, D, D), "bias": normal(4, D)}, "head": {"kernel": normal(D, D)}}

    def fn(p, x):
        body = lambda h, layer: (jnp.tanh(h @ layer["kernel"] + layer["bias"][None]), None)
        return jax.lax.scan(body, x, p["h"])[0] @ p["head"]["kernel"]

    adapted = jlora.apply(stacked, method=jlora.top_layers(1), sites=jlora.sites(fn, stacked, X))
    assert {extra.path: extra.rows for extra in adapted.extras} == {"h/bias": (3,), "h/kernel": (3,)}


# -- errors ------------------------------------------------------------------------------------------------------------

PARAMS = {"kernel": normal(D, F)}


def on_x(params, x):
    return x @ params["kernel"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: jlora.loraplus(2, ratio=0), "ratio must be positive, not 0"),
        (lambda: jlora.loraplus(2, ratio="16"), "ratio must be a finite number, not '16'"),
        (lambda: jlora.loraplus(2, ratio=True), "ratio must be a finite number, not True"),
        (lambda: jlora.adalora(4, 8, total_steps=10), "target_rank must be at most the initial rank, 4, not 8"),
        (lambda: jlora.adalora(4, 2, total_steps=10, warmup=6, final=4), "adalora: a schedule longer than the run: warmup=6 and final=4 leave none of total_steps=10"),
        (lambda: jlora.adalora(4, 2, total_steps=0), "total_steps must be at least 1, not 0"),
        (lambda: jlora.adalora(4, 2, total_steps=9, betas=(1.0, 0.5)), "betas must be at least 0 and below 1, not (1.0, 0.5)"),
        (lambda: jlora.pissa(2, iterations=-1), "iterations must be None or an integer of at least 0, not -1"),
        (lambda: jlora.apply(PARAMS, method=jlora.pissa(17)), "pissa: rank 17 exceeds 16, the rank of 'kernel' (16 inputs, 24 outputs); lower it with ranks={'kernel': r}"),
        (lambda: jlora.apply({"kernel": PARAMS["kernel"] * jnp.nan}, method=jlora.pissa(2)), "pissa: 'kernel' has values that are not finite, so that its SVD does not exist"),
        (lambda: jlora.apply({"kernel": PARAMS["kernel"] * jnp.inf}, method=jlora.olora(2)), "olora: 'kernel' has values that are not finite"),
        (lambda: jlora.adalora(4, 2, total_steps=1.5), "total_steps must be an integer of at least 1, not 1.5"),
        (lambda: jlora.adalora(4, 0, total_steps=9), "target_rank must be at least 1, not 0"),
        (lambda: jlora.adalora(4, 2, total_steps=9, warmup=math.nan), "warmup must be an integer of at least 0, not nan"),
        (lambda: jlora.adalora(4, 2, total_steps=9, warmup=-1), "warmup must be an integer of at least 0, not -1"),
        (lambda: jlora.adalora(4, 2, total_steps=9, final=2.5), "final must be an integer of at least 0, not 2.5"),
        (lambda: jlora.adalora(4, 2, total_steps=9, interval=0), "interval must be at least 1, not 0"),
        (lambda: jlora.adalora(4, 2, total_steps=9, warmup=3, final=2, interval=5), "adalora: interval=5 is longer than the 4 steps of pruning between warmup=3 and final=2 of total_steps=9"),
        (lambda: jlora.adalora(4, 2, total_steps=9, betas=0.5), "betas must be two numbers, of the sensitivity and of its deviation, not 0.5"),
        (lambda: jlora.adalora(4, 2, total_steps=9, betas=(0.5,)), "betas must be two numbers, of the sensitivity and of its deviation, not (0.5,)"),
        (lambda: jlora.adalora(4, 2, total_steps=9, betas=(0.5, "x")), "betas[1] must be a finite number, not 'x'"),
        (lambda: jlora.adalora(4, 2, total_steps=9, orthogonality=math.inf), "orthogonality must be a finite number, not inf"),
        (lambda: jlora.adalora(4, 2, total_steps=9, orthogonality=-0.1), "orthogonality must be at least 0, not -0.1"),
        (lambda: jlora.adalora(4, 2, total_steps=9, alpha=0), "alpha must not be 0: the factors would have no effect and no gradient"),
        (lambda: jlora.lora_xs(2, std=-1e-5), "std must be at least 0, not -1e-05"),
        (lambda: jlora.lora_xs(2, iterations=101), "iterations must be at most 100, not 101; None for the exact SVD"),
        (lambda: jlora.apply(PARAMS, method=jlora.lora_xs(17)), "lora_xs: rank 17 exceeds 16, the rank of 'kernel'"),
        (lambda: jlora.apply({"kernel": PARAMS["kernel"] * 0}, method=jlora.lora_xs(2)), "lora_xs: 'kernel', or one of its stacked weights, is zero"),
        (lambda: jlora.pissa(2, alpha=-1.0), "alpha must be positive, not -1.0"),
        (lambda: jlora.pissa(2, alpha="2"), "alpha must be a finite number, not '2'"),
        (lambda: jlora.apply(PARAMS, method=jlora.pissa(2), alphas={"kernel": -1.0}), "pissa: alpha of 'kernel' must be positive, not -1.0"),
        (lambda: jlora.apply({"kernel": PARAMS["kernel"] * 0}, method=jlora.pissa(2)), "pissa: 'kernel', or one of its stacked weights, is zero: what its SVD gives is zero, too, where factors have no gradient; leave it out with targets="),
        (lambda: from_data({"kernel": PARAMS["kernel"].at[0, 0].set(jnp.nan)}, jlora.corda(2), on_x, [X]), "corda: 'kernel' has values that are not finite"),
        (lambda: from_data({"kernel": PARAMS["kernel"] * 0}, jlora.corda(2), on_x, [X]), "corda: 'kernel', or one of its stacked weights, is zero"),
        (lambda: from_data(PARAMS, jlora.eva(2), on_x, [X, X[:, :3]]), "measure: fn(params, batch) fails on batch 1: dot_general requires"),
        (lambda: from_data(PARAMS, jlora.eva(2), lambda p, x: x, [X]), "measure: fn(params, batch) fails on batch 0: 1 of 1 adapted weights are never read by '<lambda>': 'kernel'"),
        (lambda: from_data(PARAMS, jlora.lora_ga(2), lambda p, x: jnp.sum(x), [X]), "measure: no gradient reaches 'kernel': fn's result does not depend on it"),
        (lambda: from_data(PARAMS, jlora.lora_ga(2), lambda p, x: jnp.sum(on_x(p, x)), [X * jnp.nan]), "measure: the gradient of 'kernel' is not finite"),
        (lambda: jlora.olora(2, alpha=math.nan), "alpha must be a finite number, not nan"),
        (lambda: jlora.corda(2, alpha=-1), "alpha must be positive, not -1"),
        (lambda: jlora.loha(2, alpha=0), "alpha must not be 0: the factors would have no effect and no gradient"),
        (lambda: jlora.lokr(2, alpha=True), "alpha must be a finite number, not True"),
        (lambda: jlora.lokr(2, factor=1.5), "factor must be -1 or an integer of at least 1, not 1.5"),
        (lambda: jlora.oft(2.0), "block_size must be an integer of at least 1, not 2.0"),
        (lambda: jlora.eva(2, rho="2"), "rho must be a finite number, not '2'"),
        (lambda: jlora.lora_ga(2, gamma=None), "gamma must be a finite number, not None"),
        (lambda: jlora.vera(4, start=0), "start must not be 0: b starts there, too, and neither d nor b would have a gradient"),
        (lambda: jlora.vera(4, start=math.nan), "start must be a finite number, not nan"),
        (lambda: jlora.vera(4, seed=2**63), "seed must be below 2**63, not 9223372036854775808"),
        (lambda: jlora.eva(2, rho=0.5), "rho must be finite and at least 1, not 0.5"),
        (lambda: jlora.corda(2, mode="both"), "mode must be one of 'instruction', 'knowledge', not 'both'"),
        (lambda: jlora.lora_ga(2, gamma=0), "gamma must be positive and finite, not 0"),
        (lambda: jlora.vera(4, seed=-1), "seed must be an integer of at least 0, not -1"),
        (lambda: jlora.lokr(2, factor=0), "factor must be -1 or an integer of at least 1, not 0"),
        (lambda: jlora.ia3("*"), "feedforward='*' is no regular expression: nothing to repeat at position 0"),
        (lambda: jlora.ia3(b"down"), "feedforward must be a regular expression, not b'down'"),
        (lambda: jlora.bitfit(None), "pattern must be a regular expression, not None"),
        (lambda: jlora.norms("("), "pattern='(' is no regular expression: missing ), unterminated subpattern at position 0"),
        (lambda: jlora.top_layers(1, "layer"), "pattern='layer' has no group for the layer's number"),
        (lambda: jlora.oft(1), "block_size must be at least 2: a block of 1 does not rotate"),
        (lambda: jlora.apply(PARAMS, method=jlora.oft(5)), "oft: block_size=5 does not divide the 16 inputs of 'kernel'"),
        (lambda: jlora.dylora(4, minimum=5), "minimum must be at most the rank, 4, not 5"),
        (lambda: jlora.dora(jlora.ia3()), "dora(inner): inner must be an additive low-rank method, as lora is, not ia3"),
        (lambda: jlora.dora(jlora.oft(8)), "dora(inner): inner must be an additive low-rank method, as lora is, not oft"),
        (lambda: jlora.dora(jlora.dora(4)), "dora(inner): inner must be an additive low-rank method, as lora is, not dora"),
        (lambda: jlora.dora(jlora.eva(4)), "dora(inner): inner must be an additive low-rank method, as lora is, not eva"),
        (lambda: jlora.dora(jlora.bitfit()), "dora(inner): inner must be an additive low-rank method, as lora is, not bitfit"),
        (lambda: jlora.dora(jlora.houlsby(2)), "dora(inner): inner must be an additive low-rank method, as lora is, not houlsby"),
        (lambda: jlora.apply(PARAMS, method=jlora.bitfit()), "bitfit: no leaf fits "),
        (lambda: jlora.apply(PARAMS, method=jlora.norms()), "norms: no leaf fits "),
        (lambda: jlora.apply(PARAMS, method=jlora.top_layers(1)), "top_layers: no path has a layer's number"),
        (lambda: jlora.apply({"h_0": PARAMS}, method=jlora.top_layers(2)), "top_layers: 2 layers were asked for and 1 found"),
        (lambda: jlora.apply(PARAMS, method=jlora.full(), targets="kernel"), "apply: full trains leaves as they are and adapts none: leave targets= out"),
        (lambda: jlora.apply(PARAMS, method=jlora.ia3(), ranks={"kernel": 3}), "apply: ia3 has no rank: leave ranks= and alphas= out"),
        (lambda: jlora.truncate(jlora.apply(PARAMS, 4), 2), "truncate: the first ranks are worth most with dylora alone, not with lora"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_said(wrong, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        wrong()


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 7])
def test_oft_by_a_series_is_what_it_says(terms):
    q = np.zeros((2, 4, 4))
    q[:, *np.triu_indices(4, 1)] = 0.1 * normal(2, 6)
    triangle = q[:, *np.triu_indices(4, 1)]
    q -= q.swapaxes(1, 2)
    last = max(terms, 4) - 1 if terms > 2 else terms - 1  # three terms are four
    weights = [1.0] + [2.0] * last
    if terms > 2:
        weights[-1] = 1.0  # the last counts half
    expected = sum(w * np.linalg.matrix_power(-q, k) for k, w in enumerate(weights))
    np.testing.assert_allclose(cayley(jnp.asarray(triangle, jnp.float32), 4, terms), expected, atol=1e-6)


def test_stored_projections_of_vera_are_in_its_file(tmp_path):
    base = {"kernel": normal(6, 4)}
    adapted = jlora.apply(base, method=jlora.vera(3, seed=5, stored=True))
    plain = jlora.apply(base, method=jlora.vera(3, seed=5))
    for name in ("A", "B"):
        np.testing.assert_array_equal(adapted.buffers["kernel"][name], plain.buffers["kernel"][name])
    other = {"kernel": {name: 2 * x for name, x in adapted.buffers["kernel"].items()}}
    adapted = jlora.combine({"kernel": {"d": normal(1, 1, 3), "b": normal(1, 4, 1)}}, adapted.replace(buffers=other))
    jlora.save(tmp_path, adapted)
    close(jlora.merge(jlora.load(tmp_path, base)), jlora.merge(adapted), 1e-6)
    assert np.abs(np.asarray(jlora.merge(adapted)["kernel"] - base["kernel"])).max() > 0.1


def test_tied_factors_have_the_gradient_of_one_and_stay_the_same():
    """Against one A for both weights, written out."""
    base, x = {"q": normal(4, 3), "k": normal(4, 3, seed=1)}, normal(5, 4, seed=2)
    adapted = jlora.apply(base, method=jlora.tied(jlora.lora(2), [("q", "k")]), sites=jlora.sites(heads, base, x))
    a, b = normal(4, 2, seed=3), {name: normal(2, 3, seed=4 + i) for i, name in enumerate(base)}
    factors = {name: {"A": a[:, None], "B": b[name].T[None]} for name in base}
    tx = jlora.optimizer(optax.adam(0.1), adapted)
    by_hand, state = (a, b), optax.adam(0.1).init((a, b))
    theirs, mine = lambda p: heads({n: base[n] + p[0] @ p[1][n] for n in base}, x), tx.init(factors)
    for _ in range(3):
        gradients = jax.grad(lambda f: jlora.lift(heads)(jlora.combine(f, adapted), x))(factors)
        with jax.numpy_dtype_promotion("standard"):
            updates, mine = tx.update(gradients, mine, factors)
            moved, state = optax.adam(0.1).update(jax.grad(theirs)(by_hand), state)
        factors, by_hand = optax.apply_updates(factors, updates), optax.apply_updates(by_hand, moved)
        np.testing.assert_array_equal(factors["q"]["A"], factors["k"]["A"])
        np.testing.assert_allclose(factors["q"]["A"][:, 0], by_hand[0], atol=1e-5)
        np.testing.assert_allclose(factors["k"]["B"][0].T, by_hand[1]["k"], atol=1e-5)


def heads(params, x):
    return jnp.sum(jnp.tanh(x @ params["q"]) * (x @ params["k"]))


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ([("q",)], "tied: groups are of two paths or more"),
        ([("q", "k"), ("k", "v")], "each of which is in one of them"),
    ],
)
def test_tied_refuses_groups_that_say_nothing(groups, text):
    with pytest.raises(ValueError, match=text):
        jlora.tied(jlora.lora(2), groups)
    adapted = jlora.apply({"q": {"kernel": normal(3, 3)}}, method=jlora.tied(jlora.lora(1), [("q/kernel", "v/kernel")]))
    with pytest.raises(ValueError, match="tied: 'v/kernel' is in a group, and is not adapted"):
        jlora.optimizer(optax.sgd(0.1), adapted)


def test_what_is_added_to_a_leaf_is_times_its_scale(tmp_path):
    base = {"kernel": normal(3, 2), "bias": normal(2, seed=1)}
    start = jlora.apply(base, rank=1)
    extra = jlora.Extra("bias", added=0.5)
    adapted = start.replace(extras=(extra,), factors=start.factors | {"bias": {"added": normal(2, seed=2)}})
    np.testing.assert_allclose(jlora.merge(adapted)["bias"], base["bias"] + 0.5 * normal(2, seed=2), rtol=1e-6)
    assert jlora.count(adapted).total == jlora.count(start).total + 2  # beside the leaf, and not in its place
    jlora.save(tmp_path, adapted)
    again = jlora.load(tmp_path, base)
    assert again.extras == (extra,) and "0.5 times what is trained is added to it" in jlora.summary(again)
    np.testing.assert_array_equal(again.factors["bias"]["added"], adapted.factors["bias"]["added"])
    np.testing.assert_allclose(
        jlora.merge(jlora.scale(again, 2.0))["bias"], base["bias"] + normal(2, seed=2), rtol=1e-6
    )
