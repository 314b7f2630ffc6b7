"""Laws that hold for every method, and the constants of each, pinned to its paper."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from jlora.methods import from_json, to_json
from jlora.methods.lora import low_rank_init
from jlora.models.attention import DotProductAttention
from tests.conformance import close, measured, normal, optimized, randomised
from tests.tiers import thorough

LINEAR, WINDOWED, EVERY = ("linear",), ("linear", "conv"), ("linear", "conv", "embedding")


class Row(NamedTuple):
    """A method in the table of laws.

    Attributes:
      make: the method, made anew.
      kinds: of the weights that it adapts here; () for one that trains leaves as they are.
      exact: whether the start is the base bit for bit, not up to a rounding; None where it is another function.
      is_lora: whether `to_lora` gives the same function.
      linen: whether it acts on activations: of the linen model below, not of the function.
    """

    make: Callable[[], jlora.Method]
    kinds: tuple[str, ...] = EVERY
    exact: bool | None = True
    is_lora: bool = True
    linen: bool = False


def on_linen(make: Callable[[], jlora.Method], exact: bool | None = None) -> Row:
    """A method on activations, on the weights that it chooses itself."""
    return Row(make, (), exact, is_lora=False, linen=True)


METHODS = {
    "lora": Row(lambda: jlora.lora(3, alpha=6.0)),
    "lora, kaiming_uniform": Row(lambda: jlora.lora(3, init="kaiming_uniform")),
    "rslora": Row(lambda: jlora.rslora(4, alpha=3.0)),
    "loraplus": Row(lambda: jlora.loraplus(3, ratio=4.0)),
    "lora_fa": Row(lambda: jlora.lora_fa(3)),
    "dora": Row(lambda: jlora.dora(3), exact=False, is_lora=False),
    "dora of rslora": Row(lambda: jlora.dora(jlora.rslora(2, alpha=5.0)), exact=False, is_lora=False),
    "adalora": Row(lambda: jlora.adalora(4, 2, total_steps=8, warmup=2, final=2)),
    "pissa": Row(lambda: jlora.pissa(3, alpha=2.0), exact=False),
    "pissa, fast": Row(lambda: jlora.pissa(2, iterations=2), exact=False),
    "olora": Row(lambda: jlora.olora(2), exact=False),
    "lora_xs": Row(lambda: jlora.lora_xs(3, alpha=2.0)),
    "eva": Row(lambda: jlora.eva(2), LINEAR),
    "corda": Row(lambda: jlora.corda(2), LINEAR, exact=False),
    "corda, knowledge": Row(lambda: jlora.corda(2, mode="knowledge"), LINEAR, exact=False),
    "lora_ga": Row(lambda: jlora.lora_ga(2), LINEAR, exact=False),
    "vera": Row(lambda: jlora.vera(8)),
    "loha": Row(lambda: jlora.loha(2, alpha=1.0)),
    "lokr": Row(lambda: jlora.lokr(1)),
    "lokr, whole": Row(lambda: jlora.lokr(20, factor=2)),
    "ia3": Row(lambda: jlora.ia3("back"), is_lora=False),
    "oft": Row(lambda: jlora.oft(4), WINDOWED, is_lora=False),
    "together": Row(lambda: jlora.together(jlora.lora(3), (jlora.ia3("back"), "stack|back")), (), is_lora=False),
    "tied": Row(lambda: jlora.tied(jlora.lora(3, alpha=6.0), [("stack", "conv")])),
    "dylora": Row(lambda: jlora.dylora(4, alpha=2.0)),
    "bitfit": Row(lambda: jlora.bitfit("scale"), ()),
    "norms": Row(lambda: jlora.norms("scale"), ()),
    "top_layers": Row(lambda: jlora.top_layers(1), ()),
    "full": Row(jlora.full, ()),
    "houlsby": on_linen(lambda: jlora.houlsby(3)),
    "pfeiffer, with a norm": on_linen(lambda: jlora.pfeiffer(3, layer_norm=True)),
    "parallel_adapter": on_linen(lambda: jlora.parallel_adapter(3, scale=2.0), exact=True),
    "prefix_tuning": on_linen(lambda: jlora.prefix_tuning(3)),
    "prefix_tuning, hidden": on_linen(lambda: jlora.prefix_tuning(3, hidden=5)),
    "together, MAM": on_linen(lambda: jlora.together(jlora.prefix_tuning(3), jlora.parallel_adapter(3, scale=2.0))),
    "prompt_tuning": on_linen(lambda: jlora.prompt_tuning(3)),
    "p_tuning, lstm": on_linen(lambda: jlora.p_tuning(3, hidden=5, encoder="lstm")),
}
L, D, F, H, K, V = 3, 16, 24, 4, 4, 10


def params() -> dict:
    return {
        "embed": normal(V, D),
        "stack": normal(L, D, F),
        "back": normal(L, D, F, seed=1),  # kept (out, in)
        "heads": normal(D, H, K),
        "conv": normal(3, D, D),
        "scale": 1 + normal(D),
    }


def predict(params, ids):
    h = params["embed"][ids] * params["scale"][None, None]  # (batch, time, D)

    def layer(h, kernels):
        up, down = kernels
        return h + jnp.einsum("btf,df->btd", jnp.tanh(h @ up), down), None

    h, _ = jax.lax.scan(layer, h, (params["stack"], params["back"]))
    h = jnp.tanh(jnp.einsum("btd,dhk->bthk", h, params["heads"])).reshape(h.shape)
    return jax.lax.conv_general_dilated(h, params["conv"], (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC"))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(D, dtype=x.dtype, name=n)(x).reshape(*x.shape[:2], H, K) for n in ("query", "key", "value"))
        return nn.Dense(D, dtype=x.dtype, name="out")(DotProductAttention(causal=True)(q, k, v).reshape(x.shape))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, dtype=x.dtype, name="proj")(jnp.tanh(nn.Dense(F, dtype=x.dtype, name="fc")(x)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        h = h + Attention(name="attn")(h)
        return h + MLP(name="mlp")(h), None


class Transformer(nn.Module):
    """Scanned layers: what a scan does not cut into layers fails here."""

    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(V, D, name="wte")(ids)  # in the parameters' dtype, which the layers keep
        h, _ = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=L)(name="h")(h, None)
        return nn.Dense(D, dtype=h.dtype, name="head")(h)


IDS = jnp.asarray([[1, 9, 0, 4], [2, 2, 3, 7]])
LINEN = jax.jit(Transformer().init)(jax.random.key(0), IDS)["params"]


def predict_linen(params, ids):
    return Transformer().apply({"params": params}, ids)


def model(name: str) -> tuple[Callable, dict]:
    """The function and the parameters that a row of the table is tested on."""
    return (predict_linen, LINEN) if METHODS[name].linen else (predict, params())


def loss_of(name: str) -> Callable:
    fn, _ = model(name)
    return lambda params, ids: jnp.mean(fn(params, ids) ** 2)


@functools.cache
def adapted(name: str, dtype=jnp.float32) -> jlora.Adapted:
    return adapt(name, jax.tree.map(lambda x: x.astype(dtype), model(name)[1]))


def adapt(name: str, base) -> jlora.Adapted:
    """A row of the table on a base of the model's own shapes."""
    row, (fn, _) = METHODS[name], model(name)
    method, sites = row.make(), jlora.sites(fn, base, IDS)
    options = {"targets": lambda site: site.kind in row.kinds} if row.kinds else {}
    options |= measured(method, loss_of(name), base, [IDS, IDS[::-1]], sites, **options)
    extras = "head/bias" if row.linen else "scale"
    return jlora.apply(base, method=method, sites=sites, extras=extras, key=3, **options)


