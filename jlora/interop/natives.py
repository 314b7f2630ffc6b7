"""Each kind of layer that jlora trains, as the factors of one of its methods, and back."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jlora import methods
from jlora.interop.forms import (
    Form,
    a_from_factor,
    a_to_factor,
    b_from_factor,
    b_to_factor,
    experts_from_factors,
    experts_to_factors,
)
from jlora.interop.layer import INITIAL, Layer, Tensors, rank_doubled
from jlora.methods import Method
from jlora.methods.adalora import SCALE_EPSILON
from jlora.methods.lokr import small_side
from jlora.models.tensors import Leaf
from jlora.transform.sites import Target

Arrays: TypeAlias = dict[str, np.ndarray]


class Native(NamedTuple):
    """A kind of layer as a method of jlora.

    Attributes:
      method: (targets, their layers) -> the method that trains them.
      arrays: (layer, form) -> its factors, by jlora's names.
      alpha: of a layer: what makes the method's scale the layer's.
      joined: names of the factors whose first axis counts the stacked layers, 1 where there are none.
      shared: names of those that stacked layers have one of.
    """

    method: Callable[[Sequence[Target], Sequence[Layer]], Method]
    arrays: Callable[[Layer, Form], Arrays]
    alpha: Callable[[Layer], float] = lambda layer: 0.0
    joined: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


def rounded(alpha: float) -> float:
    """A numerator that was divided and multiplied again: 16 and not 15.999999999999998."""
    near = round(alpha, 6)
    return near if abs(near - alpha) <= 1e-12 * abs(alpha) else alpha


def _alpha(layer: Layer) -> float:
    return rounded(layer.scale * layer.rank)


def _largest(targets: Sequence[Target]) -> int:
    return max(target.rank for target in targets)


def _common_alpha(targets: Sequence[Target]) -> float | None:
    """Alpha of the targets of the largest rank, where they agree: what others have stands at each target."""
    found = {target.alpha for target in targets if target.rank == _largest(targets)}
    return found.pop() if len(found) == 1 else None


def low_rank_method(
    targets: Sequence[Target], layers: Sequence[Layer], *, of: Callable[..., Method] = methods.lora, **options: Any
) -> Method:
    """The low-rank method of the targets, in a `dora` where the layers have magnitudes."""
    inner = of(_largest(targets), _common_alpha(targets), **options)
    return methods.dora(inner) if "magnitude" in layers[0].tensors else inner


# -- vectors -----------------------------------------------------------------------------------------------------------


def _per_output(x: np.ndarray, form: Form) -> np.ndarray:
    """(out,), however the file shapes it, with the parameter's axes."""
    return b_to_factor(x.reshape(-1, 1), form)[..., 0]


def _from_output(x: np.ndarray, form: Form) -> np.ndarray:
    return b_from_factor(x[..., None], form).reshape(-1)


def _per_rank(x: np.ndarray, form: Form) -> np.ndarray:
    return x.reshape(*[1] * len(form.site.shape), -1)


# -- each kind ---------------------------------------------------------------------------------------------------------


def _with_magnitude(layer: Layer, form: Form, arrays: Arrays) -> Arrays:
    t = layer.tensors
    return arrays | {"magnitude": _per_output(t["magnitude"], form)} if "magnitude" in t else arrays


def _lora(layer: Layer, form: Form) -> Arrays:
    a, b = layer.tensors["A"], layer.tensors["B"]
    return _with_magnitude(layer, form, {"A": a_to_factor(a, form), "B": b_to_factor(b, form)})


def _experts(layer: Layer, form: Form) -> Arrays:
    a, b = experts_to_factors(layer.tensors["A"], layer.tensors["B"], form)
    return {"A": a, "B": b}


def _from_initial(layer: Layer, form: Form) -> Arrays:
    t = layer.tensors
    return _lora(layer, form) | {"A0": a_to_factor(t["A0"], form), "B0": b_to_factor(t["B0"], form)}


def _adalora(layer: Layer, form: Form) -> Arrays:
    return _lora(layer, form) | {"E": _per_rank(layer.tensors["E"], form)}


def _loha(layer: Layer, form: Form) -> Arrays:
    t = layer.tensors
    of_a, of_b = (lambda name: a_to_factor(t[name], form)), (lambda name: b_to_factor(t[name], form))
    return _with_magnitude(
        layer, form, {"A1": of_a("w1_b"), "B1": of_b("w1_a"), "A2": of_a("w2_b"), "B2": of_b("w2_a")}
    )


