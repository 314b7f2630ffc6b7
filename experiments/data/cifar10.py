"""CIFAR-10 as pictures with the names of their classes: a folder for each class, or two .npz files of JPEGs.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import itertools
from pathlib import Path

import numpy as np

from experiments.data.files import DataError, existing
from experiments.data.images import image_files
from experiments.data.pictures import Pictures, Source

HOLDS = "CIFAR-10: train/ and test/ with a folder for each class, or cifar10_train*.npz and cifar10_test*.npz of JPEGs"


def read_cifar10(folder: str | Path, split: str, caption: str = "a {}") -> Pictures:
    """The pictures of "train" or "test", in random order, the same each time.

    Args:
      folder: with train/<class>/*.png (or .jpg) and test/..., or with cifar10_<split>*.npz of the arrays `blob` (the
        files, one behind the other), `offsets` (of their ends, from 0), `labels` and `classes`.
      split: "train" or "test".
      caption: of a picture; its class stands for {}.

    Raises:
      DataError: if neither is there, or a file holds other arrays.
    """
    place = existing(folder, "folder")
    sources: list[Source]
    if (place / split).is_dir():
        files = image_files(place / split)
        sources, names = list(files), [file.relative_to(place / split).parts[0] for file in files]
    else:
        sources, names = _packed(place, split)
    order = np.random.default_rng(0).permutation(len(sources))
    return Pictures("CIFAR-10", [sources[i] for i in order], [caption.format(names[i]) for i in order])


def _packed(place: Path, split: str) -> tuple[list[Source], list[str]]:
    found = sorted(place.glob(f"cifar10_{split}*.npz"))
    if not found:
        raise DataError(f"'{place}' has neither a folder '{split}' nor a file cifar10_{split}*.npz: expected {HOLDS}")
    try:
        with np.load(found[0]) as arrays:
            blob, ends, labels, classes = (arrays[name] for name in ("blob", "offsets", "labels", "classes"))
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"'{found[0]}' does not hold blob, offsets, labels and classes: {error}") from error
    content = blob.tobytes()
    sources: list[Source] = [content[a:b] for a, b in itertools.pairwise(ends)]
    return sources, [str(classes[label]) for label in labels]
