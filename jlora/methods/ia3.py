"""(IA)^3: one trained factor per output, or per input."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from jlora.methods.acts import Arrays, OnWeights
from jlora.methods.checks import check_pattern
from jlora.methods.lora import low_rank
from jlora.methods.method import Config, Method
from jlora.transform.sites import Target
from jlora.transform.weight import Weight


def ia3(feedforward: str | None = None) -> Method:
    """(IA)^3: `W diag(l)`, or `diag(l) W` for the weights whose input is rescaled; l is trained and starts at 1.

    The paper rescales keys, values (their outputs) and the hidden layer of each feed-forward block, which is the input
    of its second weight: `apply(params, method=ia3(feedforward="mlp/out"), targets=["key", "value", "mlp/out"])`. A
    bias that is added after the product is not rescaled (the paper's T5 has none); PEFT does rescale it.

    Args:
      feedforward: a pattern, searched in the path, of the weights whose inputs are rescaled.

    Raises:
      ValueError: if `feedforward` is no regular expression.

    Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv
    2205.05638, section 3.3.
    """
    feedforward = None if feedforward is None else check_pattern(feedforward, "feedforward")
    config: Config = (("name", "ia3"), ("feedforward", feedforward))

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        a_shape, b_shape = target.factor_shapes(1)
        inputs = feedforward is not None and re.search(feedforward, target.path)
        return {"scale": jnp.ones((a_shape if inputs else b_shape)[:-1], jnp.float32)}

    def weight(w: jax.Array, target: Target, factors: Arrays, buffers: Arrays) -> Weight:
        return low_rank(w, target).replace(gain=factors["scale"])

    def rescale(target: Target, factors: Arrays, buffers: Arrays, s: Any) -> tuple[Target, Arrays]:
        return target, {"scale": factors["scale"] * s + (1 - s)}  # W l = W + W (l - 1)

    return Method(config, None, None, OnWeights(init, weight, rescale=rescale))
