"""Vision Transformer in Flax linen: patches as tokens, [CLS], learned positions, pre-norm blocks, a linear head.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929; parts, order and the epsilon of the norms
as in Hugging Face's `ViTForImageClassification`, the pooler as in its `ViTModel`.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models import fields, placed
from jlora.models.architecture import Head, check_head
from jlora.models.attention import DotProductAttention, Implementation
from jlora.models.layers import dense, norm
from jlora.models.nonlinear import NONLINEARITIES, Nonlinearity
from jlora.models.stack import check_remat, stack

HEADS: tuple[Head, ...] = ("none", "image_classification")


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a Vision Transformer. The default is ViT-B/16 at 224 x 224; see `PRESETS`.

    Attributes:
      image_size, patch_size: sides of the square image and of a patch, in pixels; the patches tile the image.
      channels: of the image.
      width: features of the residual stream, a multiple of `heads`.
      layers, heads: blocks, and attention heads in each.
      hidden: features between the two layers of each MLP; 4 * `width` when None.
      nonlinearity: of the MLPs, a name in `jlora.models.nonlinear`.
      epsilon: added to the variance in the norms.
      head: "none" or "image_classification", of the [CLS] token.
      labels: of a classification.
      pooler: without a head: also give what the pooler makes of the [CLS] token, as "pooled" beside "out".
      dropout: of the embeddings, the attention weights and both residual branches, in [0, 1).
      dtype, param_dtype: of the computation and of the parameters. Scores and softmax are float32 in any case.
      scan: one block scanned over parameters stacked on axis 0, in place of `layers` blocks: compiles faster.
      remat: compute each block's activations again in the backward pass; True, or the name of a policy in
        `jax.checkpoint_policies`.
      attention: the kernel, "auto", "xla" or "cudnn"; see `jlora.models.attention.DotProductAttention`.
    """

    image_size: fields.Pixels = 224
    patch_size: fields.Pixels = 16
    channels: fields.Channels = 3
    width: fields.Features = 768
    layers: fields.Layers = 12
    heads: fields.Heads = 12
    hidden: fields.OptionalFeatures = None
    nonlinearity: Nonlinearity = "gelu"
    epsilon: fields.Epsilon = 1e-12
    head: Head = "image_classification"
    labels: fields.Labels = 1000
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
        fields.check_multiple(self, "image_size", "patch_size")
        check_head(self.head, HEADS)
        check_remat(self.remat)

    @property
    def patches(self) -> int:
        """Number of an image's patches: its tokens without [CLS]."""
        return (self.image_size // self.patch_size) ** 2


PRESETS = {
    "vit-base": ViTConfig(),
    "vit-large": ViTConfig(width=1024, layers=24, heads=16),
}


class ViT(nn.Module):
    """images (batch, height, width, channels) -> float32 logits (batch, labels), or what `config.head` says.

    "none" gives the last norm's (batch, 1 + patches, width), [CLS] first. With `config.pooler`, it gives {"out": the
    same, "pooled": (batch, width)}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = ViT(ViTConfig(image_size=8, patch_size=2, channels=1, width=32, layers=2, heads=4, labels=10))
      >>> images = jnp.zeros((3, 8, 8, 1))
      >>> params = model.init(jax.random.key(0), images)["params"]
      >>> model.apply({"params": params}, images).shape
      (3, 10)
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array | dict[str, jax.Array]:
        c = self.config
        expected = (c.image_size, c.image_size, c.channels)
        if images.shape[1:] != expected:
            raise ValueError(f"the images are {images.shape[1:]}, the model's are {expected} (height, width, channels)")
        h = _embedded(c, self, images)  # (batch, 1 + patches, width)
        h = placed.Dropout(c.dropout, deterministic=deterministic)(h)
        last = FirstToken if c.head == "image_classification" else None  # which reads no other
        h, _ = stack(Block, c, h, None, deterministic=deterministic, last=last)
        h = norm(c, "ln_f")(h)  # (batch, 1 + patches, width)
        if c.head == "image_classification":
            return placed.output(_dense(c, c.labels, "head")(h[:, 0]))  # (batch, labels)
        out = h.astype(jnp.float32)
        if not c.pooler:
            return out
        pooled = jnp.tanh(_dense(c, c.width, "pooler")(h[:, 0]))  # (batch, width)
        return {"out": out, "pooled": pooled.astype(jnp.float32)}


def _embedded(c: ViTConfig, module: nn.Module, images: jax.Array) -> jax.Array:
    """[CLS] and the patches, each with its position."""
    side = (c.patch_size, c.patch_size)
    init = nn.initializers.truncated_normal(0.02)
    patch = placed.Conv(
        c.width, side, side, "VALID", dtype=c.dtype, param_dtype=c.param_dtype, kernel_init=init, name="patch"
    )
    x = patch(images).reshape(len(images), -1, c.width)  # (batch, patches, width)
    cls = placed.whole(module.param("cls", init, (1, 1, c.width), c.param_dtype)).astype(c.dtype)
    positions = placed.whole(module.param("positions", init, (1, 1 + c.patches, c.width), c.param_dtype))
    x = placed.joined([jnp.broadcast_to(cls, (len(images), 1, c.width)), x], axis=1)  # (batch, 1 + patches, width)
    return x + positions.astype(c.dtype)


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); with a None, as `stack` wants it."""

    queries: ClassVar[int | None] = None  # number of leading tokens to compute; None for all
    config: ViTConfig
    deterministic: bool

    @nn.compact
    def __call__(self, h: jax.Array, _: None) -> tuple[jax.Array, None]:
        c = self.config
        x = norm(c, "ln_1")(h)
        y = Attention(c, self.deterministic, name="attn")(x[:, : self.queries], x)
        h = placed.added(h[:, : self.queries], y)
        h = placed.added(h, MLP(c, self.deterministic, name="mlp")(norm(c, "ln_2")(h)))
        return h, None


class FirstToken(Block):
    """A block whose output has [CLS] alone: (batch, 1 + patches, width) -> (batch, 1, width)."""

    queries = 1


class Attention(nn.Module):
    """Attention to all tokens, each of query, key and value with a kernel of its own: queries, x -> as the queries."""

    config: ViTConfig
    deterministic: bool

    @nn.compact
    def __call__(self, queries: jax.Array, x: jax.Array) -> jax.Array:
        c = self.config
        q, k, v = (
            placed.in_heads(_dense(c, c.width, name)(of), c.heads)  # (batch, length, heads, width / heads)
            for name, of in (("query", queries), ("key", x), ("value", x))
        )
        attend = DotProductAttention(
            dropout=c.dropout, deterministic=self.deterministic, implementation=c.attention, name="core"
        )
        y = _dense(c, c.width, "out")(attend(q, k, v).reshape(queries.shape))
        return placed.Dropout(c.dropout, deterministic=self.deterministic)(y)


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them."""

    config: ViTConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = NONLINEARITIES[c.nonlinearity](_dense(c, c.hidden or 4 * c.width, "fc")(x))  # (batch, length, hidden)
        x = _dense(c, c.width, "proj")(x)  # (batch, length, width)
        return placed.Dropout(c.dropout, deterministic=self.deterministic)(x)


_dense = functools.partial(dense, init=nn.initializers.truncated_normal(0.02))
