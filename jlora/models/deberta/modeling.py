"""DeBERTa v2 and v3 in Flax linen: a post-norm encoder whose attention sees contents and relative positions apart.

Source: He et al., "DeBERTa: Decoding-enhanced BERT with Disentangled Attention", arXiv 2006.03654, and "DeBERTaV3",
arXiv 2111.09543; what the second version changed (buckets, shared kernels, the convolution) as in the released code,
https://github.com/microsoft/DeBERTa, and in Hugging Face's `DebertaV2Model`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models import fields, placed
from jlora.models.architecture import Head, check_head
from jlora.models.attention import DotProductAttention, Implementation
from jlora.models.deberta.relative import Rows, rows
from jlora.models.layers import dense, embed, norm
from jlora.models.nonlinear import NONLINEARITIES, Nonlinearity
from jlora.models.stack import check_remat, stack

HEADS: tuple[Head, ...] = ("none", "masked_lm", "sequence_classification", "token_classification")
Term = Literal["c2p", "p2c"]
Distance = Annotated[int, fields.Whole(-1, 2**24)]


@dataclass(frozen=True)
class DebertaConfig:
    """The shape of a DeBERTa. The default is v3's "base" model; see `PRESETS` for the others.

    Attributes:
      vocab_size: number of tokens.
      context: the longest sequence, in tokens.
      width: features of the residual stream, a multiple of `heads`.
      layers, heads: blocks, and attention heads in each.
      hidden: features between the two layers of each MLP.
      types: kinds of segments that a token may belong to; 0 for none.
      absolute: positions are added to the embeddings too.
      terms: of the scores, beside content to content: "c2p", content to position, and "p2c", position to content.
      shared: positions have the queries' and keys' kernels, and none of their own.
      buckets: of relative positions in each direction; 0 or -1 for a row for each distance.
      reach: the longest distance that is told from those beyond; `context` when 0 or -1.
      norm_positions: the table of relative positions is normalised.
      convolution: tokens that a convolution beside the first block sees at once, an odd number; 0 for none.
      nonlinearity, conv_nonlinearity, pooler_nonlinearity: of the MLPs and the masked LM, of the convolution, and of
        the first token before a classifier; names in `jlora.models.nonlinear`.
      epsilon: added to the variance in the norms.
      head: "none", "masked_lm", "sequence_classification" (of the first token) or "token_classification".
      labels: of a classification; 1 for a regression.
      legacy: which keys the masked LM's head has in a checkpoint. False for "lm_predictions", as published by the
        authors; True for "cls.predictions".
      dropout: of the embeddings, the relative positions, the attention weights, both residual branches and the
        convolution, in [0, 1).
      head_dropout: before the classifier; `dropout` when None.
      dtype, param_dtype: of the computation and of the parameters. Scores and softmax are float32 in any case.
      scan: one block scanned over parameters stacked on axis 0, in place of `layers` blocks: compiles faster.
      remat: compute each block's activations again in the backward pass; True, or the name of a policy in
        `jax.checkpoint_policies`.
      attention: the kernel, "auto", "xla" or "cudnn"; see `jlora.models.attention.DotProductAttention`.
    """

    vocab_size: fields.Rows = 128100
    context: fields.Rows = 512
    width: fields.Features = 768
    layers: fields.Layers = 12
    heads: fields.Heads = 12
    hidden: fields.Features = 3072
    types: Annotated[int, fields.Whole(0, 2**24)] = 0
    absolute: bool = False
    terms: tuple[Term, ...] = ("p2c", "c2p")
    shared: bool = True
    buckets: Distance = 256
    reach: Distance = -1
    norm_positions: bool = True
    convolution: Annotated[int, fields.Whole(0, 2**10)] = 0
    nonlinearity: Nonlinearity = "gelu"
    conv_nonlinearity: Nonlinearity = "tanh"
    pooler_nonlinearity: Nonlinearity = "gelu"
    epsilon: fields.Epsilon = 1e-7
    head: Head = "masked_lm"
    labels: fields.Labels = 2
    legacy: bool = True
    dropout: fields.Dropout = 0.0
    head_dropout: fields.OptionalDropout = None
    dtype: fields.Dtype = "float32"
    param_dtype: fields.Dtype = "float32"
    scan: bool = False
    remat: bool | str = False
    attention: Implementation = "auto"

    def __post_init__(self) -> None:
        fields.check_fields(self)
        fields.check_multiple(self, "width", "heads")
        if self.terms not in (("c2p",), ("p2c",), ("c2p", "p2c"), ("p2c", "c2p")):
            raise fields.FieldError(f"terms={fields.shown(self.terms)} are not 'c2p', 'p2c' or both", "terms")
        if self.convolution and self.convolution % 2 == 0:
            raise fields.FieldError(f"convolution={self.convolution} is not odd, nor 0 for none", "convolution")
        if self.buckets == 1 or (self.buckets > 0 and self.farthest - 1 in (0, self.buckets // 2)):
            # no logarithm of a ratio of 0 or 1 divides distances into steps
            message = f"buckets={self.buckets} cannot share out distances up to {self.farthest}"
            raise fields.FieldError(message, "buckets", "reach", "context")
        check_head(self.head, HEADS)
        check_remat(self.remat)

    @property
    def span(self) -> int:
        """Half the rows of the table of relative positions."""
        return self.buckets if self.buckets > 0 else self.farthest

    @property
    def farthest(self) -> int:
        """`reach`, or what stands for it."""
        return self.reach if self.reach > 0 else self.context


PRESETS = {
    "deberta-v3-base": DebertaConfig(),
    "deberta-v3-large": DebertaConfig(width=1024, layers=24, heads=16, hidden=4096),
    "deberta-v2-xlarge": DebertaConfig(
        width=1536, layers=24, heads=24, hidden=6144, convolution=3, conv_nonlinearity="gelu"
    ),
    "deberta-v2-xxlarge": DebertaConfig(
        width=1536, layers=48, heads=24, hidden=6144, convolution=3, conv_nonlinearity="gelu"
    ),
}


class Deberta(nn.Module):
    """tokens (batch, length) -> float32 logits (batch, length, vocab_size), or what `config.head` says.

    "none" gives the last block's (batch, length, width), "sequence_classification" (batch, labels), of the first
    token, so that padding has to follow, and "token_classification" (batch, length, labels).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = DebertaConfig(vocab_size=64, context=32, width=16, layers=2, heads=2, hidden=32, buckets=8)
      >>> tokens = jnp.zeros((1, 8), jnp.int32)
      >>> params = Deberta(config).init(jax.random.key(0), tokens)["params"]
      >>> Deberta(config).apply({"params": params}, tokens).shape
      (1, 8, 64)
    """

    config: DebertaConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        types: jax.Array | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """See the class.

        Args:
          tokens: (batch, length), int32.
          mask: (batch, length), False at padding; None for no padding.
          types: (batch, length), int32: the segment of each token; 0 when None. Most models have none, and do not look.
          positions: (batch, length), int32; 0, 1, ... when None. For models with absolute positions.
          deterministic: no dropout.

        Raises:
          ValueError: for sequences longer than the context, and for positions that the model does not have.
        """
        c = self.config
        wte = embed(c, c.vocab_size, "wte")
        h = _embedded(c, wte, tokens, types, positions)  # (batch, length, width)
        h = h if mask is None else h * mask[:, :, None].astype(h.dtype)  # the convolution sees padding
        h = placed.Dropout(c.dropout, deterministic=deterministic)(h)
        found = rows(tokens.shape[1], c.span, buckets=c.buckets, reach=c.farthest)
        local = Convolution(c, deterministic, name="conv")(h) if c.convolution else None
        seen = None if mask is None else mask[:, None, None, :].astype(bool)
        shared = Shared(seen, _places(c, found), jnp.asarray(found.pairs), local)
        h, _ = stack(Block, c, h, _first(c), shared, deterministic=deterministic)
        if c.head == "masked_lm":
            h = MaskedLM(c, name="lm_head")(h, wte)  # (batch, length, vocab_size)
        elif c.head == "sequence_classification":
            h = NONLINEARITIES[c.pooler_nonlinearity](dense(c, c.width, "pooler")(placed.token(h, 0)))  # (batch, width)
            rate = c.dropout if c.head_dropout is None else c.head_dropout
            h = placed.Dropout(rate, deterministic=deterministic)(h)
            h = dense(c, c.labels, "classifier")(h)  # (batch, labels)
        elif c.head == "token_classification":
            h = placed.Dropout(c.dropout, deterministic=deterministic)(h)
            h = dense(c, c.labels, "classifier")(h)  # (batch, length, labels)
        return placed.output(h)


class Local(NamedTuple):
    """Output of the convolution, added after the first block, and the parameters of the norm of that sum."""

    out: jax.Array  # (batch, length, width)
    scale: jax.Array  # (width,)
    bias: jax.Array  # (width,)


class Shared(NamedTuple):
    """Inputs of one call that all layers share.

    Attributes:
      seen: (batch, 1, 1, length), bool, False at padding; None for no padding.
      places: (rows, width): the relative positions that occur, as vectors.
      pairs: (length, length), int32: which of them each query and key have.
      local: for the first block alone; None without a convolution.
    """

    seen: jax.Array | None
    places: jax.Array
    pairs: jax.Array
    local: Local | None


class Block(nn.Module):
    """norm(h + attention(h)), then norm(h + mlp(h)); after the first block, norm(h + convolution)."""

    config: DebertaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, h: jax.Array, first: jax.Array | None, shared: Shared) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        h = norm(c, "ln_1")(placed.added(h, Attention(c, self.deterministic, name="attn")(h, shared)))
        h = norm(c, "ln_2")(placed.added(h, MLP(c, self.deterministic, name="mlp")(h)))
        if first is not None and shared.local is not None:
            out, scale, bias = shared.local
            y = placed.LayerNorm(c.epsilon, dtype=c.dtype, use_scale=False, use_bias=False)(h + out)
            h = jnp.where(first, y * scale[None, None] + bias[None, None], h)
        return h, first


class Attention(nn.Module):
    """Disentangled self-attention: every token sees every token that is no padding, and how far away it is.

    The scores are `scale (q_i k_j + q_i k'_{ij} + k_j q'_{ij})`, where k' and q' are keys and queries of the relative
    position of i and j, and scale is 1 / sqrt(width of a head * number of terms).

    k' and q' are made of the R rows of the table that occur, at most 2 * length - 1 and at most 2 * span: for each term
    a product costs length * R * width multiplications, as q k^T does for R keys, and holds (batch, heads, length, R)
    numbers in float32, out of which a gather takes (batch, heads, length, length).
    """

    config: DebertaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, shared: Shared) -> jax.Array:
        c = self.config
        layers = {name: dense(c, c.width, name) for name in ("query", "key", "value")}
        q, k, v = (
            placed.in_heads(layer(x), c.heads) for layer in layers.values()
        )  # (batch, length, heads, width / heads)
        k, v = placed.whole_along(k, 1), placed.whole_along(v, 1)
        places = placed.Dropout(c.dropout, deterministic=self.deterministic)(shared.places)  # (rows, width)
        scale = 1 / math.sqrt(c.width // c.heads * (1 + len(c.terms)))
        bias = jnp.zeros((), jnp.float32)
        if "c2p" in c.terms:
            layer = layers["key"] if c.shared else dense(c, c.width, "pos_key")
            products = _products(
                "bihd,rhd->bhir", q, placed.in_heads(placed.clear(layer(places), x), c.heads)
            )  # (batch, heads, length, rows)
            bias = bias + _taken(products, shared.pairs, 3)  # (batch, heads, length, length)
        if "p2c" in c.terms:
            layer = layers["query"] if c.shared else dense(c, c.width, "pos_query")
            products = _products(
                "bjhd,rhd->bhrj", k, placed.in_heads(placed.clear(layer(places), x), c.heads)
            )  # (batch, heads, rows, length)
            bias = bias + _taken(products, shared.pairs, 2)  # (batch, heads, length, length)
        attend = DotProductAttention(
            scale=scale, dropout=c.dropout, deterministic=self.deterministic, implementation=c.attention, name="core"
        )
        y = dense(c, c.width, "out")(attend(q, k, v, shared.seen, scale * bias).reshape(x.shape))
        return placed.Dropout(c.dropout, deterministic=self.deterministic)(y)


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them."""

    config: DebertaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = NONLINEARITIES[c.nonlinearity](dense(c, c.hidden, "fc")(x))  # (batch, length, hidden)
        x = dense(c, c.width, "proj")(x)  # (batch, length, width)
        return placed.Dropout(c.dropout, deterministic=self.deterministic)(x)


