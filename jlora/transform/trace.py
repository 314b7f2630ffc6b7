"""Notes of one evaluation of a lifted function: the uses of every weight."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jlora.transform.jaxprs import line_of
from jlora.transform.weight import NOBODYS, Trained, Weight
from jlora.tree import Stored

CHECKPOINTS = ("remat2", "checkpoint")  # the primitive's name, by versions of JAX
UNTOUCHED = "returned as it is by the function"  # why a weight is materialised that nothing has read


class MaterialisedError(ValueError):
    """Raised by `lift(fn, strict=True)` where a weight would be materialised."""


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that reads a weight.

    Attributes:
      path: the weight.
      op: the primitive's name.
      in_axes, out_axes, stack_axes: the stored parameter's axes that this operation contracts, keeps, and runs over.
      factored: whether the low-rank part stays apart; False where the weight is materialised.
      rank: of the low-rank part, 0 for a weight that is only followed.
      flops: multiply-adds times two of the low-rank part in one forward pass (of building the weight, if materialised).
      line: the place in the model's own code, "file.py:12".
      reason: why it is materialised, empty where it is not.
      tree: which of the adapted trees of one call the weight is in, from 0.
    """

    path: str
    op: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    factored: bool
    rank: int
    flops: int
    line: str = ""
    reason: str = ""
    tree: int = 0


@dataclasses.dataclass(frozen=True)
class Product:
    """A result, and what `Use` says of it."""

    value: Any
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    flops: int


@dataclasses.dataclass
class Trace:
    """Settings and notes of one evaluation of a lifted function.

    Attributes:
      strict: raise where a weight would be materialised.
      forward_mode: use products that forward-mode differentiation can pass.
      uses: every operation that read a weight, in program order.
      repeat: how often the code at hand runs: the product of the lengths of the scans around it.
      around: the equations being evaluated, outermost first.
      extras: of the leaves trained as they are, by tree and path: whether an operation reads them.
      program: the function's own jaxpr, and the weights that are its arguments.
      counted: whether to look for the count that the first result is a mean over.
      count: that count, if the program shows one, and whether the mean takes it to be at least 1.
    """

    strict: bool = False
    forward_mode: bool = False
    uses: list[Use] = dataclasses.field(default_factory=list)
    repeat: int = 1
    around: list[Any] = dataclasses.field(default_factory=list)
    extras: dict[tuple[int, str], bool] = dataclasses.field(default_factory=dict)
    program: tuple[Any, Sequence[Weight | Trained | Stored]] | None = None
    counted: bool = False
    count: tuple[Any, bool] | None = None

    @property
    def line(self) -> str:
        """The model's line, of the innermost equation that knows one: what is cached inside a jit does not."""
        return next(filter(None, map(line_of, reversed(self.around))), "")

    def note(self, weight: Weight, op: str, product: Product) -> None:
        """A factored use."""
        if weight.tree == NOBODYS:
            return
        stack = tuple(sorted(set(product.stack_axes)))
        self.uses.append(
            Use(weight.path, op, product.in_axes, product.out_axes, stack, True, weight.rank,
                product.flops * self.repeat, self.line, tree=weight.tree)
        )  # fmt: skip

    def note_dense(self, weight: Weight, op: str, reason: str) -> None:
        """A use that materialises the weight."""
        if weight.tree == NOBODYS:
            return
        line = self.line
        if weight.key is not None:
            raise ValueError(
                f"dropout={weight.dropout} cannot be applied to {weight.path!r}: `{op}` at {line} materialises it"
                f"{' (' + reason + ')' if reason else ''}, so that no input of the factors is there to drop; leave it "
                "out with targets=, or choose dropout=0"
            )
        if self.strict:
            raise MaterialisedError(
                f"strict: {weight.path!r} would be materialised by `{op}` at {line}"
                f"{' (' + reason + ')' if reason else ''}; leave it out with targets=, or lift without strict=True"
            )
        axes = tuple(sorted({i for origin in weight.origin for i in origin}))
        flops = 2 * weight.rank * math.prod(weight.shape) * self.repeat
        self.uses.append(
            Use(weight.path, op, (), axes, weight.stack, False, weight.rank, flops, line,
                reason or f"`{op}` has no factored form", weight.tree)
        )  # fmt: skip

    @property
    def is_computed_again(self) -> bool:
        """Whether nothing of the code at hand is kept for the backward pass, which computes it again, turn by turn.

        So it is where the innermost checkpoint or loop is a checkpoint, and no checkpoint around it has a policy that
        keeps anything: an outer one's holds for the inner ones, too.
        """
        names = [eqn.primitive.name for eqn in self.around]
        inner = next((name for name in reversed(names) if name in (*CHECKPOINTS, "scan", "while")), "")
        policies = [eqn.params["policy"] for eqn in self.around if eqn.primitive.name in CHECKPOINTS]
        return inner in CHECKPOINTS and all(p in (None, jax.checkpoint_policies.nothing_saveable) for p in policies)

    @contextlib.contextmanager
    def inside(self, eqn: Any) -> Iterator[None]:
        """Marks the equation that is being evaluated."""
        self.around.append(eqn)
        try:
            yield
        finally:
            self.around.pop()

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Counts the FLOPs of a loop's body `times` times."""
        before, self.repeat = self.repeat, self.repeat * times
        try:
            yield
        finally:
            self.repeat = before


def stored_axes(weight: Weight, axes: Any) -> tuple[int, ...]:
    """The stored parameter's axes behind these axes of the value at hand."""
    return tuple(sorted({i for axis in axes for i in weight.origin[axis]}))
