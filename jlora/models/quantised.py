"""Parameters in few bits: read from a checkpoint that has them so, or quantised while they are read.

A kernel is (in, out), or (layers, in, out); its codes are those of the matrix (out, in), row-major. Where the inputs
are whole blocks, codes and scales keep both axes, else they are one row ("flat").
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models import bnb, files
from jlora.models.tensors import Leaf, tensor_slices, to_tensor
from jlora.quant import nested
from jlora.quant.choice import check_block, check_double, is_head
from jlora.quant.formats import Format, format_of
from jlora.quant.layout import Layout, layout_of
from jlora.quant.nested import GROUP, Nested
from jlora.quant.place import nest, shardings_of
from jlora.quant.quantised import Quantised, encode

Sharding = jax.sharding.Sharding
CHUNK = 2**18  # weights that are read, or quantised, at a time


class Scheme(NamedTuple):
    """How weights are quantised: the format, weights to a scale, whether the scales are in 8 bits."""

    number: Format
    block: int
    double: bool


Choose = Callable[[str, jax.ShapeDtypeStruct], Scheme | None]


def choice(quantize: Any, block: int | None, double: bool | None) -> Choose:
    """The scheme of a kernel, by its path and shape, from the arguments of `load`."""
    if quantize is None:
        if block is not None or double is not None:
            raise ValueError(f"load: block={block}, double={double} say how to quantize=, which is None")
        return lambda path, like: None
    names = quantize if callable(quantize) else lambda path, like: None if is_head(path) else quantize
    fixed = None if callable(quantize) else format_of(quantize)

    def choose(path: str, like: jax.ShapeDtypeStruct) -> Scheme | None:
        name = names(path, like)
        number = None if name is None else fixed or format_of(name)
        return number and Scheme(number, check_block(number, block), check_double(number, double))

    if fixed:
        choose("", jax.ShapeDtypeStruct((), jnp.float32))  # which raises for a block that does not fit
    return choose


def is_matrix(row: Leaf, like: jax.ShapeDtypeStruct) -> bool:
    """Whether a row is the kernel of a linear layer, (in, out)."""
    return row.path.endswith("/kernel") and len(like.shape) == 2 + row.stacked


class _Matrix(NamedTuple):
    """A kernel as rows of outputs, and how its codes lie."""

    row: Leaf
    like: jax.ShapeDtypeStruct
    layout: Layout
    number: Format

    @property
    def outputs(self) -> int:
        return self.like.shape[-1]

    @property
    def inputs(self) -> int:
        return self.like.shape[-2]

    @property
    def layers(self) -> int:
        return self.like.shape[0] if self.row.stacked else 1

    @property
    def flat(self) -> bool:
        return len(self.layout.tail) == 2

    def region(self, index: Sequence[slice], weights: int) -> tuple[range, slice, slice]:
        """Layers, rows and columns behind an index of an array that has so many weights to an element; 0 for a row."""
        stack, own = (index[0], index[1:]) if self.row.stacked else (slice(0, 1), index)
        layers, columns = range(stack.start, stack.stop), slice(0, self.inputs)
        if not self.flat:
            at = slice(own[1].start * weights, own[1].stop * weights) if weights else columns
            return layers, own[0], at
        if own[0].stop * weights >= self.outputs * self.inputs and own[0].start == 0:
            return layers, slice(0, self.outputs), columns
        start, stop = (-(-at * weights // self.inputs) for at in (own[0].start, own[0].stop))
        return layers, slice(start, min(stop, self.outputs)), columns


# Codes and scales of some rows and columns of a layer's matrix, written where they are to be.
Fill = Callable[[int, slice, slice, np.ndarray, np.ndarray], None]


def _matrix(row: Leaf, like: jax.ShapeDtypeStruct, number: Format, block: int) -> _Matrix:
    last = len(like.shape) - 1
    layout = layout_of(like.shape, (last,), (last - 1,), tuple(range(last - 1)), number, block)
    return _Matrix(row, like, layout, number)


# -- 4 bits of a checkpoint --------------------------------------------------------------------------------------------


def read(row: Leaf, tensors: Sequence[files.Tensor], like: jax.ShapeDtypeStruct, place: Sharding | None) -> Quantised:
    """A parameter that the checkpoint has in 4 bits, code for code.

    The scales stay in 8 bits where the parameter has groups of 256 of them to itself; the thirds of GPT-2's matrix that
    do not, get theirs in float32, which is exact.

    Raises:
      ValueError: if its layers are not quantised alike, or blocks cross from one of its tensor's parts to the next.
    """
    kinds = {(t.packed.number, t.packed.block) if t.packed else None for t in tensors}
    if len(kinds) > 1:
        raise ValueError(
            f"{row.keys[0]!r} and the other layers of {row.path!r} are not in the same format and blocks: load them "
            "one by one, with scan=False"
        )
    if not is_matrix(row, like):
        raise ValueError(f"{row.keys[0]!r} is in 4 bits, and {row.path!r} is no kernel of a linear layer")
    packed: list[bnb.Packed] = [tensor.packed for tensor in tensors]
    of = _matrix(row, like, packed[0].number, packed[0].block)
    number, block = of.outputs * of.inputs, packed[0].block
    part = row.part.number if row.part else 0
    if row.part and number % block:
        raise ValueError(
            f"{row.keys[0]!r} of shape {tensors[0].shape} is {row.part.parts} parameters, and its blocks of {block} "
            "cross from one to the next: load the checkpoint that it was made from, with quantize="
        )
    blocks = -(-number // block)
    own = not row.part or blocks % GROUP == 0
    double = own and all(p.second is not None and p.table is None for p in packed)

    def fill(layer: int, rows: slice, columns: slice, codes: np.ndarray, scales: np.ndarray) -> None:
        p = packed[layer]
        first = (part * of.outputs + rows.start) * of.inputs  # in weights
        scale = bnb.elements if double else bnb.scales_of
        source: Any = p.scales if double else p
        for out, weights, take in (
            (codes, 2, lambda start, stop: bnb.codes_of(p, start, stop)),
            (scales, block, lambda start, stop: scale(source, start, stop)),
        ):
            if of.flat:
                _cut(take, first // weights, slice(0, 1), 1, out.reshape(-1, 1))
            else:
                at = slice(columns.start // weights, columns.stop // weights)
                _cut(take, first // weights, at, of.inputs // weights, out)

    codes, scales, where = _assembled(of, fill, np.uint8 if double else np.float32, double, place)
    scales = jax.device_put(scales) if place is None else scales
    if not double:
        return Quantised(codes, scales, of.number, of.layout, like.dtype)
    groups = -(-blocks // GROUP)
    second = np.stack([bnb.elements(p.second, part * groups, (part + 1) * groups) for p in packed if p.second])
    offset = np.asarray([p.offset for p in packed], np.float32)
    lead = (lambda x: x) if row.stacked else (lambda x: x[0])
    put = lambda x, at: _put(lead(x), at)
    inner = Nested(scales, put(second, where and where.scales), put(offset, where and where.offset))
    return Quantised(codes, inner, of.number, of.layout, like.dtype)


def _cut(take: Callable[[int, int], np.ndarray], first: int, columns: slice, width: int, out: np.ndarray) -> None:
    """Fills `out` with columns of a matrix of this width, whose rows are a vector from its element `first` on."""
    step = max(CHUNK // width, 1)
    for start in range(0, len(out), step):
        stop = min(start + step, len(out))
        out[start:stop] = take(first + start * width, first + stop * width).reshape(-1, width)[:, columns]


# -- quantised while it is read ----------------------------------------------------------------------------------------


def quantise(
    row: Leaf, tensors: Sequence[files.Tensor], like: jax.ShapeDtypeStruct, scheme: Scheme, place: Sharding | None
) -> Quantised:
    """A parameter whose codes are made of some rows at a time: neither it nor a layer of it is ever held.

    Raises:
      ValueError: for a weight that is not finite, and a mesh that cuts through a block.
    """
    of = _matrix(row, like, scheme.number, scheme.block)

    def fill(layer: int, rows: slice, columns: slice, codes: np.ndarray, scales: np.ndarray) -> None:
        wanted = columns if scheme.number.blocks else slice(0, of.inputs)  # a channel's scale is of the whole row
        width = wanted.stop - wanted.start
        step = _rows_at_a_time(rows.stop - rows.start, width, scheme.block if of.flat else 1)
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            chunk = _rows_of(of, tensors[layer], layer, slice(start, stop), wanted)
            if not np.isfinite(chunk).all():  # the largest of a NaN is not always one, compiled
                raise ValueError(f"{row.keys[layer]!r} is not finite: a block with a NaN or an infinity has no scale")
            own, largest = _encoded(chunk, scheme)
            for out, found, weights in ((codes, own, 2), (scales, largest, scheme.block)):
                if of.flat:
                    at = (start - rows.start) * of.inputs // weights
                    out.reshape(-1)[at : at + found.size] = found
                else:
                    high = stop - start
                    cut = columns if found.size == high * of.inputs and not scheme.number.blocks else slice(None)
                    out[start - rows.start : stop - rows.start] = found.reshape(high, -1)[:, cut]

    codes, scales, where = _assembled(of, fill, np.float32, scheme.double, place)
    stack = int(row.stacked)
    if scheme.double and place is not None:
        scales = nest(scales, stack, where)
    elif place is None:
        scales = _nested(scales, stack) if scheme.double else jax.device_put(scales)
    return Quantised(codes, scales, of.number, of.layout, like.dtype)


def _rows_at_a_time(rows: int, width: int, block: int) -> int:
    """As many rows as there is room for: a divisor of all, for which one program does; whole blocks."""
    least = block // math.gcd(block, width)
    most = max(CHUNK // width, 1)
    fits = (n for n in range(min(most, rows), 0, -1) if rows % n == 0 and n % least == 0)
    return next(fits, min(rows, max(most // least, 1) * least))


def _rows_of(of: _Matrix, tensor: files.Tensor, layer: int, rows: slice, columns: slice) -> np.ndarray:
    """Some of a layer, (outputs, inputs), in the parameter's dtype."""
    out = np.empty((rows.stop - rows.start, columns.stop - columns.start), of.like.dtype)
    stack = (slice(layer, layer + 1),) if of.row.stacked else ()
    files.read_into(to_tensor(of.row, out.T), tensor, tensor_slices(of.row, of.like.shape, (*stack, columns, rows)))
    return out