class Convolution(nn.Module):
    """A convolution of the embeddings along the sequence, padding and what lies outside being 0."""

    config: DebertaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, h: jax.Array) -> Local:
        c = self.config
        init = nn.initializers.normal(0.02)
        conv = placed.Conv(
            c.width, (c.convolution,), dtype=c.dtype, param_dtype=c.param_dtype, kernel_init=init, name="conv"
        )
        y = placed.Dropout(c.dropout, deterministic=self.deterministic)(conv(h))  # (batch, length, width)
        y = NONLINEARITIES[c.conv_nonlinearity](y)
        return Local(y, *NormParameters(c, name="ln")())


class NormParameters(nn.Module):
    """The scale and the bias of a norm that is computed elsewhere: within a scan over blocks, only of the first."""

    config: DebertaConfig

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        c = self.config
        scale = self.param("scale", nn.initializers.ones, (c.width,), c.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (c.width,), c.param_dtype)
        return placed.whole(scale).astype(c.dtype), placed.whole(bias).astype(c.dtype)


class MaskedLM(nn.Module):
    """A linear layer, a norm, and the embedding as the decoder, with a bias of its own."""

    config: DebertaConfig

    @nn.compact
    def __call__(self, h: jax.Array, wte: placed.Embed) -> jax.Array:
        c = self.config
        h = NONLINEARITIES[c.nonlinearity](dense(c, c.width, "dense")(h))
        h = wte.attend(norm(c, "ln")(h))  # (batch, length, vocab_size)
        bias = placed.whole(self.param("bias", nn.initializers.zeros, (c.vocab_size,), c.param_dtype))
        return h + bias.astype(h.dtype)[None, None]


