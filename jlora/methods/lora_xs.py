"""LoRA-XS: r x r trained numbers between the frozen singular vectors of the weight."""

import jax
import jax.numpy as jnp

from jlora.methods.acts import Arrays, OnWeights, linear_in
from jlora.methods.checks import check_alpha, check_number, check_rank
from jlora.methods.lora import low_rank
from jlora.methods.matrix import a_form, b_form, b_matrix, check_finite, check_fits, check_not_zero, matrices, sizes
from jlora.methods.method import Config, Method
from jlora.methods.pissa import check_iterations, principal
from jlora.transform.sites import Target
from jlora.transform.weight import Weight


def lora_xs(rank: int, alpha: float | None = None, *, std: float = 0.0, iterations: int | None = None) -> Method:
    """LoRA-XS: `W + alpha / r * A R B`, with A and B frozen, and R (r, r) trained alone.

    With W = U S V^T (inputs by outputs), A = U_r S_r and B = V_r^T. A and B are not zero, so R may start at zero and
    has a gradient there: training starts from the base exactly. The paper and its code draw R from N(0, 1e-5^2), which
    starts near the base: `std=1e-5`. An adapter's file holds A and B beside R, since another machine's SVD may have
    other signs. The backward pass needs no input x of a weight, as in `lora_fa`: x A is kept (r numbers per row).

    Args:
      rank: r, at most the smaller side of the weight; r^2 trained parameters per weight.
      alpha: numerator of the scale, dimensionless. The target's rank when None, which makes the scale 1.
      std: of the initial R, dimensionless.
      iterations: of a randomised SVD, as in `pissa`; None for the exact one.

    Raises:
      ValueError: if `rank` < 1, no integer or larger than a weight has, `alpha` is no finite number other than 0, `std`
        is negative, `iterations` is not within 0 to 100, or a weight is not finite or zero.

    Source: Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604,
    section 3.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.apply({"kernel": jnp.eye(6)}, method=jlora.lora_xs(2))
      >>> {name: array.shape for name, array in adapted.factors["kernel"].items()}
      {'R': (1, 2, 2)}
    """
    rank, alpha, std = check_rank(rank), check_alpha(alpha), check_number(std, "std")
    if std < 0:
        raise ValueError(f"std must be at least 0, not {std!r}")
    iterations = check_iterations(iterations)
    config: Config = (("name", "lora_xs"), ("rank", rank), ("alpha", alpha), ("std", std), ("iterations", iterations))

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        check_fits(target.rank, target, "lora_xs")
        check_finite(w, target, "lora_xs")
        stacked = matrices(w.astype(jnp.float32), target)
        check_not_zero(stacked, target, "lora_xs")
        r_key, svd_key = jax.random.split(key)
        u, s, vt = principal(stacked, target.rank, iterations, jax.random.split(svd_key, len(stacked)))
        shape = (sizes(target)[0], target.rank, target.rank)
        return {
            "R": std * jax.random.normal(r_key, shape, jnp.float32) if std else jnp.zeros(shape, jnp.float32),
            "A": a_form(u * s[:, None, :], target),
            "B": b_form(vt, target),
        }

    def weight(w: jax.Array, target: Target, factors: Arrays, buffers: Arrays) -> Weight:
        a = buffers["A"] * jnp.asarray(target.alpha / target.rank, buffers["A"].dtype)
        rb = factors["R"] @ b_matrix(buffers["B"], target)  # (stack, r, outputs)
        return low_rank(w, target, a, b_form(rb, target))

    return Method(config, rank, alpha, OnWeights(init, weight, frozen=("A", "B"), rescale=linear_in("R")))
