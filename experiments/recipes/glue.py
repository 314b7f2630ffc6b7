"""RoBERTa and DeBERTa with LoRA on a task of GLUE, as in the LoRA paper's Table 2. The configs hold the numbers."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jlora
from experiments import metrics
from experiments.config import Base, ConfigError, Duration, Experiment, Measure, Run, Schedule
from experiments.data import glue, hub, sources
from experiments.data.files import Malformed
from experiments.recipes import tiny
from experiments.tasks.classification import Classification, Splits

QV = r"attn/(query|value)"


@dataclass(frozen=True)
class Recipe:
    """Settings of a model's training on one task.

    Attributes:
      learning_rate: the peak.
      batch: examples per step.
      epochs: of the run.
      length: of a row, in tokens.
      warmup: steps, or below 1 a fraction of all steps.
      weight_decay: of AdamW.
      evaluate_every: between evaluations on the validation split.
      head_dropout: before the classifier; the model's own when None.
    """

    learning_rate: float
    batch: int
    epochs: int
    length: int
    warmup: float = 0.06
    weight_decay: float = 0.1
    evaluate_every: Duration = "1 epochs"
    head_dropout: float | None = None


def chosen(task: str | None, recipes: Mapping[str, Recipe]) -> str:
    """The task that is asked for: by the argument, by JLORA_GLUE_TASK, or the first one.

    Raises:
      ConfigError: if there is no recipe for it.
    """
    name = task or os.environ.get("JLORA_GLUE_TASK") or next(iter(recipes))
    if name not in recipes:
        raise ConfigError(f"JLORA_GLUE_TASK={name!r}: this config has recipes for {', '.join(recipes)}")
    return name


def experiment(
    name: str, label: str, checkpoint: Base, task: str, recipe: Recipe, method: jlora.Method, **options: Any
) -> Experiment:
    """A model on a task, with five seeds."""
    found = glue.task(task)
    return Experiment(
        name=f"{name}_{task}",
        base=checkpoint,
        task=Classification(
            f"{label} on {found.folder} (dev as test)", partial(read, task), found.classes, partial(metrics.glue, task),
            length=recipe.length,
        ),
        runs=(Run("lora", f"LoRA q,v r={method.rank}", method, recipe.learning_rate, QV),),
        train=Schedule(
            f"{recipe.epochs} epochs", recipe.batch, recipe.evaluate_every, recipe.warmup,
            weight_decay=recipe.weight_decay, clip=1.0,
        ),
        seeds=(0, 1, 2, 3, 4),
        options={"scan": True, "dropout": 0.1, **options},
        measure=Measure(rounds=0),
    )  # fmt: skip


def small(whole: Experiment, task: str, checkpoint: Base) -> Experiment:
    """A few steps of a tiny model."""
    assert isinstance(whole.task, Classification)
    return dataclasses.replace(
        whole,
        name=f"{whole.name}_small",
        base=checkpoint,
        task=dataclasses.replace(whole.task, data=partial(few, task), length=32),
        runs=tuple(dataclasses.replace(run, learning_rate=1e-2) for run in whole.runs),
        train=dataclasses.replace(whole.train, steps=4, batch=4, evaluate_every=2, warmup=1),
        seeds=(0,),
        evaluate_batch=12,
    )


def read(task: str) -> Splits:
    """The training and the validation split; the test split's labels are not published."""
    dev = "validation_matched" if task == "mnli" else "validation"
    load = lambda split: hub.classified(
        task, hub.from_hub("nyu-mll/glue", task, split=split), malformed=_malformed(task)
    )
    return sources.folder_or_hub("glue", partial(splits, task), lambda: _twice(load("train"), load(dev)))


def few(task: str) -> Splits:
    """A tiny data set of the same form."""
    return splits(task, tiny.temporary(partial(tiny.glue, task)))


def splits(task: str, folder: Path) -> Splits:
    """Files that the GLUE download has in its folder of the task."""
    dev = "dev_matched" if task == "mnli" else "dev"
    return _twice(glue.read_glue(task, folder, malformed=_malformed(task)), glue.read_glue(task, folder, dev))


def _malformed(task: str) -> Malformed:
    """Some of QQP's training questions are empty."""
    return "skip" if task == "qqp" else "raise"


def _twice(train: Any, dev: Any) -> Splits:
    return Splits(train, dev, dev)
