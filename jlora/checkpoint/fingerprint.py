"""Which base an adapter belongs to: a digest of the parameters, computed where they lie."""

import hashlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import tree
from jlora.checkpoint.processes import whole

_GOLDEN = 0x9E3779B1  # 2^32 / golden ratio: spreads consecutive indices over 32 bits


def fingerprint(params: Any, without: Collection[str] = ()) -> str:
    """A digest of the paths, shapes, dtypes and bits of all weights of a tree: 32 hexadecimal digits.

    Per leaf two sums modulo 2^32 of mixed words are computed on the device, in integers: so the digest is the same
    however the leaf is sharded, and no weight leaves its device. Over several processes all of them call this. Counters
    (integer scalars), random keys and leaves that are no arrays take no part. A NumPy array counts as what JAX makes of
    it, float32 of float64. It tells bases apart; it is no defence against one made to collide.

    Args:
      params: any tree of arrays.
      without: paths of leaves that take no part, as those that an adapter replaces wholly.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> fingerprint(params) == fingerprint({"kernel": jnp.ones((2, 2))})
      True
      >>> fingerprint(params) == fingerprint({"kernel": jnp.ones((2, 2)).at[0, 0].set(2)})
      False
    """
    named, _ = tree.leaves(tree.canonical(params))
    weights = {path: leaf for path, leaf in named.items() if _is_weight(leaf) and path not in without}
    if tree.is_abstract(weights):
        raise TypeError("fingerprint: the parameters hold shapes (jax.ShapeDtypeStruct) and no arrays to tell them by")
    sums = {path: _checksum(jnp.asarray(tree.dense(leaf))) for path, leaf in weights.items()}
    digest = hashlib.sha256()
    for path, leaf in weights.items():
        digest.update(
            f"{path}\0{tuple(leaf.shape)}\0{leaf.dtype}\0".encode() + whole(sums[path]).astype("<u4").tobytes()
        )
    return digest.hexdigest()[:32]


def _is_weight(leaf: Any) -> bool:
    if not hasattr(leaf, "dtype") or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return False
    return bool(leaf.shape) or jnp.issubdtype(leaf.dtype, jnp.inexact)


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Two sums of the leaf's words, each mixed with its place: (2,) uint32."""
    words = _words(leaf)
    place = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):  # the row-major index, modulo 2^32
        place = place + lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.stack([jnp.sum(_mixed(words ^ _mixed(place + jnp.uint32(lane * _GOLDEN % 2**32)))) for lane in (1, 2)])


def _words(leaf: jax.Array) -> jax.Array:
    """The leaf's bits as uint32, 64-bit types with one more axis."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    if leaf.dtype == jnp.bool_ or leaf.dtype.itemsize == 1:
        return leaf.astype(jnp.float32).view(jnp.uint32) if _is_float(leaf) else leaf.astype(jnp.int32).view(jnp.uint32)
    if leaf.dtype.itemsize == 2:
        return lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32)
    return lax.bitcast_convert_type(leaf, jnp.uint32)


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _mixed(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every bit of x changes half of the result's bits."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
