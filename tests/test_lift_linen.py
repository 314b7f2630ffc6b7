"""`lift` on Flax linen: every layer that holds a kernel, every lifted transform, boxes, bf16, and jlora's GPT-2."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import jlora
from jlora import tree
from jlora.models.gpt2 import GPT2, GPT2Config
from tests.conformance import (
    SCALE,
    Case,
    adapt,
    check,
    check_found,
    check_uses,
    check_values,
    close,
    merged_by_hand,
    normal,
    randomised,
)
from tests.tiers import others, thorough

I, O, B, T, H, L, E, V = 16, 24, 8, 6, 4, 3, 4, 11  # noqa: E741 - in, out, batch, time, heads, layers, ensemble, vocabulary
Row = Callable[[], Case]


def linen(module: nn.Module, *args: Any, **options: Any) -> Row:
    """A row of a table: `module(*args, **options)`. Made when its test runs, so that collecting the tests stays fast."""
    return functools.partial(build, module, args, **options)


def build(
    module: nn.Module,
    args: tuple[Any, ...],
    dense: tuple[str, ...] = (),
    mutable: Any = False,
    rngs: Any = None,
    size: float = 1.0,
    **options: Any,
) -> Case:
    """The case, with parameters no two of which are equal; `size` multiplies them."""
    init = functools.partial(module.init, **options)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(init, keys, *args)
    rest = {name: values for name, values in init(keys, *args).items() if name != "params"} if len(shapes) > 1 else {}

    def fn(params: Any, *args: Any) -> Any:
        return module.apply({"params": params, **rest}, *args, mutable=mutable, rngs=rngs, **options)

    return Case(fn, filled(shapes["params"], size), args, dense)


def filled(shapes: Any, size: float = 1.0) -> Any:
    leaves, structure = jax.tree.flatten(shapes)
    arrays = [(size * normal(*leaf.shape, seed=20 + i)).astype(leaf.dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, arrays)


def kernels(params: Any) -> set[str]:
    return {path for path in tree.leaves(params)[0] if path.endswith(("kernel", "embedding"))}


# -- layers ------------------------------------------------------------------------------------------------------------

X, XT = normal(B, I), normal(2, T, I)
IDS = jnp.asarray([[1, 10, 0], [4, 4, 2]])
CAUSAL = nn.make_causal_mask(jnp.ones((2, T)))


class Tied(nn.Module):
    """A table that is read at both ends."""

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(V, I)
        h = table(ids)
        return h, table.attend(jnp.tanh(h))


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(I)
        return layer(jnp.tanh(layer(x)))


class Normed(nn.Module):
    """What stands next to kernels and is no matrix."""

    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=not self.train)(nn.Dense(O)(x))
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
        x = nn.GroupNorm(4)(nn.Dense(O)(x))
        return nn.RMSNorm()(nn.Dense(I)(x))


class Scalar(nn.Module):
    """PReLU's slope is a parameter without axes."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(I)(nn.PReLU()(nn.Dense(O)(x)))


def attention(**options: Any) -> nn.Module:
    return nn.MultiHeadDotProductAttention(H, **options)


