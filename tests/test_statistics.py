"""Covariances and gradients of a program's weights, and what the data-driven methods make of them, against NumPy."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from jlora import tree
from jlora.adapted.apply import choose, start
from jlora.methods.eva import redistributed
from jlora.methods.matrix import a_form, a_matrix, b_form, b_matrix, matrices, restore
from tests.conformance import close, measured, normal

L, D, F, B, H, K = 3, 6, 8, 5, 3, 4
BATCHES = [normal(B, D), normal(B, D, seed=1)]


def square(x: jax.Array) -> jax.Array:
    return np.asarray(x, np.float64).T @ np.asarray(x, np.float64)


def covariance(fn, params, batches=BATCHES, **options) -> dict[str, jax.Array]:
    sites = [site for site in jlora.sites(fn, params, batches[0]) if site.kind == "linear"]
    return jlora.measure(fn, params, batches, sites, "covariance", **options)


# -- covariances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)], ids=["in, out", "out, in"])
def test_the_covariance_is_the_mean_of_x_x(axes):
    params = {"w": normal(D, F).transpose(axes)}
    found = covariance(lambda p, x: jnp.tanh(x @ p["w"].transpose(axes)), params)
    close(found["w"], jnp.asarray(np.mean([square(x) for x in BATCHES], axis=0)[None], jnp.float32))


def test_every_use_counts_in_scans_branches_and_remat():
    params = {"stack": normal(L, D, D), "once": normal(D, F)}

    def fn(p, x):
        h, seen = lax.scan(lambda h, w: (jax.checkpoint(lambda h, w: jnp.tanh(h @ w))(h, w), h), x, p["stack"])
        return lax.cond(x[0, 0] > -9, lambda: h @ p["once"], lambda: -h @ p["once"]), seen

    found = covariance(fn, params)
    seen = [[*fn(params, x)[1], lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["stack"])[0]] for x in BATCHES]
    for layer in range(L):
        expected = np.mean([square(inputs[layer]) for inputs in seen], axis=0)
        close(found["stack"][layer], jnp.asarray(expected, jnp.float32))
    close(found["once"][0], jnp.asarray(np.mean([square(inputs[L]) for inputs in seen], axis=0), jnp.float32))


def test_inputs_of_several_axes_are_flattened():
    params = {"w": normal(H, K, F)}
    batches = [normal(B, H, K), normal(B, H, K, seed=1)]
    found = covariance(lambda p, x: jnp.einsum("bhk,hkf->bf", x, p["w"]), params, batches)
    close(found["w"][0], jnp.asarray(np.mean([square(x.reshape(B, -1)) for x in batches], axis=0), jnp.float32))


def test_a_scaled_or_negated_weight_has_the_same_inputs():
    params = {"w": normal(D, F)}
    plain = covariance(lambda p, x: x @ p["w"], params)
    close(covariance(lambda p, x: x @ (-3.0 * p["w"]), params), plain)


# Rows from REAL on are padding. Each function leaves it out in another way; what of it is counted follows.
REAL = 3
KEPT = (jnp.arange(B) < REAL)[:, None]


def attends(p, x):
    """Queries, keys, values and outputs, with the padding hidden from every query, and a loss without it."""
    q, k, v = (x @ p[name] for name in ("q", "k", "v"))
    seen = jax.nn.softmax(jnp.where(KEPT.T, q @ k.T, -jnp.inf), axis=-1) @ v
    return jnp.sum(jnp.where(KEPT, jnp.tanh(seen @ p["out"]), 0) ** 2)


def recurs(p, x):
    """One row after the other: the steps of padding are left out of the loss."""
    _, states = lax.scan(lambda h, row: (jnp.tanh(row[None] @ p["w"]) + h, h), jnp.zeros((1, F)), x)
    return jnp.sum(jnp.where(KEPT[..., None], states, 0) ** 2)


def zero_head(p, x):
    return jnp.sum(jnp.where(KEPT, jnp.tanh(x @ p["w"]) @ jnp.zeros((F, 1)), 0))


W = {"w": normal(D, F)}
MASKED = {
    "loss": (lambda p, x: jnp.sum(jnp.where(KEPT, x @ p["w"], 0) ** 2), W, None, REAL),
    "two layers": (
        lambda p, x: jnp.sum(jnp.where(KEPT, jnp.tanh(x @ p["w"]) @ p["v"] - 1, 0) ** 2),
        {"w": normal(D, F), "v": jnp.zeros((F, D))}, None, REAL,
    ),
    "layer norm": (
        lambda p, x: jnp.where(KEPT, jax.nn.standardize(x @ p["w"]), 0), W, None, REAL,
    ),
    "probabilities": (lambda p, x: jnp.where(KEPT, jax.nn.softmax(x @ p["w"]), 0), W, None, REAL),
    "vmap": (
        lambda p, x: jnp.sum(jax.vmap(lambda row, kept: jnp.where(kept, row @ p["w"], 0))(x, KEPT) ** 2), W, None, REAL,
    ),
    "flattened": (
        lambda p, x: jnp.sum(jnp.where(KEPT, (x.reshape(1, B, D) @ p["w"]).reshape(B, F), 0) ** 2), W, None, REAL,
    ),
    "attention": (attends, {n: normal(D, D, seed=i) for i, n in enumerate(("q", "k", "v", "out"))}, None, REAL),
    "recurrent": (recurs, W, None, REAL - 1),  # a state is read before its own row is added to it
    "logits": (lambda p, x: x @ p["w"], W, None, B),
    "logits, mask": (lambda p, x: x @ p["w"], W, lambda x: KEPT[:, 0], REAL),
    "hidden states, mask": (lambda p, x: jnp.tanh(x @ p["w"]), W, lambda x: jnp.broadcast_to(KEPT, (B, F)), REAL),
    "behind a head that starts at zero": (zero_head, W, None, B),
}  # fmt: skip


@pytest.mark.parametrize("case", MASKED)
def test_padding_is_not_counted(case):
    fn, params, mask, rows = MASKED[case]
    sites = [site for site in jlora.sites(fn, params, BATCHES[0]) if site.path != "out"]
    found = jlora.measure(fn, params, BATCHES, sites, "covariance", mask=mask)
    expected = jnp.asarray(np.mean([square(x[:rows]) for x in BATCHES], axis=0)[None], jnp.float32)
    for path in params.keys() - {"out", "v"} | (params.keys() & {"k"}):
        close(found[path], expected)


def masked(fn, batches) -> jax.Array:
    """The covariance of w over batches of (x, which rows are kept)."""
    sites = [site for site in jlora.sites(fn, W, batches[0]) if site.path == "w"]
    return jlora.measure(fn, W, batches, sites, "covariance", mask=lambda batch: batch[1])["w"]


def test_a_batch_of_padding_alone_adds_nothing():
    kept, nothing = KEPT[:, 0], jnp.zeros(B, bool)
    batches = [(BATCHES[0], nothing), (BATCHES[1], kept)]
    for order in (batches, batches[::-1]):
        expected = jnp.asarray(square(BATCHES[1][:REAL])[None] / 2, jnp.float32)
        close(masked(lambda p, b: b[0] @ p["w"], order), expected)


@pytest.mark.parametrize(
    ("fn", "kept"),
    [(lambda p, b: jnp.tanh(b[0] @ p["w"]) @ jnp.zeros((F, 1)), KEPT[:, 0]),
     (lambda p, b: b[0] @ p["w"], jnp.zeros(B, bool))],
    ids=["behind zeros", "all masked"],
)  # fmt: skip
def test_padding_is_never_counted_in_place_of_what_a_mask_keeps(fn, kept):
    with pytest.raises(ValueError, match="measure: no input of 'w' matters to what mask= keeps of fn's result"):
        masked(fn, [(x, kept) for x in BATCHES])


def test_a_layer_of_a_stack_without_rows_starts_from_no_variance():
    """An expert that no token is sent to: its shares are 0, not NaN, and the other one's ranks stand."""
    params = {"experts": normal(2, D, F)}
    fn = lambda p, x: jnp.einsum("ebd,edf->ebf", x * jnp.asarray([1.0, 0.0])[:, None, None], p["experts"])
    batches = [jnp.broadcast_to(x, (2, B, D)) for x in BATCHES]
    sites = jlora.sites(fn, params, batches[0])
    for method in (jlora.eva(2), jlora.corda(2)):
        start = jlora.apply(params, method=method, sites=sites, **measured(method, fn, params, batches, sites))
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(start.factors))
        assert start.sites[0].rank == 2


