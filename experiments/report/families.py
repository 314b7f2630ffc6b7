"""Plots of many methods, whose families have one colour each."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from experiments.price import Price
from experiments.report.labels import label_points
from experiments.report.results import Outcome, Results
from experiments.report.style import (
    DASHED,
    FAINT,
    INK,
    SUBTITLE,
    Look,
    absent,
    end_at_data,
    figure_of,
    heading,
    legend,
    looks,
    measured,
    settle,
)

_CROWD = 6  # so many points that hang together are shown again, larger
_NEAR = 20.0  # typographic points between two that hang together: there is no room for a name
_PANEL = 340.0  # the same, the width and height of the first of two panels


def quality_against_parameters(path: Path, results: Results) -> None:
    """The metric on the new task's test split against the number of trained parameters."""
    marks, metric = [], results.headline_metric
    for outcome in _finished(results):
        marks.append(_mark(results, outcome, [float(outcome.plan.trainable)], results.scores(outcome)))
    _scatter(
        path, marks, results,
        title=f"{results.label}: what is learned by how many parameters (test split)",
        xlabel="trained parameters",
        ylabel=f"{measured(metric)} on {results.new} (test); {metric.better} is better",
        level=((results.start.test or {})[metric.name], "the base"),
        logarithmic=True,
    )  # fmt: skip


def forgotten_against_learned(path: Path, results: Results) -> None:
    """Loss of each run on the old task against its gain on the new one, on the test split."""
    unit = results.headline_metric.name
    marks = [_mark(results, e, results.learned(e), results.forgotten(e)) for e in _finished(results)]
    _scatter(
        path, marks, results,
        title=f"{results.label}: learned and forgotten (test split)",
        xlabel=f"learned: gain in {unit} on {results.new} (test)  →",
        ylabel=f"forgotten: loss in {unit} on {results.old} (test)  →",
        level=(0.0, "nothing forgotten"),
    )  # fmt: skip


def time_against_reference(path: Path, results: Results) -> None:
    """The time of a training step, as bars, to that of the first run that times are divided by."""
    names, priced = results.references, _priced(results)
    times = {outcome.name: price.relative_time for outcome, price in priced}
    order = sorted((outcome for outcome, _ in priced), key=lambda outcome: times[outcome.name][names[0]])
    values = [times[outcome.name][names[0]] for outcome in order]
    levels = [
        (times[name][names[0]], results.label_of(name), style)
        for name, style in zip(names, (DASHED, ":", "-.", "-"), strict=False)
    ]
    _bars(
        path, order, results, values, [f"{v:.2f}" for v in values], levels=levels,
        title=f"{results.label}: time of a training step",
        xlabel=f"time relative to {results.label_of(names[0])}",
    )  # fmt: skip


def latency(path: Path, results: Results) -> None:
    """The time of a forward pass to the base's, with the factors apart (bar) and merged (ring)."""
    priced = sorted(_priced(results), key=lambda pair: pair[1].apart or 0.0)
    _bars(
        path, [outcome for outcome, _ in priced], results, [price.apart or 0.0 for _, price in priced],
        [f"{p.apart:.2f}" + ("  cannot be merged" if p.merged is None else "") for _, p in priced],
        levels=[(1.0, "the base", DASHED)],
        rings=[price.merged for _, price in priced],
        title=f"{results.label}: time of a forward pass",
        xlabel="time relative to the base's; bars: with the factors apart",
    )  # fmt: skip


def _priced(results: Results) -> list[tuple[Outcome, Price]]:
    return [(outcome, outcome.price) for outcome in results.outcomes if outcome.price is not None]


# -- points ------------------------------------------------------------------------------------------------------------


class Mark(NamedTuple):
    """A run in a plane: means, and standard deviations (NaN for none)."""

    label: str
    look: Look
    x: float
    y: float
    dx: float
    dy: float


def crowd(places: Sequence[tuple[float, float]]) -> list[int]:
    """Points so close together that they are shown again, larger; none if there are few.

    `places` are in parts of the axes. The largest group in which each point is near to another, and all others in the
    rectangle around it; none if that is most of the axes, which a second panel could not enlarge.
    """
    left, groups = set(range(len(places))), []
    while left:
        group, found = [], [min(left)]
        while found:
            i = found.pop()
            if i in left:
                left.remove(i)
                group.append(i)
                found += [j for j in left if _PANEL * math.dist(places[i], places[j]) < _NEAR]
        groups.append(group)
    largest = max(groups, key=len, default=[])
    if len(largest) < _CROWD:
        return []
    (x0, x1), (y0, y1) = (
        (min(places[i][axis] for i in largest), max(places[i][axis] for i in largest)) for axis in (0, 1)
    )
    inside = [i for i, (x, y) in enumerate(places) if x0 <= x <= x1 and y0 <= y <= y1]
    return inside if (x1 - x0) * (y1 - y0) < 0.3 else []


