"""Several methods in one adapter: who adapts what, what each does in training, and its file. Laws are in test_methods."""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.methods import from_json, to_json
from jlora.optim import of_method
from tests.conformance import close, normal, optimized, randomised

PARAMS = {
    "attn": {"key": {"kernel": normal(6, 6)}, "out": {"kernel": normal(6, 6, seed=1), "bias": normal(6)}},
    "mlp": {"fc": {"kernel": normal(6, 8)}, "proj": {"kernel": normal(8, 6)}},
}
X = normal(5, 6)
PATHS = ["attn/key/kernel", "attn/out/kernel", "mlp/fc/kernel", "mlp/proj/kernel"]


def fn(params, x):
    h = jnp.tanh(x @ params["attn"]["key"]["kernel"]) @ params["attn"]["out"]["kernel"]
    h = x + h + params["attn"]["out"]["bias"][None]
    return h + jnp.tanh(h @ params["mlp"]["fc"]["kernel"]) @ params["mlp"]["proj"]["kernel"]


def loss(params, x):
    return jnp.mean(fn(params, x) ** 2)


def together(*methods, **options) -> jlora.Adapted:
    return jlora.apply(PARAMS, method=jlora.together(*methods), **options)


def owners(adapted: jlora.Adapted) -> dict[str, str]:
    return {site.path: adapted.method.of(site).name for site in adapted.sites}


# -- who adapts what ---------------------------------------------------------------------------------------------------


def test_lora_takes_what_ia3_does_not_name():
    adapted = together(jlora.lora(2), (jlora.ia3("proj"), "mlp"))
    assert owners(adapted) == dict(zip(PATHS, ("lora", "lora", "ia3", "ia3"), strict=True))
    assert [(site.rank, site.alpha, site.part) for site in adapted.sites] == [(2, 2.0, 0)] * 2 + [(0, 0.0, 1)] * 2
    shapes = jax.tree.map(jnp.shape, adapted.factors["attn/key/kernel"] | adapted.factors["mlp/fc/kernel"])
    assert shapes == {"A": (6, 1, 2), "B": (1, 6, 2), "scale": (1, 8)}
    assert jlora.count(adapted).trainable == 2 * 24 + 8 + 8
    trained = randomised(adapted, 0.3)
    merged = jlora.merge(trained)
    a, b = (trained.factors["attn/key/kernel"][name] for name in ("A", "B"))
    close(merged["attn"]["key"]["kernel"], PARAMS["attn"]["key"]["kernel"] + a[:, 0] @ b[0].T)
    for path in ("fc", "proj"):  # outputs of fc, inputs of proj
        scale = trained.factors[f"mlp/{path}/kernel"]["scale"]
        close(merged["mlp"][path]["kernel"], PARAMS["mlp"][path]["kernel"] * scale)
    close(optimized(jlora.lift(fn))(trained, X), fn(merged, X))
    assert [row.path for row in jlora.explain(fn, trained, X).rows] == PATHS


def test_ranks_and_alphas_are_those_of_the_parts_that_have_them():
    rules = {"ranks": {"kernel": 3}, "alphas": {"out": 6.0}}
    adapted = together((jlora.lora(2), "attn"), (jlora.rslora(2, 1.0), "fc"), (jlora.ia3(), "proj"), **rules)
    assert [(site.rank, site.alpha) for site in adapted.sites] == [(3, 3.0), (3, 6.0), (3, 1.0), (0, 0.0)]


