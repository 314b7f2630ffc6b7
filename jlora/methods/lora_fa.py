"""LoRA-FA: half of LoRA's parameters, and no activation kept for the other half."""

from typing import Any

import jax
import jax.numpy as jnp

from jlora.methods.acts import Arrays
from jlora.methods.lora import lora
from jlora.methods.method import Config, Method
from jlora.transform.sites import Target
from jlora.transform.weight import Weight


def lora_fa(rank: int, alpha: float | None = None, *, init: str = "gaussian", dropout: float = 0.0) -> Method:
    """LoRA with a frozen A: `W + alpha / r * B A`, B trained alone.

    The rows of an embedding's A are normal here (`lora` starts them at zero, which would freeze them there).

    The backward pass of a frozen A needs no input x, which is not kept then: x A (r numbers per row) is.

    Args:
      rank: r, the number of columns of A. At least 1.
      alpha: numerator of the scale, dimensionless. The target's rank when None.
      init: of A, as in `lora`.
      dropout: of the low-rank branch's input, as in `lora`.

    Raises:
      ValueError: as in `lora`.

    Source: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv
    2308.03303, eq. 4.
    """
    plain = lora(rank, alpha, init=init, dropout=dropout)
    acts: Any = plain.acts
    config: Config = (("name", "lora_fa"), *plain.config[1:])

    def initialise(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        if target.kind != "embedding":
            return acts.init(key, w, target)
        a_shape, b_shape = target.factor_shapes()
        return {"A": jax.random.normal(key, a_shape, jnp.float32), "B": jnp.zeros(b_shape, jnp.float32)}

    def weight(w: jax.Array, target: Target, factors: Arrays, buffers: Arrays) -> Weight:
        return acts.weight(w, target, factors | {"A": buffers["A"]}, buffers)

    return plain._replace(config=config, acts=acts.replace(init=initialise, weight=weight, frozen=("A",)))
