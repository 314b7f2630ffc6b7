"""VeRA: shared random projections, and two trained vectors per weight."""

import math

import jax
import jax.numpy as jnp

from jlora.methods.acts import Arrays, OnWeights, linear_in
from jlora.methods.checks import check_number, check_rank, check_whole
from jlora.methods.lora import low_rank
from jlora.methods.matrix import a_form, b_form, sizes, without_stack
from jlora.methods.method import Config, Method
from jlora.transform.sites import Target
from jlora.transform.weight import Weight


def vera(rank: int, *, seed: int = 0, start: float = 0.1, stored: bool = False) -> Method:
    """VeRA: `W + (A diag(d)) (B diag(b))`, with A and B random, frozen and shared, and the vectors d and b trained.

    A and B are drawn from the seed row by row, so that weights of any two shapes share the rows (A's per input, B's per
    output) that both have; a weight with fewer inputs or outputs has the first ones. They are no part of the adapter's
    file: rank and seed bring them back. Both are Kaiming uniform: A, which sums over n inputs, with variance 2 / n, B,
    which sums over r, with 2 / r. d starts at `start`, b at 0. There is no alpha: the scale is 1. Stacked layers share
    A and B, too.

    Args:
      rank: r, the number of columns of A: some hundreds, since the trained parameters are r plus the outputs.
      seed: of the projections.
      start: the initial value of every entry of d.
      stored: keep A and B in the adapter's file, slice by slice, for projections that no seed here gives: those of a
        file that PEFT made.

    Raises:
      ValueError: if `rank` < 1 or is no integer, `seed` is no integer from 0 to 2**63 - 1, `start` is no finite number
        other than 0, or `stored` is no bool.

    Source: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454, eq. 2 and section 3.3.
    """
    rank, start = check_rank(rank), check_number(start, "start")
    seed = check_whole(seed, "seed")
    if seed >= 2**63:
        raise ValueError(f"seed must be below 2**63, not {seed}")
    if start == 0:
        raise ValueError("start must not be 0: b starts there, too, and neither d nor b would have a gradient")
    if not isinstance(stored, bool):
        raise ValueError(f"stored must be True or False, not {stored!r:.200}")
    config: Config = (("name", "vera"), ("rank", rank), ("seed", seed), ("start", start), ("stored", stored))

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        stack = [n if i in target.stack_axes else 1 for i, n in enumerate(target.shape)]
        _, b_shape = target.factor_shapes(1)
        vectors = {"d": jnp.full((*stack, target.rank), start, jnp.float32), "b": jnp.zeros(b_shape, jnp.float32)}
        return vectors | projections(w, target) if stored else vectors

    def projections(w: jax.Array, target: Target) -> Arrays:
        _, inputs, outputs = sizes(target)
        one = without_stack(target.site)
        a_key, b_key = jax.random.split(jax.random.key(seed))
        return {
            "A": a_form(rows(a_key, inputs, target.rank, inputs)[None], one),
            "B": b_form(rows(b_key, outputs, target.rank, target.rank).T[None], one),
        }

    def weight(w: jax.Array, target: Target, factors: Arrays, buffers: Arrays) -> Weight:
        return low_rank(w, target, buffers["A"] * factors["d"], buffers["B"] * factors["b"])

    acts = (
        OnWeights(init, weight, frozen=("A", "B"), rescale=linear_in("b"))
        if stored
        else OnWeights(init, weight, projections, rescale=linear_in("b"))
    )
    return Method(config, rank, None, acts)


def rows(key: jax.Array, count: int, rank: int, fan_in: int) -> jax.Array:
    """(count, rank) uniform numbers of variance 2 / fan_in; but for that factor, the same rows for any count."""
    draw = lambda i: jax.random.uniform(jax.random.fold_in(key, i), (rank,), jnp.float32, -1.0, 1.0)
    return jax.vmap(draw)(jnp.arange(count)) * jnp.float32(math.sqrt(6.0 / max(fan_in, 1)))
