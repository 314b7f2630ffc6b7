"""Sheets of pictures as PNG: a row for each prompt, a block of pictures for each of several models."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments.folder import replace
from experiments.tasks.task import Sheet

LEAST = 64  # pixels of a picture's side on the sheet: smaller ones are enlarged by a whole number
MARGIN, GAP, LINE, TEXT = 8, 2, 14, 120  # pixels
INK, PAPER = (51, 51, 51), (255, 255, 255)


def draw(path: Path, columns: Mapping[str, Sheet]) -> None:
    """Writes a sheet.

    Args:
      path: of the PNG.
      columns: heading -> the pictures of some model, of the same prompts and as many of each.

    Raises:
      ValueError: if they differ in that.
    """
    first = next(iter(columns.values()))
    if any(sheet.prompts != first.prompts or sheet.images.shape != first.images.shape for sheet in columns.values()):
        raise ValueError("the columns of a sheet are of other prompts or shapes")
    _, each, height, width, _ = first.images.shape
    times = max(1, -(-LEAST // min(height, width)))
    high, wide = times * height, times * width
    block = each * (wide + GAP) - GAP
    size = (MARGIN + TEXT + len(columns) * (block + MARGIN), 2 * MARGIN + LINE + len(first.prompts) * (high + GAP))
    image = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=11)
    for column, (heading, sheet) in enumerate(columns.items()):
        left = MARGIN + TEXT + column * (block + MARGIN)
        pen.text((left, MARGIN), heading, fill=INK, font=font)
        for row, pictures in enumerate(sheet.images):
            top = 2 * MARGIN + LINE + row * (high + GAP)
            for number, pixels in enumerate(pictures):
                image.paste(
                    as_image(pixels).resize((wide, high), Image.Resampling.NEAREST), (left + number * (wide + GAP), top)
                )
    for row, prompt in enumerate(first.prompts):
        top = 2 * MARGIN + LINE + row * (high + GAP)
        pen.multiline_text((MARGIN, top), "\n".join(textwrap.wrap(prompt, 19) or ["(no text)"]), fill=INK, font=font)
    write_png(path, image)


def write_png(path: Path, image: Image.Image) -> None:
    """Writes an image, as `experiments.folder.replace` does."""
    replace(path, lambda temporary: image.save(temporary, format="PNG"))


def as_image(pixels: np.ndarray) -> Image.Image:
    """An image of (height, width, 1 or 3) in [0, 1]."""
    whole = np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    return Image.fromarray(whole[..., 0] if whole.shape[-1] == 1 else whole)
