"""Parts common to the heads of several models."""

import jax
import jax.numpy as jnp

from jlora.models.placed import taken


def last_token(h: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Each row's last hidden state that is no padding: (batch, length, width), (batch, length) -> (batch, width)."""
    if mask is None:
        return h[:, -1]
    if mask.ndim != 2:
        raise ValueError(f"the mask is {mask.shape}: a label for a row needs one of its tokens, (batch, length)")
    last = jnp.max(jnp.where(mask, jnp.arange(h.shape[1])[None], 0), axis=1)  # (batch,)
    return taken(h, last[:, None, None], axis=1)[:, 0]
