"""Double quantisation: the scales of blocks in 8 bits, with scales of their own (arXiv 2305.14314, section 3)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.quant.formats import look_up, to_unit

GROUP = 256  # scales that share one of the second level


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nested:
    """Scales `map[codes] * scales + offset` of one weight, or of each of a stack, which is the leading axes of all.

    The paper writes of 8-bit floats; bitsandbytes, whose files these are, has a map of 256 numbers that are dense near
    zero.

    Attributes:
      codes: (*stack, ...) uint8, one to each block of the weight.
      scales: (*stack, groups) float32: the largest |scale - offset| of each 256 codes in row-major order.
      offset: (*stack,) float32: the mean of the scales.
    """

    codes: jax.Array
    scales: jax.Array
    offset: jax.Array

    def decode(self) -> jax.Array:
        """The scales, float32, in the shape of the codes."""
        stack = self.offset.ndim
        lead, inner = self.codes.shape[:stack], self.codes.shape[stack:]
        number, groups = math.prod(inner), self.scales.shape[-1]
        if self.scales.shape[:-1] != lead or self.offset.shape != lead or groups != -(-number // GROUP):
            raise ValueError(
                f"the scales contradict each other: {self.codes.shape} codes of scales want scales of the second level "
                f"of shape {(*lead, -(-number // GROUP))} and offsets of shape {lead}, not {self.scales.shape} and "
                f"{self.offset.shape}; a shard of them has to keep whole groups of {GROUP}"
            )
        values = lax.platform_dependent(self.codes, tpu=_selected, default=_gathered)
        each = jnp.repeat(self.scales, GROUP, axis=-1)[..., :number].reshape(self.codes.shape)
        return values * each + self.offset.reshape(*lead, *[1] * len(inner))


def _gathered(codes: jax.Array) -> jax.Array:
    return jnp.asarray(dynamic_map())[codes]


@jax.jit
def _selected(codes: jax.Array) -> jax.Array:
    """The same by the bits of the distance to 0. For a gather a TPU lays the codes of all layers of a stack out anew,
    outside of its loop: four times their bytes, as they are few to a row, for a v5e.
    """
    table = dynamic_map()
    zero = int(np.flatnonzero(table == 0)[0])  # from here on the map is what it is below, with the other sign, and 1
    below = codes < zero
    distance = jnp.where(below, zero - codes, codes - zero)
    values = look_up(distance, tuple(map(float, table[zero:-1])))
    return jnp.where(codes == len(table) - 1, table[-1], jnp.where(below, -values, values))


def encode(scales: jax.Array, stack: int) -> Nested:
    """Quantises scales, of which the first `stack` axes are a stack."""
    lead, inner = scales.shape[:stack], scales.shape[stack:]
    number = math.prod(inner)
    groups = -(-number // GROUP)
    flat = scales.reshape(*lead, number)
    offset = jnp.mean(flat, axis=-1)
    # The sum of scales near float32's largest is none; all others have bitsandbytes' mean, bit for bit.
    far = jnp.mean(flat * np.float32(2.0**-32), axis=-1) * np.float32(2.0**32)
    offset = jnp.where(jnp.isfinite(offset), offset, far)
    centred = _grouped(flat - offset[..., None], groups)  # (*stack, groups, 256)
    largest = jnp.max(jnp.abs(centred), axis=-1)
    codes = nearest(to_unit(centred, largest, short=number % GROUP != 0)).reshape(*lead, groups * GROUP)[..., :number]
    return Nested(codes.reshape(scales.shape), largest, offset)


def _grouped(flat: jax.Array, groups: int) -> jax.Array:
    padding = [(0, 0)] * (flat.ndim - 1) + [(0, groups * GROUP - flat.shape[-1])]
    return jnp.pad(flat, padding).reshape(*flat.shape[:-1], groups, GROUP)


def nearest(x: jax.Array) -> jax.Array:
    """The code of the nearest number of the map, uint8; of two that are as near, the lower."""
    table = dynamic_map()
    middle = (table[:-1] + table[1:]) / 2
    return jnp.searchsorted(jnp.asarray(middle), x, side="left").astype(jnp.uint8)


@functools.cache
def dynamic_map() -> np.ndarray:
    """The signed dynamic map of 8 bits, (256,) float32, ascending from -0.993 to 1.

    For each power of ten from 1e-6 to 1 the midpoints of so many equal intervals between 0.1 and 1 as the bits that
    are left allow (1, 2, ... 64), with both signs, and 0 and 1.

    Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561; the variant of
    bitsandbytes.
    """
    values = [0.0, 1.0]
    for power in range(7):  # each step rounded to float32 as bitsandbytes' is, so that all 256 are its own
        at = np.arange(2**power + 1)
        step = np.float64(np.float32(np.float32(0.9) / np.float32(2**power)))
        low, high = np.float64(np.float32(0.1)) + step * at, 1 - step * at[::-1]
        edges = np.where(at < len(at) // 2, low, high).astype(np.float32)
        sizes = np.float32(10.0 ** (power - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*sizes, *-sizes]
    return np.sort(np.asarray(values, np.float32))
