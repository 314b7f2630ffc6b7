"""LoKr: a Kronecker product of a small matrix and a low-rank one."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora.methods.acts import Arrays, OnWeights, linear_in
from jlora.methods.checks import check_alpha, check_rank, whole
from jlora.methods.lora import low_rank
from jlora.methods.matrix import a_form, b_form, sizes
from jlora.methods.method import Config, Method
from jlora.transform.sites import Target
from jlora.transform.weight import Weight


class Sides(NamedTuple):
    """Inputs and outputs of the two matrices: `inner` is the small one."""

    inner: tuple[int, int]
    outer: tuple[int, int]


def lokr(rank: int, alpha: float | None = None, *, factor: int = -1) -> Method:
    """LoKr: `W + alpha / r * kron(C, A B)`, C small and whole, A B of rank r (whole, too, where r is not small).

    Inputs and outputs are split into two factors, the smaller of which is C's side: the largest divisor up to `factor`
    that is no larger than its cofactor. In the lazy weight's form the rank is r times C's smaller side, whatever is
    stored: a 512 x 2048 weight has a C of 16 x 32 and at r = 16 a rank of 256, which adds 0.63 of the base product's
    FLOPs. (Reshaped inputs that meet A, C and B in turn would add 0.05; that product is not of the form `W + a b`.) A
    small `factor` keeps the rank low: with 4 it is 64.

    As in LyCORIS and PEFT, C starts at zero; A and B are uniform with variance 1 / (3 n) for n inputs.

    Args:
      rank: r of the second matrix. From half its larger side on, that matrix is kept whole.
      alpha: numerator of the scale, dimensionless. The target's rank when None.
      factor: the largest side of C; -1 for no bound, which makes both matrices nearly square.

    Raises:
      ValueError: if `rank` < 1 or is no integer, `alpha` is no finite number other than 0, or `factor` is neither -1
        nor at least 1.

    Source: Yeh et al. (LyCORIS), arXiv 2309.14859, section 3.2; Edalati et al. (KronA), arXiv 2212.10650.
    """
    rank, alpha = check_rank(rank), check_alpha(alpha)
    largest = whole(factor)
    if largest is None or not (largest == -1 or largest >= 1):
        raise ValueError(f"factor must be -1 or an integer of at least 1, not {factor!r}")
    config: Config = (("name", "lokr"), ("rank", rank), ("alpha", alpha), ("factor", largest))

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        stack = sizes(target)[0]
        (i1, o1), (i2, o2) = sides(target, factor)
        one, two = jax.random.split(key)
        arrays = {"C": jnp.zeros((stack, i1, o1), jnp.float32)}
        if target.rank < max(i2, o2) / 2:
            return arrays | {
                "A": _uniform(one, (stack, i2, target.rank), i2),
                "B": _uniform(two, (stack, target.rank, o2), target.rank),
            }
        return arrays | {"D": _uniform(one, (stack, i2, o2), i2)}

    def weight(w: jax.Array, target: Target, factors: Arrays, buffers: Arrays) -> Weight:
        c1, c2 = _split(factors["C"] * (target.alpha / target.rank))  # (stack, i1, k), (stack, k, o1)
        a, b = (factors["A"], factors["B"]) if "A" in factors else _split(factors["D"])
        _, inputs, outputs = sizes(target)
        terms = c2.shape[1] * b.shape[1]
        left = jnp.einsum("nik,njr->nijkr", c1, a).reshape(len(a), inputs, terms)  # (stack, i1 i2, k r)
        right = jnp.einsum("nko,nrp->nkrop", c2, b).reshape(len(a), terms, outputs)  # (stack, k r, o1 o2)
        return low_rank(w, target, a_form(left, target), b_form(right, target))

    return Method(config, rank, alpha, OnWeights(init, weight, rescale=linear_in("C")))


def sides(target: Target, factor: int) -> Sides:
    """The sides of the two matrices of the Kronecker product."""
    _, inputs, outputs = sizes(target)
    i1, o1 = (small_side(n, factor) for n in (inputs, outputs))
    return Sides((i1, o1), (inputs // i1, outputs // o1))


def small_side(n: int, factor: int) -> int:
    """The largest divisor of n that is at most `factor` (-1: any) and at most n over it; 1 of nothing."""
    bound = math.isqrt(n) if factor == -1 else min(factor, math.isqrt(n))
    return max((d for d in range(1, bound + 1) if n % d == 0), default=1)


def _split(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A whole matrix (stack, n, k) as a product over its smaller side, with the identity."""
    n, k = m.shape[1:]
    one = jnp.broadcast_to(jnp.eye(min(n, k), dtype=m.dtype), (len(m), min(n, k), min(n, k)))
    return (one, m) if n <= k else (m, one)


def _uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    bound = 1.0 / math.sqrt(max(fan_in, 1))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
