"""LoRA-GA: the first step goes where full fine-tuning's would."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jlora.methods.matrix import check_fits, sizes
from jlora.methods.method import Config, Data, Factors, Method
from jlora.methods.pissa import pissa
from jlora.methods.residual import started
from jlora.sites import Site


def lora_ga(rank: int, alpha: float | None = None, *, gamma: float = 16.0) -> Method:
    """LoRA that starts from the SVD of the loss's gradient with respect to the weight.

    With the gradient G = U S V^T (inputs by outputs), A0 is the first r columns of U and B0 the next r of V^T, each
    times outputs^(1/4) / sqrt(gamma), and alpha / r A0 B0 is taken out of the base as in `pissa`.

    Args:
      rank: r, at most half the smaller side of the weight.
      alpha: numerator of the scale, dimensionless. The site's rank when None.
      gamma: the larger, the smaller the start.

    Raises:
      ValueError: if `gamma` is not positive, or a weight has fewer than 2r singular values; in `apply` without `fn=` (a
        loss) and `batches=`.

    Source: Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000, section 3.
    """
    if not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(f"gamma must be positive and finite, not {gamma!r}")
    plain = pissa(rank, alpha)
    config: Config = (("name", "lora_ga"), ("rank", rank), ("alpha", alpha), ("gamma", gamma))

    def fit(
        key: jax.Array,
        named: Mapping[str, jax.Array],
        sites: Sequence[Site],
        gradients: Mapping[str, jax.Array],
    ) -> tuple[tuple[Site, ...], Factors]:
        arrays = {}
        for site in sites:
            assert site.rank is not None
            check_fits(2 * site.rank, site, "lora_ga (2r)")
            u, _, vt = jnp.linalg.svd(gradients[site.path], full_matrices=False)
            size = sizes(site)[2] ** 0.25 / math.sqrt(gamma)
            arrays[site.path] = started(u[:, :, : site.rank] * size, vt[:, site.rank : 2 * site.rank] * size, site)
        return tuple(sites), arrays

    return plain._replace(config=config, data=Data("gradient", fit))
