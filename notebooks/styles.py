# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Swapping and blending styles in a running pipeline
#
# A model that draws is loaded once. Adapters are small: a subject learned from six pictures, a style learned from nine.
# This notebook puts them into the running model, one, the other, or both at any scale:
#
# $$W = W_0 + a\,\Delta W_\text{style} + b\,\Delta W_\text{subject}$$
#
# The shapes stay those of the base, so the compiled program stays, too: nothing is compiled again for another adapter
# or another scale.
#
# The model is as small as can be, a UNet with cross-attention to a text encoder of one layer, on digits of 8 x 8
# pixels (`configs/small_diffusion.py --small`). The same lines work with Stable Diffusion:
# `pipeline = jlora.models.diffusion.load(folder)`, and `jlora.diffusers.load(file, pipeline.adaptable,
# pipeline.tables)` for an adapter from a hub.

# %%
import dataclasses
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, Markdown
from IPython.display import display as show
from rich.console import Console

import experiments
import jlora
from experiments import bases, configfile
from experiments.config import Study
from experiments.resume import loaded
from experiments.tasks.text_to_image import parts_of
from experiments.train import run
from jlora.models import diffusion

jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time here
SMALL = os.environ.get("JLORA_NOTEBOOK") == "small"  # the form that the tests execute: its pictures mean nothing

# %% [markdown]
# ## A base and two adapters
#
# The base is trained on digits with their names, "a seven"; LoRA then learns fours that lie on their side, "a sks
# four", and light digits turned dark, "a three in sks style". No seven was shown in that style.

# %%
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
config = Path(experiments.__file__).parents[1] / "configs" / "small_diffusion.py"
study = configfile.load(Study, config, small=True)
for experiment in study.experiments:
    base = experiment.base
    if SMALL:
        base = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=4, evaluate_every=4))
        few = dataclasses.replace(experiment.train, steps=2, evaluate_every=2)
    else:
        base = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=1200))
        few = dataclasses.replace(experiment.train, steps=150)
    experiment = dataclasses.replace(
        experiment,
        base=base,
        train=few,
        runs=experiment.runs[1:],
        measure=dataclasses.replace(experiment.measure, test=True),
        task=dataclasses.replace(experiment.task, drawing=dataclasses.replace(experiment.task.drawing, prompts=())),
    )
    run(experiment, folder / experiment.name, resume=False, console=Console(file=io.StringIO(), force_jupyter=False))

shape = study.experiments[0].base.model
(place,) = (folder / "bases").iterdir()
params = bases.read(place, shape.params(0))
subject, style = (loaded(folder / name / "lora_r8" / "seed_0", params) for name in ("subject_prior", "style"))
pipeline = shape.pipeline().with_params(**parts_of(params))
size = sum(x.nbytes for x in jax.tree.leaves(style.factors))
Markdown(f"The base has {sum(x.size for x in jax.tree.leaves(params)):,} parameters, an adapter {size / 1e3:.0f} kB.")

# %% [markdown]
# ## One program
#
# `blend` is compiled once, with both scales as arguments; the pipeline's program is compiled at the first pictures.

# %%
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(seconds) if "backend_compile" in event else None
)


@jax.jit
def blend(a, b):
    """The parameters with a of the style and b of the subject."""
    one, other = jlora.merge(jlora.scale(style, a)), jlora.merge(jlora.scale(subject, b))
    return jax.tree.map(lambda w, x, y: x + y - w, params, one, other)


def pictures(now, prompt: str, count: int = 1) -> np.ndarray:
    """Pictures of a prompt, of the same seeds each time."""
    mine = pipeline.with_params(**parts_of(now))
    images = diffusion.generate(mine, [prompt] * count, key=jax.random.key(3), steps=20, guidance=3.0)
    return np.asarray(images)[..., 0]


SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
numbers = [jax.numpy.float32(s) for s in SCALES]
pictures(blend(numbers[0], numbers[0]), "a seven", 4)
before = len(compiled)


def sheet(prompt: str, steps: list, title: str) -> None:
    """A row for each blend: like a slider that is moved down."""
    figure, axes = plt.subplots(len(steps), 4, figsize=(4.4, 1.1 * len(steps)), layout="constrained")
    for row, (a, b) in zip(axes, steps, strict=True):
        for ax, image in zip(row, pictures(blend(a, b), prompt, 4), strict=True):
            ax.imshow(image, cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{float(a):g}, {float(b):g}", rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=10)
    png = io.BytesIO()
    figure.savefig(png)
    plt.close(figure)
    show(Image(png.getvalue()))


sheet(
    "a seven in sks style",
    [(s, numbers[0]) for s in numbers],
    "a seven in sks style: scale of the style, of the subject",
)

# %%
sheet("a sks four", [(numbers[0], s) for s in numbers], "a sks four: scales of style, subject")

# %%
sheet("a sks four in sks style", list(zip(numbers, numbers, strict=True)), "a sks four in sks style: both")
Markdown(f"For {3 * len(SCALES)} blends after the first, **{len(compiled) - before}** programs were compiled.")

# %% [markdown]
# ## What a swap costs
#
# A hundred swaps, each waited for. What they leave behind is counted in arrays that are alive.

# %%
alive, seconds = len(jax.live_arrays()), []
for number in range(100):
    began = time.perf_counter()
    now = jax.block_until_ready(blend(numbers[number % 5], numbers[number % 3]))
    seconds.append(time.perf_counter() - began)
del now
Markdown(
    f"A swap takes {1e3 * statistics.median(seconds):.1f} ms (median of 100); afterwards "
    f"{len(jax.live_arrays()) - alive} more arrays are alive than before, and {len(compiled) - before} programs were "
    "compiled in all."
)
