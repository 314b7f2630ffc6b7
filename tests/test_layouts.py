"""How parameters lie in real models: every layout that was met in them, by dataflow and by name alone."""

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import lax

import jlora
from jlora import tree
from tests.conformance import Case, adapt, check, check_uses, check_values, close, merged_by_hand, normal, randomised
from tests.tiers import others, thorough

Row = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # kind, in_axes, out_axes, stack_axes
OTHER: Row = ("other", (), (), ())
UNKNOWN: Row = ("unknown", (), (), ())
MATRIX: Row = ("linear", (0,), (1,), ())
OUT_IN: Row = ("linear", (1,), (0,), ())
TABLE: Row = ("embedding", (0,), (1,), ())
CONV: Row = ("conv", (0, 1, 2), (3,), ())


class Layout(NamedTuple):
    """One way in which parameters lie.

    Attributes:
      case: what `check` runs.
      sites: path -> what the program uses it for, for every leaf.
      named: what `apply` without sites does: the paths that it adapts; a path that it refuses as ambiguous; or None where
        it refuses because no leaf is named as Flax names linear layers.
    """

    case: Case
    sites: Mapping[str, Row]
    named: tuple[str, ...] | str | None


# -- how the cases are written -----------------------------------------------------------------------------------------

# Model width above 16, heads and layers below: as in real models, where a rule by size would draw its line.
# Batch, time, width, hidden, heads, head width (N H = D), key heads, layers, experts, vocabulary.
B, T, D, F, N, H, K, L, E, V = 8, 4, 20, 24, 4, 5, 2, 3, 4, 30
LETTERS = {"B": B, "T": T, "D": D, "F": F, "N": N, "H": H, "K": K, "L": L, "E": E, "C": 2, "S": 3, "G": 2}
IDS = jnp.asarray([[1, 29, 0, 1], [2, 2, 3, 17]], jnp.int32)


def sized(letters: str) -> tuple[int, ...]:
    return tuple(LETTERS[letter] for letter in letters)


def nest(path: str, leaf: Any) -> Any:
    return functools.reduce(lambda inner, key: {key: inner}, reversed(path.split("/")), leaf)


def leaf(params: Any) -> jax.Array:
    (only,) = jax.tree.leaves(params)
    return only


def one(path: str, shape: tuple[int, ...], fn: Callable[..., Any], x: tuple[int, ...], row: Row, named: Any) -> Layout:
    """A tree of a single weight, `fn(w, x)`."""
    case = Case(lambda p, *args: fn(leaf(p), *args), nest(path, normal(*shape)), (normal(*x, seed=1),))
    return Layout(case, {path: row}, named)


def einsum(
    path: str, spec: str, in_axes: tuple[int, ...], out_axes: tuple[int, ...], *stack: int, named: Any
) -> Layout:
    """`einsum(spec, x, w)`."""
    x, w = spec.split("->")[0].split(",")
    row = ("linear", in_axes, out_axes, stack)
    return one(path, sized(w), lambda w, x: jnp.einsum(spec, x, w), sized(x), row, named)


def scanned(path: str, spec: str, in_axes: Any, out_axes: Any, axis: int, *, named: Any, experts: Any = ()) -> Layout:
    """Layers stacked on `axis` of the weight, run by a scan: `h + tanh(einsum(spec, h, w[l]))`, D wide."""
    xs, ws = spec.split("->")[0].split(",")

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        def layer(h, w):
            y = jnp.einsum(spec, h.reshape(sized(xs)), w)
            return h + jnp.tanh(y.reshape(B, T, -1)[..., :D]), None

        return lax.scan(layer, x, jnp.moveaxis(w, axis, 0))[0]

    row = ("linear", in_axes, out_axes, tuple(sorted((axis, *experts))))
    return one(path, sized(ws[:axis] + "L" + ws[axis:]), fn, (B, T, D), row, named)


def filled(shapes: Any) -> Any:
    """Numbers, none of them zero, in a tree of shapes. Each leaf its own."""
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        structure,
        [normal(*x.shape, seed=i) if jnp.issubdtype(x.dtype, jnp.floating) else x for i, x in enumerate(leaves)],
    )


