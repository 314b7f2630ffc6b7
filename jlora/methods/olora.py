"""OLoRA: an orthonormal start, by a QR decomposition of the weight."""

import jax
import jax.numpy as jnp

from jlora.methods.acts import Arrays, OnWeights
from jlora.methods.checks import check_alpha, check_rank
from jlora.methods.lora import lora
from jlora.methods.matrix import check_finite, check_fits, matrices, one_by_one
from jlora.methods.method import Config, Method
from jlora.methods.residual import START, from_initial, minus_initial, rescaled
from jlora.transform.sites import Target


def olora(rank: int, alpha: float | None = None) -> Method:
    """LoRA that starts from the QR decomposition of the weight: `W - s A0 B0 + s A B`, s = alpha / r.

    With W^T = Q R (outputs by inputs), B0 is the first r columns of Q, transposed, and A0 the first r rows of R. A base
    that is stored (in, out) and one that is stored (out, in) start alike.

    Args:
      rank: r, at most the smaller side of the weight.
      alpha: numerator of the scale, dimensionless. The target's rank when None.

    Raises:
      ValueError: if `rank` < 1, no integer or larger than a weight has, `alpha` is no finite number other than 0, or a
        weight is not finite.

    Source: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775, section 3.
    """
    rank, alpha = check_rank(rank), check_alpha(alpha)
    config: Config = (("name", "olora"), ("rank", rank), ("alpha", alpha))

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        check_fits(target.rank, target, "olora")
        check_finite(w, target, "olora")
        q, r = one_by_one(jnp.linalg.qr, jnp.swapaxes(matrices(w.astype(jnp.float32), target), 1, 2))
        return from_initial(jnp.swapaxes(r[:, : target.rank], 1, 2), jnp.swapaxes(q[:, :, : target.rank], 1, 2), target)

    residual = lambda: lora(rank, alpha)
    acts = OnWeights(init, minus_initial, frozen=START, rescale=rescaled, residual=residual)
    return Method(config, rank, alpha, acts)
