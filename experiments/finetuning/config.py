"""What a fine-tuning experiment is: a checkpoint, a task, and the methods that are tried on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.config import ConfigError
from experiments.finetuning.classification import Classification
from experiments.finetuning.completion import Completion
from experiments.finetuning.images import Images
from experiments.finetuning.schedule import Run, Schedule
from experiments.finetuning.texts import Texts

Checkpoint = str | Callable[[Path], Path]
"""A repository on the hub, a folder, or a function that makes a checkpoint below a folder and returns where it is."""


@dataclass(frozen=True)
class Finetune:
    """A checkpoint that is fine-tuned on a task in several ways.

    Attributes:
      name: of the run folder.
      checkpoint: the name of a repository, a folder, or a function that makes one.
      task: the data, the head and the metric.
      runs: each is trained with every seed.
      train: how.
      seeds: of a new head, the factors, dropout and the order of the examples.
      options: fields of the model's config: `{"dtype": "bfloat16", "remat": True, "dropout": 0.1}`.
      revision: of the repository.
      evaluate_batch: examples at a time in an evaluation.
      rounds: how often the training steps are timed, in turn; 0 for not at all.
    """

    name: str
    checkpoint: Checkpoint
    task: Classification | Completion | Images | Texts
    runs: tuple[Run, ...]
    train: Schedule
    seeds: tuple[int, ...] = (0,)
    options: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    evaluate_batch: int = 64
    rounds: int = 8

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"runs: at least one, and each with a name of its own; got {names}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds: at least one, and no seed twice; got {self.seeds}")
        if self.evaluate_batch < 1:
            raise ConfigError(f"evaluate_batch is at least 1, got {self.evaluate_batch}")
