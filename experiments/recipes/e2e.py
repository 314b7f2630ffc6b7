"""GPT-2 with LoRA on E2E, as in the LoRA paper's Table 3. The configs say what is the paper's and what its code's."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jlora
from experiments import metrics
from experiments.config import ConfigError, Decoding, Experiment, Measure, Run, Schedule
from experiments.data import sources
from experiments.data.e2e import read_e2e
from experiments.data.examples import References, prompted
from experiments.recipes import tiny
from experiments.tasks.completion import Completion, Splits
from experiments.tasks.task import Scores

QV = r"attn/(query|value)"


def experiment(name: str, label: str, checkpoint: str) -> Experiment:
    """Table 11's settings for a size of GPT-2."""
    return Experiment(
        name=name,
        base=checkpoint,
        task=Completion(
            f"{label} on E2E", read, partial(measure, java=True),
            # Of the new tokens alone, as in the paper's code: the references repeat four tokens of the prompt's names.
            Decoding(64, beams=10, length_penalty=0.8, no_repeat_ngram=4, of_prompt=False), length=512, separated=True,
        ),
        runs=(Run("lora", "LoRA q,v r=4", jlora.lora(4, alpha=32, init="kaiming_uniform", dropout=0.1), 2e-4, QV),),
        train=Schedule("5 epochs", batch=8, warmup=500, weight_decay=0.01, label_smoothing=0.1),
        seeds=(0, 1, 2),
        options={"scan": True},
        measure=Measure(rounds=0),
    )  # fmt: skip


def small(whole: Experiment) -> Experiment:
    """A few steps of a tiny GPT-2, two beams, and the scores that need no Java."""
    assert isinstance(whole.task, Completion)
    decoding = dataclasses.replace(whole.task.decoding, new_tokens=6, beams=2, batch=4)
    return dataclasses.replace(
        whole,
        name=f"{whole.name}_small",
        base=tiny.gpt2,
        task=dataclasses.replace(
            whole.task, data=few, measure=partial(measure, java=False), decoding=decoding, length=48
        ),
        runs=tuple(dataclasses.replace(run, learning_rate=1e-2) for run in whole.runs),
        train=dataclasses.replace(whole.train, steps=4, batch=4, evaluate_every=2, warmup=1),
        seeds=(0,),
        evaluate_batch=8,
    )


def read() -> Splits:
    """The three splits in the form of the paper's code."""
    return splits(sources.folder("e2e", "train.txt, valid.txt and test.txt of microsoft/LoRA, examples/NLG/data/e2e"))


def few() -> Splits:
    """A tiny data set of the same form."""
    return splits(tiny.temporary(tiny.e2e))


def splits(folder: Path) -> Splits:
    """The splits in the files of a folder."""
    train, validation, test = (read_e2e(folder / f"{name}.txt") for name in ("train", "valid", "test"))
    return Splits(prompted(train), prompted(validation), test)


def measure(texts: Sequence[str], items: Sequence[References], *, java: bool) -> Scores:
    """The five scores of Table 3; see `experiments.metrics.e2e` for what Java has to do with them."""
    try:
        return metrics.e2e(texts, [item.texts for item in items], java=java)
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
