"""Samplers of diffusion models, from noise to an image in a few steps: DDPM, DDIM, Euler, DPM-Solver++, PNDM, LCM.

Each is a `Sampler`, made of static tables for one number of steps. It is equal to the scheduler of Hugging Face
diffusers step by step; a docstring says where it is not.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.diffusion import timesteps as spacing
from jlora.models.diffusion.noise import Array, Noise, abar, split
from jlora.models.diffusion.tables import (
    Sampler,
    State,
    at,
    levels,
    mixed,
    on_abar,
    on_sigmas,
    summed,
    unscaled,
    wide,
)


def ddpm(noise: Noise, steps: int) -> Sampler:
    """DDPM: a draw from `q(x' | x, x0)`, with a = abar / abar'.

        x' = sqrt(abar') (1 - a) / (1 - abar) x0 + sqrt(a) (1 - abar') / (1 - abar) x
             + sqrt((1 - abar') / (1 - abar) (1 - a)) z

    abar' is that of the next timestep of the spacing, and 1 after the last.

    Args:
      noise: of the model. Its spacing is `leading` where it names none.
      steps: N, at most T.

    Raises:
      ValueError: if `steps` is no number of steps.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, eq. 7, with their smaller variance.
    """
    table = abar(noise).astype(np.float64)
    times = spacing.spaced(noise, steps, noise.spacing or "leading").astype(np.int64)
    now, after = table[times], np.append(table[times[1:]], 1.0)
    a = now / after
    return on_abar(
        noise,
        times,
        now,
        x0=np.sqrt(after) * (1 - a) / (1 - now),
        x=np.sqrt(a) * (1 - after) / (1 - now),
        z=np.sqrt((1 - after) / (1 - now) * (1 - a)),
    )


def ddim(noise: Noise, steps: int, eta: float = 0.0) -> Sampler:
    """DDIM: `x' = sqrt(abar') x0 + sqrt(1 - abar' - s^2) eps + s z`.

    s = eta sqrt((1 - abar') / (1 - abar) (1 - abar / abar')). abar' is that of the timestep floor(T / N) before,
    whatever the spacing; before the first of the training it is 1, or abar_0 where the noise has `set_alpha_to_one`
    false.

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
    eps = np.sqrt(np.maximum(0, 1 - after - s**2))
    return on_abar(noise, times, now, x0=np.sqrt(after), eps=eps, z=s if eta else None)


def euler(noise: Noise, steps: int, karras: bool | None = None) -> Sampler:
    """Euler's method on `x = x0 + sigma eps`: `x' = x + (x - x0) / sigma (sigma' - sigma)`, down to sigma' = 0.

    The model's input is `x / sqrt(sigma^2 + 1)`. Computed as `x0 + sigma' eps`: the same, without the difference of two
    large numbers where sigma is 4096 (`zero_snr`). There diffusers has an error of 1e-4 in the first step.

    Args:
      noise: of the model. Its spacing is `linspace` where it names none, and then has fractions.
      steps: N, at most T.
      karras: whether the sigmas between the ends of the spacing are those of Karras et al., and the timesteps such as
        belong to them, fractions too; None: what the noise says.

    Raises:
      ValueError: if `steps` is no number of steps.

    Source: Karras et al., arXiv 2206.00364, algorithm 1 and eq. 5.
    """
    times, sigmas = _euler_sigmas(noise, steps, noise.karras if karras is None else karras)
    return on_sigmas(noise, times, sigmas, _start(noise, sigmas), eps=sigmas[1:])


def euler_ancestral(noise: Noise, steps: int) -> Sampler:
    """Euler's method with fresh noise: `x' = x + (x - x0) / sigma (down - sigma) + up z`.

    up = sigma' sqrt(sigma^2 - sigma'^2) / sigma and down = sqrt(sigma'^2 - up^2) = sigma'^2 / sigma. Input and
    precision are those of `euler`; the sigmas are those of the spacing, whatever the noise's `karras` (as in
    diffusers).

    Args:
      noise: of the model. Its spacing is `linspace` where it names none, and then has fractions.
      steps: N, at most T.

    Raises:
      ValueError: if `steps` is no number of steps.

    Source: Song et al., "Score-Based Generative Modeling", arXiv 2011.13456, appendix F, as in k-diffusion.
    """
    times, sigmas = _euler_sigmas(noise, steps, karras=False)
    here, there = sigmas[:-1], sigmas[1:]
    up = there * np.sqrt(np.maximum(0, here**2 - there**2)) / here
    return on_sigmas(noise, times, sigmas, _start(noise, sigmas), eps=there**2 / here, z=up)


def dpmpp_2m(noise: Noise, steps: int, karras: bool | None = None) -> Sampler:
    """DPM-Solver++(2M): `x' = s' / s x - alpha' (exp(-h) - 1) D`, `D = x0 + h / (2 h_before) (x0 - x0_before)`.

    alpha = 1 / sqrt(1 + sigma^2), s = sigma alpha, h = log sigma - log sigma' (the difference of the logarithms of
    alpha / s). D is x0 in the first step and in the last one, which goes to sigma' = 0: h is infinite there, and
    exp(-h) = sigma' / sigma, the form that is used, is 0.

    Args:
      noise: of the model. Its spacing is `linspace` where it names none.
      steps: N, below T; `trailing` has N = T too.
      karras: whether the sigmas, from the largest of the training to the smallest, are those of Karras et al.; None:
        what the noise says. Their timesteps are rounded, so that two may be the same; for `squaredcos_cap_v2` diffusers
        cuts them off instead, 999 to 998 where its logarithms round down.

    Raises:
      ValueError: if `steps` is no number of steps.

    Source: Lu et al., "DPM-Solver++", arXiv 2211.01095, algorithm 2.
    """
    return _dpmpp(noise, steps, karras, fresh=False)


def dpmpp_2m_sde(noise: Noise, steps: int, karras: bool | None = None) -> Sampler:
    """SDE-DPM-Solver++(2M): `x' = s' / s exp(-h) x + alpha' (1 - exp(-2 h)) D + s' sqrt(1 - exp(-2 h)) z`.

    The letters are those of `dpmpp_2m`.

    Args:
      noise: of the model. Its spacing is `linspace` where it names none.
      steps: N, below T; `trailing` has N = T too.
      karras: see `dpmpp_2m`.

    Raises:
      ValueError: if `steps` is no number of steps.

    Source: Lu et al., "DPM-Solver++", arXiv 2211.01095, section 5.
    """
    return _dpmpp(noise, steps, karras, fresh=True)


def pndm(noise: Noise, steps: int) -> Sampler:
    """PNDM without Runge-Kutta steps (PLMS): DDIM's step with a mean of the last predictions; N + 1 evaluations.

    With weights 1; then (1, 1) / 2, which takes the first step again from where it began, with what the model says at
    its end; then (3, -1) / 2, (23, -16, 5) / 12 and (55, -59, 37, -9) / 24. The second timestep stands there twice.

    A run that begins at a later step (image to image) starts its weights from there. diffusers 0.42 takes the second
    of such a run for the step that is taken again, and is one timestep of noise behind from there on. A run that
    begins at index 1 leaves x as it is at that index.

    Args:
      noise: of the model, `epsilon` or `v_prediction`. Its spacing is `leading` where it names none; its
        `set_alpha_to_one` counts as in `ddim`, None as false.
      steps: N, at most T.

    Raises:
      ValueError: if `steps` is no number of steps, or the noise has `zero_snr` or the prediction `sample`, for which
        diffusers has no PNDM either (it drops `zero_snr` without a word).

    Source: Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds", arXiv 2202.09778, eq. 9 and 11.
    """
    if noise.zero_snr or noise.prediction == "sample":
        which = "zero_snr=True" if noise.zero_snr else "prediction='sample'"
        raise ValueError(f"pndm is not for noise with {which}: take ddim")
    table = abar(noise).astype(np.float64)
    times = spacing.spaced(noise, steps, noise.spacing or "leading").astype(np.int64)
    times = np.concatenate([times[:2], times[1:]])
    again = np.arange(len(times)) == (1 if steps > 1 else -1)
    ratio = noise.steps // steps
    origin, goal = np.where(again, times + ratio, times), np.where(again, times, times - ratio)
    after = _before(table, goal, noise.set_alpha_to_one is True)
    a, s = levels(table[origin])
    ends = (np.sqrt(after), np.sqrt(1 - after))
    weights = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24

    def init(x: Array) -> State:
        """Predictions so far, the newest first; x of the first step; how many predictions."""
        none = jnp.zeros_like(x, jnp.float32)  # lying as x does
        return jnp.stack([none] * 3), none, jnp.zeros((), jnp.int32)

    def step(i: Array, x: Array, prediction: Array, state: State, z: Array | None) -> tuple[jax.Array, State]:
        x = jnp.asarray(x)
        older, first, count = state
        newest, repeated = wide(prediction), jnp.asarray(again)[i]
        w = jnp.asarray(weights, jnp.float32)[jnp.minimum(count, 3)]
        mean = w[0] * newest + w[1] * older[0] + w[2] * older[1] + w[3] * older[2]
        mean = jnp.where(repeated, 0.5 * (newest + older[0]), mean)
        origin = jnp.where(repeated, first, wide(x))
        clean, dirt = split(noise.prediction, origin, mean, at(a, i), at(s, i))
        moved = summed(i, (ends[0], clean), (ends[1], dirt))
        moved = jnp.where(repeated & (count == 0), wide(x), moved)
        older = jnp.where(repeated, older, jnp.concatenate([newest[None], older[:2]]))
        state = older, jnp.where(count == 0, wide(x), first), jnp.where(repeated, count, count + 1)
        return moved.astype(x.dtype), state

    return Sampler(times.astype(np.float32), 1.0, False, init, unscaled, step, mixed(*levels(table[times])))


def lcm(noise: Noise, steps: int, grid: int = 50, strength: float = 1.0) -> Sampler:
    """Consistency sampling of a distilled model: `x' = sqrt(abar') d + sqrt(1 - abar') z`, in the last step d.

    d = c_out x0 + c_skip x, with u = 10 t, c_skip = 0.25 / (u^2 + 0.25) and c_out = u / sqrt(u^2 + 0.25).

    Args:
      noise: of the model; its spacing does not count.
      steps: N, at most int(grid * strength); 2 to 8 are usual.
      grid: timesteps of the distillation: k floor(T / grid) - 1, k = 1 to grid.
      strength: image to image: N steps over this part of the grid, run from index 0. In (0, 1].

    Raises:
      ValueError: if the grid has not so many steps, or none.

    Source: Luo et al., "Latent Consistency Models", arXiv 2310.04378, algorithm 3 and section 4.3.
    """
    spacing.check(noise, grid, "grid")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], got {strength}")
    visited = (np.arange(int(grid * strength)) + 1) * (noise.steps // grid) - 1
    spacing.check(noise, steps)
    if steps > len(visited):
        raise ValueError(f"steps={steps} is more than the {len(visited)} timesteps of grid={grid}, strength={strength}")
    times = visited[::-1][np.floor(np.linspace(0, len(visited), steps, endpoint=False)).astype(np.int64)]
    table = abar(noise).astype(np.float64)
    now, after = table[times], np.append(table[times[1:]], 1.0)
    u = 10.0 * times
    skip, out = 0.25 / (u**2 + 0.25), u / np.sqrt(u**2 + 0.25)
    return on_abar(noise, times, now, x0=np.sqrt(after) * out, x=np.sqrt(after) * skip, z=np.sqrt(1 - after))


# -- what several share ------------------------------------------------------------------------------------------------


def _before(table: np.ndarray, times: np.ndarray, to_one: bool) -> np.ndarray:
    """Values of abar at timesteps; before the first of the training 1, or abar_0."""
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


def _start(noise: Noise, sigmas: np.ndarray) -> float:
    """Size of the first x: as diffusers has it, with the signal's 1 only where the spacing is `leading`."""
    return float(np.hypot(sigmas[0], 1.0) if noise.spacing == "leading" else sigmas[0])


def _dpmpp(noise: Noise, steps: int, karras: bool | None, *, fresh: bool) -> Sampler:
    table = spacing.sigmas(noise)
    if noise.karras if karras is None else karras:
        spacing.check(noise, steps)
        sigmas = spacing.karras(table[-1], table[0], steps)
        times = np.round(spacing.of(table, sigmas))
    else:
        times = spacing.spaced_for_dpm(noise, steps, noise.spacing or "linspace")
        sigmas = spacing.at(table, times)
    sigmas = np.append(sigmas, 0.0)
    a, s = 1 / np.sqrt(1 + sigmas**2), sigmas / np.sqrt(1 + sigmas**2)
    shrink = sigmas[1:] / sigmas[:-1]  # exp(-h)
    h = -np.log(shrink[:-1])  # without the last one
    second = np.zeros(steps)
    second[1:-1] = h[1:] / (2 * h[:-1])
    if fresh:
        x, x0, z = s[1:] / s[:-1] * shrink, a[1:] * (1 - shrink**2), s[1:] * np.sqrt(1 - shrink**2)
    else:
        x, x0, z = s[1:] / s[:-1], a[1:] * (1 - shrink), None

    def init(of: Array) -> State:
        """The x0 of the step before, and whether there was one."""
        return jnp.zeros_like(of, jnp.float32), jnp.zeros((), jnp.float32)

    def step(i: Array, of: Array, prediction: Array, state: State, fresh: Array | None) -> tuple[jax.Array, State]:
        of = jnp.asarray(of)
        before, begun = state
        clean, _ = split(noise.prediction, wide(of), wide(prediction), at(a, i), at(s, i))
        d = clean + begun * at(second, i) * (clean - before)
        return summed(i, (x, wide(of)), (x0, d), (z, fresh)).astype(of.dtype), (clean, jnp.ones_like(begun))

    return Sampler(times.astype(np.float32), 1.0, fresh, init, unscaled, step, mixed(a, s))