def test_the_gradient_is_the_mean_over_batches():
    params = {"w": normal(D, F)}
    loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["w"]) ** 2)
    sites = jlora.sites(loss, params, BATCHES[0])
    found = jlora.measure(loss, params, BATCHES, sites, "gradient")
    expected = sum(jax.grad(loss)(params, x)["w"] for x in BATCHES) / 2
    close(found["w"][0], expected)


# -- what is made of them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((D, F), ((0,), (1,), ())), ((F, D), ((1,), (0,), ())), ((H, D, K), ((1,), (0, 2), ())),
     ((D, L, F), ((0,), (2,), (1,))), ((H, L, K, F), ((0, 2), (3,), (1,)))],
)  # fmt: skip
def test_matrices_and_broadcast_forms_are_inverses(shape, axes):
    site = jlora.Site("w", shape, "float32", *axes, "linear")
    w = normal(*shape)
    stacked = matrices(w, site)
    np.testing.assert_array_equal(restore(stacked, site), w)
    a, b = normal(len(stacked), stacked.shape[1], 2), normal(len(stacked), 2, stacked.shape[2])
    np.testing.assert_array_equal(a_matrix(a_form(a, site), site), a)
    np.testing.assert_array_equal(b_matrix(b_form(b, site), site), b)
    assert (a_form(a, site).shape, b_form(b, site).shape) == site.factor_shapes(2)
    product = jnp.sum(a_form(a, site) * b_form(b, site), axis=-1)
    close(matrices(jnp.broadcast_to(product, shape), site), a @ b)


