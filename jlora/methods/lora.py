"""LoRA: low-rank adaptation."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jlora.methods.acts import Arrays, OnWeights, linear_in
from jlora.methods.checks import check_alpha, check_number, check_rank
from jlora.methods.method import Config, Method
from jlora.transform.axes import fan_in
from jlora.transform.sites import Target
from jlora.transform.weight import Place, Weight

INITS = ("gaussian", "kaiming_uniform", "inverse_rank")


def lora(rank: int, alpha: float | None = None, *, init: str = "gaussian", dropout: float = 0.0) -> Method:
    """LoRA: `W + alpha / r * B A`, with W frozen, and A and B trained.

    A starts random and B at zero, so that training starts from the base. The paper says that A is Gaussian; its code
    draws it uniformly. Both are here with the variance of that code, 1 / (3 n), n being the inputs that an output sums
    over. An embedding's rows are looked up, not summed: as in the paper's code its A is zero and its B normal.

    Args:
      rank: r, the number of columns of A. At least 1.
      alpha: numerator of the scale, dimensionless. The target's rank when None, which makes the scale 1.
      init: of A: "gaussian", N(0, 1 / (3 n)), "kaiming_uniform", U(-1 / sqrt(n), 1 / sqrt(n)), as loralib and PEFT, or
        "inverse_rank", N(0, 1 / rank^2), which PEFT calls gaussian and diffusers' scripts take.
      dropout: probability with which an input of the low-rank branch is dropped, where there is a key (`with_dropout`).

    Raises:
      ValueError: if `rank` < 1 or is no integer, `init` is unknown, or `dropout` is outside [0, 1).

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3; microsoft/LoRA.

    Example:
      >>> import jlora
      >>> jlora.lora(8, alpha=16)
      lora(rank=8, alpha=16, init='gaussian', dropout=0.0)
    """
    return scaled("lora", lambda alpha, rank: alpha / rank, rank, alpha, init, dropout)


def scaled(name: str, scale: Any, rank: int, alpha: float | None, init: str, dropout: float) -> Method:
    """The method `W + scale(alpha, r) * B A`."""
    rank, alpha, dropout = check_rank(rank), check_alpha(alpha), check_number(dropout, "dropout")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, not {init!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout!r}")
    config: Config = (("name", name), ("rank", rank), ("alpha", alpha), ("init", init), ("dropout", dropout))

    def initialise(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        return low_rank_init(key, target, init)

    def weight(w: jax.Array, target: Target, factors: Arrays, buffers: Arrays) -> Weight:
        by = float(scale(target.alpha, target.rank))
        return low_rank(w, target, factors["A"], factors["B"]).replace(by=by, dropout=dropout)

    return Method(config, rank, alpha, OnWeights(initialise, weight, rescale=linear_in("B")))


def low_rank(w: jax.Array, target: Target, a: jax.Array | None = None, b: jax.Array | None = None) -> Weight:
    """The lazy weight `w + a b` of a target; `w` alone without factors."""
    return Weight(w, a, b, place=Place(target.path, tuple((i,) for i in range(w.ndim))))


def low_rank_init(key: jax.Array, target: Target, init: str) -> Arrays:
    """A and B in broadcast form, float32: see `lora`."""
    a_shape, b_shape = target.factor_shapes()
    if target.kind == "embedding":
        return {"A": jnp.zeros(a_shape, jnp.float32), "B": jax.random.normal(key, b_shape, jnp.float32)}
    bound = 1.0 / math.sqrt(max(fan_in(target.shape, target.in_axes), 1))
    if init == "gaussian":
        a = jax.random.normal(key, a_shape, jnp.float32) * jnp.float32(bound / math.sqrt(3.0))
    elif init == "inverse_rank":
        a = jax.random.normal(key, a_shape, jnp.float32) / jnp.float32(target.rank)
    else:
        a = jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)
    return {"A": a, "B": jnp.zeros(b_shape, jnp.float32)}
