"""Attention of some queries at a time: the scores of all are never in memory, nor in the backward pass.

And of all at once, for a CPU.
"""

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
    of_rows = functools.partial(_attend, size=size, scale=scale)
    if len(query) == 1 or jax.device_count() > 1:
        return of_rows(query, key, value)
    of_each = lambda *rows: jax.lax.map(lambda row: of_rows(*(x[None] for x in row))[0], rows)
    return jax.lax.platform_dependent(query, key, value, cpu=of_each, default=of_rows)


def at_once(query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float | None = None) -> jax.Array:
    """`attend` with one block of all queries, and with scores that are kept for the backward pass.

    On a CPU it takes a third to two thirds of `jax.nn.dot_product_attention`'s time, which divides all scores by their
    sum where this divides what they mixed (experiments/LOG.md, 2026-11-30).

    Args:
      query: (batch, length, heads, width).
      key, value: (batch, keys, heads, width).
      scale: above 0; 1 / sqrt(width) when None.
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))  # (batch, heads, length, width)
    return jnp.swapaxes(_mixed(q, k, v, scale), 1, 2)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, *, size: int, scale: float | None) -> jax.Array:
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))  # (batch, heads, length, width)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(i: jax.Array) -> jax.Array:
        return _mixed(jax.lax.dynamic_slice_in_dim(q, i * size, size, axis=2), k, v, scale)

    blocks = jax.lax.map(block, jnp.arange(query.shape[1] // size))  # (blocks, batch, heads, size, width)
    return jnp.transpose(blocks, (1, 0, 3, 2, 4)).reshape(query.shape)


def _mixed(q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None) -> jax.Array:
    """(batch, heads, length, width), and (batch, heads, keys, width) twice -> (batch, heads, length, width)."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32)
    largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(factor * (scores - largest))  # (batch, heads, length, keys)
    mixed = jnp.einsum("bhts,bhsd->bhtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(axis=-1, keepdims=True)).astype(q.dtype)
