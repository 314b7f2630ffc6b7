"""The parts that a UNet and a VAE share: norms of groups, convolutions, residual blocks, other resolutions."""

import re
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jlora.models import placed
from jlora.models.layers import Dtypes, dense
from jlora.models.tensors import Leaf, convolution, linear, norm

Padding = tuple[tuple[int, int], tuple[int, int]]
EVEN: Padding = ((1, 1), (1, 1))


class Grouped(Dtypes, Protocol):
    """A config with the norms of groups of channels."""

    @property
    def groups(self) -> int: ...
    @property
    def epsilon(self) -> float: ...


def group_norm(c: Grouped, name: str, epsilon: float | None = None) -> placed.GroupNorm:
    """A norm over the pixels and the channels of each group; statistics are float32."""
    return placed.GroupNorm(c.groups, epsilon=epsilon or c.epsilon, dtype=c.dtype, param_dtype=c.param_dtype, name=name)


def conv(
    c: Dtypes, features: int, name: str | None, *, side: int = 3, stride: int = 1, padding: Padding | None = None
) -> placed.Conv:
    """A convolution with a square kernel, which keeps the resolution unless it has a stride."""
    edge = side // 2
    return placed.Conv(
        features, (side, side), (stride, stride), padding or ((edge, edge), (edge, edge)), dtype=c.dtype,
        param_dtype=c.param_dtype, name=name,
    )  # fmt: skip


class Resnet(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + of the time))); x by a 1 x 1 convolution where the width changes."""

    config: Any
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """(batch, height, width, channels) and (batch, features) -> (batch, height, width, self.width)."""
        c = self.config
        h = conv(c, self.width, "conv1")(nn.silu(group_norm(c, "norm1")(x)))
        if time is not None:
            h = placed.added(h, dense(c, self.width, "time_emb_proj")(nn.silu(time))[:, None, None, :])
        h = conv(c, self.width, "conv2")(nn.silu(group_norm(c, "norm2")(h)))
        if x.shape[-1] != self.width:
            x = conv(c, self.width, "conv_shortcut", side=1)(x)
        return placed.added(x, h)


class Downsample(nn.Module):
    """Half the resolution, by a convolution of stride 2."""

    config: Any
    padding: Padding = EVEN

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return conv(self.config, x.shape[-1], "conv", stride=2, padding=self.padding)(x)


class Upsample(nn.Module):
    """Another resolution, by the nearest pixel; then a convolution."""

    config: Any

    @nn.compact
    def __call__(self, x: jax.Array, height: int, width: int) -> jax.Array:
        return conv(self.config, x.shape[-1], "conv")(nearest(x, height, width))


def nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    """(batch, h, w, channels) -> (batch, height, width, channels): the pixel at floor(i h / height) for each i.

    >>> nearest(jnp.arange(2.0).reshape(1, 1, 2, 1), 1, 5).ravel().tolist()
    [0.0, 0.0, 0.0, 1.0, 1.0]
    """
    batch, h, w, channels = x.shape
    if (height, width) == (2 * h, 2 * w):  # without a gather, whose derivative would be a scatter
        wide = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, h, 2, w, 2, channels))
        high = wide.reshape(batch, height, w, 2, channels)  # one axis at a time, which JAX can place on Explicit axes
        return high.reshape(batch, height, width, channels)
    rows, columns = (np.arange(n) * old // n for n, old in ((height, h), (width, w)))
    return x[:, rows][:, :, columns]


# -- tensors -----------------------------------------------------------------------------------------------------------


def rows(path: str, *, time: bool = False, shortcut: bool = False) -> list[Leaf]:
    """The rows of a residual block, of which diffusers' checkpoints have the same names."""
    parts = [
        norm("norm1", "norm1"),
        convolution("conv1", "conv1"),
        linear("time_emb_proj", "time_emb_proj") if time else [],
        norm("norm2", "norm2"),
        convolution("conv2", "conv2"),
        convolution("conv_shortcut", "conv_shortcut") if shortcut else [],
    ]
    key = dotted(path)
    return [
        row._replace(path=f"{path}/{row.path}", keys=tuple(f"{key}.{own}" for own in row.keys))
        for part in parts
        for row in part
    ]


def dotted(path: str) -> str:
    """The name in diffusers' checkpoints of a part whose path has the numbers that it is counted with.

    >>> dotted("encoder/down_blocks_0/resnets_1")
    'encoder.down_blocks.0.resnets.1'
    """
    return re.sub(r"(blocks|resnets|attentions|samplers)_(\d+)", r"\1.\2", path).replace("/", ".")
