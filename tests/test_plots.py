"""What is on a plot: no name over a mark, a line, an edge or another name; ticks, legends, colours; one split."""

import dataclasses
import itertools
import json
import math
import random
import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.path import Path as MatplotlibPath
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from experiments import redraw
from experiments.config import all_of
from experiments.report import families, plots, style
from experiments.report.labels import Box, label_points
from experiments.report.results import Results, as_json, from_json
from experiments.report.style import looks, short, ticks_within
from experiments.report.tables import markdown_table, tables
from tests.tiers import thorough

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.rglob("results.json"))

Point = tuple[float, float]


# -- what lies where in a drawn figure ---------------------------------------------------------------------------------


def box(artist) -> Box:
    extent = artist.get_window_extent()
    return Box(extent.x0, extent.y0, extent.x1, extent.y1)


def written(figure: Figure) -> list[Text]:
    """All texts that are seen."""
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    ticks = {text for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for text in axis.findobj(Text)}
    shown = {
        text
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        for low, high in [sorted(axis.get_view_interval())]
        for text in [axis.label, *(tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)]
    }
    return [text for text in found if text not in ticks or text in shown]


def lines_of(ax: Axes) -> list[Line2D]:
    """The lines with a stroke between their points."""
    return [line for line in ax.get_lines() if line.get_linestyle() not in ("None", "", " ")]