def names(adapted: jlora.Adapted) -> str:
    """A pattern of the names that errors give the method, or one of several."""
    return f"({'|'.join(part.name for part, _ in adapted.method.parts)})"


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


# -- laws --------------------------------------------------------------------------------------------------------------


ON_WEIGHTS = [name for name, row in METHODS.items() if not row.linen]
ON_ACTIVATIONS = [name for name, row in METHODS.items() if row.linen]
UNSCALED = [name for name in METHODS if name in ON_ACTIVATIONS or name.split(",")[0].split(" ")[0] in ("dora", "oft")]
PLAIN = [name for name, row in METHODS.items() if row.is_lora]
ONE = "test_start_merged_weights_and_gradients_in_one_program"


@functools.cache
def of_weights(fn: Callable) -> Callable:
    """The outputs of a model, its loss and the gradient of the weights: compiled once for all methods."""
    loss = lambda params, ids: (jnp.mean((out := fn(params, ids)) ** 2), out)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_start_merged_weights_and_gradients_in_one_program(name):
    """The law of laws, in one compilation: the laws of the thorough tier say each part of it more exactly.

    The merged weights' side goes through the model's own gradient and that of `merge`, so that no method compiles the
    model a second time.
    """
    start, trained, row, (fn, base) = adapted(name), randomised(adapted(name), 0.2), METHODS[name], model(name)
    initial, (factors, frozen) = jlora.partition(start)[0], jlora.partition(trained)
    chex.assert_trees_all_equal(frozen, jlora.partition(start)[1])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def lifted(factors):
        out = jlora.lift(fn)(jlora.combine(factors, frozen), IDS)
        return jnp.mean(out**2), out

    if row.exact is not None:
        close(lifted(initial)[0][1], of_weights(fn)(base, IDS)[0][1], 2e-6)
    found, gradients = lifted(factors)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, factors)
    assert [part for part in jax.tree.leaves(gradients) if not jnp.any(part != 0)] == []
    if not row.linen:  # tests/test_activations.py has those of functions written out by hand
        weights, back = jax.vjp(jax.jit(lambda factors: jlora.merge(jlora.combine(factors, frozen))), factors)
        merged, of_merged = of_weights(fn)(weights, IDS)
        close((found, gradients), (merged, *back(of_merged)), 2e-5)