LOKR = {"C": "w1", "A": "w2_b", "B": "w2_a", "D": "w2"}
LOHA = {"A1": "w1_b", "B1": "w1_a", "A2": "w2_b", "B2": "w2_a"}


def _lokr(layer: Layer, form: Form) -> Arrays:
    arrays = {name: layer.tensors[theirs].T[None] for name, theirs in LOKR.items() if theirs in layer.tensors}
    return _with_magnitude(layer, form, arrays)


def _ia3(layer: Layer, form: Form) -> Arrays:
    x = layer.tensors["l"]
    if _of_inputs(layer):
        shape = [1, form.shape[1 if form.layout == "out_in" else 0], *[1] * form.window]
        whole = np.broadcast_to(x.reshape(shape), (1, *_without_output(form)))
        return {"scale": a_to_factor(np.ascontiguousarray(whole), form)[..., 0]}
    return {"scale": _per_output(x, form)}


def _without_output(form: Form) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(form.shape) if i != (0 if form.layout == "out_in" else 1))


def _of_inputs(layer: Layer) -> bool:
    """Whether l multiplies inputs: its first axis is 1."""
    return layer.tensors["l"].ndim > 1 and layer.tensors["l"].shape[0] == 1


def _vera(layer: Layer, form: Form) -> Arrays:
    t = layer.tensors
    inputs = math.prod(_without_output(form))
    return {
        "d": _per_rank(t["d"], form), "b": b_to_factor(t["b"].reshape(-1, 1), form),
        "A": a_to_factor(t["A"][:, :inputs], form), "B": b_to_factor(t["B"][: form.outputs], form),
    }  # fmt: skip


def _oft(layer: Layer, form: Form) -> Arrays:
    turned = -layer.tensors["R"] if "terms" in layer.tensors else layer.tensors["R"]  # the series turns the other way
    return {"Q": turned[None]}


def _method_of_lokr(targets: Sequence[Target], layers: Sequence[Layer]) -> Method:
    """A Kronecker product whose small matrix has the sides of every layer's.

    Raises:
      ValueError: if no one factor gives all of them.
    """
    sides = [layer.tensors["w1"].shape for layer in layers]
    sizes = [(math.prod(t.shape[i] for i in t.out_axes), math.prod(t.shape[i] for i in t.in_axes)) for t in targets]
    for factor in (-1, *sorted({n for side in sides for n in side}, reverse=True)):
        pairs = zip(sides, sizes, strict=True)
        if all(side == tuple(small_side(n, factor) for n in size) for side, size in pairs):
            inner = methods.lokr(_largest(targets), _common_alpha(targets), factor=factor)
            return methods.dora(inner) if "magnitude" in layers[0].tensors else inner
    raise ValueError(f"lokr: no one factor gives the small matrices of all layers, which are {sorted(set(sides))}")


def _method_of_ia3(targets: Sequence[Target], layers: Sequence[Layer]) -> Method:
    inputs = [escaped(target.path) for target, layer in zip(targets, layers, strict=True) if _of_inputs(layer)]
    return methods.ia3(f"^({'|'.join(inputs)})$" if inputs else None)


def _method_of_oft(targets: Sequence[Target], layers: Sequence[Layer]) -> Method:
    _, side, terms = group(layers[0])
    return methods.oft(side, terms=terms)


def group(layer: Layer) -> tuple[Any, ...]:
    """Layers that one method trains have the same: its kind first."""
    kind = "lora" if layer.kind in ("table", "experts") else layer.kind
    if kind == "oft":
        return kind, _side(layer.tensors["R"]), int(layer.tensors.get("terms", 0))
    return kind, "magnitude" in layer.tensors


def _side(triangles: np.ndarray) -> int:
    return round((1 + math.sqrt(1 + 8 * triangles.shape[-1])) / 2)


def shared(method: Method) -> tuple[str, ...]:
    """Names of the factors that the parts of one torch tensor have in common."""
    return _SHARED.get(inner_of(method).name, ("A",))


_SHARED = {"loha": ("A1", "A2"), "adalora": ("A", "E"), "ia3": (), "vera": ("d",), "oft": ("Q",)}


def nothing() -> Method:
    """The method of an adapter that only trains leaves as they are."""
    return methods.full()


