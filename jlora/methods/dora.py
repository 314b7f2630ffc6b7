"""DoRA: a weight's magnitude and direction, adapted apart."""

import jax
import jax.numpy as jnp

from jlora.methods.lora import lora
from jlora.methods.method import Arrays, Method
from jlora.transform import axes as ax
from jlora.transform.sites import Site
from jlora.transform.weight import RANK, Weight

ADDITIVE = ("lora", "rslora", "loraplus", "lora_fa", "dylora")


def dora(inner: Method | int, alpha: float | None = None) -> Method:
    """Weight-decomposed LoRA: `m * V / |V|` with `V = W + alpha / r * B A`, and m trained beside A and B.

    The norm is taken over the inputs of each output (the columns of a kernel that is stored (in, out)) and is not
    differentiated (section 4.3 of the paper). m starts as |W|, so that training starts from the base. No array of W's
    shape is formed: `|W + A B|^2 = |W|^2 + 2 <W, A B> + |A B|^2`, where |W|^2 is computed once, `<W, A B>` needs `W A`,
    and `|A B|^2` the r x r Gram matrix of A; in float32, clamped at 0.

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
    if inner.name not in ADDITIVE:
        raise ValueError(
            f"dora(inner): inner must be an additive low-rank method ({', '.join(ADDITIVE)}), not {inner.name}"
        )

    def initialise(key: jax.Array, w: jax.Array, site: Site) -> Arrays:
        return {**inner.init(key, w, site), "magnitude": jnp.sqrt(buffers(w, site)["square"])}

    def buffers(w: jax.Array, site: Site) -> Arrays:
        square = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=site.in_axes, keepdims=True)
        return {**inner.buffers(w, site), "square": square}

    def weight(w: jax.Array, site: Site, factors: Arrays, buffers: Arrays) -> Weight:
        v = inner.weight(w, site, factors, buffers)
        norm = jnp.sqrt(jax.lax.stop_gradient(squared_norm(v, buffers["square"], site)))
        # A column of zeros (a head that starts at zero) has no direction: it stays what V is.
        safe = jnp.where(norm == 0, jnp.ones_like(norm), norm)
        gain = jnp.where(norm == 0, jnp.ones_like(norm), factors["magnitude"] / safe)
        return v.replace(gain=gain)

    config = (("name", "dora"), ("inner", inner))
    return inner._replace(config=config, init=initialise, weight=weight, buffers=buffers, rescale=None)


def squared_norm(v: Weight, square: jax.Array, site: Site) -> jax.Array:
    """`|w + a b|^2` over the input axes, in broadcast form, from `square` = |w|^2."""
    assert v.a is not None and v.b is not None
    labels = tuple(range(v.ndim))
    outer = tuple(i for i in labels if i not in site.in_axes)
    shared = site.stack_axes
    w = jax.lax.stop_gradient(v.w).astype(v.a.dtype)
    a = jax.lax.squeeze(v.a, site.out_axes)
    b = jax.lax.squeeze(v.b, site.in_axes)
    a_labels = tuple(i for i in labels if i not in site.out_axes)
    wa = ax.contract(w, labels, a, (*a_labels, RANK), (*outer, RANK))  # (stack and out, rank)
    gram = ax.contract(a, (*a_labels, RANK), a, (*a_labels, "other"), (*shared, RANK, "other"))  # (stack, rank, rank)
    ba = ax.contract(b, (*outer, RANK), gram, (*shared, RANK, "other"), (*outer, "other"))  # (stack and out, rank)
    grown = ax.expand(square_free(wa, ba, b), outer, labels)
    return jnp.maximum(square + grown, 0.0)


def square_free(wa: jax.Array, ba: jax.Array, b: jax.Array) -> jax.Array:
    """`2 <w, a b> + |a b|^2` per output: both are sums over the rank of something times b."""
    return jnp.sum((2.0 * wa + ba) * b, axis=-1)
