"""`lift` on Equinox and Haiku: kernels stored (out, in), models that are trees themselves, names with "/" and "~"."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora
from jlora import tree
from tests.conformance import Case, adapt, check, check_values, close, merged_by_hand, normal, randomised

I, O, B, T, H, L, E, V = 16, 24, 8, 6, 4, 3, 4, 11  # noqa: E741 - in, out, batch, time, heads, layers, ensemble, vocabulary
KEY = jax.random.key(0)
X, XT = normal(B, I), normal(2, T, I)
IDS = jnp.asarray([[1, 10, 0], [4, 4, 2]])
Row = Callable[[], Case]


def filled(params: Any) -> Any:
    """Numbers in place of the parameters, no two arrays equal."""
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [normal(*leaf.shape, seed=20 + i) for i, leaf in enumerate(leaves)])


def kernels(params: Any, *names: str) -> set[str]:
    parts = {path: path.split("/") for path, leaf in tree.leaves(params)[0].items() if leaf.ndim > 1}
    return {path for path, (*parents, name) in parts.items() if name in names and "norm" not in parents}


# -- Equinox -----------------------------------------------------------------------------------------------------------


def over_batch(model: Callable[..., Any], *args: Any) -> Any:
    return jax.vmap(model)(*args)


def equinox(
    make: Callable[..., Any], *args: Any, run: Callable[..., Any] = over_batch, dense: tuple[str, ...] = ()
) -> Row:
    """A row of a table: `run(make(key=key), *args)`, partitioned before and combined inside the function."""
    return functools.partial(build_equinox, make, args, run, dense)


def build_equinox(
    make: Callable[..., Any], args: tuple[Any, ...], run: Callable[..., Any], dense: tuple[str, ...]
) -> Case:
    params, static = eqx.partition(make(key=KEY), eqx.is_inexact_array)
    fn = lambda params, *args: run(eqx.combine(params, static), *args)
    # vmap of W x gives (out, batch): XLA turns the product around, or does not, by what follows (JAX 0.12, CPU).
    return Case(fn, filled(params), args, dense, op_by_op=True)


class Layer(eqx.Module):
    """h + MLP(norm(h)) of one token, its activation a leaf of the tree."""

    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    activation: Callable[[jax.Array], jax.Array]
    missing: jax.Array | None = None

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(I)
        self.up = eqx.nn.Linear(I, O, key=up)
        self.down = eqx.nn.Linear(O, I, use_bias=False, key=down)
        self.activation = jax.nn.gelu

    def __call__(self, h):
        return h + self.down(self.activation(self.up(self.norm(h))))


class Tied(eqx.Module):
    """A table whose rows are the head's: `eqx.nn.Shared`."""

    shared: eqx.nn.Shared

    def __init__(self, key):
        table, head = eqx.nn.Embedding(V, I, key=key), eqx.nn.Linear(I, V, use_bias=False, key=key)
        self.shared = eqx.nn.Shared((table, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight)

    def __call__(self, ids):
        table, head = self.shared()
        return jax.vmap(head)(jnp.tanh(jax.vmap(table)(ids)))


def stacked(make: Callable[..., Any], count: int = L) -> Callable[..., Any]:
    return lambda key: eqx.filter_vmap(lambda key: make(key=key))(jax.random.split(key, count))


def scanned(remat: bool = False) -> Callable[[Any, jax.Array], jax.Array]:
    def run(layers: Any, h: jax.Array) -> jax.Array:
        params, static = eqx.partition(layers, eqx.is_array)
        body = lambda h, row: (jax.vmap(eqx.combine(row, static))(h), None)
        return lax.scan(jax.checkpoint(body) if remat else body, h, params)[0]

    return run


def attention(model: Any, x: jax.Array) -> jax.Array:
    causal = jnp.tril(jnp.ones((T, T), bool))
    return jax.vmap(lambda x: model(x, x, x, mask=causal))(x)


def ensemble(models: Any, x: jax.Array) -> jax.Array:
    return eqx.filter_vmap(lambda model, x: jax.vmap(model)(x), in_axes=(eqx.if_array(0), None))(models, x)


def recurrent(cell: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(O), x)[0]


def long_short(cell: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda carry, x: (cell(x, carry), None), (jnp.zeros(O), jnp.zeros(O)), x)[0][0]


def linear(key: jax.Array) -> eqx.nn.Linear:
    return eqx.nn.Linear(I, O, key=key)


def sequential(key: jax.Array) -> eqx.nn.Sequential:
    first, second = jax.random.split(key)
    relu = eqx.nn.Lambda(jax.nn.relu)
    return eqx.nn.Sequential([eqx.nn.Linear(I, O, key=first), relu, eqx.nn.Linear(O, I, key=second)])


def convolution(dims: int, *args: Any, **options: Any) -> Callable[..., Any]:
    return functools.partial(eqx.nn.Conv, dims, 6, 8, *args, **options)


IMAGES = normal(2, 6, 8, 8)
EQUINOX = {
    "Linear": equinox(linear, X),
    "Linear, one vector": equinox(linear, normal(I), run=lambda model, x: model(x)),
    "Linear, scalars": equinox(functools.partial(eqx.nn.Linear, I, "scalar"), X),
    "MLP": equinox(functools.partial(eqx.nn.MLP, I, O, 20, 2), X),
    "Sequential": equinox(sequential, X),
    "Conv1d, dilation": equinox(convolution(1, 3, dilation=2), normal(2, 6, 12)),
    "Conv2d": equinox(convolution(2, 3, padding=1), IMAGES),
    "Conv2d, stride, groups": equinox(convolution(2, (3, 2), stride=2, groups=2), IMAGES),
    "Conv2d, one image": equinox(convolution(2, 3), IMAGES[0], run=lambda model, x: model(x)),
    "Conv3d": equinox(convolution(3, 2), normal(2, 6, 4, 4, 4)),
    "ConvTranspose2d": equinox(functools.partial(eqx.nn.ConvTranspose2d, 6, 8, 3, stride=2), IMAGES),
    "Embedding": equinox(functools.partial(eqx.nn.Embedding, V, I), IDS, run=lambda m, ids: jax.vmap(jax.vmap(m))(ids)),
    "Embedding, one token": equinox(functools.partial(eqx.nn.Embedding, V, I), IDS[0, 1], run=lambda m, i: m(i), dense=("weight",)),
    "Shared embedding": equinox(Tied, IDS),
    "MultiheadAttention": equinox(functools.partial(eqx.nn.MultiheadAttention, H, I), XT, run=attention),
    "GRUCell": equinox(functools.partial(eqx.nn.GRUCell, I, O), XT, run=lambda m, x: jax.vmap(lambda x: recurrent(m, x))(x)),
    "LSTMCell": equinox(functools.partial(eqx.nn.LSTMCell, I, O), XT, run=lambda m, x: jax.vmap(lambda x: long_short(m, x))(x)),
    "LayerNorm, a function and a None": equinox(Layer, X),
    "filter_jit": equinox(Layer, X, run=eqx.filter_jit(over_batch)),
    "filter_checkpoint": equinox(Layer, X, run=lambda model, x: eqx.filter_checkpoint(over_batch)(model, x)),
    "scan over layers": equinox(stacked(Layer), X, run=scanned()),
    "scan of remat": equinox(stacked(Layer), X, run=scanned(remat=True)),
    "filter_vmap, an ensemble": equinox(stacked(linear, E), X, run=ensemble),
    "filter_grad of the input": equinox(
        Layer, X, run=lambda model, x: eqx.filter_grad(lambda x: jnp.sum(jax.vmap(model)(x) ** 2))(x)
    ),
    "WeightNorm": equinox(lambda key: eqx.nn.WeightNorm(linear(key)), X, dense=("layer/weight", "g")),
}  # fmt: skip

# -- Haiku -------------------------------------------------------------------------------------------------------------


def haiku(fn: Callable[..., Any], *args: Any, dense: tuple[str, ...] = (), rng: bool = False) -> Row:
    """A row of a table: `fn(*args)`, transformed."""
    return functools.partial(build_haiku, fn, args, dense, rng)


def build_haiku(fn: Callable[..., Any], args: tuple[Any, ...], dense: tuple[str, ...], rng: bool) -> Case:
    model = hk.transform(fn)
    params = filled(jax.eval_shape(model.init, KEY, *args))
    return Case(lambda params, *args: model.apply(params, KEY if rng else None, *args), params, args, dense)


class Residual(hk.Module):
    """Modules made in `__init__` have "~" in their names."""

    def __init__(self, name: str | None = None):
        super().__init__(name)
        self.up = hk.Linear(O, w_init=hk.initializers.VarianceScaling(0.1))
        self.down = hk.Linear(I, name="down")

    def __call__(self, h):
        norm = hk.LayerNorm(-1, create_scale=True, create_offset=True)
        return h + self.down(jax.nn.gelu(self.up(norm(h))))


def self_attention(x: jax.Array) -> jax.Array:
    causal = jnp.tril(jnp.ones((T, T), bool))[None, None]
    return hk.MultiHeadAttention(H, 5, value_size=7, w_init=hk.initializers.TruncatedNormal(0.1))(x, x, x, mask=causal)


def cross_attention(x: jax.Array, memory: jax.Array) -> jax.Array:
    return hk.MultiHeadAttention(H, 5, model_size=O, w_init=hk.initializers.RandomNormal())(x, memory, memory)


def tied(ids: jax.Array) -> jax.Array:
    table = hk.Embed(V, I)
    return jnp.tanh(table(ids)) @ table.embeddings.T


def unrolled(core: Callable[[], hk.RNNCore], roll: Callable[..., Any]) -> Callable[[jax.Array], jax.Array]:
    def fn(x: jax.Array) -> jax.Array:
        made = core()
        return roll(made, x, made.initial_state(x.shape[1]))[0]

    return fn


def layers(h: jax.Array, **options: Any) -> jax.Array:
    return hk.experimental.layer_stack(L, **options)(lambda h: Residual("layer")(h))(h)


def rematerialised(h: jax.Array) -> jax.Array:
    layer = Residual("layer")
    return hk.remat(layer)(hk.remat(layer)(h))


def own_parameter(x: jax.Array) -> jax.Array:
    return jnp.einsum("bi,oi->bo", x, hk.get_parameter("w", (O, I), init=jnp.ones))


HAIKU = {
    "Linear": haiku(lambda x: hk.Linear(O)(x), X),
    "Linear, w_init, no bias": haiku(lambda x: hk.Linear(O, False, w_init=hk.initializers.TruncatedNormal(0.1), name="a")(x), XT),
    "get_parameter": haiku(own_parameter, X),
    "MLP": haiku(lambda x: hk.nets.MLP([O, I])(x), X),
    "Sequential": haiku(lambda x: hk.Sequential([hk.Linear(O), jax.nn.relu, hk.Linear(I)])(x), X),
    "modules of a module": haiku(lambda x: Residual("outer")(Residual("outer")(x)), X),
    "Conv1D, CAUSAL": haiku(lambda x: hk.Conv1D(8, 3, padding=hk.pad.causal)(x), normal(2, 12, 6)),
    "Conv2D": haiku(lambda x: hk.Conv2D(8, 3)(x), normal(2, 8, 8, 6)),
    "Conv2D, NCHW, stride": haiku(lambda x: hk.Conv2D(8, (3, 2), stride=2, data_format="NCHW")(x), IMAGES),
    "Conv2D, groups": haiku(lambda x: hk.Conv2D(8, 3, feature_group_count=2)(x), normal(2, 8, 8, 6)),
    "DepthwiseConv2D": haiku(lambda x: hk.DepthwiseConv2D(2, 3)(x), normal(2, 8, 8, 6)),
    "Conv2DTranspose": haiku(lambda x: hk.Conv2DTranspose(8, 3, stride=2)(x), normal(2, 8, 8, 6)),
    "MultiHeadAttention": haiku(self_attention, XT),
    "MultiHeadAttention, cross": haiku(cross_attention, XT, normal(2, 5, 12)),
    "Embed": haiku(lambda ids: hk.Embed(V, I)(ids), IDS),
    "Embed, one-hot": haiku(lambda ids: hk.Embed(V, I, lookup_style="ONE_HOT")(ids), IDS),
    "Embed, tied": haiku(tied, IDS),
    "LSTM": haiku(unrolled(lambda: hk.LSTM(O), hk.dynamic_unroll), normal(T, B, I)),
    "LSTM, static unroll": haiku(unrolled(lambda: hk.LSTM(O), hk.static_unroll), normal(3, B, I)),
    "GRU": haiku(unrolled(lambda: hk.GRU(O), hk.dynamic_unroll), normal(T, B, I)),
    "DeepRNN": haiku(unrolled(lambda: hk.DeepRNN([hk.LSTM(O), hk.VanillaRNN(O)]), hk.dynamic_unroll), normal(T, B, I)),
    "layer_stack": haiku(layers, X),
    "layer_stack, unrolled": haiku(functools.partial(layers, unroll=L), X),
    "remat": haiku(rematerialised, X),
    "vmap": haiku(lambda x: hk.vmap(Residual("layer"), split_rng=False)(x), XT),
    "dropout": haiku(lambda x: hk.Linear(I)(hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(O)(x))), X, rng=True),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUINOX)
