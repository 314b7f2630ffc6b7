"""Sums, negation, interpolation, TIES and DARE of adapters, extraction and lower ranks, each against NumPy in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import Site
from jlora.adapted.adapted import from_arrays, to_arrays
from jlora.adapted.compress import ProductSVD
from jlora.adapted.thin import largest
from tests.conformance import close, normal

pytestmark = pytest.mark.once

# Stacked kernels kept (in, out) and (out, in), a kernel of attention, a convolution, a table.
AXES = {
    "embed": ((10, 6), (0,), (1,), (), "embedding"),
    "stack": ((2, 6, 8), (1,), (2,), (0,), "linear"),
    "back": ((2, 8, 6), (2,), (1,), (0,), "linear"),
    "heads": ((6, 2, 4), (0,), (1, 2), (), "linear"),
    "conv": ((3, 4, 6), (0, 1), (2,), (), "conv"),
}
SITES = tuple(Site(path, shape, "float32", *rest) for path, (shape, *rest) in AXES.items())
PARAMS = {path: normal(*site[0], seed=3) for path, site in AXES.items()} | {"bias": normal(8), "table": normal(7, 3)}
EVERY = list(AXES)
# float32 has 1.2e-7: a sum is rounded a few times on the way through QR and SVD.
SUM, SVD = 1e-6, 2e-6


def adapted(method: jlora.Method, seed: int = 0, targets=EVERY, like=None, **options) -> jlora.Adapted:
    """An adapter that was trained: all its arrays are random, drawn by NumPy, whose generator compiles nothing.

    Args:
      method: the adapter's.
      seed: of its arrays.
      targets, options: of `apply`.
      like: a method whose arrays have the same shapes, for one that starts from data.
    """
    options = {"sites": SITES, "params": PARAMS, "targets": targets} | options
    params = options.pop("params")
    made = jax.eval_shape(lambda: jlora.apply(params, method=like or method, **options))
    rng = np.random.default_rng(seed)
    fill = lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32)
    arrays = jax.tree.map(fill, to_arrays(made))
    return from_arrays(params, arrays, method, made.sites, made.extras)


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def delta(of: jlora.Adapted, path: str, scale: float | None = None) -> np.ndarray:
    """`scale * A B` of a LoRA, by hand."""
    if path not in {site.path for site in of.sites}:
        return np.zeros(np.shape(of.base[path]))
    site = next(site for site in of.sites if site.path == path)
    a, b = (f64(of.factors[path][name]) for name in "AB")
    return (a * b).sum(-1) * (site.alpha / site.rank if scale is None else scale)


def relative(x, y) -> float:
    return float(np.linalg.norm(f64(x) - f64(y)) / np.linalg.norm(f64(y)))


def matrices(x: np.ndarray, path: str) -> np.ndarray:
    """(stack, in, out), by hand."""
    return {
        "embed": lambda: x[None],
        "stack": lambda: x,
        "back": lambda: x.transpose(0, 2, 1),
        "heads": lambda: x.reshape(1, 6, 8),
        "conv": lambda: x.reshape(1, 12, 6),
    }[path]()


def best(x: np.ndarray, path: str, rank: int) -> np.ndarray:
    """The best approximation (stack, in, out) of each matrix, by NumPy's SVD."""
    u, s, vt = np.linalg.svd(matrices(x, path), full_matrices=False)
    return (u[..., :rank] * s[:, None, :rank]) @ vt[:, :rank]


ONE = adapted(jlora.lora(3, alpha=6.0), 1, alphas={"conv": 1.5}, ranks={"heads": 2})
TWO = adapted(jlora.rslora(2, alpha=3.0), 2, ["stack", "back", "heads", "conv"])
SCALES = {path: 3.0 / np.sqrt(2.0) for path in AXES}  # of rsLoRA


def only(of: jlora.Adapted, *paths: str) -> jlora.Adapted:
    """The part of an adapter that is on some of its weights."""
    sites = tuple(site for site in of.sites if site.path in paths)
    return of.replace(sites=sites, factors={site.path: of.factors[site.path] for site in sites})


def exact(path: str, w1: float, w2: float) -> np.ndarray:
    return w1 * delta(ONE, path) + w2 * delta(TWO, path, SCALES[path])


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sum", "cat"])
def test_the_sum_of_deltas_is_exact(how):
    """Stacked, transposed, 3-D and convolution kernels and a table; other ranks, alphas, scales and targets."""
    mixed = jlora.combine_adapters([ONE, TWO], [0.7, -1.3], how)
    assert mixed.method == jlora.lora(5) and mixed.base is ONE.base
    assert {site.path: (site.rank, site.alpha) for site in mixed.sites} == {
        "embed": (3, 3.0), "stack": (5, 5.0), "back": (5, 5.0), "heads": (4, 4.0), "conv": (5, 5.0),
    }  # fmt: skip
    for path in AXES:
        assert relative(delta(mixed, path), exact(path, 0.7, -1.3)) < SUM