@pytest.mark.parametrize(
    "name", thorough([name for name in METHODS if name not in UNSCALED], ONE, ("lora", "pissa", "ia3"))
)
def test_a_scaled_update_is_that_of_the_merged_weights(name):
    trained = randomised(adapted(name))
    merged = jlora.merge(trained)
    for s in (0.5, 0):
        scaled = jlora.merge(jlora.scale(trained, s))
        close(scaled, jax.tree.map(lambda w0, w: w0 + s * (w - w0), trained.base, merged), 2e-5)


@pytest.mark.parametrize("name", UNSCALED)
def test_an_update_that_has_no_scale_is_refused(name):
    with pytest.raises(ValueError, match="^scale: "):
        jlora.scale(adapted(name), 0.5)


@pytest.mark.thorough(ONE)
def test_the_start_is_the_base_bit_for_bit(name):
    start, row, (fn, base) = adapted(name), METHODS[name], model(name)
    if row.kinds and name != "eva":  # which gives all ranks of a weight away if others explain more
        sites = jlora.sites(predict, params(), IDS)
        assert set(start.factors) == {site.path for site in sites if site.kind in row.kinds} | {"scale"}
    lifted, plain = optimized(jlora.lift(fn))(start, IDS), optimized(fn)(base, IDS)
    if row.exact:
        chex.assert_trees_all_equal(lifted, plain)
    elif row.exact is not None:  # |W| / |W| is 1, and A B - A0 B0 is 0, up to a rounding
        close(lifted, plain, 2e-6)
    else:
        assert lifted.shape == plain.shape and not (lifted == plain).all()