def test_equinox_has_the_values_of_the_merged_weights(name):
    case = EQUINOX[name]()
    assert check_values(case) == kernels(case.params, "weight", "weight_ih", "weight_hh") | set(case.dense)


@pytest.mark.thorough("test_equinox_has_the_values_of_the_merged_weights")
@pytest.mark.parametrize("name", EQUINOX)
def test_equinox_agrees_with_the_merged_weights(name):
    case = EQUINOX[name]()
    check(case)
    assert set(adapt(case).factors) == kernels(case.params, "weight", "weight_ih", "weight_hh") | set(case.dense)


LOOSE = ("dropout",)  # hk.dropout multiplies by a boolean


every_haiku = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.loose_promotion) if n in LOOSE else n for n in HAIKU]
)


@every_haiku
def test_haiku_has_the_values_of_the_merged_weights(name):
    case = HAIKU[name]()
    assert check_values(case) == kernels(case.params, "w", "embeddings", "w_i", "w_h")


@pytest.mark.thorough("test_haiku_has_the_values_of_the_merged_weights")
@every_haiku
def test_haiku_agrees_with_the_merged_weights(name):
    case = HAIKU[name]()
    check(case)
    assert set(adapt(case).factors) == kernels(case.params, "w", "embeddings", "w_i", "w_h")


