"""Pictures with a text each, for training a model that draws: opened one at a time, turned, scaled, cut and flipped.

A folder holds images at any depth; a caption is a .txt beside its image. All that is drawn at random (which part of an
image is cut out) is a function of a seed and the image's number, so that the same views are seen after an interruption.
"""

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from experiments.data.files import DataError, existing, filled

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ENLARGED = 2.0  # times: an image that would be enlarged more is refused
Source = Path | bytes | np.ndarray
"""A file, its content, or pixels (height, width, channels) uint8."""


class Sides(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


class Views(NamedTuple):
    """Views of one picture, all of one shape.

    Attributes:
      pixels: (views, height, width, channels), uint8.
      sizes: (views, 6), float32: height and width of the image before it was cut, top and left of the cut, height and
        width of the view. These are SDXL's conditions.
    """

    pixels: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures by number.

    Attributes:
      label: for people: "photos/dog".
      sources: where their pixels are.
      texts: one of each.
      channels: 3, or 1 for grey.
      captioned: how many texts are captions of their own.
    """

    label: str
    sources: Sequence[Source]
    texts: Sequence[str]
    channels: int = 3
    captioned: int = 0

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, part: slice) -> "Pictures":
        """Some of them, without changing them."""
        return Pictures(self.label, self.sources[part], self.texts[part], self.channels, self.captioned)

    @cached_property
    def sides(self) -> list[Sides]:
        """The sides of each, as it is shown: cameras write down by which quarter an image is turned."""
        return [_sides(source) for source in self.sources]

    def view(self, number: int, sides: Sides, *, crops: int, flips: bool, seed: int) -> Views:
        """Views of a picture: scaled so that it covers `sides` (Lanczos), and parts cut out of it.

        Args:
          number: of the picture.
          sides: of the views.
          crops: how many parts at random places; 0 for the centre alone.
          flips: each of them also left to right.
          seed: of the places.

        Raises:
          DataError: if the picture cannot be read, or would be enlarged more than twice.
        """
        image = _opened(self.sources[number], self.channels)
        scale = max(sides.height / image.height, sides.width / image.width)
        if scale > ENLARGED:
            raise DataError(
                f"{_name(self.sources[number], number)} has {image.width} x {image.height} pixels, too few for "
                f"{sides.width} x {sides.height}: it would be enlarged {scale:.1f} times, at most {ENLARGED:g} are "
                "taken"
            )
        wide, high = (max(n, round(m * scale)) for n, m in zip(sides[::-1], image.size, strict=True))
        original = (image.height, image.width)
        if (wide, high) != image.size:
            image = image.resize((wide, high), Image.Resampling.LANCZOS)
        pixels = np.asarray(image).reshape(high, wide, self.channels)
        found, sizes = [], []
        for top, left in _places(Sides(high, wide), sides, crops, (seed, number)):
            part = pixels[top : top + sides.height, left : left + sides.width]
            for flipped in (False, True)[: 1 + flips]:
                found.append(part[:, ::-1] if flipped else part)
                shown = wide - sides.width - left if flipped else left
                sizes.append((*original, top, shown, *sides))
        return Views(np.stack(found), np.asarray(sizes, np.float32))

    def digest(self) -> str:
        """A hash of all files and texts."""
        hashed = hashlib.sha256()
        for source, text in zip(self.sources, self.texts, strict=True):
            content = source.read_bytes() if isinstance(source, Path) else source
            content = content.tobytes() if isinstance(content, np.ndarray) else content
            hashed.update(f"{len(content)}\0{text}\0".encode() + content)
        return hashed.hexdigest()[:16]


def read_pictures(folder: str | Path, prompt: str = "", *, channels: int = 3) -> Pictures:
    """The images below a folder, sorted, with the captions beside them. Their heads are read, no pixels.

    Args:
      folder: with .jpg, .jpeg, .png, .webp or .bmp files at any depth.
      prompt: the text of each image that has no .txt of its own beside it.
      channels: 3, or 1 to see them in grey.

    Raises:
      DataError: if there are no images, one cannot be read, a caption is empty or, without a prompt, missing.
    """
    place = existing(folder, "folder")
    files = sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"'{place}' has no images ({', '.join(SUFFIXES)})")
    texts, captioned = [], 0
    for file in files:
        _sides(file)
        beside = file.with_suffix(".txt")
        if beside.is_file():
            captioned += 1
            try:
                texts.append(filled(beside.read_text(encoding="utf-8"), "caption"))
            except (DataError, UnicodeDecodeError) as error:
                raise DataError(f"'{beside}': {error}") from error
        elif prompt:
            texts.append(prompt)
        else:
            raise DataError(
                f"'{file}' has no text: give all images one, task.prompt='a photo of a sks dog', or each its own in a "
                f"file beside it, '{beside.name}'"
            )
    return Pictures(place.name, files, texts, channels, captioned)


def groups(
    pictures: Pictures, size: Sides, *, buckets: bool, multiple: int, most: float = 2.0
) -> list[tuple[Sides, list[int]]]:
    """The pictures by the shape of their views.

    Args:
      pictures: any.
      size: of the views; with `buckets` the number of their pixels.
      buckets: each picture is cut to the nearest of several shapes with about as many pixels, so that little of it is
        lost; else all have the same.
      multiple: that all sides of these shapes are multiples of.
      most: the longer side of a shape, to the shorter.

    Returns:
      (sides, numbers of the pictures), by rising height.
    """
    if not buckets:
        return [(size, list(range(len(pictures))))]
    shapes, found = shapes_of(size, multiple, most), dict[Sides, list[int]]()
    for number, sides in enumerate(pictures.sides):
        ratio = math.log(sides.height / sides.width)
        nearest = min(shapes, key=lambda shape: abs(math.log(shape.height / shape.width) - ratio))
        found.setdefault(nearest, []).append(number)
    return sorted(found.items())


def shapes_of(size: Sides, multiple: int, most: float = 2.0) -> list[Sides]:
    """Shapes with at most as many pixels as `size`, sides multiples of `multiple`, ratios up to `most`.

    For each height there is one, with the largest width.

    >>> shapes_of(Sides(128, 128), 32)
    [Sides(height=96, width=160), Sides(height=128, width=128), Sides(height=160, width=96)]
    """
    area = size.height * size.width
    heights = range(multiple, int(math.sqrt(area * most)) + 1, multiple)
    found = [Sides(height, area // height // multiple * multiple) for height in heights]
    return [sides for sides in found if sides.width and 1 / most <= sides.height / sides.width <= most]


# -- an image ----------------------------------------------------------------------------------------------------------


def _places(whole: Sides, part: Sides, crops: int, seed: tuple[int, int]) -> list[tuple[int, int]]:
    """Top and left of each cut."""
    rooms = (whole.height - part.height, whole.width - part.width)
    if not crops:
        return [(rooms[0] // 2, rooms[1] // 2)]
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(rooms[0] + 1)), int(rng.integers(rooms[1] + 1))) for _ in range(crops)]


def _opened(source: Source, channels: int) -> Image.Image:
    """The image, upright, in RGB or grey; what is transparent is white."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source[..., 0] if source.shape[-1] == 1 else source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB" if channels == 3 else "L")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise DataError(f"{_name(source)} is no image that can be read: {error}") from error


def _sides(source: Source) -> Sides:
    """Height and width, of a file by its head."""
    if isinstance(source, np.ndarray):
        return Sides(source.shape[0], source.shape[1])
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            turned = file.getexif().get(0x0112, 1) >= 5  # the tag of the orientation: 5 to 8 lie on their side
            return Sides(*(file.size if turned else file.size[::-1]))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise DataError(f"{_name(source)} is no image that can be read: {error}") from error


def _name(source: Source, number: int | None = None) -> str:
    if isinstance(source, Path):
        return f"'{source}'"
    return "an image" if number is None else f"image {number}"