LAYERS = {
    "Dense": linen(nn.Dense(O), X),
    "Dense, no bias": linen(nn.Dense(O, use_bias=False), XT),
    "Dense, one input": linen(nn.Dense(O, use_bias=False), normal(B, 1)),
    "Dense, one output": linen(nn.Dense(1), X),
    "DenseGeneral, features": linen(nn.DenseGeneral((H, 6)), XT),
    "DenseGeneral, axes": linen(nn.DenseGeneral(O, axis=(-2, -1)), normal(2, T, H, 6)),
    "DenseGeneral, axes and features": linen(nn.DenseGeneral((H, 6), axis=(-2, -1)), normal(2, T, 4, 5)),
    "DenseGeneral, an axis in the middle": linen(nn.DenseGeneral(O, axis=1), normal(2, I, 3)),
    "DenseGeneral, batch axis": linen(nn.DenseGeneral(O, axis=-1, batch_dims=(0,)), normal(E, B, I)),
    "Einsum": linen(nn.Einsum((I, H, 6), "bti,ihk->bthk"), XT),
    "Einsum, out first": linen(nn.Einsum((O, H, 6), "bthk,ohk->bto", use_bias=False), normal(2, T, H, 6)),
    "Embed": linen(nn.Embed(V, I), IDS),
    "Embed and attend": linen(Tied(), IDS),
    "one Dense, twice": linen(Shared(), X),
    "Sequential": linen(nn.Sequential([nn.Dense(O), nn.LayerNorm(), nn.gelu, nn.Dense(I)]), X),
    "norms and dropout, evaluation": linen(Normed(train=False), X),
    "norms and dropout, training": linen(
        Normed(train=True), X, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)}
    ),
    "a scalar parameter": linen(Scalar(), X),
    "self-attention": linen(attention(), XT),
    "self-attention, causal": linen(attention(use_bias=False), XT, mask=CAUSAL),
    "self-attention, normalised": linen(attention(normalize_qk=True, qkv_features=32, out_features=O), XT),
    "self-attention, dropout": linen(
        attention(dropout_rate=0.3), XT, deterministic=False, rngs={"dropout": jax.random.key(2)}
    ),
    "cross-attention": linen(attention(out_features=O), XT, normal(2, 5, I)),
    "cross-attention, keys and values": linen(attention(), XT, normal(2, 5, 12), normal(2, 5, 20)),
    "attention that decodes": linen(attention(decode=True), normal(2, 1, I), mutable=["cache"]),
}  # fmt: skip


def conv(x: tuple[int, ...], window: tuple[int, ...], features: int = 8, **options: Any) -> Row:
    return linen(nn.Conv(features, window, **options), normal(*x))


def transposed(x: tuple[int, ...], window: tuple[int, ...], **options: Any) -> Row:
    return linen(nn.ConvTranspose(8, window, **options), normal(*x))


C1, C2, C3 = (2, 12, 6), (2, 8, 8, 6), (2, 5, 5, 5, 4)
CONVS = {
    "1-D, SAME": conv(C1, (3,)),
    "1-D, VALID": conv(C1, (3,), padding="VALID"),
    "1-D, CIRCULAR": conv(C1, (3,), padding="CIRCULAR"),
    "1-D, REFLECT": conv(C1, (3,), padding="REFLECT"),
    "1-D, CAUSAL": conv(C1, (3,), padding="CAUSAL"),
    "1-D, stride, CAUSAL, dilation": conv(C1, (3,), strides=2, padding="CAUSAL", kernel_dilation=2),
    "1-D, groups": conv(C1, (3,), feature_group_count=2),
    "1-D, depthwise": conv(C1, (3,), features=12, feature_group_count=6),
    "2-D, SAME": conv(C2, (3, 3)),
    "2-D, VALID, no bias": conv(C2, (3, 2), padding="VALID", use_bias=False),
    "2-D, explicit padding": conv(C2, (3, 3), padding=((2, 0), (1, 3))),
    "2-D, CIRCULAR, stride": conv(C2, (3, 3), padding="CIRCULAR", strides=(2, 1)),
    "2-D, stride": conv(C2, (3, 3), strides=(2, 2)),
    "2-D, dilated kernel": conv(C2, (3, 3), kernel_dilation=(2, 1)),
    "2-D, dilated input": conv(C2, (3, 3), input_dilation=(2, 2), padding=((1, 1), (2, 1))),
    "2-D, 1x1": conv(C2, (1, 1)),
    "2-D, one channel in": conv((2, 8, 8, 1), (3, 3)),
    "2-D, one channel out": conv(C2, (3, 3), features=1),
    "2-D, patches": conv(C2, (4, 4), strides=(4, 4), padding="VALID"),
    "2-D, groups": conv(C2, (3, 3), features=9, feature_group_count=3, strides=(2, 1)),
    "2-D, depthwise": conv(C2, (3, 3), features=6, feature_group_count=6),
    "2-D, depthwise, two per channel": conv(C2, (3, 3), features=12, feature_group_count=6),
    "2-D, no batch axis": conv(C2[1:], (3, 3)),
    "2-D, two batch axes": conv((2, *C2), (3, 3)),
    "3-D, SAME": conv(C3, (3, 2, 3)),
    "3-D, stride, dilation, VALID": conv(C3, (2, 2, 1), strides=(1, 2, 2), kernel_dilation=(2, 1, 1), padding="VALID"),
    "3-D, groups": conv(C3, (2, 2, 2), feature_group_count=2),
    "transpose 1-D": transposed(C1, (3,), strides=(2,)),
    "transpose 1-D, transposed kernel": transposed(C1, (3,), strides=(2,), transpose_kernel=True),
    "transpose 2-D": transposed(C2, (3, 3)),
    "transpose 2-D, stride, VALID": transposed(C2, (3, 2), strides=(2, 2), padding="VALID"),
    "transpose 2-D, CIRCULAR": transposed(C2, (3, 3), strides=(2, 2), padding="CIRCULAR"),
    "transpose 2-D, dilated kernel": transposed(C2, (3, 3), kernel_dilation=(2, 2)),
    "transpose 2-D, transposed kernel": transposed(C2, (3, 3), transpose_kernel=True),
    "transpose 2-D, transposed kernel, stride": transposed(C2, (3, 3), strides=(2, 1), transpose_kernel=True, padding="VALID"),
    "transpose 3-D": transposed(C3, (2, 2, 2), strides=(2, 1, 2)),
    "local 1-D": linen(nn.ConvLocal(8, (3,)), normal(*C1)),
    "local 2-D": linen(nn.ConvLocal(8, (2, 2), strides=(2, 2), padding="VALID"), normal(2, 4, 4, 6)),
    "masked": linen(nn.Conv(8, (3,), mask=jnp.ones((3, 6, 8)).at[2].set(0)), normal(*C1), dense=("kernel",)),
}  # fmt: skip

