"""Shared parts of the configs of Stable Diffusion: which weights are adapted, a schedule, a tiny form of each.

A is drawn as diffusers' training scripts do, N(0, 1 / r^2): with r=4 and n=320 inputs 7.7 times as large as by default.
Adam moves B by steps of the learning rate, so the update grows as much faster at first.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jlora
from experiments.config import Experiment, Measure, Schedule
from experiments.data.pictures import Pictures, read_pictures
from experiments.recipes import tiny
from experiments.tasks.diffusion import Diffusion

LORA = jlora.lora(4, init="inverse_rank")
ATTENTION = r"unet/.*attn[12]/to_(q|k|v|out)/"
"""to_q, to_k, to_v and to_out.0 of all attention of the UNet, as diffusers' scripts have them."""
TEXT = r"text_encoder(_2)?/.*attn/(query|key|value|out)/"
"""The same of the text encoders: `runs.lora.targets="<both, joined by |>"` with `task.text_encoder=True`.
Their rate is 5e-6 in the scripts, a twentieth: `runs.lora.slower={"text_encoder": 0.05}`."""
OPTIONS = {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": True}


def schedule(steps: int, batch: int = 1, **changes: object) -> Schedule:
    """A constant rate without warm-up, gradients clipped at 1, weight decay 0.01, as in diffusers' README."""
    usual = {"evaluate_every": 100, "warmup": 0, "decay": "constant", "weight_decay": 1e-2, "clip": 1.0, "keep": "last"}
    return Schedule(steps, batch, **{**usual, **changes})  # type: ignore[arg-type]


def small(whole: Experiment, base: Callable[[Path], Path]) -> Experiment:
    """A few steps on a tiny pipeline and five small photos."""
    task = whole.task
    assert isinstance(task, Diffusion)
    prior = dataclasses.replace(task.prior, images=2, steps=2, batch=2)
    drawing = dataclasses.replace(task.drawing, each=2, steps=2, batch=2, prompts=task.drawing.prompts[:1])
    few = dataclasses.replace(task, data=photos, size=32, prior=prior, drawing=drawing, draws=1)
    train = dataclasses.replace(
        whole.train, steps=4, batch=2, evaluate_every=2, pictures_every=2, accumulate=min(2, whole.train.accumulate)
    )
    return dataclasses.replace(
        whole, name=f"{whole.name}_small", base=base, task=few, train=train, options={}, evaluate_batch=4,
        measure=Measure(rounds=0),
    )  # fmt: skip


def photos() -> Pictures:
    """Five of them."""
    return read_pictures(tiny.temporary(tiny.photos), "a photo of sks thing")


def preserved(whole: Experiment, prompt: str) -> Experiment:
    """The experiment with its class preserved."""
    task = whole.task
    assert isinstance(task, Diffusion)
    return dataclasses.replace(
        whole, task=dataclasses.replace(task, prior=dataclasses.replace(task.prior, prompt=prompt))
    )
