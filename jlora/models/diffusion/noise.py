"""Noise that a diffusion model is trained with: its schedule, noisy samples, targets, and weights of the loss.

Tables are made in NumPy and are constants of a compiled program. The arithmetic is float32 whatever the dtype of the
samples: in bfloat16, abar next to 1 is 1, and 1 - abar, by which is divided, is 0.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models import placed
from jlora.models.fields import FieldError, OneOf, Real, Whole, check_fields

Betas = Literal["scaled_linear", "linear", "squaredcos_cap_v2"]
Prediction = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "trailing", "linspace"]
Array = jax.Array | np.ndarray


@dataclass(frozen=True)
class Noise:
    """Noise of a model, `x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps`, abar_t = prod_{s <= t} (1 - beta_s).

    The defaults are those of Stable Diffusion 1.x and 2.x. Hashable, so a static argument under `jax.jit`.

    Attributes:
      steps: timesteps of the training, 0 to steps - 1.
      first_beta: beta_0.
      last_beta: beta of the last timestep.
      betas: the curve between: `linear`, `scaled_linear` (linear in the square root), or `squaredcos_cap_v2` (abar is
        a squared cosine, and beta at most 0.999; needs neither end).
      prediction: output of the model: `epsilon`, `v_prediction` (sqrt(abar) eps - sqrt(1 - abar) x0), or `sample` (x0).
      zero_snr: abar is rescaled so that the last timestep is noise alone, abar = 0. Not with `epsilon`, which tells
        nothing about x0 there.
      spacing: choice of the timesteps when sampling, see `jlora.models.diffusion.timesteps`; None: each sampler's own.
      offset: added to the timesteps of `leading`.
      set_alpha_to_one: whether DDIM and PNDM end at abar = 1, or at abar_0; None: each sampler's own.
      karras: whether Euler and DPM-Solver++ space their sigmas as Karras et al. do.
      clip: DDPM, DDIM and LCM keep the predicted x0 in [-clip, clip]: 1.0 for images, None for latents.

    Raises:
      FieldError: a ValueError, if a field holds what it cannot.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, eq. 4; Salimans and Ho,
    "Progressive Distillation", arXiv 2202.00512, section 4 and appendix D (v); Lin et al., "Common Diffusion Noise
    Schedules and Sample Steps are Flawed", arXiv 2305.08891, algorithm 1 (zero_snr).

    Example:
      >>> noise = Noise()
      >>> print(abar(noise)[[0, -1]])
      [0.99915   0.0046601]
    """

    steps: Annotated[int, Whole(1, 10**5)] = 1000
    first_beta: Annotated[float, Real(1e-7, 0.999)] = 0.00085
    last_beta: Annotated[float, Real(1e-7, 0.999)] = 0.012
    betas: Annotated[str, OneOf(("scaled_linear", "linear", "squaredcos_cap_v2"))] = "scaled_linear"
    prediction: Annotated[str, OneOf(("epsilon", "v_prediction", "sample"))] = "epsilon"
    zero_snr: bool = False
    spacing: Annotated[str | None, OneOf(("leading", "trailing", "linspace"))] = "leading"
    offset: Annotated[int, Whole(0, 10**5)] = 1
    set_alpha_to_one: bool | None = False
    karras: bool = False
    clip: Annotated[float | None, Real(0.0, 1e6, "low")] = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.first_beta > self.last_beta:
            raise FieldError(
                f"first_beta={self.first_beta} is above last_beta={self.last_beta}", "first_beta", "last_beta"
            )
        if self.zero_snr and self.prediction == "epsilon":
            raise FieldError(
                "zero_snr=True goes with prediction='v_prediction' (or 'sample'): from noise alone, 'epsilon' tells "
                "nothing about x0",
                "zero_snr",
                "prediction",
            )
        table = abar(self)
        if table[0] >= 1 or (table[-1] <= 0 and not self.zero_snr):
            raise FieldError(
                f"{self.steps} steps with betas from {self.first_beta} to {self.last_beta} leave no noise at the first "
                f"or no signal at the last: abar is {table[0]} and {table[-1]} in float32",
                "steps",
                "first_beta",
                "last_beta",
            )


def abar(noise: Noise) -> np.ndarray:
    """abar_t of every timestep, (steps,), float32, falling: the square of the factor of x0 in x_t.

    The bits of diffusers' table, but for `zero_snr`, which it takes through the betas and back: 3.5e-6 apart.
    """
    if noise.betas == "squaredcos_cap_v2":
        u = np.arange(noise.steps) / noise.steps
        betas: np.ndarray = np.minimum(1 - _cosine(u + 1 / noise.steps) / _cosine(u), 0.999).astype(np.float32)
    elif noise.betas == "linear":
        betas = _linspace(noise.first_beta, noise.last_beta, noise.steps)
    else:
        betas = _linspace(math.sqrt(noise.first_beta), math.sqrt(noise.last_beta), noise.steps) ** 2
    table = cast(np.ndarray, np.cumprod(1 - betas, dtype=np.float64).astype(np.float32))
    if not noise.zero_snr:
        return table
    root = np.sqrt(table)
    return cast(np.ndarray, ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2)


def add(noise: Noise, x0: Array, eps: Array, t: Array) -> jax.Array:
    """Noisy samples, `x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps`.

    Args:
      noise: of the model.
      x0: clean samples, (batch, ...).
      eps: unit normal noise of the same shape.
      t: timesteps, integers in [0, steps), (batch,), or () for one of all. One outside gives NaN.

    Returns:
      x_t, in x0's shape and dtype.
    """
    a, s = _factors(noise, x0, t)
    return (a * _wide(x0) + s * _wide(eps)).astype(x0.dtype)


def target(noise: Noise, x0: Array, eps: Array, t: Array) -> jax.Array:
    """Right prediction at `add(noise, x0, eps, t)`: eps, `sqrt(abar_t) eps - sqrt(1 - abar_t) x0`, or x0.

    Args:
      noise: of the model; its `prediction` says which.
      x0: clean samples, (batch, ...).
      eps: unit normal noise of the same shape.
      t: timesteps; see `add`.

    Returns:
      In x0's shape and dtype.
    """
    if noise.prediction == "epsilon":
        return jnp.asarray(eps).astype(x0.dtype)
    if noise.prediction == "sample":
        return jnp.asarray(x0)
    a, s = _factors(noise, x0, t)
    return (a * _wide(eps) - s * _wide(x0)).astype(x0.dtype)


def predicted(noise: Noise, x: Array, prediction: Array, t: Array) -> tuple[jax.Array, jax.Array]:
    """x0 and eps that a prediction stands for, so that `x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps`.

    Args:
      noise: of the model; its `prediction` says what the model predicts.
      x: noisy samples x_t, (batch, ...).
      prediction: the model's, of the same shape.
      t: timesteps; see `add`.

    Returns:
      x0 and eps, both in x's shape and dtype.
    """
    a, s = _factors(noise, x, t)
    x0, eps = split(noise.prediction, _wide(x), _wide(prediction), a, s)
    return x0.astype(x.dtype), eps.astype(x.dtype)


def split(
    kind: str, x: jax.Array, prediction: jax.Array, a: jax.Array | float, s: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """x0 and eps from `x = a x0 + s eps` and a prediction of this kind, where a^2 + s^2 = 1; all float32."""
    if kind == "v_prediction":
        return a * x - s * prediction, a * prediction + s * x
    if kind == "sample":
        return prediction, (x - a * prediction) / s
    return (x - s * prediction) / a, prediction


def snr(noise: Noise, t: Array) -> jax.Array:
    """Signal-to-noise ratio, `abar_t / (1 - abar_t)`, float32 in t's shape; NaN for a t outside [0, steps)."""
    table = abar(noise)
    return _look_up(table / (1 - table), t)


