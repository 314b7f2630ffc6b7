"""Index and shape algebra on labelled axes: nothing here knows what a weight is."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Labels = tuple[int | str, ...]


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Splits a row-major reshape into the smallest groups of axes with equal products.

    Args:
      old: the shape before.
      new: the shape after, with the same number of elements.

    Returns:
      Pairs (axes of `old`, axes of `new`); every axis is in exactly one pair.

    Example:
      >>> reshape_groups((4, 6, 5), (4, 2, 3, 5))
      [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]
    """
    if 0 in old:
        return _groups_without_elements(old, new)
    groups: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        size_left = size_right = 1
        if i < len(old):
            left, size_left, i = [i], old[i], i + 1
        if j < len(new) and (not left or size_left != 1 or new[j] == 1):
            right, size_right, j = [j], new[j], j + 1
        while size_left != size_right:
            if size_left < size_right:
                left.append(i)
                size_left, i = size_left * old[i], i + 1
            else:
                right.append(j)
                size_right, j = size_right * new[j], j + 1
        groups.append((tuple(left), tuple(right)))
    return groups


def _groups_without_elements(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Groups of arrays without elements, whose axes no product tells apart: those around the change stay."""
    n, m = len(old), len(new)
    least = min(n, m)
    first = next((i for i in range(least) if old[i] != new[i]), least)
    last = next((i for i in range(least - first) if old[n - 1 - i] != new[m - 1 - i]), least - first)
    changed, made = old[first : n - last], new[first : m - last]
    if math.prod(changed) != math.prod(made):
        return [(tuple(range(n)), tuple(range(m)))]
    every = [(tuple(range(len(changed))), tuple(range(len(made))))] if changed or made else []
    inner = every if 0 in changed else reshape_groups(changed, made)
    return [
        *(((i,), (i,)) for i in range(first)),
        *((tuple(first + i for i in left), tuple(first + j for j in right)) for left, right in inner),
        *(((n - i,), (m - i,)) for i in range(last, 0, -1)),
    ]


def contract(
    x: jax.Array,
    x_labels: Labels,
    y: jax.Array,
    y_labels: Labels,
    out: Labels,
    precision: lax.PrecisionLike = None,
    dtype: jnp.dtype | None = None,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """The product of two arrays with named axes, as `einsum` has it, in one `dot_general`.

    A label in both arrays and in `out` is a batch axis; in both and not in `out`, it is contracted; in one array
    alone and not in `out`, it is summed. A label of `out` that neither array has is an error of the caller.

    Args:
      x, y: the arrays.
      x_labels, y_labels: one label per axis, no label twice in one array.
      out: the labels of the result, in order.
      precision: as in `lax.dot_general`.
      dtype: `preferred_element_type` of the product, the arrays' own when None.
      sharding: where the result lies, on an explicit mesh; as JAX infers it when None.
    """
    x, x_labels = _sum_out(x, x_labels, y_labels + out)
    y, y_labels = _sum_out(y, y_labels, x_labels + out)
    batch = tuple(label for label in out if label in x_labels and label in y_labels)
    contracted = tuple(label for label in x_labels if label in y_labels and label not in out)
    x_free = tuple(label for label in out if label in x_labels and label not in batch)
    y_free = tuple(label for label in out if label in y_labels and label not in batch)
    # dot_general keeps the free axes in the operand's own order.
    order = batch + tuple(n for n in x_labels if n in x_free) + tuple(n for n in y_labels if n in y_free)
    product = lax.dot_general(
        x,
        y,
        (
            (_positions(x_labels, contracted), _positions(y_labels, contracted)),
            (_positions(x_labels, batch), _positions(y_labels, batch)),
        ),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=None if sharding is None else _permuted(sharding, out, order),
    )  # (batch, free of x, free of y)
    return permute(product, order, out)


def _permuted(sharding: NamedSharding, labels: Labels, order: Labels) -> NamedSharding:
    names = dict(zip(labels, sharding.spec, strict=True))
    return NamedSharding(sharding.mesh, PartitionSpec(*(names[label] for label in order)))


def permute(x: jax.Array, labels: Labels, out: Labels) -> jax.Array:
    """`x` with its axes in the order of `out`; no operation where the order is the same."""
    return x if labels == out else lax.transpose(x, _positions(labels, out))


def expand(x: jax.Array, labels: Labels, out: Labels) -> jax.Array:
    """`x` permuted to the order of `out`, with size 1 on the axes that it lacks."""
    kept = tuple(label for label in out if label in labels)
    sizes = dict(zip(labels, x.shape, strict=True))
    return lax.reshape(permute(x, labels, kept), tuple(sizes.get(label, 1) for label in out))


def drop_ones(x: jax.Array, labels: Labels, keep: Labels = ()) -> tuple[jax.Array, Labels]:
    """Squeezes the axes of size 1 whose label is not in `keep`."""
    axes = tuple(i for i, label in enumerate(labels) if x.shape[i] == 1 and label not in keep)
    return lax.squeeze(x, axes), tuple(label for i, label in enumerate(labels) if i not in axes)


def fan_in(shape: Sequence[int], in_axes: Sequence[int]) -> int:
    """The number of inputs that one output sums over: the product of the contracted axes."""
    return math.prod(shape[axis] for axis in in_axes)


def inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes another one.

    Example:
      >>> inverse((2, 0, 1))
      (1, 2, 0)
    """
    return tuple(permutation.index(i) for i in range(len(permutation)))


def _positions(labels: Labels, wanted: Labels) -> tuple[int, ...]:
    return tuple(labels.index(label) for label in wanted)


def _sum_out(x: jax.Array, labels: Labels, kept: Labels) -> tuple[jax.Array, Labels]:
    axes = tuple(i for i, label in enumerate(labels) if label not in kept)
    if not axes:
        return x, labels
    return jnp.sum(x, axis=axes), tuple(label for i, label in enumerate(labels) if i not in axes)
