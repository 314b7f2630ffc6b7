"""Results of an experiment: everything that is reported, and its JSON form, from which plots are drawn again."""

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.config import Experiment
from experiments.loop import Point, Result, as_result, is_finite
from experiments.price import Plan, Price
from experiments.tasks.task import Metric, Opened, Scores
from experiments.trial import Trial


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
      name, label, family, method: of the run; the method as it is written.
      plan, price: what it costs; no price where none was measured or a training diverged.
      sweep: one result per learning rate with the first seed; empty where there is one rate.
      results: one per seed, at the best rate; none if all rates diverged.
    """

    name: str
    label: str
    family: str
    method: str
    plan: Plan
    price: Price | None
    sweep: tuple[Result, ...]
    results: tuple[Result, ...]

    @property
    def learning_rate(self) -> float | None:
        """The best one, or the only one."""
        return self.results[0].learning_rate if self.results else None

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the first or the last of a grid, so that a better one may lie outside."""
        rates = [result.learning_rate for result in self.sweep]
        return len(rates) > 1 and self.learning_rate in (rates[0], rates[-1])

    @property
    def diverged(self) -> int:
        """Number of results that were kept before a divergence."""
        return sum(not is_finite(result) for result in self.results)


@dataclass(frozen=True)
class Start:
    """Start of the runs.

    Attributes:
      parameters, bytes: of the base; bytes of its file where it was pretrained here.
      test, old: its scores on the test split of the new and the old domain, where there is an old one.
      curve: of its pretraining.
    """

    parameters: int
    bytes: int
    test: Scores | None = None
    old: Scores | None = None
    curve: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Results:
    """Results of an experiment.

    Attributes:
      name, label: of the experiment and of its task.
      selection_metric, headline_metric: see `Opened`.
      new, old: the names of the domains; no old one where nothing can be forgotten.
      start: what all runs started from.
      outcomes: of the runs, in their order.
    """

    name: str
    label: str
    selection_metric: Metric
    headline_metric: Metric
    new: str
    old: str | None
    start: Start
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, experiment: Experiment, opened: Opened, start: Start, outcomes: tuple[Outcome, ...]) -> "Results":
        """Results with the names of an experiment."""
        return cls(
            experiment.name, experiment.task.label, opened.selection_metric, opened.headline_metric, opened.new.label,
            None if opened.old is None else opened.old.label, start, outcomes,
        )  # fmt: skip

    @property
    def tested(self) -> bool:
        """Whether anything was scored on the test split."""
        return any(result.test is not None for outcome in self.outcomes for result in outcome.results)

    @property
    def compares_families(self) -> bool:
        """Whether the runs belong to families, as in a comparison of many methods."""
        return all(outcome.family for outcome in self.outcomes)

    @property
    def references(self) -> list[str]:
        """Names of the runs that times are divided by."""
        prices = [outcome.price for outcome in self.outcomes if outcome.price is not None]
        return list(prices[0].relative_time) if prices else []

    def label_of(self, name: str) -> str:
        """The label of a run."""
        return next(outcome.label for outcome in self.outcomes if outcome.name == name)

    def scores(self, outcome: Outcome) -> list[float]:
        """The headline on the new domain's test split, one per seed."""
        return [result.test[self.headline_metric.name] for result in outcome.results if result.test is not None]

    def old_scores(self, outcome: Outcome) -> list[float]:
        """The same on the old domain."""
        return [result.old[self.headline_metric.name] for result in outcome.results if result.old is not None]

    def learned(self, outcome: Outcome) -> list[float]:
        """Gain of each seed on the new domain."""
        assert self.start.test is not None
        before = self.start.test[self.headline_metric.name]
        return [self.headline_metric.gain(before, after) for after in self.scores(outcome)]

    def forgotten(self, outcome: Outcome) -> list[float]:
        """Loss of each seed on the old domain; below 0 if it gained."""
        assert self.start.old is not None
        before = self.start.old[self.headline_metric.name]
        return [-self.headline_metric.gain(before, after) for after in self.old_scores(outcome)]


def outcome_of(trial: Trial, plan: Plan, price: Price | None) -> Outcome:
    """Result of a run."""
    run = trial.run
    return Outcome(run.name, run.label, run.family, repr(run.method), plan, price, trial.sweep, tuple(trial.results))


def as_json(results: Results) -> dict[str, Any]:
    """Every number, unrounded."""
    read = dataclasses.asdict(results)
    for outcome, written in zip(results.outcomes, read["outcomes"], strict=True):
        if results.old is not None and results.tested:
            written |= {"learned": results.learned(outcome), "forgotten": results.forgotten(outcome)}
    metrics = {name: list(getattr(results, name)) for name in ("selection_metric", "headline_metric")}
    return {"form": 2, **read, **metrics}


def from_json(read: Mapping[str, Any]) -> Results:
    """The inverse of `as_json`; what else is written beside it is left aside."""
    start = dict(read["start"])
    start["curve"] = tuple(Point(**point) for point in start["curve"])
    outcomes = []
    for written in read["outcomes"]:
        fields = {field.name: written[field.name] for field in dataclasses.fields(Outcome)}
        fields["plan"] = Plan(**fields["plan"])
        fields["price"] = fields["price"] and Price(**fields["price"])
        for name in ("sweep", "results"):
            fields[name] = tuple(map(as_result, fields[name]))
        outcomes.append(Outcome(**fields))
    return Results(
        read["name"], read["label"], Metric(*read["selection_metric"]), Metric(*read["headline_metric"]), read["new"],
        read["old"], Start(**start), tuple(outcomes),
    )  # fmt: skip


def mean(values: list[float]) -> float:
    """Mean over the seeds; NaN of none."""
    return statistics.fmean(values) if values else float("nan")
