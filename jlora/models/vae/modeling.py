"""The autoencoder of Stable Diffusion in Flax linen: images to latents of an eighth of their side, and back.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752; names of the
parts as in diffusers' `AutoencoderKL`.
"""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models import fields, placed
from jlora.models.architecture import Head, check_head
from jlora.models.attention import DotProductAttention, Implementation
from jlora.models.layers import dense
from jlora.models.resnet import Downsample, Padding, Resnet, Upsample, conv, group_norm
from jlora.models.stack import check_remat, computed_again

BELOW: Padding = ((0, 1), (0, 1))  # the encoder's strided convolutions see a row more below and a column more at right
LOGVAR = (-30.0, 20.0)


@dataclass(frozen=True)
class VAEConfig:
    """The shape of an autoencoder. The default is that of Stable Diffusion 1.x and 2.x.

    Attributes:
      size: side of the images that it was trained on, in pixels.
      channels, latents: channels of the images and of the latents.
      widths: channels at each resolution, from the finest; multiples of `groups`.
      layers: residual blocks at each resolution of the encoder; the decoder has one more.
      groups, epsilon: of the norms.
      scaling: factor by which latents are multiplied before a UNet sees them, so that their variance is about 1.
      upcast: it overflows in float16, says its config.json. jlora computes float16 in float32 in any case.
      head: "none": there is no other.
      dtype, param_dtype: of the computation and of the parameters. Norms and softmax are float32 in any case.
      scan: has nothing to act on here; all models have it.
      remat: compute each residual block's activations again in the backward pass; True, or the name of a policy.
      attention: the kernel, "auto", "xla" or "cudnn"; see `jlora.models.attention.DotProductAttention`.
    """

    size: fields.Pixels = 512
    channels: fields.Channels = 3
    latents: fields.Channels = 4
    widths: Annotated[tuple[int, ...], fields.Several(fields.Whole(1, 2**14), 8)] = (128, 256, 512, 512)
    layers: Annotated[int, fields.Whole(1, 16)] = 2
    groups: fields.Heads = 32
    epsilon: fields.Epsilon = 1e-6
    scaling: Annotated[float, fields.Real(0.0, 1e6, "low")] = 0.18215
    upcast: bool = True
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
        if any(width % self.groups for width in self.widths):
            raise fields.FieldError(
                f"widths={self.widths} are not all multiples of groups={self.groups}", "widths", "groups"
            )

    @property
    def factor(self) -> int:
        """Pixels of the image to one of the latents, along each side."""
        return 2 ** (len(self.widths) - 1)


PRESETS = {"sd15-vae": VAEConfig(), "sdxl-vae": VAEConfig(size=1024, scaling=0.13025)}


class VAE(nn.Module):
    """images -> {"out": the images again}, by `encode` and `decode`, which `apply(..., method="encode")` calls.

    Images are (batch, height, width, channels), in [-1, 1]; sides are multiples of `config.factor`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = VAE(VAEConfig(widths=(8, 16), layers=1, groups=4))
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
      >>> encoded = model.apply({"params": params}, jnp.zeros((2, 8, 12, 3)), method="encode")
      >>> encoded["mean"].shape
      (2, 4, 6, 4)
      >>> model.apply({"params": params}, encoded["mean"], method="decode").shape
      (2, 8, 12, 3)
    """

    config: VAEConfig

    def setup(self) -> None:
        c = self.config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = conv(c, 2 * c.latents, None, side=1)
        self.post_quant_conv = conv(c, c.latents, None, side=1)

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Encodes and decodes the mean."""
        return {"out": self.decode(self.encode(images)["mean"])}

    def encode(self, images: jax.Array) -> dict[str, jax.Array]:
        """Images -> {"mean", "logvar"}: a Gaussian for each latent, (batch, height, width, latents), float32.

        A UNet sees `scaling * sample`, see `sampled`.

        Raises:
          ValueError: for sides that are no multiples of `config.factor`, and for other channels.
        """
        c = self.config
        if images.ndim != 4 or images.shape[-1] != c.channels or any(n % c.factor for n in images.shape[1:3]):
            raise ValueError(
                f"the images are {images.shape}, expected (batch, height, width, {c.channels}) with sides that are "
                f"multiples of {c.factor}"
            )
        moments = placed.output(self.quant_conv(self.encoder(images.astype(c.dtype))))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return {"mean": mean, "logvar": jnp.clip(logvar, *LOGVAR)}

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents (batch, height, width, latents), unscaled -> images, float32, about [-1, 1]."""
        c = self.config
        if latents.ndim != 4 or latents.shape[-1] != c.latents:
            raise ValueError(f"the latents are {latents.shape}, expected (batch, height, width, {c.latents})")
        return placed.output(self.decoder(self.post_quant_conv(latents.astype(c.dtype))))


def sampled(encoded: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """Latents drawn from the Gaussians that `VAE.encode` gives: mean + exp(logvar / 2) n."""
    mean = encoded["mean"]
    return mean + jnp.exp(encoded["logvar"] / 2) * jax.random.normal(key, mean.shape, mean.dtype)


class Encoder(nn.Module):
    """images -> (batch, height / factor, width / factor, 2 latents)."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        h = conv(c, c.widths[0], "conv_in")(x)
        for i, width in enumerate(c.widths):
            h = Level(c, width, c.layers, down=i + 1 < len(c.widths), name=f"down_blocks_{i}")(h)
        h = Middle(c, name="mid_block")(h)
        return conv(c, 2 * c.latents, "conv_out")(nn.silu(group_norm(c, "conv_norm_out")(h)))


class Decoder(nn.Module):
    """latents -> images."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        h = Middle(c, name="mid_block")(conv(c, c.widths[-1], "conv_in")(x))
        for i, width in enumerate(reversed(c.widths)):
            h = Level(c, width, c.layers + 1, up=i + 1 < len(c.widths), name=f"up_blocks_{i}")(h)
        return conv(c, c.channels, "conv_out")(nn.silu(group_norm(c, "conv_norm_out")(h)))


class Level(nn.Module):
    """Residual blocks at one resolution, then half or twice of it."""

    config: VAEConfig
    width: int
    layers: int
    down: bool = False
    up: bool = False

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        c = self.config
        for j in range(self.layers):
            h = _resnet(c, self.width, j)(h)
        if self.down:
            h = Downsample(c, BELOW, name="downsamplers_0")(h)
        if self.up:
            h = Upsample(c, name="upsamplers_0")(h, 2 * h.shape[1], 2 * h.shape[2])
        return h


class Middle(nn.Module):
    """Two residual blocks, attention between them."""

    config: VAEConfig

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        c = self.config
        h = _resnet(c, c.widths[-1], 0)(h)
        h = Attention(c, name="attentions_0")(h)
        return _resnet(c, c.widths[-1], 1)(h)


class Attention(nn.Module):
    """x + the attention of all pixels to each other, of one head."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, width = self.config, x.shape[-1]
        h = group_norm(c, "group_norm")(x).reshape(len(x), -1, width)  # (batch, height width, channels)
        q, k, v = (placed.in_heads(dense(c, width, name)(h), 1) for name in ("to_q", "to_k", "to_v"))  # of one head
        attend = DotProductAttention(implementation=c.attention, blocks=True, name="core")
        h = dense(c, width, "to_out")(attend(q, k, v).reshape(h.shape))
        return placed.added(x, h.reshape(x.shape))


def _resnet(c: VAEConfig, width: int, number: int) -> nn.Module:
    """Called within a compact method."""
    return computed_again(Resnet, c.remat)(c, width, name=f"resnets_{number}")
