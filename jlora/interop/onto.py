"""Layers of a foreign adapter onto the parameters of a JAX model, and back."""

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.adapted.adapted import Adapted, check_activations, from_arrays
from jlora.adapted.select import Extra
from jlora.interop import natives
from jlora.interop.fitting import misfit
from jlora.interop.forms import Form, experts_form, form_of
from jlora.interop.layer import Layer, merged
from jlora.interop.natives import NATIVE, Native
from jlora.methods import Method, tied, together
from jlora.models.tensors import Leaf, to_tensor, to_tensors
from jlora.transform.sites import Site, Target

AS_THEY_ARE = ("full", "diff", "rows")  # kinds that become leaves trained as they are
SHOWN = 20  # faults in an error


class Piece(NamedTuple):
    """A layer, and the row of the key table that it goes to: which of the stacked layers, if any."""

    layer: Layer
    row: Leaf
    number: int


def place(
    layers: Sequence[Layer],
    params: Any,
    rows: Iterable[Leaf],
    *,
    kinds: Mapping[str, Native] = NATIVE,
    origin: str = "the adapter",
) -> Adapted:
    """An `Adapted` of the parameters, with the factors that the layers say: bit for bit where they are float32.

    Args:
      layers: of the file.
      params: the base, concrete.
      rows: the model's key table: which tensor of a checkpoint is which parameter.
      kinds: how each kind of layer is trained: `NATIVE`, with changes where the file knows more than its tensors do.
      origin: what the errors name.

    Raises:
      ValueError: for a layer that has no parameter, or does not fit it, or has a form that jlora does not train; for
        stacked layers of which some have no factors, or others. All of them in one error.
    """
    params = tree.canonical(params)
    named, _ = tree.leaves(params)
    pieces, wrong = _found(layers, named, rows)
    factors: dict[str, dict[str, Any]] = {}
    targets: list[tuple[Target, Layer]] = []
    extras: list[Extra] = []
    for path, own in pieces.items():
        try:
            if own[0].layer.kind in AS_THEY_ARE or own[0].layer.parameter == "bias":
                extra, arrays = _extra(path, own, named[path])
                extras.append(extra)
                factors[path] = arrays
                continue
            target, layer, arrays = _target(path, own, named[path], kinds)
            targets.append((target, layer))
            factors[path] = arrays
        except ValueError as error:
            wrong.append(str(error))
    wrong = list(dict.fromkeys(wrong))
    if wrong:
        listed = "\n  ".join([*wrong[:SHOWN], *([f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else [])])
        raise ValueError(f"{origin} does not fit the model:\n  {listed}")
    parted: dict[str, list[str]] = defaultdict(list)
    for path, own in pieces.items():
        if own[0].row.part is not None:
            parted[own[0].layer.key].append(path)
    method, sites = _method(targets, kinds, list(parted.values()))
    order = {path: i for i, path in enumerate(named)}
    sites = tuple(sorted(sites, key=lambda site: order[site.path]))
    extras.sort(key=lambda extra: order[extra.path])
    arrays_of = {path: {name: jnp.asarray(x) for name, x in factors[path].items()} for path in named if path in factors}
    adapted = from_arrays(params, arrays_of, method, sites, tuple(extras))
    check_activations(adapted)
    return adapted


def _found(
    layers: Sequence[Layer], named: Mapping[str, Any], rows: Iterable[Leaf]
) -> tuple[dict[str, list[Piece]], list[str]]:
    """The layers by the parameter that they go to, and a line for each that goes nowhere."""
    by_key: dict[str, list[tuple[Leaf, int]]] = defaultdict(list)
    lengths: dict[str, int] = {}
    for row in rows:
        lengths[row.path] = len(row.keys) if row.stacked else 1
        for number, key in enumerate(row.keys):
            by_key[key].append((row, number))
    pieces: dict[str, list[Piece]] = defaultdict(list)
    wrong: list[str] = []
    for layer in layers:
        places = by_key.get(layer.key, [])
        for row, number in places:
            if row.path not in named:
                wrong.append(f"{row.path!r}, the parameter of {layer.key!r}, is not among the parameters")
            elif any(piece.number == number for piece in pieces[row.path]):
                wrong.append(f"{layer.key!r} is there twice")
            else:
                pieces[row.path].append(Piece(layer, row, number))
        if not places and not layer.optional:
            near = difflib.get_close_matches(layer.key, by_key, n=1, cutoff=0.0) if len(wrong) < SHOWN else []
            wrong.append(f"{layer.key!r} is no tensor of the model{f' (the closest is {near[0]!r})' if near else ''}")
    found = {path: sorted(own, key=lambda piece: piece.number) for path, own in pieces.items() if own}
    for path, own in found.items():
        wrong += _uneven(path, own, lengths[path])
    return found, wrong


def _uneven(path: str, own: Sequence[Piece], length: int) -> list[str]:
    """Why stacked layers cannot share one factor; nothing where they can."""
    if len(own) != length:
        return [
            f"{path!r} stacks {length} layers, and the adapter has {len(own)} of them: load the model with scan=False"
        ]
    first = own[0].layer
    for piece in own[1:]:
        layer = piece.layer
        if (layer.kind, layer.rank, layer.scale, set(layer.tensors)) != (
            first.kind, first.rank, first.scale, set(first.tensors),
        ):  # fmt: skip
            return [
                f"{path!r} stacks layers, of which {first.module!r} and {layer.module!r} have other ranks, scales or "
                "forms: load the model with scan=False"
            ]
    return []


def _target(
    path: str, own: Sequence[Piece], leaf: Any, kinds: Mapping[str, Native]
) -> tuple[Target, Layer, dict[str, np.ndarray]]:
    row, stacked = own[0].row, own[0].row.stacked
    shape = tuple(leaf.shape)
    if own[0].layer.kind == "experts":
        form = _of_experts(own[0].layer, row, shape)
    else:
        form = form_of(row, shape[1:] if stacked else shape, table=own[0].layer.kind == "table")
    whole = _outputs_first(form, row)
    for piece in own:
        if wrong := misfit(piece.layer, whole):
            raise ValueError(wrong)
    layers = [natives.plain(piece.layer, whole) for piece in own]
    native = _native(layers[0], kinds)
    parts = [native.arrays(natives.part_of(layer, row, form), form) for layer in layers]
    arrays = natives.of_layers(parts, native) if stacked else parts[0]
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}
    site = stacked_site(form.site, shape[0] if stacked else None, str(leaf.dtype))
    rank = layers[0].rank
    return Target(site, rank, native.alpha(layers[0])), layers[0], arrays


