"""CLIP in Flax linen: a decoder of texts and a Vision Transformer, pre-norm both, that meet in one space.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020;
initial values as in the released code, https://github.com/openai/CLIP; outputs as in Hugging Face's `CLIPModel`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models import fields, placed
from jlora.models.architecture import Head, check_head
from jlora.models.attention import DotProductAttention, Implementation
from jlora.models.layers import dense, embed, norm
from jlora.models.nonlinear import NONLINEARITIES, Nonlinearity
from jlora.models.stack import check_remat, stack

HEADS: tuple[Head, ...] = ("none", "projection")
LARGEST = 2  # stands for the largest token of a text: what configs say that were written before 2023


def _check(c: "Tower") -> None:
    """Fields common to both towers' configs."""
    fields.check_fields(c)
    fields.check_multiple(c, "width", "heads")
    check_head(c.head, HEADS)
    check_remat(c.remat)


@dataclass(frozen=True)
class CLIPTextConfig:
    """The shape of a tower for texts. The default is that of CLIP ViT-B/32.

    Attributes:
      vocab_size: number of tokens.
      context: the longest sequence, in tokens.
      width: features of the residual stream, a multiple of `heads`.
      layers, heads: blocks, and attention heads in each.
      hidden: features between the two layers of each MLP.
      nonlinearity: of the MLPs, a name in `jlora.models.nonlinear`.
      epsilon: added to the variance in the norms.
      end: the token that closes a text: the first of them is what is pooled. 2 for the token of the largest number.
      head: "none", or "projection" of what is pooled into the space of texts and images.
      projection: features of that space.
      dropout: of the attention weights, in [0, 1).
      dtype, param_dtype: of the computation and of the parameters. Scores and softmax are float32 in any case.
      scan: one block scanned over parameters stacked on axis 0, in place of `layers` blocks: compiles faster.
      remat: compute each block's activations again in the backward pass; True, or the name of a policy in
        `jax.checkpoint_policies`.
      attention: the kernel, "auto", "xla" or "cudnn"; see `jlora.models.attention.DotProductAttention`.
    """

    causal: ClassVar[bool] = True
    vocab_size: fields.Rows = 49408
    context: fields.Rows = 77
    width: fields.Features = 512
    layers: fields.Layers = 12
    heads: fields.Heads = 8
    hidden: fields.Features = 2048
    nonlinearity: Nonlinearity = "quick_gelu"
    epsilon: fields.Epsilon = 1e-5
    end: fields.Token = 49407
    head: Head = "none"
    projection: fields.Projection = 512
    dropout: fields.Dropout = 0.0
    dtype: fields.Dtype = "float32"
    param_dtype: fields.Dtype = "float32"
    scan: bool = False
    remat: bool | str = False
    attention: Implementation = "auto"

    def __post_init__(self) -> None:
        _check(self)
        if self.end >= self.vocab_size and self.end != LARGEST:
            raise fields.FieldError(f"end={self.end} is no token of vocab_size={self.vocab_size}", "end", "vocab_size")


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The shape of a tower for images. The default is that of CLIP ViT-B/32.

    Attributes:
      image_size, patch_size: sides of the square image and of a patch, in pixels; the patches tile the image.
      channels: of the image.
      width, layers, heads, hidden, nonlinearity, epsilon: as in `CLIPTextConfig`.
      head, projection: as in `CLIPTextConfig`.
      dropout, dtype, param_dtype, scan, remat, attention: as in `CLIPTextConfig`.
    """

    causal: ClassVar[bool] = False
    image_size: fields.Pixels = 224
    patch_size: fields.Pixels = 32
    channels: fields.Channels = 3
    width: fields.Features = 768
    layers: fields.Layers = 12
    heads: fields.Heads = 12
    hidden: fields.Features = 3072
    nonlinearity: Nonlinearity = "quick_gelu"
    epsilon: fields.Epsilon = 1e-5
    head: Head = "none"
    projection: fields.Projection = 512
    dropout: fields.Dropout = 0.0
    dtype: fields.Dtype = "float32"
    param_dtype: fields.Dtype = "float32"
    scan: bool = False
    remat: bool | str = False
    attention: Implementation = "auto"

    def __post_init__(self) -> None:
        _check(self)
        fields.check_multiple(self, "image_size", "patch_size")

    @property
    def patches(self) -> int:
        """Number of an image's patches: its tokens without [CLS]."""
        return (self.image_size // self.patch_size) ** 2


Tower = CLIPTextConfig | CLIPVisionConfig


@dataclass(frozen=True)
class CLIPConfig:
    """The shape of a CLIP. The default is ViT-B/32; see `PRESETS`.

    Attributes:
      text, vision: the shapes of the towers. What is named below is not theirs to say.
      projection: features of the space of texts and images.
      temperature: the logarithm of the factor of the cosines, when training begins.
      head: "none": there is no other.
      dropout, dtype, param_dtype, scan, remat, attention: of both towers, as in `CLIPTextConfig`.
    """

    text: CLIPTextConfig = CLIPTextConfig()
    vision: CLIPVisionConfig = CLIPVisionConfig()
    projection: fields.Projection = 512
    temperature: Annotated[float, fields.Real(-80.0, 80.0)] = 2.6592  # its exponential is a float32
    head: Head = "none"
    dropout: fields.Dropout = 0.0
    dtype: fields.Dtype = "float32"
    param_dtype: fields.Dtype = "float32"
    scan: bool = False
    remat: bool | str = False
    attention: Implementation = "auto"

    def __post_init__(self) -> None:
        fields.check_fields(self)
        check_head(self.head, ("none",))
        check_remat(self.remat)

    @property
    def text_tower(self) -> CLIPTextConfig:
        """Config of the module that makes embeddings of texts, whose parameters are "text"."""
        return dataclasses.replace(self.text, **self._shared())

    @property
    def vision_tower(self) -> CLIPVisionConfig:
        """Config of the module that makes embeddings of images, whose parameters are "vision"."""
        return dataclasses.replace(self.vision, **self._shared())

    def _shared(self) -> dict[str, Any]:
        names = ("projection", "dropout", "dtype", "param_dtype", "scan", "remat", "attention")
        return {"head": "projection"} | {name: getattr(self, name) for name in names}


PRESETS: dict[str, Any] = {
    "clip-vit-base-patch32": CLIPConfig(),
    "clip-vit-large-patch14": CLIPConfig(
        CLIPTextConfig(width=768, heads=12, hidden=3072, projection=768),
        CLIPVisionConfig(patch_size=14, width=1024, layers=24, heads=16, hidden=4096, projection=768),
        projection=768,
    ),
    "clip-vit-l-text": CLIPTextConfig(width=768, heads=12, hidden=3072, projection=768),
    "openclip-vit-h-text": CLIPTextConfig(width=1024, layers=23, heads=16, hidden=4096, nonlinearity="gelu"),
    "openclip-vit-bigg-text": CLIPTextConfig(
        width=1280, layers=32, heads=20, hidden=5120, nonlinearity="gelu", head="projection", projection=1280
    ),
}
"""Published sizes. The text towers alone are the text encoders of Stable Diffusion: "clip-vit-l-text" of 1.x and SDXL's
first, "openclip-vit-h-text" of 2.x (23 of OpenCLIP's 24 blocks), "openclip-vit-bigg-text" SDXL's second."""


class CLIP(nn.Module):
    """texts and images -> {"out": logits (images, texts), "text_embeds", "image_embeds"}, all float32.

    The logits are the cosines of the embeddings times the exponential of a parameter. A tower can be called alone:
    `CLIPText(config.text_tower)` with the parameters at "text".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> text = CLIPTextConfig(vocab_size=64, context=16, width=16, layers=2, heads=2, hidden=32, end=63)
      >>> vision = CLIPVisionConfig(image_size=8, patch_size=4, width=24, layers=2, heads=3, hidden=48)
      >>> model = CLIP(CLIPConfig(text, vision, projection=12))
      >>> tokens, images = jnp.full((3, 7), 63), jnp.zeros((2, 8, 8, 3))
      >>> params = model.init(jax.random.key(0), tokens, images)["params"]
      >>> out = model.apply({"params": params}, tokens, images)
      >>> out["out"].shape, out["text_embeds"].shape, out["image_embeds"].shape
      ((2, 3), (3, 12), (2, 12))
      >>> tower = CLIPText(model.config.text_tower).apply({"params": params["text"]}, tokens)
      >>> tower["out"].shape, tower["hidden"].shape
      ((3, 12), (3, 7, 16))
    """

    config: CLIPConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        images: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> dict[str, jax.Array]:
        """See the class, and the towers."""
        c = self.config
        text, vision = CLIPText(c.text_tower, name="text"), CLIPVision(c.vision_tower, name="vision")
        texts = text(tokens, mask=mask, positions=positions, deterministic=deterministic)["out"]
        pictures = vision(images, deterministic=deterministic)["out"]
        texts, pictures = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (texts, pictures))
        factor = self.param("logit_scale", nn.initializers.constant(c.temperature), (), c.param_dtype)
        logits = jnp.exp(factor.astype(jnp.float32)) * placed.matmul(pictures, texts.T)  # (images, texts)
        return {"out": logits, "text_embeds": texts, "image_embeds": pictures}


