"""GPT-2 in Flax linen: a decoder with pre-norm blocks, learned positions and a head tied to the embedding.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; names of the parts and initial
values as in the released code, https://github.com/openai/gpt-2. GPT-3's shape: Brown et al., arXiv 2005.14165, table
2.1; its locally banded sparse layers are dense here.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models import cache as kv
from jlora.models import fields, placed
from jlora.models.architecture import Head, check_head
from jlora.models.attention import DotProductAttention, Implementation
from jlora.models.cache import Cache, Context, KeyValue
from jlora.models.heads import check_labels, last_token, tied_losses
from jlora.models.layers import dense, embed, norm, residual_std
from jlora.models.nonlinear import NONLINEARITIES, Nonlinearity
from jlora.models.stack import check_remat, stack

HEADS: tuple[Head, ...] = ("none", "causal_lm", "sequence_classification", "token_classification")


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2. The default is the released "small" model; see `PRESETS` for the others.

    Attributes:
      vocab_size: number of tokens; 256 for a model of bytes.
      context: the longest sequence, in tokens.
      width: features of the residual stream, a multiple of `heads`.
      layers, heads: blocks, and attention heads in each.
      hidden: features between the two layers of each MLP; 4 * `width` when None.
      nonlinearity: of the MLPs, a name in `jlora.models.nonlinear`.
      epsilon: added to the variance in the norms.
      head: "none", "causal_lm", "sequence_classification" (of the last token) or "token_classification".
      labels: of a classification.
      dropout: of the embeddings, the attention weights and both residual branches, in [0, 1).
      dtype, param_dtype: of the computation and of the parameters. Scores and softmax are float32 in any case.
      scan: one block scanned over parameters stacked on axis 0, in place of `layers` blocks: compiles faster.
      remat: compute each block's activations again in the backward pass; True, or the name of a policy in
        `jax.checkpoint_policies`.
      attention: the kernel, "auto", "xla" or "cudnn"; see `jlora.models.attention.DotProductAttention`.
    """

    vocab_size: fields.Rows = 50257
    context: fields.Rows = 1024
    width: fields.Features = 768
    layers: fields.Layers = 12
    heads: fields.Heads = 12
    hidden: fields.OptionalFeatures = None
    nonlinearity: Nonlinearity = "gelu_new"
    epsilon: fields.Epsilon = 1e-5
    head: Head = "causal_lm"
    labels: fields.Labels = 2
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
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(width=1024, layers=24, heads=16),
    "gpt2-large": GPT2Config(width=1280, layers=36, heads=20),
    "gpt2-xl": GPT2Config(width=1600, layers=48, heads=25),
    "gpt3-175b": GPT2Config(context=2048, width=12288, layers=96, heads=96, scan=True),
}


