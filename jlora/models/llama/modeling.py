"""Llama, Mistral and Qwen 2 and 3 in Flax linen: one decoder with RMS norms, rotary positions and gated MLPs.

What they differ in are biases, a norm of queries and keys, and which layers see a window only: fields of the config.

Sources: Touvron et al., "LLaMA", arXiv 2302.13971, and "Llama 2", 2307.09288; Llama team, "The Llama 3 Herd of Models",
2407.21783; Jiang et al., "Mistral 7B", 2310.06825; Qwen team, "Qwen2.5", 2412.15115, and "Qwen3", 2505.09388. Where
they leave something open, transformers 5.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models import cache as kv
from jlora.models import fields, placed
from jlora.models.architecture import Head, check_head
from jlora.models.attention import DotProductAttention, Implementation, causal_mask
from jlora.models.cache import Cache, Context, KeyValue
from jlora.models.heads import check_labels, last_token, losses_of, tied_losses
from jlora.models.layers import dense, residual_std
from jlora.models.llama.rope import Default, Dynamic, Llama3, Rope, Turn, turn, turned
from jlora.models.nonlinear import NONLINEARITIES, Nonlinearity
from jlora.models.stack import check_remat, stack

HEADS: tuple[Head, ...] = ("none", "causal_lm", "sequence_classification", "token_classification")
Family = Literal["llama", "mistral", "qwen2", "qwen3"]
_PLAIN = Default()


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama. The default is Llama 2 7B; see `PRESETS` for others.

    Attributes:
      family: the model_type under which the model is saved. What a family cannot say of itself is an error there.
      vocab_size: number of tokens.
      context: the longest sequence in training, in tokens. Some `rope`s go beyond it.
      width: features of the residual stream.
      layers, heads: blocks, and query heads in each.
      key_heads: heads of keys and values, a divisor of `heads`; None for as many.
      head_width: features of each head, even; width / heads when None.
      hidden: features within each MLP.
      nonlinearity: of the MLPs' gates, a name in `jlora.models.nonlinear`.
      epsilon: added to the mean square in the norms.
      rope: see `jlora.models.llama.rope`.
      qkv_bias, out_bias, mlp_bias: biases of the attention's three inputs, of its output, and of the MLP.
      qk_norm: RMS norms of each head's queries and keys, before they are turned.
      window: a query sees so many keys, its own the last of them; None for all.
      sliding: of each layer, whether it has the window; None for all layers.
      tied: the head of a causal LM is the embedding.
      head: "none", "causal_lm", "sequence_classification" (of the last token) or "token_classification".
      labels: of a classification.
      dropout: of the embeddings, the attention weights and both residual branches, in [0, 1).
      dtype, param_dtype: of the computation and of the parameters. Norms, rotations, scores and softmax are float32 in
        any case.
      scan: one block scanned over parameters stacked on axis 0, in place of `layers` blocks: compiles faster.
      remat: compute each block's activations again in the backward pass; True, or the name of a policy in
        `jax.checkpoint_policies`.
      attention: the kernel, "auto", "xla" or "cudnn"; see `jlora.models.attention.DotProductAttention`.
    """

    family: Family = "llama"
    vocab_size: fields.Rows = 32000
    context: fields.Rows = 4096
    width: fields.Features = 4096
    layers: fields.Layers = 32
    heads: fields.Heads = 32
    key_heads: fields.OptionalHeads = None
    head_width: Annotated[int | None, fields.Whole(2, 2**12)] = None
    hidden: fields.Features = 11008
    nonlinearity: Nonlinearity = "silu"
    epsilon: fields.Epsilon = 1e-5
    rope: Rope = _PLAIN
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: fields.OptionalRows = None
    sliding: tuple[bool, ...] | None = None
    tied: bool = False
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
        _check_heads(self)
        if self.sliding is not None and (self.window is None or len(self.sliding) != self.layers):
            raise fields.FieldError(
                f"sliding={fields.shown(self.sliding)} needs a window, and an element for each of {self.layers} layers",
                "sliding",
                "layers",
            )
        if self.sliding is not None and not all(isinstance(one, bool) for one in self.sliding):
            raise fields.FieldError(
                f"sliding={fields.shown(self.sliding)} is not True or False for each layer", "sliding"
            )
        check_head(self.head, HEADS)
        check_remat(self.remat)
        plain = {"key_heads": self.heads, "head_width": self.width / self.heads, "sliding": (True,) * self.layers}
        for name, value in plain.items():  # one spelling of each shape, so that equal models have equal configs
            if getattr(self, name) == value:
                object.__setattr__(self, name, None)

    @property
    def longest(self) -> int:
        """The longest sequence, in tokens, that the model takes: beyond `context` where the `rope` goes there."""
        return self.rope.longest(self.context)