@pytest.mark.parametrize("how", ["sum", "svd"])
def test_a_sum_of_lower_rank_is_the_best_one(how):
    mixed = jlora.combine_adapters([ONE, TWO], [1.0, 0.5], how, rank=2)
    for path in AXES:
        assert relative(matrices(delta(mixed, path), path), best(exact(path, 1.0, 0.5), path, 2)) < SVD


def test_the_error_of_a_lower_rank_is_that_of_eckart_and_young():
    pair = [only(x, "stack", "conv") for x in (ONE, TWO)]
    small = jlora.combine_adapters(pair, [1.0, 0.5], rank=2)
    errors = jlora.compression_error(jlora.combine_adapters(pair, [1.0, 0.5], "cat"), small)
    assert list(errors) == ["conv", "stack"]  # in tree order
    for path, error in errors.items():
        s = np.linalg.svd(matrices(exact(path, 1.0, 0.5), path), compute_uv=False)
        assert error == pytest.approx(np.sqrt((s[:, 2:] ** 2).sum() / (s**2).sum()), rel=1e-5)
        assert error > 0.05


def test_svd_has_the_largest_rank_if_nothing_is_given():
    mixed = jlora.combine_adapters([ONE, TWO], [1.0, 0.5], "svd")
    assert {site.path: site.rank for site in mixed.sites} == {"embed": 3, "stack": 3, "back": 3, "heads": 2, "conv": 3}


def test_energy_is_the_share_that_is_kept():
    for energy, path in ((0.5, "heads"), (0.9, "conv"), (0.9, "stack")):
        mixed = jlora.combine_adapters([ONE, TWO], [1.0, 0.5], energy=energy)
        s = np.linalg.svd(matrices(exact(path, 1.0, 0.5), path), compute_uv=False) ** 2
        rank = max(1 + int((np.cumsum(row) / row.sum() < energy).sum()) for row in s)
        assert {site.path: site.rank for site in mixed.sites}[path] == rank < 5
    mixed = jlora.combine_adapters([ONE, TWO], [1.0, 0.5], energy=1.0, rank=2)
    assert {site.rank for site in mixed.sites} == {2}


def test_rslora_keeps_its_scale():
    """PEFT 0.21.2's combination is sqrt(r) too large: 2.0 for r = 4."""
    alone = adapted(jlora.rslora(4, alpha=4.0), 5, "heads")
    assert relative(delta(jlora.combine_adapters([alone], [1.0]), "heads"), delta(alone, "heads", scale=2.0)) < SUM


def test_factors_are_not_added_apart():
    """What PEFT's "linear" gives, the product of the sums of A's and of B's by the roots of the weights, is no sum."""
    one, two = (adapted(jlora.lora(3, alpha=6.0), seed, "stack") for seed in (1, 4))
    (a1, b1), (a2, b2) = ((f64(x.factors["stack"][n]) for n in "AB") for x in (one, two))
    want = 0.8 * delta(one, "stack") + 0.5 * delta(two, "stack")
    roots = np.sqrt(2.0 * np.array([0.8, 0.5]))
    linear = ((roots[0] * a1 + roots[1] * a2) * (roots[0] * b1 + roots[1] * b2)).sum(-1)
    assert relative(linear, want) > 0.5
    assert relative(delta(jlora.combine_adapters([one, two], [0.8, 0.5]), "stack"), want) < SUM


def test_negation_cancels_exactly():
    gone = jlora.combine_adapters([ONE, ONE], [0.3, -0.3])
    assert gone.sites == () and gone.factors == {}
    assert all(bool((x == y).all()) for x, y in zip(*map(jax.tree.leaves, (jlora.merge(gone), PARAMS)), strict=True))
    one, two = only(ONE, "embed", "conv"), only(TWO, "conv")
    rest = jlora.combine_adapters([one, two, one], [1.0, 1.0, -1.0])
    assert {site.path: site.rank for site in rest.sites} == {"conv": 2}  # nothing of what only the others have
    assert relative(delta(rest, "conv"), delta(TWO, "conv", SCALES["conv"])) < 5e-6  # of a sum with larger terms


