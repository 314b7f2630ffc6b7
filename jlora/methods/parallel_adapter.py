"""Parallel adapters: a bottleneck beside a sub-layer, on the same input."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jlora.methods.acts import Arrays, OnActivations
from jlora.methods.bottleneck import NONLINEARITIES, bottleneck, check_nonlinearity, on_outputs
from jlora.methods.checks import check_alpha, check_rank
from jlora.methods.method import Config, Method
from jlora.transform.intercept import Adapter, stacked
from jlora.transform.sites import Target

MLP_IN = (
    r"(?i:(^|[/_])(mlp|mlp_?block|ffn|ff|feed_?forward|densereludense)(_?\d+)?"
    r"/(fc|wi|wi_0|fc1|fc_1|fc_in|lin1|linear1|up|up_proj|c_fc|dense_0)/kernel$)"
)


def parallel_adapter(rank: int, *, scale: float = 1.0, nonlinearity: str = "relu") -> Method:
    """Parallel adapters: `MLP(x) + s (f(x D + d) U + u)`, for every MLP.

    The adapter reads what the MLP reads and is added to what it returns. As in LoRA, D is random and U zero, so that
    training starts from the base. It belongs to the module that holds the module of the weight: for `h_0/mlp/fc/kernel`
    that is `h_0/mlp`; with `targets=` of `apply` (the first kernel of each MLP) too. It acts on activations: `merge`
    refuses.

    Args:
      rank: r, the width of the bottleneck: D is (width, r), U (r, width).
      scale: s, dimensionless; the paper takes 1 to 4.
      nonlinearity: f: "relu", "gelu", "silu", "tanh" or "identity".

    Raises:
      ValueError: for a rank that is no integer of at least 1, an unknown nonlinearity, or a scale of 0.

    Source: He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv 2110.04366, table 1.

    Example:
      >>> import jlora
      >>> jlora.parallel_adapter(8, scale=4.0).name
      'parallel_adapter'
    """
    rank = check_rank(rank)
    factor = check_alpha(scale, "scale")
    if factor is None:
        raise ValueError("scale must be a finite number, not None")
    check_nonlinearity(nonlinearity)
    config: Config = (
        ("name", "parallel_adapter"), ("rank", rank), ("scale", factor), ("nonlinearity", nonlinearity),
    )  # fmt: skip

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        width = math.prod(target.shape[i] for i in target.in_axes)
        bound = 1.0 / math.sqrt(width)
        zeros = lambda *shape: jnp.zeros(stacked(shape, target), jnp.float32)
        return {
            "down": jax.random.uniform(key, stacked((width, target.rank), target), jnp.float32, -bound, bound),
            "down_bias": zeros(target.rank),
            "up": zeros(target.rank, width),
            "up_bias": zeros(width),
        }

    def act(adapter: Adapter, h: jax.Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.Array:
        x = next(iter((*args, *kwargs.values())), None)
        if x is None or getattr(x, "shape", None) != h.shape:
            raise ValueError(
                f"parallel_adapter: the module above {adapter.site.path!r} returns an array of shape {h.shape}, and "
                f"its first argument is {getattr(x, 'shape', type(x).__name__)}: it is no sub-layer from x to x's "
                "shape; choose another weight with targets="
            )
        return h + jnp.asarray(factor, h.dtype) * bottleneck(adapter, x, NONLINEARITIES[nonlinearity])

    needs = "the linen module that holds the module of each weight (for 'mlp/fc/kernel' that is 'mlp'), in its __call__"
    width = lambda target: (math.prod(target.shape[i] for i in target.in_axes),)
    acts = OnActivations(init, on_outputs("parallel_adapter", width, act), needs, (MLP_IN,), holder=2)
    return Method(config, rank, None, acts)