@pytest.mark.parametrize("name", thorough(ON_WEIGHTS, ONE, ("lora",)))
def test_merged_equals_lifted(name):
    trained, (fn, _) = randomised(adapted(name), 0.2), model(name)
    close(jlora.lift(fn)(trained, IDS), fn(jlora.merge(trained), IDS))


def test_nothing_is_materialised(name):
    fn, _ = model(name)
    assert jlora.explain(fn, adapted(name), IDS).materialised == ()


@pytest.mark.parametrize("name", ON_ACTIVATIONS)
def test_what_acts_on_activations_is_not_merged(name):
    trained = adapted(name)
    for refused in (jlora.merge, jlora.merge_error, lambda a: jlora.unmerge(a.base, a)):
        with pytest.raises(ValueError, match=f"^merge: {names(trained)} acts on activations, and no weights of"):
            refused(trained)


@pytest.mark.parametrize("name", thorough(ON_WEIGHTS, ONE, ("dora", "pissa", "ia3", "oft")))
def test_unmerge_restores_the_base(name):
    trained = randomised(adapted(name), 0.2)
    chex.assert_trees_all_equal(jlora.unmerge(jlora.merge(trained), trained), trained)


@pytest.mark.thorough(ONE)
def test_gradients_are_those_of_the_merged_weights_and_of_the_factors_alone(name):
    trained, loss_fn = randomised(adapted(name), 0.2), loss_of(name)
    factors, frozen = jlora.partition(trained)

    def lifted(factors):
        return jlora.lift(loss_fn)(jlora.combine(factors, frozen), IDS)

    def merged(factors):
        return loss_fn(jlora.merge(jlora.combine(factors, frozen)), IDS)

    gradients = jax.jit(jax.grad(lifted))(factors)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, factors)
    if not METHODS[name].linen:  # tests/test_activations.py has those of functions written out by hand
        close(gradients, jax.jit(jax.grad(merged))(factors), 2e-5)
    for path, arrays in gradients.items():
        for part, gradient in arrays.items():
            assert float(jnp.abs(gradient).max()) > 0, (path, part)


def test_a_method_made_anew_is_the_same_and_compiles_nothing_again(name):
    make, (fn, _) = METHODS[name].make, model(name)
    assert make() == make() and hash(make()) == hash(make())
    traced = []

    @jax.jit
    def forward(adapted, ids):
        traced.append(1)
        return jlora.lift(fn)(adapted, ids)

    forward.trace(adapted(name), IDS)  # what is traced anew is compiled anew
    forward.trace(randomised(adapted(name)).replace(method=make()), IDS)
    assert traced == [1]


def test_json_and_back(name):
    method = METHODS[name].make()
    data = json.loads(json.dumps(to_json(method)))
    assert from_json(data) == method and data["name"] == method.name
    assert from_json(data).alpha == method.alpha


def test_the_methods_differ():
    assert len({row.make() for row in METHODS.values()}) == len(METHODS)
    assert {row.make().name for row in METHODS.values()} == set(jlora.methods.METHODS)


@pytest.mark.parametrize("name", thorough(METHODS, ONE, ("lora", "houlsby")))
def test_the_same_numbers_under_remat_vmap_and_jit(name):
    trained, (fn, _) = randomised(adapted(name), 0.2), model(name)
    lifted = jlora.lift(fn)
    expected = lifted(trained, IDS)
    close(jax.jit(lifted)(trained, IDS), expected)
    close(jax.checkpoint(lifted)(trained, IDS), expected)
    close(jlora.lift(jax.checkpoint(fn))(trained, IDS), expected)
    close(jax.vmap(lambda ids: lifted(trained, ids[None])[0])(IDS), expected)


def test_saved_and_loaded(name, tmp_path):
    trained = randomised(adapted(name), 0.2)
    jlora.save(tmp_path, trained)
    back = jlora.load(tmp_path, trained.base)
    chex.assert_trees_all_equal(back, trained)
    assert back.method == trained.method and back.sites == trained.sites


