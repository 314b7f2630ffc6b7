"""Images in folders, one folder a class: opened one at a time, when they are asked for.

Layout: `<folder>/<class>/<any depth>/<name>.jpg`, as torchvision's ImageFolder and `datasets`' imagefolder have it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.data.files import DataError, existing

SUFFIXES = (".jpg", ".jpeg", ".png")
HALF = (0.5, 0.5, 0.5)
"""Mean and deviation that take pixels to -1 to 1, as ViT checkpoints expect."""


@dataclass(frozen=True)
class ImageFolder:
    """Labelled images, by number.

    `folder[i]` is `{"images": (size, size, 3) float32, "labels": int32}`: shorter side scaled to `size`, centre cut
    out, `(x / 255 - mean) / deviation`.

    Attributes:
      paths, labels: of the images.
      classes: the folders' names, in order of the classes.
      size: height and width in pixels.
      mean, deviation: of each channel.
    """

    paths: Sequence[Path]
    labels: Sequence[int]
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, float, float] = HALF
    deviation: tuple[float, float, float] = HALF

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = read_image(self.paths[index], self.size).astype(np.float32) / np.float32(255)  # (size, size, 3)
        scaled = (pixels - np.array(self.mean, np.float32)) / np.array(self.deviation, np.float32)
        return {"images": scaled, "labels": np.int32(self.labels[index])}


def read_image_folder(
    path: str | Path,
    size: int,
    *,
    classes: Sequence[str] = (),
    mean: tuple[float, float, float] = HALF,
    deviation: tuple[float, float, float] = HALF,
) -> ImageFolder:
    """The images below a folder, sorted by class and name. None of them is opened.

    Args:
      path: the folder with a folder for each class.
      size: height and width in pixels.
      classes: their names in order; alphabetical when empty. A validation split takes those of the training split.
      mean, deviation: of each channel.

    Raises:
      DataError: if a class has no images, or there is a folder that is none of `classes`.
    """
    path = existing(path, "folder")
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise DataError(f"'{path}' has no folders, expected one for each class with .jpg or .png images in it")
    order = tuple(classes) or tuple(folders)
    if unknown := sorted(set(folders) - set(order)):
        raise DataError(f"'{path}' has folders that are no classes: {', '.join(unknown)}; expected {', '.join(order)}")
    found = [(file, label) for label, name in enumerate(order) for file in image_files(path / name)]
    return ImageFolder([file for file, _ in found], [label for _, label in found], order, size, mean, deviation)


def image_files(path: str | Path) -> list[Path]:
    """The images below one folder, sorted.

    Raises:
      DataError: if there are none.
    """
    path = existing(path, "folder")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(f"'{path}' has no images ({', '.join(SUFFIXES)})")
    return found


def check_image(path: str | Path) -> None:
    """Reads the head of an image: its format and size, no pixels.

    Raises:
      DataError: if the file is missing or is no image.
    """
    try:
        with Image.open(existing(path)):
            return
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"'{path}' is no image that can be read: {error}") from error


def read_image(path: str | Path, size: int) -> np.ndarray:
    """An image in RGB, its shorter side scaled to `size` (bicubic), its centre cut out: (size, size, 3) uint8.

    Raises:
      DataError: if the file is no image or is cut short.
    """
    try:
        with Image.open(existing(path)) as file:
            image = file.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"'{path}' is no image that can be read: {error}") from error
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
