"""The tables at the end of a comparison: quality, costs and learning rates of each task."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from experiments.comparison.price import Price
from experiments.comparison.trial import Trials
from experiments.report import in_bytes, markdown_table
from experiments.tasks import Metric, Scores

Cells = list[list[str]]


class Named(Protocol):
    """What a report says of a contender, such as a `Contender`."""

    @property
    def name(self) -> str:
        """Of its folder."""

    @property
    def label(self) -> str:
        """In tables and plots."""

    @property
    def family(self) -> str:
        """Contenders of one family have one colour."""

    @property
    def method(self) -> object:
        """Written as its `repr`."""


@dataclass(frozen=True)
class Entrant:
    """A contender, its runs and its price."""

    contender: Named
    trials: Trials
    price: Price


@dataclass(frozen=True)
class TaskResults:
    """What a task came to.

    Attributes:
      name, label, metric, old, new: of the task.
      base: scores of the base on the test split.
      parameters: of the base.
      entrants: the contenders, in their order.
    """

    name: str
    label: str
    metric: Metric
    old: str
    new: str
    base: Scores
    parameters: int
    entrants: tuple[Entrant, ...]

    def learned(self, entrant: Entrant) -> list[float]:
        """What each final run gained on the new task."""
        return [self.metric.gain(self.base.new.value, scores.new.value) for scores in tests(entrant)]

    def forgotten(self, entrant: Entrant) -> list[float]:
        """What each final run lost on the old task; below 0 if it gained."""
        return [-self.metric.gain(self.base.old.value, scores.old.value) for scores in tests(entrant)]


def tests(entrant: Entrant) -> list[Scores]:
    """The scores on the test split, one per seed that did not diverge."""
    return [trial.test for trial in entrant.trials.finals if trial.test is not None]


def quality(results: TaskResults) -> Cells:
    """What each contender learned and forgot, by how many parameters."""
    metric = results.metric
    header = [
        "test split", "trained", "%", "learning rate",
        f"{results.new} (new)", "learned", f"{results.old} (old)", "forgotten",
    ]  # fmt: skip
    base = [metric.text(results.base.new.value), "", metric.text(results.base.old.value), ""]
    table = [header, ["base", "", "", "", *base]]
    for entrant in results.entrants:
        scores, price, best = tests(entrant), entrant.price, entrant.trials.best
        rate = "all diverged" if best is None else f"{best:g}" + (" (edge)" if entrant.trials.at_edge else "")
        values = [
            _spread([s.new.value for s in scores], metric),
            _mean(results.learned(entrant), metric),
            _spread([s.old.value for s in scores], metric),
            _mean(results.forgotten(entrant), metric),
        ]
        share = f"{100 * price.trainable / price.total:.3g}"
        table.append([entrant.contender.label, f"{price.trainable:,}", share, rate, *values])
    return table


def cost(results: TaskResults) -> Cells:
    """What a step, a file and a forward pass of each contender cost."""
    labels = {entrant.contender.name: entrant.contender.label for entrant in results.entrants}
    others = list(results.entrants[0].price.relative_time)
    header = [
        "cost", "step", *(f"to {labels[other]}" for other in others), "FLOPs", "temporaries", "optimizer",
        "adapter file", "forward", "apart, to base", "merged, to base",
    ]  # fmt: skip
    table = [header]
    for entrant in results.entrants:
        p = entrant.price
        table.append(
            [
                entrant.contender.label,
                f"{p.milliseconds:.1f} ms",
                *(f"{p.relative_time[other]:.2f}" for other in others),
                f"{p.flops / 1e6:.0f} M",
                in_bytes(p.temporary_bytes),
                in_bytes(p.optimizer_bytes),
                in_bytes(p.adapter_bytes),
                f"{p.forward:.2f} ms",
                f"{p.apart:.2f}",
                "-" if p.merged is None else f"{p.merged:.2f}",
            ]
        )
    return table


def rates(results: TaskResults) -> Cells:
    """The sweep: each contender's own grid, the best marked; one at the edge is said to be there."""
    most = max(len(entrant.trials.sweep) for entrant in results.entrants)
    table = [["validation split", *([""] * most), "best"]]
    for entrant in results.entrants:
        trials, cells = entrant.trials, []
        for trial in trials.sweep:
            mark = " *" if trial.learning_rate == trials.best else ""
            value = "diverged" if trial.validation is None else results.metric.text(trial.validation.new.value)
            cells.append(f"{trial.learning_rate:g}: {value}{mark}")
        edge = " (edge of the grid: widen it)" if trials.at_edge else ""
        best = "all diverged" if trials.best is None else f"{trials.best:g}{edge}"
        table.append([entrant.contender.label, *cells, *([""] * (most - len(cells))), best])
    return table


def markdown(title: str, results: Iterable[TaskResults], notes: Sequence[str], pictures: dict[str, list[str]]) -> str:
    """All tables and plots; `pictures` are file names by task."""
    lines = [f"# {title}", "", *(f"- {note}" for note in notes), ""]
    for task in results:
        lines += [
            f"## {task.label}",
            "",
            f"A base of {task.parameters:,} parameters; {task.metric.label}, {task.metric.better} is better.",
            "",
        ]
        for table in (quality(task), cost(task), rates(task)):
            lines += [*markdown_table(table), ""]
        lines += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures[task.name]] + [""]
    return "\n".join(lines)


def as_json(results: Iterable[TaskResults]) -> dict[str, Any]:
    """Every number, unrounded."""
    tasks = {}
    for task in results:
        contenders = [
            {
                "name": entrant.contender.name,
                "label": entrant.contender.label,
                "family": entrant.contender.family,
                "method": repr(entrant.contender.method),
                "learned": task.learned(entrant),
                "forgotten": task.forgotten(entrant),
                "at_edge": entrant.trials.at_edge,
                "trials": dataclasses.asdict(entrant.trials),
                "price": dataclasses.asdict(entrant.price),
            }
            for entrant in task.entrants
        ]
        tasks[task.name] = {
            "metric": dataclasses.asdict(task.metric),
            "domains": {"new": task.new, "old": task.old},
            "base": {"test": task.base, "parameters": task.parameters},
            "contenders": contenders,
        }
    return {"tasks": tasks}


def _mean(values: Sequence[float], metric: Metric) -> str:
    return metric.text(statistics.fmean(values)) if values else "diverged"


def _spread(values: Sequence[float], metric: Metric) -> str:
    """Mean and sample standard deviation over the seeds."""
    if len(values) < 2:
        return _mean(values, metric)
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return f"{mean:.{metric.decimals}f} ± {deviation:.{metric.decimals}f}{metric.unit}"