def one(method: jlora.Method, fn=None, **options) -> jlora.Adapted:
    params = {"w": normal(D, F)}
    fn = fn or (lambda p, x: x @ p["w"])
    sites = jlora.sites(fn, params, BATCHES[0])
    return jlora.apply(params, method=method, sites=sites, **measured(method, fn, params, BATCHES, sites), **options)


def test_eva_starts_with_the_right_singular_vectors_of_the_inputs():
    adapted = one(jlora.eva(2, rho=1.0))
    x = np.concatenate(BATCHES).astype(np.float64)
    _, _, vt = np.linalg.svd(x)
    a = np.asarray(adapted.factors["w"]["A"])[:, 0]
    np.testing.assert_allclose(np.abs(vt[:2] @ a), np.eye(2), atol=1e-5)
    assert not np.asarray(adapted.factors["w"]["B"]).any()


def test_eva_gives_ranks_where_they_explain_most():
    site = lambda path: jlora.Target(jlora.Site(path, (D, F), "float32", (0,), (1,), (), "linear"), rank=2, alpha=4.0)
    shares = {
        "a": np.array([0.9, 0.05, 0.03, 0.02]),
        "b": np.array([0.4, 0.3, 0.2, 0.1]),
        "c": np.array([0.04, 0.03, 0.02, 0]),
    }
    ranks = {s.path: (s.rank, s.alpha) for s in redistributed([site(p) for p in "abc"], shares)}
    assert ranks == {"a": (2, 4.0), "b": (4, 8.0), "c": (0, 0.0)}


def test_eva_keeps_the_scale_and_drops_weights_without_ranks():
    params = {"wide": normal(D, D), "narrow": normal(D, F)}
    fn = lambda p, x: (x @ p["wide"], jnp.ones((B, 1)) @ normal(1, D) @ p["narrow"])  # one direction explains all
    sites = jlora.sites(fn, params, BATCHES[0])
    method = jlora.eva(2, alpha=3.0)
    adapted = jlora.apply(params, method=method, sites=sites, **measured(method, fn, params, BATCHES, sites))
    assert {s.path: s.rank for s in adapted.sites} == {"wide": 3, "narrow": 1}
    assert all(s.alpha / s.rank == 1.5 for s in adapted.sites)


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_corda_decomposes_the_weight_by_its_inputs(mode):
    """`C^-1 SVD_r(C W)`, the largest or the smallest components."""
    adapted = one(jlora.corda(2, alpha=6.0, mode=mode))
    w, c = np.asarray(adapted.base["w"], np.float64), np.mean([square(x) for x in BATCHES], axis=0)
    c = c / np.trace(c) * D + 0.01 * np.eye(D)
    u, s, vt = np.linalg.svd(c @ w, full_matrices=False)
    part = slice(0, 2) if mode == "instruction" else slice(D - 2, D)
    expected = np.linalg.inv(c) @ (u[:, part] * s[part]) @ vt[part]
    a, b = (np.asarray(adapted.factors["w"][n], np.float64) for n in "AB")
    np.testing.assert_allclose(3.0 * a[:, 0] @ b[0].T, expected, atol=1e-4)


