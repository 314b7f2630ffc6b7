"""In place of an autoencoder: images are their own latents, for small models that draw pixels."""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models import fields


@dataclass(frozen=True)
class PixelsConfig:
    """The shape of latents that are images.

    Attributes:
      size: side of the images, in pixels.
      channels: of the images, 3 of colours.
    """

    size: fields.Pixels = 32
    channels: fields.Channels = 3
    dtype: Annotated[str, fields.OneOf(("float32",))] = "float32"
    param_dtype: Annotated[str, fields.OneOf(("float32",))] = "float32"

    def __post_init__(self) -> None:
        fields.check_fields(self)

    @property
    def latents(self) -> int:
        """Channels of the latents: those of the images."""
        return self.channels

    @property
    def factor(self) -> int:
        """Pixels of the image to one of the latents."""
        return 1

    @property
    def scaling(self) -> float:
        """Factor of the latents."""
        return 1.0


class Pixels(nn.Module):
    """images in [-1, 1] -> {"out": the same}; a `Pipeline`'s "vae" whose parameters are {}.

    Example:
      >>> import jax.numpy as jnp
      >>> images = jnp.ones((2, 4, 4, 3))
      >>> encoded = Pixels(PixelsConfig(size=4)).apply({"params": {}}, images, method="encode")
      >>> bool((encoded["mean"] == images).all()), float(jnp.exp(encoded["logvar"]).max())
      (True, 0.0)
    """

    config: PixelsConfig

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """See the class."""
        return {"out": images}

    def encode(self, images: jax.Array) -> dict[str, jax.Array]:
        """Images -> {"mean", "logvar"}, a Gaussian without variance."""
        x = images.astype(jnp.float32)
        return {"mean": x, "logvar": jnp.full_like(x, -jnp.inf)}

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents -> images, the same."""
        return latents.astype(jnp.float32)