class CLIPText(nn.Module):
    """tokens (batch, length) -> {"out": the last norm's (batch, length, width), "pooled": (batch, width)}, float32.

    With a projection: {"out": (batch, projection), "hidden": the last norm's (batch, length, width)}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = CLIPText(CLIPTextConfig(vocab_size=64, context=16, width=16, layers=2, heads=2, hidden=32, end=63))
      >>> tokens = jnp.full((3, 7), 63)
      >>> params = model.init(jax.random.key(0), tokens)["params"]
      >>> model.apply({"params": params}, tokens, states=True)["states"].shape  # (layers + 1, batch, length, width)
      (3, 3, 7, 16)
    """

    config: CLIPTextConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
        states: bool = False,
        skip: int = 0,
    ) -> dict[str, jax.Array]:
        """See the class.

        Args:
          tokens: (batch, length), int32. Of a text without the token that closes it, the first one is pooled.
          mask: (batch, length), False at padding; None for no padding, or padding that follows.
          positions: (batch, length), int32; 0, 1, ... when None.
          deterministic: no dropout.
          states: also return "states", (layers + 1, batch, length, width), float32: the embedding and what each block
            returns, all before the last norm.
          skip: number of last blocks that the last norm's output leaves out ("clip skip"); what is pooled is of all.
        """
        c = self.config
        if not 0 <= skip <= c.layers:
            raise ValueError(f"skip={skip}, and the model has {c.layers} blocks: expected 0 to {c.layers}")
        length = tokens.shape[1]
        if length > c.context:
            raise ValueError(f"the sequence has {length} tokens, the model's context is {c.context}")
        wte, wpe = embed(c, c.vocab_size, "wte"), embed(c, c.context, "wpe", std=0.01)
        h = wte(tokens) + wpe(jnp.arange(length)[None] if positions is None else positions)  # (batch, length, width)
        seen = None if mask is None else mask[:, None, None, :].astype(bool)
        first, block = h, Recorded if states or skip else Block
        h, each = stack(block, c, h, None, seen, deterministic=deterministic)
        ln_f = norm(c, "ln_f")
        h = ln_f(h)
        ends = tokens if c.end == LARGEST else (tokens == c.end).astype(jnp.int32)
        pooled = placed.taken(h, jnp.argmax(ends, axis=1)[:, None, None], axis=1)[:, 0]  # (batch, width)
        if skip:
            h = ln_f(first if skip == c.layers else each[-(skip + 1)])
        out = _outputs(c, h, pooled)
        if states:
            out["states"] = _states(first, each).astype(jnp.float32)
        return out


