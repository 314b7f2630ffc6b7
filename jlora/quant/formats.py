"""Number formats of quantised weights: how a number within [-1, 1] becomes a code, and the code a number again."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Quantiles of the normal distribution within [-1, 1] (arXiv 2305.14314, appendix E), and the midpoints between them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_THRESHOLDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip

# bitsandbytes' 4-bit float by its bit pattern, a sign and three bits: not the one of the OCP (E2M1).
FP4_SIZES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4 = (*FP4_SIZES, *(-size for size in FP4_SIZES))
FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)  # the codes by their numbers; 0 and 8 are both zero
_ASCENDING = np.asarray(FP4, np.float32)[list(FP4_ORDER)]
FP4_THRESHOLDS = tuple(((_ASCENDING[1:] + _ASCENDING[:-1]) / 2).tolist())

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Format(NamedTuple):
    """One number format: `W = decode(codes) * scale`, the scale being the largest |W| of a block or an output channel.

    Attributes:
      name: "nf4".
      bits: of a code, 4 or 8.
      encode: numbers within [-1, 1], float32, to codes: uint8 below 16 of 4 bits, else of `dtype`.
      decode: codes to numbers within [-1, 1], float32.
      dtype: in which codes are held; of 4 bits there are two in a byte.
      blocks: whether a scale belongs to a block of consecutive weights; else to an output channel.
    """

    name: str
    bits: int
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    dtype: Any = jnp.uint8
    blocks: bool = True

    def __repr__(self) -> str:
        return self.name


def look_up(codes: jax.Array, table: tuple[float, ...], dtype: Any = jnp.float32) -> jax.Array:
    """`table[codes]` of 2^n numbers by the codes' bits: no gather, which no backend fuses into a product."""
    # Constants of the codes' own shape would be hoisted out of a scan over layers, and kept: one array a number.
    zero = (codes & 0).astype(dtype)
    values: list[Any] = [zero + jnp.asarray(value, dtype) for value in table]
    for bit in range(len(table).bit_length() - 1):
        up = (codes & (1 << bit)) != 0
        values = [jnp.where(up, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def over(x: jax.Array, largest: jax.Array) -> jax.Array:
    """`x * (1 / largest)`, 0 where the largest is; float32."""
    scale = jnp.where(largest == 0, 1, largest)
    down = jnp.where(scale > 2.0**120, np.float32(2.0**-20), 1)  # else 1 / scale is too small a number to be held
    return (x * down) * (1 / (scale * down))


def to_unit(x: jax.Array, largest: jax.Array, *, short: bool = False) -> jax.Array:
    """`x / largest`, (..., groups, n) by (..., groups), bit for bit as bitsandbytes computes it; 0 where all are.

    Args:
      x: float32.
      largest: the largest |x| of each group.
      short: whether the last group was filled up: it is divided, the others are multiplied with 1 / largest.
    """
    if not short:
        return over(x, largest[..., None])
    # Behind the barrier XLA does not see that all divisors are one, of which it would multiply with the reciprocal.
    last, scale = x[..., -1, :], jnp.where(largest == 0, 1, largest)[..., -1:]
    divisor = lax.optimization_barrier(jnp.broadcast_to(scale, last.shape))
    rest = over(x[..., :-1, :], largest[..., :-1, None])
    return jnp.concatenate([rest, (last / divisor)[..., None, :]], axis=-2)


def _count_above(x: jax.Array, thresholds: tuple[float, ...]) -> jax.Array:
    """The number of thresholds below x, uint8: a tie takes the lower code."""
    total = jnp.zeros(x.shape, jnp.uint8)
    for threshold in thresholds:
        total += (x > np.float32(threshold)).astype(jnp.uint8)
    return total


def _encode_nf4(x: jax.Array) -> jax.Array:
    return _count_above(x, NF4_THRESHOLDS)


def _encode_fp4(x: jax.Array) -> jax.Array:
    # As bitsandbytes on the CPU: 8 for a small number above zero, and the lower number of a tie. On CUDA it is 0, and
    # the one nearer to zero.
    return look_up(_count_above(x, FP4_THRESHOLDS), FP4_ORDER, jnp.uint8)


def _encode_int4(x: jax.Array) -> jax.Array:
    return jnp.round(x * 7).astype(jnp.int8).astype(jnp.uint8) & jnp.uint8(15)


def _decode_int4(codes: jax.Array) -> jax.Array:
    signed = (codes ^ jnp.uint8(8)).astype(jnp.int32) - 8
    return signed.astype(jnp.float32) / 7


_NF4 = Format("nf4", 4, _encode_nf4, lambda codes: look_up(codes, NF4))
_FP4 = Format("fp4", 4, _encode_fp4, lambda codes: look_up(codes, FP4))
_INT4 = Format("int4", 4, _encode_int4, _decode_int4)
_INT8 = Format(
    "int8",
    8,
    lambda x: jnp.round(x * 127).astype(jnp.int8),
    lambda codes: codes.astype(jnp.float32) / 127,
    jnp.int8,
    False,
)
_FP8 = Format(
    "fp8",
    8,
    lambda x: (x * 448).astype(jnp.float8_e4m3fn),
    lambda codes: codes.astype(jnp.float32) / 448,
    jnp.float8_e4m3fn,
    False,
)

FORMATS = {each.name: each for each in (_NF4, _FP4, _INT4, _INT8, _FP8)}


def format_of(name: Any) -> Format:
    """A format by its name, or the format itself.

    Raises:
      ValueError: for another name, naming the nearest.
      TypeError: for what is no name.
    """
    if isinstance(name, Format):
        return name
    if not isinstance(name, str):
        raise TypeError(
            f"a format is one of the names {', '.join(FORMATS)}, or a jlora.quant.Format; got {name!r:.200}, of type "
            f"{type(name).__name__}"
        )
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name.lower(), FORMATS, 1, 0.0)[0]
    raise ValueError(f"unknown format {name!r}: it is one of {', '.join(FORMATS)}; the nearest is {near!r}")
