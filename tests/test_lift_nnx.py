"""`lift` on Flax NNX: the model is split before, and merged inside the function, whatever the state is threaded through."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jlora
from jlora import tree
from tests.conformance import Case, adapt, check, check_found, check_values, close, normal, randomised
from tests.tiers import others, thorough

I, O, B, T, H, L, E, V = 16, 24, 8, 6, 4, 3, 4, 11  # noqa: E741 - in, out, batch, time, heads, layers, ensemble, vocabulary
Row = Callable[[], Case]


def row(make: Callable[[nnx.Rngs], Any], *args: Any, **options: Any) -> Row:
    """A row of a table: `make(rngs)(*args)`. Made when its test runs, so that collecting the tests stays fast."""
    return functools.partial(build, make, args, **options)


def build(
    make: Callable[[nnx.Rngs], Any],
    args: tuple[Any, ...],
    dense: tuple[str, ...] = (),
    run: Callable[..., Any] = lambda model, *args: model(*args),
    state: Any = None,
    passed: bool = False,
    op_by_op: bool = False,
) -> Case:
    """The case, with parameters no two of which are equal; `run(model, *args)` is what the function does.

    Where `state` is given, variables of that type are results, too. What is no parameter is closed over, hence the copy,
    or, where `passed`, an argument.
    """
    graph, params, rest = nnx.split(make(nnx.Rngs(0, dropout=1)), nnx.Param, ...)

    def fn(params: Any, rest: Any, *args: Any) -> Any:
        model = nnx.merge(graph, params, rest, copy=not passed)
        out = run(model, *args)
        return out if state is None else (out, nnx.to_pure_dict(nnx.state(model, state)))

    if passed:
        return Case(fn, filled(params), (rest, *args), dense, op_by_op=op_by_op)
    return Case(lambda params, *args: fn(params, rest, *args), filled(params), args, dense, op_by_op=op_by_op)


def filled(params: Any) -> Any:
    leaves, structure = jax.tree.flatten(params)
    arrays = [normal(*leaf.shape, seed=20 + i) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, arrays)


def kernels(params: Any) -> set[str]:
    return {path for path in tree.leaves(params)[0] if path.endswith(("kernel", "embedding"))}


# -- layers ------------------------------------------------------------------------------------------------------------

X, XT = normal(B, I), normal(2, T, I)
IDS = jnp.asarray([[1, 10, 0], [4, 4, 2]])
C1, C2 = (2, 12, 6), (2, 8, 8, 6)


def embed_and_attend(table: nnx.Embed, ids: jax.Array) -> Any:
    h = table(ids)
    return h, table.attend(jnp.tanh(h))


def linear(*sizes: int, **options: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: nnx.Linear(*sizes, rngs=rngs, **options)


def general(features_in: Any, features_out: Any, **options: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: nnx.LinearGeneral(features_in, features_out, rngs=rngs, **options)


def einsum(*args: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: nnx.Einsum(*args, rngs=rngs)


def attention(*args: Any, **options: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: nnx.MultiHeadAttention(H, *args, decode=False, rngs=rngs, **options)


def conv(x: tuple[int, ...], window: tuple[int, ...], features: int = 8, **options: Any) -> Row:
    return row(lambda rngs: nnx.Conv(x[-1], features, window, rngs=rngs, **options), normal(*x))


def transposed(x: tuple[int, ...], window: tuple[int, ...], **options: Any) -> Row:
    return row(lambda rngs: nnx.ConvTranspose(x[-1], 8, window, rngs=rngs, **options), normal(*x))


LAYERS = {
    "Linear": row(linear(I, O), X),
    "Linear, no bias": row(linear(I, O, use_bias=False), XT),
    "LinearGeneral, features": row(general(I, (H, 6)), XT),
    "LinearGeneral, axes": row(general((H, 6), O, axis=(-2, -1)), normal(2, T, H, 6)),
    "LinearGeneral, batch axis": row(general(I, O, batch_axis={0: E}), normal(E, B, I)),
    "Einsum": row(einsum("bti,ihk->bthk", (I, H, 6), (H, 6)), XT),
    "Einsum, out first": row(einsum("bthk,ohk->bto", (O, H, 6), None), normal(2, T, H, 6)),
    "Embed": row(lambda rngs: nnx.Embed(V, I, rngs=rngs), IDS),
    "Embed and attend": row(lambda rngs: nnx.Embed(V, I, rngs=rngs), IDS, run=embed_and_attend),
    "self-attention": row(attention(I), XT),
    "self-attention, causal": row(
        attention(I), XT, run=lambda m, x: m(x, mask=nnx.make_causal_mask(jnp.ones((2, T))))
    ),
    "self-attention, normalised": row(attention(I, qkv_features=32, out_features=O, normalize_qk=True), XT),
    "cross-attention": row(attention(I, in_kv_features=12), XT, normal(2, 5, 12)),
    "conv 1-D, SAME": conv(C1, (3,)),
    "conv 1-D, CAUSAL, dilation": conv(C1, (3,), padding="CAUSAL", kernel_dilation=2),
    "conv 2-D, stride, VALID": conv(C2, (3, 2), strides=(2, 1), padding="VALID"),
    "conv 2-D, CIRCULAR": conv(C2, (3, 3), padding="CIRCULAR"),
    "conv 2-D, groups": conv(C2, (3, 3), features=9, feature_group_count=3),
    "conv 2-D, depthwise": conv(C2, (3, 3), features=6, feature_group_count=6),
    "transpose 1-D, stride": transposed(C1, (3,), strides=2),
    "transpose 2-D": transposed(C2, (3, 3), strides=(2, 2)),
    "transpose 2-D, transposed kernel": transposed(C2, (3, 3), strides=(2, 1), transpose_kernel=True),
    "RNN of an LSTM": row(lambda rngs: nnx.RNN(nnx.LSTMCell(I, O, rngs=rngs)), XT),
    "RNN of a GRU, reversed": row(lambda rngs: nnx.RNN(nnx.GRUCell(I, O, rngs=rngs), reverse=True), XT),
}  # fmt: skip

# -- models ------------------------------------------------------------------------------------------------------------


class Layer(nnx.Module):
    """h + MLP(norm(h)), with what else a layer may hold next to its kernels."""

    def __init__(self, rngs: nnx.Rngs, dropout: float = 0.0, batch_norm: bool = False):
        self.norm = nnx.BatchNorm(I, rngs=rngs) if batch_norm else nnx.LayerNorm(I, rngs=rngs)
        self.up = nnx.Linear(I, O, rngs=rngs)
        self.down = nnx.Linear(O, I, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, h):
        return h + self.dropout(self.down(nnx.gelu(self.up(self.norm(h)))))


class Block(nnx.Module):
    """A block of a transformer."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(I, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(H, I, decode=False, rngs=rngs)
        self.mlp = Layer(rngs)

    def __call__(self, h):
        return self.mlp(h + self.attention(self.norm(h), mask=nnx.make_causal_mask(h[..., 0])))