def layer_number(path: str) -> int:
    """The number of the layer that a parameter belongs to, as in "h_11/..." or "layers/11/..."; 0 where there is none.

    >>> layer_number("h_11/attn/key/kernel")
    11
    """
    found = re.search(r"(?:^|[_/])(\d+)(?=/|$)", path)
    return int(found[1]) if found else 0


def escaped(path: str) -> str:
    """A path as a regular expression."""
    return re.escape(path).replace("\\-", "-")


NATIVE: dict[str, Native] = {
    "lora": Native(low_rank_method, _lora, _alpha),
    "table": Native(low_rank_method, _lora, _alpha),
    "experts": Native(low_rank_method, _experts, _alpha),
    "pissa": Native(lambda targets, layers: low_rank_method(targets, layers, of=methods.pissa), _from_initial, _alpha),
    "olora": Native(lambda targets, layers: low_rank_method(targets, layers, of=methods.olora), _from_initial, _alpha),
    "adalora": Native(
        lambda targets, layers: methods.adalora(_largest(targets), 1, _common_alpha(targets), total_steps=1),
        _adalora,
        lambda layer: rounded(layer.scale * (layer.rank + SCALE_EPSILON)),
    ),
    "loha": Native(
        lambda targets, layers: low_rank_method(targets, layers, of=methods.loha), _loha, _alpha
    ),
    "lokr": Native(_method_of_lokr, _lokr, _alpha, ("C", "A", "B", "D")),
    "ia3": Native(_method_of_ia3, _ia3),
    "vera": Native(
        lambda targets, layers: methods.vera(_largest(targets), stored=True), _vera, lambda layer: float(layer.rank),
        shared=("A", "B"),
    ),
    "oft": Native(_method_of_oft, _oft, joined=("Q",)),
}  # fmt: skip


# -- into the forms that jlora trains ----------------------------------------------------------------------------------


def plain(layer: Layer, shape: tuple[int, ...]) -> Layer:
    """The layer in a form that a method has: cores multiplied into the factors next to them, exactly.

    Args:
      layer: of any kind.
      shape: of the torch tensor, (out, in, *window).

    Raises:
      ValueError: for a form that no method has: DoRA's magnitudes of inputs, a grouped convolution, OFT of a window.
    """
    t = dict(layer.tensors)
    of_inputs = t.get("input_magnitude")
    if "magnitude" in t and t["magnitude"].size != shape[0] and layer.kind != "table":
        of_inputs = t["magnitude"]
    if of_inputs is not None:
        raise ValueError(
            f"{layer.key!r} has DoRA's magnitudes for its inputs (shape {of_inputs.shape}): jlora merges those, "
            "and trains magnitudes of outputs"
        )
    if layer.kind == "lora":
        if "mid" in t:
            down = t["A"].reshape(t["A"].shape[:2])
            t["A"] = np.einsum("rs...,si->ri...", t.pop("mid").astype(np.float32), down.astype(np.float32))
        if t["B"].shape[1] != t["A"].shape[0]:
            raise ValueError(
                f"{layer.key!r} has A {t['A'].shape} and B {t['B'].shape}: grouped convolutions are merged, not trained"
            )
    if layer.kind == "loha":
        for i in (1, 2):
            if f"t{i}" in t:
                core, up, down = t.pop(f"t{i}"), t[f"w{i}_a"], t[f"w{i}_b"]
                product = np.einsum("pq...,qi->pi...", core.astype(np.float32), down.astype(np.float32))
                t[f"w{i}_a"], t[f"w{i}_b"] = up.T, product.reshape(len(product), -1)
    if layer.kind == "lokr":
        if len(shape) > 2:
            return _lokr_as_lora(layer, shape)
        return _lokr_of_pair(layer)
    if layer.kind == "oft" and len(shape) > 2:
        raise ValueError(f"{layer.key!r} is a convolution: OFT turns the inputs of linear layers alone")
    return layer._replace(tensors=t)