# -- recurrent cells ---------------------------------------------------------------------------------------------------


def rnn(cell: nn.Module, **options: Any) -> nn.Module:
    return nn.RNN(cell, **options)


def cell(module: nn.Module, **options: Any) -> Row:
    carry = module.initialize_carry(jax.random.key(0), X.shape)
    return linen(module, jax.tree.map(lambda c: normal(*c.shape), carry), X, **options)


OPTIMIZED = tuple(f"{at}{gate}/kernel" for gate in "figo" for at in "hi")
RECURRENT = {
    "LSTMCell": cell(nn.LSTMCell(O)),
    "GRUCell": cell(nn.GRUCell(O)),
    "MGUCell": cell(nn.MGUCell(O)),
    "SimpleCell": cell(nn.SimpleCell(O)),
    "OptimizedLSTMCell concatenates its kernels": cell(nn.OptimizedLSTMCell(O), dense=OPTIMIZED),
    "RNN": linen(rnn(nn.LSTMCell(O)), XT),
    "RNN, reversed, unrolled": linen(rnn(nn.GRUCell(O), reverse=True, keep_order=True, unroll=2), XT),
    "RNN, lengths": linen(rnn(nn.SimpleCell(O)), XT, seq_lengths=jnp.asarray([3, 5])),
    "Bidirectional": linen(nn.Bidirectional(rnn(nn.LSTMCell(O)), rnn(nn.GRUCell(O))), XT),
    "RNN of ConvLSTMCell": linen(rnn(nn.ConvLSTMCell(4, (3, 3))), normal(1, 3, 5, 5, 4)),
}

# -- transforms --------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A pair in and out, as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, h, _=None):
        return h + nn.Dense(I)(nn.gelu(nn.Dense(O)(nn.LayerNorm()(h)))), None


class Block(nn.Module):
    """A block of a transformer: pre-norm, attention, gated MLP."""

    causal: bool = True

    @nn.compact
    def __call__(self, h, _=None):
        mask = nn.make_causal_mask(h[..., 0]) if self.causal else None
        h = h + nn.MultiHeadDotProductAttention(H, name="attn")(nn.LayerNorm()(h), mask=mask)
        x = nn.RMSNorm()(h)
        gated = nn.silu(nn.Dense(O, name="gate")(x)) * nn.Dense(O, name="up")(x)
        return h + nn.Dense(I, name="down")(gated), None


class Branching(nn.Module):
    @nn.compact
    def __call__(self, x, index):
        layers = [nn.Dense(O), nn.Dense(O)]
        if self.is_initializing():
            return sum(layer(x) for layer in layers)
        return nn.switch(index, [lambda m, x: layers[0](x), lambda m, x: jnp.tanh(layers[1](x))], self, x)


