"""Plots against the step and against the learning rate, on the validation split."""

from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.lines import Line2D

from experiments.loop import is_finite
from experiments.report.results import Results
from experiments.report.style import (
    DASHED,
    FAINT,
    INK,
    SUBTITLE,
    end_at_data,
    figure_of,
    heading,
    legend,
    looks,
    measured,
    set_ticks,
)


def learning_curves(path: Path, results: Results) -> None:
    """The selection metric on both domains against the step, on the validation split, of the first seed."""
    outcomes, metric = [outcome for outcome in results.outcomes if outcome.results], results.selection_metric
    drawn = looks(outcome.label for outcome in outcomes)
    score = lambda point, domain: (point.scores if domain == "new" else point.old)[metric.name]
    panels = (("new", f"{results.new}: what is learned"), ("old", f"{results.old}: what is forgotten"))
    with figure_of(path, (10, 4.4), columns=2) as (figure, axes):
        for ax, (domain, title) in zip(axes, panels, strict=True):
            first, *_, last = outcomes[0].results[0].points
            (base,) = ax.plot(
                [first.step, last.step], [score(first, domain)] * 2, color=FAINT, linewidth=1.2, linestyle=DASHED,
                label="base",
            )  # fmt: skip
            lines = [
                ax.plot(
                    [point.step for point in points], [score(point, domain) for point in points],
                    color=look.colour, linestyle=look.dash, label=outcome.label,
                )[0]
                for outcome in outcomes
                for look, points in [(drawn[outcome.label], outcome.results[0].points)]
            ]  # fmt: skip
            ax.set_title(title, **SUBTITLE)
            ax.set(xlabel="step", ylabel=f"{measured(metric)} (validation)")
            end_at_data(ax, x_ends=[point.step for outcome in outcomes for point in outcome.results[0].points])
        heading(figure, "Learning curves (validation split)")
        legend(figure, [*lines, base])


def training_curves(path: Path, results: Results, title: str) -> None:
    """The loss in training and the selection metric on the validation split, of the first seed."""
    metric, outcomes = results.selection_metric.name, [outcome for outcome in results.outcomes if outcome.results]
    drawn = looks(outcome.label for outcome in outcomes)
    with figure_of(path, (10.4, 4.8), columns=2) as (figure, (left, right)):
        handles: list[Artist] = []
        steps = [point.step for outcome in outcomes for point in outcome.results[0].points]
        for outcome in outcomes:
            points, look = outcome.results[0].points, drawn[outcome.label]
            style = {"color": look.colour, "marker": look.marker, "markersize": 4, "linestyle": look.dash}
            trained = [(p.step, p.loss) for p in points if p.loss is not None]
            left.plot([step for step, _ in trained], [loss for _, loss in trained], **style)
            handles += right.plot(
                [p.step for p in points], [p.scores[metric] for p in points], **style, label=outcome.label
            )
        heading(figure, title)
        left.set(xlabel="step", ylabel="loss (nats) since the evaluation before")
        left.set_title("in training", **SUBTITLE)
        right.set(xlabel="step", ylabel=f"{metric} (validation)")
        right.set_title("on the validation split", **SUBTITLE)
        end_at_data(left, x_ends=[step for step in steps if step])
        end_at_data(right, x_ends=steps)
        legend(figure, handles)


def sweep(path: Path, results: Results) -> None:
    """The selection metric of each training of a sweep against the learning rate, on the validation split."""
    metric, swept = results.selection_metric, [outcome for outcome in results.outcomes if outcome.sweep]
    drawn = looks(outcome.label for outcome in swept)
    with figure_of(path, (7.6, 4.8)) as (figure, (ax,)):
        handles: list[Artist] = []
        for outcome, (label, look) in zip(swept, drawn.items(), strict=True):
            line = [(r.learning_rate, r.kept.scores[metric.name]) for r in outcome.sweep if is_finite(r)]
            if not line:
                continue
            rates, values = zip(*line, strict=True)
            best = max(line, key=lambda pair: metric.gain(0.0, pair[1]))
            style: dict[str, Any] = {"color": look.colour, "marker": look.marker}
            handles += ax.plot(rates, values, **style, linestyle=look.dash, markersize=4, label=label)
            ax.plot(*best, **style, markersize=10, markeredgecolor="white", linestyle="")
        ax.set_xscale("log")
        heading(figure, f"{results.new} at each learning rate (validation split)")
        ax.set(
            xlabel="learning rate (peak)",
            ylabel=f"{measured(metric)} on {results.new} (validation)",
        )
        end_at_data(ax)
        set_ticks(ax.xaxis, sorted({r.learning_rate for outcome in swept for r in outcome.sweep}), "{:g}".format)
        best_of_each = Line2D([], [], color=INK, marker="o", markersize=9, linestyle="", label="the best rate")
        legend(figure, [*handles, best_of_each])
