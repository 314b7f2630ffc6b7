"""Timesteps of a sampler: which of those of the training it visits, from noise to image."""

import numpy as np

from jlora.models.diffusion.noise import Noise, abar
from jlora.models.fields import shown


def check(noise: Noise, steps: int, name: str = "steps") -> None:
    """Raises a ValueError for a number of steps that no spacing has."""
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise ValueError(f"{name} must be a whole number, got {shown(steps)}")
    if steps < 1:
        raise ValueError(f"{name} must be at least 1, got {shown(steps)}")
    if steps > noise.steps:
        raise ValueError(
            f"{name}={shown(steps)} is more than the {noise.steps} timesteps that the model was trained on"
        )


def spaced(noise: Noise, steps: int, spacing: str, *, whole: bool = True) -> np.ndarray:
    """Timesteps of a spacing with N steps out of T, falling, (N,), float64.

    `leading`: i floor(T / N) + offset, i < N. `trailing`: round(T - i T / N) - 1. `linspace`: from T - 1 to 0 evenly.
    Halves round to even.

    Args:
      noise: T is its `steps`; its `offset` is that of `leading`.
      steps: N.
      spacing: one of the three.
      whole: whether `linspace` is rounded; if not, it is what float32 has nearest.

    Raises:
      ValueError: if the first timestep is past the last of the training (`leading` with a large offset).

    Source: Lin et al., arXiv 2305.08891, table 2.
    """
    check(noise, steps)
    T, N = noise.steps, steps
    times: np.ndarray
    if spacing == "leading":
        times = np.arange(N)[::-1] * (T // N) + noise.offset
    elif spacing == "trailing":
        times = np.round(np.arange(T, 0, -T / N)[:N]) - 1  # arange may have one too many: its end is rounded
    else:
        times = np.linspace(0, T - 1, N)[::-1]
        times = np.round(times) if whole else times.astype(np.float32)
    return _known(noise, steps, times.astype(np.float64))


def spaced_for_dpm(noise: Noise, steps: int, spacing: str) -> np.ndarray:
    """Timesteps of DPM-Solver, (N,), float64: of N + 1 spaced ones all but the last; `trailing` as in `spaced`.

    Raises:
      ValueError: if the first timestep is past the last of the training, or two are the same (N = T).
    """
    check(noise, steps)
    T, N = noise.steps, steps
    times: np.ndarray
    if spacing == "leading":
        times = np.arange(N + 1)[:0:-1] * (T // (N + 1)) + noise.offset
    elif spacing == "trailing":
        return spaced(noise, steps, spacing)
    else:
        times = np.round(np.linspace(0, T - 1, N + 1))[:0:-1]
    if N > 1 and np.max(np.diff(times)) >= 0:
        raise ValueError(f"steps={N} visit a timestep twice with the spacing {spacing!r}: take at most {T - 1}")
    return _known(noise, steps, times.astype(np.float64))


def _known(noise: Noise, steps: int, times: np.ndarray) -> np.ndarray:
    if times[0] > noise.steps - 1:
        raise ValueError(
            f"steps={steps} from timestep {times[0]:.0f} on, past the last of the training, {noise.steps - 1}: take "
            f"fewer steps, or an offset below {noise.offset}"
        )
    return times


# -- sigmas ------------------------------------------------------------------------------------------------------------


def sigmas(noise: Noise) -> np.ndarray:
    """`sigma_t = sqrt((1 - abar_t) / abar_t)` of every timestep, (T,), float32. For abar = 0 it is that of 2^-24."""
    table = abar(noise)
    if noise.zero_snr:
        table[-1] = 2.0**-24
    return np.sqrt((1 - table) / table)


def at(table: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Sigmas at timesteps, which may lie between two of the training: linear in sigma."""
    return np.interp(times, np.arange(len(table)), table)


def karras(first: float, last: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Sigmas from first to last, evenly in sigma^(1 / rho), (N,).

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364, eq. 5.
    """
    ramp = np.linspace(0, 1, steps)
    return (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho


def of(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Timesteps at which the sigmas of the table have these values, linear in log sigma; ends are kept to."""
    return np.interp(np.log(values), np.log(table), np.arange(len(table)))
