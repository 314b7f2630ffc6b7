"""What a comparison of methods is: tasks, contenders, and how often and how long each is tried."""

from dataclasses import dataclass

import jlora
from experiments.config import ConfigError, in_steps
from experiments.tasks import ImageTask, TextTask

Spec = TextTask | ImageTask


@dataclass(frozen=True)
class Contender:
    """A method that takes part.

    Attributes:
      name: of its folder, and in overrides: `contenders.lora.learning_rates=1e-3,1e-2`.
      label: in tables and plots.
      family: contenders of one family have one colour.
      method: with its rank and all else that it takes.
      learning_rates: the grid of peak rates, ascending; the best on the validation split is used.
      targets: which weights, as in `jlora.apply`.
      extras: leaves trained as they are, as in `jlora.apply`.
      tasks: names of the tasks that it can do; all when None.
    """

    name: str
    label: str
    family: str
    method: jlora.Method
    learning_rates: tuple[float, ...]
    targets: str | None = None
    extras: str | None = None
    tasks: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Comparison:
    """Contenders on tasks.

    Attributes:
      name: of the run folder.
      tasks: each with its own base.
      contenders: each is trained at every rate of its grid with the first seed, then at the best one with all seeds.
      relative_to: names of the contenders that the others' times are divided by; the plots use the first.
      seeds: how many; a seed is that of the factors and of the order of the batches. The base is the same for all.
      seed: of the base, and the first of the others.
      statistics: training batches that the data-driven methods start from.
      batch: examples at a time in an evaluation.
      rounds: how often each training step is timed, in turn.
      inference_batch, inference_rounds: of the timed forward pass.
    """

    name: str
    tasks: tuple[Spec, ...]
    contenders: tuple[Contender, ...]
    relative_to: tuple[str, ...]
    seeds: int = 3
    seed: int = 0
    statistics: int = 4
    batch: int = 64
    rounds: int = 20
    inference_batch: int = 8
    inference_rounds: int = 60

    def __post_init__(self) -> None:
        for part, names in (("tasks", [t.name for t in self.tasks]), ("contenders", [c.name for c in self.contenders])):
            if not names or len(set(names)) != len(names):
                raise ConfigError(f"{part}: at least one, and each with a name of its own; got {names}")
        for name in ("seeds", "statistics", "batch", "rounds", "inference_batch", "inference_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}")
        known = {spec.name for spec in self.tasks}
        for contender in self.contenders:
            rates = contender.learning_rates
            if not rates or list(rates) != sorted(set(rates)) or rates[0] <= 0:
                raise ConfigError(
                    f"contenders.{contender.name}.learning_rates: at least one, positive and ascending; got {rates}"
                )
            if not set(contender.tasks or ()) <= known:
                raise ConfigError(f"contenders.{contender.name}.tasks: {contender.tasks} are not all among {known}")
        for spec in self.tasks:
            in_steps(spec.train.steps, batch=1, examples=1)
            absent = set(self.relative_to) - {contender.name for contender in self.of(spec)}
            if absent or not self.relative_to:
                raise ConfigError(f"relative_to: {sorted(absent)} are no contenders of task {spec.name!r}")

    def of(self, spec: Spec) -> tuple[Contender, ...]:
        """The contenders of a task."""
        return tuple(c for c in self.contenders if c.tasks is None or spec.name in c.tasks)
