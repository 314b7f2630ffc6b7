"""All trainings of a run: a sweep's learning rates with the first seed, then the best rate with the other seeds."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.config import Run
from experiments.loop import Result, is_finite, score, train
from experiments.progress import Progress
from experiments.tasks.task import Metric, Params
from experiments.trainer import Trainer


@dataclass(eq=False)
class Trial:
    """A run with its seeds and learning rates, filled as they are trained.

    Attributes:
      trainer: one compiled step for all.
      rates: one, or those of a sweep, ascending.
      seeds: the first of them sweeps.
      folder: of the run.
      test: whether what is kept is scored on the test split.
      sweep: one result per rate; empty where there is one rate.
      results: one per seed, at the best rate; none if all rates diverged.
      best: that rate.
    """

    trainer: Trainer
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    folder: Path
    test: bool
    sweep: tuple[Result, ...] = ()
    results: list[Result] = field(default_factory=list)
    best: float | None = None

    @property
    def run(self) -> Run:
        """Adapter that is trained."""
        return self.trainer.run

    @property
    def trainings(self) -> int:
        """Number of trainings of the run."""
        return len(self.rates) + len(self.seeds) - 1

    @property
    def place(self) -> Path:
        """The folder of the first seed's training at the best rate."""
        return self._place(self.seeds[0], self.rates[0] if self.best is None else self.best)

    def held(self, params: Params) -> Params:
        """The base as the run holds it, with the first seed."""
        return self.trainer.held(params, self.seeds[0])

    def train(self, seed: int, params: Params, progress: Progress) -> None:
        """The trainings of a seed, those of the first one first."""
        if seed == self.seeds[0]:
            return self._first(params, progress)
        if self.best is not None:
            number = len(self.rates) + self.seeds.index(seed) - 1
            self.results.append(self._one(seed, self.best, number, params, progress, test=self.test))
        return None

    def _first(self, params: Params, progress: Progress) -> None:
        seed, sweeping = self.seeds[0], len(self.rates) > 1
        found = [
            self._one(seed, rate, i, params, progress, test=self.test and not sweeping)
            for i, rate in enumerate(self.rates)
        ]
        if not sweeping:
            self.best, self.results = self.rates[0], found
            return
        self.sweep = tuple(replace(result, test=None, old=None) for result in found)  # an earlier start has scored one
        self.best = best_rate(found, self.trainer.opened.selection_metric)
        for result in found:
            if result.learning_rate == self.best:
                if self.test:
                    phase = progress.phase(self.run.label, title=self._title(seed, self.best))
                    result = score(self.trainer, result, self.place, params, phase)
                self.results = [result]

    def _one(self, seed: int, rate: float, number: int, params: Params, progress: Progress, *, test: bool) -> Result:
        phase = progress.phase(self.run.label, number * self.trainer.steps, self._title(seed, rate), self.trainer.steps)
        return train(self.trainer, seed, rate, params, self._place(seed, rate), phase, test=test)

    def _place(self, seed: int, rate: float) -> Path:
        sweeps = len(self.rates) > 1 and seed == self.seeds[0]
        return self.folder / (f"rate_{rate:g}" if sweeps else f"seed_{seed}")

    def _title(self, seed: int, rate: float) -> str:
        parts = [f"rate {rate:g}"] if len(self.rates) > 1 else []
        return ", ".join([self.run.label, *parts, *([f"seed {seed}"] if len(self.seeds) > 1 else [])])


def best_rate(sweep: list[Result], metric: Metric) -> float | None:
    """The rate with the best score on the validation split; of equal ones, that with the lowest loss; None if all
    diverged.
    """
    ended = [result for result in sweep if is_finite(result)]
    if not ended:
        return None
    worth = lambda result: (metric.gain(0.0, result.kept.scores[metric.name]), -result.kept.scores.get("loss", 0.0))
    return max(ended, key=worth).learning_rate