def _check_heads(c: LlamaConfig) -> None:
    if c.head_width is None and c.width % c.heads:
        raise fields.FieldError(
            f"width={c.width} is not a multiple of heads={c.heads}, and there is no head_width", "width", "heads"
        )
    width = c.head_width or c.width // c.heads
    if width % 2:
        raise fields.FieldError(f"head_width={width} is odd: it is turned in pairs", "head_width", "width", "heads")
    if isinstance(c.rope, Dynamic) and width == 2:
        raise fields.FieldError(
            "head_width=2 is one pair, whose frequency no Dynamic rope stretches", "head_width", "rope"
        )
    if c.key_heads is not None:
        fields.check_multiple(c, "heads", "key_heads")


_LLAMA2 = LlamaConfig()
_LLAMA1 = replace(_LLAMA2, context=2048, epsilon=1e-6)
_LLAMA3 = LlamaConfig(
    vocab_size=128256, context=131072, key_heads=8, hidden=14336, rope=Llama3(8.0, 1.0, 4.0, 8192, 500000.0)
)
_LLAMA32 = replace(_LLAMA3, hidden=8192, rope=Llama3(32.0, 1.0, 4.0, 8192, 500000.0), tied=True)
_QWEN25 = LlamaConfig(
    family="qwen2", vocab_size=152064, context=131072, width=3584, layers=28, heads=28, key_heads=4, hidden=18944,
    epsilon=1e-6, rope=Default(1000000.0), qkv_bias=True,
)  # fmt: skip
_QWEN3 = LlamaConfig(
    family="qwen3", vocab_size=151936, context=40960, layers=36, key_heads=8, head_width=128, hidden=12288,
    epsilon=1e-6, rope=Default(1000000.0), qk_norm=True,
)  # fmt: skip
PRESETS = {
    "llama-7b": _LLAMA1,
    "llama-13b": replace(_LLAMA1, width=5120, layers=40, heads=40, hidden=13824),
    "llama-33b": replace(_LLAMA1, width=6656, layers=60, heads=52, hidden=17920),
    "llama-65b": replace(_LLAMA1, epsilon=1e-5, width=8192, layers=80, heads=64, hidden=22016),
    "llama-2-7b": _LLAMA2,
    "llama-2-13b": replace(_LLAMA2, width=5120, layers=40, heads=40, hidden=13824),
    "llama-2-70b": replace(_LLAMA2, width=8192, layers=80, heads=64, key_heads=8, hidden=28672),
    "llama-3.1-8b": _LLAMA3,
    "llama-3.2-1b": replace(_LLAMA32, width=2048, layers=16),
    "llama-3.2-3b": replace(_LLAMA32, width=3072, layers=28, heads=24),
    "mistral-7b": replace(_LLAMA2, family="mistral", context=32768, key_heads=8, hidden=14336, window=4096),
    "qwen2.5-0.5b": replace(
        _QWEN25, vocab_size=151936, context=32768, width=896, layers=24, heads=14, key_heads=2, hidden=4864, tied=True
    ),
    "qwen2.5-7b": _QWEN25,
    "qwen3-0.6b": replace(_QWEN3, width=1024, layers=28, heads=16, head_width=128, hidden=3072, tied=True),
    "qwen3-8b": _QWEN3,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """Settings of one layer.

    Attributes:
      cached: its keys and values; None without a cache.
      slides: () bool: whether it has the window, in a scan over layers of which some have it; None otherwise.
      always: whether it has the window, known while tracing.
    """

    cached: KeyValue | None
    slides: jax.Array | None = None
    always: bool = field(default=True, metadata={"static": True})


class Llama(nn.Module):
    """tokens (batch, length) -> float32 logits (batch, length, vocab_size), or what `config.head` says.

    "none" gives the last norm's (batch, length, width), "sequence_classification" (batch, labels) and
    "token_classification" (batch, length, labels).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = Llama(LlamaConfig(vocab_size=256, context=32, width=64, layers=2, heads=4, key_heads=2, hidden=96))
      >>> tokens = jnp.zeros((1, 8), jnp.int32)
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> jax.jit(model.apply)({"params": params}, tokens).shape
      (1, 8, 256)
    """

    config: LlamaConfig

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
        if length > c.longest:
            raise ValueError(f"the sequence has {length} tokens, the model's context is {c.longest}")
        if cache is not None and positions is None:
            raise ValueError("a call with a cache needs positions=: those of its tokens, (batch, length)")
        init = nn.initializers.normal(0.02)
        wte = placed.Embed(c.vocab_size, c.width, c.dtype, c.param_dtype, embedding_init=init, name="wte")
        h = placed.Dropout(c.dropout, deterministic=deterministic)(wte(tokens))  # (batch, length, width)
        places = jnp.arange(length)[None] if positions is None else positions
        at = turn(c.rope, c.head_width or c.width // c.heads, c.context, places)
        context, cache = kv.opened(cache, mask, tokens)
        h, layers = stack(Block, c, h, _layers(c, cache), context, at, deterministic=deterministic)
        if last:
            h = h[:, -1:]
        h = _norm(c, "ln_f")(h)  # (batch, length, width)
        if labels is not None and c.tied:
            h = tied_losses(wte, h, labels, smoothing)  # (batch, length)
        elif labels is not None:
            h = dense(c, c.vocab_size, "head", bias=False, dot_general=losses_of(labels, smoothing))(h)
        elif c.head == "causal_lm":
            h = (
                wte.attend(h) if c.tied else dense(c, c.vocab_size, "head", bias=False)(h)
            )  # (batch, length, vocab_size)
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
            batch=batch, slots=slots, layers=c.layers, heads=c.key_heads or c.heads,
            width=c.head_width or c.width // c.heads, dtype=c.dtype, stacked=c.scan,
        )  # fmt: skip


def _layers(c: LlamaConfig, cache: Cache | None) -> Layer | tuple[Layer, ...]:
    """Settings of each layer, in the form that `stack` takes."""
    cached = None if cache is None else cache.layers
    if c.scan:
        return Layer(cached, None if c.sliding is None else jnp.asarray(c.sliding))
    each = cached or (None,) * c.layers
    slides = c.sliding or (True,) * c.layers
    return tuple(Layer(own, always=always) for own, always in zip(each, slides, strict=True))


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)). Takes what its layer has of its own and returns its cache."""

    config: LlamaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, h: jax.Array, layer: Layer, context: Context, at: Turn) -> tuple[jax.Array, KeyValue | None]:
        c = self.config
        y, cached = Attention(c, self.deterministic, name="attn")(_norm(c, "ln_1")(h), layer, context, at)
        h = placed.added(h, y)
        h = placed.added(h, MLP(c, self.deterministic, name="mlp")(_norm(c, "ln_2")(h)))
        return h, cached


class Attention(nn.Module):
    """Causal self-attention; each key head serves heads / key_heads queries."""

    config: LlamaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, layer: Layer, context: Context, at: Turn) -> tuple[jax.Array, KeyValue | None]:
        c = self.config
        batch, length, _ = x.shape
        width = c.head_width or c.width // c.heads
        q, k, v = (
            placed.in_heads(dense(c, heads * width, name, bias=c.qkv_bias)(x), heads, c.key_heads)
            for name, heads in (("query", c.heads), ("key", c.key_heads or c.heads), ("value", c.key_heads or c.heads))
        )  # (batch, length, heads, head_width), fewer heads of keys and values
        if c.qk_norm:
            q, k = _norm(c, "query_norm")(q), _norm(c, "key_norm")(k)
        q, k = turned(q, at), turned(k, at)
        new = kv.write(layer.cached, context.start, k, v)
        mask, window = _seen(c, layer, context, length)
        attend = DotProductAttention(
            causal=layer.cached is None,  # otherwise the mask says it
            window=window, dropout=c.dropout, deterministic=self.deterministic, implementation=c.attention, name="core",
        )  # fmt: skip
        y = attend(q, new.key, new.value, mask).reshape(batch, length, c.heads * width)
        y = dense(c, c.width, "out", bias=c.out_bias, std=residual_std(c.layers))(y)
        y = placed.Dropout(c.dropout, deterministic=self.deterministic)(y)  # (batch, length, width)
        return y, None if layer.cached is None else new


def _seen(c: LlamaConfig, layer: Layer, context: Context, length: int) -> tuple[jax.Array | None, int | None]:
    """Keys visible to a layer's queries: the mask, and the window where that does not say it."""
    if c.window is None or not layer.always:
        return context.mask, None
    if layer.slides is None:
        return kv.windowed(context, c.window, length), c.window
    far = jnp.ones((1, 1, 1, length), bool) if context.mask is None else context.mask
    if context.start is None:
        return far & (causal_mask(length, length, c.window) | ~layer.slides), None
    return jnp.where(layer.slides, kv.windowed(context, c.window, length), far), None


class MLP(nn.Module):
    """`down(nonlinearity(gate(x)) * up(x))`."""

    config: LlamaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate, up = (dense(c, c.hidden, name, bias=c.mlp_bias)(x) for name in ("gate", "up"))
        x = NONLINEARITIES[c.nonlinearity](gate) * up  # (batch, length, hidden)
        x = dense(c, c.width, "down", bias=c.mlp_bias, std=residual_std(c.layers))(x)  # (batch, length, width)
        return placed.Dropout(c.dropout, deterministic=self.deterministic)(x)


class RMSNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + epsilon)` over the last axis: float32, but for the product with the scale.

    Flax's own multiplies in float32, which rounds differently from these models' own code in bfloat16.
    """

    epsilon: float
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = placed.whole(self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        scale = scale.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return scale * x.astype(self.dtype)


def _norm(c: LlamaConfig, name: str) -> RMSNorm:
    return RMSNorm(c.epsilon, c.dtype, c.param_dtype, name=name)
