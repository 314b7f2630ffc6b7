"""Attention of some queries at a time: the scores of all are never in memory, nor in the backward pass."""

import functools

import jax
import jax.numpy as jnp

SIZE = 128  # queries at a time
LONG = 512  # queries, and keys, from which it is worth it


def size_of(length: int, keys: int) -> int | None:
    """Queries at a time: the largest number up to `SIZE` that divides them; None where all at once is better.

    >>> size_of(4096, 4096), size_of(64 * 99, 64 * 99), size_of(4096, 77)
    (128, 99, None)
    """
    if min(length, keys) < LONG:
        return None
    size = next(n for n in range(SIZE, 0, -1) if length % n == 0)
    return size if 4 * size >= SIZE else None


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, size: int, scale: float | None = None) -> jax.Array:
    """`softmax(scale q k^T) v` by blocks of `size` queries: (batch, length, heads, width) -> the same.

    Scores of a block are made again in the backward pass. They and the softmax are float32. A CPU takes one row of the
    batch after another, whose scores its caches hold, where it is the only device: on a mesh the rows lie on many.

    Args:
      query: (batch, length, heads, width), the length a multiple of `size`.
      key, value: (batch, keys, heads, width).
      size: queries at a time.
      scale: above 0; 1 / sqrt(width) when None.

    Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", arXiv 2112.05682.
    """
    of_rows = functools.partial(_attend, size=size, scale=query.shape[-1] ** -0.5 if scale is None else scale)
    if len(query) == 1 or jax.device_count() > 1:
        return of_rows(query, key, value)
    of_each = lambda *rows: jax.lax.map(lambda row: of_rows(*(x[None] for x in row))[0], rows)
    return jax.lax.platform_dependent(query, key, value, cpu=of_each, default=of_rows)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, *, size: int, scale: float) -> jax.Array:
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))  # (batch, heads, length, width)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(i: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(q, i * size, size, axis=2)
        scores = jnp.einsum("bhtd,bhsd->bhts", rows, k, preferred_element_type=jnp.float32)
        largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scale * (scores - largest))  # (batch, heads, size, keys)
        mixed = jnp.einsum("bhts,bhsd->bhtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (mixed / weights.sum(axis=-1, keepdims=True)).astype(query.dtype)

    blocks = jax.lax.map(block, jnp.arange(query.shape[1] // size))  # (blocks, batch, heads, size, width)
    return jnp.transpose(blocks, (1, 0, 3, 2, 4)).reshape(query.shape)
