"""A sampler as data, `Sampler`, and the two forms that most have: a linear step, on abar or on sigmas."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.diffusion.noise import Array, Noise, split

State = Any
Factors = np.ndarray | None
"""Of each step, (N,), or None for a term that is not there."""


class Sampler(NamedTuple):
    """One way from noise to an image: N evaluations of the model, of index 0 to N - 1, which may be traced.

    The functions compute in float32 and return x's dtype. Best keep x in float32 from step to step, and cast the
    model's input alone:

        def body(carry, i):
            x, state = carry
            prediction = model(sampler.scale(i, x).astype(dtype), jnp.asarray(sampler.timesteps)[i])
            z = jax.random.normal(jax.random.fold_in(key, i), x.shape) if sampler.random else None
            return sampler.step(i, x, prediction, state, z), None

        x = sampler.start * jax.random.normal(key, shape)
        (x, _), _ = jax.lax.scan(body, (x, sampler.init(x)), jnp.arange(len(sampler.timesteps)))

    Attributes:
      timesteps: what the model is told at each evaluation, (N,), float32; fractions with some spacings.
      start: factor of the unit normal noise that the first x is.
      random: whether `step` adds fresh noise, and needs z.
      init: x -> the state before the first step; `()` where there is none.
      scale: (i, x) -> the model's input.
      step: (i, x, prediction, state, z) -> x after the step, and the state. z is unit normal noise of x's shape; None
        will do where `random` is false.
      noised: (i, x0, eps) -> x0 with the noise that x has before step i; at i = N, x0. Image to image is steps i to
        N - 1 from there, with a fresh state; inpainting puts it where the image is kept, after step i that of i + 1.
    """

    timesteps: np.ndarray
    start: float
    random: bool
    init: Callable[[Array], State]
    scale: Callable[[Array, Array], jax.Array]
    step: Callable[[Array, Array, Array, State, Array | None], tuple[jax.Array, State]]
    noised: Callable[[Array, Array, Array], jax.Array]


def on_abar(
    noise: Noise,
    times: np.ndarray,
    now: np.ndarray,
    *,
    x0: np.ndarray,
    eps: Factors = None,
    x: Factors = None,
    z: Factors = None,
) -> Sampler:
    """Sampler in `x = sqrt(abar) x0 + sqrt(1 - abar) eps`, whose step is a sum of x0, eps, x and z.

    Args:
      noise: of the model; its `clip` bounds x0.
      times: timesteps, (N,).
      now: abar at each step, (N,).
      x0: factors of the predicted x0.
      eps: factors of the predicted eps.
      x: factors of x as it was.
      z: factors of fresh noise.
    """
    a, s = levels(now)

    def step(i: Array, of: Array, prediction: Array, state: State, fresh: Array | None) -> tuple[jax.Array, State]:
        of = jnp.asarray(of)
        clean, dirt = split(noise.prediction, wide(of), wide(prediction), at(a, i), at(s, i))
        clean = clean if noise.clip is None else jnp.clip(clean, -noise.clip, noise.clip)
        return summed(i, (x0, clean), (eps, dirt), (x, wide(of)), (z, fresh)).astype(of.dtype), state

    return Sampler(times.astype(np.float32), 1.0, z is not None, stateless, unscaled, step, mixed(a, s))


def on_sigmas(
    noise: Noise, times: np.ndarray, sigmas: np.ndarray, start: float, *, eps: np.ndarray, z: Factors = None
) -> Sampler:
    """Sampler in `x = x0 + sigma eps`, whose step is x0 and a sum of eps and z.

    Args:
      noise: of the model.
      times: timesteps, (N,).
      sigmas: of each step, and after the last one, (N + 1,).
      start: factor of the first noise.
      eps: factors of the predicted eps, (N,).
      z: factors of fresh noise, (N,).
    """
    a, s = 1 / np.sqrt(1 + sigmas**2), sigmas / np.sqrt(1 + sigmas**2)
    one = np.ones(len(eps))

    def step(i: Array, x: Array, prediction: Array, state: State, fresh: Array | None) -> tuple[jax.Array, State]:
        x = jnp.asarray(x)
        clean, dirt = split(noise.prediction, at(a, i) * wide(x), wide(prediction), at(a, i), at(s, i))
        return summed(i, (one, clean), (eps, dirt), (z, fresh)).astype(x.dtype), state

    def scale(i: Array, x: Array) -> jax.Array:
        return (at(a, i) * wide(x)).astype(x.dtype)

    noised = mixed(np.ones(len(sigmas)), sigmas)
    return Sampler(times.astype(np.float32), start, z is not None, stateless, scale, step, noised)


# -- parts -------------------------------------------------------------------------------------------------------------


def levels(now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of x0 and eps in x, before each step and after the last, (N + 1,), from abar before each step, (N,)."""
    return np.append(np.sqrt(now), 1.0), np.append(np.sqrt(1 - now), 0.0)


def mixed(a: np.ndarray, s: np.ndarray) -> Callable[[Array, Array, Array], jax.Array]:
    """The function (i, x0, eps) -> a_i x0 + s_i eps."""

    def noised(i: Array, x0: Array, eps: Array) -> jax.Array:
        return (at(a, i) * wide(x0) + at(s, i) * wide(eps)).astype(x0.dtype)

    return noised


def summed(i: Array, *terms: tuple[Factors, Array | None]) -> jax.Array:
    """The sum of values times their factors at step i, float32.

    Raises:
      ValueError: if a value is None though it has factors: fresh noise that was not given.
    """
    total = jnp.zeros((), jnp.float32)
    for factors, value in terms:
        if factors is not None and value is None:
            raise ValueError("this sampler adds fresh noise in every step: pass z, unit normal noise of x's shape")
        if factors is not None and value is not None:
            total = total + at(factors, i) * wide(value)
    return total


def at(table: np.ndarray, i: Array) -> jax.Array:
    """A number of a table, float32."""
    return jnp.asarray(table, jnp.float32)[i]


def wide(x: Array) -> jax.Array:
    """An array in float32."""
    return jnp.asarray(x).astype(jnp.float32)


def stateless(x: Array) -> State:
    """The state of a sampler that has none."""
    return ()


def unscaled(i: Array, x: Array) -> jax.Array:
    """The model's input where that is x."""
    return jnp.asarray(x)
