"""Trees: the paths of leaves, by which jlora names the weights, their shapes, their keys."""

import collections
import numbers
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey, tree_flatten_with_path

# Boxes around a leaf (`nn.Partitioned`, `nnx.Variable`) are containers with one child: its name says nothing.
_BOXES = ("value", "raw_value", "get_value()")


class Stored(Protocol):
    """A leaf that stands for an array and is none: codes with their scales, as of a quantised base.

    It is a registered pytree of arrays. It is frozen and dequantised where it is used: a product keeps its arrays for
    the backward pass, not the one that they stand for. Three methods may be there or not:

    - `transpose(permutation)`: the leaf with its axes permuted. Of any other the array is, when it is dequantised.
    - `as_held()`: the array with its axes in the order in which a product meets it soonest, and the axis of the leaf
      behind each of these.
    - `in_parts(mesh, spec, path)`: a leaf of the same array, and the tree of `PartitionSpec` by which its arrays are
      cut over the mesh so that each part is the part of the leaf that `spec` says. Any other is dequantised before
      `shard_map`.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def leading(self) -> int:
        """Number of leading axes, those of a stack (scanned layers, experts), that each of its arrays has as well: a
        slice of all of them along these is the slice of the leaf, whose shape follows.
        """
        ...

    def dequantise(self) -> jax.Array:
        """The array of this shape and dtype."""
        ...


def is_stored(x: Any) -> bool:
    """Whether something is `Stored`."""
    return hasattr(type(x), "dequantise")


def dense(x: Any, path: str = "") -> Any:
    """The array that a stored leaf stands for, a shape if its own arrays are shapes; anything else as it is.

    Raises:
      ValueError: if its arrays contradict each other, naming the path if it is given.
    """
    if not is_stored(x):
        return x
    try:
        return jax.eval_shape(lambda x: x.dequantise(), x) if is_abstract(x) else x.dequantise()
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}" if path else str(error)) from error


def stored_as(x: Any) -> str:
    """Words for how a leaf is held: "nf4, 64, twice" of a quantised one, "bfloat16" of an array."""
    if is_stored(x):
        return str(getattr(x, "words", type(x).__name__))
    return str(getattr(x, "dtype", type(x).__name__))


def as_held(x: Any) -> tuple[jax.Array, tuple[int, ...]]:
    """The array of a stored leaf in an order of axes of its own, and the axis of the leaf behind each of its axes."""
    return x.as_held() if hasattr(x, "as_held") else (x.dequantise(), tuple(range(len(x.shape))))


def leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[dict[str, Any], Any]:
    """The leaves by path, "h_0/attn/query/kernel", in tree order, and the tree's structure. A stored leaf is one.

    Raises:
      ValueError: if two leaves have the same path, as keys that contain "/" may bring about.
    """
    stops = is_stored if is_leaf is None else lambda x: is_stored(x) or is_leaf(x)
    flat, structure = tree_flatten_with_path(tree, stops)
    children = collections.Counter(keys[:-1] for keys, _ in flat)
    named: dict[str, Any] = {}
    for keys, leaf in flat:
        # An attribute called value that has siblings is no box.
        path = name(keys) if children[keys[:-1]] == 1 else "/".join(map(_key, keys))
        if path in named:
            raise ValueError(f"two leaves of the tree have the path {path!r}; rename one of the keys")
        named[path] = leaf
    return named, structure


def name(keys: tuple[Any, ...]) -> str:
    """The path of one leaf."""
    parts = [_key(key) for key in keys]
    if len(parts) > 1 and isinstance(keys[-1], GetAttrKey | FlattenedIndexKey) and parts[-1] in _BOXES:
        parts = parts[:-1]
    return "/".join(parts)


def split(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a tree, and the function that makes the tree of others: what is no array (a function) stays."""
    leaves, structure = jax.tree.flatten(tree)
    at = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

    def fill(arrays: Sequence[Any]) -> Any:
        full = dict(enumerate(leaves)) | dict(zip(at, arrays, strict=True))
        return jax.tree.unflatten(structure, full.values())

    return [leaves[i] for i in at], fill


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """A key of the leaf's own, which does not change when other leaves are added."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def on_shapes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Traces `fn(*args, **kwargs)`: a `jax.ShapeDtypeStruct` among the arguments stands for an array."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    abstract = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def traced(arrays: list[jax.Array]) -> None:
        filled = list(leaves)
        for i, array in zip(abstract, arrays, strict=True):
            filled[i] = array
        args, kwargs = jax.tree.unflatten(structure, filled)
        fn(*args, **kwargs)

    jax.eval_shape(traced, [leaves[i] for i in abstract])


def shapes_of(tree: Any) -> Any:
    """The tree with a `jax.ShapeDtypeStruct` for each of its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, tree)


def is_abstract(tree: Any) -> bool:
    """Whether a tree holds shapes in place of arrays (`jax.ShapeDtypeStruct`), of which nothing can be computed."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def abstract(x: Any) -> Any:
    """The shape, dtype and, where it was put somewhere, the sharding of an array; anything else as it is.

    NumPy's arrays in the dtype that JAX makes of them.
    """
    if isinstance(x, np.ndarray | np.generic):
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
    if not isinstance(x, jax.Array):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement(x), weak_type=getattr(x, "weak_type", False))


def placement(x: Any) -> Sharding | None:
    """Where an array, or the one that a shape stands for, was put; None if it was put nowhere in particular."""
    if isinstance(x, jax.Array):
        return x.sharding if x.committed else None
    return x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None


def canonical(tree: Any) -> Any:
    """The tree, its NumPy arrays in the dtype that JAX makes of them: float32 of float64, without `jax_enable_x64`."""
    leaves, structure = jax.tree.flatten(tree)
    same = [_canonical(leaf) for leaf in leaves]
    return tree if all(x is y for x, y in zip(same, leaves, strict=True)) else jax.tree.unflatten(structure, same)


def _canonical(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "fciu":
        return leaf
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def as_key(key: Any) -> jax.Array:
    """A typed key from a seed, a typed key, or one of the old kind (`jax.random.PRNGKey`).

    Raises:
      TypeError: if it is none of these.
    """
    if isinstance(key, numbers.Integral):
        return jax.random.key(int(key))
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if hasattr(key, "dtype") and key.dtype == jnp.uint32 and key.ndim == 1:
        return jax.random.wrap_key_data(key)
    raise TypeError(f"key is a seed or a key (jax.random.key, jax.random.PRNGKey), got {key!r}")


def _key(key: Any) -> str:
    match key:
        case DictKey(key=inner) | FlattenedIndexKey(key=inner):
            return str(inner)
        case GetAttrKey(name=inner):
            return str(inner)
        case SequenceKey(idx=inner):
            return str(inner)
        case _:
            return str(key).strip("[]'.")
