"""Makes `schedulers.npz`: every sampler of jlora.models.diffusion, as the schedulers of diffusers take its steps.

    pip install torch==2.13.0 diffusers==0.42.1 numpy
    python tests/golden/make_schedulers.py

A smooth function stands for the model: `0.8 tanh(0.7 x + 0.3 x_rolled + cos(3 t / 1000 + 0.1 k))`, k the channel, x_rolled the
latents moved by one along their flattened axis. Latents are (2, 4, 3, 5).

`cases`: JSON, a list of {"sampler", "noise" (fields of Noise), "steps", "options"}. `noises` (21, 2, 4, 3, 5): the first x of every
case is `start` times the first of them, z of step i is number i + 1. Of each case, one after the other: `start` (cases,);
`evaluations` (cases,), how many; `timesteps`; `paths` (evaluations, 12), every tenth number of x after each step; `noised`
(cases, 12): x0 = noises[1], eps = noises[2], at the noise of evaluation 1 (0 where there is one alone).
`abars` (3 curves, 2, 28): every 37th of DDIM's, without and with zero SNR, in Stable Diffusion's betas.
`configs`: JSON, what `write` should give for some noises, which diffusers read without a warning; `defaults`: JSON, diffusers' own,
by class. float32 on the CPU.
"""

import inspect
import json
import logging
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import schedulers

SHAPE = (2, 4, 3, 5)
NOISES = np.random.default_rng(0).normal(size=(21, *SHAPE)).astype(np.float32)
CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
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
STABLE = {"first_beta": 0.00085, "last_beta": 0.012, "betas": "scaled_linear", "offset": 1, "set_alpha_to_one": False}


def cases():
    for sampler in CLASSES:
        for prediction in ("epsilon", "v_prediction"):
            if sampler == "lcm":
                for options in ({}, {"strength": 0.6}):
                    yield case(sampler, 4, options, prediction=prediction)
                yield case(sampler, 8, prediction=prediction)
                continue
            for spacing in ("leading", "trailing", "linspace"):
                for steps in (4, 20):
                    yield case(sampler, steps, spacing=spacing, prediction=prediction)
        if sampler != "pndm":
            for spacing in ("trailing", "linspace"):
                for steps in (3, 8 if sampler == "lcm" else 20):
                    yield case(sampler, steps, spacing=spacing, prediction="v_prediction", zero_snr=True)
        if sampler not in ("pndm", "euler_ancestral"):
            yield case(sampler, 3, spacing="trailing", prediction="sample")
        if sampler in ("ddim", "ddpm", "lcm"):
            yield case(sampler, 3, clip=0.9)
        yield case(sampler, 1)
        yield case(sampler, 7, betas="linear", offset=0, spacing="trailing")
        yield case(sampler, 7, betas="squaredcos_cap_v2", offset=0)  # from 852: at 999 x0 is 1e4
        yield case(sampler, 3, steps_of_noise=100, spacing="leading")
    for spacing in ("leading", "trailing", "linspace"):
        for steps in (4, 20):
            yield case("euler", steps, spacing=spacing, karras=True)
    for sampler in ("dpmpp_2m", "dpmpp_2m_sde"):
        for steps in (4, 20):
            yield case(sampler, steps, spacing="leading", karras=True)
    yield case("euler", 20, spacing="leading", karras=True, prediction="v_prediction")
    yield case("euler", 8, spacing="trailing", karras=True, prediction="v_prediction", zero_snr=True)
    yield case("dpmpp_2m", 8, spacing="trailing", karras=True, prediction="v_prediction", zero_snr=True)
    yield case("euler", 1, karras=True)
    for eta in (0.5, 1.0):
        for spacing in ("leading", "trailing"):
            yield case("ddim", 20, {"eta": eta}, spacing=spacing)
    yield case("ddim", 4, set_alpha_to_one=True)
    yield case("pndm", 4, set_alpha_to_one=True)


def case(sampler, steps, options=None, steps_of_noise=1000, **noise):
    noise = STABLE | {"spacing": "leading", "steps": steps_of_noise} | noise
    return {"sampler": sampler, "noise": noise, "steps": steps, "options": options or {}}


def config(case):
    fields = {KEYS[field]: value for field, value in case["noise"].items()}
    fields |= {"clip_sample": "clip" in case["noise"]} | ({"skip_prk_steps": True} if case["sampler"] == "pndm" else {})
    if case["sampler"] == "lcm":
        fields.pop("use_karras_sigmas", None)
    if case["sampler"] == "dpmpp_2m_sde":
        fields["algorithm_type"] = "sde-dpmsolver++"
    return fields