def test_lora_ga_starts_along_the_gradient():
    loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["w"]) ** 2)
    adapted = one(jlora.lora_ga(2, gamma=4.0), loss)
    gradient = sum(np.asarray(jax.grad(loss)(adapted.base, x)["w"], np.float64) for x in BATCHES)
    u, _, vt = np.linalg.svd(gradient)
    a, b = np.asarray(adapted.factors["w"]["A"])[:, 0], np.asarray(adapted.factors["w"]["B"])[0].T
    size = F**0.25 / 2
    np.testing.assert_allclose(np.abs(u[:, :2].T @ a), size * np.eye(2), atol=1e-3)
    np.testing.assert_allclose(np.abs(b @ vt[2:4].T), size * np.eye(2), atol=1e-3)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: jlora.apply({"w": normal(D, F)}, method=jlora.eva(2), sites=SITES), r"apply: eva starts from data: statistics = jlora.measure\(fn, params, batches, sites, 'covariance'\), and pass"),
        (lambda: one_with(jlora.eva(2), []), "measure: batches= is empty"),
        (lambda: one_with(jlora.eva(2), [normal(B, F)]), r"measure: fn\(params, batch\) fails on batch 0: dot_general requires"),
        (lambda: one_with(jlora.eva(2), [BATCHES[0] * jnp.nan]), "measure: the covariance of 'w' is not finite"),
        (lambda: one_with(jlora.eva(2), [BATCHES[0] * 0]), "measure: no covariance reaches 'w': fn's result does not depend on it"),
        (lambda: one_with(jlora.lora_ga(2), BATCHES), r"measure: fn\(params, batch\) fails on batch 0: fn is a loss and returns a"),
        (lambda: one_with(jlora.eva(2), 5), r"measure: batches= is a sequence of batches, not 5: \[batch\] for one"),
        (lambda: one_with(jlora.eva(2), {"x": BATCHES[0]}), r"measure: batches= is a sequence of batches, not a dict: \[batch\] for one"),
        (
            lambda: one_with(jlora.eva(2), BATCHES, lambda p, x: jnp.argmax(x @ p["w"])),
            r"measure: fn\(params, batch\) fails on batch 0: fn returns int32, no floating-point array that depends on the",
        ),
        (
            lambda: one_with(jlora.eva(2), BATCHES, lambda p, x: jnp.sum(x @ p["w"]), mask=lambda x: jnp.ones(B)),
            r"measure: fn\(params, batch\) fails on batch 0: mask= gives an array of shape \(5,\), which are no leading axes",
        ),
        (
            lambda: one_with(jlora.lora_ga(2), BATCHES, mask=lambda x: jnp.ones(B)),
            "measure: the gradient is that of a loss, which masks by itself: leave mask= out",
        ),
        (
            lambda: jlora.apply({"kernel": normal(D, F)}, rank=2, statistics={}),
            "apply: lora does not start from data: leave statistics= out",
        ),
        (
            lambda: jlora.apply({"w": normal(D, F)}, method=jlora.eva(2), sites=SITES, statistics={"v": jnp.ones((1, D, D))}),
            r"apply: statistics= lack 'w', whose covariance eva starts from: statistics = jlora.measure\(fn, .*\) of the same t",
        ),
        (
            lambda: jlora.apply({"w": normal(D, F)}, method=jlora.eva(2), sites=SITES, statistics={"w": jnp.ones((1, D, F))}),
            r"apply: statistics= are those of other weights, or of another kind: 'w' has shape \(1, 6, 8\), and its covariance "
            r"\(1, 6, 6\)",
        ),
        (
            lambda: jlora.measure(lambda p, x: x @ p["w"], {"w": normal(D, F)}, BATCHES, SITES, "variance"),
            "measure: statistic is one of 'covariance', 'gradient', not 'variance'",
        ),
        (
            lambda: jlora.measure(lambda p, x: x @ p["w"], {"w": normal(D, F)}, BATCHES, (), "covariance"),
            "measure: the program contracts none of the leaves with an input: ",
        ),
        (lambda: one_with(jlora.eva(7), BATCHES), "eva: rank 7 exceeds 6, the rank of 'w'"),
        (lambda: one_with(jlora.lora_ga(4), BATCHES, lambda p, x: jnp.mean(x @ p["w"])), r"lora_ga \(2r\): rank 8 exceeds 6"),
        (lambda: one_with(jlora.eva(2), BATCHES, kind="conv"), "measure: 'w' is no linear layer; leave it out with targets="),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        wrong()


