"""`apply` and what one does with its result; and every error of it, by its text."""

import dataclasses
import json
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora import methods
from tests.conformance import close, normal, randomised


def params() -> dict:
    return {
        "embed": {"embedding": normal(10, 6)},
        "up": {"kernel": normal(6, 8), "bias": normal(8)},
        "down": {"kernel": normal(8, 6), "bias": normal(6)},
    }


def predict(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return h @ params["down"]["kernel"] + params["down"]["bias"][None]


X = normal(5, 6)


# -- apply -------------------------------------------------------------------------------------------------------------


def test_all_linear_layers_are_adapted_and_the_base_is_untouched():
    base = params()
    adapted = jlora.apply(base, rank=2)
    assert {path: {n: x.shape for n, x in f.items()} for path, f in adapted.factors.items()} == {
        "down/kernel": {"A": (8, 1, 2), "B": (1, 6, 2)},
        "up/kernel": {"A": (6, 1, 2), "B": (1, 8, 2)},
    }
    assert all(x is y for x, y in zip(jax.tree.leaves(adapted.base), jax.tree.leaves(base), strict=True))
    chex.assert_trees_all_equal(base, params())


def test_the_same_call_gives_the_same_bits_and_another_key_others():
    some, same, other = (jlora.apply(params(), rank=2, key=key) for key in (0, jax.random.key(0), 1))
    chex.assert_trees_all_equal(some, same)
    for path in some.factors:
        assert not (some.factors[path]["A"] == other.factors[path]["A"]).all()


def test_another_target_changes_no_factor():
    one, both = (jlora.apply(params(), rank=2, targets=t) for t in ("up", ["up", "down", "embed"]))
    assert set(both.factors) == {"down/kernel", "embed/embedding", "up/kernel"}
    chex.assert_trees_all_equal(one.factors["up/kernel"], both.factors["up/kernel"])


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (None, ["down/kernel", "up/kernel"]),
        ("up", ["up/kernel"]),
        ("^d.*kernel$", ["down/kernel"]),
        (["up", "embedding"], ["embed/embedding", "up/kernel"]),
        (lambda site: site.shape == (8, 6), ["down/kernel"]),
    ],
)
def test_targets_choose(targets, paths):
    assert sorted(jlora.apply(params(), rank=2, targets=targets).factors) == paths


def test_the_first_rule_wins():
    adapted = jlora.apply(params(), rank=2, ranks={"up": 3, "kernel": 5}, alphas={"down": 7.0, ".": 1.0})
    assert {s.path: (s.rank, s.alpha) for s in adapted.sites} == {"down/kernel": (5, 7.0), "up/kernel": (3, 1.0)}


def test_extras_are_trained_as_they_are():
    adapted = jlora.apply(params(), rank=2, extras={"bias": None, "embedding": [1, 7]})
    trained = randomised(adapted)
    merged = jlora.merge(trained)
    chex.assert_trees_all_equal(merged["up"]["bias"], trained.factors["up/bias"]["value"])
    rows = np.delete(np.arange(10), [1, 7])
    chex.assert_trees_all_equal(merged["embed"]["embedding"][rows], params()["embed"]["embedding"][rows])
    chex.assert_trees_all_equal(
        merged["embed"]["embedding"][jnp.asarray([1, 7])], trained.factors["embed/embedding"]["rows"]
    )


def test_full_fine_tuning_is_the_same_interface():
    adapted = jlora.apply(params(), targets=(), extras=".*")
    assert jlora.count(adapted) == (6 * 10 + 6 * 8 * 2 + 14, 60 + 96 + 14) and jlora.count(adapted).percent == 100
    chex.assert_trees_all_equal(jlora.lift(predict)(adapted, X), predict(params(), X))


# -- merge, unmerge, partition -----------------------------------------------------------------------------------------


def test_merge_and_unmerge_are_inverse_bit_for_bit():
    trained = randomised(jlora.apply(params(), rank=2, extras="bias"))
    merged = jlora.merge(trained)
    close(predict(merged, X), jlora.lift(predict)(trained, X))
    again = jlora.unmerge(merged, trained)
    chex.assert_trees_all_equal(again, trained)


def test_unmerge_refuses_what_is_not_the_merged_weight():
    trained = randomised(jlora.apply(params(), rank=2))
    merged = jlora.merge(trained)
    with pytest.raises(ValueError, match=r"^unmerge: 'down/kernel' is not the merged weight of this adapter$"):
        jlora.unmerge(params(), trained)
    with pytest.raises(
        ValueError, match=r"^unmerge: the parameters have another tree structure than the adapter's base$"
    ):
        jlora.unmerge(merged["up"], trained)


