"""Size and spectrum of an update, from its factors where it has some: nothing of the weight's size is built then."""

from typing import NamedTuple

import numpy as np

from jlora.interop import fit
from jlora.interop.layer import DELTAS, Layer, delta

LARGEST = 2**22  # elements of an update that is built to look at it


class Spectrum(NamedTuple):
    """Singular values of an update, in brief.

    Attributes:
      norm: Frobenius norm.
      largest: the largest singular value.
      stable_rank: norm^2 / largest^2, how many directions carry the update.
      singular: all singular values that are not zero by construction, from the largest.
    """

    norm: float
    largest: float
    stable_rank: float
    singular: tuple[float, ...]


def spectrum(layer: Layer) -> Spectrum | None:
    """Of what a layer adds to its parameter, before magnitudes; None for one that adds nothing, or is too large."""
    values = _singular(layer)
    if values is None:
        return None
    norm, largest = float(np.sqrt(np.sum(np.square(values)))), float(values.max(initial=0.0))
    return Spectrum(norm, largest, (norm / largest) ** 2 if largest else 0.0, tuple(map(float, values)))


def _singular(layer: Layer) -> np.ndarray | None:
    t = {name: np.asarray(x, np.float64) for name, x in layer.tensors.items()}
    if layer.kind in ("lora", "adalora", "table") and "mid" not in t:
        a, b = t["A"].reshape(t["A"].shape[0], -1), t["B"].reshape(t["B"].shape[0], -1)
        if a.shape[0] != b.shape[1]:
            return None  # a grouped convolution
        if "E" in t:
            a = a * t["E"].reshape(-1, 1)
        small = np.asarray(np.linalg.qr(b, mode="r")) @ np.asarray(np.linalg.qr(a.T, mode="r")).T
        return np.linalg.svd(small, compute_uv=False) * abs(layer.scale)
    if layer.kind not in DELTAS or layer.kind in ("experts", "table"):
        return None
    outputs, inputs = fit.sides(layer)
    if outputs is None or inputs is None or outputs * inputs > LARGEST or "t1" in t or "t2" in t or "mid" in t:
        return None
    try:
        made = delta(layer, (outputs, inputs))
    except ValueError:
        return None  # a convolution's
    return np.linalg.svd(made, compute_uv=False)