def test_interpolation_ends_in_the_adapters():
    with_bias = [adapted(jlora.lora(2), seed, "stack", extras="bias") for seed in (1, 2)]
    for t, end in ((0.0, 0), (1.0, 1)):
        mixed = jlora.combine_adapters(with_bias, [1 - t, t])
        assert relative(delta(mixed, "stack"), delta(with_bias[end], "stack")) < SUM
        assert bool((mixed.factors["bias"]["value"] == with_bias[end].factors["bias"]["value"]).all())


def test_adapters_of_other_methods():
    trio = [adapted(method, 3 + i, "heads") for i, method in enumerate((jlora.dora(2), jlora.ia3(), jlora.lora(2)))]
    mixed = jlora.combine_adapters(trio, [0.5, 2.0, 1.0])
    base, merged = f64(PARAMS["heads"]), [f64(jlora.merge(x)["heads"]) for x in trio]
    want = sum(w * (x - base) for w, x in zip((0.5, 2.0, 1.0), merged, strict=True))
    assert relative(delta(mixed, "heads"), want) < 2e-6


# -- what thins out ----------------------------------------------------------------------------------------------------


def top(x: np.ndarray, density: float) -> np.ndarray:
    """Of each matrix (stack, in, out) the `int(density * size)` largest entries."""
    flat = x.reshape(len(x), -1)
    keep = np.argsort(-abs(flat), axis=1, kind="stable")[:, : int(density * flat.shape[1])]
    mask = np.zeros_like(flat)
    np.put_along_axis(mask, keep, 1.0, axis=1)
    return (flat * mask).reshape(x.shape)


def elected(weighted: np.ndarray, majority: str) -> np.ndarray:
    votes = (weighted if majority == "total" else np.sign(weighted)).sum(0)
    agree = np.sign(weighted) == np.where(votes >= 0, 1, -1)
    return (weighted * agree).sum(0) / np.maximum(agree.sum(0), 1)


THREE = adapted(jlora.lora(2), 6, "stack")
WEIGHTS = np.array([1.0, -0.5, 0.8])


def deltas(path: str) -> np.ndarray:
    of = [delta(ONE, path), delta(TWO, path, SCALES[path]), delta(THREE, path)]
    return np.stack([matrices(x, path) for x in of])  # (adapters, stack, in, out)


@pytest.mark.parametrize(
    ("how", "majority"), [("magnitude", "total"), ("ties", "total"), ("ties", "frequency")], ids=str
)
def test_thinned_by_magnitude(how, majority):
    trio = [only(x, "stack") for x in (ONE, TWO, THREE)]
    options = {"majority": majority} if how == "ties" else {}
    whole = jlora.combine_adapters(trio, WEIGHTS, how, density=0.3, energy=1.0, **options)
    small = jlora.combine_adapters(trio, WEIGHTS, how, density=0.3, rank=3, **options)
    errors = jlora.compression_error(whole, small)
    weighted = WEIGHTS[:, None, None, None] * np.stack([top(x, 0.3) for x in deltas("stack")])
    want = weighted.sum(0) if how == "magnitude" else elected(weighted, majority)
    assert relative(delta(whole, "stack"), want) < SVD
    s = np.linalg.svd(want, compute_uv=False)
    assert errors == {"stack": pytest.approx(np.sqrt((s[:, 3:] ** 2).sum() / (s**2).sum()), rel=1e-4)}
    assert small.sites[0].rank == 3


def test_the_sign_is_elected_by_mass_or_by_count():
    """Entries (3, -1, -1): the mass is positive, two of three signs are not."""
    rows = [{"w": jnp.full((2, 2), x)} for x in (3.0, -1.0, -1.0)]
    sites = [Site("w", (2, 2), "float32", (0,), (1,), (), "linear")]
    trio = [jlora.extract_lora({"w": jnp.zeros((2, 2))}, after, rank=1, sites=sites) for after in rows]
    ones = [1.0, 1.0, 1.0]
    value = lambda weights, **options: float(jlora.merge(
        jlora.combine_adapters(trio, weights, "ties", density=1.0, rank=1, **options))["w"][0, 0])  # fmt: skip
    assert value(ones) == pytest.approx(3.0) and value(ones, majority="frequency") == pytest.approx(-1.0)
    assert value([1.0, 1.0, 4.0]) == pytest.approx(-2.5)  # weights vote: the mass is -2, the mean that of -1 and -4
    assert value([1.0, 0.0, -1.0]) == pytest.approx(2.0)  # one without weight does not