@pytest.mark.parametrize("name", thorough(METHODS, ONE, ("lora", "adalora")))
def test_trains_what_is_trained_and_compiles_once(name, caplog):
    """Optimizer state and updates for the factors alone; the base and what is frozen are the same objects after."""
    start = adapted(name)
    step = jlora.train_step(loss_of(name), optax.sgd(0.003, momentum=0.9))
    state = jlora.TrainState.create(start, step.tx)
    moments = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.float32]
    extra = 2 * sum(jnp.size(start.factors[s.path][n]) for s in start.sites for n in "ABE") if name == "adalora" else 0
    assert sum(moments) == jlora.count(start).trainable + extra  # AdaLoRA: importance and uncertainty
    losses = []
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for _ in range(6):
            state, metrics = step(state, IDS)
            losses.append(float(metrics["loss"]))
    compiled = [r for r in caplog.records if r.getMessage().startswith("Finished XLA compilation of jit(program)")]
    assert len(compiled) == 1
    assert losses[-1] < losses[0]
    chex.assert_trees_all_equal((state.adapted.base, state.adapted.buffers), (start.base, start.buffers))
    for path, arrays in state.adapted.factors.items():
        for part, value in arrays.items():  # all ranks of one weight may be pruned
            assert name == "adalora" or bool((value != start.factors[path][part]).any()), (path, part)


SHARDED = ("lora", "dora", "adalora", "pissa", "vera", "lokr", "ia3", "oft", "full", "houlsby", "prefix_tuning, hidden")


@pytest.mark.parametrize("name", thorough(SHARDED, ONE, ("lora",)))
@pytest.mark.parametrize("devices", thorough([2, 4, 8], ONE, [8]))
def test_the_same_numbers_on_several_devices(name, devices):
    # Explicit axes are in tests/test_explicit.py: this model looks its table up by plain indexing, which JAX refuses there.
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    ids = jnp.tile(IDS, (4, 1))
    step = jlora.train_step(loss_of(name), optax.sgd(0.02))
    state, metrics = step(jlora.TrainState.create(adapted(name), step.tx), ids)
    sharded = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
    theirs, their_metrics = step(jlora.TrainState.create(adapted(name), step.tx), sharded)
    close(jax.device_get(theirs.adapted.factors), jax.device_get(state.adapted.factors))
    assert float(their_metrics["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)


@pytest.mark.parametrize("name", thorough(PLAIN, ONE, ("adalora", "pissa", "vera")))
def test_as_plain_lora(name):
    trained = randomised(adapted(name), 0.2)
    plain = jlora.to_lora(trained)
    assert plain.method.name == "lora" and not plain.buffers
    close(jlora.merge(plain), jlora.merge(trained))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in PLAIN])
def test_what_is_no_plain_lora_is_refused(name):
    why = "acts on activations and is no" if METHODS[name].linen else "is not W plus a low-rank product at '"
    trained = randomised(adapted(name), 0.2)
    with pytest.raises(ValueError, match=f"^to_lora: {names(trained)} {why}"):
        jlora.to_lora(trained)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if not row.make().acts.statistic])
def test_abstract_parameters(name):
    fn, base = model(name)
    options = {"method": METHODS[name].make(), "sites": jlora.sites(fn, base, IDS), "targets": _kinds(name)}
    made = jax.eval_shape(lambda base: jlora.apply(base, **options), base)
    abstract = jlora.apply(jax.eval_shape(lambda: base), **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, made)


def _kinds(name: str):
    return (lambda site: site.kind in METHODS[name].kinds) if METHODS[name].kinds else None