# -- called within the compact method of a model -----------------------------------------------------------------------


def _embedded(
    c: DebertaConfig, wte: placed.Embed, tokens: jax.Array, types: jax.Array | None, positions: jax.Array | None
) -> jax.Array:
    """The norm of the sum of the embeddings, (batch, length, width)."""
    length = tokens.shape[1]
    if length > c.context:
        raise ValueError(f"the sequence has {length} tokens, the model's context is {c.context}")
    if positions is not None and not c.absolute:
        raise ValueError("the model has no absolute positions: call it without positions=")
    h = wte(tokens)
    if c.absolute:
        h = h + embed(c, c.context, "wpe")(jnp.arange(length)[None] if positions is None else positions)
    if c.types:
        h = h + embed(c, c.types, "wtt")(jnp.zeros_like(tokens) if types is None else types)
    return norm(c, "ln_e")(h)


def _places(c: DebertaConfig, found: Rows) -> jax.Array:
    """The relative positions that occur, as vectors: (rows, width)."""
    places = embed(c, 2 * c.span, "wre")(jnp.arange(found.start, found.stop))
    return norm(c, "ln_r")(places) if c.norm_positions else places


def _first(c: DebertaConfig) -> jax.Array | tuple[jax.Array | None, ...] | None:
    """The first block's mark, in the form that `stack` takes; None where being the first changes nothing."""
    if not c.convolution:
        return None
    return jnp.arange(c.layers) == 0 if c.scan else (jnp.ones((), bool), *(None for _ in range(c.layers - 1)))


def _products(spec: str, x: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, places, preferred_element_type=jnp.float32)


def _taken(products: jax.Array, pairs: jax.Array, axis: int) -> jax.Array:
    return placed.taken(products, pairs[None, None], axis, mode="promise_in_bounds")