def min_snr_weight(noise: Noise, t: Array, gamma: float = 5.0) -> jax.Array:
    """Weight of a sample's loss: `min(SNR, gamma)` over SNR for epsilon, over SNR + 1 for v, over 1 for x0.

    Each is min(SNR, gamma) times the squared error of x0. For v at the last timestep of `zero_snr` it is 0.

    Args:
      noise: of the model; its `prediction` says what the loss compares.
      t: timesteps, integers, (batch,).
      gamma: the SNR above which no timestep counts for more. Above 0.

    Returns:
      (batch,), float32.

    Raises:
      ValueError: if `gamma` is not above 0.

    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556, section 3.4.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    ratio = snr(noise, t)
    if noise.prediction == "epsilon":
        return jnp.minimum(1.0, gamma / ratio)
    return jnp.minimum(ratio, gamma) / (ratio + 1 if noise.prediction == "v_prediction" else 1.0)


def offset_noise(key: jax.Array, eps: Array, strength: float) -> jax.Array:
    """`eps + strength z`, z unit normal, one number per sample and channel: the model learns to shift whole images.

    Args:
      key: of the draw.
      eps: noise, (batch, ..., channels).
      strength: 0.05 to 0.1 in published models.

    Returns:
      In eps' shape and dtype.

    Source: Guttenberg, "Diffusion With Offset Noise", 2023.
    """
    shape = (eps.shape[0], *(1 for _ in eps.shape[1:-1]), eps.shape[-1])
    return (_wide(eps) + strength * jax.random.normal(key, shape, jnp.float32)).astype(eps.dtype)


# -- tables ------------------------------------------------------------------------------------------------------------


def _linspace(first: float, last: float, count: int) -> np.ndarray:
    """From first to last in float32, from either end to the middle with one rounding: the bits of torch.linspace."""
    low, high = np.float64(np.float32(first)), np.float64(np.float32(last))
    step = np.float64(np.float32(high - low) / np.float32(max(1, count - 1)))
    i = np.arange(count)
    return cast(
        np.ndarray, np.where(i < max(1, count // 2), low + step * i, high - step * (count - 1 - i)).astype("f4")
    )


def _cosine(u: np.ndarray) -> np.ndarray:
    """Value of abar in the cosine schedule at the part u of the time. Nichol and Dhariwal, arXiv 2102.09672, eq. 17."""
    return cast(np.ndarray, np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2)


def _factors(noise: Noise, x: Array, t: Array) -> tuple[jax.Array, jax.Array]:
    """sqrt(abar_t) and sqrt(1 - abar_t), float32, with unit axes up to x's rank."""
    table = abar(noise)
    shape = (*jnp.shape(t), *(1 for _ in range(x.ndim - jnp.ndim(t))))
    return _look_up(np.sqrt(table), t).reshape(shape), _look_up(np.sqrt(1 - table), t).reshape(shape)


def _look_up(table: np.ndarray, t: Array) -> jax.Array:
    if not jnp.issubdtype(jnp.asarray(t).dtype, jnp.integer):
        raise TypeError(f"timesteps of the training are integers, got {jnp.asarray(t).dtype}")
    t = jnp.where(jnp.asarray(t) < 0, len(table), jnp.asarray(t))
    return placed.looked_up(jnp.asarray(table), t, mode="fill", fill_value=jnp.nan)


def _wide(x: Array) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)