SITES = jlora.sites(lambda p, x: x @ p["w"], {"w": normal(D, F)}, BATCHES[0])


@pytest.mark.parametrize("statistic", ["covariance", "gradient"])
def test_leaves_that_are_no_arrays_are_static(statistic):
    """Those of an Equinox module are functions, sizes and names."""
    model = eqx.nn.MLP(D, "scalar", F, 1, activation=jnp.tanh, key=jax.random.key(0))
    fn = lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2)
    sites = jlora.sites(fn, model, BATCHES[0])
    arrays, static = eqx.partition(model, eqx.is_array)
    of_arrays = lambda arrays, x: fn(eqx.combine(arrays, static), x)
    expected = jlora.measure(of_arrays, arrays, BATCHES, jlora.sites(of_arrays, arrays, BATCHES[0]), statistic)
    found = jlora.measure(fn, model, BATCHES, sites, statistic)
    assert list(found) == ["layers/0/weight", "layers/1/weight"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_statistics_that_are_none_are_refused():
    """Of one's own making, or a square weight's gradient: its eigenvalues would be those of half of it."""
    params, fn = {"w": normal(D, D)}, lambda p, x: jnp.mean((x @ p["w"]) ** 2)
    sites = jlora.sites(fn, params, BATCHES[0])
    gradient = jlora.measure(fn, params, BATCHES, sites, "gradient")
    apply = lambda s: jlora.apply(params, method=jlora.eva(2), sites=sites, statistics=s)
    with pytest.raises(ValueError, match="^apply: statistics= have no covariance of 'w': it is not symmetric$"):
        apply(gradient)
    with pytest.raises(ValueError, match="^apply: statistics= have a covariance of 'w' that is not finite$"):
        apply({"w": gradient["w"] * jnp.nan})
    with pytest.raises(
        TypeError, match="^apply: statistics= hold a shape .jax.ShapeDtypeStruct. and no numbers of 'w'$"
    ):
        apply(jax.eval_shape(lambda: gradient))


def test_ranks_that_depend_on_unknown_numbers_are_refused():
    statistics = jlora.measure(lambda p, x: x @ p["w"], {"w": normal(D, F)}, BATCHES, SITES, "covariance")
    apply = lambda p, s: jlora.apply(p, method=jlora.eva(2), sites=SITES, statistics=s)
    with pytest.raises(
        ValueError, match="^eva: how the ranks are given depends on the numbers in statistics=, which no t"
    ):
        jax.eval_shape(apply, {"w": normal(D, F)}, statistics)
    with pytest.raises(TypeError, match="^measure: the parameters hold shapes"):
        jlora.measure(
            lambda p, x: x @ p["w"], jax.eval_shape(lambda: {"w": normal(D, F)}), BATCHES, SITES, "covariance"
        )


def one_with(method, batches, fn=lambda p, x: x @ p["w"], kind="linear", **options) -> jlora.Adapted:
    sites = [dataclasses.replace(site, kind=kind) for site in SITES]
    params = {"w": normal(D, F)}
    return jlora.apply(params, method=method, sites=sites, **measured(method, fn, params, batches, sites, **options))


def test_progress_is_shown_where_a_person_watches(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    one(jlora.eva(2))
    assert "measure: batch 2 of 2, 0 s" in capsys.readouterr().err


# -- apply with a function and batches: one release more ---------------------------------------------------------------


OLD = r"^apply\(fn=, batches=, mask=\) goes in jlora 0.2: statistics = jlora.measure\("


def test_apply_still_measures_by_itself():
    params, fn, method = {"w": normal(D, F)}, lambda p, x: jnp.sum(jnp.where(KEPT, x @ p["w"], 0) ** 2), jlora.corda(2)
    sites = jlora.sites(fn, params, BATCHES[0])
    with pytest.warns(DeprecationWarning, match=OLD) as warned:
        old = jlora.apply(params, method=method, sites=sites, fn=fn, batches=iter(BATCHES))
    assert [warning.filename for warning in warned] == [__file__]
    new = jlora.apply(
        params, method=method, sites=sites, statistics=jlora.measure(fn, params, BATCHES, sites, "covariance")
    )
    for name in "AB":
        np.testing.assert_array_equal(old.factors["w"][name], new.factors["w"][name])


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (jlora.lora(2), {"mask": jnp.ones_like}, "apply: lora does not start from data: leave mask= out"),
        (jlora.lora(2), {"fn": jnp.dot, "batches": BATCHES}, "apply: lora does not start from data: leave fn= and batches= out"),
        (jlora.eva(2), {"fn": jnp.dot}, "apply: eva starts from data: pass statistics=, or fn= .of params and a batch. and batches="),
        (jlora.eva(2), {"fn": jnp.dot, "batches": BATCHES, "statistics": {}}, "apply: eva starts from data: pass statistics=, or fn="),
    ],
)  # fmt: skip
def test_what_apply_cannot_measure(method, given, message):
    with pytest.warns(DeprecationWarning, match=OLD), pytest.raises(ValueError, match=f"^{message}"):
        jlora.apply({"w": normal(D, F)}, method=method, sites=SITES, **given)