def test_merge_works_under_jit_and_casts_once():
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    trained = randomised(jlora.apply(base, rank=2))
    merged = jax.jit(jlora.merge)(trained)
    factors = trained.factors["up/kernel"]
    wide = base["up"]["kernel"].astype(jnp.float32) + jnp.sum(factors["A"] * factors["B"], axis=-1)
    chex.assert_trees_all_equal(merged["up"]["kernel"], wide.astype(jnp.bfloat16))


def test_partition_and_combine_are_inverse():
    adapted = jlora.apply(params(), method=jlora.dora(2))
    factors, frozen = jlora.partition(adapted)
    assert frozen.factors == {} and factors is adapted.factors
    chex.assert_trees_all_equal(jlora.combine(factors, frozen), adapted)


def test_mask_is_true_at_what_is_trained():
    mask = jlora.mask(jlora.apply(params(), method=jlora.dora(2)))
    assert all(jax.tree.leaves(mask.factors)) and not any(jax.tree.leaves((mask.base, mask.buffers)))


def test_count_needs_no_arrays():
    abstract = jax.eval_shape(params)
    adapted = jax.eval_shape(lambda p: jlora.apply(p, rank=2, extras="bias"), abstract)
    assert jlora.count(adapted) == (2 * (2 * 14) + 14, 170 + 56)


def test_summary_is_a_table():
    text = jlora.summary(jlora.apply(params(), rank=2, extras={"embedding": [3]}))
    assert text == (
        "weight           shape   in -> out (stack)         rank  parameters\n"
        "down/kernel      (8, 6)  [0] -> [1]                2     28\n"
        "up/kernel        (6, 8)  [0] -> [1]                2     28\n"
        "embed/embedding          trained as it is: 1 rows        6\n"
        "lora(rank=2, alpha=None, init='gaussian', dropout=0.0): 62 of 226 parameters are trained (27.4336 %)"
    )


# -- as a pytree -------------------------------------------------------------------------------------------------------


def test_stacked_factors_under_vmap_share_the_base_product():
    """Per-example adapters: one product with the base for the whole batch, and two thin ones per adapter."""
    adapters = [randomised(jlora.apply(params(), rank=2, key=i)) for i in range(5)]
    adapters = [a.replace(factors=jax.tree.map(lambda x, i=i: x + i, a.factors)) for i, a in enumerate(adapters)]
    factors = jax.tree.map(lambda *x: jnp.stack(x), *(a.factors for a in adapters))
    lifted = jlora.lift(predict)

    def batched(factors, frozen, x):
        one = lambda factors, x: lifted(jlora.combine(factors, frozen), x[None])[0]
        return jax.vmap(one)(factors, x)

    _, frozen = jlora.partition(adapters[0])
    expected = jnp.stack([predict(jlora.merge(a), x[None])[0] for a, x in zip(adapters, X, strict=True)])
    close(batched(factors, frozen, X), expected)
    shapes = [
        sorted(v.aval.shape for v in eqn.invars) for eqn in dots(jax.make_jaxpr(batched)(factors, frozen, X).jaxpr)
    ]
    for kernel in ((6, 8), (8, 6)):
        assert sum(kernel in shape for shape in shapes) == 1  # W once, and never with a leading axis
    assert not any((5, *kernel) in shape for shape in shapes for kernel in ((6, 8), (8, 6)))