def test_leaves_are_trained_beside_it():
    adapted = together(jlora.lora(2), jlora.bitfit())
    assert list(owners(adapted)) == PATHS and [extra.path for extra in adapted.extras] == ["attn/out/bias"]
    adapted = together((jlora.lora(2), "mlp"), jlora.bitfit("attn/.*kernel"))
    assert list(owners(adapted)) == PATHS[2:] and [extra.path for extra in adapted.extras] == PATHS[:2]
    assert list(owners(together(jlora.lora(2), jlora.bitfit("attn/.*kernel")))) == PATHS[2:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jlora.together(jlora.lora(2)), "together takes two methods or more, not 1"),
        (lambda: jlora.together(jlora.lora(2), "ia3"), "together: number 2 must be a method, or (method, targets), not 'ia3'"),
        (lambda: jlora.together(jlora.lora(2), (jlora.ia3(), lambda site: True)), "together: targets of ia3 must be regular expressions, not <function"),
        (lambda: jlora.together(jlora.lora(2), (jlora.ia3(), "*")), "together: targets of ia3='*' is no regular expression: nothing to repeat at position 0"),
        (lambda: jlora.together(jlora.lora(2), (jlora.norms(), "a")), "together: norms trains leaves as they are and adapts none: leave its targets out"),
        (lambda: jlora.together(jlora.lora(2), jlora.together(jlora.lora(2), jlora.ia3())), "together: one of the methods is together(...) itself: give its methods one by one"),
        (lambda: together(jlora.lora(2), jlora.ia3()), "contradicting rules: 'attn/key/kernel' is adapted by lora and by ia3, number 1 and 2 of together; give each targets of its own: (method, targets)"),
        (lambda: together((jlora.lora(2), "attn"), (jlora.ia3(), "key")), "contradicting rules: 'attn/key/kernel' is adapted by lora and by ia3, number 1 and 2 of together; give"),
        (lambda: together(jlora.lora(2), (jlora.ia3(), ["attn", "mlp"])), "apply: the other parts of together leave lora no weight to adapt"),
        (lambda: together(jlora.lora(2), (jlora.ia3(), "mpl")), "targets='mpl' matches none of the 4 weights; the closest are 'mlp/fc/kernel'"),
        (lambda: together(jlora.lora(2), (jlora.ia3(), "mlp"), targets="attn"), "apply: each part of together has targets of its own"),
        (lambda: together(jlora.lora(2), (jlora.ia3(), "mlp"), ranks={"mlp": 3}), "ranks='mlp' matches none of the 2 weights"),
        (lambda: together((jlora.ia3(), "mlp"), (jlora.oft(2), "attn"), ranks={"mlp": 3}), "apply: together has no rank: leave ranks= and alphas= out"),
        (lambda: together((jlora.lora(2), "attn"), jlora.full()), "contradicting rules: 'attn/key/kernel' is matched by targets= (train factors of it) and by extras="),
        (lambda: together((jlora.lora(2), "key"), jlora.prefix_tuning(3)), "apply: prefix_tuning goes by the names of layers, and none of these weights has one that it knows"),
        (lambda: together((jlora.eva(2), "attn"), (jlora.ia3(), "mlp")), "apply: eva starts from data: statistics = jlora.measure(fn, params, batches, sites, 'covariance'), and pass statistics="),
        (lambda: jlora.scale(together((jlora.lora(2), "attn"), (jlora.dora(2), "mlp")), 0.5), "scale: the weight of dora is not the base plus an update"),
        (lambda: jlora.to_lora(together(jlora.lora(2), (jlora.ia3(), "mlp"))), "to_lora: ia3 is not W plus a low-rank product at 'mlp/fc/kernel'"),
        (lambda: jlora.bake_prompt(together(jlora.lora(2), (jlora.ia3(), "mlp"))), "bake_prompt: together(lora(rank=2, alpha=None, init='gaussian', dropout=0.0), (ia3(feedforward=None), 'mlp')) has no network"),
        (lambda: together(jlora.lora(2), (jlora.ia3(), "mlp")).replace(method=jlora.together(jlora.lora(3), jlora.ia3())), "replace(method=): rank is 2 in lora("),
        (lambda: together(jlora.lora(2), (jlora.ia3(), "mlp")).replace(method=jlora.lora(2)), "replace(method=): together("),
        (lambda: from_json({"name": "together", "*methods": [{"name": "lora"}, 8]}), "method 'together': method 'lora': lora() missing 1 required positional argument: 'rank'"),
        (lambda: from_json({"name": "together", "*methods": [[8]]}), "method 'together': together: number 1 must be a method, or (method, targets), not (8,)"),
        (lambda: from_json({"name": "together", "*methods": 8}), "method 'together': 'int' object is not iterable"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_said(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make()


def test_two_adapters_of_one_module_are_refused():
    params = {"mlp": {"kernel": normal(6, 6), "fc": {"kernel": normal(6, 6)}}}
    methods = (jlora.parallel_adapter(2), "fc"), (jlora.houlsby(2), "mlp/kernel")
    with pytest.raises(
        ValueError, match=r"^together: parallel_adapter at 'mlp/fc/kernel' and houlsby at 'mlp/kernel' act"
    ):
        jlora.apply(params, method=jlora.together(*methods))


# -- how each of them starts and trains --------------------------------------------------------------------------------


def test_each_starts_as_it_does_alone():
    sites = jlora.sites(fn, PARAMS, X)
    covariances = jlora.measure(loss, PARAMS, [X, 2 * X], sites, "covariance", targets="attn")
    both = covariances | jlora.measure(loss, PARAMS, [X, 2 * X], sites, "gradient", targets="fc")
    adapted = together((jlora.eva(2), "attn"), (jlora.lora_ga(2), "fc"), (jlora.lora_xs(2), "proj"), statistics=both, sites=sites)  # fmt: skip
    eva = jlora.apply(PARAMS, method=jlora.eva(2), targets="attn", sites=sites, statistics=covariances)
    assert {site.path: site.rank for site in adapted.sites[:2]} == {site.path: site.rank for site in eva.sites}
    for site in eva.sites:
        close(adapted.factors[site.path], eva.factors[site.path])
    assert {path: sorted(arrays) for path, arrays in adapted.buffers.items()} == {
        "mlp/fc/kernel": ["A0", "B0"], "mlp/proj/kernel": ["A", "B"],
    }  # fmt: skip
    assert sorted(adapted.factors["mlp/proj/kernel"]) == ["R"]


def test_keys_are_the_parts_own():
    alone = jlora.apply(PARAMS, method=jlora.lora(2), targets="attn", key=3)
    adapted = together((jlora.lora(2), "attn"), (jlora.lora(2), "mlp"), key=3)
    chex.assert_trees_all_equal({path: adapted.factors[path] for path in alone.factors}, alone.factors)


def test_one_step_is_that_of_each_part_alone():
    """At the start every update is zero, so that no part sees the others."""
    parts = {
        "key": jlora.loraplus(2, ratio=4.0),
        "out": jlora.adalora(3, 1, total_steps=4, interval=1, orthogonality=0.3),
        "mlp": jlora.lora(2),
    }
    adapted = together(*((method, pattern) for pattern, method in parts.items()))

    def after(adapted):
        factors, frozen = jlora.partition(adapted)
        tx = of_method(optax.sgd(0.1), adapted)

        def objective(factors):
            mine = jlora.combine(factors, frozen)
            return jlora.lift(loss)(mine, X) + sum(mine.method.regularisers(factors, mine.sites).values())

        gradient = jax.grad(objective)(factors)
        return optax.apply_updates(factors, tx.update(gradient, tx.init(factors), factors)[0])

    stepped = after(adapted)
    for pattern, method in parts.items():
        alone = jlora.apply(PARAMS, method=method, targets=pattern)
        own = {path: adapted.factors[path] for path in alone.factors}
        close({path: stepped[path] for path in own}, after(alone.replace(factors=own)))
        assert any(bool((stepped[path][n] != x).any()) for path in own for n, x in own[path].items())


def test_a_part_draws_for_itself():
    adapted = randomised(together((jlora.lora(4), "attn"), (jlora.dylora(4), "mlp")))
    drawn = [adapted.method.sampled(jax.random.key(i), adapted.factors, adapted.sites) for i in range(3)]
    ranks = [int((some["mlp/fc/kernel"]["A"] != 0).any((0, 1)).sum()) for some in drawn]
    assert set(ranks) <= {1, 2, 3, 4} and len(set(ranks)) > 1
    for some in drawn:
        chex.assert_trees_all_equal(some | {p: adapted.factors[p] for p in PATHS[2:]}, adapted.factors)


# -- files -------------------------------------------------------------------------------------------------------------


def test_it_is_shown_as_it_was_written():
    method = jlora.together(jlora.oft(4), (jlora.ia3(), ["mlp", "out"]))
    assert repr(method) == "together(oft(block_size=4, terms=0), (ia3(feedforward=None), ('mlp', 'out')))"
    assert from_json(json.loads(json.dumps(to_json(method)))) == method


def test_saved_loaded_and_resumed(tmp_path):
    methods = (jlora.lora_xs(2), "attn"), (jlora.dora(2), "mlp")
    trained = randomised(together(*methods, extras="bias"), 0.2)
    jlora.save(tmp_path / "adapter", trained)
    file = tmp_path / "adapter" / "adapter.json"
    record = json.loads(file.read_text())
    assert [site.get("part") for site in record["sites"]] == [None, None, 1, 1]  # as files of one method always were
    back = jlora.load(tmp_path / "adapter", PARAMS)
    chex.assert_trees_all_equal(back, trained)
    assert (back.method, back.sites) == (trained.method, trained.sites)

    state = jlora.TrainState.create(trained, jlora.optimizer(optax.adam(0.1), trained))
    with jlora.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(state)
        restored, _ = checkpoints.restore(state)
    chex.assert_trees_all_equal(restored.adapted, state.adapted)

    for part, message in (
        (2, r"sites\[3\].part is 2, and together has 2 parts"),
        (-1, "must be an integer of at least 0"),
    ):
        record["sites"][3]["part"] = part
        file.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=message):
            jlora.load(tmp_path / "adapter", PARAMS)


def test_what_targets_share_is_each_parts_own():
    params = {
        "attn": {name: {"kernel": normal(6, 6)} for name in ("key", "value")},
        "mlp": {"fc": {"kernel": normal(6, 6)}},
    }
    method = jlora.together(jlora.parallel_adapter(2), jlora.prefix_tuning(3, hidden=4))
    adapted = jlora.apply(params, method=method)
    assert sorted(adapted.factors["*"]) == ["1.bias", "1.embedding", "1.weight"]
    alone = jlora.apply(params, method=jlora.prefix_tuning(3, hidden=4))
    alone = alone.replace(
        factors={s.path: adapted.factors[s.path] for s in alone.sites}
        | {"*": {name.removeprefix("1."): x for name, x in adapted.factors["*"].items()}}
    )
    plain = jlora.bake_prompt(adapted)
    assert plain.method == jlora.together(jlora.parallel_adapter(2), jlora.prefix_tuning(3))
    expected = jlora.bake_prompt(alone).factors
    close({path: plain.factors[path] for path in expected}, expected)
    np.testing.assert_array_equal(plain.factors["mlp/fc/kernel"]["down"], adapted.factors["mlp/fc/kernel"]["down"])
