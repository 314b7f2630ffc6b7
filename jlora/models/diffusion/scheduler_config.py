"""Samplers by name, and the scheduler_config.json of a diffusers folder: `read`, `write`, `sampler`."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jlora.models.diffusion import samplers
from jlora.models.diffusion.noise import Noise
from jlora.models.diffusion.tables import Sampler
from jlora.models.fields import FieldError, shown

FILE = "scheduler_config.json"

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddim": samplers.ddim,
    "ddpm": samplers.ddpm,
    "dpmpp_2m": samplers.dpmpp_2m,
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde,
    "euler": samplers.euler,
    "euler_ancestral": samplers.euler_ancestral,
    "lcm": samplers.lcm,
    "pndm": samplers.pndm,
}


class Class(NamedTuple):
    """A scheduler of diffusers.

    Attributes:
      sampler: its name here; None if it has none.
      first_beta: the default of beta_start.
      last_beta: the default of beta_end.
      betas: the default of beta_schedule.
      clips: the default of clip_sample.
      only: values that are supported, by key; the first stands for an absent key, unless `_ABSENT` has another.
    """

    sampler: str | None
    first_beta: float = 0.0001
    last_beta: float = 0.02
    betas: str = "linear"
    clips: bool = False
    only: Mapping[str, tuple[Any, ...]] = {}


_ABSENT = {"skip_prk_steps": False}  # values of absent keys that are not supported
_X0 = {"thresholding": (False, None)}
_SIGMAS = {"use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None), "final_sigmas_type": ("zero",)}
_DPM = {
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "lambda_min_clipped": (-float("inf"), "-inf", None),
    "variance_type": (None,),
}
_EULER = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
}

CLASSES: dict[str, Class] = {
    "DDIMParallelScheduler": Class("ddim", clips=True, only=_X0),
    "DDIMScheduler": Class("ddim", clips=True, only=_X0),
    "DDPMParallelScheduler": Class(
        "ddpm", clips=True, only=_X0 | {"variance_type": ("fixed_small", "fixed_small_log")}
    ),
    "DDPMScheduler": Class("ddpm", clips=True, only=_X0 | {"variance_type": ("fixed_small", "fixed_small_log")}),
    "DEISMultistepScheduler": Class(None),
    "DPMSolverMultistepScheduler": Class("dpmpp_2m", only=_X0 | _SIGMAS | _DPM),
    "DPMSolverSDEScheduler": Class(None, 0.00085, 0.012),
    "DPMSolverSinglestepScheduler": Class(None),
    "EulerAncestralDiscreteScheduler": Class("euler_ancestral"),
    "EulerDiscreteScheduler": Class("euler", only=_SIGMAS | _EULER),
    "HeunDiscreteScheduler": Class(None, 0.00085, 0.012),
    "KDPM2AncestralDiscreteScheduler": Class(None, 0.00085, 0.012),
    "KDPM2DiscreteScheduler": Class(None, 0.00085, 0.012),
    "LCMScheduler": Class(
        "lcm",
        0.00085,
        0.012,
        "scaled_linear",
        only=_X0 | {"original_inference_steps": (50,), "timestep_scaling": (10,)},
    ),
    "LMSDiscreteScheduler": Class(None),
    "PNDMScheduler": Class("pndm", only={"skip_prk_steps": (True,)}),
    "TCDScheduler": Class(None, 0.00085, 0.012, "scaled_linear"),
    "UniPCMultistepScheduler": Class(None),
}

KEYS = {
    "steps": "num_train_timesteps",
    "first_beta": "beta_start",
    "last_beta": "beta_end",
    "betas": "beta_schedule",
    "prediction": "prediction_type",
    "zero_snr": "rescale_betas_zero_snr",
    "spacing": "timestep_spacing",
    "offset": "steps_offset",
    "set_alpha_to_one": "set_alpha_to_one",
    "karras": "use_karras_sigmas",
    "clip": "clip_sample_range",
}
"""Keys of the file, by the fields of `Noise`."""

_OF_SAMPLER: dict[str, dict[str, Any]] = {
    "dpmpp_2m": {"algorithm_type": "dpmsolver++"},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
    "pndm": {"skip_prk_steps": True},
}


def sampler(name: str, noise: Noise, steps: int, **options: Any) -> Sampler:
    """A sampler by its name, or by the class that diffusers has it in.

    Args:
      name: one of `SAMPLERS`, or a class with a sampler in `CLASSES`.
      noise: of the model.
      steps: N, at most the noise's; see the function of that name.
      options: such as `eta` of `ddim`, `karras` of `euler`.

    Raises:
      ValueError: if there is no such sampler, or the function of that name raises it.
      TypeError: if it has no such option.

    Example:
      >>> print(sampler("ddim", Noise(), 5).timesteps)
      [801. 601. 401. 201.   1.]
      >>> sampler("eular", Noise(), 5)
      Traceback (most recent call last):
      ValueError: no sampler 'eular'; the closest is 'euler'; there are ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, euler,
      euler_ancestral, lcm, pndm
    """
    here = SAMPLERS.get(str(name)) or SAMPLERS.get(str(_sampler_of(name)))
    if here is None:
        known = {known.lower(): known for known in SAMPLERS}
        known |= {name.lower(): kind.sampler for name, kind in CLASSES.items() if kind.sampler}
        near = known[difflib.get_close_matches(str(name).lower()[:100], known, 1, 0.0)[0]]
        raise ValueError(f"no sampler {shown(name)}; the closest is {near!r}; there are {', '.join(SAMPLERS)}")
    known_options = list(inspect.signature(here).parameters)[2:]
    if unknown := [option for option in options if option not in known_options]:
        has = f"it has {', '.join(known_options)}" if known_options else "it has none"
        raise TypeError(f"sampler {shown(name)} has no option {shown(unknown[0])}; {has}")
    return here(noise, steps, **options)


def read(config: Mapping[str, Any]) -> tuple[Noise, str]:
    """Noise and sampler of a scheduler_config.json.

    Whatever the class, the noise carries over to every sampler: keys that a file of another class left behind are
    read, as diffusers does when schedulers are exchanged, and keys that say nothing here are ignored. Two differences:
    the ends of the betas that a file does not name are those of its own class for every sampler; and an absent
    `clip_sample` is that of the file's class too, so that latents of a model that was read from an Euler file are not
    clipped by DDIM.

    Args:
      config: the parsed file.

    Returns:
      The noise, and the name of the sampler for `sampler`. For a class that has no sampler here the name is that of the
      class, which `sampler` rejects with a list.

    Raises:
      ValueError: if the class is not one of `CLASSES` (flow matching, for one, is other noise), if the noise is none
        that there is, or if its sampler would need something that this one lacks.

    Example:
      >>> read({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1})
      (Noise(steps=1000, first_beta=0.0001, last_beta=0.02, betas='scaled_linear', prediction='epsilon',
      zero_snr=False, spacing=None, offset=1, set_alpha_to_one=None, karras=False, clip=None), 'euler')
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{FILE} must hold an object, got {shown(config)}")
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"{FILE}: _class_name={shown(name)} is not one of {', '.join(CLASSES)}")
    kind = CLASSES[name]
    if config.get("trained_betas") is not None:
        raise ValueError(f"{FILE}: trained_betas, a table of betas, is not supported: only a beta_schedule by name is")
    for key, allowed in kind.only.items():
        _check(name, key, config.get(key, _ABSENT.get(key, allowed[0])), allowed)
    defaults = {"beta_start": kind.first_beta, "beta_end": kind.last_beta, "beta_schedule": kind.betas}
    fields = {field: (defaults | dict(config))[key] for field, key in KEYS.items() if key in defaults | dict(config)}
    fields |= {field: False for field in ("zero_snr", "karras") if fields.get(field) is None}
    clips = config.get("clip_sample", kind.clips)
    if not isinstance(clips, bool) and clips is not None:
        raise ValueError(f"{FILE}: clip_sample must be true or false, got {shown(clips)}")
    fields["clip"] = fields.get("clip", 1.0) if clips else None
    absent: dict[str, Any] = {"spacing": None, "offset": 0, "set_alpha_to_one": None}
    try:
        noise = Noise(**(absent | fields))
    except FieldError as error:
        raise ValueError(f"{FILE}: {', '.join(KEYS[field] for field in error.fields)}: {error}") from None
    if kind.sampler == "dpmpp_2m" and config.get("algorithm_type") == "sde-dpmsolver++":
        return noise, "dpmpp_2m_sde"
    return noise, kind.sampler or name


