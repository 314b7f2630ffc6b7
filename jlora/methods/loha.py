"""LoHa: the Hadamard product of two low-rank matrices."""

import jax
import jax.numpy as jnp

from jlora.methods.acts import Arrays, OnWeights, linear_in
from jlora.methods.checks import check_alpha, check_rank
from jlora.methods.lora import low_rank
from jlora.methods.method import Config, Method
from jlora.transform.sites import Target
from jlora.transform.weight import Weight


def loha(rank: int, alpha: float | None = None) -> Method:
    """LoHa: `W + alpha / r * (A1 B1) * (A2 B2)`, the product of the two taken entry by entry: a rank of up to r^2.

    The product is never formed: its factors are the Khatri-Rao products, `a[i, (k, l)] = A1[i, k] A2[i, l]`.

    As in LyCORIS and PEFT, A1 and A2 are normal with deviation 1, B1 with 0.1, and B2 is zero.

    Args:
      rank: r of each of the two matrices.
      alpha: numerator of the scale, dimensionless. The target's rank when None.

    Raises:
      ValueError: if `rank` < 1 or is no integer, `alpha` is no finite number other than 0.

    Source: Hyeon-Woo et al., "FedPara", arXiv 2108.06098, prop. 1; Yeh et al. (LyCORIS), arXiv 2309.14859, section 3.2.
    """
    rank, alpha = check_rank(rank), check_alpha(alpha)
    config: Config = (("name", "loha"), ("rank", rank), ("alpha", alpha))

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        a_shape, b_shape = target.factor_shapes()
        one, two, three = jax.random.split(key, 3)
        return {
            "A1": jax.random.normal(one, a_shape, jnp.float32),
            "B1": jax.random.normal(two, b_shape, jnp.float32) * 0.1,
            "A2": jax.random.normal(three, a_shape, jnp.float32),
            "B2": jnp.zeros(b_shape, jnp.float32),
        }

    def weight(w: jax.Array, target: Target, factors: Arrays, buffers: Arrays) -> Weight:
        a = khatri_rao(factors["A1"] * (target.alpha / target.rank), factors["A2"])
        return low_rank(w, target, a, khatri_rao(factors["B1"], factors["B2"]))

    return Method(config, rank, alpha, OnWeights(init, weight, rescale=linear_in("B2")))


def khatri_rao(x: jax.Array, y: jax.Array) -> jax.Array:
    """All products of a column of x with one of y: (..., r), (..., r) -> (..., r * r)."""
    return (x[..., :, None] * y[..., None, :]).reshape(*x.shape[:-1], x.shape[-1] * y.shape[-1])
