"""The key table: which tensor of a Hugging Face checkpoint is which parameter, as data, and the algebra of its rows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
LINEAR = (1, 0)  # torch's Linear is (out, in), Flax's (in, out)
CONV = (2, 3, 1, 0)  # torch's Conv2d is (out, in, height, width), Flax's (height, width, in, out)
CONV_1D = (2, 1, 0)


class Part(NamedTuple):
    """The `number`-th of `parts` equal parts of a tensor along an axis of its own."""

    axis: int
    number: int
    parts: int


class Leaf(NamedTuple):
    """A row of the table.

    Attributes:
      path: of the parameter, "h_0/attn/query/kernel".
      keys: of the tensor in the checkpoint; those of all layers, in order, for a parameter that is stacked.
      order: the tensor's axes in the parameter's order; None where they are the same.
      part: of the tensor that is the parameter; None for all of it.
      stacked: the parameter has the layers on an axis before its own.
    """

    path: str
    keys: tuple[str, ...]
    order: tuple[int, ...] | None = None
    part: Part | None = None
    stacked: bool = False


def leaf(path: str, key: str, order: tuple[int, ...] | None = None, part: Part | None = None) -> Leaf:
    """A row with one key."""
    return Leaf(path, (key,), order, part)


def linear(path: str, key: str, *, bias: bool = True) -> list[Leaf]:
    """The rows of torch's Linear."""
    rows = [leaf(f"{path}/kernel", f"{key}.weight", LINEAR)]
    return [*rows, leaf(f"{path}/bias", f"{key}.bias")] if bias else rows


def convolution(path: str, key: str) -> list[Leaf]:
    """The rows of torch's Conv2d."""
    return [leaf(f"{path}/kernel", f"{key}.weight", CONV), leaf(f"{path}/bias", f"{key}.bias")]


def norm(path: str, key: str) -> list[Leaf]:
    """The rows of a LayerNorm or a GroupNorm."""
    return [leaf(f"{path}/scale", f"{key}.weight"), leaf(f"{path}/bias", f"{key}.bias")]


def embedding(path: str, key: str) -> list[Leaf]:
    """The row of an embedding."""
    return [leaf(f"{path}/embedding", f"{key}.weight")]


def layered(rows: Iterable[Leaf], layers: int, *, scan: bool, name: str = "h") -> list[Leaf]:
    """Rows of all layers from those of one, whose keys have "{i}" for the layer's number.

    >>> [row.path for row in layered(linear("fc", "h.{i}.fc", bias=False), 2, scan=False)]
    ['h_0/fc/kernel', 'h_1/fc/kernel']
    >>> layered(linear("fc", "h.{i}.fc", bias=False), 2, scan=True)[0].keys
    ('h.0.fc.weight', 'h.1.fc.weight')
    """
    rows, numbers = list(rows), range(layers)
    if scan:
        return [
            row._replace(path=f"{name}/{row.path}", keys=tuple(_of(row, i) for i in numbers), stacked=True)
            for row in rows
        ]
    return [row._replace(path=f"{name}_{i}/{row.path}", keys=(_of(row, i),)) for i in numbers for row in rows]


def _of(row: Leaf, layer: int) -> str:
    (key,) = row.keys
    return key.replace("{i}", str(layer))


# -- shapes and slices -------------------------------------------------------------------------------------------------


def tensor_shape(row: Leaf, shape: Shape) -> Shape:
    """The shape that each tensor of a row has in the checkpoint, `shape` being the parameter's.

    >>> tensor_shape(leaf("query/kernel", "qkv.weight", LINEAR, Part(0, 0, 3)), (4, 5))
    (15, 4)
    """
    own = shape[1:] if row.stacked else shape
    lengths = list(own)
    for axis, origin in enumerate(row.order or ()):
        lengths[origin] = own[axis]
    if row.part:
        lengths[row.part.axis] *= row.part.parts
    return tuple(lengths)


def tensor_slices(row: Leaf, shape: Shape, index: Sequence[slice]) -> tuple[slice, ...]:
    """Slices of each of a row's tensors that hold what is at `index` of the parameter, which has `shape`.

    >>> tensor_slices(leaf("key/kernel", "qkv.weight", LINEAR, Part(0, 1, 3)), (4, 5), (slice(0, 2), slice(None)))
    (slice(5, 10, None), slice(0, 2, None))
    """
    whole = tensor_shape(row, shape)
    own, index = (shape[1:], index[1:]) if row.stacked else (shape, index)
    found = [slice(0, n) for n in whole]
    for axis, place in enumerate(row.order or range(len(own))):
        start, stop, _ = index[axis].indices(own[axis])
        offset = 0
        if row.part and row.part.axis == place:
            offset = row.part.number * (whole[place] // row.part.parts)
        found[place] = slice(offset + start, offset + stop)
    return tuple(found)


def to_tensor(row: Leaf, parameter: np.ndarray) -> np.ndarray:
    """A view of a parameter, or of a layer of it, with its axes in the tensor's order."""
    return parameter if row.order is None else parameter.transpose(np.argsort(row.order))


def to_tensors(table: Iterable[Leaf], parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint from parameters: what reading undoes.

    >>> table = [leaf(name, "qk", LINEAR, Part(0, i, 2)) for i, name in enumerate("qk")]
    >>> to_tensors(table, {"q": np.zeros((3, 2)), "k": np.ones((3, 2))})["qk"].shape
    (4, 3)
    """
    parts: dict[str, dict[int, np.ndarray]] = {}
    axes: dict[str, int] = {}
    for row in table:
        value = parameters[row.path]
        for i, key in enumerate(row.keys):
            own = to_tensor(row, value[i] if row.stacked else value)
            parts.setdefault(key, {})[row.part.number if row.part else 0] = own
            axes[key] = row.part.axis if row.part else 0
    whole = {
        key: np.concatenate([own[i] for i in sorted(own)], axes[key]) if len(own) > 1 else own[0]
        for key, own in parts.items()
    }
    return {key: np.asarray(tensor, order="C") for key, tensor in whole.items()}  # which leaves a scalar a scalar


# -- comparison --------------------------------------------------------------------------------------------------------


def differences(
    table: Iterable[Leaf], shapes: Mapping[str, Shape], found: Mapping[str, Shape], *, optional: Iterable[str] = ()
) -> list[str]:
    """All that keeps a checkpoint from being the model's: a line for each key.

    Args:
      table: of the model.
      shapes: of its parameters, by path.
      found: the shapes of the checkpoint's tensors.
      optional: keys that may be there and are not read.
    """
    expected = {key: tensor_shape(row, shapes[row.path]) for row in table for key in row.keys}
    allowed = {*expected, *optional}
    wrong = [f"{key!r} is missing, expected shape {shape}" for key, shape in expected.items() if key not in found]
    wrong += [f"{key!r} is unexpected, shape {shape}" for key, shape in found.items() if key not in allowed]
    return wrong + [
        f"{key!r} has shape {found[key]}, the config says {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