class Choosing(nn.Module):
    @nn.compact
    def __call__(self, x, p):
        layer = nn.Dense(O)
        if self.is_initializing():
            return layer(x)
        return nn.cond(p, lambda m, x: layer(x), lambda m, x: -layer(jnp.tanh(x)), self, x)


class Methods(nn.Module):
    """setup, a transformed method, names of one's own."""

    def setup(self):
        self.first = nn.Dense(O)
        self.blocks = [nn.Dense(O), nn.Dense(I)]

    @nn.remat
    def body(self, x):
        return self.blocks[1](nn.relu(self.blocks[0](x)))

    @nn.jit
    def __call__(self, x):
        return self.body(self.first(x))


class Saved(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(O)(x)
        self.sow("intermediates", "h", h)
        return nn.Dense(I)(jnp.tanh(h))


def scanned(layer: Any, length: int = L, **options: Any) -> nn.Module:
    return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=length, **options)()


def over_time() -> nn.Module:
    return nn.scan(nn.LSTMCell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)(I)


def ensemble(layer: Any, in_axes: Any = None, **options: Any) -> nn.Module:
    return nn.vmap(
        layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=in_axes, axis_size=E
    )(**options)  # fmt: skip


def remat(layer: Any, policy: Any = None, **options: Any) -> Any:
    return nn.remat(layer, policy=policy, **options)


POLICIES = jax.checkpoint_policies
CARRY = (normal(B, I), normal(B, I, seed=1))
TRANSFORMS = {
    "transformer block": linen(Block(), XT),
    "scan over layers": linen(scanned(Layer), X),
    "scan, unrolled": linen(scanned(Layer, unroll=2), X),
    "scan, stacked on axis 1": linen(
        nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=L)(), X
    ),
    "scan over time, one weight": linen(over_time(), CARRY, normal(B, T, I)),
    "scan of a scan": linen(
        nn.scan(
            nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2),
            variable_axes={"params": 0}, split_rngs={"params": True}, length=L,
        )(), X,
    ),
    "remat": linen(remat(Block)(), XT),
    "remat, dots saved": linen(remat(Layer, POLICIES.dots_saveable)(), X),
    "remat, nothing saved": linen(remat(Layer, POLICIES.nothing_saveable, prevent_cse=False)(), X),
    "scan of remat": linen(scanned(remat(Layer, prevent_cse=False)), X),
    "remat of scan": linen(
        nn.remat(nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=L))(), X
    ),
    "vmap, an ensemble": linen(ensemble(nn.Dense, features=O), X),
    "vmap, each its own input": linen(ensemble(nn.Dense, 0, features=O), normal(E, B, I)),
    "vmap, an ensemble of convolutions": linen(ensemble(nn.Conv, features=8, kernel_size=(3,)), normal(*C1), dense=("kernel",)),
    "vmap, an ensemble of tables": linen(ensemble(nn.Embed, num_embeddings=V, features=I), IDS),
    "vmap, one weight": linen(
        nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})(O), XT
    ),
    "vmap of a scan": linen(
        nn.vmap(
            nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=L),
            variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, axis_size=E,
        )(), normal(E, B, I),
    ),
    "jit": linen(nn.jit(nn.Dense)(O), X),
    "jit of a block": linen(nn.jit(Block)(), XT),
    "setup, remat and jit of methods": linen(Methods(), X),
    "switch": linen(Branching(), X, jnp.int32(1)),
    "cond": linen(Choosing(), X, jnp.bool_(True)),
    "sown intermediates": linen(Saved(), X, mutable=["intermediates"]),
    "WeightNorm": linen(nn.WeightNorm(nn.Dense(O)), X, dense=("layer_instance/kernel",)),
}  # fmt: skip

# -- boxes -------------------------------------------------------------------------------------------------------------


class Boxed(nn.Module):
    """Kernels in `nn.Partitioned` and `nn.LogicallyPartitioned`, one of them stacked by a scan."""

    @nn.compact
    def __call__(self, x):
        init, ones = nn.initializers.lecun_normal(), nn.initializers.ones
        h = nn.Dense(I, kernel_init=nn.with_partitioning(init, ("data", "model")))(x)
        h, _ = nn.scan(
            BoxedLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=L,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )()(h, None)  # fmt: skip
        h = nn.LayerNorm(scale_init=nn.with_logical_partitioning(ones, ("embed",)))(h)
        return nn.Dense(O, kernel_init=nn.with_logical_partitioning(init, ("embed", "mlp")))(h)


