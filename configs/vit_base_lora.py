"""ViT-B/16 learns the images of a folder with LoRA on query and value: the setup of VeRA's Table 5.

Command:   python -m experiments.train configs/vit_base_lora.py
Data:      train/, validation/ and test/ in images/ below JLORA_DATA, each with a folder for each class of .jpg or .png
Model:     google/vit-base-patch16-224-in21k
Hardware:  not run: needs a GPU and the hub

Trained:   294,912 parameters of LoRA, 4 * 12 layers * 768 * r with r=8, and a new head of 769 for each class: 76,900
           with CIFAR-100's. VeRA counts without the head: 294.9K.
Recipe:    Kopiczko et al., "VeRA", arXiv 2310.11454, Table 5: q and v, r=8. That it learns from ten images of each
           class is from memory, not checked; the folder has to hold them. Its learning rates, batch and epochs could
           not be had: those here are ours and not tried.

Published (accuracy in percent):

| ViT-B | trained | CIFAR100 | Food101 | Flowers102 | RESISC45 |
|---|---|---|---|---|---|
| full fine-tuning | | 86.5 | 90.8 | 98.9 | 78.9 |
| LoRA | 294.9K | 85.9 | 89.9 | 98.8 | 77.7 |
| VeRA | 24.6K | 84.8 | 89.0 | 99.0 | 77.0 |

Target:    the LoRA row, to a point or two, once the learning rate is tuned on the validation split:
           runs.lora.learning_rate=...
"""

import dataclasses
from pathlib import Path

import jlora
from experiments.config import Experiment, Measure, Run, Schedule
from experiments.data import sources
from experiments.data.images import read_image_folder
from experiments.recipes import tiny
from experiments.tasks.images import Images, Splits

QV = r"attn/(query|value)"


def config() -> Experiment:
    """The experiment, with three seeds."""
    return Experiment(
        name="vit_base_lora",
        base="google/vit-base-patch16-224-in21k",
        task=Images("ViT-B/16 on a folder of images", images),
        runs=(Run("lora", "LoRA q,v r=8", jlora.lora(8), 4e-3, QV),),
        train=Schedule("10 epochs", batch=64, decay="cosine"),
        seeds=(0, 1, 2),
        options={"scan": True},
        measure=Measure(rounds=0),
    )


def small() -> Experiment:
    """A few steps of a tiny ViT."""
    whole = config()
    return dataclasses.replace(
        whole,
        name="vit_base_lora_small",
        base=tiny.vit,
        task=Images(whole.task.label, few),
        train=dataclasses.replace(whole.train, steps=4, batch=6, evaluate_every=2),
        seeds=(0,),
        evaluate_batch=6,
    )


def images(size: int) -> Splits:
    """The three splits of the folder."""
    return splits(sources.folder("images", "train/, validation/ and test/, each with a folder for each class"), size)


def few(size: int) -> Splits:
    """A tiny data set of the same form."""
    return splits(tiny.temporary(tiny.images), size)


def splits(folder: Path, size: int) -> Splits:
    """Content of a folder; the classes are those of the training split."""
    train = read_image_folder(folder / "train", size)
    others = (read_image_folder(folder / name, size, classes=train.classes) for name in ("validation", "test"))
    return Splits(train, *others)
