"""Attention of queries, keys and values, as a module of its own: what acts on keys and values finds them there."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Implementation = Literal["xla", "cudnn"]


class DotProductAttention(nn.Module):
    """`softmax(scale q k^T + bias) v`, without parameters, through `jax.nn.dot_product_attention`.

    Attributes:
      causal: a query sees the keys up to its own position. With more keys than queries the last ones belong together,
        and all keys before the first query's are seen, by all: a prefix.
      window: of a causal attention: a query sees so many keys, its own the last of them. None for all.
      scale: 1 / sqrt(width) when None.
      dropout: of the attention weights, in [0, 1). In training it needs the plain form: no flash attention has it.
      deterministic: no dropout.
      implementation: "cudnn" is flash attention; None takes it where the device and the operands allow it.
    """

    takes_prefix: ClassVar[bool] = True  # whoever puts keys before the others widens the mask, and nothing else
    causal: bool = False
    window: int | None = None
    scale: float | None = None
    dropout: float = 0.0
    deterministic: bool = True
    implementation: Implementation | None = None

    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """(batch, length, heads, width) -> the same. The mask is True at the keys that are seen.

        Scores and softmax are float32 in any case. A query that sees no key gets the mean of all values.

        Args:
          query: (batch, length, heads, width).
          key, value: (batch, keys, key heads, width): each key head serves heads / key heads queries, in order.
          mask: broadcastable to (batch, heads, length, keys), bool.
          bias: added to the scores, broadcastable as the mask is. With fewer keys it is that of the last ones: a prefix
            has none.
        """
        length, keys = query.shape[1], key.shape[1]
        mask, causal = _masked(mask, length, keys, self.causal, self.window)
        if bias is not None and bias.shape[-1] < keys:
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (keys - bias.shape[-1], 0)))
        if self.dropout and not self.deterministic:
            mask, _ = _masked(mask, length, keys, causal, None, spelt=True)
            weights = _weights(query, key, mask, bias, self.scale).astype(value.dtype)
            return _mixed(nn.Dropout(self.dropout, deterministic=False)(weights), value)
        implementation = self.implementation or ("cudnn" if _flash(query) else "xla")
        if implementation == "cudnn" and mask is not None:  # which wants to see every query's row
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, keys))
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, scale=self.scale, is_causal=causal, implementation=implementation
        )


def causal_mask(length: int, keys: int, window: int | None = None) -> np.ndarray:
    """What the last `length` of `keys` positions see: (1, 1, length, keys), bool. Keys before them are seen by all."""
    before = keys - length
    distance = before + np.arange(length)[:, None] - np.arange(keys)
    seen = distance >= 0
    if window is not None:
        seen &= (distance < window) | (np.arange(keys) < before)
    return seen[None, None]


def _masked(
    mask: jax.Array | None, length: int, keys: int, causal: bool, window: int | None, *, spelt: bool = False
) -> tuple[jax.Array | None, bool]:
    """The mask, and whether `causal` remains to be said: flash attention skips what it is not told in a mask."""
    if not causal or (length == keys and window is None and not spelt):
        return mask, causal
    past = jnp.asarray(causal_mask(length, keys, window))
    return past if mask is None else mask & past, False


def _flash(query: jax.Array) -> bool:
    width = query.shape[-1]
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return half and width % 8 == 0 and width <= 128 and jax.default_backend() == "gpu"


def _weights(
    query: jax.Array, key: jax.Array, mask: jax.Array | None, bias: jax.Array | None, scale: float | None
) -> jax.Array:
    """The attention weights, (batch, heads, length, keys), float32."""
    groups = query.shape[2] // key.shape[2]
    key = jnp.repeat(key, groups, axis=2) if groups > 1 else key
    scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return nn.softmax(scores)


def _mixed(weights: jax.Array, value: jax.Array) -> jax.Array:
    groups = weights.shape[1] // value.shape[2]
    value = jnp.repeat(value, groups, axis=2) if groups > 1 else value
    return jnp.einsum("bhts,bshd->bthd", weights, value)
