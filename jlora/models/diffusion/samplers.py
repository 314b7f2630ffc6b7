"""Samplers of diffusion models: from noise to an image in a few steps, each a NamedTuple of tables and pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.diffusion import timesteps as spacing
from jlora.models.diffusion.noise import Array, Noise, abar, split

State = Any


class Sampler(NamedTuple):
    """One way from noise to an image: N evaluations of the model, of index 0 to N - 1, which may be traced.

    All functions compute in float32 and return x's dtype. A loop that keeps x in float32 and casts the model's input
    alone loses nothing to a model in bfloat16:

        def body(carry, i):
            x, state = carry
            prediction = model(sampler.scale(i, x).astype(dtype), jnp.asarray(sampler.timesteps)[i])
            return sampler.step(i, x, prediction, state, z(i)), None

        x = sampler.start * jax.random.normal(key, shape)
        (x, _), _ = jax.lax.scan(body, (x, sampler.init(x)), jnp.arange(len(sampler.timesteps)))

    Attributes:
      timesteps: what the model is told at each evaluation, (N,), float32; fractions with some spacings.
      start: factor of the unit normal noise that the first x is.
      random: whether `step` adds fresh noise, and needs z.
      init: x -> the state before the first step, `()` for most.
      scale: (i, x) -> the model's input.
      step: (i, x, prediction, state, z) -> x after the step, and the state. z is unit normal noise of x's shape; None
        will do where `random` is false.
      noised: (i, x0, eps) -> x0 with the noise that x has before step i; at i = N, x0. A run that begins at step i
        from it is image to image; inpainting puts it where the mask keeps the image, after step i with i + 1.
    """

    timesteps: np.ndarray
    start: float
    random: bool
    init: Callable[[Array], State]
    scale: Callable[[Array, Array], jax.Array]
    step: Callable[[Array, Array, Array, State, Array | None], tuple[jax.Array, State]]
    noised: Callable[[Array, Array, Array], jax.Array]


def ddim(noise: Noise, steps: int, eta: float = 0.0) -> Sampler:
    """DDIM: `x' = sqrt(abar') x0 + sqrt(1 - abar' - s^2) eps + s z`, `s = eta sqrt((1 - abar') / (1 - abar) (1 - abar / abar'))`.

    abar' is that of the timestep floor(T / N) before, whatever the spacing; before the first of the training it is 1,
    or abar_0 where the noise has `set_alpha_to_one` false.

    Args:
      noise: of the model. Its spacing is `leading` where it names none.
      steps: N, at most T.
      eta: 0 for no fresh noise, 1 for as much as DDPM adds.

    Raises:
      ValueError: if `steps` is no number of steps, or `eta` is not in [0, 1].

    Source: Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502, eq. 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    table = abar(noise).astype(np.float64)
    times = spacing.spaced(noise, steps, noise.spacing or "leading").astype(np.int64)
    now, after = table[times], _before(table, times - noise.steps // steps, noise.set_alpha_to_one is not False)
    s = eta * np.sqrt((1 - after) / (1 - now) * (1 - now / after))
    return _linear(
        noise,
        times,
        now,
        x0=np.sqrt(after),
        eps=np.sqrt(np.maximum(0, 1 - after - s**2)),
        z=s if eta else None,
        clip=noise.clip,
    )


def euler(noise: Noise, steps: int) -> Sampler:
    """Euler's method on `x = x0 + sigma eps`: `x' = x + (x - x0) / sigma (sigma' - sigma)`, the last sigma' is 0.

    The model's input is `x / sqrt(sigma^2 + 1)`. Computed as `x0 + sigma' eps`, the same without the difference of two
    large numbers where sigma is 4096 (`zero_snr`).

    Args:
      noise: of the model. Its spacing is `linspace` where it names none, and then has fractions; its `karras` spaces
        the sigmas between the ends of the spacing.
      steps: N, at most T.

    Raises:
      ValueError: if `steps` is no number of steps.

    Source: Karras et al., arXiv 2206.00364, algorithm 1.
    """
    times, sigmas = _euler_sigmas(noise, steps, noise.karras)
    return _of_sigmas(noise, times, sigmas, eps=sigmas[1:], z=None)


# -- how they are made -------------------------------------------------------------------------------------------------


def _before(table: np.ndarray, times: np.ndarray, to_one: bool) -> np.ndarray:
    """abar at timesteps; before the first of the training 1, or abar_0."""
    return np.where(times >= 0, table[np.maximum(times, 0)], 1.0 if to_one else table[0])


def _euler_sigmas(noise: Noise, steps: int, karras: bool) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps (N,) and sigmas (N + 1,), the last one 0."""
    table = spacing.sigmas(noise)
    times = spacing.spaced(noise, steps, noise.spacing or "linspace", whole=False)
    sigmas = spacing.at(table, times)
    if karras:
        sigmas = spacing.karras(sigmas[0], sigmas[-1], steps)
        times = spacing.of(table, sigmas)
    return times, np.append(sigmas, 0.0)


def _linear(
    noise: Noise,
    times: np.ndarray,
    now: np.ndarray,
    *,
    x0: np.ndarray,
    eps: np.ndarray | None = None,
    x: np.ndarray | None = None,
    z: np.ndarray | None = None,
    clip: float | None = None,
) -> Sampler:
    """x' is a sum of x0, eps, x and z with factors of each step, (N,); `now` is abar of each step, (N,)."""
    a, s = _both(now)

    def step(i: Array, of: Array, prediction: Array, state: State, noise_: Array | None) -> tuple[jax.Array, State]:
        wide = _wide(of)
        clean, dirt = split(noise.prediction, wide, _wide(prediction), _at(a, i), _at(s, i))
        clean = clean if clip is None else jnp.clip(clean, -clip, clip)
        return _sum(i, of, (x0, clean), (eps, dirt), (x, wide), (z, noise_)), state

    return Sampler(times.astype(np.float32), 1.0, z is not None, _stateless, _unscaled, step, _mixed(a, s))


def _of_sigmas(
    noise: Noise, times: np.ndarray, sigmas: np.ndarray, *, eps: np.ndarray, z: np.ndarray | None
) -> Sampler:
    """In the variables x = x0 + sigma eps: x' = x0 + eps times a factor + z times a factor, (N,)."""
    a, s = 1 / np.sqrt(1 + sigmas**2), sigmas / np.sqrt(1 + sigmas**2)
    one = np.ones(len(eps))

    def step(i: Array, x: Array, prediction: Array, state: State, noise_: Array | None) -> tuple[jax.Array, State]:
        scaled = _at(a, i) * _wide(x)
        clean, dirt = split(noise.prediction, scaled, _wide(prediction), _at(a, i), _at(s, i))
        return _sum(i, x, (one, clean), (eps, dirt), (z, noise_)), state

    def scale(i: Array, x: Array) -> jax.Array:
        return (_at(a, i) * _wide(x)).astype(x.dtype)

    largest = float(sigmas.max())
    start = np.hypot(largest, 1.0) if (noise.spacing or "linspace") == "leading" else largest
    noised = _mixed(np.ones(len(sigmas)), sigmas)
    return Sampler(times.astype(np.float32), float(start), z is not None, _stateless, scale, step, noised)


def _both(now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of x0 and eps in x before each step and after the last, (N + 1,)."""
    return np.append(np.sqrt(now), 1.0), np.append(np.sqrt(1 - now), 0.0)


def _mixed(a: np.ndarray, s: np.ndarray) -> Callable[[Array, Array, Array], jax.Array]:
    def noised(i: Array, x0: Array, eps: Array) -> jax.Array:
        return (_at(a, i) * _wide(x0) + _at(s, i) * _wide(eps)).astype(x0.dtype)

    return noised


def _sum(i: Array, like: Array, *terms: tuple[np.ndarray | None, Array | None]) -> jax.Array:
    total = None
    for factors, value in terms:
        if factors is None:
            continue
        if value is None:
            raise ValueError("this sampler adds fresh noise in every step: pass z, unit normal of x's shape")
        term = _at(factors, i) * _wide(value)
        total = term if total is None else total + term
    assert total is not None
    return total.astype(like.dtype)


def _at(table: np.ndarray, i: Array) -> jax.Array:
    return jnp.asarray(table, jnp.float32)[i]


def _wide(x: Array) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)


def _stateless(x: Array) -> State:
    return ()


def _unscaled(i: Array, x: Array) -> jax.Array:
    return jnp.asarray(x)