def strokes(ax: Axes) -> Iterator[tuple[np.ndarray, float]]:
    """The ends of each stroke in pixels, and half its width: lines, leaders, edges of bars and frames."""
    scale = ax.figure.dpi / 72
    for line in lines_of(ax):
        path = line.get_transform().transform(line.get_xydata())
        yield from ((pair, scale * line.get_linewidth() / 2) for pair in itertools.pairwise(path))
    for collection in ax.collections:
        if isinstance(collection, LineCollection):
            for segment in collection.get_segments():
                path = collection.get_transform().transform(segment)
                yield from ((pair, scale * 0.35) for pair in itertools.pairwise(path))
    for patch in [patch for patch in (*ax.patches, *ax.artists) if isinstance(patch, Rectangle)]:
        corners = patch.get_transform().transform([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
        yield from ((pair, 0.0) for pair in itertools.pairwise(corners))


def marks(ax: Axes) -> Iterator[tuple[Point, float]]:
    """The middle of each mark in pixels, and its radius."""
    for line in ax.get_lines():
        if line.get_marker() not in ("None", "", None):
            for x, y in line.get_transform().transform(line.get_xydata()):
                yield (x, y), ax.figure.dpi / 72 * line.get_markersize() / 2


def crosses(rectangle: Box, ends: np.ndarray, width: float) -> bool:
    """Whether a stroke touches a rectangle."""
    left, bottom, right, top = rectangle
    wide = Bbox.from_extents(left - width, bottom - width, right + width, top + width)
    return MatplotlibPath(ends).intersects_bbox(wide, filled=False)


def faults(figure: Figure) -> list[str]:
    """Every text that lies over something or is cut off."""
    figure.canvas.draw()
    found, texts = [], written(figure)
    boxes = {text: box(text) for text in texts}
    whole = Box(0, 0, *figure.bbox.size)
    for text, place in boxes.items():
        if place.overlap(whole) < 0.999 * (place.right - place.left) * (place.top - place.bottom):
            found.append(f"{text.get_text()!r} is cut off")
    for one, other in itertools.combinations(texts, 2):
        if boxes[one].overlap(boxes[other]) > 0:
            found.append(f"{one.get_text()!r} over {other.get_text()!r}")
    for ax in figure.axes:
        inside = box(ax)
        for text in ax.texts:
            place, name = boxes[text], text.get_text()
            if place.left < inside.left or place.bottom < inside.bottom or place.top > inside.top:
                found.append(f"{name!r} over the edge")
            if place.right > inside.right + 1:
                found.append(f"{name!r} over the edge")
            found += [f"{name!r} over a mark" for p, r in marks(ax) if math.dist(place.nearest(p), p) < r]
            found += [f"{name!r} through a line" for ends, width in strokes(ax) if crosses(place, ends, width)]
    return found


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def key_colours(figure: Figure) -> set[str]:
    return {str(handle.get_color()) for legend in figure.legends for handle in legend.legend_handles}


# -- names beside points -----------------------------------------------------------------------------------------------


def spread(seed: int, count: int, x: float, y: float, size: float) -> list[Point]:
    rng = random.Random(seed)
    return [(rng.gauss(x, size), rng.gauss(y, size)) for _ in range(count)]


CASES: dict[str, list[Point]] = {
    "fifteen in one spot": spread(0, 15, 0.5, 0.5, 0.01),
    "fifteen equal": [(0.3, 0.7)] * 15,
    "fifteen equal in a corner": [(1.0, 1.0)] * 15,
    "corners and edges": [(x, y) for x in (0.0, 0.5, 1.0) for y in (0.0, 0.5, 1.0)],
    "a column": [(0.5, i / 20) for i in range(20)],
    "a row": [(i / 11, 0.5) for i in range(12)],
    "two spots": spread(1, 8, 0.05, 0.1, 0.02) + spread(2, 8, 0.93, 0.9, 0.02),
    "all over": [(float(x), float(y)) for x, y in np.random.default_rng(3).random((28, 2))],
}


def scene(points: Sequence[Point], names: Sequence[str], lines: Sequence[Sequence[Point]] = ()) -> Figure:
    figure, ax = plt.subplots(figsize=(6, 4), dpi=100)
    for line in lines:
        ax.plot(*zip(*line, strict=True), color="#0072B2", linewidth=2)
    for point in points:
        ax.plot(*point, "o", color="#D55E00", markersize=7, markeredgecolor="white")
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    label_points(ax, points, names, ["#D55E00"] * len(points))
    return figure


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    for number in plt.get_fignums():
        plt.close(number)


@pytest.mark.parametrize("case", CASES)
def test_no_name_lies_over_anything(case):
    points = CASES[case]
    figure = scene(points, [f"LoRA-{i} r={2**i}" for i in range(len(points))])
    assert faults(figure) == []
    assert len(figure.axes[0].texts) == len(points)


def test_long_names_and_names_of_several_lines():
    names = [f"a contender with a long name, rank {i}\nand a second line" for i in range(6)] + ["x", "g y p Ä³ $r^2$"]
    assert faults(scene(spread(4, 8, 0.8, 0.2, 0.03), names)) == []


def test_names_keep_off_lines():
    rng = np.random.default_rng(5)
    lines = [[(float(x), float(y)) for x, y in rng.random((8, 2))] for _ in range(3)]
    points = [line[0] for line in lines] + spread(6, 6, 0.5, 0.5, 0.05)
    assert faults(scene(points, [f"method {i}" for i in range(9)], lines)) == []


def test_a_name_that_is_not_beside_its_point_has_a_line_to_it():
    figure = scene(CASES["fifteen equal"], [f"method {i}" for i in range(15)])
    (ax,) = figure.axes
    figure.canvas.draw()
    (leaders,) = ax.collections
    segments = [leaders.get_transform().transform(segment) for segment in leaders.get_segments()]
    assert len(segments) == 15
    spot = ax.transData.transform((0.3, 0.7))
    near = 3.5 * figure.dpi / 72  # the margin of a name at its corner
    for (start, end), text in zip(segments, ax.texts, strict=True):
        assert math.dist(start, spot) < 2
        assert 0 < math.dist(box(text).nearest(tuple(end)), end) < near
    alone = scene([(0.5, 0.5)], ["alone"])
    (text,) = alone.axes[0].texts
    assert alone.axes[0].collections[0].get_segments() == []
    assert math.dist(box(text).nearest(tuple(alone.axes[0].transData.transform((0.5, 0.5)))), alone.axes[0].transData.transform((0.5, 0.5))) < 14  # fmt: skip


def test_a_figure_grows_until_there_is_room():
    figure, ax = plt.subplots(figsize=(2, 1.5), dpi=100)
    points = spread(7, 20, 0.5, 0.5, 0.1)
    ax.plot(*zip(*points, strict=True), "o", markersize=6)
    label_points(ax, points, [f"LoRA r={i}" for i in range(20)], ["k"] * 20)
    assert figure.get_size_inches()[0] > 2 and faults(figure) == []


def test_the_same_points_get_the_same_places():
    places = [[text.get_position() for text in scene(CASES["all over"], ["LoRA"] * 28).axes[0].texts] for _ in "ab"]
    assert places[0] == places[1]


def test_a_point_outside_of_the_axes_is_refused():
    with pytest.raises(
        ValueError, match=r"the points of \['far'\] lie outside of the axes: there is nothing to write beside"
    ):
        scene([(0.5, 0.5), (3.0, 0.5)], ["near", "far"])


# -- ticks and colours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logarithmic", [False, True])
def test_ticks_lie_within_the_data(logarithmic):
    rng = np.random.default_rng(8)
    for _ in range(300):
        low = float(10 ** rng.uniform(-4, 7))
        high = low * float(10 ** rng.choice([1e-3, 0.1, 1, 5]))
        ticks = ticks_within(low, high, logarithmic=logarithmic)
        assert ticks == sorted(set(ticks)) and 2 <= len(ticks) <= 25
        slack = 1e-8 * high
        assert low - slack <= ticks[0] and ticks[-1] <= high + slack
    assert ticks_within(3.0, 3.0) == [3.0] and short(1_250_000.0) == "1.25M"


def test_a_label_looks_alike_whatever_else_is_shown():
    labels = [label for names in style._KNOWN for label in [names]]
    mine = [f"mine, {i}" for i in range(6)]
    whole = looks([*labels, "LoRA r=3", *mine])
    for label in labels:
        assert looks([label])[label] == looks([*mine, label])[label]
    assert looks(["LoRA r=3"])["LoRA r=3"] == looks(["full", "LoRA r=3"])["LoRA r=3"]
    assert len(set(looks(mine).values())) == 6 and len(set(whole.values())) >= 13


COMMITTED = ("quickstart", "minilm_sst2", "minilm_trec", "stories_shakespeare", "compare_methods")  # results and all


@pytest.mark.parametrize("name", COMMITTED)
def test_small_and_full_runs_have_the_same_colours(name):
    module = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))
    forms = (all_of(module[form]()).values() for form in ("config", "small"))
    for pair in zip(*forms, strict=True):
        whole, few = (looks(run.family or run.label for run in experiment.runs) for experiment in pair)
        assert set(few) <= set(whole) and len(set(whole.values())) == len(whole)
        assert few == {label: whole[label] for label in few}


