"""Head and cross entropy in chunks of tokens: `head_cross_entropy`."""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from jlora.models import placed

BUDGET = 2**27
"""Bytes of a chunk's logits in float32, at most, where nobody says how long a chunk is."""


def head_cross_entropy(
    h: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    smoothing: float = 0.0,
    chunk: int | None = None,
) -> jax.Array:
    """Cross entropy of each token, `log sum_v exp(z_v) - z_label` with `z = h W + bias`, without all logits at once.

    The tokens go through the head in chunks along the length, so that a batch that is split over devices stays so. Of
    a chunk nothing is kept for the backward pass but its inputs: that computes the logits z again, one more product
    with W (three of a frozen head in place of two), and turns them into their gradient, `softmax(z) - target`, in one
    pass. Where one chunk has all tokens, its logits are kept.

    Equal to the plain loss to rounding, in values, gradients, forward mode and higher derivatives. An adapted or
    quantised W stays as it is under `jlora.lift`: W meets h and nothing else. Dropout of an adapted W has one draw for
    all chunks.

    A mean over the tokens that count is the caller's, `jnp.sum(loss * real) / jnp.sum(real)`.

    Args:
      h: last hidden states, (..., length, width), in the dtype of the product.
      kernel: W, (width, vocabulary). Of a tied head `table.T`, which nobody copies.
      labels: ids, (..., length), integers in [0, vocabulary).
      bias: (vocabulary,), or None.
      smoothing: the part of the probability that is spread over all ids, in [0, 1].
      chunk: positions of a row at a time. None: as many as keep the float32 logits of a chunk below 128 MiB on each
        device, and at least one.

    Returns:
      Nats, (..., length), float32.

    Raises:
      ValueError: if the shapes do not go together, `smoothing` is no part of 1, or `chunk` is no integer of at least 1.
      TypeError: if the labels are no integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> h, table = jnp.ones((2, 6, 4)), jnp.zeros((10, 4))
      >>> labels = jnp.zeros((2, 6), jnp.int32)
      >>> print(head_cross_entropy(h, table.T, labels, chunk=4).mean().round(4))  # log 10
      2.3026
    """
    _check(h, kernel, labels, bias, smoothing, chunk)
    length, apart = labels.shape[-1], placed.pieces(h, h.ndim - 2)
    if apart > 1:  # tokens over several devices: in chunks of each device's own
        cut_up = lambda x: x.reshape(*labels.shape[:-1], apart, length // apart, *x.shape[labels.ndim :])
        own = None if chunk is None else max(1, chunk // apart)
        losses = head_cross_entropy(cut_up(h), kernel, cut_up(labels), bias=bias, smoothing=smoothing, chunk=own)
        return losses.reshape(labels.shape)
    kernel = placed.clear(kernel, h)  # gathered once, and not for each chunk
    rows = math.prod(labels.shape[:-1]) // placed.pieces(h, *range(h.ndim - 2))  # of one device, and so its logits
    chunk = chunk or max(1, BUDGET * placed.pieces(kernel, 1) // max(1, 4 * rows * kernel.shape[1]))
    parts = -(-length // chunk) if length else 1
    size = -(-length // parts)  # the last chunk is filled up, with fewer than `parts` positions

    def of_chunk(h: jax.Array, labels: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        z = placed.matmul(h, kernel.astype(h.dtype))  # (..., size, vocabulary)
        z = z if bias is None else z + bias.astype(z.dtype).reshape((1,) * (z.ndim - 1) + (-1,))
        return cross_entropy(z, labels, smoothing)

    if parts == 1:
        return of_chunk(h, labels, kernel, bias)
    of_chunk = jax.checkpoint(of_chunk, prevent_cse=False)  # a scan's passes are apart as they are
    # A scan adds up its gradient in the kernel's dtype: in eight bits each chunk would be rounded away more.
    kernel = kernel if jnp.finfo(kernel.dtype).bits >= 32 else kernel.astype(jnp.float32)
    axis, missing = labels.ndim - 1, parts * size - length

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], parts, size, *x.shape[axis + 1 :]), axis, 0)

    def step(carry: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return carry, of_chunk(*part, kernel, bias)

    _, losses = jax.lax.scan(step, None, (cut(h), cut(labels)))  # (parts, ..., size)
    losses = jnp.moveaxis(losses, 0, axis)
    return losses.reshape(*losses.shape[:axis], parts * size)[..., :length]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def cross_entropy(z: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """`log sum_v exp(z_v) - sum_v t_v z_v`, with a derivative of its own: `softmax(z) - t`, and no scatter.

    t is 1 - smoothing at the label, and smoothing / vocabulary is added everywhere. A label outside gives NaN.

    Args:
      z: logits, (..., vocabulary), of any float dtype.
      labels: (...), integers.
      smoothing: see `head_cross_entropy`.

    Returns:
      Nats, (...), float32.
    """
    losses, _ = _losses(z, labels, smoothing)
    return losses


@cross_entropy.defjvp
def _cross_entropy_jvp(smoothing: float, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> Any:
    z, labels = primals
    losses, log_sum = _losses(z, labels, smoothing)
    slope = jnp.exp(z.astype(jnp.float32) - log_sum[..., None]) - _target(z, labels, smoothing)
    return losses, jnp.sum(slope * tangents[0].astype(jnp.float32), axis=-1)


def _losses(z: jax.Array, labels: jax.Array, smoothing: float) -> tuple[jax.Array, jax.Array]:
    """Losses, and logarithms of the sums of exponentials: (...), float32."""
    z = z.astype(jnp.float32)
    log_sum = jax.nn.logsumexp(z, axis=-1)
    target = _target(z, labels, smoothing)
    losses = log_sum - jnp.sum(jnp.where(target == 0, 0, target * z), axis=-1)  # a logit of -inf may be nobody's label
    return jnp.where((labels >= 0) & (labels.astype(jnp.int32) < z.shape[-1]), losses, jnp.nan), log_sum


def _target(z: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Probabilities that are asked for, (..., vocabulary), float32. No look-up: this fuses, and lies as z does."""
    ids = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)  # a byte's ids would begin anew at 256
    return jnp.where(ids == labels[..., None].astype(jnp.int32), 1.0 - smoothing, 0.0) + smoothing / z.shape[-1]


def _check(
    h: jax.Array, kernel: jax.Array, labels: jax.Array, bias: jax.Array | None, smoothing: Any, chunk: Any
) -> None:
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels are ids, integers, got {labels.dtype}")
    if h.ndim < 2 or labels.shape != h.shape[:-1]:
        raise ValueError(
            f"each of the hidden states has a label, (..., length, width) and (..., length): got {h.shape} and "
            f"{labels.shape}"
        )
    if kernel.ndim != 2 or kernel.shape[0] != h.shape[-1]:
        turned = ": pass table.T" if kernel.ndim == 2 and kernel.shape[1] == h.shape[-1] else ""
        raise ValueError(f"the kernel is (width, vocabulary), got {kernel.shape} for a width of {h.shape[-1]}{turned}")
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(f"the bias is (vocabulary,), {kernel.shape[1:]}, got {bias.shape}")
    if isinstance(smoothing, bool) or not isinstance(smoothing, numbers.Real) or not 0 <= float(smoothing) <= 1:
        raise ValueError(f"smoothing is a part of the probability, in [0, 1], got {smoothing!r:.50}")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, numbers.Integral) or chunk < 1):
        raise ValueError(f"chunk is a number of positions, an integer of at least 1, or None, got {chunk!r:.50}")