# Each side rounds activations to 8 bits at every layer: a few units of 2**-8 after five of them.
@pytest.mark.parametrize("name", thorough(ON_WEIGHTS, ONE, ("dora", "vera")))
def test_a_bf16_base_keeps_float32_factors_and_merges_to_bf16(name):
    trained = randomised(adapted(name, jnp.bfloat16), 0.2)
    assert {x.dtype for x in jax.tree.leaves(trained.factors)} == {jnp.dtype("float32")}
    close(jlora.lift(predict)(trained, IDS), predict(jlora.merge(trained), IDS), 2**-4)
    assert {x.dtype for x in jax.tree.leaves(jlora.merge(trained))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", thorough(ON_ACTIVATIONS, ONE))
def test_a_bf16_base_keeps_float32_factors_of_activations(name):
    trained = randomised(adapted(name, jnp.bfloat16), 0.2)
    assert {x.dtype for x in jax.tree.leaves(trained.factors)} == {jnp.dtype("float32")}
    wide = jlora.lift(predict_linen)(randomised(adapted(name), 0.2), IDS)
    close(jlora.lift(predict_linen)(trained, IDS).astype(jnp.float32), wide, 2**-4)


@pytest.mark.parametrize("dtype", thorough(["float32", "float64"], ONE, ["float64"]))
def test_factors_are_float32_in_a_program_of_64_bits(name, dtype):
    """Shapes and dtypes alone: the arithmetic of each method, of its start and of a step, under strict promotion."""
    method, (fn, params) = METHODS[name].make(), model(name)
    with jax.enable_x64(True):
        base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
        sites = jlora.sites(fn, base, IDS)
        kinds = METHODS[name].kinds
        targets = (lambda site: site.kind in kinds) if kinds else None
        # What starts from data would need numbers.
        plain = method._replace(acts=method.acts.replace(data=None)) if method.acts.statistic else method
        start = jlora.apply(base, method=plain, sites=sites, targets=targets)
        arrays = jax.tree.leaves((start.factors, start.buffers))
        assert {x.dtype for x in arrays} == {jnp.dtype("float32")}
        factors, frozen = jlora.partition(start)

        def loss(factors, frozen):
            value = jlora.lift(fn)(jlora.combine(factors, frozen), IDS)
            assert value.dtype == dtype
            return jnp.mean(value.astype(jnp.float32) ** 2)

        gradient = jax.eval_shape(jax.grad(loss), factors, frozen)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradient, factors)


# -- constants ---------------------------------------------------------------------------------------------------------


def one(method: jlora.Method, shape=(D, F), in_axes=(0,), out_axes=(1,), kind="linear", **options) -> jlora.Adapted:
    """A single weight with factors that are not zero."""
    stack = tuple(i for i in range(len(shape)) if i not in (*in_axes, *out_axes))
    site = jlora.Site("w", shape, "float32", in_axes, out_axes, stack, kind)
    return jlora.apply({"w": normal(*shape)}, method=method, sites=[site], targets="w", **options)


def numbers(adapted: jlora.Adapted) -> tuple[np.ndarray, ...]:
    """W, A (in, r), B (r, out) of a matrix, in float64."""
    factors = adapted.factors["w"]
    a, b = np.asarray(factors["A"], np.float64)[:, 0, :], np.asarray(factors["B"], np.float64)[0].T
    return np.asarray(adapted.base["w"], np.float64), a, b


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (jlora.lora(4), 1.0),  # alpha is the rank
        (jlora.lora(4, alpha=8), 2.0),  # alpha / r: LoRA, section 4.1
        (jlora.lora(8, alpha=1), 1 / 8),
        (jlora.rslora(4), 2.0),  # alpha / sqrt(r) with alpha = r
        (jlora.rslora(16, alpha=2), 0.5),  # rsLoRA, eq. 5
    ],
    ids=repr,
)
def test_the_scale_is_the_papers(method, scale):
    trained = randomised(one(method))
    w, a, b = numbers(trained)
    np.testing.assert_allclose(jlora.merge(trained)["w"], w + scale * (a @ b), rtol=1e-5, atol=1e-6)