def test_kernels_stored_out_in_are_told_from_the_program():
    sites = {
        site.path: (site.in_axes, site.out_axes, site.stack_axes) for site in adapt(EQUINOX["scan over layers"]()).sites
    }
    assert sites == {"up/weight": ((2,), (1,), (0,)), "down/weight": ((2,), (1,), (0,))}


def test_haiku_paths_keep_slashes_and_tildes():
    assert list(adapt(HAIKU["modules of a module"]()).factors) == [
        "outer/~/down/w",
        "outer/~/linear/w",
        "outer_1/~/down/w",
        "outer_1/~/linear/w",
    ]


def test_an_equinox_model_is_adapted_whole():
    """No partition: functions are leaves of the tree, and stay there."""
    model = Layer(KEY)
    fn = lambda model, x: jax.vmap(model)(x)
    adapted = randomised(jlora.apply(model, rank=3, alpha=6.0, sites=jlora.sites(fn, model, X)))
    assert list(adapted.factors) == ["up/weight", "down/weight"]
    by_hand = eqx.combine(merged_by_hand(eqx.filter(model, eqx.is_array), adapted.factors), model)
    close(eqx.filter_jit(jlora.lift(fn))(adapted, X), fn(by_hand, X))
    merged = jlora.merge(adapted)
    assert merged.activation is jax.nn.gelu and merged.missing is None
    close(eqx.filter(merged, eqx.is_array), eqx.filter(by_hand, eqx.is_array))
