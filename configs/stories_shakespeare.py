"""stories260K, which writes stories for children, learns Shakespeare: full fine-tuning, LoRA r=4 and r=16, DoRA r=4.

Command:   python -m experiments.train configs/stories_shakespeare.py
Data:      input.txt of karpathy/char-rnn's data/tinyshakespeare, in tinyshakespeare/ below JLORA_DATA: the first 90 %
           to learn, then 5 % that decide between evaluations and 5 % to test on
Model:     stories260K.bin and tok512.bin of karpathy/tinyllamas, in stories260K/ below JLORA_WEIGHTS

Samples before and after are printed at the end, and kept in samples.txt. Bits per byte can be compared with those of
models with other tokens; 8 would be one in 256.
"""

import dataclasses
from pathlib import Path

import jlora
from experiments.config import Decoding, Experiment, Measure, Run, Schedule
from experiments.data import sources
from experiments.data.files import existing
from experiments.recipes import tiny
from experiments.recipes.stories import converted, stories
from experiments.tasks.texts import Splits, Texts

LINEAR = r"(attn|mlp)/"  # all linear layers of the blocks


def config() -> Experiment:
    """The experiment: four runs."""
    return Experiment(
        name="stories_shakespeare",
        base=stories,
        task=Texts(
            "stories260K on Shakespeare", shakespeare, ("ROMEO:\n", "The king", "Once upon a time"),
            Decoding(new_tokens=96, temperature=0.8, top_p=0.9, batch=3), length=256,
        ),
        runs=(
            Run("full", "full", jlora.full(), 1e-3),
            Run("lora_r4", "LoRA r=4", jlora.lora(4, alpha=8), 5e-3, LINEAR),
            Run("lora_r16", "LoRA r=16", jlora.lora(16, alpha=32), 5e-3, LINEAR),
            Run("dora_r4", "DoRA r=4", jlora.dora(jlora.lora(4, alpha=8)), 5e-3, LINEAR),
        ),
        train=Schedule("1 epochs", batch=8, evaluate_every="0.25 epochs", decay="cosine", b2=0.95, clip=1.0),
        options={"scan": True},
        evaluate_batch=16,
    )  # fmt: skip


def small() -> Experiment:
    """A few steps of a run on a tiny model in the same two files."""
    whole = config()
    assert isinstance(whole.task, Texts)
    decoding = dataclasses.replace(whole.task.decoding, new_tokens=12)
    return dataclasses.replace(
        whole,
        name="stories_shakespeare_small",
        base=tiny_stories,
        task=dataclasses.replace(whole.task, data=few, decoding=decoding, length=32),
        runs=whole.runs[1:2],
        train=dataclasses.replace(whole.train, steps=4, batch=4, evaluate_every=2),
        evaluate_batch=8,
        measure=Measure(rounds=0),
    )


def shakespeare() -> Splits:
    """The text in three parts."""
    folder = sources.folder("tinyshakespeare", "input.txt of karpathy/char-rnn, data/tinyshakespeare")
    return splits(folder / "input.txt")


def few() -> Splits:
    """A tiny data set of the same form."""
    return splits(tiny.temporary(tiny.shakespeare) / "input.txt")


def splits(file: Path) -> Splits:
    """The first 90 % of a text, the next 5 % and the last 5 %, cut between speeches."""
    text = existing(file).read_text(encoding="utf-8")
    first, second = (text.rindex("\n\n", 0, round(part * len(text))) + 2 for part in (0.9, 0.95))
    return Splits(text[:first], text[first:second], text[second:])


def tiny_stories(folder: Path) -> Path:
    """A tiny model in llama2.c's two files, converted as the real one is."""
    return converted(tiny.llama2c(folder / "llama2c") / "stories260K", folder / "hub")