def linen(module: nn.Module, x: Any, sites: Mapping[str, Row], named: Any, **options: Any) -> Layout:
    """A linen module under the name "layer"; an `x` of shape becomes numbers."""
    x = normal(*x, seed=1) if isinstance(x, tuple) else x
    params = filled(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    apply = lambda p, x: module.apply({"params": p["layer"]}, x)
    return Layout(
        Case(apply, {"layer": params}, (x,), **options), {f"layer/{path}": row for path, row in sites.items()}, named
    )


def under(prefix: str, **rows: Row) -> dict[str, Row]:
    return {f"{prefix}/{path}": row for path, row in rows.items()}


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x + y` with y along the last axes of x."""
    return x + y.reshape((1,) * (x.ndim - y.ndim) + y.shape)


def scaled(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x * y` with y along the last axes of x."""
    return x * y.reshape((1,) * (x.ndim - y.ndim) + y.shape)


def dense(p: Any, x: jax.Array) -> jax.Array:
    """nn.Dense: the kernel is (in, out)."""
    return add(x @ p["kernel"], p["bias"]) if "bias" in p else x @ p["kernel"]


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return scaled(x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6), scale)


def kernel(*shape: int, bias: bool = True, seed: int = 0) -> dict[str, jax.Array]:
    return {"kernel": normal(*shape, seed=seed)} | ({"bias": normal(shape[-1], seed=seed)} if bias else {})


# -- kernels that are kept as (out, in) --------------------------------------------------------------------------------


def out_in(p: Any, x: jax.Array) -> jax.Array:
    """HF's FlaxConv1D: the kernel is (out, in), and has the name of nn.Dense's."""
    return add(lax.dot_general(x, p["kernel"].T, (((x.ndim - 1,), (0,)), ((), ()))), p["bias"])


def gpt2(p: Any, ids: jax.Array) -> jax.Array:
    h = p["wte"]["embedding"][ids] + p["wpe"]["embedding"][jnp.arange(T)][None]
    for block in (p["h"]["0"], p["h"]["1"]):
        q, k, v = jnp.split(out_in(block["c_attn"], h), 3, axis=-1)
        h = h + out_in(block["c_proj"], jnp.tanh(q) * k + v)
    return dense(p["score"], h)


def conv1d(seed: int) -> Any:
    block = {"c_attn": (3 * D, D), "c_proj": (D, D)}
    return {k: {"kernel": normal(*s, seed=seed), "bias": normal(s[0], seed=seed)} for k, s in block.items()}


GPT2 = {
    "wte": {"embedding": normal(V, D)},
    "wpe": {"embedding": normal(T, D)},
    "h": {"0": conv1d(1), "1": conv1d(2)},
    "score": kernel(D, 2),
}
GPT2_SITES = {
    **{
        f"h/{i}/{k}/{w}": row
        for i in "01"
        for k in ("c_attn", "c_proj")
        for w, row in (("bias", OTHER), ("kernel", OUT_IN))
    },
    "score/bias": OTHER,
    "score/kernel": MATRIX,
    "wpe/embedding": TABLE,
    "wte/embedding": TABLE,
}


def equinox_mlp() -> Layout:
    """Attribute keys; a None where there is no bias, and where a function was filtered out."""
    model = eqx.nn.MLP(D, F, 0, depth=0, use_final_bias=False, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    fn = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    return Layout(
        Case(lambda p, x: fn(p["mlp"], x), {"mlp": params}, (normal(B, D),)), {"mlp/layers/0/weight": OUT_IN}, None
    )


def transposed_dense_in_attention(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("btd,nhd->btnh", x, w)


STORED_OUT_IN = {
    "HF's GPT-2": Layout(Case(gpt2, GPT2, (IDS,)), GPT2_SITES, "h/0/c_attn/kernel"),
    "Equinox, no bias": equinox_mlp(),
    "Equinox's Linear by hand": one("weight", (F, D), lambda w, x: jax.vmap(lambda x: w @ x)(x), (B, D), OUT_IN, None),
    "torch's q_proj, (heads, width, in)": one(
        "q_proj/weight", (N, H, D), transposed_dense_in_attention, (B, T, D), ("linear", (2,), (0, 1), ()), None
    ),
    "w @ x, the batch last": one("w", (F, D), lambda w, x: w @ x, (D, B), OUT_IN, None),
}

# -- einsum kernels, fused or not --------------------------------------------------------------------------------------


def gemma_mlp(p: Any, x: jax.Array) -> jax.Array:
    """Two bare arrays, without leaf names: the gate is (2, D, F), indexed."""
    gate, up = x @ p["mlp"]["gating_einsum"][0], x @ p["mlp"]["gating_einsum"][1]
    return (jax.nn.gelu(gate) * up) @ p["mlp"]["linear"]


def gemma_attention(p: Any, x: jax.Array) -> jax.Array:
    q = jnp.einsum("BTD,NDH->BTNH", x, p["q_einsum"]["w"])
    k, v = jnp.einsum("BSD,CKDH->CBSKH", x, p["kv_einsum"]["w"])
    q = q.reshape(B, T, K, N // K, H)
    p_ = jax.nn.softmax(jnp.einsum("BTKGH,BSKH->BKGTS", q, k), axis=-1)
    encoded = jnp.einsum("BKGTS,BSKH->BTKGH", p_, v).reshape(B, T, N, H)
    return jnp.einsum("BTNH,NHD->BTD", encoded, p["attn_vec_einsum"]["w"])


def split_outputs(p: Any, x: jax.Array) -> jax.Array:
    """GEGLU: one kernel gives value and gate, which are split afterwards."""
    value, gate = jnp.split(dense(p["proj"], x), 2, axis=-1)
    return dense(p["out"], value * jax.nn.gelu(gate))


def t5x_reshaped(p: Any, x: jax.Array) -> jax.Array:
    """Stored as a matrix, used as (in, heads, width) and (heads, width, out)."""
    y = jnp.einsum("btd,dnh->btnh", x, p["query"]["kernel"].reshape(D, N, H))
    return jnp.einsum("btnh,nhd->btd", jnp.tanh(y), p["out"]["kernel"].reshape(N, H, D))


def fused_kv(w: jax.Array, x: jax.Array) -> jax.Array:
    kv = jnp.einsum("btd,dcnh->btcnh", x, w)
    return jnp.einsum("btnh,bsnh->bnts", kv[:, :, 0], kv[:, :, 1])


ATTENTION = {
    f"{name}/{leaf}": row
    for name in ("query", "key", "value")
    for leaf, row in (("bias", OTHER), ("kernel", ("linear", (0,), (1, 2), ())))
} | {"out/bias": OTHER, "out/kernel": ("linear", (0, 1), (2,), ())}
PROJECTIONS = tuple(f"layer/{name}/kernel" for name in ("key", "out", "query", "value"))

FUSED = {
    "linen attention": linen(nn.MultiHeadDotProductAttention(N), (B, T, D), ATTENTION, PROJECTIONS),
    "linen DenseGeneral in attention, alone": linen(
        nn.DenseGeneral((N, H)), (B, D), {"bias": OTHER, "kernel": ("linear", (0,), (1, 2), ())}, "layer/kernel"
    ),
    "linen DenseGeneral, two inputs": linen(
        nn.DenseGeneral(D, axis=(-2, -1), use_bias=False), (B, N, H), {"kernel": ("linear", (0, 1), (2,), ())}, "layer/kernel"
    ),
    "linen DenseGeneral, batch axis": linen(
        nn.DenseGeneral(F, axis=-1, batch_dims=(0,), use_bias=False), (E, B, D), {"kernel": ("linear", (1,), (2,), (0,))},
        "layer/kernel",
    ),
    "gemma attention": Layout(
        Case(
            gemma_attention,
            {
                "q_einsum": {"w": normal(N, D, H)}, "kv_einsum": {"w": normal(2, K, D, H)},
                "attn_vec_einsum": {"w": normal(N, H, D)},
            },
            (normal(B, T, D),),
        ),
        {
            "attn_vec_einsum/w": ("linear", (0, 1), (2,), ()),
            "kv_einsum/w": ("linear", (2,), (0, 1, 3), ()),
            "q_einsum/w": ("linear", (1,), (0, 2), ()),
        },
        None,
    ),
    "gemma mlp, bare arrays": Layout(
        Case(gemma_mlp, {"mlp": {"gating_einsum": normal(2, D, F), "linear": normal(F, D)}}, (normal(B, T, D),)),
        {"mlp/gating_einsum": ("linear", (1,), (2,), (0,)), "mlp/linear": MATRIX},
        None,
    ),
    "gemma qkv_einsum": einsum("qkv_einsum/w", "BTD,SNDH->SBTNH", (2,), (0, 1, 3), named=None),
    "gemma gating_einsum": einsum("gating_einsum/w", "BTD,CDF->CBTF", (1,), (0, 2), named=None),
    "gemma gating_einsum, transposed": einsum("gating_einsum/w", "BTF,CDF->BTCD", (2,), (0, 1), named=None),
    # Flax's own gemma on NNX and nn.Einsum call the same arrays "kernel".
    "nnx gemma q_einsum": einsum("q_einsum/kernel", "BTD,NDH->BTNH", (1,), (0, 2), named="q_einsum/kernel"),
    "nnx gemma kv_einsum": einsum("kv_einsum/kernel", "BTD,CKDH->CBTKH", (2,), (0, 1, 3), named="kv_einsum/kernel"),
    "nnx gemma qkv_einsum": einsum("qkv_einsum/kernel", "BTD,SNDH->SBTNH", (2,), (0, 1, 3), named="qkv_einsum/kernel"),
    "nnx gemma attn_vec_einsum": einsum("attn_vec_einsum/kernel", "BTNH,NHD->BTD", (0, 1), (2,), named="attn_vec_einsum/kernel"),
    "nn.Einsum": linen(
        nn.Einsum((3, N, D, H), "btd,sndh->sbtnh", use_bias=False), (B, T, D), {"kernel": ("linear", (2,), (0, 1, 3), ())},
        "layer/kernel",
    ),
    "q as (heads, width, in)": einsum("q", "BTD,NHD->BTNH", (2,), (0, 1), named=None),
    "out as (out, heads, width)": einsum("o", "BTNH,DNH->BTD", (1, 2), (0,), named=None),
    "T5X wi, fused": einsum("wi/kernel", "BTD,DCF->BTCF", (0,), (1, 2), named="wi/kernel"),
    "T5X kv, fused": one(
        "attention/kv_fused/kernel", (D, 2, N, H), fused_kv, (B, T, D), ("linear", (0,), (1, 2, 3), ()),
        "attention/kv_fused/kernel",
    ),
    "T5X and MaxText qkv, fused": einsum("qkv_proj/kernel", "BTD,DSNH->BTSNH", (0,), (1, 2, 3), named="qkv_proj/kernel"),
    "T5X, stored as matrices": Layout(
        Case(t5x_reshaped, {"query": kernel(D, N * H, bias=False), "out": kernel(N * H, D, bias=False, seed=1)}, (normal(B, T, D),)),
        {"out/kernel": MATRIX, "query/kernel": MATRIX},
        ("out/kernel", "query/kernel"),
    ),
    "GEGLU, fused": Layout(
        Case(split_outputs, {"proj": kernel(D, 2 * F), "out": kernel(F, D)}, (normal(B, T, D),)),
        {"out/bias": OTHER, "out/kernel": MATRIX, "proj/bias": OTHER, "proj/kernel": MATRIX},
        ("out/kernel", "proj/kernel"),
    ),
    "five axes, two of them inputs": einsum("w", "BKGD,CKGDF->BCF", (1, 2, 3), (0, 4), named=None),
}  # fmt: skip

# -- experts -----------------------------------------------------------------------------------------------------------


def tunix_moe(p: Any, x: jax.Array, gates: jax.Array) -> jax.Array:
    """Bare arrays; every expert on every token."""
    h = jnp.einsum("td,edf->tef", x, p["gate_proj"]) * jnp.einsum("td,edf->tef", x, p["up_proj"])
    return jnp.einsum("tef,efd,te->td", h, p["down_proj"], gates)


def dispatched_moe(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(jnp.einsum("ecd,edf->ecf", x, p["wi"]["kernel"]))
    return jnp.einsum("ecf,efd->ecd", h, p["wo"]["kernel"])


def token_experts(p: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.einsum("td,tdf->tf", x, p["w"][ids])


def expert_by_expert(p: Any, x: jax.Array) -> jax.Array:
    return sum(jnp.tanh(x @ p["experts"]["kernel"][e]) for e in range(E))


GROUPED: Row = ("linear", (1,), (2,), (0,))
SHARED: Row = ("linear", (1,), (0, 2), ())
EXPERTS = {
    "experts, all on all tokens": Layout(
        Case(
            tunix_moe,
            {"gate_proj": normal(E, D, F), "up_proj": normal(E, D, F, seed=1), "down_proj": normal(E, F, D)},
            (normal(B, D), normal(B, E)),
        ),
        {"down_proj": ("linear", (0, 1), (2,), ()), "gate_proj": SHARED, "up_proj": SHARED},
        None,
    ),
    "experts, dispatched": Layout(
        Case(dispatched_moe, {"wi": kernel(E, D, F, bias=False), "wo": kernel(E, F, D, bias=False)}, (normal(E, T, D),)),
        {"wi/kernel": GROUPED, "wo/kernel": GROUPED},
        "wi/kernel",
    ),
    "experts, one of each token": Layout(
        Case(token_experts, {"w": normal(E, D, F)}, (normal(T, D), jnp.asarray([3, 0, 0, 2]))), {"w": GROUPED}, None
    ),
    "experts, one by one": Layout(
        Case(expert_by_expert, {"experts": kernel(E, D, F, bias=False)}, (normal(B, D),)),
        {"experts/kernel": GROUPED},
        "experts/kernel",
    ),
    "experts, ragged": one(
        "w", (E, D, F), lambda w, x: lax.ragged_dot(x, w, jnp.asarray([2, 0, 5, 1], jnp.int32)), (B, D), GROUPED, None
    ),
    "experts, vmapped": one("w", (E, D, F), jax.vmap(lambda w, x: x @ w), (E, B, D), GROUPED, None),
    "experts of (out, in)": einsum("weight", "EBD,EFD->EBF", (2,), (1,), 0, named=None),
    "experts on axis 1": einsum("w", "EBD,DEF->EBF", (0,), (2,), 1, named=None),
    "experts, gate and up fused": einsum("w", "EBD,ECDF->EBCF", (2,), (1, 3), 0, named=None),
    "experts of attention": einsum("w", "EBD,ECNDH->EBCNH", (3,), (1, 2, 4), 0, named=None),
    "linen experts, nn.vmap": linen(
        nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(F),
        (E, B, D), {"bias": OTHER, "kernel": GROUPED}, "layer/kernel",
    ),
    "linen experts, nn.vmap on axis 1": linen(
        nn.vmap(nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True})(F),
        (E, B, D), {"bias": OTHER, "kernel": ("linear", (0,), (2,), (1,))}, "layer/kernel",
    ),
}  # fmt: skip

# -- layers stacked, on axis 0 and on axis 1 ---------------------------------------------------------------------------


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        h = h + nn.MultiHeadDotProductAttention(N, name="attention")(nn.LayerNorm(name="norm")(h))
        return nn.Dense(D, name="mlp")(h), None


class Projection(nn.Module):
    """A scanned Dense with the name of a projection of attention."""

    projection: str

    @nn.compact
    def __call__(self, h, _):
        return jnp.tanh(nn.Dense(D, name=self.projection, use_bias=False)(h)), None


class Layers(nn.Module):
    layer: type[nn.Module] = Layer
    axis: int = 0
    options: tuple[Any, ...] = ()

    @nn.compact
    def __call__(self, h):
        stack = nn.scan(self.layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=L)
        return stack(*self.options, name="layers")(h, None)[0]


def stacked_rows(axis: int) -> dict[str, Row]:
    """The rows of `Layer` with one more axis."""
    rows = under("layers/attention", **ATTENTION) | {"layers/mlp/bias": OTHER, "layers/mlp/kernel": MATRIX}
    moved = {
        path: (kind, *(tuple(i + (i >= axis) for i in axes) for axes in (ins, outs)), (axis,) if ins else ())
        for path, (kind, ins, outs, _) in rows.items()
    }
    return {**moved, "layers/norm/bias": OTHER, "layers/norm/scale": OTHER}


def maxtext_moe(w: jax.Array, x: jax.Array) -> jax.Array:
    """(experts, layers, in, out), scanned on axis 1."""

    def layer(h, w):
        return h + jnp.tanh(jnp.einsum("etd,edf->etf", h, w))[..., :D], None

    return lax.scan(layer, x, jnp.moveaxis(w, 1, 0))[0]


def flax_moe(w: jax.Array, x: jax.Array) -> jax.Array:
    """(layers, experts, in, out)."""
    return maxtext_moe(jnp.swapaxes(w, 0, 1), x)


def stacked_vectors(axis: int) -> Callable[..., Any]:
    """Norm scales and biases beside the kernels of the layers."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        def layer(h, row):
            return jnp.tanh(add(rms_norm(h, row["scale"]) @ row["kernel"], row["bias"])), None

        return lax.scan(layer, x, jax.tree.map(lambda w: jnp.moveaxis(w, axis, 0), p))[0]

    return fn


def conv_layers(p: Any, x: jax.Array) -> jax.Array:
    def layer(h, w):
        window = (1,) * (w.ndim - 2)
        numbers = ("NHWC", "HWIO", "NHWC") if w.ndim == 4 else ("NHC", "HIO", "NHC")
        return jnp.tanh(lax.conv_general_dilated(h, w, window, "SAME", dimension_numbers=numbers)), None

    return lax.scan(layer, x, p)[0]


def unrolled(p: Any, x: jax.Array) -> jax.Array:
    for i in range(L):
        x = jnp.tanh(x @ p["blocks"]["kernel"][:, i])
    return x


def layers_in_groups(w: jax.Array, x: jax.Array) -> jax.Array:
    """(groups, layers, in, out): a scan in a scan."""
    inner = lambda h, group: (lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, group)[0], None)
    return lax.scan(inner, x, w)[0]