def _lokr_of_pair(layer: Layer) -> Layer:
    """The Kronecker product with the first matrix whole, and the second, too, where jlora's `lokr` has it whole."""
    t = dict(layer.tensors)
    if "w1" not in t:
        t["w1"] = t.pop("w1_a").astype(np.float32) @ t.pop("w1_b").astype(np.float32)
    if "w2" not in t:
        rank, side = t["w2_b"].shape[0], max(t["w2_a"].shape[0], t["w2_b"].shape[1])
        if rank < side / 2:
            return layer._replace(tensors=t)
        t["w2"] = t.pop("w2_a").astype(np.float32) @ t.pop("w2_b").astype(np.float32)
        return layer._replace(tensors=t, declared=rank)
    # A rank that no tensor shows is half of the larger side or more, else `lokr` would have the matrix as a product.
    return layer._replace(tensors=t, declared=max(layer.rank, -(-max(t["w2"].shape) // 2)))


def _lokr_as_lora(layer: Layer, shape: tuple[int, ...]) -> Layer:
    """A Kronecker product with a window, as the product of rank r1 r2 that it is."""
    t = {name: x.astype(np.float32) for name, x in layer.tensors.items()}
    one = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    up1, down1 = (np.eye(len(one), dtype=np.float32), one) if one.shape[0] <= one.shape[1] else (one, np.eye(
        one.shape[1], dtype=np.float32))  # fmt: skip
    outputs, inputs = shape[0] // one.shape[0], shape[1] // one.shape[1]
    if "w2" in t:
        two = t["w2"].reshape(outputs, -1)
        up2, down2 = np.eye(outputs, dtype=np.float32), two
    elif "t2" in t:
        up2, down2 = t["w2_a"].T, np.einsum("pq...,qi->pi...", t["t2"], t["w2_b"])
    else:
        up2, down2 = t["w2_a"], t["w2_b"]
    down2 = down2.reshape(len(down2), inputs, *shape[2:])
    up = np.einsum("ar,bs->abrs", up1, up2).reshape(shape[0], -1)
    down = np.einsum("ri,sj...->rsij...", down1, down2).reshape(up.shape[1], *shape[1:])
    tensors = {"A": down, "B": up.reshape(*up.shape, *[1] * (len(shape) - 2))}
    if "magnitude" in t:
        tensors["magnitude"] = t["magnitude"]
    return layer._replace(kind="lora", tensors=tensors)


# -- parts of a torch tensor -------------------------------------------------------------------------------------------

_OUTPUTS = {"B": 0, "B0": 0, "w1_a": 0, "w2_a": 0, "b": 0, "value": 0, "added": 0}  # tensors with an axis of outputs


def part_of(layer: Layer, row: Leaf, form: Form) -> Layer:
    """A layer cut to a parameter that is a part of its torch tensor: the outputs of that part.

    Raises:
      ValueError: for a part of the inputs, or a Kronecker product.
    """
    if row.part is None:
        return layer
    if row.part.axis != (0 if form.layout == "out_in" else 1) or layer.kind == "lokr":
        raise ValueError(
            f"{row.path!r} is a part of {layer.key!r} that a layer of kind {layer.kind} cannot be cut into"
        )
    cut = slice(row.part.number * form.outputs, (row.part.number + 1) * form.outputs)
    return layer._replace(tensors={name: _cut(name, x, cut, layer) for name, x in layer.tensors.items()})


def _cut(name: str, x: np.ndarray, cut: slice, layer: Layer) -> np.ndarray:
    if name == "magnitude":
        return x.reshape(-1)[cut]
    if name == "l":
        return x if _of_inputs(layer) else x.reshape(-1)[cut]
    return x[cut] if name in _OUTPUTS else x


def part_of_tensors(layer: Layer, row: Leaf, shape: tuple[int, ...]) -> Layer:
    """A layer that replaces, adds to or multiplies a parameter, cut to a part of it."""
    if row.part is None:
        return layer
    axis, n = row.part.axis, shape[row.part.axis]
    cut = [slice(None)] * len(shape)
    cut[axis] = slice(row.part.number * n, (row.part.number + 1) * n)
    names = ("value", "added", "l")
    tensors = {name: x[tuple(cut)] if name in names else x for name, x in layer.tensors.items()}
    return layer._replace(tensors=tensors)


# -- back --------------------------------------------------------------------------------------------------------------


def inner_of(method: Method) -> Method:
    """The method within a `dora`, else itself."""
    inner = dict(method.config).get("inner")
    return inner_of(inner) if isinstance(inner, Method) else method


def scale_of(method: Method, target: Target) -> float:
    """The number that multiplies the product of the factors.

    Raises:
      ValueError: for a method that is no plain product with a scale.
    """
    name = inner_of(method).name
    if name == "rslora":
        return target.alpha / math.sqrt(target.rank)
    if name == "adalora":
        return target.alpha / (target.rank + SCALE_EPSILON)
    if name in ("lora", "loraplus", "lora_fa", "dylora", "eva", "loha", "lokr", "pissa", "olora"):
        return target.alpha / target.rank
    if name in ("ia3", "oft", "vera"):
        return 1.0
    raise ValueError(
        f"{method.name} has no form of its own in torch files: convert it first, with jlora.to_lora(adapted)"
    )


def of_layer(arrays: Mapping[str, np.ndarray], method: Method, number: int) -> Arrays:
    """The factors of one of several stacked layers."""
    native = NATIVE.get(inner_of(method).name, NATIVE["lora"])

    def own(name: str, x: np.ndarray) -> np.ndarray:
        if name in native.shared:
            return x[0]
        return x[number : number + 1] if name in native.joined else x[number]

    return {name: own(name, x) for name, x in arrays.items()}


def of_layers(parts: Sequence[Arrays], native: Native) -> Arrays:
    """The factors of stacked layers: the inverse of `of_layer`."""

    def whole(name: str) -> np.ndarray:
        pieces = [part[name] for part in parts]
        if name in native.shared:
            return pieces[0][None]
        return np.concatenate(pieces) if name in native.joined else np.stack(pieces)

    return {name: whole(name) for name in parts[0]}


def layer_of(
    module: str, parameter: str, arrays: Mapping[str, np.ndarray], method: Method, target: Target, form: Form
) -> Layer:
    """The layer of one torch tensor, or of the part of it that a parameter is."""
    name = inner_of(method).name
    scale = scale_of(method, target)
    if name in ("lokr", "oft") and form.window:
        raise ValueError(
            f"{target.path!r}: {name} here folds a convolution's window in another order than torch's files: "
            "convert it first, with jlora.to_lora"
        )
    if name == "adalora" and form.layout == "table":
        raise ValueError(
            f"{target.path!r}: torch files have no AdaLoRA of tables: convert it first, with jlora.to_lora"
        )
    if form.layout == "stack":
        if set(arrays) != {"A", "B"}:
            raise ValueError(f"{target.path!r}: experts' matrices have plain LoRA in torch files, and no {method.name}")
        a, b = experts_from_factors(arrays["A"], arrays["B"], form)
        return Layer(module, "experts", {"A": a, "B": b}, scale, parameter, declared=target.rank)
    tensors: dict[str, np.ndarray]
    if name == "loha":
        tensors = {theirs: _factor(ours, arrays[ours], form) for ours, theirs in LOHA.items()}
        tensors = {key: x.reshape(len(x), -1) for key, x in tensors.items()}  # windows are folded into the inputs
        kind = "loha"
    elif name == "lokr":
        kind, tensors = "lokr", {theirs: arrays[ours][0].T for ours, theirs in LOKR.items() if ours in arrays}
    elif name == "ia3":
        x = arrays["scale"]
        inputs = all(x.shape[i] == 1 for i in form.site.out_axes) and form.outputs > 1
        vector = a_from_factor(x[..., None], form) if inputs else _from_output(x, form)[:, None]
        kind, tensors = "ia3", {"l": vector}
    elif name == "oft":
        terms = dict(method.config)["terms"]
        q = arrays["Q"][0]
        kind, tensors = "oft", {"R": -q, "terms": np.asarray(terms)} if terms else {"R": q}
    elif name == "vera":
        kind = "vera"
        tensors = {
            "d": arrays["d"].reshape(-1), "b": _from_output(arrays["b"][..., 0], form),
            "A": a_from_factor(arrays["A"], form), "B": b_from_factor(arrays["B"], form),
        }  # fmt: skip
    else:
        own = name if name in ("adalora", "pissa", "olora") else "lora"
        kind = "table" if form.layout == "table" else own
        tensors = {ours: _factor(ours, x, form) for ours, x in arrays.items() if ours in ("A", "B", "A0", "B0")}
        if kind == "adalora":
            tensors["E"] = arrays["E"].reshape(-1, 1)
    if "magnitude" in arrays:
        m = _from_output(arrays["magnitude"], form)
        tensors["magnitude"] = m.reshape(1, -1, *[1] * form.window) if form.window else m
    if "A0" in tensors and (kind not in INITIAL or form.window):
        kind = "table" if form.layout == "table" else "lora"  # PEFT starts matrices alone from the weight
        tensors = rank_doubled(tensors)
    whole = {key: np.asarray(x, order="C") for key, x in tensors.items()}
    return Layer(module, kind, whole, scale, parameter, declared=target.rank if kind == "lokr" else 0)


def _factor(name: str, x: np.ndarray, form: Form) -> np.ndarray:
    return a_from_factor(x, form) if name.startswith("A") else b_from_factor(x, form)


def fused(key: str, parts: Sequence[tuple[Leaf, Layer]]) -> Layer:
    """One layer of a torch tensor from those of its parts.

    Parts that share their A have it once. Others stand below each other, r of each, and B holds each part's outputs:
    the scale stays what it is, and the rank is the sum. Of a part that is not adapted, B's outputs are zero.

    Raises:
      ValueError: if the parts are of several kinds or scales, or of a kind that is not joined.
    """
    first_row, first = parts[0]
    if first_row.part is None:
        return first
    count = first_row.part.parts
    own: dict[int, Layer] = {row.part.number: layer for row, layer in parts if row.part is not None}
    if len({(layer.kind, layer.scale, "magnitude" in layer.tensors) for layer in own.values()}) > 1:
        raise ValueError(f"the parts of {key!r} are adapted in several ways or with several scales")
    whole = len(own) == count
    tensors: Tensors
    if first.kind in INITIAL:
        if whole and all(_share(own, name) for name in ("A", "A0")):
            tensors = {name: first.tensors[name] for name in ("A", "A0")} | {
                name: np.concatenate([own[i].tensors[name] for i in range(count)]) for name in ("B", "B0")
            }
            return first._replace(tensors=tensors)
        own = {i: without_initial(layer) for i, layer in own.items()}
        first = own[min(own)]
    if first.kind in ("lora", "adalora") and ("magnitude" not in first.tensors or whole):
        tensors = _stacked_low_rank(own, count)
    elif whole and first.kind in ("ia3", "vera", "loha", "oft"):
        shared = {name for name in first.tensors if name not in _OUTPUTS and name not in ("l", "magnitude")}
        if any(
            not np.array_equal(layer.tensors[name], first.tensors[name]) for layer in own.values() for name in shared
        ):
            raise ValueError(f"the parts of {key!r} have been trained apart: convert them first, with jlora.to_lora")
        tensors = {
            name: x if name in shared or (name == "l" and _of_inputs(first)) else np.concatenate(
                [own[i].tensors[name] for i in range(count)])
            for name, x in first.tensors.items()
        }  # fmt: skip
    else:
        raise ValueError(f"not all parts of {key!r} are adapted by {first.kind}: torch files adapt it as a whole")
    return first._replace(tensors=tensors)


def _share(own: Mapping[int, Layer], name: str) -> bool:
    some = next(iter(own.values()))
    return all(np.array_equal(layer.tensors[name], some.tensors[name]) for layer in own.values())


def without_initial(layer: Layer) -> Layer:
    """PiSSA or OLoRA as plain LoRA of twice the rank, on the base as it is; others as they are."""
    return layer._replace(kind="lora", tensors=rank_doubled(layer.tensors)) if layer.kind in INITIAL else layer


def _stacked_low_rank(own: Mapping[int, Layer], count: int) -> Tensors:
    some = next(iter(own.values()))
    outputs = len(some.tensors["B"])
    tail = [name for name in ("A", "E") if name in some.tensors]
    if len(own) == count and all(_share(own, name) for name in tail):
        tensors = {name: some.tensors[name] for name in tail}
        tensors["B"] = np.concatenate([own[i].tensors["B"] for i in range(count)])
    else:
        if "E" in some.tensors:
            raise ValueError("AdaLoRA's parts have been trained apart: convert them first, with jlora.to_lora")
        numbers = sorted(own)
        ranks = [own[i].rank for i in numbers]
        b = np.zeros((outputs * count, sum(ranks)), some.tensors["B"].dtype)
        starts = np.cumsum([0, *ranks])
        for i, start, rank in zip(numbers, starts, ranks, strict=False):
            b[i * outputs : (i + 1) * outputs, start : start + rank] = own[i].tensors["B"]
        tensors = {"A": np.concatenate([own[i].tensors["A"] for i in numbers]), "B": b}
    if "magnitude" in some.tensors:
        tensors["magnitude"] = np.concatenate([own[i].tensors["magnitude"].reshape(-1) for i in range(count)])
    return tensors
