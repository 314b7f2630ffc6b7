"""Handwritten digits without a download: scikit-learn's 1,797 images of 8 x 8 pixels, upright and turned.

One permutation splits the images into train, validation and test, for both domains alike: an image and its turned copy
are in the same split.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

CLASSES = 10
SIDE = 8  # pixels
_TRAIN, _VALIDATION = 897, 300  # images; the other 600 are the test split
_SEED = 0  # of the split


class Labelled(NamedTuple):
    """Images (n, 8, 8, 1) float32 from -1 to 1, and their digits (n,) int32."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Digits:
    """The images of one domain, in three splits."""

    label: str
    train: Labelled
    validation: Labelled
    test: Labelled

    def digest(self) -> str:
        """A hash of all images and digits and of which split they are in."""
        hashed = hashlib.sha256()
        for split in ("train", "validation", "test"):
            images, labels = getattr(self, split)
            hashed.update(f"{split}\0{len(labels)}\0".encode() + images.tobytes() + labels.tobytes())
        return hashed.hexdigest()


def upright_digits() -> Digits:
    """The images as they are."""
    return _domain("upright", quarters=0)


def turned_digits() -> Digits:
    """The images turned by a quarter, against the clock: the digit is the same, and hardly one is recognised."""
    return _domain("turned", quarters=1)


def _domain(label: str, quarters: int) -> Digits:
    pixels, digits = load_digits(return_X_y=True)
    images = np.rot90(pixels.reshape(-1, SIDE, SIDE, 1), quarters, axes=(1, 2))
    images = np.ascontiguousarray(images / 8 - 1, np.float32)  # pixels are 0 to 16
    order = np.random.default_rng(_SEED).permutation(len(digits))
    parts = np.split(order, [_TRAIN, _TRAIN + _VALIDATION])
    return Digits(label, *(Labelled(images[part], digits[part].astype(np.int32)) for part in parts))


@dataclass(frozen=True, eq=False)
class Shuffled:
    """Batches of labelled images in random order, every one once per epoch, as a function of the step alone.

    Attributes:
      data: the images.
      batch: images per batch.
      seed: of the order.
    """

    data: Labelled
    batch: int
    seed: int

    @property
    def examples(self) -> int:
        """Images per epoch."""
        return len(self.data.labels)

    def __call__(self, step: int) -> Labelled:
        """The batch of a step."""
        places = []
        for example in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(example, self.examples)
            places.append(_order(self.seed, epoch, self.examples)[place])
        return Labelled(*(array[places] for array in self.data))


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, examples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(examples)