def test_a_rank_or_alpha_of_one_site_changes_its_scale():
    trained = randomised(one(jlora.lora(4, alpha=8), ranks={"w": 2}, alphas={"w": 3.0}))
    w, a, b = numbers(trained)
    assert a.shape == (D, 2)
    np.testing.assert_allclose(jlora.merge(trained)["w"], w + 1.5 * (a @ b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "in_axes", "out_axes", "fan_in"),
    [
        ((300, 40), (0,), (1,), 300),
        ((40, 300), (1,), (0,), 300),
        ((3, 3, 30, 8), (0, 1, 2), (3,), 270),
        ((30, 4, 6), (0,), (1, 2), 30),
        ((4, 60, 8), (0, 1), (2,), 240),
        ((5, 100, 8), (1,), (2,), 100),
    ],
)
@pytest.mark.parametrize("init", ["gaussian", "kaiming_uniform", "inverse_rank"])
def test_a_starts_with_the_spread_of_loralib_and_b_at_zero(init, shape, in_axes, out_axes, fan_in):
    """loralib draws A by kaiming_uniform_(a=sqrt(5)): U(-1/sqrt(n), 1/sqrt(n)), variance 1 / (3 n); PEFT's gaussian

    has the variance 1 / r^2 for any n.
    """
    factors = one(jlora.lora(16, init=init), shape, in_axes, out_axes).factors["w"]
    a = np.asarray(factors["A"])
    assert not np.asarray(factors["B"]).any()
    deviation = 1 / 16 if init == "inverse_rank" else 1 / math.sqrt(3 * fan_in)
    assert abs(a.mean()) < 5 * deviation / math.sqrt(a.size)
    assert a.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * a.size))
    if init == "kaiming_uniform":
        bound = 1 / math.sqrt(fan_in)
        assert np.abs(a).max() <= bound and np.abs(a).max() > 0.95 * bound
    else:
        assert np.abs(a).max() > 2 * deviation  # no uniform one reaches so far


def test_an_embedding_starts_with_a_at_zero_and_b_normal():
    """loralib's Embedding starts in the same way."""
    factors = one(jlora.lora(16), (50, 200), kind="embedding").factors["w"]
    b = np.asarray(factors["B"])
    assert not np.asarray(factors["A"]).any()
    assert b.std() == pytest.approx(1.0, rel=5 / math.sqrt(2 * b.size)) and abs(b.mean()) < 5 / math.sqrt(b.size)


def test_stacked_layers_start_apart():
    a = one(jlora.lora(4), (3, D, F), (1,), (2,)).factors["w"]["A"]
    assert a.shape == (3, D, 1, 4) and len({np.asarray(layer).tobytes() for layer in a}) == 3


def dora_by_hand(w, a, b, m, scale):
    """`m V / |V|`, V = W + scale A B, the norm over the inputs: eq. 5 of the paper."""
    v = w + scale * (a @ b)
    return m * v / np.sqrt((v**2).sum(0))


def test_dora_is_the_papers():
    trained = randomised(one(jlora.dora(jlora.lora(4, alpha=6))))
    w, a, b = numbers(trained)
    m = np.asarray(trained.factors["w"]["magnitude"], np.float64)
    np.testing.assert_allclose(jlora.merge(trained)["w"], dora_by_hand(w, a, b, m[0], 1.5), rtol=1e-4, atol=1e-5)