def _scatter(
    path: Path,
    marks: Sequence[Mark],
    results: Results,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    level: tuple[float, str],
    logarithmic: bool = False,
) -> None:
    """The points with their names; where many lie together, they have theirs in a second panel."""
    marks = [
        mark for mark in marks if math.isfinite(mark.x) and math.isfinite(mark.y) and (mark.x > 0 or not logarithmic)
    ]
    shown_labels = {mark.label for mark in marks}
    lost = [outcome.label for outcome in results.outcomes if outcome.label not in shown_labels]
    scale = math.log if logarithmic else float
    close = crowd(_in_parts([(scale(mark.x), mark.y) for mark in marks], level[0]))
    near, rest = [marks[i] for i in close], [mark for i, mark in enumerate(marks) if i not in close]
    widths = (1.0, 1.05) if near else None
    with figure_of(path, (11.4 if near else 9.6, 6.4), 2 if near else 1, widths) as (figure, (ax, *others)):
        line = ax.axhline(level[0], color=FAINT, linewidth=1.2, linestyle=DASHED, label=level[1])
        for panel in (ax, *others):
            panel.set_xscale("log" if logarithmic else "linear")
            panel.set(xlabel=xlabel)
        _points(ax, marks)
        ax.set(ylabel=ylabel)
        heading(figure, title)
        ax.margins(0.06, 0.06)
        end_at_data(ax)
        for zoom in others:
            _zoom(ax, zoom, near)
            ax.set_title(f"all {len(marks)}", **SUBTITLE)
            zoom.set_title(f"the {len(near)} in the frame", **SUBTITLE)
        bars = any(mark.dy > 0 or mark.dx > 0 for mark in marks)
        legend(figure, [*_families(results), line, *([_bar_key(results)] if bars else []), *absent(lost)])
        settle(figure)
        for panel, shown in ((ax, rest), *((zoom, near) for zoom in others)):
            label_points(
                panel, [(mark.x, mark.y) for mark in shown], [mark.label for mark in shown],
                [mark.look.colour for mark in shown], size=8.5,
            )  # fmt: skip


def _points(ax: Axes, marks: Sequence[Mark]) -> None:
    """Dots, and bars that end at the edge of the axes if the limits are set already."""
    fixed = not ax.get_autoscale_on()
    (left, right), (bottom, top) = (sorted(limits) for limits in (ax.get_xlim(), ax.get_ylim()))
    for mark in marks:
        for x, y, d, coordinate in ((mark.x, mark.y, mark.dx, 0), (mark.x, mark.y, mark.dy, 1)):
            if not d > 0:
                continue
            ends = [(x, y)[coordinate] - d, (x, y)[coordinate] + d]
            if fixed:
                ends = [max(ends[0], (left, bottom)[coordinate]), min(ends[1], (right, top)[coordinate])]
            xs, ys = (ends, [y, y]) if coordinate == 0 else ([x, x], ends)
            ax.plot(xs, ys, color=mark.look.colour, linewidth=1, alpha=0.45, zorder=2, solid_capstyle="butt")
    for mark in marks:
        ax.plot(
            mark.x, mark.y, mark.look.marker, color=mark.look.colour, markersize=7, markeredgecolor="white", zorder=3
        )


def _zoom(ax: Axes, zoom: Axes, near: Sequence[Mark]) -> None:
    """The points of `near` alone in their own panel, whose limits are a frame in the first one."""
    for values, scale, set_limits in (
        ([mark.x for mark in near], ax.get_xscale(), zoom.set_xlim),
        ([mark.y for mark in near], "linear", zoom.set_ylim),
    ):
        low, high = (math.log(v) if scale == "log" else v for v in (min(values), max(values)))
        margin = 0.12 * (high - low) or 0.02 * abs(low) or 0.02
        ends = low - margin, high + margin
        set_limits(*(map(math.exp, ends) if scale == "log" else ends))
    _points(zoom, near)
    (left, right), (bottom, top) = zoom.get_xlim(), zoom.get_ylim()
    frame = Rectangle(
        (left, bottom), right - left, top - bottom, fill=False, edgecolor=INK, linewidth=0.8, linestyle=":", zorder=1.2
    )
    ax.add_artist(frame)
    end_at_data(zoom)


