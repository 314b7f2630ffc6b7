"""Rotary position embeddings and the ways to stretch them: each is data, and a pure function to its frequencies.

Features i and i + width / 2 of a head are a pair, turned by the angle `position * frequency_i`: scores then depend on
the distance of two tokens alone. Source: Su et al., "RoFormer", arXiv 2104.09864, eq. 34; the pairs lie as transformers
has them. Fields are named as in a config.json.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.fields import FieldError, OptionalRows, Real, check_fields

Turn = tuple[jax.Array, jax.Array]
"""Cosine and sine of the angles, each (batch or 1, length, 1, width / 2), float32."""
Stretched = tuple[jax.Array, float]
"""The frequencies, (width / 2), float32, and what queries and keys are multiplied by."""
Theta = Annotated[float, Real(1.0, 1e15, "low")]
Factor = Annotated[float, Real(1.0, 2.0**20)]
Turns = Annotated[float, Real(1e-6, 2.0**20)]
OptionalTurns = Annotated[float | None, Real(1e-6, 2.0**20)]
Scale = Annotated[float | None, Real(0.0, 2.0**10)]
OptionalFactor = Annotated[float | None, Real(2.0**-10, 2.0**10)]


class _Checked:
    """A dataclass whose fields hold what their types say."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Default(_Checked):
    """`frequency_i = theta^(-2i / width)`."""

    rope_theta: Theta = 10000.0

    def frequencies(self, width: int, context: int, positions: jax.Array) -> Stretched:
        return jnp.asarray(_plain(width, self.rope_theta)), 1.0

    def longest(self, context: int) -> int:
        return context


@dataclass(frozen=True)
class Linear(_Checked):
    """`frequency_i / factor`: positions are interpolated.

    Source: Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", arXiv
    2306.15595, eq. 4.
    """

    factor: Factor
    rope_theta: Theta = 10000.0

    def frequencies(self, width: int, context: int, positions: jax.Array) -> Stretched:
        return jnp.asarray(_plain(width, self.rope_theta) / np.float32(self.factor)), 1.0

    def longest(self, context: int) -> int:
        return round(self.factor * context)


@dataclass(frozen=True)
class Dynamic(_Checked):
    """`theta' = theta (factor * length / context - factor + 1)^(width / (width - 2))` for a length beyond the context.

    The length is that of a call's last position in all of its rows, as in transformers: within the context this is
    `Default`. Keys in a cache stay as they were turned when they were new.

    Source: "NTK-aware scaled RoPE" by bloc97, and its dynamic form by emozilla, both on r/LocalLLaMA, June 2023; the
    formula in Peng et al., "YaRN", arXiv 2309.00071, section 3.1 and appendix A.
    """

    factor: Factor
    rope_theta: Theta = 10000.0

    def frequencies(self, width: int, context: int, positions: jax.Array) -> Stretched:
        length = jnp.maximum(positions.max() + 1, context).astype(jnp.float32)
        stretch = self.factor * length / context - (self.factor - 1)  # 1 within the context
        theta = self.rope_theta * stretch ** (width / (width - 2))
        return 1 / theta ** jnp.asarray(_exponents(width)), 1.0

    def longest(self, context: int) -> int:
        return round(self.factor * context)


