"""Layers of some rows of a parameter, where rows do not depend on one another: a large one is merged in parts."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jlora.interop.layer import Layer, Layout

Slicer = Callable[[Layer, int, int], Layer | None]


def part(layers: Sequence[Layer], start: int, stop: int) -> list[Layer] | None:
    """The layers of rows start to stop; None if one of them needs all rows at once."""
    parts = [_PARTS[layer.kind](layer, start, stop) if layer.kind in _PARTS else None for layer in layers]
    return None if None in parts else [layer for layer in parts if layer is not None]


def divisible(layers: Sequence[Layer], shape: Sequence[int], layout: Layout) -> bool:
    """Whether a parameter can be merged some rows at a time: a matrix with outputs first, or a table."""
    return len(shape) == 2 and layout in ("out_in", "table") and part(layers, 0, 1) is not None


def _sliced(layer: Layer, tensors: Mapping[str, np.ndarray]) -> Layer:
    return layer._replace(tensors={**layer.tensors, **tensors})


def _lora(layer: Layer, start: int, stop: int) -> Layer | None:
    t = layer.tensors
    if "mid" in t or "input_magnitude" in t:
        return None
    found = {"B": t["B"][start:stop]}
    if "magnitude" in t:
        m = t["magnitude"]
        if m.ndim != 1 and m.shape != (t["B"].shape[0], 1):
            return None  # a norm over outputs
        found["magnitude"] = m[start:stop]
    return _sliced(layer, found)


def _vera(layer: Layer, start: int, stop: int) -> Layer:
    return _sliced(layer, {name: layer.tensors[name][start:stop] for name in ("B", "b")})


def _table(layer: Layer, start: int, stop: int) -> Layer | None:
    return None if "magnitude" in layer.tensors else _sliced(layer, {"A": layer.tensors["A"][:, start:stop]})


def _ia3(layer: Layer, start: int, stop: int) -> Layer:
    of_outputs = layer.tensors["l"].shape[0] > 1
    return _sliced(layer, {"l": layer.tensors["l"][start:stop]}) if of_outputs else layer


def _along(name: str) -> Slicer:
    return lambda layer, start, stop: _sliced(layer, {name: layer.tensors[name][start:stop]})


_PARTS: dict[str, Slicer] = {
    "lora": _lora, "adalora": _along("B"), "vera": _vera, "table": _table, "ia3": _ia3, "full": _along("value"),
    "oft": lambda layer, start, stop: layer,  # turns inputs
}  # fmt: skip