def dots(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(param, "jaxpr", param)
            if (hasattr(inner, "eqns") and eqn.primitive.name != "custom_vjp_call") or (
                hasattr(inner, "eqns") and param is eqn.params.get("call_jaxpr")
            ):
                yield from dots(inner)


# -- dropout -----------------------------------------------------------------------------------------------------------


def dropping(rate: float = 0.5) -> jlora.Adapted:
    return randomised(jlora.apply(params(), method=jlora.lora(2, dropout=rate)))


def test_dropout_needs_a_key_and_acts_on_the_low_rank_branch_alone():
    adapted, key = dropping(), jax.random.key(0)
    lifted = jlora.lift(predict)
    close(lifted(adapted, X), predict(jlora.merge(adapted), X))
    assert not np.allclose(lifted(jlora.with_dropout(adapted, key), X), lifted(adapted, X))
    start = jlora.apply(params(), method=jlora.lora(2, dropout=0.5))  # B is zero
    chex.assert_trees_all_equal(lifted(jlora.with_dropout(start, key), X), predict(params(), X))


def test_dropout_is_a_function_of_the_key():
    adapted, lifted = dropping(), jlora.lift(predict)
    some, same, other = (lifted(jlora.with_dropout(adapted, jax.random.key(k)), X) for k in (0, 0, 1))
    assert (some == same).all() and not (some == other).all()


def test_dropout_keeps_the_mean():
    adapted = dropping(0.3)
    linear = jlora.lift(lambda p, x: x @ p["up"]["kernel"])
    one = adapted.replace(sites=adapted.sites[1:], factors={"up/kernel": adapted.factors["up/kernel"]})
    mean = jax.vmap(lambda key: linear(jlora.with_dropout(one, key), X))(
        jax.random.split(jax.random.key(0), 4000)
    ).mean(0)
    np.testing.assert_allclose(mean, linear(one, X), atol=0.03)


def test_dropout_has_a_mask_per_site_and_per_stacked_layer():
    """Equal weights, factors and inputs: what differs is the mask."""
    base = {"a": jnp.zeros((3, 6, 6)), "b": jnp.zeros((3, 6, 6))}

    def fn(params, x):
        def layer(_, w):
            return None, (x @ w[0], x @ w[1])

        return jax.lax.scan(layer, None, (params["a"], params["b"]))[1]

    sites = jlora.sites(fn, base, X)
    assert all(site.stack_axes == (0,) for site in sites)
    adapted = jlora.apply(base, method=jlora.lora(2, dropout=0.5), sites=sites)
    adapted = adapted.replace(factors=jax.tree.map(jnp.ones_like, adapted.factors))
    a, b = jlora.lift(fn)(jlora.with_dropout(adapted, jax.random.key(0)), X)
    assert len({np.asarray(layer).tobytes() for layer in (*a, *b)}) == 6
    a, b = jlora.lift(fn)(adapted, X)
    assert len({np.asarray(layer).tobytes() for layer in (*a, *b)}) == 1


def test_gradients_through_dropout_are_those_of_its_mask():
    adapted = jlora.with_dropout(dropping(), jax.random.key(3))
    loss = lambda f, mode: jnp.sum(jnp.sin(jlora.lift(predict, forward_mode=mode)(adapted.replace(factors=f), X)))
    close(jax.grad(loss)(adapted.factors, False), jax.grad(loss)(adapted.factors, True))


# -- errors ------------------------------------------------------------------------------------------------------------

BOTH = "'down/kernel', 'up/kernel'"
ERRORS = {
    "rank zero": (lambda p: jlora.apply(p, rank=0), "rank must be at least 1, not 0"),
    "rank a float": (lambda p: jlora.apply(p, rank=2.0), "rank must be an integer of at least 1, not 2.0"),
    "rank a bool": (lambda p: jlora.apply(p, rank=True), "rank must be an integer of at least 1, not True"),
    "no rank": (lambda p: jlora.apply(p), "apply: give a rank, or a method such as jlora.rslora(16)"),
    "rank and method": (
        lambda p: jlora.apply(p, rank=2, method=jlora.rslora(2)),
        "apply: rslora(rank=2, alpha=None, init='gaussian', dropout=0.0) has its own rank and alpha: leave rank= and alpha= out",
    ),
    "data without need": (
        lambda p: jlora.apply(p, rank=2, statistics={}), "apply: lora does not start from data: leave statistics= out"
    ),
    "an array for batches": (
        lambda p: jlora.measure(predict, p, X, None, "covariance"),
        "measure: batches= is a sequence of batches, not an array: [batch] for one",
    ),
    "rank of a rule": (
        lambda p: jlora.apply(p, rank=2, ranks={"up": 0}), "ranks['up'] must be at least 1, not 0"
    ),
    "no match": (
        lambda p: jlora.apply(p, rank=2, targets="kernle"),
        "targets='kernle' matches none of the 3 weights; the closest are 'down/kernel', 'up/kernel', 'embed/embedding'",
    ),
    "no match of one of a list": (
        lambda p: jlora.apply(p, rank=2, targets=["up", "quer"]), "targets='quer' matches none of the 3 weights; the clo"
    ),
    "no match of a predicate": (
        lambda p: jlora.apply(p, rank=2, targets=lambda site: False), "targets= (a predicate) matches none of the 5 weights: 'd"
    ),
    "no match of ranks": (
        lambda p: jlora.apply(p, rank=2, ranks={"upp": 3}), "ranks='upp' matches none of the 2 weights; the closest are"
    ),
    "no match of extras": (
        lambda p: jlora.apply(p, rank=2, extras="bais"), "extras='bais' matches none of the 5 weights; the closest are"
    ),
    "a bias as a target": (
        lambda p: jlora.apply(p, rank=2, targets="up/bias"),
        "targets='up/bias' matches 'up/bias' of shape (8,), which no product contracts with an input: it has no low-rank form; "
        "train it as it is with extras=",
    ),
    "matched twice": (
        lambda p: jlora.apply(p, rank=2, targets="kernel", extras="up/kernel"),
        "contradicting rules: 'up/kernel' is matched by targets= (train factors of it) and by extras= (train the weight "
        "itself); keep one of them",
    ),
    "rows twice": (
        lambda p: jlora.apply(p, rank=2, extras={"embedding": [1], "embed": [2]}),
        "contradicting rules: extras= matches 'embed/embedding' twice, with different rows",
    ),
    "rows outside": (
        lambda p: jlora.apply(p, rank=2, extras={"embedding": [1, 10]}),
        "extras: rows [1, 10] of 'embed/embedding' must be distinct and within (10, 6)",
    ),
    "rows repeated": (
        lambda p: jlora.apply(p, rank=2, extras={"embedding": [1, 1]}), "extras: rows [1, 1] of 'embed/embedding' must be d"
    ),
    "no arrays": (lambda p: jlora.apply({"a": None, "b": "c"}, rank=2), "apply: the tree of parameters holds no arrays"),
    "empty": (lambda p: jlora.apply({}, rank=2), "apply: the tree of parameters holds no arrays"),
    "integer weights": (
        lambda p: jlora.apply({"kernel": jnp.ones((3, 4), jnp.int8)}, rank=2, targets="kernel"),
        "targets='kernel' matches 'kernel', whose dtype is int8: only floating-point weights can be adapted",
    ),
    "complex weights": (
        lambda p: jlora.apply({"kernel": jnp.ones((3, 4), jnp.complex64)}, rank=2, targets="kernel"),
        "targets='kernel' matches 'kernel', whose dtype is complex64: only floating-point weights can be adapted",
    ),
    "three axes": (
        lambda p: jlora.apply({"dense": {"kernel": jnp.ones((3, 4, 5))}}, rank=2),
        "'dense/kernel' of shape (3, 4, 5) is ambiguous: its name and rank do not tell which axes are contracted; pass "
        "sites=jlora.sites(fn, params, *args), or leave it out with targets=",
    ),
    "no kernels": (
        lambda p: jlora.apply({"w": jnp.ones((3, 4))}, rank=2),
        "apply: none of the leaves is a linear layer by Flax's conventions (a 'kernel'); pass sites=jlora.sites(fn, params, "
        "*args) to read them from the program. Leaves: 'w' (3, 4)",
    ),
    "sites of another tree": (
        lambda p: jlora.apply({"up": p["up"]}, rank=2, sites=jlora.sites(predict, p, X)),
        "sites= are those of another tree: 'down/bias' has shape (6,), params: no such leaf",
    ),
    "two leaves of one path": (
        lambda p: jlora.apply({"a": {"b": X}, "a/b": X}, rank=2),
        "two leaves of the tree have the path 'a/b'; rename one of the keys",
    ),
    "never read": (
        lambda p: jlora.lift(lambda p, x: x @ p["up"]["kernel"])(jlora.apply(p, rank=2), X),
        "1 of 2 adapted weights are never read by '<lambda>': 'down/kernel'. They would not be trained: leave them out with "
        "targets=, or lift the function that reads them",
    ),
    "never read, explained": (
        lambda p: jlora.explain(lambda p, x: x @ p["up"]["kernel"], jlora.apply(p, rank=2), X), "1 of 2 adapted weights are n"
    ),
    "factors of another tree": (
        lambda p: jlora.merge(
            jlora.combine(jlora.apply({"up": p["up"]}, rank=2).factors, jlora.partition(jlora.apply(p, rank=2))[1])
        ),
        "the factors are those of another tree: 1 paths do not agree, first 'down/kernel'; combine factors with the frozen "
        "part that they were split from",
    ),
    "base of another shape": (
        lambda p: jlora.lift(predict)(jlora.apply(p, rank=2).replace(base=p | {"up": {"kernel": X, "bias": X[0]}}), X),
        "the factors are those of another tree: 'up/kernel' has shape (5, 6) in the base, and its factors were made for (6, 8)",
    ),
    "factors of another rank": (
        lambda p: jlora.merge(jlora.combine(jlora.apply(p, rank=4).factors, jlora.partition(jlora.apply(p, rank=2))[1])),
        "the factors are those of another tree: 'down/kernel' has A (8, 1, 4), B (1, 6, 4), and this adapter A (8, 1, 2), B ",
    ),
    "factors that would broadcast": (
        lambda p: jlora.merge(jlora.combine(
            jlora.apply(p, rank=2, extras="up/bias").factors | {"up/bias": {"value": jnp.ones(1)}},
            jlora.partition(jlora.apply(p, rank=2, extras="up/bias"))[1],
        )),
        "the factors are those of another tree: 'up/bias' has value (1,), and this adapter value (8,)",
    ),
    "a site twice": (
        lambda p: jlora.apply(p, rank=2, sites=[site("up/kernel", (0,), (1,)), site("up/kernel", (1,), (0,))]),
        "sites=: 'up/kernel' is there twice, with axes of its own each; keep one of them",
    ),
    "a site without an axis": (
        lambda p: jlora.apply(p, rank=2, sites=[site("up/kernel", (0,), ())]),
        "sites=: the axes of 'up/kernel' ([0] -> [], stack []) are not each axis of its shape (6, 8) once",
    ),
    "a site with a negative axis": (
        lambda p: jlora.apply(p, rank=2, sites=[site("up/kernel", (0,), (-1,))]), "sites=: the axes of 'up/kernel' ([0] -> [-1]"
    ),
    "no products": (
        lambda p: jlora.apply(p, rank=2, sites=jlora.sites(lambda p, x: jnp.tanh(p["up"]["kernel"]), p, X)),
        "apply: the program contracts none of the leaves with an input: 'down/bias' (6,), ",
    ),
    "complex weights alone": (
        lambda p: jlora.apply({"kernel": jnp.ones((3, 4), jnp.complex64)}, rank=2, targets=lambda site: True),
        "'kernel' has dtype complex64: only floating-point weights can be adapted",
    ),
    "a pattern that is none": (
        lambda p: jlora.apply(p, rank=2, targets="*kernel"),
        "targets='*kernel' is no regular expression: nothing to repeat at position 0",
    ),
    "alpha zero": (
        lambda p: jlora.apply(p, rank=2, alpha=0), "alpha must not be 0: the factors would have no effect and no gradient"
    ),
    "alpha a string": (lambda p: jlora.apply(p, rank=2, alpha="16"), "alpha must be a finite number, not '16'"),
    "alpha of a rule": (
        lambda p: jlora.apply(p, rank=2, alphas={"up": jnp.nan}), "alphas['up'] must be a finite number, not nan"
    ),
    "nothing is read": (
        lambda p: jlora.lift(predict)(jlora.apply(p, targets=(), extras="embedding"), X),
        "1 of 1 adapted weights are never read by 'predict': 'embed/embedding'. They would not be trained",
    ),
    "NaN": (
        lambda p: jlora.merge(spoilt(p, jnp.nan)), "merge: factor 'A' of 'up/kernel' is not finite; the base is left as it is"
    ),
    "infinity": (
        lambda p: jlora.merge(spoilt(p, -jnp.inf)), "merge: factor 'A' of 'up/kernel' is not finite; the base is left as it is"
    ),
}  # fmt: skip


def site(path: str, in_axes: tuple[int, ...], out_axes: tuple[int, ...]) -> jlora.Site:
    return jlora.Site(path, (6, 8), "float32", in_axes, out_axes, (), "linear")


def spoilt(params, value) -> jlora.Adapted:
    adapted = jlora.apply(params, rank=2)
    factors = adapted.factors["up/kernel"]
    return adapted.replace(factors=adapted.factors | {"up/kernel": factors | {"A": factors["A"].at[0].set(value)}})


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_said(name):
    wrong, message = ERRORS[name]
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        wrong(params())


WRONG_TYPES = {
    "a method that was not called": (
        lambda p: jlora.apply(p, method=jlora.lora), "apply: method is a Method such as jlora.rslora(16), not <function lora"
    ),
    "a method's name": (
        lambda p: jlora.apply(p, method="adalorra"),
        "apply: method is a Method such as jlora.rslora(16), not 'adalorra'; the nearest name is jlora.adalora",
    ),
    "adapted twice": (
        lambda p: jlora.apply(jlora.apply(p, rank=2), rank=2), "apply: the parameters are adapted already; merge(adapted) first"
    ),
    "merge of plain parameters": (jlora.merge, "merge takes an Adapted (from jlora.apply or jlora.load), got dict"),
    "explain of plain parameters": (
        lambda p: jlora.explain(predict, p, X), "explain takes an Adapted (from jlora.apply) after the function, got dict"
    ),
    "rows that are none": (
        lambda p: jlora.apply(p, rank=2, extras={"embedding": 3}), "extras['embedding'] is None or a sequence of row numbers, "
    ),
    "extras by a function": (
        lambda p: jlora.apply(p, rank=2, extras=lambda path: True), "extras= takes patterns, or {pattern: row numbers}, not a f"
    ),
    "extras of None": (lambda p: jlora.apply(p, 2, extras=None), "extras= takes patterns, or {pattern: row numbers}, not None"),
    "a target that is a site": (
        lambda p: jlora.apply(p, 2, targets=jlora.sites(predict, p, X)[0]), "targets= is a pattern, a list of them or a predicate on Site, not Site("
    ),
    "sites that are a function": (
        lambda p: jlora.apply(p, 2, sites=predict), "sites= is what jlora.sites(fn, params, *args) gives, a sequence of Site, not <function"
    ),
    "sites that are a path": (
        lambda p: jlora.apply(p, 2, sites="up"), "sites= is what jlora.sites(fn, params, *args) gives, a sequence of Site, not 'up'"
    ),
    "ranks in a list": (lambda p: jlora.apply(p, 2, ranks=[4]), "ranks= is {pattern: value}, not [4]"),
    "merge of shapes": (
        lambda p: jlora.merge(jlora.apply(jax.eval_shape(lambda: p), 2)), "merge: this adapter holds shapes (jax.ShapeDtypeStruct) and no "
    ),
    "a combination the wrong way round": (
        lambda p: jlora.combine(*jlora.partition(jlora.apply(p, 2))[::-1]), "combine, after the factors, takes an Adapted (from jlora.apply "
    ),
    **{
        f"{fn.__name__} of plain parameters": (fn, f"{fn.__name__} takes an Adapted (from jlora.apply or jlora.load), got dict")
        for fn in (jlora.merge_error, jlora.to_lora, jlora.bake_prompt, jlora.partition, jlora.count, jlora.summary)
    },
    "unmerge of plain parameters": (lambda p: jlora.unmerge(p, p), "unmerge takes an Adapted (from jlora.apply or jlora.load), got d"),
    "with_dropout of plain parameters": (lambda p: jlora.with_dropout(p, 0), "with_dropout takes an Adapted (from jlora.apply or j"),
    "truncate of plain parameters": (lambda p: jlora.truncate(p, 1), "truncate takes an Adapted (from jlora.apply or jlora.load), got d"),
    "a key that is none": (lambda p: jlora.apply(p, rank=2, key="0"), "key is a seed or a key (jax.random.key, "),
    "an NNX module with other state": (
        lambda p: jlora.apply(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), rank=2),
        "apply: BatchNorm holds BatchStat beside its Params, whose updates would be lost; split it: graph, params, rest = nnx.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_what_has_a_wrong_type_is_said(name):
    wrong, message = WRONG_TYPES[name]
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        wrong(params())


def test_extras_win_over_the_default_targets():
    adapted = jlora.apply(params(), 2, extras="down")
    assert [s.path for s in adapted.sites] == ["up/kernel"]
    assert [e.path for e in adapted.extras] == ["down/bias", "down/kernel"]


def test_a_predicate_is_offered_what_can_be_adapted():
    assert [s.path for s in jlora.apply(params(), 2, targets=lambda site: "up" in site.path).sites] == ["up/kernel"]


def test_an_adapted_is_shown_in_one_line():
    method = "lora(rank=2, alpha=None, init='gaussian', dropout=0.0)"
    assert repr(jlora.apply(params(), 2)) == f"Adapted({method}: 2 weights, 0 extras, 56 of 226 parameters trained)"


# -- small things that are easily lost ---------------------------------------------------------------------------------


def test_keys_of_every_kind_are_the_same_key():
    draws = [jlora.apply(params(), rank=2, key=k) for k in (3, np.int64(3), jax.random.key(3), jax.random.PRNGKey(3))]
    for other in draws[1:]:
        chex.assert_trees_all_equal(draws[0].factors, other.factors)
    masked = [
        jlora.with_dropout(jlora.apply(params(), method=jlora.lora(2, dropout=0.5)), k)
        for k in (3, jax.random.PRNGKey(3))
    ]
    chex.assert_trees_all_equal(*(jlora.lift(predict)(adapted, X) for adapted in masked))


def test_numbers_of_numpy_and_jax_are_taken():
    adapted = jlora.apply(params(), np.int64(2), alpha=np.float32(3.0))
    assert adapted.sites[0].rank == 2 and adapted.method == jlora.lora(2, alpha=3.0)
    assert jlora.lora(2, alpha=jnp.float32(4), dropout=np.float32(0.5)) == jlora.lora(2, alpha=4.0, dropout=0.5)


WHOLE_NUMBERS = {
    "prefix_tuning": (lambda n: jlora.prefix_tuning(n, hidden=n), jlora.prefix_tuning(4, hidden=4)),
    "p_tuning": (lambda n: jlora.p_tuning(n, hidden=n), jlora.p_tuning(4, hidden=4)),
    "vera": (lambda n: jlora.vera(n, seed=n), jlora.vera(4, seed=4)),
    "lokr": (lambda n: jlora.lokr(n, factor=n), jlora.lokr(4, factor=4)),
    "pissa": (lambda n: jlora.pissa(n, iterations=n), jlora.pissa(4, iterations=4)),
    "lora_xs": (lambda n: jlora.lora_xs(n, iterations=n), jlora.lora_xs(4, iterations=4)),
    "adalora": (
        lambda n: jlora.adalora(n, n, total_steps=4 * n, warmup=n, final=n, interval=n),
        jlora.adalora(4, 4, total_steps=16, warmup=4, final=4, interval=4),
    ),
    "dylora": (lambda n: jlora.dylora(n, np.float32(n), minimum=n), jlora.dylora(4, 4.0, minimum=4)),
    **{m.__name__: (m, m(4)) for m in (jlora.parallel_adapter, jlora.prompt_tuning, jlora.top_layers, jlora.houlsby)},
}


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_a_method_of_numpys_numbers_can_be_written(name):
    """They come from a sweep over an array; found when the adapter is saved, training is over."""
    made, expected = WHOLE_NUMBERS[name]
    assert json.dumps(methods.to_json(made(np.int64(4)))) == json.dumps(methods.to_json(expected))


def test_ranks_of_numpy_can_be_written(tmp_path):
    adapted = jlora.apply(params(), 4, ranks={"up": np.int64(2)}, alphas={"up": jnp.float32(3.0)})
    jlora.save(tmp_path, adapted)
    assert jlora.load(tmp_path, params()).sites == adapted.sites
    short = jlora.truncate(jlora.apply(params(), method=jlora.dylora(4)), np.int64(2))
    assert json.dumps([site.to_json() for site in short.sites]) and repr(short.sites[0].rank) == "2"


@pytest.mark.parametrize("dtype", ["float32", jnp.float32, jnp.dtype("float32"), "bfloat16"], ids=repr)
def test_a_site_by_hand_is_as_one_that_was_found(dtype, tmp_path):
    by_hand = jlora.Site("up/kernel", np.shape(params()["up"]["kernel"]), dtype, [np.int64(0)], [1], [], "linear")
    adapted = jlora.apply(params(), 2, sites=[by_hand], targets="up")
    found = next(s for s in jlora.sites(predict, params(), X) if s.path == "up/kernel")
    assert adapted.sites[0].site == dataclasses.replace(found, uses=())
    jlora.save(tmp_path, adapted)
    assert jlora.load(tmp_path, params()).sites == adapted.sites
    assert jax.jit(jlora.lift(predict))(adapted, X).shape == (5, 6)


@pytest.mark.parametrize("around", [lambda adapted: adapted, lambda adapted: {"part": adapted}], ids=["all", "a part"])
def test_what_is_adapted_already_is_not_adapted_again(around):
    """As a part of a tree its base and its factors would be leaves like others."""
    tree = around(jlora.apply({"kernel": jnp.ones((3, 2))}, 1))
    with pytest.raises(TypeError, match="^sites: the parameters are adapted already: `adapted.sites` are theirs"):
        jlora.sites(lambda p, x: x, tree, jnp.ones((1, 3)))
    with pytest.raises(TypeError, match=r"^apply: the parameters are adapted already; merge\(adapted\) first"):
        jlora.apply(tree, 1)


def test_sites_are_of_the_dtype_of_the_tree():
    """Else the factors of an integer weight, whose sites were read from a float32 copy, would be rounded away."""
    whole = jax.tree.map(lambda x: x.astype(jnp.int8), params())
    message = "'up/kernel' has dtype int8: only floating-point weights can be adapted"
    with pytest.raises(ValueError, match=f"^{message}$"):
        jlora.apply(whole, 2, sites=jlora.sites(predict, params(), X), targets=lambda site: site.path == "up/kernel")
    known = jlora.apply(whole | {"up": params()["up"]}, 2, sites=jlora.sites(predict, params(), X), targets="up")
    with pytest.raises(
        ValueError, match="^sites=: the kind of 'up/kernel' is one of linear, conv, embedding, unknown, other"
    ):
        jlora.apply(params(), 2, sites=[dataclasses.replace(known.sites[0].site, kind="Linear")])


def test_sites_of_numpys_float64_are_read_without_a_warning():
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params())
    assert [s.kind for s in jlora.sites(predict, wide, X)] == [s.kind for s in jlora.sites(predict, params(), X)]


def test_patterns_may_be_compiled():
    assert [s.path for s in jlora.apply(params(), 2, targets=re.compile("^UP", re.IGNORECASE)).sites] == ["up/kernel"]


@pytest.mark.parametrize("method", [jlora.lora(2), jlora.dora(2)], ids=lambda method: method.name)
def test_adapted_can_be_pickled(method):
    adapted = jlora.apply(params(), method=method, extras="up/bias")
    again = pickle.loads(pickle.dumps(adapted))
    chex.assert_trees_all_equal(again, adapted)
    assert again.method == adapted.method and again.sites == adapted.sites


@pytest.mark.parametrize("method", [jlora.lora(2), jlora.dora(2)], ids=lambda method: method.name)
def test_abstract_parameters_are_adapted_abstractly(method):
    """Counts and memory of a model that was never allocated."""
    options = {"method": method, "extras": {"embedding": (1, 2)}}
    abstract = jlora.apply(jax.eval_shape(params), **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, jlora.apply(params(), **options))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))


def test_the_summary_names_what_is_frozen():
    text = jlora.summary(jlora.apply(params(), 2, targets="up"))
    assert "frozen, of two axes or more: 'down/kernel' (8, 6), 'embed/embedding' (10, 6)" in text


def test_an_extra_that_is_not_read_is_explained():
    explanation = jlora.explain(predict, jlora.apply(params(), 2, extras=["embedding", "bias"]), X)
    assert explanation.unread == ("embed/embedding",)
    assert "trained as they are, but never read: 'embed/embedding'" in str(explanation)


def test_two_adapted_trees_in_one_function():
    both = lambda p, q, x: predict(p, x) + predict(q, x)
    one, other = jlora.apply(params(), 2), jlora.apply({"net": params()}, 3)
    explanation = jlora.explain(lambda p, q, x: both(p, q["net"], x), one, other, X)
    assert {row.path for row in explanation.rows} == {s.path for s in (*one.sites, *other.sites)}


@pytest.mark.parametrize("method", [jlora.lora(2), jlora.dora(2)], ids=lambda method: method.name)
def test_what_was_merged_under_jit_is_unmerged(method):
    adapted = randomised(jlora.apply(params(), method=method))
    back = jlora.unmerge(jax.jit(jlora.merge)(adapted), adapted)
    chex.assert_trees_all_equal(back, adapted)


def test_what_a_merge_into_bf16_rounds_away():
    """An update below half a unit of 8 bits vanishes; a large one stays; float32 keeps both."""
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    lost = [jlora.merge_error(randomised(jlora.apply(base, 2), size))["up/kernel"] for size in (3e-3, 3.0)]
    assert lost[0] > 0.9 and lost[1] < 0.01
    assert jlora.merge_error(randomised(jlora.apply(params(), 2), 3e-2))["up/kernel"] < 1e-3
    assert jlora.merge_error(jlora.apply(base, 2)) == {"down/kernel": 0.0, "up/kernel": 0.0}