def test_equal_entries_do_not_exceed_the_count():
    assert largest(jnp.array([1.0, -1.0, 1.0, 0.5]), 2).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert largest(jnp.array([1.0, -1.0]), 0).tolist() == [0.0, 0.0]


def test_dare_keeps_entries_at_random_and_rescales_them():
    pair = [adapted(jlora.lora(3), seed, "stack") for seed in (11, 12)]
    full = [matrices(delta(x, "stack"), "stack") / 0.6 for x in pair]
    noise = 1e-5

    def drawn_of(adapters: list, weights: list, how: str = "dare") -> np.ndarray:
        mixed = jlora.combine_adapters(adapters, weights, how, density=0.6, energy=1.0)
        return matrices(delta(mixed, "stack"), "stack")

    alone = drawn_of(pair[:1], [1.0])
    first = abs(alone) > noise
    np.testing.assert_allclose(alone, np.where(first, full[0], 0.0), atol=noise)
    assert 0.4 < first.mean() < 0.8 and (first[0] != first[1]).any()  # each layer draws its own
    rest = (drawn_of(pair, [1.0, 0.5]) - alone) / 0.5
    second = abs(rest) > 2 * noise
    np.testing.assert_allclose(rest, np.where(second, full[1], 0.0), atol=2 * noise)
    assert (first != second).any()  # the second one has a mask of its own
    weighted = np.stack([np.where(first, full[0], 0.0), 0.5 * np.where(second, full[1], 0.0)])
    np.testing.assert_allclose(drawn_of(pair, [1.0, 0.5], "dare_ties"), elected(weighted, "total"), atol=noise)


def test_what_is_drawn_depends_on_seed_and_path_alone():
    pair = [adapted(jlora.lora(3), seed, "stack") for seed in (11, 12)]

    def drawn(*more: jlora.Adapted, seed=0) -> np.ndarray:
        weights = [1.0, 0.5, *[0.0] * len(more)]
        mixed = jlora.combine_adapters([*pair, *more], weights, "dare", density=0.6, energy=1.0, seed=seed)
        return delta(mixed, "stack")

    np.testing.assert_array_equal(drawn(), drawn())
    np.testing.assert_array_equal(drawn(), drawn(ONE))  # which has other weights, too
    np.testing.assert_array_equal(drawn(), drawn(seed=jax.random.key(0)))
    assert (drawn() != drawn(seed=1)).any()
    same = {"a": PARAMS["heads"], "b": PARAMS["heads"]}
    sites = [Site(path, (6, 2, 4), "float32", (0,), (1, 2), (), "linear") for path in same]
    twice = from_arrays(same, dict.fromkeys(same, adapted(jlora.lora(2), 1, "heads").factors["heads"]), jlora.lora(2),
        tuple(jlora.Target(site, 2, 2.0) for site in sites), ())  # fmt: skip
    mixed = jlora.combine_adapters([twice], [1.0], "dare", density=0.5, energy=1.0)
    a, b = ((f64(mixed.factors[p]["A"]) * f64(mixed.factors[p]["B"])).sum(-1) for p in same)
    assert ((abs(a) > 1e-5) != (abs(b) > 1e-5)).any()  # each weight draws its own


# -- extras ------------------------------------------------------------------------------------------------------------


def test_extras_are_combined_as_their_differences():
    one = adapted(jlora.lora(2), 1, "stack", extras={"bias": None, "table": [4, 0]})
    two = adapted(jlora.lora(2), 2, "stack", extras={"table": [0, 6]})
    mixed = jlora.combine_adapters([one, two], [0.5, 2.0])
    assert mixed.extras == (jlora.Extra("bias"), jlora.Extra("table", (0, 4, 6)))
    bias, table = f64(PARAMS["bias"]), f64(PARAMS["table"])
    assert relative(mixed.factors["bias"]["value"], bias + 0.5 * (f64(one.factors["bias"]["value"]) - bias)) < SUM
    want = table.copy()
    for x, w in ((one, 0.5), (two, 2.0)):
        rows = list(x.extras[-1].rows)
        want[rows] += w * (f64(x.factors["table"]["rows"]) - table[rows])
    assert relative(jlora.merge(mixed)["table"], want) < SUM
    whole = jlora.combine_adapters([one, adapted(jlora.lora(2), 3, "stack", extras="table")], [1.0, 0.0])
    assert whole.extras == (jlora.Extra("bias"), jlora.Extra("table"))
    assert bool((jlora.merge(whole)["table"] == jlora.merge(one)["table"]).all())
    assert jlora.compression_error(one, jlora.combine_adapters([one], [1.0])) == pytest.approx(
        {"bias": 0.0, "stack": 0.0, "table": 0.0}, abs=SUM
    )


def test_rules_that_thin_out_do_so_to_extras():
    pair = [adapted(jlora.lora(2), seed, "stack", extras={"table": rows}) for seed, rows in ((1, [0, 1]), (2, [1, 5]))]
    mixed = jlora.combine_adapters(pair, [1.0, 0.5], "ties", density=0.5, rank=1)
    table, thin = f64(PARAMS["table"]), np.zeros((2, 3, 3))
    for i, rows in enumerate(([0, 1], [1, 2])):  # among 0, 1, 5
        of = f64(pair[i].factors["table"]["rows"]) - table[list(pair[i].extras[0].rows)]
        thin[i, rows] = (1.0, 0.5)[i] * top(of[None], 0.5)[0]  # 3 of its own 6 entries
    assert relative(mixed.factors["table"]["rows"], table[[0, 1, 5]] + elected(thin, "total")) < SUM


def test_factors_of_one_and_a_whole_leaf_of_another():
    whole = adapted(jlora.lora(2), 1, "stack", extras="conv")
    mixed = jlora.combine_adapters([whole, TWO], [0.5, 2.0])
    assert mixed.extras == (jlora.Extra("conv"),) and "conv" not in {site.path for site in mixed.sites}
    base = f64(PARAMS["conv"])
    want = base + 0.5 * (f64(whole.factors["conv"]["value"]) - base) + 2.0 * delta(TWO, "conv", SCALES["conv"])
    assert relative(mixed.factors["conv"]["value"], want) < SUM


# -- lower ranks and other methods -------------------------------------------------------------------------------------

MERGEABLE = {
    "lora": lambda: jlora.lora(2, alpha=3.0),
    "rslora": lambda: jlora.rslora(2, alpha=3.0),
    "loraplus": lambda: jlora.loraplus(2),
    "lora_fa": lambda: jlora.lora_fa(2),
    "dora": lambda: jlora.dora(2),
    "adalora": lambda: jlora.adalora(3, 2, total_steps=8),
    "pissa": lambda: jlora.pissa(2),
    "olora": lambda: jlora.olora(2),
    "eva": lambda: jlora.eva(2),
    "lora_ga": lambda: jlora.lora_ga(2),
    "corda": lambda: jlora.corda(2),
    "lora_xs": lambda: jlora.lora_xs(2),
    "vera": lambda: jlora.vera(4),
    "tied": lambda: jlora.tied(jlora.lora(3, alpha=5.0), [("q", "k")]),
    "loha": lambda: jlora.loha(2),
    "lokr": lambda: jlora.lokr(1),
    "ia3": lambda: jlora.ia3(),
    "oft": lambda: jlora.oft(2),
    "dylora": lambda: jlora.dylora(2),
    "bitfit": lambda: jlora.bitfit("bias"),
    "norms": lambda: jlora.norms("bias"),
    "full": jlora.full,
    "top_layers": lambda: jlora.top_layers(1),
    "together": lambda: jlora.together((jlora.dora(2), "stack"), (jlora.ia3(), "heads"), jlora.bitfit("bias")),
}
UNMERGEABLE = {"houlsby", "pfeiffer", "parallel_adapter", "prefix_tuning", "prompt_tuning", "p_tuning"}
FEW = {path: PARAMS[path] for path in ("stack", "bias")}
FEW_SITES = [site for site in SITES if site.path in ("stack", "heads")]


def of_few(name: str) -> jlora.Adapted:
    like = {"eva": jlora.lora(2), "lora_ga": jlora.pissa(2), "corda": jlora.pissa(2)}.get(name)
    params = FEW | ({"heads": PARAMS["heads"]} if name in ("together", "full") else {})
    return adapted(MERGEABLE[name](), 7, None, like, params=params, sites=[s for s in FEW_SITES if s.path in params])


def test_every_method_that_merges_is_in_the_table():
    assert set(MERGEABLE) | UNMERGEABLE == set(jlora.methods.METHODS)


@pytest.mark.parametrize("name", MERGEABLE)
def test_every_method_as_lora(name):
    """At full rank the merged weights."""
    trained = of_few(name)
    merged = jlora.merge(trained)
    sites = [site for site in FEW_SITES if site.path in trained.base]
    whole = jlora.to_lora(trained, energy=1.0, sites=sites)
    assert whole.method.name == "lora" and not whole.buffers and whole.base is trained.base
    for path, leaf in trained.base.items():
        want = f64(merged[path]) - f64(leaf)
        got = (
            f64(whole.factors[path]["value"]) - f64(leaf)
            if path == "bias" and path in whole.factors
            else delta(whole, path)
        )
        assert np.abs(got - want).max() <= 3e-6 * np.abs(f64(merged[path])).max()


