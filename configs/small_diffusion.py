"""A small model that draws learns CIFAR-10 from nothing, then a dog and a style from 5 and 10 pictures.

Command:   python -m experiments.train configs/small_diffusion.py
Data:      CIFAR-10 in cifar10/ below JLORA_DATA, see experiments/data/cifar10.py, and the DreamBooth paper's photos in
           dreambooth/dog/ there (google/dreambooth); --small: scikit-learn's digits, in the package
Model:     2.8 M parameters: a UNet on pixels, cross-attention to a text encoder of two layers whose tokens are words
Hardware:  2 CPU cores; under two hours

Three experiments on one base: a subject, "a sks dog"; the same with its class preserved (100 pictures of "a dog" that
the base draws); a style, "a horse in sks style". Each has sheets of pictures: before, after, with merged weights, and
at scales 0, 0.5 and 1. Old is the held-out part of CIFAR-10 with the names of all classes: what of it is forgotten.
"""

import dataclasses

from experiments.config import Experiment, Pretrain, Schedule, Study
from experiments.recipes import drawing
from experiments.tasks.diffusion import Drawing, Prior
from experiments.tasks.text_to_image import FromNothing
from jlora.models.unet import UNetConfig


def config() -> Study:
    """The study: three experiments, two runs and three seeds each."""
    unet = UNetConfig(
        size=32, channels=3, outputs=3, widths=(32, 64, 96), depths=(0, 1, 1), heads=(4, 4, 4), layers=1,
        context_width=64, groups=16,
    )  # fmt: skip
    train = Schedule(
        200,
        batch=4,
        evaluate_every=100,
        warmup=0.1,
        decay="constant",
        clip=1.0,
        ema=0.95,
        keep="last",
        pictures_every=100,
    )
    return drawing.study(
        "small_diffusion",
        Pretrain(
            FromNothing(unet, (*drawing.WORDS, *drawing.CLASSES)),
            Schedule(
                2500, batch=32, evaluate_every=500, warmup=0.02, decay="cosine", clip=1.0, ema=0.999, keep="last",
                pictures_every=500,
            ),
            learning_rate=1e-3,
        ),
        drawing.cifar10,
        (drawing.dog, "a sks dog", "a dog"),
        (drawing.duotone, ("a horse in sks style", "a ship in sks style", "a ship", "a horse")),
        train,
        Prior(images=100, steps=25, guidance=2.0, batch=20),
        Drawing(each=4, steps=25, guidance=3.0, batch=16),
        seeds=(0, 1, 2),
    )  # fmt: skip


def small() -> Study:
    """The same of digits of 8 x 8, in two minutes."""
    unet = UNetConfig(
        size=8,
        channels=1,
        outputs=1,
        widths=(16, 32),
        depths=(0, 1),
        heads=(4, 4),
        layers=1,
        context_width=32,
        groups=8,
    )
    train = Schedule(100, batch=4, evaluate_every=50, warmup=0.1, decay="constant", clip=1.0, ema=0.9, keep="last")
    whole = drawing.study(
        "small_diffusion_small",
        Pretrain(
            FromNothing(unet, (*drawing.WORDS, *drawing.NAMES), layers=1),
            Schedule(800, batch=32, evaluate_every=400, warmup=0.05, decay="cosine", clip=1.0, ema=0.99, keep="last"),
            learning_rate=4e-3,
        ),
        drawing.digits,
        (drawing.turned_fours, "a sks four", "a four"),
        (drawing.inverted_digits, ("a three in sks style", "a seven in sks style", "a seven", "a three")),
        train,
        Prior(images=16, steps=20, guidance=2.0, batch=16),
        Drawing(each=4, steps=20, guidance=3.0, batch=16),
        seeds=(0,),
    )
    return dataclasses.replace(whole, experiments=tuple(map(_without_times, whole.experiments[1:])))


def _without_times(experiment: Experiment) -> Experiment:
    return dataclasses.replace(experiment, measure=dataclasses.replace(experiment.measure, rounds=0))
