"""DoRA: a weight's magnitude and direction, adapted apart."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.methods.acts import Arrays, OnWeights, no_buffers, start_of
from jlora.methods.lora import lora
from jlora.methods.method import Method
from jlora.transform import axes as ax
from jlora.transform.sites import Site, Target
from jlora.transform.weight import RANK, Weight


def dora(inner: Method | int, alpha: float | None = None) -> Method:
    """Weight-decomposed LoRA: `m * V / |V|` with `V = W + alpha / r * B A`, and m trained beside A and B.

    The norm is taken over the inputs of each output (the columns of a kernel that is stored (in, out)) and is not
    differentiated (section 4.3 of the paper). m starts as |W|, so that training starts from the base. No array of W's
    shape is formed: `|W + A B|^2 = |W|^2 + 2 <W, A B> + |A B|^2`, where |W|^2 is computed once, `<W, A B>` needs `W A`,
    and `|A B|^2` the r x r Gram matrix of A; in float32, clamped at 0. A quantised W is dequantised for these products,
    a stack of layers one by one.

    Args:
      inner: the low-rank method for V, or a rank, which means `lora(rank, alpha)`.
      alpha: of that `lora`.

    Raises:
      ValueError: if `inner` is not an additive low-rank method.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, eq. 5 and 11.

    Example:
      >>> import jlora
      >>> jlora.dora(jlora.lora(8, alpha=16)).name
      'dora'
    """
    if isinstance(inner, Method) and alpha is not None:
        raise ValueError(f"dora(inner, alpha): {inner!r} has its own alpha")
    inner = inner if isinstance(inner, Method) else lora(inner, alpha)
    acts = inner.acts
    if not isinstance(acts, OnWeights) or not _is_additive(inner, acts):
        raise ValueError(f"dora(inner): inner must be an additive low-rank method, as lora is, not {inner.name}")

    def initialise(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        return {**start_of(acts.init, key, w, target), "magnitude": jnp.sqrt(sum_of_squares(w, target.in_axes))}

    def buffers(w: jax.Array, target: Target) -> Arrays:
        own = {} if acts.buffers is no_buffers else acts.buffers(tree.dense(w), target)
        return {**own, "square": sum_of_squares(w, target.in_axes)}

    def weight(w: jax.Array, target: Target, factors: Arrays, buffers: Arrays) -> Weight:
        v = acts.weight(tree.dense(w), target, factors, buffers).replace(w=w)  # of the array it needs no values
        norm = jnp.sqrt(jax.lax.stop_gradient(squared_norm(v, buffers["square"], target)))
        # A column of zeros (a head that starts at zero) has no direction: it stays what V is.
        safe = jnp.where(norm == 0, jnp.ones_like(norm), norm)
        gain = jnp.where(norm == 0, jnp.ones_like(norm), factors["magnitude"] / safe)
        return v.replace(gain=gain)

    config = (("name", "dora"), ("inner", inner))
    residual = None if acts.residual is None else lambda: dora(acts.without_start(inner))
    return inner._replace(
        config=config,
        acts=acts.replace(
            init=initialise, weight=weight, buffers=buffers, rescale=None, residual=residual, stored=True
        ),
    )


def squared_norm(v: Weight, square: jax.Array, target: Target) -> jax.Array:
    """`|w + a b|^2` over the input axes, in broadcast form, from `square` = |w|^2."""
    assert v.a is not None and v.b is not None
    labels = tuple(range(v.ndim))
    outer = tuple(i for i in labels if i not in target.in_axes)
    shared = target.stack_axes
    w = jax.lax.stop_gradient(v.w)
    a = jax.lax.squeeze(v.a, target.out_axes)
    b = jax.lax.squeeze(v.b, target.in_axes)
    a_labels = tuple(i for i in labels if i not in target.out_axes)
    wa = _product(w, labels, a, (*a_labels, RANK), (*outer, RANK))  # (stack and out, rank)
    gram = ax.contract(a, (*a_labels, RANK), a, (*a_labels, "other"), (*shared, RANK, "other"))  # (stack, rank, rank)
    ba = ax.contract(b, (*outer, RANK), gram, (*shared, RANK, "other"), (*outer, "other"))  # (stack and out, rank)
    grown = ax.expand(square_free(wa, ba, b), outer, labels)
    return jnp.maximum(square + grown, 0.0)


def _product(w: Any, labels: ax.Labels, a: jax.Array, a_labels: ax.Labels, out: ax.Labels) -> jax.Array:
    """`W A` in the dtype of A; of a stored stack layer by layer, so that no more than one is an array at a time."""
    if tree.is_stored(w) and w.leading and labels[0] == a_labels[0] == out[0] and len(a) == w.shape[0]:
        return jax.lax.map(lambda row: _product(row[0], labels[1:], row[1], a_labels[1:], out[1:]), (w, a))
    return ax.contract(tree.dense(w).astype(a.dtype), labels, a, a_labels, out)


def sum_of_squares(w: Any, in_axes: tuple[int, ...]) -> jax.Array:
    """`|w|^2` over the input axes, in broadcast form, float32; of a stored stack layer by layer."""
    if tree.is_stored(w) and w.leading and 0 not in in_axes:
        return jax.lax.map(lambda row: sum_of_squares(row, tuple(axis - 1 for axis in in_axes)), w)
    return jnp.sum(jnp.square(tree.dense(w).astype(jnp.float32)), axis=in_axes, keepdims=True)


def square_free(wa: jax.Array, ba: jax.Array, b: jax.Array) -> jax.Array:
    """`2 <w, a b> + |a b|^2` per output: both are sums over the rank of something times b."""
    return jnp.sum((2.0 * wa + ba) * b, axis=-1)


def _is_additive(inner: Method, acts: OnWeights) -> bool:
    """Whether the weight is the base, untouched, plus a product of factors; asked of the weight of one target."""
    rank = inner.rank or 1
    side = 4 * rank
    target = Target(Site("w", (side, side), "float32", (0,), (1,), (), "linear"), rank, inner.alpha or float(rank))
    found: list[bool] = []

    def make(key: jax.Array, w: Any) -> None:
        arrays = acts.init(key, w, target)
        frozen = {name: arrays.pop(name) for name in acts.frozen}
        v = acts.weight(w, target, arrays, acts.buffers(w, target) | frozen)
        found.append(v.w is w and v.gain is None and v.a is not None and v.b is not None)

    w = jax.ShapeDtypeStruct(target.shape, target.dtype)
    if not acts.statistic:  # what starts from data gives no magnitude; OFT's blocks may not fit
        with contextlib.suppress(ValueError):
            jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)), w)
    return any(found)