def model(x, t):
    rolled = torch.roll(x.flatten(), 1).reshape(x.shape)
    channel = torch.arange(x.shape[1], dtype=torch.float32)[None, :, None, None]
    return 0.8 * torch.tanh(0.7 * x + 0.3 * rolled + torch.cos(3 * t / 1000 + 0.1 * channel))


def run(case):
    kind = getattr(diffusers, CLASSES[case["sampler"]])
    scheduler = kind.from_config(config(case))
    extra = {"strength": case["options"]["strength"]} if "strength" in case["options"] else {}
    scheduler.set_timesteps(case["steps"], **extra)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else the second of two equal timesteps is taken for the first step
    noises = torch.from_numpy(NOISES)
    module = inspect.getmodule(kind)
    x = noises[0] * scheduler.init_noise_sigma
    start, path = float(scheduler.init_noise_sigma), []
    timesteps = scheduler.timesteps
    for i, t in enumerate(timesteps):
        module.randn_tensor = lambda *_, i=i, **__: noises[i + 1]
        prediction = model(scheduler.scale_model_input(x, t), torch.as_tensor(t, dtype=torch.float32))
        eta = {"eta": case["options"]["eta"]} if "eta" in case["options"] else {}
        x = scheduler.step(prediction, t, x, **eta).prev_sample
        assert x.dtype == torch.float32
        assert torch.isfinite(x).all(), case
        path.append(x.flatten()[::10].numpy())
    fresh = kind.from_config(config(case))
    fresh.set_timesteps(case["steps"], **extra)
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(min(1, len(timesteps) - 1))
    noised = fresh.add_noise(noises[1], noises[2], timesteps[min(1, len(timesteps) - 1)].repeat(2))
    return start, timesteps.numpy().astype(np.float32), np.stack(path), noised.flatten()[::10].numpy()


def written(logs):
    """Configs as jlora writes them; diffusers reads each into its class, without a warning."""
    v = {"prediction": "v_prediction", "zero_snr": True, "spacing": "trailing", "clip": 1.0}
    for sampler, of in CLASSES.items():
        noise = {
            "steps": 1000,
            "prediction": "epsilon",
            "zero_snr": False,
            "spacing": "leading",
            "karras": False,
        } | STABLE
        noise |= {"ddim": v, "lcm": {"spacing": None}, "euler": {"karras": True, "set_alpha_to_one": None}}.get(
            sampler, {}
        )
        made = {"_class_name": of, "trained_betas": None, "clip_sample": "clip" in noise}
        made |= {KEYS[field]: value for field, value in noise.items() if value is not None}
        made |= {"pndm": {"skip_prk_steps": True}}.get(sampler, {})
        made |= {
            "dpmpp_2m": {"algorithm_type": "dpmsolver++"},
            "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
        }.get(sampler, {})
        if sampler == "lcm":
            del made["use_karras_sigmas"]
        scheduler = getattr(diffusers, of).from_config(made)
        assert not logs, (sampler, logs)
        for key in set(made) & set(inspect.signature(type(scheduler).__init__).parameters):
            assert getattr(scheduler.config, key) == made[key], (sampler, key)
        yield {"sampler": sampler, "noise": noise, "config": made}


def abars():
    for betas in ("scaled_linear", "linear", "squaredcos_cap_v2"):
        for zero in (False, True):
            made = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": betas, "rescale_betas_zero_snr": zero}
            yield diffusers.DDIMScheduler(**made).alphas_cumprod[::37].numpy()  # 962 and 999 the last


def defaults():
    for name in sorted(schedulers.scheduling_utils.KarrasDiffusionSchedulers.__members__) + [
        "LCMScheduler",
        "TCDScheduler",
    ]:
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        if "beta_start" in parameters:  # not those that want scipy, and not EDM's
            keys = [*KEYS.values(), "clip_sample"]
            yield name, {key: parameters[key].default for key in keys if key in parameters}


if __name__ == "__main__":
    logs = []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(handler)
    configs = list(written(logs))
    every = list(cases())
    starts, timesteps, paths, noised = zip(*map(run, every), strict=True)
    np.savez_compressed(
        Path(__file__).with_name("schedulers.npz"),
        cases=json.dumps(every),
        noises=NOISES,
        start=np.array(starts, np.float32),
        evaluations=np.array([len(path) for path in paths], np.int32),
        timesteps=np.concatenate(timesteps),
        paths=np.concatenate(paths),
        noised=np.stack(noised),
        abars=np.stack(list(abars())).reshape(3, 2, -1),
        configs=json.dumps(configs),
        defaults=json.dumps(dict(defaults())),
    )
    print(len(every), "cases,", sum(map(len, paths)), "evaluations")