class CLIPVision(nn.Module):
    """images (batch, height, width, channels) -> {"out": the last block's (batch, 1 + patches, width), "pooled"}.

    [CLS] comes first, and is what the last norm takes: "pooled", (batch, width). With a projection: {"out": (batch,
    projection), "hidden": the last block's}. All are float32.
    """

    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> dict[str, jax.Array]:
        c = self.config
        expected = (c.image_size, c.image_size, c.channels)
        if images.shape[1:] != expected:
            raise ValueError(f"the images are {images.shape[1:]}, the model's are {expected} (height, width, channels)")
        side, init = (c.patch_size, c.patch_size), nn.initializers.normal(c.width**-0.5)
        patch = placed.Conv(
            c.width, side, side, "VALID", use_bias=False, dtype=c.dtype, param_dtype=c.param_dtype,
            kernel_init=nn.initializers.normal(0.02), name="patch",
        )  # fmt: skip
        x = patch(images).reshape(len(images), -1, c.width)  # (batch, patches, width)
        cls = placed.whole(self.param("cls", init, (c.width,), c.param_dtype)).astype(x.dtype)
        x = placed.joined([jnp.broadcast_to(cls, (len(images), 1, c.width)), x], axis=1)  # (batch, 1 + patches, width)
        h = x + embed(c, 1 + c.patches, "wpe", std=c.width**-0.5)(jnp.arange(1 + c.patches))[None]
        h, _ = stack(Block, c, norm(c, "ln_e")(h), None, None, deterministic=deterministic)
        return _outputs(c, h, norm(c, "ln_f")(h[:, 0]))


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    config: Tower
    deterministic: bool

    @nn.compact
    def __call__(self, h: jax.Array, each: None, seen: jax.Array | None) -> tuple[jax.Array, None]:
        c = self.config
        h = placed.added(h, Attention(c, self.deterministic, name="attn")(norm(c, "ln_1")(h), seen))
        h = placed.added(h, MLP(c, name="mlp")(norm(c, "ln_2")(h)))
        return h, each


