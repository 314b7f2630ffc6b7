"""`Quantised`: codes and scales in the place of a weight."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import layout as in_memory
from jax.sharding import NamedSharding, PartitionSpec

from jlora.quant import nested
from jlora.quant.formats import Format, over, to_unit
from jlora.quant.layout import Layout
from jlora.quant.nested import Nested
from jlora.quant.place import shardings_of, spec_of_weight
from jlora.transform.axes import inverse
from jlora.transform.explicit import explicit_mesh, names_of, on_auto_axes, spec_of


@dataclasses.dataclass(frozen=True, eq=False)
class Remark:
    """Origin of a weight, as far as it is known. It is no part of the weight: all are equal, and so are the structures
    of trees whose weights differ in it.

    Attributes:
      residual: whether the weight is what a start left of the full one (LoftQ, QPiSSA): factors that were trained on it
        fit no other. A weight that was read from a file or made by a program does not know.
    """

    residual: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remark)

    def __hash__(self) -> int:
        return hash(Remark)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A weight in few bits: `W = decode(codes) * scales`, computed in float32 and cast once. It is a `tree.Stored`.

    Attributes:
      codes: (*stack, ..., columns): of 4 bits two to a byte, the even element in the high half; axes as in `layout`.
      scales: float32, the largest |W| of each block (*stack, ..., blocks) or output channel (1 along the inputs), or
        these in 8 bits.
      number: the format.
      layout: order of the weight's axes in the codes.
      dtype: of the weight.
      remark: where it is from, as far as that is known.
    """

    codes: jax.Array
    scales: jax.Array | Nested
    number: Format = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    remark: Remark = dataclasses.field(default=Remark(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.layout.shape(self.codes.shape)

    @property
    def ndim(self) -> int:
        """Number of the weight's axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of the weight's elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def words(self) -> str:
        """How it is held: "nf4, 64, twice" in blocks of 64 whose scales are quantised, too; "int8"."""
        twice = ("twice",) if isinstance(self.scales, Nested) else ()
        return ", ".join((self.number.name, *((str(self.layout.block),) if self.number.blocks else ()), *twice))

    @property
    def leading(self) -> int:
        """Number of leading axes along which all arrays can be cut: the stack's."""
        return self.layout.leading(self.codes.shape)

    def dequantise(self) -> jax.Array:
        """The weight.

        Raises:
          ValueError: if codes and scales contradict each other.
        """
        values, order = self.as_held()
        return lax.transpose(values, inverse(order))

    def as_held(self) -> tuple[jax.Array, tuple[int, ...]]:
        """The weight with its axes in the order of the codes, and the axis of the weight behind each of these.

        A product takes it as it is: in the weight's own order it would be written once more, transposed.
        """
        names = (*spec_of(self.codes), *[None] * self.ndim)[: self.ndim]
        values = on_auto_axes(_dequantised, self, place=lambda _: PartitionSpec(*names))
        return values, self.layout.order_of(self.ndim)

    def gathered(self, sharding: NamedSharding) -> "Quantised | None":
        """Codes and scales where the weight would lie by `sharding`; None unless that does no more than gather."""
        if explicit_mesh(self.codes) is None:
            return None
        pairs = zip(sharding.spec, spec_of_weight(self, spec_of(self.codes)), strict=False)
        if not all(set(names_of(new)) <= set(names_of(old)) for new, old in pairs):
            return None
        return jax.tree.map(jax.sharding.reshard, self, shardings_of(self, sharding, ""))

    def in_parts(self, mesh: Any, spec: PartitionSpec, path: str) -> tuple["Quantised", "Quantised"]:
        """The weight for `shard_map`, and how its arrays are cut so that each part is that of the weight by `spec`.

        Scales in 8 bits are float32 from here: what they share is in no part whole.

        Raises:
          ValueError: if the mesh cuts through a block, naming the leaf.
        """
        scales = self.scales.decode() if isinstance(self.scales, Nested) else self.scales
        whole = dataclasses.replace(self, scales=scales)
        places = shardings_of(whole, NamedSharding(mesh, spec), path)
        return whole, jax.tree.map(lambda place: place.spec, places)

    def transpose(self, permutation: Sequence[int]) -> "Quantised":
        """The weight with its axes permuted: the same codes."""
        return dataclasses.replace(self, layout=self.layout.transpose(tuple(permutation), self.codes.shape))

    def __repr__(self) -> str:
        twice = " twice" if isinstance(self.scales, Nested) else ""
        block = f", blocks of {self.layout.block}{twice}" if self.number.blocks else ""
        rest = ", a residual" if self.remark.residual else ""
        return f"Quantised({self.number.name}{block}, {jnp.dtype(self.dtype).name}{list(self.shape)}{rest})"


def _dequantised(of: Quantised) -> jax.Array:
    sizes = of.layout.sizes(of.codes.shape)
    scales = of.scales.decode() if isinstance(of.scales, Nested) else of.scales
    values = _in_blocks(of, sizes, scales) if of.number.blocks else _by_channel(of, scales)
    return values.astype(of.dtype)


def _in_blocks(of: Quantised, sizes: Sequence[int], scales: jax.Array) -> jax.Array:
    """Decoded numbers times the scales of their blocks, (*sizes), float32."""
    *lead, columns = of.codes.shape
    tail = math.prod(sizes[len(lead) :])
    blocks = -(-tail // of.layout.block)
    if of.codes.dtype != of.number.dtype or columns != -(-tail // 2) or scales.shape != (*lead, blocks):
        raise ValueError(
            f"codes and scales contradict each other: {of.number.name} codes of a weight of shape {of.shape} in blocks "
            f"of {of.layout.block} are {jnp.dtype(of.number.dtype).name} {[*lead, -(-tail // 2)]} with scales "
            f"{[*lead, blocks]}, not {of.codes.dtype} {list(of.codes.shape)} with {list(scales.shape)}"
        )
    values = lax.platform_dependent(
        of.codes,
        cpu=functools.partial(decode_halves, of.number),
        tpu=functools.partial(decode_in_place, of.number),
        default=functools.partial(decode_repeated, of.number),
    )
    values = jnp.pad(values, [(0, 0)] * len(lead) + [(0, blocks * of.layout.block - 2 * columns)])
    values = values.reshape(*lead, blocks, of.layout.block) * scales[..., None]
    return values.reshape(*lead, blocks * of.layout.block)[..., :tail].reshape(sizes)


def decode_halves(number: Format, codes: jax.Array) -> jax.Array:
    """Numbers of codes that share bytes, (..., 2 columns): each half decoded, then interleaved.

    The fastest on the CPU, in one loop: 0.31 ns a weight, 0.43 by `decode_repeated`, 0.53 if codes are interleaved
    (experiments/bench/quant.py).
    """
    return jnp.stack([number.decode(codes >> 4), number.decode(codes & 15)], axis=-1).reshape(
        *codes.shape[:-1], 2 * codes.shape[-1]
    )


def decode_repeated(number: Format, codes: jax.Array) -> jax.Array:
    """The same from every byte twice. A TPU lays an axis of two out anew, in float32: as compiled for a v5e this moves
    15 bytes a weight in a product with it, `decode_halves` 40.
    """
    twice = jnp.repeat(codes, 2, axis=-1)
    along = (*[1] * (codes.ndim - 1), twice.shape[-1])
    shift = 4 - 4 * (lax.broadcasted_iota(codes.dtype, along, codes.ndim - 1) & 1)
    return number.decode((twice >> shift) & 15)


def decode_in_place(number: Format, codes: jax.Array) -> jax.Array:
    """`decode_repeated` of codes that lie by rows. Blocks of 64 are fewer than a TPU's lanes, so it would lay the codes
    out by columns, those of all layers of a stack outside of its loop: all of them once more in memory.
    """
    return decode_repeated(number, in_memory.with_layout_constraint(codes, in_memory.Layout(tuple(range(codes.ndim)))))


def _by_channel(of: Quantised, scales: jax.Array) -> jax.Array:
    """Decoded numbers times the scales of their channels, in the shape of the codes, float32."""
    fits = len(scales.shape) == len(of.codes.shape) and all(
        n in (1, m) for n, m in zip(scales.shape, of.codes.shape, strict=True)
    )
    if of.codes.dtype != of.number.dtype or not fits:
        raise ValueError(
            f"codes and scales contradict each other: {of.number.name} codes {of.codes.dtype} {list(of.codes.shape)}, "
            f"scales {list(scales.shape)}: the codes are {jnp.dtype(of.number.dtype).name}, and a scale's axes are 1 "
            "along the inputs"
        )
    return of.number.decode(of.codes) * scales


def encode(w: jax.Array, number: Format, layout: Layout, inputs: int, double: bool) -> Quantised:
    """Quantises a weight, of which the last `inputs` axes of the layout's order are inputs; a stack layer by layer."""
    turned = lax.transpose(w, layout.order)
    stack, rest = turned.shape[: layout.stack], turned.shape[layout.stack :]

    def one(w: jax.Array) -> tuple[jax.Array, jax.Array | Nested]:
        wide = w.astype(jnp.float32)
        codes, scales = _code_blocks(wide, number, layout) if number.blocks else _code_channels(wide, number, inputs)
        return codes, nested.encode(scales, 0) if double else scales

    if stack:
        flat = turned.reshape(math.prod(stack), *rest)
        codes, scales = jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), lax.map(one, flat))
    else:
        codes, scales = one(turned)
    return Quantised(codes, scales, number, layout, jnp.dtype(w.dtype))


def _code_blocks(w: jax.Array, number: Format, layout: Layout) -> tuple[jax.Array, jax.Array]:
    lead = w.shape[: layout.kept]
    tail = math.prod(layout.tail)
    blocks = -(-tail // layout.block)
    flat = jnp.pad(w.reshape(*lead, tail), [(0, 0)] * len(lead) + [(0, blocks * layout.block - tail)])
    grouped = flat.reshape(*lead, blocks, layout.block)
    scales = jnp.max(jnp.abs(grouped), axis=-1)
    unit = to_unit(grouped, scales, short=tail % layout.block != 0)
    codes = number.encode(unit).reshape(*lead, blocks * layout.block)
    codes = codes[..., : -(-tail // 2) * 2]
    return (codes[..., ::2] << 4) | codes[..., 1::2], scales


def _code_channels(w: jax.Array, number: Format, inputs: int) -> tuple[jax.Array, jax.Array]:
    scales = jnp.max(jnp.abs(w), axis=tuple(range(w.ndim - inputs, w.ndim)), keepdims=True, initial=0)
    return number.encode(over(w, scales)), scales