# -- the plots of the committed results --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Callable[[Path], dict[str, Figure]]:
    """Draws a folder's plots elsewhere, once, and keeps the figures by file name."""
    known: dict[Path, dict[str, Figure]] = {}

    def draw(folder: Path) -> dict[str, Figure]:
        if folder not in known:
            place = tmp_path_factory.mktemp(folder.name)
            (place / "results.json").write_text((folder / "results.json").read_text())
            with kept() as figures:
                names = redraw.redraw(place)
            assert all((place / name).exists() for name in names)
            known[folder] = dict(zip(names, figures, strict=True))
        return known[folder]

    return draw


@contextmanager
def kept() -> Iterator[list[Figure]]:
    """The figures that are drawn meanwhile."""
    figures: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style.plt, "close", figures.append)
        yield figures


def read(name: str) -> dict:
    return json.loads((RESULTS / name / "results.json").read_text())


def results(name: str) -> Results:
    return from_json(read(name))


SOME = [folder for folder in FOLDERS if folder.name != "digits"]  # which is drawn as "text" is


@pytest.mark.parametrize(
    "folder", thorough(FOLDERS, "test_few_runs_are_drawn_as_all_of_them_are", SOME), ids=lambda path: path.name
)
def test_the_plots_of_the_committed_results(folder, drawn):
    figures = drawn(folder)
    plots = {path.name for path in folder.glob("*.png")} - {path.name for path in folder.glob("sheet_*.png")}
    assert set(figures) == plots
    for name, figure in figures.items():
        assert faults(figure) == [], name
        heading = figure.get_suptitle()
        for ax in figure.axes:
            for axis, (low, high) in ((ax.xaxis, ax.dataLim.intervalx), (ax.yaxis, ax.dataLim.intervaly)):
                ticks = axis.get_majorticklocs()
                slack = 1e-9 * abs(high)
                assert low - slack <= min(ticks) and max(ticks) <= high + slack, name
                assert list(axis.get_minorticklocs()) == [], name
            for line in lines_of(ax):
                assert line.get_linewidth() == 1 or str(line.get_color()) in key_colours(figure), name
                if line.get_linewidth() == 1 and line.get_linestyle() == "-":  # a bar of errors
                    assert any("standard deviation" in text for text in legend_of(figure)), name
        labelled = {line.get_label() for ax in figure.axes for line in lines_of(ax)}
        assert {label for label in labelled if not str(label).startswith("_")} <= set(legend_of(figure)), name
        if not name.endswith(("time.png", "latency.png")):
            shown = [heading, *(ax.get_xlabel() + ax.get_ylabel() + ax.get_title() for ax in figure.axes)]
            assert any("test" in text or "validation" in text for text in shown), name