def test_doras_magnitude_starts_as_the_norm_of_the_base():
    start = one(jlora.dora(4))
    np.testing.assert_allclose(start.factors["w"]["magnitude"][0], np.linalg.norm(start.base["w"], axis=0), rtol=1e-6)
    np.testing.assert_allclose(jlora.merge(start)["w"], start.base["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "in_axes", "out_axes"),
    [
        ((D, F), (0,), (1,)),
        ((F, D), (1,), (0,)),
        ((L, D, F), (1,), (2,)),
        ((3, D, F), (0, 1), (2,)),
        ((D, H, K), (0,), (1, 2)),
    ],
)
def test_doras_norm_is_over_the_inputs_of_each_output(shape, in_axes, out_axes):
    trained = randomised(one(jlora.dora(4), shape, in_axes, out_axes))
    norms = np.sqrt((np.asarray(jlora.merge(trained)["w"], np.float64) ** 2).sum(in_axes, keepdims=True))
    np.testing.assert_allclose(norms, np.abs(trained.factors["w"]["magnitude"]), rtol=1e-4)


def test_doras_norm_is_not_differentiated():
    """Section 4.3: gradients flow through V alone. With the norm differentiated they would be others."""
    trained = randomised(one(jlora.dora(jlora.lora(4, alpha=6))))
    x, target = normal(5, D), normal(5, F)

    def by_hand(factors, stop):
        a, b, m = factors["A"][:, 0, :], factors["B"][0].T, factors["magnitude"]
        v = trained.base["w"] + 1.5 * (a @ b)
        return jnp.sum(target * (x @ (m * v / stop(jnp.linalg.norm(v, axis=0, keepdims=True)))))

    def lifted(factors):
        return jnp.sum(target * jlora.lift(lambda p: x @ p["w"])(trained.replace(factors={"w": factors})))

    gradient = jax.grad(lifted)(trained.factors["w"])
    close(gradient, jax.grad(by_hand)(trained.factors["w"], jax.lax.stop_gradient))
    through = jax.grad(by_hand)(trained.factors["w"], lambda norm: norm)
    assert float(jnp.abs(gradient["A"] - through["A"]).max()) > 0.01 * float(jnp.abs(through["A"]).max())


def test_a_column_of_zeros_stays_finite():
    start = one(jlora.dora(2))
    start = jlora.apply({"w": start.base["w"].at[:, 3].set(0)}, method=jlora.dora(2), sites=start.sites, targets="w")
    f = lambda factors: jnp.sum(jlora.lift(lambda p: normal(2, D) @ p["w"])(start.replace(factors=factors)))
    value, gradient = jax.value_and_grad(f)(start.factors)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((value, gradient, jlora.merge(start))))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jlora.lora(0), "rank must be at least 1, not 0"),
        (lambda: jlora.lora(-2), "rank must be at least 1, not -2"),
        (lambda: jlora.rslora(2.0), "rank must be an integer of at least 1, not 2.0"),
        (lambda: jlora.dora(True), "rank must be an integer of at least 1, not True"),
        (lambda: jlora.lora("4"), "rank must be an integer of at least 1, not '4'"),
        (
            lambda: jlora.lora(2, init="zeros"),
            "init must be one of 'gaussian', 'kaiming_uniform', 'inverse_rank', not 'zeros'",
        ),
        (lambda: jlora.lora(2, dropout=1.0), "dropout must be at least 0 and below 1, not 1.0"),
        (lambda: jlora.lora(2, dropout=-0.1), "dropout must be at least 0 and below 1, not -0.1"),
        (lambda: jlora.lora(2, alpha=math.inf), "alpha must be a finite number, not inf"),
        (
            lambda: jlora.dora(jlora.dora(2)),
            "dora(inner): inner must be an additive low-rank method, as lora is, not dora",
        ),
        (
            lambda: from_json({"name": "lorra"}),
            "unknown method 'lorra'; the nearest is 'lora' of "
            + ", ".join(sorted(jlora.methods.METHODS))
            + ". A method of your own has its constructor in its config, and is loaded with methods=(constructor,)",
        ),
        (
            lambda: from_json({"name": "lora", "rank": 2, "beta": 1}),
            "method 'lora': lora() got an unexpected keyword argument 'beta'",
        ),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert str(caught.value) == message


def test_a_method_is_shown_as_it_was_written():
    assert repr(jlora.rslora(8, alpha=2)) == "rslora(rank=8, alpha=2, init='gaussian', dropout=0.0)"


def test_the_initial_factors_are_a_function_of_the_key():
    site = dataclasses.replace(one(jlora.lora(2)).sites[0])
    some, same, other = (low_rank_init(jax.random.key(k), site, "gaussian")["A"] for k in (0, 0, 1))
    assert (some == same).all() and not (some == other).all()
