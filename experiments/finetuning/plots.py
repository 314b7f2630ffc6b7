"""The plots of a fine-tuning experiment."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.artist import Artist
from matplotlib.lines import Line2D

from experiments.finetuning.loop import Result
from experiments.finetuning.report import Plan
from experiments.finetuning.work import Metric
from experiments.labels import label_points
from experiments.plots import INK, SUBTITLE, absent, end_at_data, figure_of, heading, legend, looks, settle


class Scored(Protocol):
    """What a plot has to know of a task, such as its `Work`."""

    @property
    def decides(self) -> Metric:
        """Between two evaluations, on the validation split."""

    @property
    def shows(self) -> Metric:
        """What a run came to, on the test split."""


def title_of(name: str, task: str) -> str:
    """Of an experiment's plots and tables."""
    return f"{name}: {task}"


def quality(
    path: Path, work: Scored, plans: Mapping[str, Plan], results: Mapping[str, Sequence[Result]], title: str
) -> None:
    """The score on the test split against the trained parameters: a ring for each seed, a dot for the mean."""
    score = work.shows.name
    drawn = looks(plans[name].label for name in results)
    seeds = max(map(len, results.values()))
    with figure_of(path, (8.6, 5.4)) as (figure, (ax,)):
        points, labels, lost = [], [], []
        for name, found in results.items():
            plan, look = plans[name], drawn[plans[name].label]
            values, x = [result.test[score] for result in found], plan.count.trainable
            mean = statistics.fmean(values)
            if not (math.isfinite(mean) and x):
                lost.append(plan.label)
                continue
            if seeds > 1:
                ax.plot(
                    [x] * len(values), values, look.marker, color=look.colour, markerfacecolor="none", markersize=5,
                    alpha=0.7,
                )  # fmt: skip
            ax.plot(x, mean, look.marker, color=look.colour, markersize=9, markeredgecolor="white")
            points.append((float(x), mean))
            labels.append(plan.label)
        ax.set_xscale("log")
        ax.margins(0.1, 0.1)
        heading(figure, title)
        ax.set(xlabel="trained parameters", ylabel=f"{score} (test)")
        end_at_data(ax)
        handles = absent(lost)
        if seeds > 1:
            dot, ring = (
                Line2D([], [], color=INK, marker="o", linestyle="", label=text)
                for text in (f"mean of {seeds} seeds", "one seed")
            )
            dot.set_markersize(8)
            ring.set(markersize=5, markerfacecolor="none")
            handles = [dot, ring, *handles]
        legend(figure, handles)
        settle(figure)
        label_points(ax, points, labels, [drawn[label].colour for label in labels], size=9)


def curves(
    path: Path, work: Scored, plans: Mapping[str, Plan], results: Mapping[str, Sequence[Result]], title: str
) -> None:
    """The loss in training and what decides on the validation split, of the first seed."""
    decides = work.decides.name
    drawn = looks(plans[name].label for name in results)
    with figure_of(path, (10.4, 4.8), columns=2) as (figure, (left, right)):
        handles: list[Artist] = []
        steps = [point.step for found in results.values() for point in found[0].points]
        for name, found in results.items():
            points, look = found[0].points, drawn[plans[name].label]
            style = {"color": look.colour, "marker": look.marker, "markersize": 4, "linestyle": look.dash}
            trained = [(p.step, p.loss) for p in points if p.loss is not None]
            left.plot([step for step, _ in trained], [loss for _, loss in trained], **style)
            handles += right.plot(
                [p.step for p in points], [p.scores[decides] for p in points], **style, label=plans[name].label
            )
        heading(figure, title)
        left.set(xlabel="step", ylabel="loss (nats) since the evaluation before")
        left.set_title("in training", **SUBTITLE)
        right.set(xlabel="step", ylabel=f"{decides} (validation)")
        right.set_title("on the validation split", **SUBTITLE)
        end_at_data(left, x_ends=[step for step in steps if step])
        end_at_data(right, x_ends=steps)
        legend(figure, handles)
