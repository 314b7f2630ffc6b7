"""From the tensors of a file for Stable Diffusion to layers: which belong together, whether they are whole and fit.

What a name of a tensor stands for, each format says itself (kohya.py, diffusers.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from jlora.interop.layer import KINDS, Layer
from jlora.interop.modules import Name, Shape, Shapes, context_width, described, parameters

SHOWN = 20  # lines of an error
Scale: TypeAlias = Callable[[Name, int, float | None], float]  # (of which module, rank, alpha of the file) -> scale


class Role(NamedTuple):
    """Part that a tensor plays in its module.

    Attributes:
      kind: of the layer that it is a part of, a row of `KINDS`; "any" for a part that several kinds have, "bias" for
        what is added to the module's bias.
      name: in the layer.
    """

    kind: str
    name: str


class Found(NamedTuple):
    """A tensor with its key and its role."""

    key: str
    tensor: np.ndarray
    role: Role


class Placed(NamedTuple):
    """Module and role that a key stands for."""

    name: Name
    role: Role


class Absent(NamedTuple):
    """Component that a key is of, and that the caller has not given."""

    component: str


Resolved: TypeAlias = Placed | Absent | str

NEEDED: dict[str, list[tuple[str, ...]]] = {
    "lora": [("A",), ("B",)],
    "loha": [("w1_a",), ("w1_b",), ("w2_a",), ("w2_b",)],
    "lokr": [("w1", "w1_a"), ("w1", "w1_b"), ("w2", "w2_a"), ("w2", "w2_b")],
    "ia3": [("weight",), ("on_input",)],
    "diff": [("added",)],
}  # of each kind, names one of which has to be there
TOGETHER = {"t1": "t2", "t2": "t1"}  # of LoHa; LoKr has t2 alone


def assembled(
    tensors: Mapping[str, np.ndarray],
    models: Mapping[str, Shapes],
    resolve: Callable[[str], Resolved],
    scale: Scale,
    *,
    origin: str,
) -> dict[str, list[Layer]]:
    """The layers of each component.

    Args:
      tensors: of the file, by key.
      models: the shapes of the tensors of each component.
      resolve: key -> what it stands for, or the reason that it stands for nothing.
      scale: of a module's update.
      origin: what an error names, "'file.safetensors'".

    Raises:
      ValueError: if a tensor stands for nothing, is half of something, or does not fit: all of them in one error.
    """
    faults: dict[str, str] = {}  # by key, so that each tensor is counted once
    groups: dict[Name, list[Found]] = {}
    widths: set[int] = set()
    absent: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        placed = resolve(key)
        widths |= _width_of_texts(key, placed, tensor)
        if isinstance(placed, Absent):
            absent.setdefault(placed.component, []).append(key)
            continue
        if isinstance(placed, str):
            faults[key] = f"{key!r} {placed}"
            continue
        own = groups.setdefault(placed.name, [])
        twin = next((found.key for found in own if found.role == placed.role), None)
        if twin is not None:
            faults[key] = f"{key!r} and {twin!r} are the same tensor of {shown(placed.name)}"
        else:
            own.append(Found(key, tensor, placed.role))
    owned = {component: parameters(shapes) for component, shapes in models.items()}
    layers: dict[str, list[Layer]] = {}
    for name, own in groups.items():
        made, wrong = _of_module(name, own, owned[name.component][name.module], scale)
        faults |= {key: fault for key, fault in wrong.items() if key not in faults}
        layers.setdefault(name.component, []).extend(made)
    if faults or absent:
        count = len(faults) + sum(map(len, absent.values()))
        lines = [_of_absent(component, keys) for component, keys in absent.items()]
        base = _other_base(widths, models)
        head = f"{origin}: {count} of {len(tensors)} tensors cannot be placed, so none is{base}:"
        raise ValueError("\n  ".join([head, *_first([*lines, *faults.values()])]))
    return {component: layers[component] for component in models if component in layers}


def shown(name: Name) -> str:
    """A module in an error."""
    return f"{name.component}'s {name.module!r}"


def _of_absent(component: str, keys: list[str]) -> str:
    many = f"and {len(keys) - 1} more are" if keys[1:] else "is"
    return f"{keys[0]!r} {many} of the {component}, which is not here: without= leaves out what is not wanted"


def _first(lines: list[str]) -> list[str]:
    return [*lines[:SHOWN], *([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])]


def _other_base(theirs: set[int], models: Mapping[str, Shapes]) -> str:
    """That the file was made for another family of models, where the widths of texts say so."""
    width = context_width(models.get("unet", {}))
    if width is None or len(theirs) != 1 or width in theirs:
        return ""
    (other,) = theirs
    return (
        f"; the file is for a base whose texts have width {described(other)}, and the model's have {described(width)}"
    )


_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", ".down.weight", ".hada_w1_b")
_OF_TEXTS = (["attn2", "to_k"], ["attn2", "to_v"])
_KEYS_OF_TEXTS = tuple(f"attn2_{name}" for name in ("to_k", "to_v", "processor_to_k_lora", "processor_to_v_lora"))


def _width_of_texts(key: str, placed: Resolved, tensor: np.ndarray) -> set[int]:
    """The number of inputs of a layer that sees the texts; of a module that is not here, its name alone can say so."""
    if tensor.ndim < 2:
        return set()
    if isinstance(placed, Placed):
        sees = placed.role.name in ("A", "w1_b") and placed.name.module.split(".")[-2:] in _OF_TEXTS
    else:
        stem = next((key.removesuffix(end).replace(".", "_") for end in _DOWN if key.endswith(end)), "")
        sees = stem.endswith(_KEYS_OF_TEXTS)
    return {tensor.shape[1]} if sees else set()


# -- one module --------------------------------------------------------------------------------------------------------


def _of_module(
    name: Name, own: Sequence[Found], shapes: Mapping[str, Shape], scale: Scale
) -> tuple[list[Layer], dict[str, str]]:
    """The layers of a module, and what is wrong by key."""
    kinds = list(dict.fromkeys(found.role.kind for found in own if found.role.kind not in ("any", "bias")))
    if len(kinds) > 1:
        return [], {found.key: f"{found.key!r}: {shown(name)} has tensors of {' and of '.join(kinds)}" for found in own}
    parts = {found.role.name: found for found in own if found.role.kind != "bias"}
    if parts and not kinds:
        return [], {found.key: f"{found.key!r} belongs to no factors: there are none of {shown(name)}" for found in own}
    wrong = _incomplete(kinds[0], own, parts, name) if kinds else {}
    for found in own:
        parameter = "bias" if found.role.kind == "bias" else "weight"
        if parameter not in shapes:
            wrong[found.key] = f"{found.key!r}: {shown(name)} has no {parameter}"
    if wrong:
        return [], wrong
    layers: list[Layer] = []
    factor = 1.0
    if kinds:
        tensors = {role: found.tensor for role, found in parts.items()}
        for role, expected in misshaped(kinds[0], tensors, shapes["weight"]):
            key = parts[role].key
            wrong[key] = (
                f"{key!r} has shape {tensors[role].shape}, expected {expected} for {shown(name)} of shape "
                f"{tuple(shapes['weight'])}"
            )
        layer, fault = (None, None) if wrong else _layer(name, kinds[0], tensors, shapes["weight"], scale)
        if fault is not None:
            wrong[parts["alpha"].key] = f"{parts['alpha'].key!r} {fault}"
        if layer is not None:
            layers.append(layer)
            factor = layer.scale if kinds[0] == "lora" else 1.0
    for found in own:
        if found.role.kind == "bias":
            if found.tensor.shape != tuple(shapes["bias"]):
                wrong[found.key] = (
                    f"{found.key!r} has shape {found.tensor.shape}, expected {tuple(shapes['bias'])} for {shown(name)}"
                )
            own_scale = factor if found.role.name == "B_bias" else 1.0
            layers.append(Layer(name.module, "diff", {"added": found.tensor}, own_scale, "bias"))
    return ([], wrong) if wrong else (layers, {})


def _incomplete(kind: str, own: Sequence[Found], parts: Mapping[str, Found], name: Name) -> dict[str, str]:
    """Faults of a kind that has not all of its parts, or has them twice."""
    absent = [names for names in NEEDED[kind] if not any(part in parts for part in names)]
    if kind == "loha":
        absent += [(TOGETHER[part],) for part in TOGETHER if part in parts and TOGETHER[part] not in parts]
    if kind == "lokr":
        absent += [("w2_a",)] if "t2" in parts and "w2_a" not in parts else []
    lacking = " and ".join(dict.fromkeys(" or ".join(names) for names in absent))
    return (
        {
            found.key: f"{found.key!r} is a part of {kind}, whose {lacking} {shown(name)} lacks"
            for found in own
            if absent and found.role.kind != "bias"
        }
        | {
            found.key: f"{found.key!r} is given twice for {shown(name)}, as a matrix and as the factors of one"
            for role, found in parts.items()
            if kind == "lokr" and role in ("w1", "w2") and {f"{role}_a", f"{role}_b"} & set(parts)
        }
        | {
            found.key: f"{found.key!r} is for factors, and {shown(name)} has {kind}"
            for found in own
            if kind in ("diff", "ia3") and found.role.kind == "any"
        }
    )


def _layer(
    name: Name, kind: str, tensors: Mapping[str, np.ndarray], shape: Shape, scale: Scale
) -> tuple[Layer | None, str | None]:
    """The layer, or what is wrong with its alpha."""
    own = dict(tensors)
    alpha = own.pop("alpha", None)
    if kind == "ia3":
        return Layer(name.module, kind, {"l": _multiplier(own, shape)}), None
    magnitude = own.pop("dora_scale", None)
    if magnitude is not None:
        # An axis of size 1 is one that the norm goes over. Of one number both do, and all is one output.
        of_inputs = magnitude.ndim > 1 and magnitude.shape[0] == 1 and shape[0] > 1
        own["input_magnitude" if of_inputs else "magnitude"] = magnitude
    if "magnitude" in own and magnitude is None:
        own["magnitude"] = own["magnitude"].reshape(-1)  # PEFT's, always of outputs: (1, out, 1, 1) of a convolution
    if kind == "diff":
        return Layer(name.module, kind, own), None
    number = None if alpha is None else float(np.asarray(alpha, np.float64).reshape(-1)[0])
    if number is not None and not math.isfinite(number):
        return None, f"is {number}"
    rank = KINDS[kind].rank
    assert rank is not None
    r = rank(own)
    return Layer(
        name.module, kind, own, scale(name, r, number) if r else 1.0
    ), None  # LoKr of whole matrices has no rank


def _multiplier(tensors: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
    """LyCORIS keeps l - 1, and which side it multiplies."""
    window = [1] * (len(shape) - 2)
    factor = 1 + np.asarray(tensors["weight"], np.float32).reshape(-1)
    return factor.reshape(1, -1, *window) if bool(np.asarray(tensors["on_input"]).reshape(-1)[0]) else factor.reshape(
        -1, 1, *window)  # fmt: skip


# -- shapes ------------------------------------------------------------------------------------------------------------


def misshaped(kind: str, tensors: Mapping[str, np.ndarray], weight: Shape) -> list[tuple[str, str]]:
    """Pairs (name of a tensor, its shape as it should be): all that do not fit a weight of this shape.

    A convolution with a window of 1 and a linear layer are the same to a file: their factors have four axes or two.
    """
    if kind != "diff" and len(weight) < 2:
        return [(name, "none, the parameter being a vector,") for name in tensors]
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    checks = _SHAPES[kind](shapes, weight) | _vectors(weight)
    return [
        (name, " or ".join(str(shape) for shape in allowed[: _SHOWN.get(name, 1)]) or "sides that divide the weight's")
        for name, allowed in checks.items()
        if name in shapes and shapes[name] not in allowed
    ]


Allowed: TypeAlias = dict[str, list[Shape]]
_SHOWN = {"dora_scale": 2}  # of the allowed shapes, in an error; of others the one with the weight's axes


def _vectors(weight: Shape) -> Allowed:
    if len(weight) < 2:
        return {}
    outputs, inputs, ones = weight[0], weight[1], (1,) * (len(weight) - 2)
    per_output, per_input = (outputs, 1, *ones), (1, inputs, *ones)
    more = [(outputs, 1), (1, inputs), (outputs, 1, 1, 1), (1, inputs, 1, 1)]
    return {
        "alpha": [(), (1,)],
        "dora_scale": [per_output, per_input, *(shape for shape in more if math.prod(weight[2:]) == 1)],
        "magnitude": [(outputs,), (1, outputs, *ones)],
    }


def _any_window(*shape: int, window: Shape) -> list[Shape]:
    """The shape with the window behind it, and without it, or with one, where it has one element."""
    whole = (*shape, *window)
    return [whole] if math.prod(window) > 1 else list(dict.fromkeys([whole, shape, (*shape, 1, 1)]))


def _lora(t: Mapping[str, Shape], weight: Shape) -> Allowed:
    rank, window = t["A"][0] if t["A"] else 0, weight[2:]
    up = _any_window(weight[0], rank, window=(1,) * len(window))
    if "mid" in t:
        return {"A": _any_window(rank, weight[1], window=(1,) * len(window)), "B": up, "mid": [(rank, rank, *window)]}
    return {"A": _any_window(rank, weight[1], window=window), "B": up}


def _loha(t: Mapping[str, Shape], weight: Shape) -> Allowed:
    allowed: Allowed = {}
    for i in (1, 2):
        a, b, core = f"w{i}_a", f"w{i}_b", f"t{i}"
        rank = t[b][0] if t[b] else 0
        if core in t:
            allowed |= {a: [(rank, weight[0])], b: [(rank, weight[1])], core: [(rank, rank, *weight[2:])]}
        else:
            allowed |= {a: [(weight[0], rank)], b: [(rank, math.prod(weight[1:]))]}
    return allowed


def _lokr(t: Mapping[str, Shape], weight: Shape) -> Allowed:
    """The first matrix may have any sides that divide the weight's; the second has what is left."""
    allowed: Allowed = {}
    if "w1" in t:
        one, by = t["w1"], "w1"
    else:
        one, by = (t["w1_a"][0] if t["w1_a"] else 0, t["w1_b"][-1] if t["w1_b"] else 0), "w1_b"
        rank = t["w1_b"][0] if t["w1_b"] else 0
        allowed |= {"w1_a": [(one[0], rank)], "w1_b": [(rank, one[1])]}
    if len(one) != 2 or not all(n and whole % n == 0 for n, whole in zip(one, weight[:2], strict=True)):
        return {by: []}
    outputs, inputs, window = weight[0] // one[0], weight[1] // one[1], weight[2:]
    if "w2" in t:
        return allowed | {"w2": [*_any_window(outputs, inputs, window=window), (outputs, inputs * math.prod(window))]}
    rank = t["w2_b"][0] if t["w2_b"] else 0
    if "t2" in t:
        return allowed | {"w2_a": [(rank, outputs)], "w2_b": [(rank, inputs)], "t2": [(rank, rank, *window)]}
    return allowed | {
        "w2_a": [(outputs, rank)],
        "w2_b": [(rank, inputs * math.prod(window)), *_any_window(rank, inputs, window=window)],
    }


def _ia3(t: Mapping[str, Shape], weight: Shape) -> Allowed:
    """A number per output or input, which `on_input` says; misshaped where it is neither's."""
    sides = dict.fromkeys(weight[:2])
    ones = (1,) * (len(weight) - 2)
    return {"weight": [shape for n in sides for shape in ((n,), (1, n, *ones))], "on_input": [(), (1,)]}


def _diff(t: Mapping[str, Shape], weight: Shape) -> Allowed:
    return {"added": _any_window(*weight[:2], window=weight[2:]) if len(weight) > 1 else [weight]}


_SHAPES: dict[str, Callable[[Mapping[str, Shape], Shape], Allowed]] = {
    "lora": _lora, "loha": _loha, "lokr": _lokr, "ia3": _ia3, "diff": _diff,
}  # fmt: skip
