"""EVA: A starts from what the weight's inputs look like, and ranks go where they explain most."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jlora.methods.acts import Data, Factors
from jlora.methods.checks import check_number
from jlora.methods.lora import lora
from jlora.methods.matrix import a_form, b_form, check_fits, one_by_one, sizes
from jlora.methods.method import Config, Method
from jlora.transform.sites import Target


def eva(rank: int, alpha: float | None = None, *, rho: float = 2.0, dropout: float = 0.0) -> Method:
    """LoRA whose A starts as the principal components of the weight's inputs on the data, and B at zero.

    The components are the eigenvectors of the sum of x x^T over the batches (the right singular vectors of all inputs).
    The total of the ranks is then given anew: of the `rho * r` first components of each weight, those that explain the
    largest share of their weight's variance are taken, over all weights. A weight may end with up to `rho * r` ranks,
    or with none, and then is not adapted; alpha grows with r, so that the scale stays. The layers of a stacked weight
    keep one rank, by the mean of their shares.

    Args:
      rank: r, the mean over all weights.
      alpha: numerator of the scale, dimensionless. The target's rank when None.
      rho: how many times r a weight may get; 1 for the same rank everywhere.
      dropout: of the low-rank branch's input, as in `lora`.

    Raises:
      ValueError: if `rho` < 1, and as in `lora`; in `apply` without `statistics=`, or under a transformation.

    Source: Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", arXiv
    2410.07170, section 3.
    """
    rho, dropout = check_number(rho, "rho"), check_number(dropout, "dropout")
    if rho < 1:
        raise ValueError(f"rho must be finite and at least 1, not {rho!r}")
    plain = lora(rank, alpha, dropout=dropout)
    config: Config = (
        ("name", "eva"), ("rank", plain.rank), ("alpha", plain.alpha), ("rho", rho), ("dropout", dropout),
    )  # fmt: skip

    def fit(
        key: jax.Array,
        named: Mapping[str, jax.Array],
        targets: Sequence[Target],
        covariances: Mapping[str, jax.Array],
    ) -> tuple[tuple[Target, ...], Factors]:
        components, shares = {}, {}
        for target in targets:
            check_fits(target.rank, target, "eva")
            # Ascending: (stack, n), (stack, n, n).
            values, vectors = one_by_one(jnp.linalg.eigh, covariances[target.path])
            most = min(round(target.rank * rho), sizes(target)[1])
            components[target.path] = vectors[:, :, ::-1][:, :, :most]
            whole = jnp.sum(values, axis=1, keepdims=True)
            ratio = values[:, ::-1] / jnp.where(whole > 0, whole, 1.0)  # 0 of an expert that no row was sent to
            shares[target.path] = _known(jnp.mean(ratio[:, :most], axis=0))
        given = redistributed(targets, shares)
        chosen = tuple(target for target in given if target.rank)
        return chosen, {
            target.path: {
                "A": a_form(components[target.path][:, :, : target.rank], target),
                "B": b_form(jnp.zeros((sizes(target)[0], target.rank, sizes(target)[2]), jnp.float32), target),
            }
            for target in chosen
        }

    return plain._replace(config=config, acts=plain.acts.replace(data=Data("covariance", fit)))


def redistributed(targets: Sequence[Target], shares: Mapping[str, np.ndarray]) -> list[Target]:
    """The targets with the ranks that the largest shares of all give them; the total stays."""
    total = sum(target.rank for target in targets)
    everyone = sorted(
        ((share, -i, target.path) for target in targets for i, share in enumerate(shares[target.path])), reverse=True
    )
    ranks = dict.fromkeys((target.path for target in targets), 0)
    for _, _, path in everyone[:total]:
        ranks[path] += 1
    return [
        dataclasses.replace(target, rank=ranks[target.path], alpha=_alpha(target, ranks[target.path]))
        for target in targets
    ]


def _known(share: jax.Array) -> np.ndarray:
    try:
        return np.asarray(share)
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            "eva: how the ranks are given depends on the numbers in statistics=, which no transformation knows: call "
            "apply outside of jit, vmap and eval_shape"
        ) from error


def _alpha(target: Target, rank: int) -> float:
    """The numerator that keeps the scale."""
    return target.alpha * rank / target.rank