@pytest.mark.parametrize("name", ["dora", "oft", "loha", "full"])
def test_a_method_at_a_lower_rank(name):
    trained = of_few(name)
    merged = jlora.merge(trained)
    small = jlora.to_lora(trained, rank=1, sites=[site for site in FEW_SITES if site.path in trained.base])
    errors = jlora.compression_error(trained, small)
    assert set(errors) == set(trained.factors) and {site.rank for site in small.sites} == {1}
    for path in {"stack", "heads"} & set(errors):
        s = np.linalg.svd(matrices(f64(merged[path]) - f64(PARAMS[path]), path), compute_uv=False)
        assert errors[path] == pytest.approx(np.sqrt((s[:, 1:] ** 2).sum() / (s**2).sum()), rel=1e-3)
    assert errors.get("bias", 0.0) == 0.0


def test_leaves_of_full_fine_tuning_get_factors_where_the_axes_are_known():
    trained = of_few("full")
    assert jlora.to_lora(trained) is not trained and [e.path for e in jlora.to_lora(trained).extras] == [
        "bias",
        "heads",
        "stack",
    ]
    small = jlora.to_lora(trained, rank=1, sites=FEW_SITES)
    assert [site.path for site in small.sites] == ["heads", "stack"] and small.extras == (jlora.Extra("bias"),)
    kept = adapted(jlora.lora(2), 1, "stack", extras="conv")  # extras of apply stay
    assert jlora.to_lora(kept, rank=1, sites=SITES).extras == (jlora.Extra("conv"),)


def test_a_lower_rank_is_the_best_one():
    for options in ({"rank": 1}, {"energy": 0.6}):
        small = jlora.reduce_rank(TWO, **options)
        for path in ("stack", "back", "heads", "conv"):
            rank = {site.path: site.rank for site in small.sites}[path]
            assert relative(matrices(delta(small, path), path), best(delta(TWO, path, SCALES[path]), path, rank)) < SVD
        close(small.factors, jlora.to_lora(TWO, **options).factors, 1e-6)


def test_nothing_of_the_size_of_a_weight_is_formed():
    n, m = 301, 307
    jaxpr = jax.make_jaxpr(ProductSVD(2))(jnp.ones((n, 4)), jnp.ones((4, m)))
    sizes = {int(np.prod(v.aval.shape)) for equation in jaxpr.eqns for v in equation.outvars}
    assert max(sizes) <= 4 * m


# -- extraction --------------------------------------------------------------------------------------------------------


def test_a_low_rank_difference_is_recovered():
    trained = only(TWO, "stack", "conv")
    after = jlora.merge(trained) | {"bias": PARAMS["bias"] + 1}
    found = jlora.extract_lora(PARAMS, after, rank=4, sites=SITES)
    assert {site.path: site.rank for site in found.sites} == {"stack": 2, "conv": 2}  # what is beyond is rounding
    assert found.extras == (jlora.Extra("bias"),) and "embed" not in found.factors and found.base is PARAMS
    for path in ("stack", "conv"):
        assert relative(delta(found, path), delta(TWO, path, SCALES[path])) < 3e-6
    assert max(jlora.compression_error(after, found).values()) < 1e-5


def test_the_energy_of_an_extraction():
    s = np.array([4.0, 2.0, 1.0, 0.5])
    before, after = (
        {"kernel": jnp.zeros((5, 4), jnp.bfloat16)},
        {"kernel": jnp.eye(5, 4) * jnp.asarray(s)[None].astype(jnp.float32)},
    )
    share = np.cumsum(s**2) / (s**2).sum()
    for rank in (1, 2, 3):
        found = jlora.extract_lora(before, after, energy=float(share[rank - 1]) - 1e-6)
        assert found.sites[0].rank == rank and found.base["kernel"] is before["kernel"]
        assert jlora.compression_error(after, found)["kernel"] == pytest.approx(np.sqrt(1 - share[rank - 1]), rel=1e-5)


def tuned() -> tuple[dict, dict]:
    before = {
        "dense": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
        "emb": {"embedding": jnp.ones((5, 4))},
        "w": jnp.ones((2, 3)),
        "steps": np.int32(1),
    }
    return before, jax.tree.map(lambda x: x + 1, before) | {"w": jnp.ones((2, 3))}