class GPT2(nn.Module):
    """tokens (batch, length) -> float32 logits (batch, length, vocab_size), or what `config.head` says.

    "none" gives the last norm's (batch, length, width), "sequence_classification" (batch, labels) and
    "token_classification" (batch, length, labels).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = GPT2(GPT2Config(vocab_size=256, context=32, width=64, layers=2, heads=4))
      >>> tokens = jnp.zeros((1, 8), jnp.int32)
      >>> params = model.init(jax.random.key(0), tokens)["params"]
      >>> model.apply({"params": params}, tokens).shape
      (1, 8, 256)
    """

    config: GPT2Config

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        last: bool = False,
        labels: jax.Array | None = None,
        smoothing: float = 0.0,
        deterministic: bool = True,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """See the class.

        Args:
          tokens: (batch, length), int32.
          mask: (batch, length), False at padding; None for no padding. (batch, length, length) says it of each pair of
            tokens, as where several texts share a row.
          positions: (batch, length), int32; 0, 1, ... when None.
          cache: from `empty_cache`, or of the call before. It is returned with the tokens of this call, after the
            output; `positions` must then be given. A cache that is too small raises, and under jit gives NaN.
          last: the output of the last token alone, (batch, 1, ...), in place of all.
          labels: the id that follows each token, (batch, length), of a causal LM: its output are the losses, (batch,
            length), in nats, and the logits are never there all at once. See `jlora.models.losses`.
          smoothing: of the labels.
          deterministic: no dropout.
        """
        c = self.config
        check_labels(labels, c.head)
        length = tokens.shape[1]
        if length > c.context:
            raise ValueError(f"the sequence has {length} tokens, the model's context is {c.context}")
        if cache is not None and positions is None:
            raise ValueError("a call with a cache needs positions=: those of its tokens, (batch, length)")
        wte = embed(c, c.vocab_size, "wte")
        wpe = embed(c, c.context, "wpe", std=0.01)
        places = wpe(jnp.arange(length))[None] if positions is None else wpe(positions)
        h = wte(tokens) + places  # (batch, length, width)
        h = placed.Dropout(c.dropout, deterministic=deterministic)(h)
        context, cache = kv.opened(cache, mask, tokens)
        h, layers = stack(Block, c, h, cache and cache.layers, context, deterministic=deterministic)
        if last:
            h = h[:, -1:]
        h = norm(c, "ln_f")(h)  # (batch, length, width)
        if labels is not None:
            h = tied_losses(wte, h, labels, smoothing)  # (batch, length)
        elif c.head == "causal_lm":
            h = wte.attend(h)  # (batch, length, vocab_size)
        elif c.head == "sequence_classification":
            h = dense(c, c.labels, "score", bias=False)(last_token(h, None if last else mask))  # (batch, labels)
        elif c.head == "token_classification":
            h = placed.Dropout(c.dropout, deterministic=deterministic)(h)
            h = dense(c, c.labels, "classifier")(h)  # (batch, length, labels)
        h = placed.output(h)
        return h if cache is None else (kv.within(cache, h), cache._replace(layers=layers))

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for sequences of up to `slots` tokens, padding among them."""
        c = self.config
        return kv.empty(
            batch=batch, slots=slots, layers=c.layers, heads=c.heads, width=c.width // c.heads,
            dtype=c.dtype, stacked=c.scan,
        )  # fmt: skip


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)). Takes and returns what its layer has cached."""

    config: GPT2Config
    deterministic: bool

    @nn.compact
    def __call__(self, h: jax.Array, cached: KeyValue | None, context: Context) -> tuple[jax.Array, KeyValue | None]:
        c = self.config
        y, cached = Attention(c, self.deterministic, name="attn")(norm(c, "ln_1")(h), cached, context)
        h = placed.added(h, y)
        h = placed.added(h, MLP(c, self.deterministic, name="mlp")(norm(c, "ln_2")(h)))
        return h, cached


class Attention(nn.Module):
    """Causal self-attention. Query, key and value have a kernel each: GPT-2's fused one, cut in three."""

    config: GPT2Config
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, cached: KeyValue | None, context: Context) -> tuple[jax.Array, KeyValue | None]:
        c = self.config
        batch, length, width = x.shape
        q, k, v = (
            placed.in_heads(dense(c, width, name)(x), c.heads)  # (batch, length, heads, width / heads)
            for name in ("query", "key", "value")
        )
        new = kv.write(cached, context.start, k, v)
        causal = cached is None  # otherwise the mask says it
        attend = DotProductAttention(
            causal=causal, dropout=c.dropout, deterministic=self.deterministic, implementation=c.attention, name="core"
        )
        y = attend(q, new.key, new.value, context.mask).reshape(batch, length, width)
        y = placed.Dropout(c.dropout, deterministic=self.deterministic)(
            dense(c, width, "out", std=residual_std(c.layers))(y)
        )
        return y, None if cached is None else new


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them."""

    config: GPT2Config
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = NONLINEARITIES[c.nonlinearity](dense(c, c.hidden or 4 * c.width, "fc")(x))  # (batch, length, hidden)
        x = dense(c, c.width, "proj", std=residual_std(c.layers))(x)  # (batch, length, width)
        return placed.Dropout(c.dropout, deterministic=self.deterministic)(x)