def test_what_the_quickstart_learned_and_forgot_is_one_story(drawn):
    """The points of the plot are the table's numbers, and both say that they are of the test split."""
    found, ((head, *rows),) = read("quickstart"), tables(results("quickstart"))
    figure = drawn(RESULTS / "quickstart")["learned_forgotten.png"]
    (ax,) = figure.axes
    points = [tuple(map(float, line.get_xydata()[0])) for line in ax.get_lines()]
    assert points == [(0.0, 0.0), *((*run["learned"], *run["forgotten"]) for run in found["outcomes"])]
    learned, forgotten = (
        next(row[2:] for row in rows if row[0].strip().startswith(word)) for word in ("learned", "forgotten")
    )
    names = [text.get_text() for text in ax.texts]
    assert names == ["base"] + [
        f"{label}\nlearned {x}\nforgot {y}" for label, x, y in zip(head[2:], learned, forgotten, strict=True)
    ]
    assert head[0] == "test split" and "test split" in figure.get_suptitle()
    assert ax.get_xlabel().count("(test)") == ax.get_ylabel().count("(test)") == 1
    lines = (RESULTS / "quickstart" / "results.md").read_text().splitlines()
    assert lines[2:5] == [*markdown_table([head, *rows])][:3]
    assert [line for line in lines if line.startswith("| forgotten")] == [f"| forgotten (old: run - base) |  | {' | '.join(forgotten)} |"]  # fmt: skip


def test_learning_curves_say_that_they_are_of_the_validation_split(drawn):
    figure = drawn(RESULTS / "quickstart")["learning_curves.png"]
    assert "validation split" in figure.get_suptitle()
    for ax in figure.axes:
        assert "(validation)" in ax.get_ylabel() and ax.get_xticks()[-1] == 250
    assert legend_of(figure) == ["full fine-tuning", "LoRA r=4", "LoRA r=16", "base"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_what_is_read_back_is_what_was_written(folder):
    found = json.loads((folder / "results.json").read_text())
    for outcome in found["outcomes"]:
        outcome["plan"].setdefault("base_bytes", 0)  # results of before 2026-11-29 do not say how the base is held
    again = json.loads(json.dumps(as_json(from_json(found))))
    assert again == {name: found[name] for name in again} and len(again) == 9


def test_few_runs_are_drawn_as_all_of_them_are(drawn, tmp_path):
    """A few points have one panel; many in one spot get a second."""
    whole, task = drawn(RESULTS / "compare_methods/text")["quality.png"], results("compare_methods/text")
    names = ("lora", "adalora", "prompt")
    shown = tuple(outcome for outcome in task.outcomes if outcome.name in names)
    with kept() as few:
        families.quality_against_parameters(tmp_path / "few.png", dataclasses.replace(task, outcomes=shown))
    colours = [
        {line.get_xydata()[0].tobytes(): line.get_color() for line in ax.get_lines() if line.get_marker() == "o"}
        for ax in (whole.axes[0], few[0].axes[0])
    ]
    assert len(colours[1]) == 3 and colours[1].items() <= colours[0].items()
    assert [len(figure.axes) for figure in (whole, *few)] == [2, 1]
    apart, enlarged = ({text.get_text() for text in ax.texts} for ax in whole.axes)
    assert len(enlarged) >= 15 and not apart & enlarged
    assert apart | enlarged == {outcome.label for outcome in task.outcomes}


def test_runs_without_a_finite_score_are_named_and_the_others_drawn(tmp_path):
    task = results("compare_methods/digits")
    full, lora, bitfit = (
        next(outcome for outcome in task.outcomes if outcome.name == name) for name in ("full", "lora", "bitfit")
    )
    diverged = lambda outcome: dataclasses.replace(outcome, results=())
    cases = ((diverged(full), lora, bitfit), ["full"], 4), ((diverged(full), diverged(lora)), ["full", "LoRA r=4"], 1)
    for outcomes, lost, drawn in cases:
        with kept() as figures:
            plots.draw(tmp_path, dataclasses.replace(task, outcomes=outcomes))
        assert len(figures) == drawn and [faults(figure) for figure in figures] == [[]] * drawn
        if drawn == 4:
            assert sum(f"no finite score: {', '.join(lost)}" in legend_of(figure) for figure in figures) == 2
    found = read("minilm_trec")
    (lora,) = (outcome for outcome in found["outcomes"] if outcome["name"] == "lora")
    for result in lora["results"]:
        result["test"]["accuracy"] = math.nan
    (tmp_path / "results.json").write_text(json.dumps(found))
    with kept() as figures:
        assert redraw.redraw(tmp_path) == ["quality.png", "curves.png"]
    assert legend_of(figures[0]) == ["mean of 3 seeds", "one seed", "no finite score: LoRA r=8"]
    assert faults(figures[0]) == [] and "LoRA r=8" not in [text.get_text() for text in figures[0].axes[0].texts]


def test_a_folder_without_results_is_named(tmp_path, capsys):
    assert redraw.main([str(tmp_path)]) == 2
    assert f"error: {tmp_path / 'results.json'}: No such file or directory" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"runs": []}')
    assert redraw.main([str(tmp_path)]) == 2
    assert "is not what a run of this version writes: " in capsys.readouterr().err