class Recorded(Block):
    """A block that also returns its output as what is new of its layer."""

    def __call__(self, h: jax.Array, each: None, seen: jax.Array | None) -> Any:
        h, _ = super().__call__(h, each, seen)
        return h, h


class Attention(nn.Module):
    """Self-attention: of texts with what came before, of images with all."""

    config: Tower
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array | None) -> jax.Array:
        c = self.config
        q, k, v = (
            placed.in_heads(dense(c, c.width, name, std=c.width**-0.5)(x), c.heads)
            for name in ("query", "key", "value")
        )  # (batch, length, heads, width / heads)
        attend = DotProductAttention(
            causal=c.causal,
            dropout=c.dropout,
            deterministic=self.deterministic,
            implementation=c.attention,
            name="core",
        )
        return dense(c, c.width, "out", std=_residual(c))(attend(q, k, v, seen).reshape(x.shape))


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them."""

    config: Tower

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = NONLINEARITIES[c.nonlinearity](dense(c, c.hidden, "fc", std=(2 * c.width) ** -0.5)(x))  # (..., hidden)
        return dense(c, c.width, "proj", std=_residual(c))(x)  # (batch, length, width)


def _outputs(c: Tower, h: jax.Array, pooled: jax.Array) -> dict[str, jax.Array]:
    """Called within the compact method of a tower."""
    h = h.astype(jnp.float32)
    if c.head == "none":
        return {"out": h, "pooled": pooled.astype(jnp.float32)}
    embeds = dense(c, c.projection, "projection", std=c.width**-0.5, bias=False)(pooled)  # (batch, projection)
    return {"out": placed.output(embeds), "hidden": h}


def _states(first: jax.Array, each: jax.Array | tuple[jax.Array, ...]) -> jax.Array:
    """Hidden states: the embedding and the outputs of all blocks -> (layers + 1, batch, length, width)."""
    if isinstance(each, tuple):
        return jnp.stack([first, *each])
    return jnp.concatenate([placed.beside(first[None], each), each])


def _residual(c: Tower) -> float:
    """Deviation of layers that write to the residual stream: smaller, since 2 * layers of them add up there."""
    return 1 / math.sqrt(2 * c.layers * c.width)
