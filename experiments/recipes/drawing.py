"""Small models that draw pixels: digits of 8 x 8, CIFAR-10 of 32 x 32, a new subject and a new style for each.

The base is pretrained here, from nothing, with the names of the classes for captions. "sks" is a word that no caption
of the base has.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import jlora
from experiments.config import Experiment, Measure, Pretrain, Run, Schedule, Study
from experiments.data import sources, turned_digits, upright_digits
from experiments.data.cifar10 import HOLDS, read_cifar10
from experiments.data.digits import Labelled
from experiments.data.pictures import Pictures, Sides, read_pictures
from experiments.tasks.diffusion import Diffusion, Drawing, Prior, Splits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WORDS = ("a", "in", "style", "sks")
KNOWN = 100  # pictures of the old domain that validation and test look at, each


def study(
    name: str,
    base: Pretrain,
    old: Callable[[], Splits],
    subject: tuple[Callable[[], Pictures], str, str],
    style: tuple[Callable[[], Pictures], Sequence[str]],
    train: Schedule,
    prior: Prior,
    drawing: Drawing,
    seeds: tuple[int, ...],
) -> Study:
    """A subject with and without preservation of its class, and a style: full fine-tuning and LoRA each.

    Args:
      name: of the study.
      base: how it is pretrained.
      old: what on.
      subject: reads its pictures; its prompt and that of its class.
      style: reads its pictures, with captions of their own; prompts to look at.
      train: of the runs.
      prior: how the class is preserved, but for its prompt.
      drawing: of the sheets, but for their prompts.
      seeds: of the runs.
    """
    pictures, prompt, known = subject
    other = known.replace(known.split()[-1], "ship" if "ship" in base.model.words else "two")
    of_subject = dataclasses.replace(drawing, prompts=(prompt, f"{prompt} in style", known, other))
    of_style = dataclasses.replace(drawing, prompts=tuple(style[1]))
    task = Diffusion("a subject", data=pictures, old=old, text_encoder=True, drawing=of_subject, empty=0.1)
    tasks = {
        "subject": task,
        "subject_prior": dataclasses.replace(
            task, label="a subject, its class preserved", prior=dataclasses.replace(prior, prompt=known)
        ),
        "style": dataclasses.replace(task, label="a style", data=style[0], drawing=of_style),
    }
    runs = (
        Run("full", "full fine-tuning", jlora.full(), FULL_RATE),
        Run("lora_r8", "LoRA r=8", jlora.lora(8), LORA_RATE, TRANSFORMERS),
    )
    common: dict[str, Any] = {"base": base, "runs": runs, "train": train, "seeds": seeds, "measure": Measure(rounds=4)}
    return Study(name, tuple(Experiment(name=key, task=task, **common) for key, task in tasks.items()))


FULL_RATE, LORA_RATE = 2e-4, 2e-3
TRANSFORMERS = r"unet/.*attentions"
"""All of the UNet's transformers: attention, MLP and the projections around them."""


# -- digits ------------------------------------------------------------------------------------------------------------


def digits() -> Splits:
    """scikit-learn's digits with their names."""
    known = upright_digits()
    parts = (
        (known.train, "digits"),
        (_first(known.validation), "digits, validation"),
        (_first(known.test), "digits, test"),
    )
    return Splits(*(_pictures(part.images, part.labels, label) for part, label in parts))


def _first(part: Labelled) -> Labelled:
    return Labelled(*(array[:KNOWN] for array in part))


def _pictures(images: np.ndarray, digits: np.ndarray, label: str, text: str = "a {}") -> Pictures:
    """Pictures of images in [-1, 1], (pictures, 8, 8, 1)."""
    whole = np.round((images + 1) * 127.5).astype(np.uint8)
    return Pictures(label, list(whole), [text.format(NAMES[digit]) for digit in digits], channels=1)


def turned_fours() -> Pictures:
    """Six fours that lie on their side: "a sks four"."""
    found = turned_digits().train
    chosen = np.flatnonzero(found.labels == 4)[:6]
    return _pictures(found.images[chosen], found.labels[chosen], "turned fours", "a sks {}")


def inverted_digits() -> Pictures:
    """One of each digit but the seven, light and dark exchanged: "a three in sks style"."""
    found = upright_digits().train
    chosen = [int(np.flatnonzero(found.labels == digit)[0]) for digit in range(10) if digit != 7]
    return _pictures(-found.images[chosen], found.labels[chosen], "inverted digits", "a {} in sks style")


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------


def cifar10() -> Splits:
    """CIFAR-10 of the folder cifar10/ below JLORA_DATA; half of the test pictures that are looked at for validation."""
    folder = sources.folder("cifar10", HOLDS)
    train, test = read_cifar10(folder, "train"), read_cifar10(folder, "test")
    return Splits(train, test[:KNOWN], test[KNOWN : 2 * KNOWN])


def dog() -> Pictures:
    """The DreamBooth paper's dog, of dreambooth/dog/ below JLORA_DATA."""
    return read_pictures(sources.folder("dreambooth", "folders of photos of one subject each") / "dog", "a sks dog")


def duotone() -> Pictures:
    """Ten pictures of CIFAR-10, no ship among them, in four tones from blue to orange: "a horse in sks style"."""
    train = read_cifar10(sources.folder("cifar10", HOLDS), "train")
    kinds = [f"a {name}" for name in CLASSES if name != "ship"]
    chosen = [train.texts.index(text) for text in kinds] + [len(train) - 1 - train.texts[::-1].index("a horse")]
    images = [_toned(train.view(i, Sides(32, 32), crops=0, flips=False, seed=0).pixels[0]) for i in chosen]
    return Pictures("duotone", images, [f"{train.texts[i]} in sks style" for i in chosen])


def _toned(pixels: np.ndarray) -> np.ndarray:
    """Four tones, by brightness: (height, width, 3) uint8."""
    tones = np.asarray([(18, 22, 84), (52, 84, 160), (232, 140, 60), (255, 232, 196)], np.uint8)
    bright = pixels.astype(np.float32).mean(-1)
    return tones[np.digitize(bright, np.quantile(bright, (0.25, 0.5, 0.75)))]