def _encoded(w: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows of a matrix, as vectors. Blocks are filled up to a power of two: few programs do."""
    number, block = scheme.number, scheme.block
    blocks = w.size // block if number.blocks and w.size % block == 0 else 0
    if blocks:
        filled = np.zeros((2 ** (blocks - 1).bit_length(), block), w.dtype)
        filled[:blocks] = w.reshape(blocks, block)
        w = filled
    found = _encoder(number, block)(w)
    codes, scales = np.asarray(found.codes), np.asarray(found.scales)
    return (codes[:blocks] if blocks else codes).reshape(-1), (scales[:blocks] if blocks else scales).reshape(-1)


@functools.lru_cache(maxsize=16)
def _encoder(number: Format, block: int) -> Callable[[np.ndarray], Quantised]:
    """The program that quantises rows of a matrix."""
    layout = lambda w: layout_of(w.shape, (0,), (1,), (), number, block)
    return jax.jit(lambda w: encode(w, number, layout(w), 1, double=False))


def _nested(scales: np.ndarray, stack: int) -> Nested:
    """Scales in 8 bits, layer by layer; NumPy puts them together, since a program for each shape is dearer."""
    layers = [jax.device_get(_nest(x.reshape(-1))) for x in (scales if stack else scales[None])]
    codes, second, offset = (np.stack(found) for found in zip(*map(dataclasses.astuple, layers), strict=True))
    found = Nested(codes.reshape(-1, *scales.shape[stack:]), second, offset)
    own = found if stack else jax.tree.map(lambda x: x[0], found)
    put: Nested = jax.device_put(own)
    return put


@jax.jit
def _nest(scales: jax.Array) -> Nested:
    return nested.encode(scales, 0)


# -- where they go -----------------------------------------------------------------------------------------------------


def _assembled(of: _Matrix, fill: Fill, dtype: Any, double: bool, place: Sharding | None) -> tuple[Any, Any, Any]:
    """Codes, scales in a dtype (on the host without `place`), and where the leaf's scales go (None without)."""
    encoded = lambda w: encode(w, of.number, of.layout, 1, double)
    shapes = jax.eval_shape(encoded, of.like)
    level: Any = shapes.scales.codes if isinstance(shapes.scales, Nested) else shapes.scales
    if place is None:
        codes, scales = files.aligned(shapes.codes.shape, shapes.codes.dtype), files.aligned(level.shape, dtype)
        for layer in range(of.layers):
            own = (x[layer] if of.row.stacked else x for x in (codes, scales))
            fill(layer, slice(0, of.outputs), slice(0, of.inputs), *own)
        return jax.device_put(codes), scales, None
    where: Any = jax.tree.map(lambda _: place, shapes)
    if isinstance(place, jax.sharding.NamedSharding):
        where = shardings_of(shapes, place, of.row.path)
    read: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    def at(given: tuple[slice, ...] | None, like: Any, weights: int, which: int) -> np.ndarray:
        index = tuple(slice(*i.indices(n)) for i, n in zip(given or (), like.shape, strict=True))
        layers, rows, columns = of.region(index, weights)
        key = (layers, rows.start, rows.stop, columns.start, columns.stop)
        if key not in read:
            read[key] = _filled(of, fill, layers, rows, columns, dtype)
        return read[key][which].reshape([i.stop - i.start for i in index])

    bits, block = (2, of.layout.block) if of.number.blocks else (1, 0)
    first = where.scales.codes if double else where.scales
    array = jax.make_array_from_callback
    codes_at = array(shapes.codes.shape, where.codes, lambda index: at(index, shapes.codes, bits, 0))
    return codes_at, array(level.shape, first, lambda index: at(index, level, block, 1)), where.scales


def _filled(
    of: _Matrix, fill: Fill, layers: range, rows: slice, columns: slice, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """New arrays of codes and scales of one region of all these layers."""
    high, wide = rows.stop - rows.start, columns.stop - columns.start
    bits, block = (2, of.layout.block) if of.number.blocks else (1, wide)
    inner = (lambda n: (-(-high * wide // n),)) if of.flat else (lambda n: (high, wide // n))
    codes = files.aligned((len(layers), *inner(bits)), of.number.dtype)
    scales = files.aligned((len(layers), *inner(block)), dtype)
    for i, layer in enumerate(layers):
        fill(layer, rows, columns, codes[i], scales[i])
    return codes, scales


def _put(x: np.ndarray, where: Sharding | None) -> jax.Array:
    if where is None:
        return jax.device_put(x)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])