def test_a_method_that_starts_from_data_wants_arrays():
    shapes = {"w": jax.ShapeDtypeStruct((D, F), "float32")}
    for method in (jlora.eva(2), jlora.corda(2)):
        with pytest.raises(TypeError, match=f"^apply: {method.name} starts from data, and 'w' is a shape"):
            jlora.apply(shapes, method=method, sites=SITES, statistics={"w": jnp.eye(D)[None]})


# -- the steps of apply, alone -----------------------------------------------------------------------------------------


def test_the_steps_of_apply_are_apply():
    """`choose` makes no array; `start` gives those that `apply` holds, of the targets' new ranks."""
    params = {"wide": normal(D, D), "narrow": normal(D, F), "bias": normal(F)}
    sites = jlora.sites(lambda p, x: (x @ p["wide"], x @ p["narrow"] + p["bias"][None]), params, BATCHES[0])
    shapes = jax.eval_shape(lambda: params)
    choice = choose(shapes, jlora.eva(2), sites=sites, ranks={"wide": 3}, extras="bias")
    assert [(t.path, t.rank, t.alpha) for t in choice.targets] == [("narrow", 2, 2.0), ("wide", 3, 3.0)]
    assert [extra.path for extra in choice.extras] == ["bias"]
    assert jax.tree.leaves(choice.params) == jax.tree.leaves(shapes)
    some = {"wide": jnp.diag(jnp.arange(6.0))[None], "narrow": jnp.eye(D)[None], "more": jnp.ones(())}
    targets, arrays = start(dataclasses.replace(choice, params=params), jax.random.key(0), some)
    whole = jlora.apply(params, method=jlora.eva(2), sites=sites, ranks={"wide": 3}, extras="bias", statistics=some)
    assert targets == whole.sites
    assert {path: sorted(own) for path, own in arrays.items()} == {
        "wide": ["A", "B"],
        "narrow": ["A", "B"],
        "bias": ["value"],
    }
    jax.tree.map(np.testing.assert_array_equal, arrays, whole.factors)


def test_each_target_starts_from_a_key_of_its_own():
    params, method = {"wide": normal(D, D), "narrow": normal(D, F)}, jlora.lora(2)
    sites = jlora.sites(lambda p, x: (x @ p["wide"], x @ p["narrow"]), params, BATCHES[0])
    adapted = jlora.apply(params, method=method, sites=sites, key=3)
    for target in adapted.sites:
        key = tree.fold_path(jax.random.key(3), target.path)
        expected = method.acts.init(key, params[target.path], target)
        jax.tree.map(np.testing.assert_array_equal, adapted.factors[target.path], expected)