def _of_experts(layer: Layer, row: Leaf, shape: tuple[int, ...]) -> Form:
    """(experts, outputs, inputs), or inputs first where only that fits."""
    inputs, outputs = layer.tensors["A"].shape[-1], len(layer.tensors["B"])
    form = experts_form(row, shape)
    if form.shape[1:] == (inputs, outputs) != (outputs, inputs):
        return experts_form(row, shape, 1)
    if form.shape[1:] != (outputs, inputs):
        raise ValueError(f"{layer.key!r} has shape {form.shape}, and the adapter {inputs} inputs and {outputs} outputs")
    return form


def _outputs_first(form: Form, row: Leaf) -> tuple[int, ...]:
    """The torch tensor's shape, with all of its parts and the outputs first."""
    lengths = list(form.shape)
    if row.part:
        lengths[row.part.axis] *= row.part.parts
    return tuple(reversed(lengths)) if form.layout == "in_out" else tuple(lengths)


def _native(layer: Layer, kinds: Mapping[str, Native]) -> Native:
    if layer.kind not in kinds:
        raise ValueError(f"{layer.key!r} is of kind {layer.kind}, which jlora merges and does not train")
    return kinds[layer.kind]


def stacked_site(site: Site, layers: int | None, dtype: str) -> Site:
    """The site with an axis of stacked layers before its own, and the base's dtype."""
    if layers is None:
        return dataclasses.replace(site, dtype=dtype)
    up = lambda axes: tuple(i + 1 for i in axes)
    return Site(site.path, (layers, *site.shape), dtype, up(site.in_axes), up(site.out_axes), (0,), site.kind)


