"""Quantised bases on eight devices: codes and scales lie along the axes of their weight, and nothing else changes."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from tests.conformance import close, normal, randomised

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
PARAMS = {
    "up": {"kernel": normal(32, 64), "bias": normal(64)},
    "stack": {"kernel": normal(2, 64, 64, seed=1)},
    "down": {"kernel": normal(64, 32, seed=2)},
}
SPECS = {
    "up": {"kernel": P(None, "model"), "bias": P("model")},
    "stack": {"kernel": P(None, None, "model")},
    "down": {"kernel": P("model", None)},
}
X = normal(8, 32)
SITES = [
    jlora.Site("up/kernel", (32, 64), "float32", (0,), (1,), (), "linear"),
    jlora.Site("stack/kernel", (2, 64, 64), "float32", (1,), (2,), (0,), "linear"),
    jlora.Site("down/kernel", (64, 32), "float32", (0,), (1,), (), "linear"),
]
BASE = jlora.quantize(PARAMS, block=32, sites=SITES)
PLAIN = jlora.dequantize(BASE)


def predict(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"]["kernel"])
    return h @ params["down"]["kernel"]


def predict_explicit(params, x):
    """The same, saying where each product lies."""
    h = jnp.tanh(jnp.matmul(x, params["up"]["kernel"], out_sharding=P("data", "model")) + params["up"]["bias"][None])

    def layer(h, w):
        h = jax.sharding.reshard(h, P("data", None))
        return jnp.tanh(jnp.matmul(h, w, out_sharding=P("data", "model"))), None

    h, _ = jax.lax.scan(layer, h, params["stack"]["kernel"])
    return jnp.matmul(h, params["down"]["kernel"], out_sharding=P("data", None))


def loss(fn, params, x):
    return jnp.mean(fn(params, x) ** 2)


@functools.cache
def mesh(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)


def put(kind, tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh(kind), spec)), tree, specs)


@functools.cache
def placed(kind):
    """Parameters on the mesh, full and quantised there."""
    params = put(kind, PARAMS, SPECS)
    return params, jlora.quantize(params, block=32, sites=SITES)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_follow_the_weight(kind):
    _, base = placed(kind)
    spec = lambda x: tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))
    kernels = {name: base[name]["kernel"] for name in PARAMS}
    assert {name: spec(kernel.codes) for name, kernel in kernels.items()} == {
        "up": ("model", None),  # (outputs, inputs)
        "stack": (None, "model", None),
        "down": (None, "model"),
    }
    assert {name: spec(kernel.scales.codes) for name, kernel in kernels.items()} == {
        "up": ("model", None),
        "stack": (None, "model", None),
        "down": (None, "model"),
    }
    chex.assert_trees_all_equal(jax.device_get(jlora.dequantize(base)), jax.device_get(PLAIN))


METHODS = {"lora": jlora.lora(2), "dora": jlora.dora(2), "pissa": jlora.pissa(2), "vera": jlora.vera(4)}
ROWS = [
    pytest.param(f"{kind} {name}", marks=[] if name == "lora" else pytest.mark.once)
    for name in METHODS
    for kind in KINDS
]


@pytest.mark.parametrize("row", ROWS)
def test_a_step_on_a_mesh_is_that_on_one_device(row):
    kind, name = row.split()
    method, fn = METHODS[name], predict if kind == "auto" else predict_explicit
    _, base = placed(kind)
    here = randomised(jlora.apply(PLAIN, method=method, sites=SITES))
    with jax.set_mesh(mesh(kind)):
        there = jlora.apply(base, method=method, sites=SITES)
        factors = jax.tree.map(
            lambda like, x: jax.device_put(x, like.sharding) if like.committed else x, there.factors, here.factors
        )
        if name == "pissa":  # the signs of a decomposition are free
            buffers = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh(kind), P())), here.buffers)
            there = there.replace(buffers=buffers)
        there = there.replace(factors=factors)
        step = jlora.train_step(functools.partial(loss, fn), optax.sgd(0.1))
        state, _ = step(jlora.TrainState.create(there, step.tx), put(kind, X, P("data", None)))
        merged = jlora.merge(state.adapted)
    step = jlora.train_step(functools.partial(loss, predict), optax.sgd(0.1))
    expected, _ = step(jlora.TrainState.create(here, step.tx), X)
    close(jax.device_get(state.adapted.factors), expected.adapted.factors, 2e-5)
    close(jax.device_get(merged), jlora.merge(expected.adapted), 2e-5)


def lie_alike(got, like):
    pairs = zip(*(jax.tree.leaves(params["down"]["kernel"]) for params in (got, like)), strict=True)
    assert all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs)


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
def test_merging_stays_on_the_mesh(kind, tmp_path):
    _, base = placed(kind)
    with jax.set_mesh(mesh(kind)):
        adapted = randomised(jlora.apply(base, 2, sites=SITES))
        merged = jlora.merge(adapted)
        again = jlora.merge(adapted, requantize=True)
        jlora.save(tmp_path, adapted)
    lie_alike(again, base)
    assert jlora.load(tmp_path, BASE).method == adapted.method  # one fingerprint, however it lies
    chex.assert_trees_all_equal(jlora.unmerge(merged, adapted).base["up"]["kernel"], base["up"]["kernel"])


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
def test_starts_stay_on_the_mesh(kind):
    params, base = placed(kind)
    with jax.set_mesh(mesh(kind)):
        start = jlora.loftq(jlora.apply(params, 2, sites=SITES), block=32, iterations=1, sites=SITES)
        errors = jlora.quantization_error(params, start, nuclear=True, sites=SITES)
    lie_alike(start.base, base)
    expected = jlora.loftq(jlora.apply(PARAMS, 2, sites=SITES), block=32, iterations=1, sites=SITES)
    of = jlora.quantization_error(PARAMS, expected, nuclear=True, sites=SITES)
    assert errors == pytest.approx(of, rel=1e-3)


@pytest.mark.parametrize("checked", [False, True])
def test_inside_shard_map(checked):
    adapted, plain = (randomised(jlora.apply(base, 2, sites=SITES)) for base in (BASE, PLAIN))
    (factors, frozen), (_, still) = jlora.partition(adapted), jlora.partition(plain)
    line = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def of_part(factors, frozen, x):
        lifted = jlora.lift(jax.checkpoint(predict))
        gradient = jax.grad(lambda f: loss(lifted, jlora.combine(f, frozen), x))(factors)
        # Of factors that are the same on all devices the gradient is summed over them, if that is kept track of.
        return jax.tree.map(lambda g: g / 8 if checked else jax.lax.pmean(g, "data"), gradient)

    mapped = jax.shard_map(of_part, mesh=line, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=checked)
    expected = jax.grad(lambda f: loss(jlora.lift(predict), jlora.combine(f, still), X))(factors)
    close(jax.jit(mapped)(factors, frozen, X), expected, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_that_cuts_a_block(kind):
    cut = put(kind, PARAMS["up"]["kernel"], P("model", None))
    with pytest.raises(
        ValueError,
        match=r"^'up/kernel' of shape \(32, 64\): axis 0 of size 32 lies along 'model' in 2 parts, which cut through its "
        r"blocks of 32 weights along the axes \[0\]; what fits is .*, or the mesh along the axes \[1\]$",
    ):
        jlora.quantize({"up": {"kernel": cut}}, block=32)
