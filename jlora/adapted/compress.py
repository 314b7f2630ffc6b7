"""Updates of weights as products of two factors, and their best approximations of a lower rank."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.adapted.adapted import Adapted, from_arrays, initial_extra
from jlora.adapted.select import Extra
from jlora.methods import lora
from jlora.methods.acts import Arrays, Factors
from jlora.methods.checks import check_number, check_rank
from jlora.methods.matrix import a_form, a_matrix, b_form, b_matrix, known, matrices, one_by_one, thin_svd
from jlora.transform.explicit import on_auto_axes, spec_of
from jlora.transform.sites import Target
from jlora.transform.weight import Weight

_ROUNDING = 8 * float(np.finfo(np.float32).eps)  # of a sum of products, relative to its terms


class Update(NamedTuple):
    """`W - W0 = A B` of one weight, for each of its stacked matrices.

    Attributes:
      a: A with the scale, (stack, inputs, r).
      b: B, (stack, r, outputs).
    """

    a: jax.Array
    b: jax.Array


class Axes(NamedTuple):
    """The axes of a site without its name: layers that are alike share what is compiled for them."""

    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    path: str = ""

    @classmethod
    def of(cls, site: Target) -> "Axes":
        """The axes of a target."""
        return cls(site.shape, site.in_axes, site.out_axes, site.stack_axes)


class Size(NamedTuple):
    """Bounds of the rank of an approximation.

    Attributes:
      rank: the most that a weight gets; None for no bound.
      energy: the least share of the squared Frobenius norm that is kept, from 0 to 1; None for all.
    """

    rank: int | None = None
    energy: float | None = None

    @classmethod
    def parse(cls, rank: Any, energy: Any, caller: str) -> "Size":
        """Checked arguments of a caller, of which neither, one or both may be there.

        Raises:
          ValueError: if `rank` is no integer of at least 1, or `energy` no number above 0 and up to 1.
        """
        if energy is not None:
            energy = check_number(energy, f"{caller}: energy")
            if not 0 < energy <= 1:
                raise ValueError(f"{caller}: energy must be above 0 and at most 1, not {energy!r}")
        return cls(None if rank is None else check_rank(rank, f"{caller}: rank"), energy)

    def required(self, caller: str, why: str = "") -> "Size":
        """Raises ValueError if nothing is bounded."""
        if self == Size():
            raise ValueError(f"{caller}: {why}give rank=, or energy= (1 keeps all but what is rounding)")
        return self


class Decomposed(NamedTuple):
    """The singular triplets of stacked matrices, as many as were asked for.

    Attributes:
      u: (stack, inputs, r).
      s: (stack, r), descending.
      vt: (stack, r, outputs).
      terms: (stack,), the size of what was added up: singular values far below it are rounding.
    """

    u: jax.Array
    s: jax.Array
    vt: jax.Array
    terms: jax.Array


def check_concrete(adapted: Adapted, caller: str) -> None:
    """Raises TypeError for an adapter of shapes, ValueError for one of activations or with factors not finite."""
    for method, _ in adapted.method.parts:
        if method.acts.unmergeable:
            raise ValueError(f"{caller}: {method.name} {method.acts.unmergeable}")
    if tree.is_abstract(adapted):
        raise TypeError(f"{caller}: this adapter holds shapes (jax.ShapeDtypeStruct) and no arrays")
    finite = _finite(adapted.factors)
    for path, arrays in finite.items():
        for name, value in arrays.items():
            if known(value) is False:
                raise ValueError(f"{caller}: factor {name!r} of {path!r} is not finite")


@jax.jit
def _finite(factors: Factors) -> Any:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), factors)


def weight_of(adapted: Adapted, named: Mapping[str, Any], site: Target) -> Weight:
    """The lazy weight of one target. `named` are the leaves of the base."""
    return adapted.method.acts.weights(named, (site,), adapted.factors, adapted.buffers)[site.path]


def is_product(weight: Weight, base: Any) -> bool:
    """Whether a weight is the base plus a low-rank product, so that its update has factors."""
    return weight.gain is None and weight.w is base and weight.a is not None


def update_of(adapted: Adapted, named: Mapping[str, Any], site: Target) -> Update:
    """The update of one weight: the method's own factors, or merged minus base where it is no product."""
    weight, base = weight_of(adapted, named, site), named[site.path]
    if is_product(weight, base):
        axes = Axes.of(site)
        return on_auto_axes(lambda a, b: _as_matrices(axes, a, b), weight.a, weight.b)
    return difference(tree.dense(base), dense_of(weight), site)