class BoxedLayer(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return jnp.tanh(nn.Dense(I, kernel_init=init)(h)), None


BOXES = {"boxes": linen(Boxed(), X)}

# -- GPT-2 -------------------------------------------------------------------------------------------------------------

TOKENS = jnp.asarray([[1, 10, 0, 7, 3, 3], [4, 4, 2, 9, 8, 5]])
TINY = functools.partial(GPT2Config, vocab_size=V, context=8, width=16, layers=2, heads=4)
# Half the size: with larger scores the softmax is steep, and the query's gradient loses digits on either side.
GPT2S = {
    "GPT-2": linen(GPT2(TINY()), TOKENS, size=0.5),
    "GPT-2, scan": linen(GPT2(TINY(scan=True)), TOKENS, size=0.5),
    "GPT-2, remat": linen(GPT2(TINY(remat=True)), TOKENS, size=0.5),
    "GPT-2, scan of remat": linen(GPT2(TINY(scan=True, remat=True)), TOKENS, size=0.5),
}

CASES = {**LAYERS, **CONVS, **RECURRENT, **TRANSFORMS, **BOXES, **GPT2S}


CLASSES = ("Bidirectional", "scan, stacked on axis 1")  # whose gradients the default run compares too


# Windows, paddings and layers that come to the same products as others of the table: their numbers are in the thorough tier.
FOUND = (
    "Dense, no bias", "Dense, one output", "DenseGeneral, features", "DenseGeneral, axes", "norms and dropout, evaluation",
    "self-attention", "self-attention, causal", "self-attention, normalised", "cross-attention, keys and values",
    "1-D, SAME", "1-D, VALID", "1-D, CIRCULAR", "1-D, REFLECT", "1-D, groups", "1-D, depthwise",
    "2-D, SAME", "2-D, VALID, no bias", "2-D, explicit padding", "2-D, stride", "2-D, dilated kernel", "2-D, dilated input",
    "2-D, one channel in", "2-D, one channel out", "2-D, patches", "2-D, depthwise", "2-D, two batch axes",
    "3-D, SAME", "3-D, stride, dilation, VALID", "transpose 1-D, transposed kernel", "transpose 2-D",
    "transpose 2-D, stride, VALID", "transpose 2-D, CIRCULAR", "transpose 2-D, dilated kernel", "transpose 2-D, transposed kernel",
    "transpose 3-D", "local 2-D", "MGUCell", "SimpleCell", "RNN", "RNN of ConvLSTMCell", "transformer block", "scan, unrolled",
    "scan of a scan", "remat, nothing saved", "remat of scan", "vmap of a scan", "jit of a block", "GPT-2, scan",
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


def test_spectral_norm_stays_factored():
    """Division by a number that the weight decides. Not by `check`: XLA compiles it to other roundings at the start."""
    case = linen(nn.SpectralNorm(nn.Dense(O)), X, update_stats=True, mutable=["batch_stats"])()
    adapted = randomised(adapt(case))
    close(jlora.lift(case.fn)(adapted, *case.args), case.fn(merged_by_hand(case.params, adapted.factors), *case.args))
    check_uses(case, adapted)


def test_both_ends_of_a_tied_table_see_the_change():
    case = LAYERS["Embed and attend"]()
    start = adapt(case)
    uses = jlora.explain(case.fn, start, *case.args).rows
    assert [(use.op, use.in_axes, use.out_axes) for use in uses] == [
        ("gather", (0,), (1,)),
        ("dot_general", (1,), (0,)),
    ]
    assert [site.kind for site in start.sites] == ["embedding"]
    row = jnp.zeros((V, 1, 3)).at[10].set(1.0)  # A of token 10 alone: the others' vectors stay
    changed = start.replace(factors={"Embed_0/embedding": {"A": row, "B": normal(1, I, 3)}})
    vectors, logits = jlora.lift(case.fn)(changed, *case.args)
    before, logits_before = case.fn(case.params, *case.args)
    np.testing.assert_array_equal(jnp.any(vectors != before, axis=-1), IDS == 10)
    same_input = IDS != 10
    np.testing.assert_array_equal(
        jnp.any(logits != logits_before, axis=(0, 1), where=same_input[..., None]), jnp.arange(V) == 10
    )


def test_boxes_stay_in_place():
    case = BOXES["boxes"]()
    start = adapt(case)
    assert {path: (site.shape, site.stack_axes) for path, site in zip(start.factors, start.sites, strict=True)} == {
        "Dense_0/kernel": ((I, I), ()),
        "Dense_1/kernel": ((I, O), ()),
        "ScanBoxedLayer_0/Dense_0/kernel": ((L, I, I), (0,)),
    }
    merged = jlora.merge(randomised(start))
    chex.assert_trees_all_equal_structs(merged, case.params)
    assert nn.get_partition_spec(merged)["Dense_0"]["kernel"] == P("data", "model")
    assert nn.get_partition_spec(merged)["ScanBoxedLayer_0"]["Dense_0"]["kernel"] == P("layers", None, "model")


# -- bf16 --------------------------------------------------------------------------------------------------------------

# A bf16 number has 8 bits, so each rounding is off by up to 2**-9 = 0.2 %. The lifted side rounds x A and two products
# where the merged side rounds one weight: they cannot agree to the bit, and each is compared with float32. Four to eight
# roundings of the largest value add up in the results (0.6 % seen on either side), and the gradients of the first layers
# have passed the depth twice (3 % seen on either side). A lost alpha or a lost factor is off by more than 20 %.
BF16_VALUES, BF16_GRADIENTS = 2**-6, 2**-4


class Mixed(nn.Module):
    """A convolution, attention and an MLP."""

    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x):
        o = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = nn.Conv(I, (3,), **o)(x)
        h = h + nn.MultiHeadDotProductAttention(H, **o)(nn.LayerNorm(**o)(h))
        return nn.DenseGeneral(I, **o)(nn.gelu(nn.Dense(O, **o)(nn.LayerNorm(**o)(h))))


HALF = {
    "mixed": lambda dtype, param_dtype: linen(Mixed(dtype, param_dtype), XT, size=0.5)(),
    "GPT-2, scan of remat": lambda dtype, param_dtype: linen(
        GPT2(TINY(dtype=dtype, param_dtype=param_dtype, scan=True, remat=True)), TOKENS, size=0.5
    )(),
}


@pytest.mark.loose_promotion  # linen's norms
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", thorough(HALF, "test_values_are_those_of_the_merged_weights", ("mixed",)))
def test_bf16_stays_as_close_to_float32_as_roundings_allow(name, param_dtype):
    case, exact = HALF[name]("bfloat16", param_dtype), HALF[name]("float32", "float32")
    start = adapt(case)
    assert set(start.factors) == kernels(case.params)
    lifted = jax.jit(jlora.lift(case.fn))
    np.testing.assert_array_equal(lifted(start, *case.args), jax.jit(case.fn)(case.params, *case.args))

    adapted = randomised(start)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), case.params)

    def loss(factors: Any, merged: bool) -> tuple[jax.Array, jax.Array]:
        if merged:
            out = exact.fn(merged_by_hand(wide, factors), *case.args)
        else:
            out = jlora.lift(case.fn)(jlora.combine(factors, adapted), *case.args)
        return jnp.vdot(normal(*out.shape, seed=3), out.astype(jnp.float32)), out.astype(jnp.float32)

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (grads, values), (exact_grads, exact_values) = (gradient(adapted.factors, merged) for merged in (False, True))
    close(values, exact_values, BF16_VALUES)
    close(grads, exact_grads, BF16_GRADIENTS)
    check_uses(case, adapted)


def test_merging_bf16_sums_in_float32_and_casts_once():
    case = linen(nn.Dense(O, dtype="bfloat16", param_dtype="bfloat16"), X)()
    start = adapt(case)
    # Numbers of few bits: every product and sum is exact in float32, so the result does not depend on their order.
    a, b = (jnp.round(256 * randomised(start).factors["kernel"][name]) / 256 for name in "AB")
    merged = jlora.merge(start.replace(factors={"kernel": {"A": a, "B": b}}))["kernel"]
    delta = SCALE * jnp.sum(a * b, axis=-1)
    once = (case.params["kernel"].astype(jnp.float32) + delta).astype(jnp.bfloat16)
    twice = case.params["kernel"] + delta.astype(jnp.bfloat16)
    assert jnp.any(once != twice)
    np.testing.assert_array_equal(merged, once)