def test_what_else_changed_is_not_lost():
    before, after = tuned()
    with pytest.raises(
        ValueError, match=r"^extract_lora: 2 leaves changed and .* 'emb/embedding' \(5, 4\), 'steps' \(\) int32"
    ):
        jlora.extract_lora(before, after, rank=1)
    found = jlora.extract_lora(before, after, rank=1, targets=["kernel", "embedding"], ignore="steps")
    assert [site.path for site in found.sites] == ["dense/kernel", "emb/embedding"]
    assert found.extras == (jlora.Extra("dense/bias"),)
    close(jlora.merge(found), after | {"steps": before["steps"]}, 3e-6)
    whole = jlora.extract_lora(before, after, rank=1, extras=["emb", "bias"], ignore="steps")
    assert [extra.path for extra in whole.extras] == ["dense/bias", "emb/embedding"]
    with pytest.raises(
        ValueError, match="^extract_lora: 1 leaves changed and are neither targets .* Leaves: 'dense/bias'"
    ):
        jlora.extract_lora(before, after, rank=1, extras="emb", ignore="steps")
    few = jlora.extract_lora(before, after, rank=1, ignore=["steps", "emb", "bias"])
    assert list(few.factors) == ["dense/kernel"]


# -- errors ------------------------------------------------------------------------------------------------------------

KERNEL = {"kernel": jnp.eye(3)}
PLAIN = jlora.apply(KERNEL, rank=1)
PLAIN_TWO = jlora.apply({"kernel": 2 * jnp.eye(3)}, rank=1)
combined = jlora.combine_adapters