@functools.partial(jax.jit, static_argnums=0)
def _as_matrices(axes: Axes, a: jax.Array, b: jax.Array) -> Update:
    return Update(a_matrix(a, axes), b_matrix(b, axes))


@functools.partial(jax.jit, static_argnums=0)
def as_factors(axes: Axes, a: jax.Array, b: jax.Array) -> Arrays:
    """The inverse: A and B in broadcast form."""
    return {"A": a_form(a, axes), "B": b_form(b, axes)}


def dense_of(weight: Weight) -> jax.Array:
    """The merged weight before it is rounded to the base's dtype."""
    return weight.astype(wide(weight.w.dtype)).dense()


def difference(before: jax.Array, after: jax.Array, site: Target) -> Update:
    """`after - before` as a product with the identity, on the side that has fewer of inputs and outputs."""
    axes = Axes.of(site)
    return on_auto_axes(lambda before, after: _difference(axes, before, after), before, after)


@functools.partial(jax.jit, static_argnums=0)
def _difference(axes: Axes, before: jax.Array, after: jax.Array) -> Update:
    delta = matrices(subtract(after, before), axes)
    stack, inputs, outputs = delta.shape
    one = jnp.eye(min(inputs, outputs), dtype=delta.dtype)
    one = jnp.broadcast_to(one[None], (stack, *one.shape))
    return Update(delta, one) if outputs <= inputs else Update(one, delta)


def subtract(after: Any, before: Any) -> jax.Array:
    """The difference in float32, taken in the wider of the two dtypes and float32."""
    after, before = jnp.asarray(after), jnp.asarray(before)
    dtype = max(wide(after.dtype), wide(before.dtype), key=lambda dtype: jnp.finfo(dtype).bits)
    return (after.astype(dtype) - before.astype(dtype)).astype(jnp.float32)


def value_on(leaf: Any, extra: Extra, arrays: Arrays, rows: tuple[int, ...] | None = None) -> jax.Array:
    """The trained value of a leaf, float32: all of it, or `rows`, among which are those that are trained."""
    (trained,) = arrays.values()
    if extra.rows is None or extra.rows == rows:
        return trained
    (start,) = initial_extra(leaf, Extra(extra.path, rows)).values()
    at = jnp.asarray(extra.rows if rows is None else [rows.index(row) for row in extra.rows])
    put = lambda start, trained: start.at[at].set(trained)
    return on_auto_axes(put, start, trained, place=lambda _: spec_of(start))


# -- decompositions ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ProductSVD:
    """Singular triplets of `a b` for `one_by_one`: equal ones are compiled once.

    QR of both factors and the SVD of the r x r product of their triangles, so that nothing of the weight's size is
    formed, unless r is not below the smaller side of the weight.

    Attributes:
      kept: how many triplets.
    """

    kept: int

    def __call__(self, a: jax.Array, b: jax.Array) -> Decomposed:
        terms = jnp.sqrt(jnp.sum(jnp.sum(a**2, axis=0) * jnp.sum(b**2, axis=1)))
        if is_whole(a, b):
            return first(*thin_svd(product(a, b)), terms, self.kept)
        qa, ra = jnp.linalg.qr(a)  # (inputs, r), (r, r)
        qb, rb = jnp.linalg.qr(b.T)  # (outputs, r), (r, r)
        u, s, vt, _ = first(*thin_svd(product(ra, rb.T)), terms, self.kept)  # (r, kept), (kept,), (kept, r)
        return Decomposed(product(qa, u), s, product(vt, qb.T), terms)


