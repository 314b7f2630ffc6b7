"""The plots of a comparison, one of each kind per task; a family of methods has one colour."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.comparison.labels import label_points
from experiments.comparison.report import Entrant, TaskResults, tests
from experiments.plots import COLOURS, FAINT, INK, figure_of


def draw(folder: Path, results: TaskResults) -> list[str]:
    """Draws all plots of a task. Returns their file names."""
    kinds = {
        "quality": quality_against_parameters,
        "time": time_against_reference,
        "forgetting": forgotten_against_learned,
        "latency": latency,
    }
    for kind, plot in kinds.items():
        plot(folder / f"{results.name}_{kind}.png", results)
    return [f"{results.name}_{kind}.png" for kind in kinds]


def quality_against_parameters(path: Path, results: TaskResults) -> None:
    """The metric on the new task's test split against the number of trained parameters."""
    shown = _finished(results)
    with figure_of(path, (10, 6.4)) as (figure, (ax,)):
        points = []
        for entrant in shown:
            values = [scores.new.value for scores in tests(entrant)]
            x, y = entrant.price.trainable, statistics.fmean(values)
            _point(ax, x, y, _colour(results, entrant), _deviation(values))
            points.append((float(x), y))
        ax.axhline(results.base.new.value, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        ax.set_xscale("log")
        ax.set(
            title=f"{results.label}: what is learned by how many parameters",
            xlabel="trained parameters",
            ylabel=f"{results.metric.label} on {results.new} (test); {results.metric.better} is better",
        )
        ax.margins(0.1, 0.1)
        ax.text(
            1.0,
            results.base.new.value,
            "base ",
            transform=ax.get_yaxis_transform(),
            color=FAINT,
            ha="right",
            va="bottom",
        )
        figure.subplots_adjust(left=0.08, right=0.98, bottom=0.1, top=0.87)
        _families(ax, results)
        label_points(ax, points, _labels(shown), [_colour(results, entrant) for entrant in shown])


def forgotten_against_learned(path: Path, results: TaskResults) -> None:
    """What each contender lost on the old task against what it gained on the new one."""
    shown, unit = _finished(results), results.metric.label
    with figure_of(path, (10, 6.4)) as (figure, (ax,)):
        points = []
        for entrant in shown:
            learned, forgotten = results.learned(entrant), results.forgotten(entrant)
            x, y = statistics.fmean(learned), statistics.fmean(forgotten)
            _point(ax, x, y, _colour(results, entrant), _deviation(forgotten), _deviation(learned))
            points.append((x, y))
        ax.axhline(0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        ax.set(
            title=f"{results.label}: learned and forgotten",
            xlabel=f"learned: gain in {unit} on {results.new}  →",
            ylabel=f"forgotten: loss in {unit} on {results.old}  →",
        )
        ax.margins(0.09, 0.09)
        figure.subplots_adjust(left=0.09, right=0.98, bottom=0.1, top=0.87)
        _families(ax, results)
        label_points(ax, points, _labels(shown), [_colour(results, entrant) for entrant in shown])


def time_against_reference(path: Path, results: TaskResults) -> None:
    """The time of a training step, as bars, to that of the first contender that times are relative to."""
    reference, *others = results.entrants[0].price.relative_time
    named = {entrant.contender.name: entrant for entrant in results.entrants}
    order = sorted(results.entrants, key=lambda entrant: entrant.price.relative_time[reference])
    values = [entrant.price.relative_time[reference] for entrant in order]
    with figure_of(path, (8.6, 1.6 + 0.25 * len(order))) as (figure, (ax,)):
        _bars(ax, order, results, values, [f"{v:.2f}" for v in values])
        for name in (reference, *others):
            ax.axvline(named[name].price.relative_time[reference], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        ax.set(title=f"{results.label}: time of a training step", xlabel=f"to {named[reference].contender.label}")
        ax.margins(0.06, 0.01)
        _fit(figure, len(order))
        _families(ax, results)


def latency(path: Path, results: TaskResults) -> None:
    """The time of a forward pass to the base's, with the factors apart (bar) and merged (ring)."""
    order = sorted(results.entrants, key=lambda entrant: entrant.price.apart)
    values = [entrant.price.apart for entrant in order]
    with figure_of(path, (8.6, 1.6 + 0.25 * len(order))) as (figure, (ax,)):
        texts = [f"{e.price.apart:.2f}" + ("  cannot be merged" if e.price.merged is None else "") for e in order]
        _bars(ax, order, results, values, texts)
        merged = [(e.price.merged, i) for i, e in enumerate(order) if e.price.merged is not None]
        if merged:
            ax.plot(*zip(*merged, strict=True), "o", color="white", markeredgecolor=INK, markersize=6, linestyle="")
        ax.axvline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        ax.set(
            title=f"{results.label}: time of a forward pass",
            xlabel="to the base's forward pass; bar: factors apart, ring: merged",
        )
        ax.margins(0.06, 0.01)
        _fit(figure, len(order))
        _families(ax, results)


# -- parts -------------------------------------------------------------------------------------------------------------


def _bars(
    ax: Axes, order: Sequence[Entrant], results: TaskResults, values: Sequence[float], texts: Sequence[str]
) -> None:
    colours = [_colour(results, entrant) for entrant in order]
    bars = ax.barh(range(len(order)), values, color=colours, height=0.72)
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    ax.bar_label(bars, texts, padding=9, fontsize=8, color=INK, bbox=ground, zorder=4)
    ax.set_yticks(range(len(order)), _labels(order), fontsize=8.5)
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0, max(values) * (1.1 + 0.009 * max(map(len, texts))))


def _fit(figure: Figure, count: int) -> None:
    height = 1.6 + 0.25 * count
    figure.subplots_adjust(left=0.24, right=0.97, bottom=0.55 / height, top=1 - 0.85 / height)


def _point(ax: Axes, x: float, y: float, colour: str, dy: float, dx: float = 0.0) -> None:
    ax.errorbar(x, y, yerr=dy, xerr=dx, color=colour, elinewidth=1, alpha=0.45, zorder=2)
    ax.plot(x, y, "o", color=colour, markersize=7, markeredgecolor="white", zorder=3)


def _families(ax: Axes, results: TaskResults) -> None:
    """The key to the colours, in one row above the axes."""
    colours = {entrant.contender.family: _colour(results, entrant) for entrant in results.entrants}
    handles = [Line2D([], [], color=c, marker="o", linestyle="", markersize=7, label=f) for f, c in colours.items()]
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 0.995), ncols=len(handles), frameon=False, fontsize=8.5,
        handletextpad=0.1, columnspacing=1.2, borderaxespad=0,
    )  # fmt: skip
    ax.set_title(ax.get_title(loc="left"), loc="left", pad=24)


def _colour(results: TaskResults, entrant: Entrant) -> str:
    families = list(dict.fromkeys(other.contender.family for other in results.entrants))
    return COLOURS[families.index(entrant.contender.family) % len(COLOURS)]


def _labels(entrants: Sequence[Entrant]) -> list[str]:
    return [entrant.contender.label for entrant in entrants]


def _finished(results: TaskResults) -> list[Entrant]:
    return [entrant for entrant in results.entrants if tests(entrant)]


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan
