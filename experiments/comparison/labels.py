"""Names beside the points of a crowded plot, none over another."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

_DISTANCES = (7, 12, 19, 28, 40, 55, 75)  # pixels of a 100-dpi figure, from the point to the text
_DIRECTIONS = [math.pi / 8 * i for i in (0, 8, 2, 14, 6, 10, 4, 12, 1, 15, 7, 9, 3, 13, 5, 11)]  # right and left first


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


def place(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], frame: Box
) -> list[tuple[float, float]]:
    """Centres for labels of the given sizes near their points, inside a frame, all in pixels.

    Each label in turn takes the nearest place that covers no point and no earlier label; if there is none, the one that
    covers least.
    """
    taken = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    centres: list[tuple[float, float]] = [(0.0, 0.0)] * len(points)
    crowded = lambda i: sum(math.dist(points[i], other) < 60 for other in points)
    for i in sorted(range(len(points)), key=crowded, reverse=True):
        (x, y), (width, height) = points[i], sizes[i]
        best: tuple[float, Box] | None = None
        for distance, angle in itertools.product(_DISTANCES, _DIRECTIONS):
            cx = x + math.cos(angle) * (distance + width / 2)
            cy = y + math.sin(angle) * (distance + height / 2)
            box = Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            outside = width * height - box.overlap(frame)
            covered = sum(box.overlap(other) for other in taken) + 4 * outside
            if best is None or covered < best[0] - 1e-9:
                best = covered, box
            if covered <= 1e-9:
                break
        assert best is not None
        box = best[1]
        taken.append(box)
        centres[i] = ((box.left + box.right) / 2, (box.bottom + box.top) / 2)
    return centres


def label_points(ax: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], colours: Sequence[str]) -> None:
    """Writes each name near its point, with a thin line where it is farther off. The axes have to be final."""
    figure = ax.figure
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [
        ax.text(0, 0, name, color=colour, fontsize=8, fontweight="bold")
        for name, colour in zip(names, colours, strict=True)
    ]
    extents = [text.get_window_extent(renderer) for text in texts]
    sizes = [(extent.width + 3, extent.height + 1) for extent in extents]
    pixels = [tuple(ax.transData.transform(point)) for point in points]
    inside = ax.get_window_extent(renderer)
    frame = Box(inside.x0, inside.y0, inside.x1, inside.y1)
    back = ax.transData.inverted()
    for text, point, pixel, size, centre, colour in zip(
        texts, points, pixels, sizes, place(pixels, sizes, frame), colours, strict=True
    ):
        text.set(position=tuple(back.transform(centre)), ha="center", va="center")
        near = (
            min(max(pixel[0], centre[0] - size[0] / 2), centre[0] + size[0] / 2),
            min(max(pixel[1], centre[1] - size[1] / 2), centre[1] + size[1] / 2),
        )
        if math.dist(near, pixel) > 11:
            (x0, y0), (x1, y1) = point, tuple(back.transform(near))
            ax.plot([x0, x1], [y0, y1], color=colour, linewidth=0.6, alpha=0.7, zorder=1)
