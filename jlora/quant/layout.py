"""How the axes of a weight become rows and blocks: index algebra, no arithmetic."""

import dataclasses
import math
from collections.abc import Sequence

from jlora.quant.formats import Format


@dataclasses.dataclass(frozen=True)
class Layout:
    """Order in which a weight's numbers are quantised: row-major (*stack, *outputs, *inputs), as bitsandbytes has it.

    The last of these axes are merged into one, which is cut into blocks: as few as a block divides; all that are no
    stack, with a shorter last block, if it divides none. So a block lies within one row wherever that is possible, and
    the axes before it are axes of codes and scales, too, along which they can be cut and sharded.

    Attributes:
      order: axis of the weight behind each axis of the order above, the stack's first.
      stack: how many of these are a stack. Of a slice along the stack the first of them are gone.
      tail: sizes of the merged axes.
      block: weights to a scale; 0 for one scale to an output channel, where nothing is merged.
      packed: whether two codes share a byte.
    """

    order: tuple[int, ...]
    stack: int
    tail: tuple[int, ...]
    block: int
    packed: bool

    @property
    def kept(self) -> int:
        """The number of axes of the order that are neither a stack nor merged."""
        return len(self.order) - self.stack - len(self.tail)

    def shape(self, codes: Sequence[int]) -> tuple[int, ...]:
        """Shape of the weight that codes of this shape stand for: of a slice or a shard, if they are of one."""
        sizes = self.sizes(codes)
        shape = [0] * len(sizes)
        for at, axis in enumerate(self.order_of(len(sizes))):
            shape[axis] = sizes[at]
        return tuple(shape)

    def sizes(self, codes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the weight's axes in the order of the codes."""
        if not self.tail:
            return tuple(codes)
        last = (codes[-1] * (2 if self.packed else 1),) if len(self.tail) == 1 and self.kept else self.tail
        return (*codes[:-1], *last)

    def order_of(self, ndim: int) -> tuple[int, ...]:
        """The order for a weight of `ndim` axes: of a slice along the stack, or of a stack of such weights."""
        if ndim >= len(self.order):
            more = ndim - len(self.order)
            return (*range(more), *(axis + more for axis in self.order))
        left = self.order[len(self.order) - ndim :]
        return tuple(sorted(left).index(axis) for axis in left)

    def of_ndim(self, ndim: int) -> "Layout":
        """The layout that a weight of so many axes is quantised in anew: of a slice, or of a stack of weights."""
        stack = self.stack + ndim - len(self.order)
        return dataclasses.replace(self, order=self.order_of(ndim), stack=stack)

    def leading(self, codes: Sequence[int]) -> int:
        """How many leading axes of the weight are leading axes of all its arrays: along these they can be cut."""
        ndim = len(self.sizes(codes))
        stack = ndim - (len(self.order) - self.stack)
        order = self.order_of(ndim)
        return next((i for i in range(stack) if order[i] != i), max(stack, 0))

    def transpose(self, permutation: Sequence[int], codes: Sequence[int]) -> "Layout":
        """The layout of the same codes for the weight with its axes permuted."""
        ndim = len(self.sizes(codes))
        stack = ndim - (len(self.order) - self.stack)
        order = tuple(permutation.index(axis) for axis in self.order_of(ndim))
        return dataclasses.replace(self, order=order, stack=stack)


def layout_of(
    shape: Sequence[int],
    out_axes: Sequence[int],
    in_axes: Sequence[int],
    stack_axes: Sequence[int],
    number: Format,
    block: int,
) -> Layout:
    """The layout of a weight of this shape."""
    order = (*stack_axes, *out_axes, *in_axes)
    if not number.blocks:
        return Layout(order, len(stack_axes), (), 0, False)
    rest = [shape[axis] for axis in order[len(stack_axes) :]]
    # An odd number of weights is padded to whole bytes, which only a whole matrix can be.
    fits = (n for n in range(1, len(rest)) if math.prod(rest[-n:]) % block == 0)
    merged = next(fits, len(rest))
    return Layout(order, len(stack_axes), tuple(rest[len(rest) - merged :]), block, True)
