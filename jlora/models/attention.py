"""Attention of queries, keys and values, as a module of its own: what acts on keys and values finds them there."""

import re
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
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
        if bias is not None and bias.shape[-1] < keys:
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (keys - bias.shape[-1], 0)))
        drops = self.dropout > 0 and not self.deterministic
        causal, window = self.causal, self.window if self.causal else None
        if causal and (length != keys or drops):  # a prefix: it has to be spelt out
            past = causal_mask(length, keys, window)
            mask, causal, window = past if mask is None else mask & past, False, None
        if drops:
            weights = _weights(query, key, mask, bias, self.scale).astype(value.dtype)
            return _mixed(nn.Dropout(self.dropout, deterministic=False)(weights), value)
        flash = _flash(query, keys, masked=mask is not None or bias is not None)
        implementation = self.implementation or ("cudnn" if flash else "xla")
        if implementation == "cudnn" and mask is not None:  # which wants to see every query's row
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, keys))
        if implementation == "cudnn" and bias is not None:  # and a bias of the operands' dtype
            bias = bias.astype(query.dtype)
        with jax.numpy_dtype_promotion("standard"):  # inside, it promotes half operands to float32 by itself
            return jax.nn.dot_product_attention(
                query, key, value, bias, mask, scale=self.scale, is_causal=causal,
                local_window_size=None if window is None else (window - 1, 0), implementation=implementation,
            )  # fmt: skip


def causal_mask(length: int, keys: int, window: int | None = None) -> jax.Array:
    """What the last `length` of `keys` positions see: (1, 1, length, keys), bool. Keys before them are seen by all."""
    before = keys - length
    query = before + jax.lax.broadcasted_iota(jnp.int32, (length, keys), 0)  # in the program: no constant of this size
    key = jax.lax.broadcasted_iota(jnp.int32, (length, keys), 1)
    seen = key <= query
    if window is not None:
        seen &= (query - key < window) | (key < before)
    return seen[None, None]


def _flash(query: jax.Array, keys: int, *, masked: bool) -> bool:
    """Whether cuDNN has flash attention, and its gradient, for such operands. With a mask it wants even lengths."""
    width, odd = query.shape[-1], query.shape[1] % 2 or keys % 2
    if query.dtype not in (jnp.bfloat16, jnp.float16) or width % 8 or width > 128 or (masked and odd):
        return False
    device: Any = (
        getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    )  # set, it may be a platform's name
    device = jax.devices(device)[0] if isinstance(device, str) else device
    capability = str(getattr(device, "compute_capability", ""))  # "9.0" of CUDA; AMD's are otherwise, CPUs have none
    return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8


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
