"""PiSSA: the principal singular values are trained, the rest is frozen."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jlora.methods.acts import Arrays, OnWeights
from jlora.methods.checks import check_rank, whole
from jlora.methods.lora import lora
from jlora.methods.matrix import check_finite, check_fits, check_not_zero, matrices, thin_svd
from jlora.methods.method import Config, Method
from jlora.methods.residual import START, check_positive, from_initial, minus_initial, rescaled
from jlora.transform.sites import Target

_MOST = 100  # iterations, each of which is a part of the program of its own
_OVERSAMPLING = 10  # columns more than the rank in the randomised range finder


def pissa(rank: int, alpha: float | None = None, *, iterations: int | None = None) -> Method:
    """LoRA that starts from the r largest singular values: `W - s A0 B0 + s A B`, s = alpha / r.

    With W = U S V^T (inputs by outputs), A0 = U_r sqrt(S_r / s) and B0 = sqrt(S_r / s) V_r^T, so that s A0 B0 is W's
    best approximation of rank r. The frozen A0 and B0 are in the adapter's file; `to_lora` gives a plain LoRA of rank
    2r.

    Args:
      rank: r, at most the smaller side of the weight.
      alpha: numerator of the scale, dimensionless, positive. The target's rank when None.
      iterations: power iterations of a randomised SVD (the paper's fast SVD; 4 to 16); None for the exact one.

    Raises:
      ValueError: if `rank` < 1, no integer or larger than a weight has, `alpha` is not positive, `iterations` is not
        within 0 to 100, or a weight is not finite or zero.

    Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    arXiv 2404.02948, eq. 2 to 4; Halko et al., arXiv 0909.4061, algorithm 4.4.
    """
    rank, alpha = check_rank(rank), check_positive(alpha)
    iterations = check_iterations(iterations)
    config: Config = (("name", "pissa"), ("rank", rank), ("alpha", alpha), ("iterations", iterations))

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        check_fits(target.rank, target, "pissa")
        check_finite(w, target, "pissa")
        check_positive(target.alpha, f"pissa: alpha of {target.path!r}")
        stacked = matrices(w.astype(jnp.float32), target)
        check_not_zero(stacked, target, "pissa")
        keys = jax.random.split(key, len(stacked))
        u, s, vt = principal(stacked, target.rank, iterations, keys)
        root = jnp.sqrt(s * (target.rank / target.alpha))
        return from_initial(u * root[:, None, :], root[:, :, None] * vt, target)

    residual = lambda: lora(rank, alpha)
    acts = OnWeights(init, minus_initial, frozen=START, rescale=rescaled, residual=residual)
    return Method(config, rank, alpha, acts)


def check_iterations(iterations: Any) -> int | None:
    """Returns a number of power iterations, or None for the exact SVD.

    Raises:
      ValueError: if it is neither None nor an integer from 0 to 100.
    """
    if iterations is None:
        return None
    number = whole(iterations)
    if number is None or number < 0:
        raise ValueError(f"iterations must be None or an integer of at least 0, not {iterations!r:.200}")
    if number > _MOST:
        raise ValueError(f"iterations must be at most {_MOST}, not {number}; None for the exact SVD")
    return number


@functools.partial(jax.jit, static_argnums=(1, 2))
def principal(
    stacked: jax.Array, rank: int, iterations: int | None, keys: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The r largest singular triplets of each of the stacked matrices: (stack, n, r), (stack, r), (stack, r, k).

    Compiled once per shape, and one matrix after the other: see `one_by_one` in methods/matrix.py.
    """

    def decompose(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        m, key = row
        if iterations is None or rank + _OVERSAMPLING >= min(m.shape):
            u, s, vt = thin_svd(m)
            return u[:, :rank], s[:rank], vt[:rank]
        q, _ = jnp.linalg.qr(m @ jax.random.normal(key, (m.shape[1], rank + _OVERSAMPLING), m.dtype))
        for _ in range(iterations):
            q, _ = jnp.linalg.qr(m.T @ q)
            q, _ = jnp.linalg.qr(m @ q)
        u, s, vt = thin_svd(q.T @ m)
        return q @ u[:, :rank], s[:rank], vt[:rank]

    return jax.lax.map(decompose, (stacked, keys))
