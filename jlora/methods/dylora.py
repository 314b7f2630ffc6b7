"""DyLoRA: one training run for all ranks up to r."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jlora.methods.acts import Factors
from jlora.methods.checks import check_rank
from jlora.methods.lora import lora
from jlora.methods.method import Config, Method, Training
from jlora.transform.sites import Target


def dylora(rank: int, alpha: float | None = None, *, minimum: int = 1, init: str = "gaussian") -> Method:
    """LoRA whose first b ranks work for every b up to r: each step trains `W + alpha / b * A[:, :b] B[:b]`.

    b is uniform from `minimum` to r, one for all weights, drawn where a key is passed (`train_step` does); without one
    all ranks are used. `truncate(adapted, b)` gives the adapter of rank b.

    Args:
      rank: r, the largest rank.
      alpha: numerator of the scale, dimensionless. The target's rank when None.
      minimum: the smallest rank that is drawn.
      init: of A, as in `lora`.

    Raises:
      ValueError: if `minimum` is no integer from 1 to `rank`, and as in `lora`.

    Source: Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank
    Adaptation", arXiv 2210.07558, algorithm 1, without its "frozen" variant.
    """
    rank, minimum = check_rank(rank), check_rank(minimum, "minimum")
    plain = lora(rank, alpha, init=init)
    if minimum > rank:
        raise ValueError(f"minimum must be at most the rank, {rank}, not {minimum}")
    config: Config = (("name", "dylora"), ("rank", rank), ("alpha", plain.alpha), ("minimum", minimum), ("init", init))

    def sample(key: jax.Array, factors: Factors, targets: Sequence[Target]) -> Factors:
        drawn = jax.random.randint(key, (), minimum, rank + 1)
        return factors | {target.path: nested(factors[target.path], drawn) for target in targets}

    return plain._replace(config=config, training=Training(sample=sample))


def nested(arrays: dict[str, jax.Array], rank: jax.Array) -> dict[str, jax.Array]:
    """The first `rank` columns of A, times r / rank, so that the scale alpha / r becomes alpha / rank."""
    whole = arrays["A"].shape[-1]
    used = jnp.minimum(rank, whole)
    mask = jnp.where(jnp.arange(whole) < used, whole / used.astype(jnp.float32), 0.0)
    return arrays | {"A": arrays["A"] * mask[(None,) * (arrays["A"].ndim - 1)]}
