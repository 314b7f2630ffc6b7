"""The keys and values of the tokens that a decoder has seen, so that the next one costs one position."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.placed import beside


class KeyValue(NamedTuple):
    """Keys and values of one layer, (batch, slots, key heads, width) each; of all layers with one more axis first."""

    key: jax.Array
    value: jax.Array


class Cache(NamedTuple):
    """Tokens that a decoder has seen. The slots of a row are its tokens in order; padding takes slots, and is not seen.

    Attributes:
      layers: a `KeyValue` for each layer, or one stacked on axis 0 where the layers are scanned.
      real: (batch, slots), bool: the slot holds a token that is no padding.
      used: (), int32: the slots that are taken, the same in all rows. Of an empty cache a NumPy scalar, so that a call
        under jit knows while it is traced that it is the first one.
      virtual: (), int32: the slots before those of the first token, of trained vectors that are no tokens.
    """

    layers: Any
    real: jax.Array
    used: jax.Array | np.ndarray
    virtual: jax.Array | np.ndarray = np.zeros((), np.int32)

    def with_prompt(self, length: int) -> "Cache":
        """An empty cache with as many slots more, for a trained prompt that the first call writes before its tokens."""
        longer = lambda x: jnp.pad(x, [(0, length if axis == x.ndim - 3 else 0) for axis in range(x.ndim)])
        real = jnp.pad(self.real, ((0, 0), (0, length)))
        return Cache(jax.tree.map(longer, self.layers), real, self.used, np.asarray(length, np.int32))


class Context(NamedTuple):
    """Inputs of one call that all layers share.

    Attributes:
      mask: (batch, 1, 1 or length, keys), bool, True at the keys that are seen; None for all.
      start: (), int32: the slot of the first token, None without a cache.
    """

    mask: jax.Array | None
    start: jax.Array | np.ndarray | None


def empty(*, batch: int, slots: int, layers: int, heads: int, width: int, dtype: Any, stacked: bool) -> Cache:
    """A cache that holds nothing yet.

    Args:
      batch, slots: rows, and the longest sequence with its padding.
      layers, heads, width: of the decoder: layers, key heads and features of each.
      dtype: of keys and values.
      stacked: the decoder scans over its layers.
    """

    def one(*before: int) -> KeyValue:
        return KeyValue(*(jnp.zeros((*before, batch, slots, heads, width), dtype) for _ in range(2)))

    return Cache(
        one(layers) if stacked else tuple(one() for _ in range(layers)),
        jnp.zeros((batch, slots), bool),
        np.zeros((), np.int32),
    )


def opened(cache: Cache | None, mask: jax.Array | None, tokens: jax.Array) -> tuple[Context, Cache | None]:
    """Inputs that the layers of a causal decoder share, and the cache with the new tokens' slots taken.

    Args:
      cache: None for a call without one.
      mask: (batch, length), bool, False at padding; None for no padding. Without a cache also (batch, length, length),
        what each token sees among those before it, as where several texts share a row.
      tokens: (batch, length).
    """
    if cache is None:
        return Context(None if mask is None else seen_by(mask), None), None
    length, slots = tokens.shape[1], cache.real.shape[1]
    try:
        full = int(cache.used) + length > slots  # a number first: within a trace every operation is traced
    except jax.errors.ConcretizationTypeError:  # under jit the outputs tell, see `within`
        full = False
    if full:
        raise ValueError(f"the cache has {slots} slots, {int(cache.used)} of them taken: no room for {length} tokens")
    new = jnp.ones_like(tokens, bool) if mask is None else mask.astype(bool)
    real = jax.lax.dynamic_update_slice(beside(cache.real, new), new, (0, cache.used))
    order = cache.used + jnp.arange(length)[:, None] >= jnp.arange(slots)[None]  # (length, slots)
    seen = real[:, None, None, :] & order[None, None]
    return Context(seen, cache.used), cache._replace(real=real, used=cache.used + length)


def within(cache: Cache, out: jax.Array) -> jax.Array:
    """A decoder's output; NaN if more tokens were written than the cache has slots."""
    return jnp.where(cache.used <= cache.real.shape[1], out, jnp.nan)


def seen_by(mask: jax.Array) -> jax.Array:
    """A mask of tokens, (batch, length), or of pairs, (batch, length, length), for all heads: (batch, 1, ..., keys)."""
    mask = mask.astype(bool)
    return mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]


def positions_of(mask: jax.Array) -> jax.Array:
    """Each token's position, (batch, length), int32: the tokens before it that are no padding."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


def write(layer: KeyValue | None, start: jax.Array | np.ndarray | None, key: jax.Array, value: jax.Array) -> KeyValue:
    """The keys and values to attend to: these, or all of the layer's slots with these written from `start` on."""
    if layer is None or start is None:
        return KeyValue(key, value)
    at: Sequence[Any] = (0, start, 0, 0)
    return KeyValue(
        *(
            jax.lax.dynamic_update_slice(beside(old, new), new.astype(old.dtype), at)
            for old, new in zip(layer, (key, value), strict=True)
        )
    )


def taken(cache: Cache, rows: jax.Array, *, stacked: bool) -> Cache:
    """The cache of other rows, such as those that survive in a beam search: rows (batch,), int32."""
    axis = 1 if stacked else 0
    layers = jax.tree.map(lambda x: jnp.take(x, rows, axis=axis), cache.layers)
    return cache._replace(layers=layers, real=jnp.take(cache.real, rows, axis=0))


def windowed(context: Context, window: int, length: int) -> Any:
    """The mask of a layer whose queries see `window` slots, their own the last of them.

    Without a cache it is the context's, None for none: there the attention itself has the window.
    """
    if context.start is None or context.mask is None:
        return context.mask
    distance = context.start + jnp.arange(length)[:, None] - jnp.arange(context.mask.shape[-1])[None]
    return context.mask & (distance < window)[None, None]
