"""GPT-2 in Flax linen: a decoder with pre-norm blocks, learned positions and a head tied to the embedding.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; names of the parts and initial
values as in the released code, https://github.com/openai/gpt-2.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models.attention import DotProductAttention


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2. The default is the released "small" model; see `PRESETS` for the others.

    Attributes:
      vocab_size: number of tokens; 256 for a model of bytes.
      context: the longest sequence, in tokens.
      width: features of the residual stream, a multiple of `heads`.
      layers, heads: blocks, and attention heads in each.
      dropout: of the embeddings, the attention weights and both residual branches, in [0, 1).
      dtype, param_dtype: of the computation and of the parameters. Scores and softmax are float32 in any case.
      scan: one block scanned over parameters stacked on axis 0, in place of `layers` blocks: compiles faster.
      remat: compute each block's activations again in the backward pass.
    """

    vocab_size: int = 50257
    context: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    dropout: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")


PRESETS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(width=1024, layers=24, heads=16),
    "gpt2-large": GPT2Config(width=1280, layers=36, heads=20),
    "gpt2-xl": GPT2Config(width=1600, layers=48, heads=25),
}


class GPT2(nn.Module):
    """tokens (batch, length) -> logits (batch, length, vocab_size), float32.

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
    def __call__(self, tokens: jax.Array, *, deterministic: bool = True) -> jax.Array:
        c = self.config
        length = tokens.shape[1]
        if length > c.context:
            raise ValueError(f"the sequence has {length} tokens, the model's context is {c.context}")
        wte = _embed(c, c.vocab_size, 0.02, "wte")
        wpe = _embed(c, c.context, 0.01, "wpe")
        h = wte(tokens) + wpe(jnp.arange(length))[None]  # (batch, length, width)
        h = nn.Dropout(c.dropout, deterministic=deterministic)(h)
        block = nn.remat(Block, prevent_cse=not c.scan) if c.remat else Block
        if c.scan:
            layers = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=c.layers
            )
            h, _ = layers(c, deterministic, name="h")(h, None)
        else:
            for i in range(c.layers):
                h, _ = block(c, deterministic, name=f"h_{i}")(h, None)
        h = _norm(c, "ln_f")(h)
        return wte.attend(h).astype(jnp.float32)  # (batch, length, vocab_size)


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)). Takes and returns a pair, as `nn.scan` wants it."""

    config: GPT2Config
    deterministic: bool

    @nn.compact
    def __call__(self, h: jax.Array, _: None) -> tuple[jax.Array, None]:
        c = self.config
        h = h + Attention(c, self.deterministic, name="attn")(_norm(c, "ln_1")(h))
        h = h + MLP(c, self.deterministic, name="mlp")(_norm(c, "ln_2")(h))
        return h, None


class Attention(nn.Module):
    """Causal self-attention. Query, key and value have a kernel each: GPT-2's fused one, cut in three."""

    config: GPT2Config
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        batch, length, width = x.shape
        q, k, v = (
            _dense(c, width, name)(x).reshape(batch, length, c.heads, -1)  # (batch, length, heads, width / heads)
            for name in ("query", "key", "value")
        )
        attend = DotProductAttention(causal=True, dropout=c.dropout, deterministic=self.deterministic, name="core")
        y = attend(q, k, v).reshape(batch, length, width)
        return nn.Dropout(c.dropout, deterministic=self.deterministic)(_dense(c, width, "out", residual=True)(y))


class MLP(nn.Module):
    """Two linear layers with GELU, in its tanh form, between them."""

    config: GPT2Config
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = nn.gelu(_dense(c, 4 * c.width, "fc")(x), approximate=True)  # (batch, length, 4 * width)
        x = _dense(c, c.width, "proj", residual=True)(x)  # (batch, length, width)
        return nn.Dropout(c.dropout, deterministic=self.deterministic)(x)


def _embed(config: GPT2Config, rows: int, std: float, name: str) -> nn.Embed:
    init = nn.initializers.normal(std)
    return nn.Embed(rows, config.width, config.dtype, config.param_dtype, embedding_init=init, name=name)


def _norm(config: GPT2Config, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(1e-5, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def _dense(config: GPT2Config, features: int, name: str, *, residual: bool = False) -> nn.Dense:
    """A linear layer; one that writes to the residual stream starts smaller, since 2 * layers of them add up there."""
    std = 0.02 / math.sqrt(2 * config.layers) if residual else 0.02
    init = nn.initializers.normal(std)
    return nn.Dense(features, dtype=config.dtype, param_dtype=config.param_dtype, kernel_init=init, name=name)
