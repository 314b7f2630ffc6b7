"""Whether the tensors of a layer fit a parameter of this shape, and each other, before they are multiplied."""

import math
from collections.abc import Callable, Iterator

from jlora.interop.layer import Layer

Shape = tuple[int, ...]


def misfit(layer: Layer, shape: Shape) -> str:
    """Why a layer does not fit a parameter; "" where it does.

    Args:
      layer: of the file.
      shape: of the torch tensor: (out, in, *window), (rows, width) of a table, any of what is replaced or added to.
    """
    found = next(_CHECKS[layer.kind](layer, shape), "") if layer.kind in _CHECKS else ""
    return f"{layer.key!r} has shape {shape}: {found}" if found else ""


def _wrong(layer: Layer, name: str, *expected: Shape) -> Iterator[str]:
    got = tuple(layer.tensors[name].shape)
    if got not in expected:
        yield f"the adapter's {name} has shape {got}, expected {' or '.join(map(str, dict.fromkeys(expected)))}"


def _low_rank(layer: Layer, shape: Shape) -> Iterator[str]:
    a, b = layer.tensors["A"], layer.tensors["B"]
    if layer.kind == "table":
        yield from _wrong(layer, "A", (a.shape[0], shape[0]))
        yield from _wrong(layer, "B", (shape[1], a.shape[0]))
    else:
        rank, ones = a.shape[0], (1,) * (len(shape) - 2)
        window = shape[2:]
        flat = [(rank, shape[1])] if math.prod(window) == 1 else []
        if "mid" not in layer.tensors and b.shape[1] == rank:  # others have forms of their own
            yield from _wrong(layer, "A", (rank, *shape[1:]), *flat)
        yield from _wrong(layer, "B", *((shape[0], b.shape[1], *ones), (shape[0], b.shape[1])))
    if "E" in layer.tensors:
        yield from _wrong(layer, "E", (a.shape[0], 1), (a.shape[0],))


def _loha(layer: Layer, shape: Shape) -> Iterator[str]:
    t = layer.tensors
    if "t1" in t or "t2" in t:
        return
    rank = t["w1_b"].shape[0]
    for i in (1, 2):
        yield from _wrong(layer, f"w{i}_a", (shape[0], rank))
        yield from _wrong(layer, f"w{i}_b", (rank, math.prod(shape[1:])))


def _lokr(layer: Layer, shape: Shape) -> Iterator[str]:
    t = layer.tensors
    if "t2" in t:
        return
    sides = []
    for i in (1, 2):
        if f"w{i}" in t:
            whole = t[f"w{i}"].shape
            sides.append((whole[0], math.prod(whole[1:])))
            continue
        a, b = t[f"w{i}_a"], t[f"w{i}_b"]
        yield from _wrong(layer, f"w{i}_b", (a.shape[1], *b.shape[1:]))
        sides.append((a.shape[0], math.prod(b.shape[1:])))
    (o1, i1), (o2, i2) = sides
    if (o1 * o2, i1 * i2) != (shape[0], math.prod(shape[1:])):
        yield f"the adapter's matrices make ({o1 * o2}, {i1 * i2})"


def _ia3(layer: Layer, shape: Shape) -> Iterator[str]:
    size = layer.tensors["l"].size
    if size not in ((shape[0],) if len(shape) < 2 else (shape[0], shape[1])):
        yield f"the adapter has {size} factors"


def _vera(layer: Layer, shape: Shape) -> Iterator[str]:
    t, inputs = layer.tensors, math.prod(shape[1:])
    rank = t["d"].size
    yield from _wrong(layer, "b", (shape[0],))
    if t["A"].ndim != 2 or t["A"].shape[0] != rank or t["A"].shape[1] < inputs:
        yield f"the projection A has shape {t['A'].shape}, expected ({rank}, {inputs} or more)"
    if t["B"].ndim != 2 or t["B"].shape[1] != rank or t["B"].shape[0] < shape[0]:
        yield f"the projection B has shape {t['B'].shape}, expected ({shape[0]} or more, {rank})"


def _oft(layer: Layer, shape: Shape) -> Iterator[str]:
    r, inputs = layer.tensors["R"], math.prod(shape[1:])
    side = round((1 + math.sqrt(1 + 8 * r.shape[-1])) / 2)
    if r.ndim != 2 or side * (side - 1) // 2 != r.shape[1] or r.shape[0] * side != inputs:
        yield f"the adapter's R has shape {r.shape}, which turns {r.shape[0] * side} inputs and not {inputs}"


def _rows(layer: Layer, shape: Shape) -> Iterator[str]:
    rows = [int(i) for i in layer.tensors["rows"]]
    yield from _wrong(layer, "values", (len(rows), *shape[1:]))
    if len(set(rows)) != len(rows):
        yield "the adapter trains a row twice"


def _whole(layer: Layer, shape: Shape) -> Iterator[str]:
    yield from _wrong(layer, "value" if layer.kind == "full" else "added", shape)


_CHECKS: dict[str, Callable[[Layer, Shape], Iterator[str]]] = {
    "lora": _low_rank, "table": _low_rank, "pissa": _low_rank, "olora": _low_rank, "adalora": _low_rank, "loha": _loha,
    "lokr": _lokr, "ia3": _ia3, "vera": _vera, "oft": _oft, "rows": _rows, "full": _whole,
}  # fmt: skip
