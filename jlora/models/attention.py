"""Attention of queries, keys and values, as a module of its own: what acts on keys and values finds them there."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn


class DotProductAttention(nn.Module):
    """`softmax(q k^T / sqrt(width)) v`, without parameters.

    Attributes:
      causal: a query sees the keys up to its own position. With more keys than queries the last ones belong together,
        and all keys before the first query's are seen: a prefix, or a cache.
      dropout: of the attention weights, in [0, 1).
      deterministic: no dropout.
    """

    takes_prefix: ClassVar[bool] = True  # whoever puts keys before the others widens the mask, and nothing else
    causal: bool = False
    dropout: float = 0.0
    deterministic: bool = True

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """(batch, length, heads, width) -> the same. The mask is True at the keys that are seen.

        Scores and softmax are float32 in any case.

        Args:
          query: (batch, length, heads, width).
          key, value: (batch, keys, heads, width).
          mask: broadcastable to (batch, heads, length, keys), bool.
        """
        length, keys = query.shape[1], key.shape[1]
        query = query / math.sqrt(query.shape[-1])
        scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
        if self.causal:
            past = jnp.tril(jnp.ones((length, keys), bool), keys - length)[None, None]  # (1, 1, length, keys)
            mask = past if mask is None else mask & past
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        weights = nn.softmax(scores).astype(value.dtype)
        weights = nn.Dropout(self.dropout, deterministic=self.deterministic)(weights)
        return jnp.einsum("bhts,bshd->bthd", weights, value)
