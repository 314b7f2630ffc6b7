"""CorDA: the weight decomposed in the light of its inputs' covariance."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jlora.methods.acts import Data, Factors
from jlora.methods.matrix import check_finite, check_fits, check_not_zero, matrices, one_by_one, thin_svd
from jlora.methods.method import Config, Method
from jlora.methods.pissa import pissa
from jlora.methods.residual import check_positive, from_initial
from jlora.transform.sites import Target

MODES = ("instruction", "knowledge")
_DAMPING = 1e-2  # times the mean of the covariance's diagonal


def corda(rank: int, alpha: float | None = None, *, mode: str = "instruction") -> Method:
    """LoRA that starts from the SVD of `C W`, C being the covariance of the weight's inputs.

    With C W = U S V^T (inputs by outputs), A0 = C^-1 U_r sqrt(S_r / s) and B0 = sqrt(S_r / s) V_r^T, s = alpha / r, and
    s A0 B0 is taken out of the base as in `pissa`. C is scaled to a mean diagonal of 1 and gets 0.01 added to it.

    Args:
      rank: r, at most the smaller side of the weight.
      alpha: numerator of the scale, dimensionless, positive. The target's rank when None.
      mode: "instruction" trains the r largest components, on inputs of the task to learn ("instruction-previewed");
        "knowledge" the r smallest, on inputs of what is to be kept ("knowledge-preserved").

    Raises:
      ValueError: if `mode` is unknown, and as in `pissa`; in `apply` without `statistics=`.

    Source: Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", arXiv 2406.05223,
    section 3.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, not {mode!r}")
    plain = pissa(rank, alpha)
    config: Config = (("name", "corda"), ("rank", plain.rank), ("alpha", plain.alpha), ("mode", mode))

    def fit(
        key: jax.Array,
        named: Mapping[str, jax.Array],
        targets: Sequence[Target],
        covariances: Mapping[str, jax.Array],
    ) -> tuple[tuple[Target, ...], Factors]:
        arrays = {}
        for target in targets:
            check_fits(target.rank, target, "corda")
            check_finite(named[target.path], target, "corda")
            check_positive(target.alpha, f"corda: alpha of {target.path!r}")
            w = matrices(named[target.path].astype(jnp.float32), target)
            check_not_zero(w, target, "corda")
            c = covariances[target.path]
            one = jnp.eye(c.shape[-1], dtype=c.dtype)
            trace = jnp.trace(c, axis1=1, axis2=2)[:, None, None]  # 0 of an expert that no row was sent to
            c = c / jnp.where(trace > 0, trace, 1.0) * c.shape[-1] + _DAMPING * one[None]
            u, s, vt = one_by_one(thin_svd, c @ w)
            part = slice(0, target.rank) if mode == "instruction" else slice(s.shape[1] - target.rank, s.shape[1])
            root = jnp.sqrt(s[:, part] * (target.rank / target.alpha))
            a = one_by_one(jnp.linalg.solve, c, u[:, :, part])
            arrays[target.path] = from_initial(a * root[:, None, :], root[:, :, None] * vt[:, part], target)
        return tuple(targets), arrays

    return plain._replace(config=config, acts=plain.acts.replace(data=Data("covariance", fit)))
