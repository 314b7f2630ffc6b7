"""Names beside the points of a plot: none over a mark, a line, another name or the edge of the axes.

What is taken is read from the drawn figure: each pixel that is darker than the grid, whatever drew it. A name goes to
the nearest place that is blank altogether, and one that is not beside its point gets a thin line to it. Where there is
no such place the figure grows: names and marks keep their size, so that room comes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.text import Text

SIZE = 8.0  # points, of a name
GRID = "#ebebeb"  # what is as light as this may lie under a name

_BESIDE = 10.0  # points from the middle of a mark: a name as near as this needs no line
_FOREIGN_MARK, _FOREIGN_LEADER, _UNCLEAR = 40.0, 80.0, 25.0  # points that a name goes farther rather than to cross one
_NEAREST, _FARTHER = 1200, 800  # places of a name that are compared
_RINGS = (0.0, 30.0, 60.0, 100.0, 160.0)  # points that the names of a crowd keep off it, so that their lines have room
_CROWD, _CROWDED = 5, (14.0, 45.0)  # so many points within so many typographic points are one; what is tried in turn
_GROWTH, _GROWN = 1.25, 7

Cell = tuple[float, float]


class Box(NamedTuple):
    """A rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def nearest(self, point: Cell) -> Cell:
        """The point of the rectangle that is nearest to another one."""
        x, y = point
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)

    def crossed(self, start: Cell, ends: np.ndarray) -> np.ndarray:
        """Whether the segments from `start` to each of `ends`, (n, 2), touch the rectangle: (n,)."""
        enter, leave = np.zeros(len(ends)), np.ones(len(ends))
        for axis, low, high in ((0, self.left, self.right), (1, self.bottom, self.top)):
            step = ends[:, axis] - start[axis]
            still = np.abs(step) < 1e-9
            slope = np.where(still, 1.0, step)
            first, second = (low - start[axis]) / slope, (high - start[axis]) / slope
            within = low <= start[axis] <= high
            enter = np.maximum(enter, np.where(still, 0.0 if within else 2.0, np.minimum(first, second)))
            leave = np.minimum(leave, np.where(still, 1.0, np.maximum(first, second)))
        return enter <= leave


class Place(NamedTuple):
    """Place of a name, and the end of the line to its point; None for no line."""

    box: Box
    leader: Cell | None


def place(
    taken: np.ndarray, points: Sequence[Cell], sizes: Sequence[Cell], unit: float, walls: Sequence[Box] = ()
) -> list[Place] | None:
    """Blank places for names of the given sizes near their points, or None if one of them finds none.

    Args:
      taken: (height, width), True where something is drawn; row 0 is the bottom. All else is counted in its cells.
      points: (x, y) of each name's mark.
      sizes: (width, height) of each name, its margin included.
      unit: cells to a typographic point.
      walls: rectangles in `taken` that no line crosses.
    """
    near = lambda distance: [sum(math.dist(point, other) < distance * unit for other in points) for point in points]
    around = near(45)
    order = sorted(range(len(points)), key=lambda i: -around[i])
    for reach, ring in itertools.product(_CROWDED, _RINGS):
        crowd = [count >= _CROWD for count in near(reach)]
        if ring and not any(crowd):
            continue
        room = _Room(taken, points, unit, walls)
        found: dict[int, Place] = {}
        for i in order:
            best = room.best(i, sizes[i], ring if crowd[i] else 0.0)
            if best is None:
                break
            found[i] = best
            room.take(i, best)
        else:
            return [found[i] for i in range(len(points))]
        order.remove(i)
        order.insert(0, i)  # the one that found no place chooses first
    return None


def label_points(
    ax: Axes, points: Sequence[Cell], names: Sequence[str], colours: Sequence[str], size: float = SIZE
) -> list[Text]:
    """Writes each name near its point. The axes have to be final: limits, ticks, legends and layout.

    Args:
      points: in data coordinates.
      names: may have several lines.
      colours: of the points; names are written in a darker shade.
      size: of the letters, in points.

    Raises:
      ValueError: if a point lies outside of the axes, or if there is no room in a figure four times as wide either.
    """
    figure = ax.figure.figure
    texts = [
        ax.text(0, 0, name, color=_darker(colour), fontsize=size, fontweight="bold", va="bottom", ha="left", zorder=4,
                transform=ax.transAxes, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}, visible=False)
        for name, colour in zip(names, colours, strict=True)
    ]  # fmt: skip
    for _ in range(_GROWN):
        drawn = _Drawn(ax)
        cells = [drawn.cell(point) for point in points]
        outside = [name for name, cell in zip(names, cells, strict=True) if not drawn.holds(cell)]
        if outside:
            raise ValueError(f"the points of {outside} lie outside of the axes: there is nothing to write beside")
        places = place(drawn.taken, cells, [drawn.size(text) for text in texts], drawn.unit, drawn.walls)
        if places is not None:
            break
        width, height = figure.get_size_inches()
        figure.set_size_inches(_GROWTH * width, _GROWTH * height)
    else:
        raise ValueError(f"no room for {len(names)} names in a figure of {figure.get_size_inches()} inches")
    lines = [
        (drawn.part(cell), drawn.part(found.leader), colour)
        for cell, found, colour in zip(cells, places, colours, strict=True)
        if found.leader is not None
    ]
    for text, found in zip(texts, places, strict=True):
        text.set(position=drawn.part(drawn.inner(found.box)), visible=True)
    leaders = LineCollection(
        [line[:2] for line in lines], colors=[line[2] for line in lines], linewidths=0.7, alpha=0.8, zorder=1.5,
        transform=ax.transAxes,
    )  # fmt: skip
    ax.add_collection(leaders, autolim=False)
    return texts