STACKED = {
    "linen layers on axis 0": linen(Layers(), (B, T, D), stacked_rows(0), "layer/layers/attention/key/kernel"),
    "T5X layers on axis 1": linen(Layers(axis=1), (B, T, D), stacked_rows(1), "layer/layers/attention/key/kernel"),
    "layers of a Dense called query": linen(
        Layers(Projection, options=("query",)), (B, D), {"layers/query/kernel": GROUPED}, "layer/layers/query/kernel"
    ),
    "layers of a Dense called out": linen(
        Layers(Projection, options=("out",)), (B, D), {"layers/out/kernel": GROUPED}, "layer/layers/out/kernel"
    ),
    "layers of a Dense called value, on axis 1": linen(
        Layers(Projection, 1, ("value",)), (B, D), {"layers/value/kernel": ("linear", (0,), (2,), (1,))},
        "layer/layers/value/kernel",
    ),
    "layers (L, in, out)": scanned("mlp/kernel", "BTD,DF->BTF", (1,), (2,), 0, named="mlp/kernel"),
    "layers (in, L, out)": scanned("mlp/kernel", "BTD,DF->BTF", (0,), (2,), 1, named="mlp/kernel"),
    "layers (in, out, L)": scanned("mlp/kernel", "BTD,DF->BTF", (0,), (1,), 2, named="mlp/kernel"),
    "layers (L, out, in)": scanned("mlp/weight", "BTD,FD->BTF", (2,), (1,), 0, named=None),
    "layers of q (L, D, N, H)": scanned("query/kernel", "BTD,DNH->BTNH", (1,), (2, 3), 0, named="query/kernel"),
    "layers of q (D, L, N, H)": scanned("query/kernel", "BTD,DNH->BTNH", (0,), (2, 3), 1, named="query/kernel"),
    "layers of out (L, N, H, D)": scanned("out/kernel", "BTNH,NHD->BTD", (1, 2), (3,), 0, named="out/kernel"),
    "layers of out (N, L, H, D)": scanned("out/kernel", "BTNH,NHD->BTD", (0, 2), (3,), 1, named="out/kernel"),
    "layers of o_proj (L, N, H, D)": scanned("o_proj/kernel", "BTNH,NHD->BTD", (1, 2), (3,), 0, named="o_proj/kernel"),
    "layers of o_proj (N, L, H, D)": scanned("o_proj/kernel", "BTNH,NHD->BTD", (0, 2), (3,), 1, named="o_proj/kernel"),
    "layers of gemma q (L, N, D, H)": scanned("q_einsum/w", "BTD,NDH->BTNH", (2,), (1, 3), 0, named=None),
    "layers of gemma kv (L, 2, K, D, H)": scanned("kv_einsum/w", "BTD,CKDH->BTCKH", (3,), (1, 2, 4), 0, named=None),
    "layers of gemma qkv (L, 3, N, D, H)": scanned("qkv_einsum/w", "BTD,SNDH->BTSNH", (3,), (1, 2, 4), 0, named=None),
    "layers of nnx gemma kv (L, 2, K, D, H)": scanned(
        "kv_einsum/kernel", "BTD,CKDH->BTCKH", (3,), (1, 2, 4), 0, named="kv_einsum/kernel"
    ),
    "layers of gating (L, 2, D, F)": scanned("gating_einsum", "BTD,CDF->BTCF", (2,), (1, 3), 0, named=None),
    "T5X layers of kv (D, L, 2, N, H)": scanned("kv/kernel", "BTD,DCNH->BTCNH", (0,), (2, 3, 4), 1, named="kv/kernel"),
    "T5X layers of wi (D, L, 2, F)": scanned("wi/kernel", "BTD,DCF->BTCF", (0,), (2, 3), 1, named="wi/kernel"),
    "MaxText layers of qkv (D, L, 3, N, H)": scanned(
        "qkv_proj/kernel", "BTD,DSNH->BTSNH", (0,), (2, 3, 4), 1, named="qkv_proj/kernel"
    ),
    "MaxText experts (E, L, in, out)": one(
        "wi_0", (E, L, D, F), maxtext_moe, (E, T, D), ("linear", (2,), (3,), (0, 1)), None
    ),
    "linen experts (L, E, in, out)": one(
        "experts/Dense_0/kernel", (L, E, D, F), flax_moe, (E, T, D), ("linear", (2,), (3,), (0, 1)), "experts/Dense_0/kernel"
    ),
    "layers in groups": one(
        "w", (2, L, D, D), layers_in_groups, (B, D), ("linear", (2,), (3,), (0, 1)), None
    ),
    "layers by a python loop on axis 1": Layout(
        Case(unrolled, {"blocks": kernel(D, L, D, bias=False)}, (normal(B, D),)),
        {"blocks/kernel": ("linear", (0,), (2,), (1,))}, "blocks/kernel",
    ),
    "layers of conv (L, k, k, in, out)": one(
        "conv/kernel", (4, 3, 3, D, D), conv_layers, (2, T, T, D), ("conv", (1, 2, 3), (4,), (0,)), "conv/kernel"
    ),
    "layers of conv (L, k, in, out)": one(
        "conv/kernel", (4, 3, D, D), conv_layers, (B, T, D), ("conv", (1, 2), (3,), (0,)), "conv/kernel"
    ),
    "layers of conv, as many as the window is wide": one(
        "conv/kernel", (3, 3, D, D), conv_layers, (B, T, D), ("conv", (1, 2), (3,), (0,)), "conv/kernel"
    ),
    "qkv of three heads": one(
        "qkv_einsum/kernel", (3, 3, D, H), lambda w, x: jnp.einsum("btd,sndh->sbtnh", x, w), (B, T, D),
        ("linear", (2,), (0, 1, 3), ()), "qkv_einsum/kernel",
    ),
    "norms and biases (L, D)": Layout(
        Case(stacked_vectors(0), {"kernel": normal(L, D, D), "scale": normal(L, D), "bias": normal(L, D, seed=1)}, (normal(B, D),)),
        {"bias": OTHER, "kernel": GROUPED, "scale": OTHER}, "kernel",
    ),
    "norms and biases (D, L)": Layout(
        Case(stacked_vectors(1), {"kernel": normal(D, L, D), "scale": normal(D, L), "bias": normal(D, L, seed=1)}, (normal(B, D),)),
        {"bias": OTHER, "kernel": ("linear", (0,), (2,), (1,)), "scale": OTHER}, "kernel",
    ),
}  # fmt: skip

