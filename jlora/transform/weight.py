"""The algebra of an adapted weight that is never built: `W_eff = gain * (w + sum over r of a[..., r] * b[..., r])`.

`a` and `b` have W's axes plus a last rank axis, and size 1 on the axes that they do not span; `gain` is broadcast in
the same way. Because the form is linear in W and separable by axis, what models do to a weight before they use it
(cast, transpose, reshape, slice, index, scale) acts on the parts one by one and stays in the form.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora import tree
from jlora.transform import axes as ax
from jlora.transform import view
from jlora.transform.explicit import on_auto_axes, spec_of
from jlora.transform.product import (
    ADAPTED,
    Multiply,
    Spec,
    base_product,
    compute_dtype,
    is_complex,
    is_linear,
    keeps,
)

NOBODYS = -1  # number of the tree of a stored leaf that no method adapts: its uses are not reported
RANK = "rank"  # the label of the last axis of a and b


class NotSeparable(Exception):
    """An operation that mixes axes in a way the form cannot express: the caller materialises instead."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Origin of a value: the stored parameter that it is, and where its axes come from.

    Attributes:
      path: where the parameter stands in its tree.
      origin: for each axis of the value, the axes of the stored parameter that it comes from.
      stack: axes of the stored parameter that scans and indexing have already consumed.
      gathered: axes that a batched gather has looked up (an embedding or an expert table).
      tree: which of the adapted trees of one call the parameter is in, from 0.
    """

    path: str = ""
    origin: tuple[tuple[int, ...], ...] = ()
    stack: tuple[int, ...] = ()
    gathered: tuple[int, ...] = ()
    tree: int = 0


_PLACE = frozenset(field.name for field in dataclasses.fields(Place))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A leaf that is trained as it is, or an array of an adapter of activations: an array to the function and to rules.

    Attributes:
      value: the array.
      path, tree: as in `Place`.
      optional: whether the function may leave it unread.
    """

    value: jax.Array
    path: str = dataclasses.field(metadata={"static": True})
    tree: int = dataclasses.field(default=0, metadata={"static": True})
    optional: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A lazy weight of shape `w.shape`.

    Attributes:
      w: the base weight, any number of axes: an array, or a `tree.Stored` that products dequantise.
      unscaled, b: the low-rank factors in broadcast form, of which `a` is `by * unscaled`; None for a weight that is
        only followed. Of an observed weight `a` is the sum of x x^T over the inputs x that is asked for, as its
        cotangent, and `b` the identity.
      gain: a factor in broadcast form without the rank axis, or None.
      key: a dropout key per stacked weight, in broadcast form without the rank axis, or None.
      dropout: the probability with which an input of the low-rank branch is dropped; used where `key` is there.
      place: which stored parameter it is, and where its axes come from. Its fields are attributes of the weight, too.
      multiply: how an input meets it: `product.ADAPTED`, `PLAIN` (which forward mode can pass) or `OBSERVED`.
      by: the scale. It is taken where `a` is used, which is inside a scan over layers: scaled before it, all of their
        factors would be there twice from the forward pass to the end of the backward pass.
    """

    w: jax.Array
    unscaled: jax.Array | None = None
    b: jax.Array | None = None
    gain: jax.Array | None = None
    key: jax.Array | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    place: Place = dataclasses.field(default=Place(), metadata={"static": True})
    multiply: Multiply = dataclasses.field(default=ADAPTED, metadata={"static": True})
    by: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def a(self) -> jax.Array | None:
        """The factor that takes the scale, with it."""
        if self.unscaled is None or self.by == 1.0:
            return self.unscaled
        return lax.mul(self.unscaled, np.asarray(self.by, self.unscaled.dtype))

    @property
    def path(self) -> str:
        return self.place.path

    @property
    def origin(self) -> tuple[tuple[int, ...], ...]:
        return self.place.origin

    @property
    def stack(self) -> tuple[int, ...]:
        return self.place.stack

    @property
    def gathered(self) -> tuple[int, ...]:
        return self.place.gathered

    @property
    def tree(self) -> int:
        return self.place.tree

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def rank(self) -> int:
        """The width of the low-rank part, 0 where there is none."""
        return 0 if self.unscaled is None else self.unscaled.shape[-1]

    def replace(self, **changes: Any) -> "Weight":
        """A copy with some fields, its own or those of its place, or `a`, changed."""
        if "a" in changes:
            changes = {"by": 1.0, "unscaled": changes.pop("a"), **changes}
        moved = {name: changes.pop(name) for name in _PLACE & changes.keys()}
        if moved:
            changes["place"] = dataclasses.replace(self.place, **moved)
        return dataclasses.replace(self, **changes)

    @property
    def is_frozen_codes(self) -> bool:
        """Whether it is a stored leaf and no more: nothing of it is trained."""
        return tree.is_stored(self.w) and not self.rank and self.gain is None and not self.gathered

    def spans(self, part: jax.Array) -> frozenset[int]:
        """The axes that a part has as W has them: what is done to W along one of these is done to the part as well.

        Every part spans an axis of W of size 1: there, W and a part that is constant look the same, and so they stay
        the same when the axis is looked up, cut or padded. `varies` asks the other question.
        """
        return frozenset(i for i, n in enumerate(self.shape) if part.shape[i] == n)

    def varies(self, part: jax.Array) -> frozenset[int]:
        """The axes of W along which a part is not constant: what keeps it on its side of a product."""
        return frozenset(i for i in range(self.ndim) if part.shape[i] != 1)

    def map(
        self,
        parts: Callable[[jax.Array, int], jax.Array],
        stored: Callable[[Any], Any] | None = None,
        **changes: Any,
    ) -> "Weight":
        """Applies `parts(array, number of trailing axes that are not W's)` to w, a (before its scale), b, gain and key.

        A stored w is dequantised for it, unless `stored(w)` says how to do the same and leave it stored.
        """
        keeps = stored is not None and tree.is_stored(self.w)
        rest = {
            name: None if part is None else parts(part, trailing)
            for name, part, trailing in (
                ("w", None if keeps else tree.dense(self.w), 0),
                ("unscaled", self.unscaled, 1), ("b", self.b, 1), ("gain", self.gain, 0), ("key", self.key, 0)
            )
        }  # fmt: skip
        if keeps and stored is not None:
            rest["w"] = stored(self.w)
        return self.replace(**rest, **changes)

    def opened(self) -> "Weight":
        """The same with an array for w."""
        return self.replace(w=tree.dense(self.w)) if tree.is_stored(self.w) else self

    # -- operations that stay in the form -----------------------------------------------------------------------------

    def astype(self, dtype: Any) -> "Weight":
        """Casts the base; the factors keep their own precision until they meet an input."""
        if tree.is_stored(self.w):
            return self.replace(w=view.cast(self.w, dtype))
        return self.replace(w=self.w.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> "Weight":
        p = tuple(permutation)
        return self.map(
            lambda x, extra: lax.transpose(x, p + tuple(range(len(p), len(p) + extra))),
            lambda w: view.transpose(w, p),
            origin=tuple(self.origin[i] for i in p),
        )

    def reshape(self, shape: Sequence[int], sharding: NamedSharding | None = None) -> "Weight":
        """Row-major reshape; every group of axes must be spanned wholly or not at all by each part.

        `sharding` says where the result lies on an explicit mesh, and each part on the axes that it spans.
        """
        groups = ax.reshape_groups(self.shape, shape)
        origin: list[tuple[int, ...]] = [()] * len(shape)
        for old, new in groups:
            source = tuple(sorted({i for axis in old for i in self.origin[axis]}))
            for axis in new:
                origin[axis] = source if shape[axis] != 1 or self.shape == () else ()

        def part(x: jax.Array, extra: int) -> jax.Array:
            sizes = [1] * len(shape)
            for old, new in groups:
                mine, whole = [x.shape[i] for i in old], [self.shape[i] for i in old]
                if mine == whole:
                    for axis in new:
                        sizes[axis] = shape[axis]
                elif any(size != 1 for size in mine):
                    raise NotSeparable(f"reshape of {self.shape} to {tuple(shape)} merges an input with an output axis")
            full = tuple(sizes) + x.shape[x.ndim - extra :]
            return lax.reshape(x, full, out_sharding=restricted(sharding, full, tuple(shape)))

        whole = tuple(int(n) for n in shape)
        return self.map(part, lambda w: view.reshape(w, whole), origin=tuple(origin))

    def broadcast_in_dim(
        self, shape: Sequence[int], dimensions: Sequence[int], sharding: NamedSharding | None = None
    ) -> "Weight":
        """New axes are broadcast in the base, which lies as `sharding` says, and have size 1 in the other parts."""
        origin: list[tuple[int, ...]] = [()] * len(shape)
        for old, new in enumerate(dimensions):
            origin[new] = self.origin[old]

        def part(x: jax.Array, extra: int) -> jax.Array:
            sizes = [1] * len(shape)
            for old, new in enumerate(dimensions):
                sizes[new] = x.shape[old]
            return lax.reshape(x, tuple(sizes) + x.shape[x.ndim - extra :])

        widened = self.map(part, origin=tuple(origin))
        return widened.replace(w=jnp.broadcast_to(widened.w, tuple(shape), out_sharding=sharding))

    def on_axes(
        self,
        act: Callable[[jax.Array, tuple[int, ...], int], jax.Array],
        axes: Sequence[int],
        stored: Callable[[Any], Any] | None = None,
    ) -> "Weight":
        """Applies `act(part, the axes among `axes` that the part spans, trailing)`: for operations that act on some
        axes and leave a part that has size 1 there as it is. `stored` is as in `map`.
        """

        def part(x: jax.Array, extra: int) -> jax.Array:
            spanned = tuple(i for i in axes if i in self.spans(x))
            return act(x, spanned, extra) if spanned else x

        return self.map(part, stored if axes else lambda w: w)

    def slice(self, start: Sequence[int], limit: Sequence[int], strides: Sequence[int] | None) -> "Weight":
        """A static slice. One row of a longer axis is a stacked weight: its axis joins `stack`."""
        steps = strides or (1,) * self.ndim

        def act(x: jax.Array, spanned: tuple[int, ...], extra: int) -> jax.Array:
            bounds = [(start[i], limit[i], steps[i]) if i in spanned else (0, n, 1) for i, n in enumerate(x.shape)]
            return lax.slice(x, *zip(*bounds, strict=True))

        axes = [i for i in range(self.ndim) if (start[i], limit[i], steps[i]) != (0, self.shape[i], 1)]
        bounds = list(zip(start, limit, steps, strict=True))
        cut = self.on_axes(act, axes, lambda w: view.cut(w, bounds))
        return cut._drop_axes([i for i in axes if cut.shape[i] == 1])

    def dynamic_slice(self, start: Sequence[Any], sizes: Sequence[int]) -> "Weight":
        """A slice at traced positions; as `slice`."""

        def act(x: jax.Array, spanned: tuple[int, ...], extra: int) -> jax.Array:
            zero = jnp.zeros_like(start[0])
            at = [start[i] if i in spanned else zero for i in range(self.ndim)] + [zero] * extra
            return lax.dynamic_slice(
                x, at, tuple(sizes[i] if i in spanned else n for i, n in enumerate(x.shape))
            )  # fmt: skip

        axes = [i for i in range(self.ndim) if sizes[i] != self.shape[i]]
        rows = lambda x: lax.dynamic_slice_in_dim(x, start[0], sizes[0])
        stored = (lambda w: view.leading(w, rows)) if axes == [0] else None
        return self.on_axes(act, axes, stored)._drop_axes([i for i in axes if sizes[i] == 1])

    def rev(self, dimensions: Sequence[int]) -> "Weight":
        return self.on_axes(lambda x, spanned, extra: lax.rev(x, spanned), dimensions)

    def pad(self, value: jax.Array, config: Sequence[tuple[int, int, int]]) -> "Weight":
        """`lax.pad`: the base takes the value, the factors zeros, and the gain ones, where they span a padded axis.

        Raises:
          NotSeparable: if the factors or the gain do not span a padded axis, and so would act on the padding.
        """
        axes = {i for i, c in enumerate(config) if tuple(c) != (0, 0, 0)}
        low_rank = axes if self.a is None or self.b is None else self.spans(self.a) | self.spans(self.b)
        if not axes <= low_rank or (self.gain is not None and not axes <= self.spans(self.gain)):
            raise NotSeparable("pad along an axis that the adapter is constant on")
        if self.key is not None:
            raise NotSeparable("pad of a weight with dropout")
        filling = {"w": value, "gain": jnp.ones((), jnp.float32)}

        def part(x: jax.Array, name: str, extra: int) -> jax.Array:
            spanned = self.spans(x)
            mine = [c if i in spanned else (0, 0, 0) for i, c in enumerate(config)] + [(0, 0, 0)] * extra
            return lax.pad(x, filling.get(name, jnp.zeros((), x.dtype)).astype(x.dtype), mine)

        parts = {"w": (tree.dense(self.w), 0), "a": (self.a, 1), "b": (self.b, 1), "gain": (self.gain, 0)}
        return self.replace(**{n: None if x is None else part(x, n, extra) for n, (x, extra) in parts.items()})

    def scale(self, factor: jax.Array, divide: bool = False) -> "Weight":
        """`factor * W_eff` or `W_eff / factor`, for a factor that is a scalar or in broadcast form.

        The base is scaled as the model scales it, bit for bit; in the low-rank part, whichever of a and b has the axes
        of `factor` takes it.
        """
        apply = jnp.divide if divide else jnp.multiply
        factor = jnp.asarray(factor)
        needed = {i for i, n in enumerate(factor.shape) if n != 1}
        scaled = self.replace(w=apply(tree.dense(self.w), factor.astype(self.w.dtype)))
        if not self.multiply.adds:
            return scaled
        for name in ("a", "b") if self.rank else ():
            part = getattr(self, name)
            if needed <= self.varies(part):
                wide = lax.reshape(factor, factor.shape + (1,)) if factor.ndim else factor
                return scaled.replace(**{name: apply(part, wide.astype(part.dtype))})
        if self.rank or len(needed) == self.ndim > 0:
            raise NotSeparable("product with an array that spans inputs and outputs")
        return scaled

    def negate(self) -> "Weight":
        return self.replace(w=-tree.dense(self.w), a=self.a if self.a is None or not self.multiply.adds else -self.a)

    def unstack(self) -> tuple["Weight", Callable[["Weight"], "Weight"]]:
        """Splits the leading axis off, for `lax.scan`.

        Returns:
          What varies along the axis (parts that do not are None), and a function that completes one slice of it.
        """
        rows = lambda x, extra: x if 0 in self.spans(x) else None
        varies = self.map(rows, lambda w: view.leading(w, lambda x: x))  # type: ignore[arg-type]
        stack = self.stack + self.origin[0]

        def complete(row: "Weight") -> "Weight":
            parts = {
                name: getattr(self, name)[0]
                for name in ("unscaled", "b", "gain", "key")
                if getattr(self, name) is not None and getattr(row, name) is None
            }
            return row.replace(**parts, origin=self.origin[1:], stack=stack)

        return varies, complete

    def restack(self, axis: tuple[int, ...]) -> "Weight":
        """The inverse of one step of `unstack`, for a weight that a scan returns: `axis` is what was split off."""
        rest = self.stack[: len(self.stack) - len(axis)]
        return self.replace(origin=(axis,) + self.origin, stack=rest)

    def _drop_axes(self, axes: Sequence[int]) -> "Weight":
        """One index was chosen along `axes`: what of the stored parameter no other axis comes from is a stack."""
        if not axes:
            return self
        origin = tuple(() if i in axes else o for i, o in enumerate(self.origin))
        left = {i for o in origin for i in o}
        popped = tuple(i for axis in axes for i in self.origin[axis] if i not in left)
        return self.replace(origin=origin, stack=self.stack + popped)

    # -- where the weight is used -------------------------------------------------------------------------------------

    def dense(self, precision: Any = lax.Precision.HIGHEST) -> jax.Array:
        """The materialised weight: summed in float32 (or the base's own precision, if higher), cast once."""
        if not self.multiply.adds or (self.rank == 0 and self.gain is None):
            return tree.dense(self.w)
        of = self.opened()
        return on_auto_axes(lambda weight: weight._summed(precision), of, place=lambda _: spec_of(of.w))

    def _summed(self, precision: Any) -> jax.Array:
        wide = jnp.float32 if jnp.finfo(self.w.dtype).bits < 32 else self.w.dtype
        value = self.w.astype(wide)
        if self.rank:
            value = value + self.delta(precision).astype(wide)
        if self.gain is not None:
            value = value * self.gain.astype(wide)
        return value.astype(self.w.dtype)

    def delta(self, precision: Any = None) -> jax.Array:
        """`sum over r of a * b`, in a shape that broadcasts against W's."""
        assert self.a is not None and self.b is not None
        labels = tuple(range(self.ndim))
        a, a_labels = ax.drop_ones(self.a, labels + (RANK,), keep=(RANK,))
        b, b_labels = ax.drop_ones(self.b, labels + (RANK,), keep=(RANK,))
        out = tuple(i for i in labels if i in a_labels or i in b_labels)
        return ax.expand(ax.contract(a, a_labels, b, b_labels, out, precision), out, labels)

    def dot(
        self,
        x: jax.Array,
        dimension_numbers: Any,
        weight_first: bool,
        precision: Any,
        dtype: Any,
        sharding: NamedSharding | None = None,
        met: jax.Array | None = None,
    ) -> jax.Array:
        """`dot_general` of x with the weight, factored: x meets one factor, then the other.

        `sharding` is where the model says that the product lies, on an explicit mesh. `met` is x as the factors meet
        it, an array of its own.

        Raises:
          NotSeparable: if `gain` spans both a contracted and a free axis, or if the result is rounded to integers or
            has no imaginary part where x has one.
        """
        if not is_linear(x, dtype):
            raise NotSeparable(f"product of {x.dtype} in {jnp.dtype(dtype)}")
        spec = self._spec(x.ndim, dimension_numbers, weight_first, precision, dtype)._replace(sharding=sharding)
        gain_in, gain_out = self._gains(spec)
        result = None
        if gain_in is not None:
            wide = compute_dtype(x, self.w)
            if wide != x.dtype:
                result = jax.eval_shape(lambda x, w: base_product(x, tree.dense(w), spec), x, self.w).dtype
                spec = spec.of_dtype(dtype if keeps(dtype, wide) else None)
            x, met = amplify(x, gain_in, wide), None
        y = self._low_rank_dot(x, spec, met) if self.rank else self.multiply.base(x, self.w, spec)
        y = y if result is None else y.astype(result)
        return y if gain_out is None else amplify(y, gain_out, y.dtype)

    def _low_rank_dot(self, x: jax.Array, spec: Spec, met: jax.Array | None) -> jax.Array:
        a, b = self.a, self.b
        assert a is not None and b is not None
        a_labels, b_labels = ((*(spec.w[i] for i in sorted(self.varies(part))), RANK) for part in (a, b))
        contracted = [label for label in spec.w if label in spec.x and label not in spec.y]
        if sum(n in a_labels for n in contracted) < sum(n in b_labels for n in contracted):
            a, a_labels, b, b_labels = b, b_labels, a, a_labels
        if not self.multiply.adds and not set(b_labels) - {RANK} <= set(contracted):
            raise NotSeparable("product along other axes than the inputs")
        z = met if self.key is None else drop(x.astype(compute_dtype(x, self.w)), self.key, self.dropout)
        return self.multiply.product(x, z, self.w, a, b, spec._replace(u=a_labels, v=b_labels))

    def _spec(self, x_ndim: int, dimension_numbers: Any, weight_first: bool, precision: Any, dtype: Any) -> Spec:
        (left, right), (left_batch, right_batch) = dimension_numbers
        if weight_first:
            left, right, left_batch, right_batch = right, left, right_batch, left_batch
        w_labels: tuple[int | str, ...] = tuple(f"w{i}" for i in range(self.ndim))
        x_labels: list[int | str] = [f"x{i}" for i in range(x_ndim)]
        for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
            x_labels[i] = w_labels[j]
        batch = tuple(x_labels[i] for i in left_batch)
        x_free = tuple(x_labels[i] for i in range(x_ndim) if i not in left and i not in left_batch)
        w_free = tuple(w_labels[j] for j in range(self.ndim) if j not in right and j not in right_batch)
        y_labels = batch + (w_free + x_free if weight_first else x_free + w_free)
        spec = Spec(tuple(x_labels), w_labels, y_labels, (), (), dimension_numbers, weight_first, precision, None)
        return spec.of_dtype(dtype)

    def _gains(self, spec: Spec) -> tuple[jax.Array | None, jax.Array | None]:
        """The gain as a factor of x or of y, whichever has all the axes that it spans."""
        if self.gain is None:
            return None, None
        gain, labels = ax.drop_ones(self.gain, spec.w)
        if all(label in spec.y for label in labels):
            return None, ax.expand(gain, labels, spec.y)
        if all(label in spec.x for label in labels):
            return ax.expand(gain, labels, spec.x), None
        raise NotSeparable("product of a weight whose gain spans inputs and outputs")


def restricted(sharding: NamedSharding | None, shape: Sequence[int], whole: Sequence[int]) -> NamedSharding | None:
    """The sharding of an array of `shape` that lies like one of `whole`: on the axes of that one's size."""
    if sharding is None:
        return None
    names = (*sharding.spec, *[None] * (len(whole) - len(sharding.spec)))
    mine = [name if n == m else None for name, n, m in zip(names, shape, whole, strict=False)]
    return NamedSharding(sharding.mesh, PartitionSpec(*mine, *[None] * (len(shape) - len(whole))))


def amplify(x: jax.Array, gain: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x * gain` in float32 at least, cast once: 8 bits of bf16 would swallow a small change of the gain."""
    wide = dtype if jnp.finfo(dtype).bits > 32 or is_complex(dtype) else jnp.float32
    return (x.astype(wide) * gain.astype(wide)).astype(dtype)


def drop(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout of the low-rank branch's input: zero with probability `rate`, else scaled by 1 / (1 - rate).

    `key` has one key per stacked weight that x meets at once; x has that axis too, so one key draws them all.
    """
    if rate == 0.0 or key.size == 0:
        return x
    keep = jax.random.bernoulli(key.reshape(-1)[0], 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