def is_whole(a: jax.Array, b: jax.Array) -> bool:
    """Whether a product (inputs, r) by (r, outputs), or a stack of them, is no larger than its factors."""
    return a.shape[-1] >= min(a.shape[-2], b.shape[-1])


def first(u: jax.Array, s: jax.Array, vt: jax.Array, terms: jax.Array, kept: int) -> Decomposed:
    """The largest triplets of one matrix."""
    return Decomposed(u[:, :kept], s[:kept], vt[:kept], terms)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a b` in full float32, on devices that would take fewer bits, too."""
    return jnp.matmul(a, b, precision="highest")


def compress(update: Update, site: Target, size: Size, caller: str) -> Arrays | None:
    """A and B, in broadcast form, of the best approximation of an update: see `truncated`."""
    # Of thin factors all: whatever rank is asked for, layers that are alike share one program.
    kept = triplets(min(update.a.shape[1], update.b.shape[2]), size) if is_whole(*update) else update.a.shape[2]
    return truncated(on_auto_axes(lambda a, b: one_by_one(ProductSVD(kept), a, b), *update), site, size, caller)


def triplets(most: int, size: Size) -> int:
    """How many triplets a decomposition has to give; a share of the energy needs all."""
    return most if size.rank is None or size.energy is not None else min(most, size.rank)


def truncated(found: Decomposed, site: Target, size: Size, caller: str) -> Arrays | None:
    """A and B, in broadcast form, of the smallest rank within `size`; None of an update that is zero but for rounding.

    Each has the root of the singular values. All matrices of a stack get the rank that the most demanding one needs.
    """
    s, terms = np.asarray(found.s, np.float64), np.asarray(found.terms, np.float64)  # (stack, r), (stack,)
    if not np.isfinite(s).all():
        raise ValueError(f"{caller}: the update of {site.path!r} is not finite, so that its SVD does not exist")
    counts = s > _ROUNDING * terms[:, None]
    needed = counts.sum(1)
    if size.energy is not None:
        share = np.cumsum(s**2, 1) / np.maximum(np.sum(s**2, 1, keepdims=True), np.finfo(np.float64).tiny)
        needed = np.minimum(needed, (share < size.energy).sum(1) + 1)
    rank = min(int(needed.max(initial=0)), s.shape[1] if size.rank is None else size.rank)
    if rank == 0:
        return None

    root = jnp.asarray(np.sqrt(np.where(counts, s, 0.0))[:, :rank], jnp.float32)
    axes = Axes.of(site)
    return on_auto_axes(lambda u, vt, root: _balanced(axes, u, vt, root), found.u, found.vt, root)


@functools.partial(jax.jit, static_argnums=0)
def _balanced(axes: Axes, u: jax.Array, vt: jax.Array, root: jax.Array) -> Arrays:
    rank = root.shape[1]
    return as_factors(axes, u[:, :, :rank] * root[:, None, :], root[:, :, None] * vt[:, :rank])


def plain_lora(
    base: Any, factors: Mapping[str, Arrays | None], sites: Mapping[str, Target], extras: Mapping[str, Extra]
) -> Adapted:
    """A plain LoRA of scale 1.

    Args:
      base: the parameters.
      factors: by path, of sites and extras; None of a weight that is no longer adapted.
      sites: the targets by path, whose ranks are those of their factors.
      extras: the leaves that are trained as they are, by path.
    """
    named, _ = tree.leaves(base)
    kept: Factors = {path: arrays for path in named if (arrays := factors.get(path)) is not None}
    chosen = []
    for path in kept:
        if path in sites and path not in extras:
            rank = kept[path]["A"].shape[-1]
            chosen.append(dataclasses.replace(sites[path], rank=rank, alpha=float(rank), part=0))
    method = lora(max((site.rank for site in chosen), default=1))
    return from_arrays(base, kept, method, tuple(chosen), tuple(extras[p] for p in kept if p in extras))


def wide(dtype: Any) -> Any:
    """The dtype, or float32 if that has more bits."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)
