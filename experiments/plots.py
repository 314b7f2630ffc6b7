"""The plots of an experiment. Colours are those of Okabe and Ito, told apart by people of any colour vision."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files alone, on machines without a screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.config import Run
from experiments.evaluate import Point
from experiments.report import Results

COLOURS = ("#D55E00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
INK, FAINT = "#333333", "#9a9a9a"
_STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ebebeb",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "font.size": 10,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 160,
}


def learning_curves(path: Path, results: Results) -> None:
    """Bits per byte on both domains against the step, on the validation split."""
    outcomes = results.outcomes
    panels = (("new", f"{results.new}: what is learned"), ("old", f"{results.old}: what is forgotten"))
    with figure_of(path, (10, 4.2), columns=2) as (figure, (left, right)):
        for ax, (domain, title) in zip((left, right), panels, strict=True):
            ends = []
            for colour, outcome in zip(_colours(len(outcomes)), outcomes, strict=True):
                steps = [point.step for point in outcome.curve]
                values = [getattr(point, domain) for point in outcome.curve]
                ax.plot(steps, values, color=colour)
                ends.append((values[-1], outcome.run.label, colour))
            start = getattr(outcomes[0].curve[0], domain)
            ax.axhline(start, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
            ax.set(title=title, xlabel="step", xlim=(0, None))
            _end_labels(ax, [*ends, (start, "base", FAINT)])
        left.set_ylabel("bits per byte (validation)")
        figure.subplots_adjust(wspace=0.55, right=0.85, left=0.07, bottom=0.13, top=0.88)


def learned_forgotten(path: Path, results: Results) -> None:
    """The way of each run in the plane of what it learned and what it forgot, on the validation split."""
    outcomes = results.outcomes
    with figure_of(path, (7.6, 4.8)) as (figure, (ax,)):
        ends = []
        for colour, outcome in zip(_colours(len(outcomes)), outcomes, strict=True):
            first = outcome.curve[0]
            learned = [first.new - point.new for point in outcome.curve]
            forgotten = [point.old - first.old for point in outcome.curve]
            ax.plot(learned, forgotten, color=colour, marker="o", markersize=3.5, markeredgewidth=0, alpha=0.75)
            ax.plot(learned[-1], forgotten[-1], color=colour, marker="o", markersize=10, markeredgecolor="white")
            ends.append(
                (forgotten[-1], f"{outcome.run.label}\nlearned {learned[-1]:.2f}, forgot {forgotten[-1]:.2f}", colour)
            )
        ax.plot(0, 0, color=FAINT, marker="o", markersize=10, markeredgecolor="white")
        ax.annotate("base", (0, 0), xytext=(10, -4), textcoords="offset points", va="center", color=FAINT)
        ax.set(
            title="Learned and forgotten, from the base to the last step",
            xlabel=f"learned: bits per byte less on {results.new}  →",
            ylabel=f"forgotten: bits per byte more on {results.old}  →",
        )
        ax.margins(0.06, 0.1)
        _end_labels(ax, ends, spacing=0.115)
        figure.subplots_adjust(left=0.1, right=0.71, bottom=0.12, top=0.9)


def sweep(path: Path, outcomes: Sequence[tuple[Run, Sequence[Point]]], *, new: str) -> None:
    """Bits per byte on the new domain at the end of each run, against the learning rate."""
    with figure_of(path, (7, 4.4)) as (figure, (ax,)):
        labels = list(dict.fromkeys(run.label for run, _ in outcomes))
        ends = []
        for colour, label in zip(_colours(len(labels)), labels, strict=True):
            line = sorted((run.learning_rate, curve[-1].new) for run, curve in outcomes if run.label == label)
            rates, values = zip(*line, strict=True)
            best = min(line, key=lambda pair: pair[1])
            ax.plot(rates, values, color=colour, marker="o", markersize=4)
            ax.plot(*best, color=colour, marker="o", markersize=10, markeredgecolor="white")
            ends.append((values[-1], label, colour))
        ax.set_xscale("log")
        ticks = sorted({run.learning_rate for run, _ in outcomes})
        ax.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        ax.minorticks_off()
        ax.set(title="Learning rates; the best of each is large", xlabel="learning rate (peak)")
        ax.set_ylabel(f"bits per byte on {new} (validation)")
        _end_labels(ax, ends)
        figure.subplots_adjust(left=0.11, right=0.78, bottom=0.12, top=0.9)


@contextmanager
def figure_of(path: Path, size: tuple[float, float], columns: int = 1) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A figure in the style of all plots, written to `path` at the end."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False)
        try:
            yield figure, axes[0]
            figure.savefig(path)
        finally:
            plt.close(figure)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _end_labels(ax: Axes, ends: Sequence[tuple[float, str, str]], spacing: float = 0.065) -> None:
    """Names beside the right edge at the height of the lines' ends, moved apart where they would overlap.

    `ends` are (height, text, colour); `spacing` is the least distance, as a part of the axis.
    """
    low, high = ax.get_ylim()
    places = sorted((((value - low) / (high - low)), text, colour) for value, text, colour in ends)
    heights = [place[0] for place in places]
    for _ in range(100):
        for i in range(len(heights) - 1):
            overlap = spacing - (heights[i + 1] - heights[i])
            if overlap > 1e-4:
                heights[i], heights[i + 1] = heights[i] - overlap / 2, heights[i + 1] + overlap / 2
    for height, (_, text, colour) in zip(heights, places, strict=True):
        ax.text(1.02, height, text, transform=ax.transAxes, color=colour, va="center", fontsize=9.5, fontweight="bold")
