"""Parts common to the heads of several models."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.models import placed
from jlora.models.losses import head_cross_entropy
from jlora.models.placed import taken


def last_token(h: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Each row's last hidden state that is no padding: (batch, length, width), (batch, length) -> (batch, width)."""
    if mask is None:
        return placed.token(h, -1)
    if mask.ndim != 2:
        raise ValueError(f"the mask is {mask.shape}: a label for a row needs one of its tokens, (batch, length)")
    h, mask = placed.whole_along(h, 1), placed.whole_along(mask, 1)
    last = jnp.max(jnp.where(mask, jnp.arange(h.shape[1])[None], 0), axis=1)  # (batch,)
    return taken(h, last[:, None, None], axis=1)[:, 0]


def tied_losses(table: placed.Embed, h: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """`head_cross_entropy` of a head that is the embedding: (batch, length, width) -> (batch, length), float32."""
    promoted: Any = table.promote_dtype(h, table.embedding, dtype=table.dtype)
    return head_cross_entropy(promoted[0], promoted[1].T, labels, smoothing=smoothing)


def losses_of(labels: jax.Array, smoothing: float) -> Callable[..., jax.Array]:
    """`head_cross_entropy` in the place of the product of a linear head without bias: its `dot_general`."""

    def product(h: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
        return head_cross_entropy(h, kernel, labels, smoothing=smoothing)

    return product


def check_labels(labels: jax.Array | None, head: str) -> None:
    """Raises a ValueError for labels of a model that has no head to predict tokens with."""
    if labels is not None and head != "causal_lm":
        raise ValueError(f"labels= asks for the losses of a causal language model, and this one has head={head!r}")
