"""The style of all plots: colours, ticks, legends.

Colours are those of Okabe and Ito, told apart by people of any colour vision. A label has the same one in every plot.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # files alone, on machines without a screen

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from experiments.report.labels import GRID
from experiments.tasks.task import Metric

COLOURS = ("#D55E00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#333333")
INK, FAINT = "#333333", "#8a8a8a"
DASHED = (0, (4, 3))
SUBTITLE: dict[str, Any] = {"fontweight": "normal", "fontsize": 10}  # of a panel below a heading
_STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "figure.dpi": 160,  # names are placed between the pixels that are written
    "savefig.dpi": "figure",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "text.color": INK,
    "font.size": 10,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}


class Look(NamedTuple):
    """Look of a contender in every plot."""

    colour: str
    marker: str
    dash: Any


_PLAIN = [Look(colour, "o", "-") for colour in COLOURS]
_OTHERS = [
    Look(colour, marker, dash)
    for marker, dash in (("s", (0, (5, 1.2))), ("^", (0, (1.5, 1.2))), ("D", (0, (5, 1.2, 1.5, 1.2))))
    for colour in COLOURS
]
_KNOWN = {
    label: look
    for labels, look in zip(
        (
            ("full", "full fine-tuning", "baselines"),
            ("LoRA r=4", "LoRA q,v r=4", "LoRA q,v r=8", "LoRA and variants"),
            ("LoRA r=8", "LoRA r=16", "LoRA, other starts"),
            ("rsLoRA r=8", "LoRA+ r=8, ratio 16", "other weights"),
            ("DoRA r=4", "DoRA r=8", "activations"),
            ("BitFit", "PiSSA r=8"),
            ("Houlsby adapters m=16",),
        ),
        _PLAIN,
        strict=True,
    )
    for label in labels
}


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """Colour, marker and dash of each label: those of the label, whatever else a plot shows.

    The labels of this repository's configs have theirs in a table, any other has one of 21 by its letters. Where two of
    a plot have the same, the second in alphabetical order takes the next that is free.
    """
    found: dict[str, Look] = {}
    labels = list(dict.fromkeys(labels))
    for label in sorted(labels, key=lambda label: (label not in _KNOWN, label)):
        first = zlib.crc32(label.encode()) % len(_OTHERS)
        wanted = [_OTHERS[(first + i) % len(_OTHERS)] for i in range(len(_OTHERS))]
        wanted = [_KNOWN[label], *wanted] if label in _KNOWN else wanted
        found[label] = next((look for look in wanted if look not in found.values()), wanted[0])
    return {label: found[label] for label in labels}


# -- what plots share --------------------------------------------------------------------------------------------------


@contextmanager
def figure_of(
    path: Path, size: tuple[float, float], columns: int = 1, widths: Sequence[float] | None = None
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A figure in the style of all plots, written to `path` at the end. `widths` are the columns' relative widths."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1, columns, figsize=size, squeeze=False, layout="constrained", gridspec_kw={"width_ratios": widths}
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.07, wspace=0.04)  # type: ignore[union-attr, call-arg]
        try:
            yield figure, axes[0]
            figure.savefig(path)
        finally:
            plt.close(figure)


def heading(figure: Figure, text: str) -> None:
    """Content of a whole figure."""
    figure.suptitle(text, x=0.012, ha="left", fontsize=11.5, fontweight="bold")


def settle(figure: Figure) -> None:
    """Ends the layout: what is written into the axes from now on moves nothing."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """One legend for all panels below them, in as many columns as the figure is wide."""
    for rows in range(1, len(handles) + 1):
        columns = math.ceil(len(handles) / rows)
        made = figure.legend(
            handles=handles, loc="outside lower left", ncols=columns, handletextpad=0.6, columnspacing=1.8,
            borderaxespad=0.3,
        )  # fmt: skip
        if columns == 1 or made.get_window_extent().width < 0.98 * figure.bbox.width:
            return
        made.remove()


def absent(labels: Sequence[str]) -> list[Artist]:
    """The legend's line for contenders whose numbers are not finite, so that a plot cannot show them."""
    if not labels:
        return []
    return [Line2D([], [], linestyle="", label=f"no finite score: {', '.join(labels)}")]


def end_at_data(ax: Axes, x_ends: Iterable[float] = ()) -> None:
    """Ticks and axes' lines that end where the data do.

    Args:
      ax: with all data in it.
      x_ends: what lies along the x axis, when its ends are ticks too: the steps of a run.
    """
    for axis, (low, high), ends in (
        (ax.xaxis, ax.dataLim.intervalx, sorted(set(x_ends))),
        (ax.yaxis, ax.dataLim.intervaly, []),
    ):
        if not (math.isfinite(low) and math.isfinite(high)):
            continue
        logarithmic = axis.get_scale() == "log"
        ticks = ticks_within(low, high, logarithmic=logarithmic)
        if ends:
            ticks = _with_ends(ends if len(ends) <= 7 else ticks, ends[0], ends[-1])
        set_ticks(axis, ticks, short if logarithmic else None)
        ax.spines["bottom" if axis is ax.xaxis else "left"].set_bounds(low, high)


def set_ticks(axis: Axis, ticks: Sequence[float], text: Any = None) -> None:
    """These ticks and no smaller ones; `text` writes one, as many digits as all need when None."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    if text is not None:
        axis.set_major_formatter(FixedFormatter([text(tick) for tick in ticks]))


def ticks_within(low: float, high: float, *, logarithmic: bool = False, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at least two unless the two are one.

    >>> ticks_within(0.03, 2.45), ticks_within(1792, 638080, logarithmic=True)
    ([0.5, 1.0, 1.5, 2.0], [2000.0, 5000.0, 10000.0, 20000.0, 50000.0, 100000.0, 200000.0, 500000.0])
    """
    slack = 1e-9 * (high - low)
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1,), (1, 2, 5)) if high / low > 1e4 else ((1, 2, 5),):
            found = [digit * 10.0**decade for decade in decades for digit in digits]
            found = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
            if len(found) > 1:
                return found
    for count in (most, 2 * most, 4 * most):
        values = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        found = [float(np.round(tick, 12)) for tick in values if low - slack <= tick <= high + slack]
        if len(found) > 1:
            return found
    return sorted({low, high})


def short(value: float) -> str:
    """A number as a tick says it.

    >>> short(500), short(20_000.0), short(2.5e6)
    ('500', '20k', '2.5M')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _with_ends(ticks: Sequence[float], low: float, high: float) -> list[float]:
    """Ticks, the ends among them, and none so near to an end that their numbers would touch."""
    least, found = 0.1 * (high - low), [low]
    for tick in ticks:
        if found[-1] + least < tick < high - least:
            found.append(tick)
    return sorted({*found, high})


def measured(metric: Metric) -> str:
    """A score with its unit, for an axis."""
    unit = metric.unit.strip()
    return metric.name + (f" in {unit}" if unit else "")
