"""A key table, parameters and adapters of any checkpoint, from the names and shapes of its tensors alone."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jlora.adapted.adapted import Adapted
from jlora.interop import fit, onto, shards
from jlora.interop.layer import Layer, Layout
from jlora.models.tensors import CONV, LINEAR, Leaf, leaf

ORDERS = {2: LINEAR, 3: (2, 1, 0), 4: CONV, 5: (2, 3, 4, 1, 0)}
AS_THEY_ARE = ("full", "diff", "rows")
Read = Callable[[str], np.ndarray]


def rows(shapes: fit.Shapes, layouts: Mapping[str, Layout]) -> list[Leaf]:
    """The key table: a path is the key with slashes, and the parameter's name and order of axes are Flax's.

    >>> rows({"q.weight": (6, 4), "q.bias": (6,)}, {})
    [Leaf(path='q/kernel', keys=('q.weight',), order=(1, 0), part=None, stacked=False),
     Leaf(path='q/bias', keys=('q.bias',), order=None, part=None, stacked=False)]
    """
    table = []
    for key, shape in shapes.items():
        module, _, parameter = key.rpartition(".")
        path = f"{module.replace('.', '/')}/" if module else ""
        layout = layouts.get(key, "out_in")
        if parameter != "weight" or len(shape) not in ORDERS:
            name = "scale" if parameter == "weight" else parameter
            table.append(leaf(f"{path}{name}", key))
        elif layout == "table" or (key not in layouts and module.rpartition(".")[2] in fit.TABLES):
            table.append(leaf(f"{path}embedding", key))
        else:
            table.append(leaf(f"{path}kernel", key, None if layout == "in_out" else ORDERS[len(shape)]))
    return table


def on_shapes(
    layers: Sequence[Layer], shapes: fit.Shapes, layouts: Mapping[str, Layout], read: Read | None = None
) -> tuple[Adapted, list[Leaf]]:
    """An adapter on parameters that take no memory, and their key table.

    Args:
      layers: with the base's names.
      shapes: of the base's tensors.
      layouts: of those that are adapted.
      read: key -> the base's tensor, of those whose value an adapter needs; zeros when None.

    Raises:
      ValueError: for layers that jlora does not train.
    """
    table = rows(shapes, layouts)
    needed = {layer.key for layer in layers if layer.kind in AS_THEY_ARE or layer.parameter == "bias"}
    params: dict[str, np.ndarray] = {}
    for row in table:
        key = row.keys[0]
        if read is not None and key in needed:
            value = read(key).astype(np.float32)
        else:
            value = np.broadcast_to(np.zeros((), np.float32), shapes[key])  # of any size in four bytes
        params[row.path] = value.transpose(row.order) if row.order else value
    kept = [layer for layer in layers if layer.key in shapes or not layer.optional]
    return onto.place(kept, params, table), table


def renamed(layers: Sequence[Layer], base: shards.Checkpoint, *, tied: bool = False) -> list[Layer]:
    """The layers with the base's names."""
    shapes = shapes_of(base)
    placed, added = fit.fitted(layers, shapes, fit.aliases(base.folder, shapes), tied=tied)
    named = [
        layer._replace(module=key.removesuffix(f".{layer.parameter}")) for key, own in placed.items() for layer in own
    ]
    if added:
        raise ValueError(f"{added[0].key!r} is no tensor of the base: it can be merged, and not converted")
    return named


def shapes_of(base: shards.Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's tensors."""
    return {key: entry.shape for key, entry in base.entries.items()}


def reader(base: shards.Checkpoint) -> Read:
    """Reads one tensor of floats at a time."""
    places = {entry.key: (shard.file, entry) for shard in base.shards for entry in shard.entries}

    def read(key: str) -> np.ndarray:
        file, entry = places[key]
        if entry.dtype not in shards.FLOATS:
            raise ValueError(f"{key!r} is of {entry.dtype}, expected one of {', '.join(shards.FLOATS)}")
        with file.open("rb") as opened:
            return shards.read(opened, entry)

    return read


def of_layers(layers: Sequence[Layer]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that low-rank layers are made for, where there is no base to ask.

    Raises:
      ValueError: for a layer that does not say it.
    """
    found: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        t = layer.tensors
        if layer.kind == "lora" and "mid" not in t:
            found[layer.key] = (t["B"].shape[0], *t["A"].shape[1:])
        elif layer.kind == "table":
            found[layer.key] = (t["A"].shape[1], t["B"].shape[0])
        else:
            outputs, inputs = fit.sides(layer)
            if outputs is None or inputs is None:
                raise ValueError(f"{layer.key!r} is of kind {layer.kind}, which needs the base: pass --base")
            found[layer.key] = (outputs, inputs)
    return found