def _extra(path: str, own: Sequence[Piece], leaf: Any) -> tuple[Extra, dict[str, np.ndarray]]:
    """A leaf that is trained as it is: its value after the adapter, or the rows that it replaces."""
    row, layer = own[0].row, own[0].layer
    own_values = layer.kind in AS_THEY_ARE  # whatever the base has: shapes will do, and nothing is copied
    base = np.zeros(leaf.shape, np.float32) if own_values else np.asarray(jax.device_get(tree.dense(leaf)), np.float32)
    start = base[0] if row.stacked else base
    order = row.order or tuple(range(start.ndim))
    whole = list(start.transpose(np.argsort(order)).shape) if len(order) == start.ndim else []
    if row.part:
        whole[row.part.axis] *= row.part.parts
    for piece in own:
        if wrong := misfit(piece.layer, tuple(whole)):
            raise ValueError(wrong)
    if layer.kind == "rows":
        if row.stacked or row.part or row.order:
            raise ValueError(f"{path!r}: {layer.key!r} is trained in rows, which here are no rows of one table")
        rows = tuple(int(i) for i in layer.tensors["rows"])
        if any(not 0 <= i < len(base) for i in rows):
            raise ValueError(f"{path!r} has {len(base)} rows, and the adapter trained row {max(rows)}")
        return Extra(path, rows), {"rows": np.asarray(layer.tensors["values"], np.float32)}
    if layer.kind == "diff":
        shape = base.shape[1:] if row.stacked else base.shape
        parts = [natives.part_of_tensors(piece.layer, row, shape).tensors["added"] for piece in own]
        order = row.order or tuple(range(len(shape)))
        added = [np.asarray(part, np.float32).transpose(order).reshape(shape) for part in parts]
        return Extra(path, added=layer.scale), {"added": np.stack(added) if row.stacked else added[0]}
    values = []
    for piece in own:
        start = base[piece.number] if row.stacked else base
        order = row.order or tuple(range(start.ndim))
        tensor = start.transpose(np.argsort(order))  # torch's axes
        value = merged(natives.part_of_tensors(piece.layer, row, tensor.shape), tensor)
        values.append(value.transpose(order))
    return Extra(path), {"value": np.stack(values) if row.stacked else values[0]}


def _method(
    targets: Sequence[tuple[Target, Layer]], kinds: Mapping[str, Native], parted: Sequence[Sequence[str]]
) -> tuple[Method, Sequence[Target]]:
    """One method, or several together, and the targets with their numbers; parts of one torch tensor share their A."""
    groups: dict[Any, list[tuple[Target, Layer]]] = defaultdict(list)
    for target, layer in targets:
        groups[natives.group(layer)].append((target, layer))
    methods: list[tuple[Method, list[Target]]] = []
    for (kind, *_), members in groups.items():
        chosen = [target for target, _ in members]
        method = kinds[kind].method(chosen, [layer for _, layer in members])
        own = {target.path for target in chosen}
        shared = [group for group in parted if len(group) > 1 and own.issuperset(group)]
        names = natives.shared(method)
        methods.append((tied(method, shared, names) if shared and names else method, chosen))
    if not methods:
        return natives.nothing(), []
    if len(methods) == 1:
        return methods[0][0], methods[0][1]
    method = together(*((method, _patterns(chosen)) for method, chosen in methods))
    return method, [
        Target(target.site, target.rank, target.alpha, part)
        for part, (_, chosen) in enumerate(methods)
        for target in chosen
    ]


def _patterns(targets: Sequence[Target]) -> tuple[str, ...]:
    return tuple(f"^{natives.escaped(target.path)}$" for target in targets)


# -- back --------------------------------------------------------------------------------------------------------------