# -- convolutions ------------------------------------------------------------------------------------------------------


def unet_attention(p: Any, x: jax.Array, text: jax.Array) -> jax.Array:
    """diffusers: proj_in and proj_out are 1x1 convolutions, to_k and to_v take the text's width."""
    conv = lambda p, x: lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = conv(p["proj_in"], x).reshape(2, T * T, D)
    q, k, v = h @ p["to_q"]["kernel"], text @ p["to_k"]["kernel"], text @ p["to_v"]["kernel"]
    mix = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k), axis=-1)
    return conv(p["proj_out"], jnp.einsum("bts,bsd->btd", mix, v).reshape(2, T, T, D))


def standardised(p: Any, x: jax.Array) -> jax.Array:
    """big_vision's BiT: not linear in the weight."""
    w = p["conv"]["kernel"]
    w = w - jnp.mean(w, axis=(0, 1, 2), keepdims=True)
    w = w / jnp.sqrt(jnp.var(w, axis=(0, 1, 2), keepdims=True) + 1e-10)
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def weight_norm(p: Any, x: jax.Array) -> jax.Array:
    """Wav2Vec2's positional convolution: direction and length apart, and groups."""
    w = p["weight_v"] * (p["weight_g"] * lax.rsqrt(jnp.sum(p["weight_v"] ** 2, axis=(1, 2), keepdims=True)))
    return lax.conv_general_dilated(
        x, w.T, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=2
    )


def control_net(p: Any, x: jax.Array) -> jax.Array:
    """The zero convolution blocks the gradient of what is below it."""
    conv = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    h = conv(x, p["conv"]["kernel"], dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x + conv(jnp.tanh(h), p["zero_conv"]["kernel"], dimension_numbers=("NHWC", "HWIO", "NHWC"))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (3, 3), use_bias=False)(x)
        return nn.Dense(2)(jnp.tanh(nn.BatchNorm(use_running_average=True)(x)).mean((1, 2)))


def batch_norm() -> Layout:
    """`batch_stats` beside `params`, both given."""
    x = normal(2, T, T, 3)
    variables = filled(jax.eval_shape(ConvNet().init, jax.random.key(0), x))
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    sites = {
        "batch_stats/BatchNorm_0/mean": OTHER,
        "batch_stats/BatchNorm_0/var": OTHER,
        "params/BatchNorm_0/bias": OTHER,
        "params/BatchNorm_0/scale": OTHER,
        "params/Conv_0/kernel": CONV,
        "params/Dense_0/bias": OTHER,
        "params/Dense_0/kernel": MATRIX,
    }
    return Layout(Case(ConvNet().apply, variables, (x,)), sites, ("params/Conv_0/kernel", "params/Dense_0/kernel"))


def conv(features: int, window: tuple[int, ...], x: tuple[int, ...], row: Row, named: Any, **options: Any) -> Layout:
    module = nn.Conv(features, window, use_bias=False, **options)
    return linen(module, x, {"kernel": row}, named)


