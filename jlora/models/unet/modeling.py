"""The UNet of Stable Diffusion 1.x, 2.x and SDXL in Flax linen. Images are (batch, height, width, channels).

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752; Podell et al.,
"SDXL", arXiv 2307.01952; names of the parts as in diffusers' `UNet2DConditionModel`.
"""

import functools
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jlora.models import fields, placed
from jlora.models.architecture import Head, check_head
from jlora.models.attention import DotProductAttention, Implementation
from jlora.models.layers import dense
from jlora.models.resnet import Downsample, Resnet, Upsample, conv, group_norm
from jlora.models.stack import check_remat, computed_again, stack

Widths = Annotated[tuple[int, ...], fields.Several(fields.Whole(1, 2**14), 8)]
Depths = Annotated[tuple[int, ...], fields.Several(fields.Whole(0, 64), 8)]
MOST = 1024  # blocks: no number in a file makes a model of more
SIZES = 6  # numbers of `sizes`
LAYER_NORM, GROUP_NORM = 1e-5, 1e-6  # epsilons within a transformer, whatever the config says


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a UNet. The default is that of Stable Diffusion 1.x.

    Attributes:
      size: side of the latents that it was trained on, in pixels of theirs (8 of the image's).
      channels, outputs: of the latents that go in, and of the prediction. 9 go in to paint in a mask.
      widths: channels at each resolution, from the finest; multiples of `groups`.
      depths: transformer blocks behind each residual block, at each resolution; 0 for no attention.
      middle: transformer blocks at the coarsest place.
      heads: attention heads at each resolution.
      layers: residual blocks at each resolution on the way down; one more on the way up.
      context_width: features of the texts' tokens.
      linear_projection: the layers around the transformer blocks are linear; else 1 x 1 convolutions, as in 1.x.
      groups, epsilon: of the norms of the residual blocks.
      added: features of SDXL's other conditions, the pooled text and six sizes; None for none.
      added_time: features of each of those sizes.
      head: "none": there is no other.
      dtype, param_dtype: of the computation and of the parameters. Norms, scores and softmax are float32 in any case.
      scan: transformer blocks that follow one another are one, scanned over stacked parameters: compiles faster.
      remat: compute the activations of each residual and each transformer block again in the backward pass; True, or
        the name of a policy, see `jlora.models.stack.POLICIES`.
      attention: the kernel, "auto", "xla" or "cudnn"; see `jlora.models.attention.DotProductAttention`.
    """

    size: fields.Pixels = 64
    channels: fields.Channels = 4
    outputs: fields.Channels = 4
    widths: Widths = (320, 640, 1280, 1280)
    depths: Depths = (1, 1, 1, 0)
    middle: Annotated[int, fields.Whole(1, 64)] = 1
    heads: Widths = (8, 8, 8, 8)
    layers: Annotated[int, fields.Whole(1, 16)] = 2
    context_width: fields.Features = 768
    linear_projection: bool = False
    groups: fields.Heads = 32
    epsilon: fields.Epsilon = 1e-5
    added: fields.OptionalFeatures = None
    added_time: fields.Features = 256
    head: Head = "none"
    dtype: fields.Dtype = "float32"
    param_dtype: fields.Dtype = "float32"
    scan: bool = False
    remat: bool | str = False
    attention: Implementation = "auto"

    def __post_init__(self) -> None:
        fields.check_fields(self)
        check_head(self.head, ("none",))
        check_remat(self.remat)
        for name in ("depths", "heads"):
            if len(getattr(self, name)) != len(self.widths):
                raise fields.FieldError(
                    f"{name}={getattr(self, name)} and widths={self.widths} speak of different numbers of resolutions",
                    name, "widths",
                )  # fmt: skip
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % self.groups or width % heads:
                raise fields.FieldError(
                    f"widths={self.widths} are not all multiples of groups={self.groups} and heads={self.heads}",
                    "widths", "groups", "heads",
                )  # fmt: skip
        blocks = sum((2 * self.layers + 1) * (1 + depth) for depth in self.depths)
        if blocks > MOST:
            raise fields.FieldError(
                f"layers={self.layers} and depths={self.depths} make {blocks} blocks, at most {MOST} are built",
                "layers", "depths",
            )  # fmt: skip
        if self.added is not None and self.added <= SIZES * self.added_time:
            raise fields.FieldError(
                f"added={self.added} leaves no room for a text beside {SIZES} sizes of added_time={self.added_time}",
                "added", "added_time",
            )  # fmt: skip

    @property
    def time_width(self) -> int:
        """Features of the time's embedding."""
        return 4 * self.widths[0]

    @property
    def pooled(self) -> int | None:
        """Features of the pooled text; None where the UNet takes none."""
        return None if self.added is None else self.added - SIZES * self.added_time


PRESETS = {
    "sd15": UNetConfig(),
    "sd21": UNetConfig(size=96, heads=(5, 10, 20, 20), context_width=1024, linear_projection=True),
    "sdxl": UNetConfig(
        size=128, widths=(320, 640, 1280), depths=(0, 2, 10), middle=10, heads=(5, 10, 20), context_width=2048,
        linear_projection=True, added=2816,
    ),
}  # fmt: skip


class UNet(nn.Module):
    """latents at a time, and a text -> {"out": the prediction (batch, height, width, outputs), float32}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = UNet(UNetConfig(widths=(8, 16), depths=(1, 0), heads=(2, 2), layers=1, context_width=12, groups=4))
      >>> latents, times, context = jnp.zeros((2, 6, 4, 4)), jnp.asarray([3, 999]), jnp.zeros((2, 7, 12))
      >>> params = model.init(jax.random.key(0), latents, times, context)["params"]
      >>> model.apply({"params": params}, latents, times, context)["out"].shape
      (2, 6, 4, 4)
    """

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        times: jax.Array,
        context: jax.Array,
        pooled: jax.Array | None = None,
        sizes: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """See the class.

        Args:
          latents: (batch, height, width, channels).
          times: (batch,), of the 1,000 steps of the noise; may lie between two.
          context: (batch, length, context_width), hidden states of the text's tokens.
          pooled: (batch, `config.pooled`), the whole text's embedding, where `config.added`.
          sizes: (batch, 6), height and width of the original image, top and left of the part of it that this one
            shows, height and width asked for; where `config.added`.

        Raises:
          ValueError: for inputs of other shapes than the config's, and conditions that are missing or too many.
        """
        c = self.config
        _check(c, latents, context, pooled, sizes)
        time = _Time(c.time_width, c.dtype, c.param_dtype, name="time_embedding")(_waves(times, c.widths[0]))
        if pooled is not None and sizes is not None:
            given = _waves(sizes, c.added_time).reshape(len(sizes), -1)  # (batch, 6 added_time)
            added = jnp.concatenate([pooled.astype(jnp.float32), given], axis=-1)  # (batch, added)
            time = time + _Time(c.time_width, c.dtype, c.param_dtype, name="add_embedding")(added)
        context = context.astype(c.dtype)

        h = conv(c, c.widths[0], "conv_in")(latents.astype(c.dtype))
        skips = [h]
        for i in range(len(c.widths)):
            h, new = Down(c, i, name=f"down_blocks_{i}")(h, time, context)
            skips += new
        h = Middle(c, name="mid_block")(h, time, context)
        for i in range(len(c.widths)):
            mine, skips = skips[-c.layers - 1 :], skips[: -c.layers - 1]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            h = Up(c, len(c.widths) - 1 - i, size, name=f"up_blocks_{i}")(h, mine, time, context)
        h = conv(c, c.outputs, "conv_out")(nn.silu(group_norm(c, "conv_norm_out")(h)))
        return {"out": placed.output(h)}


class Down(nn.Module):
    """Residual blocks at one resolution, attention behind each, then half the resolution, but for the coarsest."""

    config: UNetConfig
    level: int

    @nn.compact
    def __call__(self, h: jax.Array, time: jax.Array, context: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """The result, and all that the way up is shown again."""
        c, shown = self.config, []
        for j in range(c.layers):
            h = _resnet(c, c.widths[self.level], j)(h, time)
            if c.depths[self.level]:
                h = Transformer(c, c.depths[self.level], c.heads[self.level], name=f"attentions_{j}")(h, context)
            shown.append(h)
        if self.level < len(c.widths) - 1:
            h = Downsample(c, name="downsamplers_0")(h)
            shown.append(h)
        return h, shown


class Middle(nn.Module):
    """Two residual blocks at the coarsest resolution, attention between them."""

    config: UNetConfig

    @nn.compact
    def __call__(self, h: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        c = self.config
        h = _resnet(c, c.widths[-1], 0)(h, time)
        h = Transformer(c, c.middle, c.heads[-1], name="attentions_0")(h, context)
        return _resnet(c, c.widths[-1], 1)(h, time)


class Up(nn.Module):
    """Residual blocks at one resolution, each shown what the way down had; then the next finer one, if there is."""

    config: UNetConfig
    level: int
    size: tuple[int, int] | None  # height and width at the next finer resolution

    @nn.compact
    def __call__(self, h: jax.Array, skips: list[jax.Array], time: jax.Array, context: jax.Array) -> jax.Array:
        c = self.config
        for j in range(c.layers + 1):
            h = placed.joined([h, skips[-1 - j]], axis=-1)  # (batch, height, width, channels + theirs)
            h = _resnet(c, c.widths[self.level], j)(h, time)
            if c.depths[self.level]:
                h = Transformer(c, c.depths[self.level], c.heads[self.level], name=f"attentions_{j}")(h, context)
        return h if self.size is None else Upsample(c, name="upsamplers_0")(h, *self.size)


class Transformer(nn.Module):
    """Pixels as tokens: transformer blocks that attend to one another and to the text, added to what came in."""

    config: UNetConfig
    depth: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        c = self.config
        width = x.shape[-1]
        layer = functools.partial(dense, c) if c.linear_projection else functools.partial(conv, c, side=1)
        h = layer(width, name="proj_in")(group_norm(c, "norm", GROUP_NORM)(x))
        h = h.reshape(len(x), -1, width)  # (batch, height width, channels)
        h, _ = stack(
            Block, c, h, None, context, deterministic=True, layers=self.depth, name="transformer_blocks",
            options={"heads": self.heads},
        )  # fmt: skip
        return placed.added(x, layer(width, name="proj_out")(h.reshape(x.shape)))


class Block(nn.Module):
    """h + attention(norm(h)), h + attention(norm(h), text), h + mlp(norm(h)); with a None, as `stack` wants it."""

    config: UNetConfig
    deterministic: bool
    heads: int

    @nn.compact
    def __call__(self, h: jax.Array, each: None, context: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        x = _norm(c, "norm1")(h)
        h = placed.added(h, Attention(c, self.heads, name="attn1")(x, x))
        h = placed.added(h, Attention(c, self.heads, name="attn2")(_norm(c, "norm2")(h), context))
        h = placed.added(h, GEGLU(c, name="ff")(_norm(c, "norm3")(h)))
        return h, each


class Attention(nn.Module):
    """x (batch, length, channels) attends to context (batch, tokens, features)."""

    config: UNetConfig
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        c, width = self.config, x.shape[-1]
        q, k, v = (
            placed.in_heads(dense(c, width, name, bias=False)(of), self.heads)  # (batch, length, heads, width / heads)
            for name, of in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        attend = DotProductAttention(implementation=c.attention, blocks=True, name="core")
        return dense(c, width, "to_out")(attend(q, k, v).reshape(x.shape))


class GEGLU(nn.Module):
    """Two linear layers; half of what the first gives passes as far as the GELU of the other half lets it."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, width = self.config, x.shape[-1]
        value, gate = jnp.split(dense(c, 8 * width, "net_0")(x), 2, axis=-1)  # (batch, length, 4 channels) each
        return dense(c, width, "net_2")(value * jax.nn.gelu(gate, approximate=False))


class _Time(nn.Module):
    """Two linear layers with a SiLU between them."""

    features: int
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = dense(self, self.features, "linear_1")(x.astype(self.dtype))
        return dense(self, self.features, "linear_2")(nn.silu(x))


def _waves(numbers: jax.Array, features: int) -> jax.Array:
    """Cosines and then sines of the numbers, (..., ) -> (..., features), float32; the wavelengths grow to 10,000."""
    rates = np.exp(-np.log(10_000.0) * np.arange(features // 2) / (features // 2)).astype(np.float32)
    angles = numbers.astype(jnp.float32)[..., None] * rates.reshape((1,) * numbers.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _resnet(c: UNetConfig, width: int, number: int) -> nn.Module:
    """Called within a compact method."""
    return computed_again(Resnet, c.remat)(c, width, name=f"resnets_{number}")


def _norm(c: UNetConfig, name: str) -> placed.LayerNorm:
    return placed.LayerNorm(LAYER_NORM, dtype=c.dtype, param_dtype=c.param_dtype, name=name)


def _check(
    c: UNetConfig, latents: jax.Array, context: jax.Array, pooled: jax.Array | None, sizes: jax.Array | None
) -> None:
    if latents.ndim != 4 or latents.shape[-1] != c.channels:
        raise ValueError(f"the latents are {latents.shape}, expected (batch, height, width, {c.channels})")
    if context.ndim != 3 or context.shape[-1] != c.context_width:
        raise ValueError(f"the context is {context.shape}, expected (batch, length, {c.context_width})")
    expected = {"pooled": (len(latents), c.pooled), "sizes": (len(latents), SIZES)}
    for name, given in (("pooled", pooled), ("sizes", sizes)):
        if (given is None) != (c.added is None):
            raise ValueError(
                f"{name}= is for a UNet with added conditions (SDXL) and for no other; this one has added={c.added}"
            )
        if given is not None and given.shape != expected[name]:
            raise ValueError(f"{name} is {given.shape}, expected {expected[name]}")
