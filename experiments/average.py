"""A running average of what is trained, kept by the optimizer: evaluations, samples and files see the average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from experiments.tasks.task import Params
from jlora.state import TrainState


class Averaged(NamedTuple):
    """State of `average`: of the steps 1 to `updates - 1`."""

    mean: Params
    updates: jax.Array


def average(decay: float) -> optax.GradientTransformation:
    """Leaves updates as they are and keeps the average of what they lead to.

    With theta_n the factors after n steps: mean_n = d_n mean_(n-1) + (1 - d_n) theta_n, d_n = min(decay, n / (9 + n))
    and d_1 = 0, so that the start is soon forgotten. An update sees theta_(n-1), not what comes of it, since a method
    may change it further (LoRA+): `averaged` adds the last one.

    Args:
      decay: the largest weight of what was before, in [0, 1).

    Raises:
      ValueError: for another.

    Source: the decay as in diffusers' `EMAModel`.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"a decay is in [0, 1), got {decay}")

    def init(params: Params) -> Averaged:
        return Averaged(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

    def update(updates: Params, state: Averaged, params: Params = None) -> tuple[Params, Averaged]:
        return updates, Averaged(_with(state, params, decay), state.updates + 1)

    return optax.GradientTransformation(init, update)


def averaged(state: TrainState, decay: float) -> jlora.Adapted:
    """The adapter with the averages for its factors; as it is before the first step."""
    found: list[Any] = [x for x in jax.tree.leaves(state.opt_state, is_leaf=_is_average) if _is_average(x)]
    if not found:
        raise ValueError("the optimizer keeps no average")
    return state.adapted.replace(factors=_last(found[0], state.adapted.factors, decay))


def _with(state: Averaged, params: Params, decay: float) -> Params:
    n = state.updates.astype(jnp.float32)
    d = jnp.where(state.updates < 2, 0.0, jnp.minimum(jnp.float32(decay), n / (9 + n)))
    return jax.tree.map(lambda mean, x: (d * mean + (1 - d) * x).astype(x.dtype), state.mean, params)


_last = jax.jit(_with, static_argnums=2)


def _is_average(x: Any) -> bool:
    return isinstance(x, Averaged)