IMAGE = (2, 8, 8, D)
CONVS = {
    "conv 2-D": conv(F, (3, 3), IMAGE, CONV, ("layer/kernel",)),
    "conv 2-D with bias": linen(nn.Conv(F, (3, 3)), IMAGE, {"bias": OTHER, "kernel": CONV}, ("layer/kernel",)),
    "conv of patches": linen(
        nn.Conv(F, (4, 4), strides=(4, 4), padding="VALID"), (2, 8, 8, 3), {"bias": OTHER, "kernel": CONV}, ("layer/kernel",)
    ),
    "conv of patches, no bias": conv(F, (4, 4), (2, 8, 8, 3), CONV, "layer/kernel", strides=(4, 4), padding="VALID"),
    "conv 1x1": conv(F, (1, 1), IMAGE, CONV, ("layer/kernel",)),
    "conv 1-D": conv(F, (3,), (B, T, D), ("conv", (0, 1), (2,), ()), "layer/kernel"),
    "conv 3-D": conv(F, (3, 3, 3), (1, 4, 4, 4, D), ("conv", (0, 1, 2, 3), (4,), ()), ("layer/kernel",)),
    "conv 3-D of tubelets": linen(
        nn.Conv(F, (2, 4, 4), strides=(2, 4, 4)), (1, 4, 8, 8, 3),
        {"bias": OTHER, "kernel": ("conv", (0, 1, 2, 3), (4,), ())}, ("layer/kernel",),
    ),
    "conv in groups": conv(F, (3, 3), IMAGE, CONV, ("layer/kernel",), feature_group_count=4),
    "conv 1-D, depthwise": conv(F, (4,), (B, T, F), ("conv", (0, 1), (2,), ()), "layer/kernel", feature_group_count=F),
    "conv 2-D, depthwise": conv(D, (3, 3), IMAGE, CONV, ("layer/kernel",), feature_group_count=D),
    "conv, transposed": linen(nn.ConvTranspose(F, (3, 3), use_bias=False), IMAGE, {"kernel": CONV}, ("layer/kernel",)),
    "conv, transposed, (out, in)": linen(
        nn.ConvTranspose(F, (3, 3), use_bias=False, transpose_kernel=True), IMAGE,
        {"kernel": ("conv", (0, 1, 3), (2,), ())}, "layer/kernel",
    ),
    "conv, transposed, (out, in), as many out as in": linen(
        nn.ConvTranspose(D, (4, 4), transpose_kernel=True), IMAGE,
        {"bias": OTHER, "kernel": ("conv", (0, 1, 3), (2,), ())}, "layer/kernel",
    ),
    "conv, a kernel per place": linen(
        nn.ConvLocal(F, (2, 2), strides=(2, 2), use_bias=False), (2, 4, 4, D), {"kernel": ("linear", (2,), (3,), (0, 1))},
        "layer/kernel",
    ),
    "Haiku's conv, w": one(
        "conv2_d/w", (3, 3, D, F),
        lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), IMAGE, CONV,
        None,
    ),
    "Equinox's conv, (out, in, h, w)": one(
        "conv/weight", (F, D, 3, 3), lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME"), (2, D, 8, 8),
        ("conv", (1, 2, 3), (0,), ()), None,
    ),
    "UNet attention": Layout(
        Case(
            unet_attention,
            {
                "proj_in": kernel(1, 1, D, D, bias=False), "proj_out": kernel(1, 1, D, D, bias=False, seed=1),
                "to_q": kernel(D, D, bias=False), "to_k": kernel(F, D, bias=False), "to_v": kernel(F, D, bias=False, seed=1),
            },
            (normal(2, T, T, D), normal(2, 6, F)),
        ),
        {
            "proj_in/kernel": CONV, "proj_out/kernel": CONV,
            "to_k/kernel": MATRIX, "to_q/kernel": MATRIX, "to_v/kernel": MATRIX,
        },
        ("proj_in/kernel", "proj_out/kernel", "to_k/kernel", "to_q/kernel", "to_v/kernel"),
    ),
    "ControlNet's zero convolution": Layout(
        Case(
            control_net,
            {"conv": kernel(3, 3, D, D, bias=False), "zero_conv": {"kernel": jnp.zeros((1, 1, D, D))}}, (normal(2, T, T, D),),
        ),
        {"conv/kernel": CONV, "zero_conv/kernel": CONV}, ("conv/kernel", "zero_conv/kernel"),
    ),
    "BiT's standardised kernel": Layout(
        Case(standardised, {"conv": kernel(3, 3, D, F, bias=False)}, (normal(2, T, T, D),), ("conv/kernel",)),
        {"conv/kernel": CONV}, ("conv/kernel",),
    ),
    "Wav2Vec2's weight_v and weight_g": Layout(
        Case(
            weight_norm, {"weight_v": normal(F, D // 2, 3), "weight_g": normal(F, 1, 1)}, (normal(B, T, D),), ("weight_v",),
            targets=r"weight_v",
        ),
        {"weight_g": ("conv", (1, 2), (0,), ()), "weight_v": ("conv", (1, 2), (0,), ())}, None,
    ),
    "BatchNorm": batch_norm(),
}  # fmt: skip

# -- tables, tied heads, one weight at all depths ----------------------------------------------------------------------


def tied(name: str) -> Callable[..., Any]:
    return lambda p, ids: jnp.tanh(p["embedder"][name][ids]) @ p["embedder"][name].T


def gemma_tied(p: Any, ids: jax.Array) -> jax.Array:
    table = p["embedder"]["input_embedding"]
    return jnp.dot(jnp.tanh(table[(ids,)] * jnp.sqrt(D).astype(table.dtype)), table.T)


class TiedLM(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(V, D, name="shared")
        return embed.attend(nn.Dense(D, name="transform")(embed(ids)))


class Whisper(nn.Module):
    """The head is a module of its own that is given the transposed table."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(V, D, name="embed_tokens")
        h = jnp.tanh(embed(ids))
        table = self.variables["params"]["embed_tokens"]["embedding"]
        return nn.Dense(V, use_bias=False, parent=None).apply({"params": {"kernel": table.T}}, h)


def bart(p: Any, ids: jax.Array) -> jax.Array:
    """One table for the encoder, the decoder and the head."""
    table = p["shared"]["embedding"]
    encoded = jnp.tanh(dense(p["encoder"], jnp.sin(table[ids]))).mean(axis=1, keepdims=True)
    return jnp.einsum("btd,vd->btv", jnp.tanh(table[ids[:, ::-1]] + encoded), table)


class Albert(nn.Module):
    @nn.compact
    def __call__(self, h):
        layer = nn.Dense(D, name="layer")
        for _ in range(3):
            h = jnp.tanh(layer(h))
        return h


def albert_table(p: Any, ids: jax.Array) -> jax.Array:
    """A table and a projection of its rows, with nothing between them."""
    return dense(p["embedding_hidden_mapping_in"], p["word_embeddings"]["embedding"][ids])


def albert_scan(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, _: (jnp.tanh(dense(p["layer"], h)), None), x, None, length=3)[0]


def albert_fori(p: Any, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(dense(p["layer"], h)), x)


def t5_bias(p: Any, buckets: jax.Array) -> jax.Array:
    """Relative attention in HF's T5: (buckets, heads), looked up."""
    return jnp.transpose(p["relative_attention_bias"]["embedding"][buckets], (2, 0, 1))


def t5x_bias(p: Any, buckets: jax.Array) -> jax.Array:
    """Relative attention in T5X: (heads, buckets), multiplied by one-hot rows."""
    hot = jax.nn.one_hot(buckets, 8, axis=0)
    return lax.dot_general(p["relpos_bias"]["rel_embedding"], hot, (((1,), (0,)), ((), ())))


def learned_positions(p: Any, x: jax.Array) -> jax.Array:
    """ViT: added, never multiplied."""
    x = jnp.concatenate([jnp.broadcast_to(p["cls"], (B, 1, D)), x], axis=1) + p["pos_embedding"]
    return dense(p["head"], x[:, 0])


LAYER = {"layer": kernel(D, D)}
SHARED_LAYER = {"layer/bias": OTHER, "layer/kernel": MATRIX}
BUCKETS = jnp.asarray([[0, 1, 2], [3, 0, 1], [7, 3, 0]], jnp.int32)
TABLES = {
    **{
        f"tied head, {name}": Layout(
            Case(tied(name), {"embedder": {name: normal(V, D)}}, (IDS,)), {f"embedder/{name}": TABLE}, None
        )
        for name in ("embedding", "embeddings", "weight", "w")
    },
    "gemma's tied input_embedding": Layout(
        Case(gemma_tied, {"embedder": {"input_embedding": normal(V, D)}}, (IDS,)), {"embedder/input_embedding": TABLE}, None
    ),
    "linen Embed and attend": linen(
        TiedLM(), IDS, {"shared/embedding": TABLE, "transform/bias": OTHER, "transform/kernel": MATRIX},
        ("layer/transform/kernel",),
    ),
    "Whisper's head": linen(Whisper(), IDS, {"embed_tokens/embedding": TABLE}, None),
    "BART's shared table": Layout(
        Case(bart, {"shared": {"embedding": normal(V, D)}, "encoder": kernel(D, D)}, (IDS,)),
        {"encoder/bias": OTHER, "encoder/kernel": MATRIX, "shared/embedding": TABLE}, ("encoder/kernel",),
    ),
    "one-hot look-up, tied": Layout(
        Case(
            lambda p, ids: jnp.tanh(jax.nn.one_hot(ids, V) @ p["embedding"]) @ p["embedding"].T, {"embedding": normal(V, D)},
            (IDS,),
        ),
        {"embedding": MATRIX}, None,
    ),
    "a table of matrices, per layer": Layout(
        Case(lambda p, ids: p["per_layer"][ids], {"per_layer": normal(V, L, H)}, (IDS,)),
        {"per_layer": ("embedding", (0,), (1, 2), ())}, None,
    ),
    "T5's relative positions": Layout(
        Case(t5_bias, {"relative_attention_bias": {"embedding": normal(8, N)}}, (BUCKETS,)),
        {"relative_attention_bias/embedding": TABLE}, None,
    ),
    "T5X's relative positions": Layout(
        Case(t5x_bias, {"relpos_bias": {"rel_embedding": normal(N, 8)}}, (BUCKETS,)),
        {"relpos_bias/rel_embedding": OUT_IN}, None,
    ),
    "positions that are added": Layout(
        Case(
            learned_positions, {"cls": normal(1, 1, D), "pos_embedding": normal(1, T + 1, D), "head": kernel(D, 2)},
            (normal(B, T, D),),
        ),
        {"cls": OTHER, "head/bias": OTHER, "head/kernel": MATRIX, "pos_embedding": OTHER}, ("head/kernel",),
    ),
    "ALBERT's factorised table": Layout(
        Case(albert_table, {"word_embeddings": {"embedding": normal(V, H)}, "embedding_hidden_mapping_in": kernel(H, D)}, (IDS,)),
        {
            "embedding_hidden_mapping_in/bias": OTHER, "embedding_hidden_mapping_in/kernel": MATRIX,
            "word_embeddings/embedding": TABLE,
        },
        ("embedding_hidden_mapping_in/kernel",),
    ),
    "ALBERT, linen": linen(Albert(), (B, D), SHARED_LAYER, ("layer/layer/kernel",)),
    "ALBERT by a scan": Layout(Case(albert_scan, LAYER, (normal(B, D),)), SHARED_LAYER, ("layer/kernel",)),
    "ALBERT by a fori_loop": Layout(Case(albert_fori, LAYER, (normal(B, D),)), SHARED_LAYER, ("layer/kernel",)),
    "one weight, both ways": one("w", (D, F), lambda w, x: jnp.tanh(x @ w) @ w.T, (B, D), MATRIX, None),
}  # fmt: skip

# -- leaves that are no matrices, and leaves that are not used ---------------------------------------------------------


def normed(name: str, offset: float = 0.0) -> Callable[..., Any]:
    return lambda p, x: rms_norm(x, offset + p["norm"][name]) @ p["dense"]["kernel"]


def norm(name: str, x: tuple[int, ...], offset: float = 0.0) -> Layout:
    params = {"norm": {name: normal(D)}, "dense": kernel(D, F, bias=False)}
    case = Case(normed(name, offset), params, (normal(*x),))
    return Layout(case, {"dense/kernel": MATRIX, f"norm/{name}": OTHER}, ("dense/kernel",))


def clip(p: Any, image: jax.Array, text: jax.Array) -> jax.Array:
    image, text = dense(p["visual"], image), dense(p["text"], text)
    return jnp.exp(p["logit_scale"]) * jnp.einsum("bd,cd->bc", jnp.tanh(image), jnp.tanh(text))


def scalar_gate(p: Any, x: jax.Array) -> jax.Array:
    """ReZero, and every learned temperature: a scalar times an array."""
    return x + p["alpha"] * dense(p["dense"], x)


def vit_head(p: Any, x: jax.Array) -> jax.Array:
    """A batch of one image: after pooling, the norm's scale has the shape of its input."""
    return dense(p["head"], scaled(x.mean(axis=1), p["norm"]["scale"]))


def bert(p: Any, x: jax.Array) -> jax.Array:
    """The pooler is not called; the head starts at zero."""
    return dense(p["classifier"], jnp.tanh(dense(p["dense"], x)))


def with_integers(p: Any, x: jax.Array) -> jax.Array:
    return jnp.where(p["mask"][None], dense(p["dense"], x + p["position_ids"][None].astype(x.dtype)), 0.0)


VECTORS = {
    "RMSNorm's weight": norm("weight", (B, T, D)),
    "RMSNorm's w": norm("w", (B, T, D)),
    "RMSNorm's scale, from zero": norm("scale", (B, T, D), 1.0),
    "RMSNorm's scale, one row": norm("scale", (1, D)),
    "RMSNorm's scale, one token": norm("scale", (1, 1, D)),
    "RMSNorm's scale, one vector": norm("scale", (D,)),
    "ViT's norm and head, one image": Layout(
        Case(vit_head, {"norm": {"scale": normal(D)}, "head": kernel(D, F)}, (normal(1, T, D),), op_by_op=True),
        {"head/bias": OTHER, "head/kernel": MATRIX, "norm/scale": OTHER}, ("head/kernel",),
    ),
    "CLIP's logit_scale ()": Layout(
        Case(
            clip, {"logit_scale": normal(), "visual": kernel(D, F, bias=False), "text": kernel(D, F, bias=False, seed=1)},
            (normal(B, D), normal(B, D, seed=1)),
        ),
        {"logit_scale": OTHER, "text/kernel": MATRIX, "visual/kernel": MATRIX}, ("text/kernel", "visual/kernel"),
    ),
    "a scalar that multiplies": Layout(
        Case(scalar_gate, {"alpha": normal(), "dense": kernel(D, D)}, (normal(B, D),)),
        {"alpha": OTHER, "dense/bias": OTHER, "dense/kernel": MATRIX}, ("dense/kernel",),
    ),
    "a vector per layer that multiplies (LayerScale)": Layout(
        Case(
            lambda p, x: x + scaled(dense(p["dense"], x), p["ls"]["gamma"]), {"ls": {"gamma": normal(D)}, "dense": kernel(D, D)},
            (normal(B, T, D),),
        ),
        {"dense/bias": OTHER, "dense/kernel": MATRIX, "ls/gamma": OTHER}, ("dense/kernel",),
    ),
    "a pooler that is not used, a head of zeros": Layout(
        Case(
            bert,
            {"dense": kernel(D, D), "pooler": kernel(D, D), "classifier": {"kernel": jnp.zeros((D, 2)), "bias": jnp.zeros(2)}},
            (normal(B, D),),
        ),
        {
            "classifier/bias": OTHER, "classifier/kernel": MATRIX, "dense/bias": OTHER, "dense/kernel": MATRIX,
            "pooler/bias": OTHER, "pooler/kernel": OTHER,
        },
        ("classifier/kernel", "dense/kernel", "pooler/kernel"),
    ),
    "integers and masks": Layout(
        Case(
            with_integers, {"dense": kernel(D, D), "mask": jnp.arange(D) < 12, "position_ids": jnp.arange(D)}, (normal(B, D),)
        ),
        {"dense/bias": OTHER, "dense/kernel": MATRIX, "mask": OTHER, "position_ids": OTHER}, ("dense/kernel",),
    ),
}  # fmt: skip

# -- keys, boxes, None, no names ---------------------------------------------------------------------------------------


class Attention(NamedTuple):
    """Bare arrays under attribute keys, one of them called value."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


@flax.struct.dataclass
class Pair:
    kernel: jax.Array
    scale: Any = None


class NNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def nnx_state(pure: bool) -> Layout:
    """`nnx.Variable`s around the leaves, or a pure dictionary with integer keys."""
    with jax.numpy_rank_promotion("allow"):
        graph, state = nnx.split(NNX(nnx.Rngs(0)))
    state = nnx.to_pure_dict(state) if pure else state

    def fn(state, x):
        with jax.numpy_rank_promotion("allow"):
            return nnx.merge(graph, state)(x)

    sites = {f"layers/{i}/{k}": row for i in (0, 1) for k, row in (("bias", OTHER), ("kernel", MATRIX))}
    return Layout(Case(fn, state, (normal(B, D),)), sites, ("layers/0/kernel", "layers/1/kernel"))


def partitioned(box: Any) -> Layout:
    init = box(nn.initializers.lecun_normal(), ("embed", "mlp"))
    return linen(
        nn.Dense(F, kernel_init=init), (B, D), {"bias": OTHER, "kernel": MATRIX}, ("layer/kernel",)
    )  # fmt: skip


def chain(*paths: Any) -> Callable[..., Any]:
    """`x @ w @ w @ ...` by the keys of a flat dictionary."""
    return lambda p, x: functools.reduce(lambda h, path: jnp.tanh(h @ p[path]), paths, x)


TORCH = {
    "h.0.attn.c_attn.weight": normal(D, F),  # Conv1D is (in, out), Linear (out, in), and both are called weight
    "h.0.attn.c_attn.bias": normal(F),
    "h.0.mlp.down_proj.weight": normal(D, F),
    "h.10.attn.c_attn.weight": normal(D, F, seed=1),
}


def torch_like(p: Any, x: jax.Array) -> jax.Array:
    h = add(x @ p["h.0.attn.c_attn.weight"], p["h.0.attn.c_attn.bias"]) @ p["h.0.mlp.down_proj.weight"].T
    return h @ p["h.10.attn.c_attn.weight"]


def haiku(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(add(x @ p["mlp/~/linear_0"]["w"], p["mlp/~/linear_0"]["b"]))
    return h @ p["mlp/~/linear_1"]["w"]


def attend(p: Attention, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p.query) * (x @ p.key) + x @ p.value


W, X = normal(D, D), (normal(B, D),)
KEYS = {
    "dotted keys": Layout(
        Case(torch_like, TORCH, X),
        {
            "h.0.attn.c_attn.bias": OTHER, "h.0.attn.c_attn.weight": MATRIX, "h.0.mlp.down_proj.weight": OUT_IN,
            "h.10.attn.c_attn.weight": MATRIX,
        },
        None,
    ),
    "dotted keys that end in kernel": Layout(Case(chain("h.0.kernel"), {"h.0.kernel": W}, X), {"h.0.kernel": MATRIX}, None),
    "string keys '0', '1', '10'": Layout(
        Case(
            lambda p, x: x @ p["0"]["kernel"] @ p["10"]["kernel"] @ p["1"]["kernel"],
            {"0": {"kernel": W}, "1": {"kernel": W}, "10": {"kernel": W}}, X,
        ),
        {"0/kernel": MATRIX, "1/kernel": MATRIX, "10/kernel": MATRIX}, ("0/kernel", "1/kernel", "10/kernel"),
    ),
    "integer keys": Layout(
        Case(
            lambda p, x: x @ p[0]["kernel"] @ p[10]["kernel"] @ p[1]["kernel"],
            {0: {"kernel": W}, 1: {"kernel": W}, 10: {"kernel": W}}, X,
        ),
        {"0/kernel": MATRIX, "1/kernel": MATRIX, "10/kernel": MATRIX}, ("0/kernel", "1/kernel", "10/kernel"),
    ),
    "Haiku's keys": Layout(
        Case(haiku, {"mlp/~/linear_0": {"w": normal(D, F), "b": normal(F)}, "mlp/~/linear_1": {"w": normal(F, D)}}, X),
        {"mlp/~/linear_0/b": OTHER, "mlp/~/linear_0/w": MATRIX, "mlp/~/linear_1/w": MATRIX}, None,
    ),
    "keys joined by a slash": Layout(
        Case(chain("a/b/kernel", "a/c/kernel"), {"a/b/kernel": W, "a/c/kernel": W}, X),
        {"a/b/kernel": MATRIX, "a/c/kernel": MATRIX}, ("a/b/kernel", "a/c/kernel"),
    ),
    "keys that are tuples": Layout(
        Case(chain(("a", "kernel")), flatten_dict({"a": {"kernel": W}}), X), {"('a', 'kernel')": MATRIX}, None
    ),
    "keys with regular expressions' characters": Layout(
        Case(chain("w[0]", "w(1)+"), {"w[0]": W, "w(1)+": W}, X), {"w(1)+": MATRIX, "w[0]": MATRIX}, None
    ),
    "a key that is empty": Layout(Case(chain(""), {"": W}, X), {"": MATRIX}, None),
    "a bare array": Layout(Case(lambda w, x: x @ w, W, X), {"": MATRIX}, None),
    "a list": Layout(
        Case(lambda p, x: x @ p[0] @ p[1].T, [W, normal(F, D)], X), {"0": MATRIX, "1": OUT_IN}, None
    ),
    "a tuple in a list": Layout(
        Case(lambda p, x: x @ p[0][1] + p[0][0][None], [(normal(D), W)], X), {"0/0": OTHER, "0/1": MATRIX}, None
    ),
    "None leaves": Layout(
        Case(lambda p, x: dense({"kernel": p["a"]["kernel"]}, x), {"a": {"kernel": W, "bias": None}, "b": None}, X),
        {"a/kernel": MATRIX}, ("a/kernel",),
    ),
    "a dataclass with None": Layout(
        Case(lambda p, x: x @ p["pair"].kernel, {"pair": Pair(W)}, X), {"pair/kernel": MATRIX}, ("pair/kernel",)
    ),
    "an attribute called value": Layout(
        Case(lambda p, x: attend(p["attention"], x), {"attention": Attention(W, W, W)}, X),
        {"attention/query": MATRIX, "attention/key": MATRIX, "attention/value": MATRIX}, None,
    ),
    "an array beside a dataclass called value": Layout(
        Case(lambda p, x: p[0].query @ x.T + (x @ p[0].key + x @ p[0].value).T, [Attention(W, W, W)], X),
        {"0/query": OUT_IN, "0/key": MATRIX, "0/value": MATRIX}, None,
    ),
    "a key called value": Layout(
        Case(lambda p, x: x @ p["attention"]["value"]["kernel"] @ p["value"], {"attention": {"value": {"kernel": W}}, "value": W}, X),
        {"attention/value/kernel": MATRIX, "value": MATRIX}, ("attention/value/kernel",),
    ),
    "nn.Partitioned": partitioned(nn.with_partitioning),
    "nn.LogicallyPartitioned": partitioned(nn.with_logical_partitioning),
    "nnx.Variable": nnx_state(pure=False),
    "an NNX pure dict": nnx_state(pure=True),
}  # fmt: skip

# -- one weight, used in ways that contradict each other ---------------------------------------------------------------


def contradicting(path: str, shape: tuple[int, ...], fn: Callable[..., Any], x: tuple[int, ...], named: Any) -> Layout:
    return one(path, shape, fn, x, UNKNOWN, named)


CONTRADICTING = {
    "contracted by one axis, then by the other": contradicting(
        "w", (D, D, H), lambda w, x: jnp.einsum("bi,ijh->bjh", x, w) + jnp.einsum("bj,ijh->bih", x, w), (B, D), None
    ),
    "a stack, and a kernel of heads": contradicting(
        "q/kernel", (N, D, H), lambda w, x: jnp.einsum("bd,ndh->bnh", x, w) * (x @ w[0])[:, None], (B, D), "q/kernel"
    ),
    "heads as inputs, and one by one": contradicting(
        "w", (N, H, D), lambda w, x: jnp.einsum("bnh,nhd->bd", x, w) + x[:, 0] @ w[0], (B, N, H), None
    ),
    "a table of experts, and an input": contradicting(
        "w", (D, D, F), lambda w, x: jnp.einsum("bi,ijf->bjf", x, w)[:, 0] + x @ w[2], (B, D), None
    ),
    "a kernel of attention, used as a stack": contradicting(
        "attention/query/kernel", (D, N, H), lambda w, x: jnp.einsum("bd,dnh->bnh", x, w)[:, :, 0] + (x[:, :N] @ w[0])[:, :1],
        (B, D), "attention/query/kernel",
    ),
}  # fmt: skip

AGREEING = {**STORED_OUT_IN, **FUSED, **EXPERTS, **STACKED, **CONVS, **TABLES, **VECTORS, **KEYS}
LAYOUTS = {**AGREEING, **CONTRADICTING}

NOT_NAMED = (
    "apply: none of the leaves is a linear layer by Flax's conventions (a 'kernel'); pass sites=jlora.sites(fn, params, *args) "
    "to read them from the program. Leaves: "
)
AMBIGUOUS = (
    "{!r} of shape {} is ambiguous: its name and rank do not tell which axes are contracted; "
    "pass sites=jlora.sites(fn, params, *args), or leave it out with targets="
)
CONTRADICTION = (
    "{!r} of shape {} is ambiguous: the program uses its axes in ways that contradict each other (dot_general), "
    "or leave it out with targets="
)


def found(layout: Layout) -> tuple[jlora.Site, ...]:
    return jlora.sites(layout.case.fn, layout.case.params, *layout.case.args)


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def row(site: jlora.Site) -> Row:
    return site.kind, site.in_axes, site.out_axes, site.stack_axes


@pytest.mark.parametrize("name", LAYOUTS)
def test_sites_are_those_of_the_program(name):
    sites = found(LAYOUTS[name])
    assert {site.path: row(site) for site in sites} == dict(LAYOUTS[name].sites)
    assert [site.path for site in sites] == list(tree.leaves(LAYOUTS[name].case.params)[0])


# Rules that tests/test_lift_functions.py has no row for.
CLASSES = (
    "conv 2-D, depthwise",
    "conv, transposed, (out, in)",
    "conv, a kernel per place",
    "experts, ragged",
    "ALBERT by a scan",
    "integers and masks",  # its other leaves are read as numbers, which a row of shapes does not have
)


# Others have the same products over other axes, which `test_sites_are_those_of_the_program` has for each.
BY_VALUE = (
    *STORED_OUT_IN,
    "linen attention", "linen DenseGeneral, two inputs", "gemma mlp, bare arrays", "nnx gemma q_einsum", "T5X wi, fused",
    "five axes, two of them inputs",
    "experts, one of each token", "experts, one by one", "experts, vmapped", "experts of (out, in)", "linen experts, nn.vmap",
    "linen layers on axis 0", "layers (L, out, in)", "layers (in, L, out)", "layers of q (D, L, N, H)",
    "layers by a python loop on axis 1", "norms and biases (L, D)",
    "conv 2-D with bias", "conv 1-D, depthwise", "conv in groups", "conv, transposed", "conv of patches, no bias", "conv 3-D",
    "BiT's standardised kernel", "Equinox's conv, (out, in, h, w)",
    "tied head, weight", "one-hot look-up, tied", "positions that are added", "ALBERT by a fori_loop", "one weight, both ways",
    "a table of matrices, per layer",
    "RMSNorm's weight", "RMSNorm's scale, one vector", "a vector per layer that multiplies (LayerScale)", "CLIP's logit_scale ()",
    "dotted keys", "integer keys", "a bare array", "None leaves", "an attribute called value", "nn.LogicallyPartitioned",
    "nnx.Variable",
)  # fmt: skip
READ = "test_sites_are_those_of_the_program"


@pytest.mark.parametrize("name", thorough(others(AGREEING, CLASSES), READ, BY_VALUE))
def test_values_are_those_of_the_merged_weights(name):
    check_values(AGREEING[name].case)


@pytest.mark.parametrize("name", thorough(AGREEING, READ, CLASSES))
def test_agrees_with_the_merged_weights(name):
    check(AGREEING[name].case)


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_alone_are_right_or_refused(name):
    """The law: without sites, `apply` either refuses or has exactly the axes of the program."""
    layout = LAYOUTS[name]
    case, truth = layout.case, layout.sites
    refusal = ""
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            adapted = jlora.apply(case.params, rank=2)
    except ValueError as error:
        refusal = str(error)
    if not refusal:
        unread = [site.path for site in adapted.sites if truth[site.path] == OTHER]
        wrong = [
            (s.path, row(s)[1:]) for s in adapted.sites if s.path not in unread and row(s)[1:] != truth[s.path][1:]
        ]
        assert not wrong, f"silently wrong; the program has {[truth[path] for path, _ in wrong]}"
        assert tuple(site.path for site in adapted.sites) == layout.named
        named, _ = tree.leaves(case.params)
        known = lambda path: path.rpartition("/")[2] in ("kernel", "embedding", "bias", "scale")
        silent = [
            path for path, leaf in named.items() if np.ndim(leaf) > 1 and path not in layout.named and not known(path)
        ]
        assert all(any(repr(path) in str(warning.message) for warning in warned) for path in silent)
        if unread:
            with pytest.raises(
                ValueError, match=f"adapted weights are never read by .*: {', '.join(map(repr, unread))}"
            ):
                jlora.lift(case.fn)(adapted, *case.args)
        return
    assert "pass sites=jlora.sites(fn, params, *args)" in refusal
    if layout.named is None:
        assert refusal.startswith(NOT_NAMED)
        assert all(f"{path!r} " in refusal for path in list(layout.sites)[:12])
    else:
        leaves, _ = tree.leaves(case.params)
        path = layout.named
        if not isinstance(path, str):  # of what Flax's names do tell, a convolution without a bias is refused
            path = next(
                p for p in layout.named if leaves[p].ndim > 3 and f"{p.rpartition('kernel')[0]}bias" not in leaves
            )
        assert refusal == AMBIGUOUS.format(path, leaves[path].shape)


@pytest.mark.parametrize("name", CONTRADICTING)
def test_contradicting_uses_are_refused(name):
    case, (site,) = CONTRADICTING[name].case, found(CONTRADICTING[name])
    for targets in (None, site.path, lambda _: True):
        with pytest.raises(ValueError, match=exactly(CONTRADICTION.format(site.path, site.shape))):
            jlora.apply(case.params, rank=2, sites=(site,), targets=targets)


def test_what_contradicts_can_be_left_out():
    params = {"w": normal(N, D, H), "kernel": normal(D, F)}
    fn = lambda p, x: (jnp.einsum("bd,ndh->bnh", x, p["w"]) * (x @ p["w"][0])[:, None], x @ p["kernel"])
    check(Case(fn, params, (normal(B, D),)))
    sites = jlora.sites(fn, params, normal(B, D))
    assert [site.path for site in jlora.apply(params, 2, sites=sites, targets="kernel").sites] == ["kernel"]
    with pytest.raises(ValueError, match=r"^'w' of shape \(4, 20, 5\) is ambiguous: the program uses its axes"):
        jlora.apply(params, 2, sites=sites)


def test_a_refusal_lists_the_leaves():
    params = {"mlp": {"gating_einsum": normal(2, D, F), "linear": normal(F, D)}, "norm": {"scale": normal(D)}}
    leaves = "'mlp/gating_einsum' (2, 20, 24), 'mlp/linear' (24, 20), 'norm/scale' (20,)"
    with pytest.raises(ValueError, match=exactly(NOT_NAMED + leaves)):
        jlora.apply(params, 2)


@pytest.mark.parametrize(
    ("params", "path"),
    [({"a/b": W, "a": {"b": W}}, "a/b"), ({"a": [W], "a/0": W}, "a/0"), ({"a": {"": W}, "a/": W}, "a/")],
    ids=["nested", "list", "empty"],
)
def test_two_leaves_of_one_path_are_refused(params, path):
    for refuse in (lambda: jlora.apply(params, 2), lambda: jlora.sites(lambda p, x: x, params, X[0])):
        with pytest.raises(
            ValueError, match=exactly(f"two leaves of the tree have the path '{path}'; rename one of the keys")
        ):
            refuse()


# -- dtypes ------------------------------------------------------------------------------------------------------------


def mixed(p: Any, x: jax.Array) -> jax.Array:
    """Parameters of one dtype, products in bfloat16, norms in float32."""
    half = jnp.bfloat16
    h = rms_norm(x, p["norm"]["scale"].astype(jnp.float32)).astype(half)
    h = jnp.tanh(jnp.einsum("BTD,NDH->BTNH", h, p["q_einsum"]["w"].astype(half)))
    return jnp.einsum("BTNH,NHD->BTD", h, p["o"].astype(half)).astype(jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_parameters_and_products_may_differ_in_dtype(dtype):
    params = {"norm": {"scale": normal(D)}, "q_einsum": {"w": normal(N, D, H)}, "o": normal(N, H, D)}
    case = Case(mixed, jax.tree.map(lambda x: x.astype(dtype), params), (normal(B, T, D),))
    sites = {site.path: (row(site), site.dtype) for site in jlora.sites(mixed, case.params, *case.args)}
    assert sites == {
        "norm/scale": (OTHER, dtype.dtype.name),
        "o": (("linear", (0, 1), (2,), ()), dtype.dtype.name),
        "q_einsum/w": (("linear", (1,), (0, 2), ()), dtype.dtype.name),
    }
    adapted = adapt(case)
    assert {factor.dtype for factor in jax.tree.leaves(adapted.factors)} == {np.dtype("float32")}
    np.testing.assert_array_equal(
        jax.jit(jlora.lift(mixed))(adapted, *case.args), jax.jit(mixed)(case.params, *case.args)
    )
    adapted = randomised(adapted)
    # Two roundings to 8 bits on each side, of sums in another order: a few units of bfloat16's 2**-8.
    close(
        jlora.lift(mixed)(adapted, *case.args), mixed(merged_by_hand(case.params, adapted.factors), *case.args), 2**-5
    )
    check_uses(case, adapted)


# -- the table itself --------------------------------------------------------------------------------------------------


def test_the_table_has_every_rank_name_and_kind():
    rows = [(path, row, layout) for layout in LAYOUTS.values() for path, row in layout.sites.items()]
    ndims = {len(row[1] + row[2] + row[3]) for _, row, _ in rows}
    names = {path.rsplit("/", 1)[-1] for path, _, _ in rows}
    assert {row[0] for _, row, _ in rows} == {"linear", "conv", "embedding", "unknown", "other"}
    assert ndims == {0, 2, 3, 4, 5}
    assert names >= {
        "kernel",
        "w",
        "weight",
        "embedding",
        "input_embedding",
        "embeddings",
        "linear",
        "gate_proj",
        "",
        "0",
    }
    assert {row[3] for _, row, _ in rows} == {(), (0,), (1,), (2,), (0, 1)}
    adapted = [name for name, layout in LAYOUTS.items() if isinstance(layout.named, tuple)]
    assert len(LAYOUTS) >= 100 and len(adapted) >= 30