class Decoder(nnx.Module):
    """Embedding, blocks in an `nnx.List`, a head tied to the embedding."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(V, I, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, ids):
        h = self.table(ids)
        for block in self.blocks:
            h = block(h)
        return self.table.attend(h)


class Shared(nnx.Module):
    """One layer under two names."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(I, I, rngs=rngs)
        self.second = self.first

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class Frozen(nnx.Variable):
    """A type of variable of one's own: not among the parameters."""


class Beside(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(I, O, rngs=rngs)
        self.features = Frozen(normal(O, O, seed=9))

    def __call__(self, x):
        return jnp.tanh(self.layer(x)) @ self.features[...]


def stacked(make: Callable[[nnx.Rngs], Any], length: int = L) -> Callable[[nnx.Rngs], Any]:
    """`length` modules in one, their parameters stacked on axis 0."""

    def build(rngs: nnx.Rngs) -> Any:
        return nnx.split_rngs(splits=length)(nnx.vmap(make, in_axes=0))(rngs)

    return build


def scanned(layer: Callable[[Any, Any], Any] = lambda h, m: m(h), **options: Any) -> Callable[[Any, jax.Array], Any]:
    return lambda model, h: nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, **options)(h, model)


def rematerialised(policy: Any = None) -> Callable[[Any, jax.Array], Any]:
    layer = nnx.remat(lambda model, h: model(h), policy=policy)
    return lambda model, h: layer(model, layer(model, h))


def every_row(models: Any, x: jax.Array) -> Any:
    return nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(models, x)


def each_its_own(models: Any, x: jax.Array) -> Any:
    return nnx.vmap(lambda model, x: model(x), in_axes=(0, 0))(models, x)


def by_index(layers: Any, h: jax.Array) -> jax.Array:
    for layer in layers:
        h = layer(h)
    return h


def updated_in_a_loop(model: Any, h: jax.Array) -> jax.Array:
    return nnx.fori_loop(0, 2, lambda i, carry: (carry[0], carry[0](carry[1])), (model, h))[1]


def force(model: Any, x: jax.Array) -> jax.Array:
    return nnx.grad(lambda x, model: jnp.sum(model(x) ** 2))(x, model)


