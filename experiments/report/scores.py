"""Plots of the test split: the score against the trained parameters, what was learned against what was forgotten."""

import math
from pathlib import Path

from matplotlib.lines import Line2D

from experiments.report.labels import label_points
from experiments.report.results import Results, mean
from experiments.report.style import (
    FAINT,
    INK,
    absent,
    end_at_data,
    figure_of,
    heading,
    legend,
    looks,
    measured,
    settle,
)


def quality(path: Path, results: Results, title: str) -> None:
    """The score on the test split against the trained parameters: a ring for each seed, a dot for the mean."""
    score = results.headline_metric.name
    drawn = looks(outcome.label for outcome in results.outcomes)
    seeds = max(len(outcome.results) for outcome in results.outcomes)
    with figure_of(path, (8.6, 5.4)) as (figure, (ax,)):
        points, labels, lost = [], [], []
        for outcome in results.outcomes:
            look, values, x = drawn[outcome.label], results.scores(outcome), outcome.plan.trainable
            middle = mean(values)
            if not (math.isfinite(middle) and x):
                lost.append(outcome.label)
                continue
            if seeds > 1:
                ax.plot(
                    [x] * len(values), values, look.marker, color=look.colour, markerfacecolor="none", markersize=5,
                    alpha=0.7,
                )  # fmt: skip
            ax.plot(x, middle, look.marker, color=look.colour, markersize=9, markeredgecolor="white")
            points.append((float(x), middle))
            labels.append(outcome.label)
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


def learned_forgotten(path: Path, results: Results) -> None:
    """Gains and losses of each run: the table's numbers, on the test split."""
    metric, outcomes = results.headline_metric, [outcome for outcome in results.outcomes if results.scores(outcome)]
    drawn = looks(outcome.label for outcome in outcomes)
    less, more = ("less", "more") if metric.better == "lower" else ("more", "less")
    with figure_of(path, (8, 4.8)) as (figure, (ax,)):
        points, names = [(0.0, 0.0)], ["base"]
        ax.plot(0, 0, color=FAINT, marker="o", markersize=10, markeredgecolor="white", linestyle="")
        for outcome in outcomes:
            look = drawn[outcome.label]
            learned, forgotten = mean(results.learned(outcome)), mean(results.forgotten(outcome))
            ax.plot(
                learned, forgotten, color=look.colour, marker=look.marker, markersize=10, markeredgecolor="white",
                linestyle="",
            )  # fmt: skip
            points.append((learned, forgotten))
            names.append(
                f"{outcome.label}\nlearned {learned:.{metric.decimals}f}\nforgot {forgotten:.{metric.decimals}f}"
            )
        heading(figure, "Learned and forgotten after the last step (test split, as in the table)")
        ax.set(
            xlabel=f"learned: {measured(metric)} {less} on {results.new} (test)  →",
            ylabel=f"forgotten: {measured(metric)} {more} on {results.old} (test)  →",
        )
        ax.margins(0.08, 0.14)
        left, right = ax.get_xlim()
        ax.set_xlim(left, right + 0.2 * (right - left))  # for the name of the point that learned most
        end_at_data(ax)
        settle(figure)
        label_points(ax, points, names, [FAINT, *(drawn[outcome.label].colour for outcome in outcomes)], size=9)