def write(noise: Noise, name: str) -> dict[str, Any]:
    """The scheduler_config.json with which diffusers makes the scheduler of this noise and sampler.

    Args:
      noise: of the model.
      name: of the sampler, one of `SAMPLERS`.

    Returns:
      Values that JSON has. `read` gives noise and name back.

    Raises:
      ValueError: if there is no such sampler.

    Example:
      >>> write(Noise(), "euler")["_class_name"]
      'EulerDiscreteScheduler'
    """
    if name not in SAMPLERS:
        raise ValueError(f"no sampler {shown(name)}; there are {', '.join(SAMPLERS)}")
    plain = "dpmpp_2m" if name == "dpmpp_2m_sde" else name
    of = next(of for of, kind in CLASSES.items() if kind.sampler == plain and "Parallel" not in of)
    config: dict[str, Any] = {"_class_name": of, "trained_betas": None, "clip_sample": noise.clip is not None}
    config |= {key: value for field, key in KEYS.items() if (value := getattr(noise, field)) is not None}
    config |= _OF_SAMPLER.get(name, {})
    if name == "lcm" and not noise.karras:
        del config["use_karras_sigmas"]  # of which diffusers' LCM would warn
    return config


def _sampler_of(name: str) -> str | None:
    return CLASSES[name].sampler if name in CLASSES else None


def _check(name: str, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        known = " or ".join(repr(one) for one in allowed if one is not None or len(allowed) == 1)
        raise ValueError(f"{FILE}: {name} with {key}={shown(value)} is not supported: only {known} is")