def of_transposed() -> jlora.Adapted:
    site = Site("kernel", (3, 3), "float32", (1,), (0,), (), "linear")
    return jlora.apply(KERNEL, rank=1, sites=[site])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: combined([], []), "combine_adapters: there is no adapter"),
        (lambda: combined([PLAIN], [1.0, 2.0]), "combine_adapters: 1 adapters and 2 weights: give one for each"),
        (lambda: combined([PLAIN], [np.nan]), "combine_adapters: weights[0] must be a finite number, not nan"),
        (lambda: combined([PLAIN], [1.0], "linear"), "combine_adapters: how must be one of 'sum', 'cat', 'svd', 'ties', 'dare', 'dare_ties', 'magnitude', not 'linear'"),
        (lambda: combined([PLAIN], [1.0], "ties", rank=1), "combine_adapters: 'ties' thins the updates out: give density=, above 0 and at most 1"),
        (lambda: combined([PLAIN], [1.0], "dare", rank=1, density=0.0), "combine_adapters: density must be above 0 and at most 1, not 0.0"),
        (lambda: combined([PLAIN], [1.0], density=0.5), "combine_adapters: 'sum' keeps all entries: leave density= out"),
        (lambda: combined([PLAIN], [1.0], "ties", density=0.5), "combine_adapters: 'ties' gives no low rank: give rank=, or energy= (1 keeps all but what is rounding)"),
        (lambda: combined([PLAIN], [1.0], "cat", rank=1), "combine_adapters: 'cat' keeps all ranks: leave rank= and energy= out, or take how='sum'"),
        (lambda: combined([PLAIN], [1.0], "magnitude", rank=1, density=0.5, majority="frequency"), "combine_adapters: 'magnitude' elects no sign: leave majority= out"),
        (lambda: combined([PLAIN], [1.0], "ties", rank=1, density=0.5, majority="mass"), "combine_adapters: majority must be 'total' or 'frequency', not 'mass'"),
        (lambda: combined([PLAIN], [1.0], rank=0), "combine_adapters: rank must be at least 1, not 0"),
        (lambda: combined([PLAIN], [1.0], energy=1.1), "combine_adapters: energy must be above 0 and at most 1, not 1.1"),
        (lambda: combined([jlora.apply(KERNEL, method=jlora.ia3())], [1.0], "svd"), "combine_adapters: 'svd': none of the adapters has a rank at 'kernel': give rank=, or energy="),
        (lambda: combined([PLAIN, PLAIN_TWO], [1.0, 1.0]), "combine_adapters: adapters 0 and 1 have other bases: the values of 'kernel' differ, and an update is one of its own base; load both onto one, jlora.load(folder, params)"),
        (lambda: combined([PLAIN, jlora.apply({"kernel": jnp.ones((3, 4))}, rank=1)], [1.0, 1.0]), "combine_adapters: two trees that differ: 'kernel' has shape (3, 3) in adapter 0, (3, 4) in adapter 1"),
        (lambda: combined([PLAIN, jlora.apply(KERNEL | {"bias": jnp.ones(3)}, rank=1)], [1.0, 1.0]), "combine_adapters: two trees that differ in 1 leaves: adapter 1 has 'bias', adapter 0 has not"),
        (lambda: combined([PLAIN, of_transposed()], [1.0, 1.0]), "combine_adapters: 'kernel' has axes [0] -> [1] in adapter 0 and [1] -> [0] in adapter 1: apply both with the same sites="),
        (lambda: combined([PLAIN.replace(factors={"kernel": {"A": jnp.full((3, 1, 1), jnp.inf), "B": jnp.ones((1, 3, 1))}})], [1.0]), "combine_adapters: factor 'A' of 'kernel' is not finite"),
        (lambda: jlora.reduce_rank(PLAIN), "reduce_rank: give rank=, or energy= (1 keeps all but what is rounding)"),
        (lambda: jlora.reduce_rank(jlora.apply(KERNEL, method=jlora.dora(1)), rank=1), "reduce_rank: dora is not W plus a low-rank product at 'kernel'; jlora.to_lora(adapted, rank=, energy=) approximates the merged weight"),
        (lambda: jlora.to_lora(jlora.apply(KERNEL, method=jlora.dora(1))), "to_lora: dora is not W plus a low-rank product at 'kernel'; with rank= or energy= it is approximated by one"),
        (lambda: jlora.to_lora(PLAIN, sites=SITES), "to_lora: sites= are for rank= or energy="),
        (lambda: jlora.to_lora(jlora.apply({"w": jnp.ones((2, 3))}, method=jlora.full()), rank=1), "to_lora: the names of 1 leaves do not tell their axes: pass sites=jlora.sites(fn, params, *args). Leaves: 'w' (2, 3)"),
        (lambda: jlora.extract_lora(KERNEL, KERNEL, rank=1), "extract_lora: before and after have the same values: there is nothing to extract"),
        (lambda: jlora.extract_lora(KERNEL, {"kernel": jnp.ones((3, 3))}), "extract_lora: give rank=, or energy="),
        (lambda: jlora.extract_lora(KERNEL, {"kernel": jnp.ones((3, 4))}, rank=1), "extract_lora: two trees that differ: 'kernel' has shape (3, 3) in before, (3, 4) in after"),
        (lambda: jlora.extract_lora(KERNEL, {"kernel": jnp.full((3, 3), jnp.nan)}, rank=1), "extract_lora: the update of 'kernel' is not finite, so that its SVD does not exist"),
        (lambda: jlora.extract_lora(KERNEL, {"kernel": jnp.ones((3, 3))}, rank=1, targets="kernel", extras="k"), "extract_lora: contradicting rules: 'kernel' is matched by targets= (factors) and by extras= (whole); keep one of them"),
        (lambda: jlora.extract_lora(KERNEL, {"kernel": jnp.ones((3, 3))}, rank=1, ignore="bias"), "ignore='bias' matches none of the 1 weights; the closest are 'kernel'"),
        (lambda: jlora.compression_error({"weight": jnp.ones(3)}, PLAIN), "compression_error: two trees that differ in 2 leaves: the first has 'kernel', the second has not"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make()


def test_no_adapter_is_taken_for_several():
    with pytest.raises(TypeError, match="^combine_adapters takes a list of Adapteds, got Adapted$"):
        combined(PLAIN, [1.0])
    with pytest.raises(TypeError, match=r"^combine_adapters takes an Adapted .*, got dict$"):
        combined([KERNEL], [1.0])
    with pytest.raises(TypeError, match=r"^combine_adapters: this adapter holds shapes \(jax.ShapeDtypeStruct\)"):
        combined([jax.eval_shape(lambda: PLAIN)], [1.0])


def test_adapters_of_activations_have_no_update():
    params = {"attn": {"key": {"kernel": jnp.eye(3)}, "value": {"kernel": jnp.eye(3)}}}
    with pytest.raises(ValueError, match="^combine_adapters: prefix_tuning acts on activations, and no weights of the"):
        combined([jlora.apply(params, method=jlora.prefix_tuning(2))], [1.0])


def test_errors_tell_what_only_one_changes():
    one, two = (adapted(jlora.lora(1), 1, path) for path in ("stack", "heads"))
    assert jlora.compression_error(one, two) == {"heads": float("inf"), "stack": pytest.approx(1.0)}
    assert jlora.compression_error(jlora.merge(one), one) == {"stack": pytest.approx(0.0, abs=1e-6)}
