"""BERT in Flax linen: an encoder with post-norm blocks, learned positions and types, and the heads on it.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", arXiv
1810.04805. MiniLM: Wang et al., arXiv 2002.10957.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models import fields, placed
from jlora.models.architecture import Head, check_head
from jlora.models.attention import DotProductAttention, Implementation
from jlora.models.layers import dense, embed, norm
from jlora.models.nonlinear import NONLINEARITIES, Nonlinearity
from jlora.models.stack import check_remat, stack

HEADS: tuple[Head, ...] = ("none", "masked_lm", "sequence_classification", "token_classification")


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT. The default is the "base" model without cases; see `PRESETS` for the others.

    Attributes:
      vocab_size: number of tokens.
      context: the longest sequence, in tokens.
      width: features of the residual stream, a multiple of `heads`.
      layers, heads: blocks, and attention heads in each.
      hidden: features between the two layers of each MLP.
      types: kinds of segments that a token may belong to.
      nonlinearity: of the MLPs, a name in `jlora.models.nonlinear`.
      epsilon: added to the variance in the norms.
      head: "none", "masked_lm", "sequence_classification" or "token_classification".
      labels: of a classification; 1 for a regression.
      pooler: without a head: also give what the pooler makes of the first token, as "pooled" beside "out".
      dropout: of the embeddings, the attention weights, both residual branches and before the classifier, in [0, 1).
      dtype, param_dtype: of the computation and of the parameters. Scores and softmax are float32 in any case.
      scan: one block scanned over parameters stacked on axis 0, in place of `layers` blocks: compiles faster.
      remat: compute each block's activations again in the backward pass; True, or the name of a policy in
        `jax.checkpoint_policies`.
      attention: the kernel, "auto", "xla" or "cudnn"; see `jlora.models.attention.DotProductAttention`.
    """

    vocab_size: fields.Rows = 30522
    context: fields.Rows = 512
    width: fields.Features = 768
    layers: fields.Layers = 12
    heads: fields.Heads = 12
    hidden: fields.Features = 3072
    types: fields.Features = 2
    nonlinearity: Nonlinearity = "gelu"
    epsilon: fields.Epsilon = 1e-12
    head: Head = "masked_lm"
    labels: fields.Labels = 2
    pooler: bool = False
    dropout: fields.Dropout = 0.0
    dtype: fields.Dtype = "float32"
    param_dtype: fields.Dtype = "float32"
    scan: bool = False
    remat: bool | str = False
    attention: Implementation = "auto"

    def __post_init__(self) -> None:
        fields.check_fields(self)
        fields.check_multiple(self, "width", "heads")
        check_head(self.head, HEADS)
        check_remat(self.remat)


PRESETS = {
    "bert-base": BertConfig(),
    "bert-large": BertConfig(width=1024, layers=24, heads=16, hidden=4096),
    "minilm-l6-h384": BertConfig(width=384, layers=6, hidden=1536, head="none"),
}