def layers_of(adapted: Adapted, rows: Iterable[Leaf]) -> list[Layer]:
    """The layers of an adapter, as a torch model of this key table has them: the inverse of `place`.

    A torch tensor of which several parameters are parts (GPT-2's c_attn) gets one layer: with the A that they share, or
    with theirs one below the other, each with the outputs of its own part, which is a rank of as many times r.

    Raises:
      ValueError: for a parameter that is no tensor of the model, or a method that has no torch form.
    """
    table = {row.path: row for row in rows}
    found: dict[str, list[tuple[Leaf, Layer]]] = defaultdict(list)
    buffers = adapted.buffers
    for site in adapted.sites:
        row = _row(table, site.path)
        arrays = {n: np.asarray(x) for n, x in (adapted.factors[site.path] | buffers.get(site.path, {})).items()}
        method = adapted.method.of(site)
        experts = bool(site.stack_axes) and not row.stacked
        if experts:
            form = experts_form(row, site.shape, (row.order or (0, 1, 2))[site.in_axes[0]])
        else:
            form = form_of(row, site.shape[1:] if row.stacked else site.shape, table=site.kind == "embedding")
        for number, key in enumerate(row.keys):
            own = natives.of_layer(arrays, method, number) if row.stacked else arrays
            module, _, parameter = key.rpartition(".")
            found[key].append((row, natives.layer_of(module, parameter, own, method, site, form)))
    layers = [natives.fused(key, parts) for key, parts in found.items()]
    named, _ = tree.leaves(adapted.base)
    whole: dict[str, dict[int, Layer]] = defaultdict(dict)
    for extra in adapted.extras:
        row = _row(table, extra.path)
        for layer in _layers_of_extra(extra, adapted.factors[extra.path], row):
            whole[layer.key][row.part.number if row.part else 0] = layer
    layers += [_joined(key, parts, table, named) for key, parts in whole.items()]
    position = {key: i for i, key in enumerate(key for row in table.values() for key in row.keys)}
    return sorted(layers, key=lambda layer: position[layer.key])  # of one module, in the order of the table


def base_tensor(params: Any, key: str, rows: Iterable[Leaf]) -> np.ndarray:
    """A tensor of the base's checkpoint, float32: from all parameters that are its parts."""
    named, _ = tree.leaves(params)
    own = [row for row in rows if key in row.keys]
    parts = {}
    for row in own:
        leaf = np.asarray(jax.device_get(tree.dense(named[row.path])), np.float32)
        parts[row.path] = leaf[row.keys.index(key)] if row.stacked else leaf
    return to_tensors([row._replace(keys=(key,), stacked=False) for row in own], parts)[key]


def _row(table: Mapping[str, Leaf], path: str) -> Leaf:
    if path not in table:
        raise ValueError(f"{path!r} is no tensor of the model's checkpoints: its key table does not have it")
    return table[path]


def _layers_of_extra(extra: Extra, arrays: Mapping[str, Any], row: Leaf) -> list[Layer]:
    layers = []
    for number, key in enumerate(row.keys):
        module, _, parameter = key.rpartition(".")
        if extra.rows is not None:
            tensors = {"rows": np.asarray(extra.rows), "values": np.asarray(arrays["rows"])}
            layers.append(Layer(module, "rows", tensors, parameter=parameter))
            continue
        name, kind, scale = ("value", "full", 1.0) if extra.added is None else ("added", "diff", extra.added)
        value = np.asarray(arrays[name])
        value = to_tensor(row, value[number] if row.stacked else value)
        layers.append(Layer(module, kind, {name: np.ascontiguousarray(value)}, scale, parameter))
    return layers


def _joined(key: str, own: Mapping[int, Layer], table: Mapping[str, Leaf], named: Mapping[str, Any]) -> Layer:
    """One layer of a torch tensor from those of the leaves that are its parts; others are what they are in the base."""
    rows = {row.part.number: row for row in table.values() if row.part is not None and key in row.keys}
    first = next(iter(own.values()))
    if not rows:
        return first
    if len({(layer.kind, layer.scale) for layer in own.values()}) > 1 or first.kind == "rows":
        raise ValueError(f"the parts of {key!r} are trained in several ways, which a torch file cannot say")
    (name,) = first.tensors
    parts = []
    for number, row in sorted(rows.items()):
        if number in own:
            parts.append(own[number].tensors[name])
            continue
        leaf = np.asarray(jax.device_get(tree.dense(named[row.path])), np.float32)
        start = to_tensor(row, leaf[row.keys.index(key)] if row.stacked else leaf)
        parts.append(np.zeros_like(start) if first.kind == "diff" else start)
    part = next(iter(rows.values())).part
    assert part is not None
    return first._replace(tensors={name: np.concatenate(parts, part.axis)})