@dataclass(frozen=True)
class Llama3(_Checked):
    """Llama 3.1's: short waves stay, long ones are interpolated, and those between are mixed.

    A wave of length `2 pi / frequency` turns `r = original / wavelength` times over the original context. Above
    `high_freq_factor` turns it stays, below `low_freq_factor` its frequency is divided by `factor`, and between them it
    is `(1 - s) frequency / factor + s frequency` with `s = (r - low) / (high - low)`.

    Source: `apply_scaling` in https://github.com/meta-llama/llama-models (factor 8, low 1, high 4, original 8192).

    Attributes:
      original_max_position_embeddings: tokens of the original context; the model's context when None.
    """

    factor: Factor
    low_freq_factor: Turns
    high_freq_factor: Turns
    original_max_position_embeddings: OptionalRows = None
    rope_theta: Theta = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.low_freq_factor, self.high_freq_factor
        if not low < high:
            raise FieldError(
                f"low_freq_factor={low} is not below high_freq_factor={high}", "low_freq_factor", "high_freq_factor"
            )

    def frequencies(self, width: int, context: int, positions: jax.Array) -> Stretched:
        plain = _plain(width, self.rope_theta)
        turns = np.float32(self.original_max_position_embeddings or context) * plain / np.float32(2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        share = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
        return jnp.asarray((1 - share) * plain / np.float32(self.factor) + share * plain), 1.0

    def longest(self, context: int) -> int:
        return context


@dataclass(frozen=True)
class Yarn(_Checked):
    """YaRN: interpolation by parts of the frequencies, and warmer or colder attention.

    Pair `d(n) = width ln(original / (2 pi n)) / (2 ln theta)` turns n times over the original context. Pairs up to
    `d(beta_fast)` keep their frequency, those from `d(beta_slow)` on have it divided by `factor`, with a linear ramp
    between them. Queries and keys are multiplied by `0.1 ln(factor) + 1`.

    Source: Peng et al., "YaRN", arXiv 2309.00071, eq. 17 to 23; where None is said, the defaults of transformers.

    Attributes:
      original_max_position_embeddings: tokens of the original context; the model's context when None.
      attention_factor: of queries and keys, in place of the formula.
      beta_fast, beta_slow: turns; 32 and 1 when None.
      mscale, mscale_all_dim: of DeepSeek: with both, the ratio of `0.1 mscale ln(factor) + 1` to that of the other.
      truncate: the ramp's ends are whole numbers, rounded outwards; when None too.
    """

    factor: Factor
    original_max_position_embeddings: OptionalRows = None
    rope_theta: Theta = 10000.0
    attention_factor: OptionalFactor = None
    beta_fast: OptionalTurns = None
    beta_slow: OptionalTurns = None
    mscale: Scale = None
    mscale_all_dim: Scale = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fast, slow = self.beta_fast or 32, self.beta_slow or 1
        if fast < slow:
            raise FieldError(f"beta_fast={fast} is below beta_slow={slow}", "beta_fast", "beta_slow")

    def frequencies(self, width: int, context: int, positions: jax.Array) -> Stretched:
        original = self.original_max_position_embeddings or context

        def pair(turns: float) -> float:
            return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.rope_theta))

        first, last = pair(self.beta_fast or 32), pair(self.beta_slow or 1)
        if self.truncate is not False:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        last = last if last != first else last + 0.001
        ramp = np.clip((np.arange(width // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first), 0, 1)
        plain = _plain(width, self.rope_theta)
        return jnp.asarray(plain / np.float32(self.factor) * ramp + plain * (1 - ramp)), self._amplitude()

    def _amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        log = 0.1 * math.log(max(self.factor, 1))
        if self.mscale and self.mscale_all_dim:
            return (self.mscale * log + 1) / (self.mscale_all_dim * log + 1)
        return log + 1

    def longest(self, context: int) -> int:
        return max(context, round(self.factor * (self.original_max_position_embeddings or context)))


Rope = Default | Linear | Dynamic | Llama3 | Yarn
"""Each has `frequencies(width, context, positions)`, and `longest(context)`: the longest sequence, in tokens, of a
model whose config.json says `context`."""


def turn(rope: Rope, width: int, context: int, positions: jax.Array) -> Turn:
    """Cosines and sines that `turned` takes, of positions (batch or 1, length), for heads of `width` features."""
    frequencies, amplitude = rope.frequencies(width, context, positions)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def turned(x: jax.Array, turn: Turn) -> jax.Array:
    """Queries or keys (batch, length, heads, width) at their positions. Float32 inside."""
    cos, sin = turn
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # (batch, length, heads, width / 2) each
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _exponents(width: int) -> np.ndarray:
    return np.arange(0, width, 2, dtype=np.float32) / np.float32(width)


def _plain(width: int, theta: float) -> np.ndarray:
    """Theta^(-2i / width), in float32 as it was in training: what is lost there grows with the position."""
    return np.float32(1) / np.float32(theta) ** _exponents(width)
