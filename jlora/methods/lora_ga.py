"""LoRA-GA: the first step goes where full fine-tuning's would."""

import math
from collections.abc import Mapping, Sequence

import jax

from jlora.methods.acts import Data, Factors
from jlora.methods.checks import check_number
from jlora.methods.matrix import check_fits, one_by_one, sizes, thin_svd
from jlora.methods.method import Config, Method
from jlora.methods.pissa import pissa
from jlora.methods.residual import from_initial
from jlora.transform.sites import Target


def lora_ga(rank: int, alpha: float | None = None, *, gamma: float = 16.0) -> Method:
    """LoRA that starts from the SVD of the loss's gradient with respect to the weight.

    With the gradient G = U S V^T (inputs by outputs), A0 is the first r columns of U and B0 the next r of V^T, each
    times outputs^(1/4) / sqrt(gamma), and alpha / r A0 B0 is taken out of the base as in `pissa`.

    Args:
      rank: r, at most half the smaller side of the weight.
      alpha: numerator of the scale, dimensionless, positive. The target's rank when None.
      gamma: the larger, the smaller the start.

    Raises:
      ValueError: if `alpha` or `gamma` is not positive, or a weight has fewer than 2r singular values; in `apply`
        without `statistics=`, of a loss.

    Source: Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000, section 3.
    """
    plain, gamma = pissa(rank, alpha), check_number(gamma, "gamma")
    if gamma <= 0:
        raise ValueError(f"gamma must be positive and finite, not {gamma!r}")
    config: Config = (("name", "lora_ga"), ("rank", plain.rank), ("alpha", plain.alpha), ("gamma", gamma))

    def fit(
        key: jax.Array,
        named: Mapping[str, jax.Array],
        targets: Sequence[Target],
        gradients: Mapping[str, jax.Array],
    ) -> tuple[tuple[Target, ...], Factors]:
        arrays = {}
        for target in targets:
            check_fits(2 * target.rank, target, "lora_ga (2r)")
            u, _, vt = one_by_one(thin_svd, gradients[target.path])
            size = sizes(target)[2] ** 0.25 / math.sqrt(gamma)
            arrays[target.path] = from_initial(
                u[:, :, : target.rank] * size, vt[:, target.rank : 2 * target.rank] * size, target
            )
        return tuple(targets), arrays

    return plain._replace(config=config, acts=plain.acts.replace(data=Data("gradient", fit)))