POLICIES = jax.checkpoint_policies
MODELS = {
    "Sequential": row(lambda rngs: nnx.Sequential(nnx.Linear(I, O, rngs=rngs), nnx.relu, nnx.Linear(O, I, rngs=rngs)), X),
    "List": row(lambda rngs: nnx.List([Layer(rngs) for _ in range(2)]), X, run=by_index),
    "Dict": row(
        lambda rngs: nnx.Dict(a=nnx.Linear(I, O, rngs=rngs), b=nnx.Linear(O, I, rngs=rngs)), X,
        run=lambda model, x: model["b"](jnp.tanh(model["a"](x))),
    ),
    "transformer block": row(Block, XT),
    "decoder": row(Decoder, IDS),
    "one layer, two names": row(Shared, X),
    "another type of variable": row(Beside, X),
    "dropout": row(lambda rngs: Layer(rngs, dropout=0.5), X),
    "BatchNorm, training": row(lambda rngs: Layer(rngs, batch_norm=True), X, state=nnx.BatchStat),
    "BatchNorm, evaluation": row(
        lambda rngs: Layer(rngs, batch_norm=True), X, run=lambda m, x: nnx.view(m, use_running_average=True)(x)
    ),
    "the rest an argument": row(lambda rngs: Layer(rngs, dropout=0.5), X, passed=True),
    "the rest an argument, BatchNorm": row(
        lambda rngs: Layer(rngs, batch_norm=True), X, passed=True, state=nnx.BatchStat
    ),
    "jit": row(Layer, X, run=lambda model, x: nnx.jit(lambda model, x: model(x))(model, x)),
    "jit that updates BatchNorm": row(
        lambda rngs: Layer(rngs, batch_norm=True), X, run=lambda model, x: nnx.jit(lambda m, x: m(x))(model, x),
        state=nnx.BatchStat,
    ),
    "remat": row(Layer, X, run=rematerialised()),
    "remat, dots saved": row(Layer, X, run=rematerialised(POLICIES.dots_saveable)),
    "remat of attention": row(Block, XT, run=lambda model, x: nnx.remat(lambda m, x: m(x))(model, x)),
    "scan over layers": row(stacked(Layer), X, run=scanned()),
    "scan over layers, unrolled": row(stacked(Layer), X, run=scanned(unroll=2)),
    "scan over blocks": row(stacked(Block), XT, run=scanned()),
    "scan of remat": row(stacked(Layer), X, run=scanned(nnx.remat(lambda h, model: model(h)))),
    "scan with dropout": row(stacked(lambda rngs: Layer(rngs, dropout=0.5)), X, run=scanned()),
    "scan that updates BatchNorm": row(
        stacked(lambda rngs: Layer(rngs, batch_norm=True)), X, run=scanned(), state=nnx.BatchStat
    ),
    "jit of a scan of remat": row(
        stacked(Layer), X, run=lambda model, x: nnx.jit(scanned(nnx.remat(lambda h, m: m(h))))(model, x)
    ),
    "vmap, an ensemble": row(stacked(linear(I, O), E), X, run=every_row),
    "vmap, each its own input": row(stacked(Layer, E), normal(E, B, I), run=each_its_own),
    "fori_loop": row(Layer, X, run=updated_in_a_loop),
    "grad of the input": row(Layer, X, run=force, op_by_op=True),
    "cond": row(
        Layer, X, jnp.bool_(True), run=lambda m, x, p: nnx.cond(p, lambda m, x: m(x), lambda m, x: -m(x), m, x)
    ),
}  # fmt: skip

CASES = {**LAYERS, **MODELS}


CLASSES = ("scan of remat", "vmap, each its own input")  # whose gradients the default run compares too


# Layers that come to the same products as others of the table: their numbers are in the thorough tier.
FOUND = (
    "Linear, no bias", "LinearGeneral, axes", "Einsum", "self-attention, causal", "self-attention, normalised",
    "conv 2-D, stride, VALID", "conv 2-D, groups", "transpose 2-D", "RNN of an LSTM", "Dict", "transformer block", "decoder",
    "BatchNorm, evaluation", "the rest an argument", "remat, dots saved", "remat of attention", "scan over layers, unrolled",
    "scan over blocks", "scan that updates BatchNorm",
)  # fmt: skip
VALUES, READ = "test_values_are_those_of_the_merged_weights", "test_weights_are_found_and_stay_factored"


@pytest.mark.parametrize("name", FOUND)
def test_weights_are_found_and_stay_factored(name):
    case = CASES[name]()
    assert check_found(case) == kernels(case.params)


@pytest.mark.parametrize("name", [*others(CASES, (*CLASSES, *FOUND)), *thorough(FOUND, READ)])
def test_values_are_those_of_the_merged_weights(name):
    case = CASES[name]()
    assert check_values(case) == kernels(case.params)


@pytest.mark.parametrize("name", [*thorough(others(CASES, FOUND), VALUES, CLASSES), *thorough(FOUND, READ)])
def test_agrees_with_the_merged_weights(name):
    case = CASES[name]()
    check(case)
    assert set(adapt(case).factors) == kernels(case.params)


def test_paths_have_integer_keys_and_no_trace_of_the_variables():
    case = MODELS["List"]()
    assert list(adapt(case).factors) == ["0/down/kernel", "0/up/kernel", "1/down/kernel", "1/up/kernel"]
    stack = {
        site.path: (site.in_axes, site.out_axes, site.stack_axes) for site in adapt(MODELS["scan over layers"]()).sites
    }
    assert stack == {"down/kernel": ((1,), (2,), (0,)), "up/kernel": ((1,), (2,), (0,))}


def test_merged_state_updates_the_model():
    model = Layer(nnx.Rngs(0))
    graph, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)
    fn = lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)
    adapted = randomised(jlora.apply(params, rank=2, sites=jlora.sites(fn, params, X)))
    assert list(adapted.factors) == ["down/kernel", "up/kernel"]
    merged = jlora.merge(adapted)
    chex.assert_trees_all_equal_structs(merged, params)
    nnx.update(model, merged)
    close(model(X), jlora.lift(fn)(adapted, X))