def _in_parts(points: Sequence[tuple[float, float]], level: float) -> list[tuple[float, float]]:
    """Each coordinate from 0 at its least to 1 at its largest, the height of a line among the second ones."""
    if not points:
        return []
    xs, ys = zip(*points, strict=True)
    (left, width), (bottom, height) = ((min(values), max(values) - min(values) or 1.0) for values in (xs, (*ys, level)))
    return [((x - left) / width, (y - bottom) / height) for x, y in points]


def _mark(results: Results, outcome: Outcome, xs: Sequence[float], ys: Sequence[float]) -> Mark:
    look = _looks(results)[outcome.family]
    return Mark(outcome.label, look, statistics.fmean(xs), statistics.fmean(ys), _deviation(xs), _deviation(ys))


# -- bars --------------------------------------------------------------------------------------------------------------


def _bars(
    path: Path,
    order: Sequence[Outcome],
    results: Results,
    values: Sequence[float],
    texts: Sequence[str],
    *,
    levels: Sequence[tuple[float, str, object]],
    title: str,
    xlabel: str,
    rings: Sequence[float | None] = (),
) -> None:
    """A bar for each run with its value at the right of all that is drawn in its row."""
    drawn = _looks(results)
    with figure_of(path, (8.6, 1.7 + 0.25 * len(order))) as (figure, (ax,)):
        colours = [drawn[outcome.family].colour for outcome in order]
        ax.barh(range(len(order)), values, color=colours, height=0.72)
        handles: list[Artist] = [
            ax.axvline(value, color=INK, linewidth=1.1, linestyle=style, label=label) for value, label, style in levels
        ]
        merged = [(value, i) for i, value in enumerate(rings) if value is not None]
        if merged:
            handles += ax.plot(
                *zip(*merged, strict=True), "o", color="white", markeredgecolor=INK, markersize=6, linestyle="",
                label="merged",
            )  # fmt: skip
        heading(figure, title)
        ax.set(xlabel=xlabel)
        ax.set_ylim(-0.6, len(order) - 0.4)
        ax.grid(visible=False, axis="y")
        end_at_data(ax)
        ax.set_yticks(range(len(order)), [outcome.label for outcome in order], fontsize=8.5)
        ax.spines["left"].set_visible(False)
        legend(figure, [*_families(results), *handles])
        settle(figure)
        _values_beside(ax, values, texts, [*(level[0] for level in levels)], rings or [None] * len(values))


def _values_beside(
    ax: Axes, values: Sequence[float], texts: Sequence[str], levels: Sequence[float], rings: Sequence[float | None]
) -> None:
    """Writes each value to the right of its bar, its ring and the lines that it would lie on."""
    written = [
        ax.text(
            0, i, text, va="center", fontsize=8, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip
    ax.figure.figure.draw_without_rendering()
    widths = [text.get_window_extent().width for text in written]
    gap = 4 * ax.figure.dpi / 72
    ax.set_xlim(0, max([*values, *levels, *(ring for ring in rings if ring is not None)]))
    while True:
        pixel = lambda value: ax.transData.transform((value, 0))[0]
        starts = []
        for value, ring, width in zip(values, rings, widths, strict=True):
            start = max(pixel(value) + gap, pixel(ring or 0) + 2 * gap)
            for level in sorted(map(pixel, levels)):
                if start - gap < level < start + width + gap:
                    start = level + gap
            starts.append(start)
        over = max(start + width for start, width in zip(starts, widths, strict=True)) / ax.get_window_extent().x1
        if over <= 1:
            break
        ax.set_xlim(0, ax.get_xlim()[1] * 1.03)
    for text, start in zip(written, starts, strict=True):
        text.set_x(ax.transData.inverted().transform((start, 0))[0])


# -- parts -------------------------------------------------------------------------------------------------------------


def _families(results: Results) -> list[Artist]:
    """The key to the colours."""
    return [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="", markersize=7, label=family)
        for family, look in _looks(results).items()
    ]


def _bar_key(results: Results) -> Artist:
    """The key to the bars at the points."""
    seeds = max(len(results.scores(outcome)) for outcome in results.outcomes)
    return Line2D([], [], color=INK, linewidth=1, alpha=0.6, label=f"± standard deviation over {seeds} seeds")


def _looks(results: Results) -> dict[str, Look]:
    return looks(outcome.family for outcome in results.outcomes)


def _finished(results: Results) -> list[Outcome]:
    return [outcome for outcome in results.outcomes if results.scores(outcome)]


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan
