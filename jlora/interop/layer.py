"""Layers: an adapter's part of one parameter of a torch model, whatever format the file has, and the merged parameter.

Every reader gives `Layer`s and every writer takes them, so that n formats need n readers and not n^2 converters. All is
NumPy: nothing of the model need be known beside its tensors.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

Tensors: TypeAlias = Mapping[str, np.ndarray]
Layout: TypeAlias = Literal["out_in", "in_out", "table", "stack"]


class Layer(NamedTuple):
    """An adapter's part of one parameter.

    Attributes:
      module: path of the torch module, "model.layers.0.self_attn.q_proj".
      kind: a row of `KINDS`.
      tensors: by the names of `KINDS`, in the file's shapes and dtypes.
      scale: what the update is multiplied by, dimensionless: alpha / r, alpha / sqrt(r).
      parameter: name of the parameter in the module.
      declared: rank that the file declares; it counts where no tensor shows one (a LoKr that is kept whole).
      optional: no error where the base has no such parameter: (IA)^3 multiplies a bias where there is one.
    """

    module: str
    kind: str
    tensors: Tensors
    scale: float = 1.0
    parameter: str = "weight"
    declared: int = 0
    optional: bool = False

    @property
    def key(self) -> str:
        """The parameter's name in a checkpoint."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def rank(self) -> int:
        """The rank of a low-rank kind; 0 of others."""
        rank = KINDS[self.kind].rank
        return (rank(self.tensors) if rank else 0) or self.declared


class Kind(NamedTuple):
    """A way to change a parameter.

    Attributes:
      names: of its tensors; those in brackets may be absent.
      update: (layer, parameter, layout) -> the changed parameter. `parameter` is float32 and in the checkpoint's shape.
      rank: of its tensors; None for a kind that has none.
    """

    names: str
    update: Callable[[Layer, np.ndarray, Layout], np.ndarray]
    rank: Callable[[Tensors], int] | None = None


def merged(layer: Layer, parameter: np.ndarray, layout: Layout = "out_in") -> np.ndarray:
    """The parameter with the adapter in it, float32, in the shape that the checkpoint has it in.

    Args:
      layer: of the adapter.
      parameter: of any floating-point dtype; the sum is taken in float32.
      layout: the axes of a matrix: "out_in" is torch's Linear and its convolutions, "in_out" GPT-2's Conv1D, "table" an
        embedding (rows, width), "stack" a parameter of one matrix per expert.

    Raises:
      ValueError: if the shapes do not fit.
    """
    weight = np.asarray(parameter, np.float32)
    result = KINDS[layer.kind].update(layer, weight, layout)
    if result.shape != weight.shape:
        raise ValueError(f"{layer.key!r} has shape {weight.shape}, and the adapter's update {result.shape}")
    return result


def delta(layer: Layer, shape: tuple[int, ...]) -> np.ndarray:
    """The update of a kind that adds to the parameter: float32, (out, in, *window), or (rows, width) of a table.

    Args:
      layer: of a kind in `DELTAS`.
      shape: of the parameter, outputs first.
    """
    make = DELTAS[layer.kind]
    found = make({name: np.asarray(x, np.float32) for name, x in layer.tensors.items()}, shape)
    if math.prod(found.shape) != math.prod(shape) or (found.ndim == len(shape) == 2 and found.shape != tuple(shape)):
        raise ValueError(f"{layer.key!r} has shape {shape}, and the adapter's update {found.shape}")
    return np.asarray(found.reshape(shape) * np.float32(layer.scale), np.float32)


# -- deltas, in float32, outputs first ---------------------------------------------------------------------------------


def _lora(t: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    up = t["B"].reshape(t["B"].shape[0], -1)  # (out, r); a convolution's has a window of size 1
    if "mid" in t:  # CP: A is (r, in, 1, 1), mid (r, r, *window)
        down = t["A"].reshape(t["A"].shape[:2])
        return np.einsum("or,rs...,si->oi...", up, t["mid"], down, optimize=True)
    if t["A"].ndim > 2 and up.shape[1] != t["A"].shape[0]:  # a grouped convolution: B sees its group's ranks alone
        groups = t["A"].shape[0] // up.shape[1]
        up_of, down_of = np.split(up, groups), np.split(t["A"], groups)
        return np.concatenate([np.tensordot(u, d, 1) for u, d in zip(up_of, down_of, strict=True)])
    return up @ t["A"].reshape(t["A"].shape[0], -1)


def _table(t: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    return t["A"].T @ t["B"].T  # (rows, r) (r, width)


def _experts(t: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    """One matrix per expert: A (experts r, in) with the expert outside, B (out, r experts) with the expert inside."""
    experts = shape[0]
    a = t["A"].reshape(experts, -1, t["A"].shape[-1])
    b = t["B"].reshape(t["B"].shape[0], -1, experts)
    first_is_in = a.shape[-1] == shape[1] != shape[2] and len(b) == shape[2]  # "is_transposed" in transformers
    return np.einsum("eri,ore->eio" if first_is_in else "eri,ore->eoi", a, b, optimize=True)


def _adalora(t: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    return t["B"] @ (t["A"] * t["E"].reshape(-1, 1))


def _vera(t: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    outputs, inputs = shape[0], math.prod(shape[1:])
    return (t["b"][:, None] * t["B"][:outputs]) @ (t["d"][:, None] * t["A"][:, :inputs])


def _loha(t: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    one, two = (_tucker(t, f"w{i}_a", f"w{i}_b", f"t{i}") for i in (1, 2))
    return one * two


def _lokr(t: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    one = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    two = t["w2"] if "w2" in t else _tucker(t, "w2_a", "w2_b", "t2")
    if len(shape) > 2 and two.ndim == 2:  # a convolution whose window is folded into the inputs
        two = two.reshape(two.shape[0], -1, *shape[2:])
    return np.kron(one.reshape(*one.shape, *[1] * (two.ndim - one.ndim)), two)


def _tucker(t: Tensors, a: str, b: str, core: str) -> np.ndarray:
    """`a b`, or with a core (r, r, *window) `core` times a (r, out) and b (r, in)."""
    if core not in t:
        return t[a] @ t[b].reshape(t[b].shape[0], -1)
    return np.einsum("pq...,po,qi->oi...", t[core], t[a], t[b], optimize=True)


DELTAS: dict[str, Callable[[Tensors, tuple[int, ...]], np.ndarray]] = {
    "lora": _lora, "table": _table, "experts": _experts, "adalora": _adalora, "vera": _vera, "loha": _loha,
    "lokr": _lokr,
}  # fmt: skip


# -- updates -----------------------------------------------------------------------------------------------------------


def outputs_first(weight: np.ndarray, layout: Layout) -> np.ndarray:
    """A view with the outputs first."""
    return weight.T if layout == "in_out" else weight


def _added(layer: Layer, weight: np.ndarray, layout: Layout) -> np.ndarray:
    w = outputs_first(weight, layout)
    v = w + delta(layer, w.shape)
    if "magnitude" in layer.tensors:
        v = _of_magnitude(layer, v)
    if "input_magnitude" in layer.tensors:
        v = _of_input_magnitude(layer, v)
    return outputs_first(v, layout)


def _instead_of_initial(layer: Layer, weight: np.ndarray, layout: Layout) -> np.ndarray:
    """PiSSA, OLoRA: `W - s B0 A0 + s B A`, B0 and A0 being those that the training began with."""
    t = layer.tensors
    if "A0" not in t:
        a, b = INITIAL[layer.kind](outputs_first(weight, layout), layer)
        layer = layer._replace(tensors={**t, "A0": a, "B0": b})
    return _added(layer._replace(kind="lora", tensors=rank_doubled(layer.tensors)), weight, layout)


def rank_doubled(t: Tensors) -> dict[str, np.ndarray]:
    """A and B of `A B - A0 B0`: [A; A0] and [B, -B0]."""
    kept = {name: x for name, x in t.items() if name not in ("A0", "B0")}
    return kept | {
        "A": np.concatenate([np.asarray(t["A"], np.float32), t["A0"]]),
        "B": np.concatenate([np.asarray(t["B"], np.float32), -t["B0"]], axis=1),
    }


def _principal(w: np.ndarray, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """PiSSA's A0 (r, in) and B0 (out, r): s B0 A0 is the best approximation of W (out, in) of rank r."""
    rank = layer.rank
    u, values, vt = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(values[:rank] / np.float32(layer.scale))
    return root[:, None] * vt[:rank], u[:, :rank] * root


def _orthogonal(w: np.ndarray, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """OLoRA's: of W = Q R, the first rows of R and the first columns of Q."""
    rank = layer.rank
    q, r = np.linalg.qr(w)
    return r[:rank], q[:, :rank]


INITIAL: dict[str, Callable[[np.ndarray, Layer], tuple[np.ndarray, np.ndarray]]] = {
    "pissa": _principal, "olora": _orthogonal,
}  # fmt: skip


def _added_to_table(layer: Layer, weight: np.ndarray, layout: Layout) -> np.ndarray:
    v = weight + delta(layer, weight.shape)
    if "magnitude" not in layer.tensors:
        return v
    m = np.asarray(layer.tensors["magnitude"], np.float32).reshape(1, -1)  # a number per column, over all rows
    return v * _ratio(m, np.linalg.norm(v, axis=0, keepdims=True))


def _of_magnitude(layer: Layer, v: np.ndarray) -> np.ndarray:
    """DoRA: `m V / |V|`, the norm over the axes on which m has one element."""
    m = np.asarray(layer.tensors["magnitude"], np.float32)
    if m.ndim == 1 or m.size == v.shape[0] == max(m.shape):  # a number per output, however its shape says it
        m = m.reshape(-1, *[1] * (v.ndim - 1))
    elif m.ndim != v.ndim or any(n not in (1, k) for n, k in zip(m.shape, v.shape, strict=True)):
        raise ValueError(f"{layer.key!r} has a magnitude of shape {m.shape} for a weight of shape {v.shape}")
    axes = tuple(i for i, n in enumerate(m.shape) if n == 1)
    return v * _ratio(m, np.sqrt(np.sum(np.square(v), axis=axes, keepdims=True)))


def _of_input_magnitude(layer: Layer, v: np.ndarray) -> np.ndarray:
    """LyCORIS' older DoRA, a number per input: of a square weight its shape alone would not say so."""
    m = np.asarray(layer.tensors["input_magnitude"], np.float32)
    if v.ndim < 2 or m.size != v.shape[1]:
        raise ValueError(f"{layer.key!r} has {m.size} magnitudes of inputs for a weight of shape {v.shape}")
    axes = tuple(i for i in range(v.ndim) if i != 1)
    norm = np.sqrt(np.sum(np.square(v), axis=axes, keepdims=True))
    return v * _ratio(m.reshape(norm.shape), norm)


def _ratio(m: np.ndarray, norm: np.ndarray) -> np.ndarray:
    zero = norm == 0  # no direction: it stays what V is
    return np.where(zero, np.float32(1), m / np.where(zero, np.float32(1), norm))


def _scaled(layer: Layer, weight: np.ndarray, layout: Layout) -> np.ndarray:
    """(IA)^3: l is (out, 1) or (1, in), with windows of 1; of a bias (out,)."""
    factor = np.asarray(layer.tensors["l"], np.float32)
    w = outputs_first(weight, layout)
    return outputs_first(w * factor.reshape(*factor.shape, *[1] * (w.ndim - factor.ndim)), layout)


def _rotated(layer: Layer, weight: np.ndarray, layout: Layout) -> np.ndarray:
    """OFT: `W R^T`, every block of inputs turned by a matrix that is made of a skew-symmetric one."""
    w = outputs_first(weight, layout)
    triangle = np.asarray(layer.tensors["R"], np.float32)
    blocks, entries = triangle.shape
    side = round((1 + math.sqrt(1 + 8 * entries)) / 2)
    q = np.zeros((blocks, side, side), np.float32)
    rows, columns = np.triu_indices(side, 1)
    q[:, rows, columns] = triangle
    q -= q.swapaxes(1, 2)
    terms = int(layer.tensors["terms"]) if "terms" in layer.tensors else 0
    rotation = _series(q, terms) if terms else _cayley(q)
    flat = w.reshape(w.shape[0], -1, side)  # (out, blocks, side)
    count = flat.shape[1]
    rotation = np.broadcast_to(rotation, (count, side, side)) if blocks == 1 else rotation
    if len(rotation) != count:
        raise ValueError(f"{layer.key!r} has {count * side} inputs, and the adapter turns {len(rotation) * side}")
    return outputs_first(np.einsum("obi,bji->obj", flat, rotation, optimize=True).reshape(w.shape), layout)


def _cayley(q: np.ndarray) -> np.ndarray:
    """`(I - Q) (I + Q)^-1` of matrices (..., n, n)."""
    one = np.eye(q.shape[-1], dtype=q.dtype)
    return np.linalg.solve((one + q).swapaxes(-1, -2), (one - q).swapaxes(-1, -2)).swapaxes(-1, -2)


def _series(q: np.ndarray, terms: int) -> np.ndarray:
    """The first terms of Neumann's series of `(I + Q) (I - Q)^-1`, the last with half its weight, as PEFT has them.

    PEFT's series turns in the other direction than its exact transform does; and its three terms are its four.
    """
    total, power = np.broadcast_to(np.eye(q.shape[-1], dtype=q.dtype), q.shape), q
    if terms == 1:
        return total
    total = total + 2 * q
    if terms == 2:
        return total
    for _ in range(2, max(terms, 4) - 1):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def _replaced(layer: Layer, weight: np.ndarray, layout: Layout) -> np.ndarray:
    return np.asarray(layer.tensors["value"], np.float32)


def _plus(layer: Layer, weight: np.ndarray, layout: Layout) -> np.ndarray:
    return weight + np.float32(layer.scale) * np.asarray(layer.tensors["added"], np.float32).reshape(weight.shape)


def _rows(layer: Layer, weight: np.ndarray, layout: Layout) -> np.ndarray:
    rows = np.asarray(layer.tensors["rows"])
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(weight):
        raise ValueError(f"{layer.key!r} has {len(weight)} rows, and the adapter trained row {rows.max()}")
    result = weight.copy()
    result[rows] = layer.tensors["values"]
    return result


def _first(name: str) -> Callable[[Tensors], int]:
    return lambda tensors: int(tensors[name].shape[0])


def _rank_of_lokr(t: Tensors) -> int:
    return int(next((t[name].shape[0] for name in ("w1_b", "w2_b") if name in t), 0))


KINDS: dict[str, Kind] = {
    "lora": Kind("A B [mid] [magnitude | input_magnitude]", _added, _first("A")),
    "table": Kind("A B [magnitude]", _added_to_table, _first("A")),
    "experts": Kind("A B", _added),
    "pissa": Kind("A B [A0 B0]", _instead_of_initial, _first("A")),
    "olora": Kind("A B [A0 B0]", _instead_of_initial, _first("A")),
    "adalora": Kind("A B E", _added, _first("A")),
    "vera": Kind("A B d b", _added, _first("A")),
    "loha": Kind("w1_a w1_b w2_a w2_b [t1] [t2] [magnitude | input_magnitude]", _added, _first("w1_b")),
    "lokr": Kind("w1 | w1_a w1_b, w2 | w2_a w2_b [t2] [magnitude | input_magnitude]", _added, _rank_of_lokr),
    "ia3": Kind("l", _scaled),
    "oft": Kind("R [terms]", _rotated),
    "full": Kind("value", _replaced),
    "diff": Kind("added", _plus),
    "rows": Kind("rows values", _rows),
}