class Bert(nn.Module):
    """tokens (batch, length) -> float32 logits (batch, length, vocab_size), or what `config.head` says.

    "none" gives the last block's (batch, length, width), "sequence_classification" (batch, labels) and
    "token_classification" (batch, length, labels). With `config.pooler`, "none" gives {"out": the same, "pooled":
    (batch, width)}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = BertConfig(vocab_size=64, context=32, width=16, layers=2, heads=2, hidden=32)
      >>> tokens = jnp.zeros((1, 8), jnp.int32)
      >>> params = Bert(config).init(jax.random.key(0), tokens)["params"]
      >>> Bert(config).apply({"params": params}, tokens).shape
      (1, 8, 64)
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        types: jax.Array | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array | dict[str, jax.Array]:
        """See the class.

        Args:
          tokens: (batch, length), int32.
          mask: (batch, length), False at padding; None for no padding.
          types: (batch, length), int32: the segment of each token; 0 when None.
          positions: (batch, length), int32; 0, 1, ... when None.
          deterministic: no dropout.
        """
        c = self.config
        places = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        wte = embed(c, c.vocab_size, "wte")
        h = embedded(c, wte, tokens, types, embed(c, c.context, "wpe")(places))  # (batch, length, width)
        h = encoded(c, h, mask, deterministic)
        if c.head == "masked_lm":
            h = MaskedLM(c, c.nonlinearity, name="lm_head")(h, wte)  # (batch, length, vocab_size)
        elif c.head == "sequence_classification":
            h = placed.Dropout(c.dropout, deterministic=deterministic)(pooled(c, h))
            h = dense(c, c.labels, "classifier")(h)  # (batch, labels)
        elif c.head == "token_classification":
            h = placed.Dropout(c.dropout, deterministic=deterministic)(h)
            h = dense(c, c.labels, "classifier")(h)  # (batch, length, labels)
        elif c.pooler:
            return {"out": h.astype(jnp.float32), "pooled": pooled(c, h).astype(jnp.float32)}
        return placed.output(h)


class Block(nn.Module):
    """norm(h + attention(h)), then norm(h + mlp(h))."""

    queries: ClassVar[int | None] = None  # number of leading tokens to compute; None for all
    config: BertConfig
    deterministic: bool

    @nn.compact
    def __call__(self, h: jax.Array, each: None, mask: jax.Array | None) -> tuple[jax.Array, None]:
        c = self.config
        queries = h[:, : self.queries]
        h = norm(c, "ln_1")(placed.added(queries, Attention(c, self.deterministic, name="attn")(queries, h, mask)))
        h = norm(c, "ln_2")(placed.added(h, MLP(c, self.deterministic, name="mlp")(h)))
        return h, each


class FirstToken(Block):
    """A block whose output has the first token alone: (batch, length, width) -> (batch, 1, width)."""

    queries = 1


class Attention(nn.Module):
    """Attention to every token that is no padding: (batch, queries, width), (batch, length, width) -> the first."""

    config: BertConfig
    deterministic: bool

    @nn.compact
    def __call__(self, queries: jax.Array, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        c = self.config
        q, k, v = (
            placed.in_heads(dense(c, c.width, name)(of), c.heads)  # (batch, length, heads, width / heads)
            for name, of in (("query", queries), ("key", x), ("value", x))
        )
        attend = DotProductAttention(
            dropout=c.dropout, deterministic=self.deterministic, implementation=c.attention, name="core"
        )
        y = dense(c, c.width, "out")(attend(q, k, v, mask).reshape(queries.shape))
        return placed.Dropout(c.dropout, deterministic=self.deterministic)(y)


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them."""

    config: BertConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = NONLINEARITIES[c.nonlinearity](dense(c, c.hidden, "fc")(x))  # (batch, length, hidden)
        x = dense(c, c.width, "proj")(x)  # (batch, length, width)
        return placed.Dropout(c.dropout, deterministic=self.deterministic)(x)


class MaskedLM(nn.Module):
    """A linear layer, a norm, and the embedding as the decoder, with a bias of its own."""

    config: BertConfig
    nonlinearity: str

    @nn.compact
    def __call__(self, h: jax.Array, wte: placed.Embed) -> jax.Array:
        c = self.config
        h = NONLINEARITIES[self.nonlinearity](dense(c, c.width, "dense")(h))
        h = wte.attend(norm(c, "ln")(h))  # (batch, length, vocab_size)
        bias = placed.whole(self.param("bias", nn.initializers.zeros, (c.vocab_size,), c.param_dtype))
        return h + bias.astype(h.dtype)[None, None]


# -- called within the compact method of a model -----------------------------------------------------------------------


def embedded(
    config: BertConfig, wte: placed.Embed, tokens: jax.Array, types: jax.Array | None, places: jax.Array
) -> jax.Array:
    """The sum of the embeddings of tokens, types and places, (batch, length, width)."""
    length = tokens.shape[1]
    if length > config.context:
        raise ValueError(f"the sequence has {length} tokens, the model's context is {config.context}")
    wtt = embed(config, config.types, "wtt")
    return wte(tokens) + places + wtt(jnp.zeros_like(tokens) if types is None else types)


def encoded(config: BertConfig, h: jax.Array, mask: jax.Array | None, deterministic: bool) -> jax.Array:
    """The last block's output, from the sum of the embeddings: (batch, length, width) both.

    Who labels the whole sequence reads the first token: of its last block the others are not computed, a twelfth of
    BERT-base's work. The output is (batch, 1, width) then, but of a scan.
    """
    h = placed.Dropout(config.dropout, deterministic=deterministic)(norm(config, "ln_e")(h))
    seen = None if mask is None else mask[:, None, None, :].astype(bool)  # (batch, 1, 1, length)
    last = FirstToken if config.head == "sequence_classification" else None
    h, _ = stack(Block, config, h, None, seen, deterministic=deterministic, last=last)
    return h


def pooled(config: BertConfig, h: jax.Array) -> jax.Array:
    """A linear layer of the first token: (batch, length, width) -> (batch, width)."""
    return jnp.tanh(dense(config, config.width, "pooler")(placed.token(h, 0)))