# -- parts -------------------------------------------------------------------------------------------------------------


class _Room:
    """Places that are taken so far, and the cost of a name at each place that is left."""

    def __init__(self, taken: np.ndarray, points: Sequence[Cell], unit: float, walls: Sequence[Box]) -> None:
        self._taken, self._points, self._unit = taken.copy(), points, unit
        self._walls, self._leaders = list(walls), list[tuple[Cell, Cell]]()

    def best(self, i: int, size: Cell, off: float) -> Place | None:
        """The place of name i that costs least, of those at least `off` points from its mark."""
        width, height = math.ceil(size[0]), math.ceil(size[1])
        rows, columns = np.nonzero(_blank(self._taken, width, height))
        x, y = self._points[i]
        dx = np.maximum(np.maximum(columns - x, x - columns - width), 0)
        dy = np.maximum(np.maximum(rows - y, y - rows - height), 0)
        away = np.hypot(dx, dy) / self._unit
        # Of places equally near: beside the point rather than above it, on its right rather than on its left.
        aslant = 0.12 * np.abs(rows + height / 2 - y) + 0.01 * np.abs(columns - x)
        cost = np.where(away < off, math.inf, away + aslant / self._unit)
        chosen = _least(cost)
        if not len(chosen):
            return None
        boxes = np.stack([columns, rows, columns + width, rows + height], axis=1)[chosen].astype(float)
        ends = np.clip([[x, y]], boxes[:, :2], boxes[:, 2:])
        cost, needs = self._with_leaders(i, boxes, ends, away[chosen], cost[chosen])
        k = int(np.argmin(cost))
        if not math.isfinite(cost[k]):
            return None
        return Place(Box(*map(float, boxes[k])), (float(ends[k, 0]), float(ends[k, 1])) if needs[k] else None)

    def _with_leaders(
        self, i: int, boxes: np.ndarray, ends: np.ndarray, away: np.ndarray, cost: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The cost with what the lines to the point would cross, and which places need one."""
        point, unit = self._points[i], self._unit
        others = [other for other in self._points if math.dist(point, other) > 3 * unit]
        rival = np.full(len(boxes), math.inf)
        for other in others:
            distance = np.hypot(*(np.clip([other], boxes[:, :2], boxes[:, 2:]) - [other]).T) / unit
            rival = np.minimum(rival, distance)
        unclear = rival < away + 3  # another point is about as near
        twins = len(self._points) - len(others) > 1  # several points in one spot
        needs = (away > _BESIDE) | unclear | twins
        cost = cost + _UNCLEAR * unclear + 5 * np.maximum(12 - rival, 0) * (away > _BESIDE)
        for other in others:
            cost = cost + _FOREIGN_MARK * (needs & (_distance(point, ends, other) < 5 * unit))
        for start, end in self._leaders:
            if math.dist(start, point) > 3 * unit:
                cost = cost + _FOREIGN_LEADER * (needs & _meet(point, ends, start, end))
        for wall in self._walls:
            cost = np.where(needs & wall.crossed(point, ends), math.inf, cost)
        return cost, needs

    def take(self, i: int, found: Place) -> None:
        """Takes the place of a name and its line."""
        left, bottom, right, top = map(round, found.box)
        self._taken[bottom:top, left:right] = True
        self._walls.append(found.box)
        if found.leader is None:
            return
        start, end = self._points[i], found.leader
        self._leaders.append((start, end))
        t = np.linspace(0, 1, 2 + 2 * math.ceil(math.dist(start, end)))
        for across, step in itertools.product((-1, 0, 1), (-1, 0, 1)):
            column = np.clip(np.round(start[0] + t * (end[0] - start[0])) + across, 0, self._taken.shape[1] - 1)
            row = np.clip(np.round(start[1] + t * (end[1] - start[1])) + step, 0, self._taken.shape[0] - 1)
            self._taken[row.astype(int), column.astype(int)] = True


class _Drawn:
    """The inside of the axes as it is drawn without the names, in cells of about a typographic point."""

    def __init__(self, ax: Axes) -> None:
        figure = ax.figure.figure
        canvas = figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)
        canvas.draw()
        self._ax, self._renderer = ax, canvas.get_renderer()
        pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3]  # row 0 is the bottom
        self._pixels = max(1, round(figure.dpi / 100))  # to a cell
        inside = ax.get_window_extent(self._renderer)
        self._left, self._bottom = math.ceil(inside.x0), math.ceil(inside.y0)
        self._columns = int((inside.x1 - self._left) // self._pixels)
        self._rows = int((inside.y1 - self._bottom) // self._pixels)
        dark = (pixels < round(255 * min(to_rgb(GRID)))).any(axis=2)[
            self._bottom : self._bottom + self._rows * self._pixels,
            self._left : self._left + self._columns * self._pixels,
        ]
        self.unit = figure.dpi / 72 / self._pixels
        self.taken = dark.reshape(self._rows, self._pixels, self._columns, self._pixels).any(axis=(1, 3))
        edge = math.ceil(2 * self.unit)
        self.taken[:edge], self.taken[-edge:], self.taken[:, :edge], self.taken[:, -edge:] = True, True, True, True
        self._margin = 1.6 * self.unit
        seen: list[Text] = [text for text in ax.texts if text.get_visible() and text.get_text()]
        legend = ax.get_legend()
        extents = [text.get_window_extent(self._renderer) for text in seen]
        extents += [] if legend is None else [legend.get_window_extent(self._renderer)]
        self.walls = [Box(*self._cell(extent.x0, extent.y0), *self._cell(extent.x1, extent.y1)) for extent in extents]

    def _cell(self, x: float, y: float) -> Cell:
        return (x - self._left) / self._pixels, (y - self._bottom) / self._pixels

    def cell(self, point: Cell) -> Cell:
        """The cell of a point in data coordinates."""
        return self._cell(*self._ax.transData.transform(point))

    def holds(self, cell: Cell) -> bool:
        """Whether a cell lies inside the axes; on the edge does."""
        return -1 <= cell[0] <= self._columns + 1 and -1 <= cell[1] <= self._rows + 1

    def size(self, text: Text) -> Cell:
        """Width and height of a text with its margin, in cells."""
        visible = text.get_visible()
        text.set_visible(True)
        extent = text.get_window_extent(self._renderer)
        text.set_visible(visible)
        return extent.width / self._pixels + 2 * self._margin, extent.height / self._pixels + 2 * self._margin

    def inner(self, box: Box) -> Cell:
        """The lower left corner of a text whose place, with its margin, is a box."""
        return box.left + self._margin, box.bottom + self._margin

    def part(self, cell: Cell) -> Cell:
        """A cell as parts of the axes' width and height."""
        pixel = self._left + cell[0] * self._pixels, self._bottom + cell[1] * self._pixels
        x, y = self._ax.transAxes.inverted().transform(pixel)
        return float(x), float(y)


def _blank(taken: np.ndarray, width: int, height: int) -> np.ndarray:
    """Mask of the places for the lower left corner of a blank rectangle: (rows - height + 1, columns - width + 1)."""
    rows, columns = taken.shape
    if height > rows or width > columns:
        return np.zeros((0, 0), bool)
    sums = np.zeros((rows + 1, columns + 1), np.int32)
    sums[1:, 1:] = taken.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    return inside == 0


def _least(cost: np.ndarray) -> np.ndarray:
    """Indices of the least of the finite costs, and of some of the others, of all sizes."""
    finite = np.flatnonzero(np.isfinite(cost))
    if len(finite) <= _NEAREST + _FARTHER:
        return finite
    parted = finite[np.argpartition(cost[finite], _NEAREST)]
    rest = np.sort(parted[_NEAREST:])
    return np.concatenate([np.sort(parted[:_NEAREST]), rest[:: math.ceil(len(rest) / _FARTHER)]])


def _distance(start: Cell, ends: np.ndarray, point: Cell) -> np.ndarray:
    """Distances from a point to the segments from `start` to each of `ends`, (n, 2): (n,)."""
    direction = ends - [start]
    squared = np.maximum(np.sum(direction**2, axis=1), 1e-12)
    t = np.clip(direction @ (np.asarray(point) - start) / squared, 0, 1)
    return np.hypot(*(t[:, None] * direction + [start] - [point]).T)


def _meet(start: Cell, ends: np.ndarray, first: Cell, last: Cell) -> np.ndarray:
    """Whether the segments from `start` to each of `ends`, (n, 2), cross the segment from `first` to `last`: (n,)."""

    def side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])

    s, f, g = np.asarray(start), np.asarray(first), np.asarray(last)
    apart = side(s, ends, f) * side(s, ends, g) < 0
    return apart & (side(f, g, s) * side(f, g, ends) < 0)


def _darker(colour: str) -> tuple[float, float, float]:
    red, green, blue = to_rgb(colour)
    return 0.72 * red, 0.72 * green, 0.72 * blue
