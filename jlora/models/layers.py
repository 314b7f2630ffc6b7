"""The layers that the models are built of: linear, norm, table, in the dtypes of a config."""

import math
from collections.abc import Callable
from typing import Any, Protocol

from flax import linen as nn

from jlora.models import placed


class Dtypes(Protocol):
    """The config of any model: `dtype` is computed in, `param_dtype` stored."""

    @property
    def dtype(self) -> Any: ...
    @property
    def param_dtype(self) -> Any: ...


class Normed(Dtypes, Protocol):
    """A config with the epsilon of its norms."""

    @property
    def epsilon(self) -> float: ...


class Wide(Dtypes, Protocol):
    """A config with the width of the residual stream."""

    @property
    def width(self) -> int: ...


def dense(
    c: Dtypes,
    features: int,
    name: str,
    *,
    std: float = 0.02,
    bias: bool = True,
    init: Callable[..., Any] | None = None,
    **options: Any,
) -> placed.Dense:
    """A linear layer whose kernel starts as N(0, std^2), or as `init` draws it; `options` are those of `nn.Dense`."""
    init = nn.initializers.normal(std) if init is None else init
    return placed.Dense(
        features, use_bias=bias, dtype=c.dtype, param_dtype=c.param_dtype, kernel_init=init, name=name, **options
    )


def norm(c: Normed, name: str) -> placed.LayerNorm:
    """A LayerNorm over the features."""
    return placed.LayerNorm(c.epsilon, dtype=c.dtype, param_dtype=c.param_dtype, name=name)


def embed(c: Wide, rows: int, name: str, *, std: float = 0.02) -> placed.Embed:
    """A table of vectors that starts as N(0, std^2)."""
    init = nn.initializers.normal(std)
    return placed.Embed(rows, c.width, c.dtype, c.param_dtype, embedding_init=init, name=name)


def residual_std(layers: int) -> float:
    """Deviation of layers that write to the residual stream: smaller, since 2 * layers of them add up there."""
    return 0.02 / math.sqrt(2 * layers)
