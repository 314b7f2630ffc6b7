"""`apply` and what one does with its result: a frozen base, trainable factors, and the way back to plain parameters."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jlora import tree
from jlora.adapted.select import (
    Extra,
    check_rows,
)
from jlora.methods import Method
from jlora.methods.acts import SHARED, Arrays, Factors
from jlora.methods.method import factor_shapes, shared_shapes
from jlora.transform.explicit import on_auto_axes, spec_of
from jlora.transform.intercept import insert
from jlora.transform.sites import Target
from jlora.transform.weight import Trained


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """Parameters with low-rank factors: a pytree that stands wherever the parameters stood, under `lift`.

    Attributes:
      base: the tree as it was given, its leaves untouched. It is frozen: in a derivative that reaches the factors too,
        as `jax.grad` of a whole `Adapted`, its part is zero. A derivative of the base alone is there.
      factors: what is trained, float32: path -> {"A", "B", ...}, and for extras path -> {"value"} or {"rows"}. A and B
        are in broadcast form: W's axes plus the rank, size 1 on the axes that they do not span. What all sites of a
        method share is under "*".
      buffers: frozen arrays that the method computes from the base.
      key: a dropout key (`with_dropout`), None outside training.
      method: how factors make a weight.
      sites: the adapted weights, in tree order, each with its rank and alpha.
      extras: the leaves trained as they are.
    """

    base: Any
    factors: Factors
    buffers: Factors
    key: jax.Array | None
    method: Method = dataclasses.field(metadata={"static": True})
    sites: tuple[Target, ...] = dataclasses.field(metadata={"static": True})
    extras: tuple[Extra, ...] = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        number = count(self)
        return (
            f"Adapted({self.method!r}: {len(self.sites)} weights, {len(self.extras)} extras, {number.trainable:,} of "
            f"{number.total:,} parameters trained)"
        )

    def __contains__(self, name: object) -> bool:
        """Raises TypeError: an `Adapted` is no dict (Flax's `TrainState.create(params=adapted)` asks it like one)."""
        raise TypeError(
            "an Adapted is no dict of parameters. jlora.TrainState and jlora.train_step train it; a loop of your own "
            "or flax.training's TrainState holds what is trained alone: `factors, frozen = jlora.partition(adapted)`, "
            "TrainState.create(apply_fn=..., params=factors, tx=jlora.optimizer(tx, adapted)), and a loss of "
            "`jlora.combine(factors, frozen)`"
        )

    def replace(self, **changes: Any) -> "Adapted":
        """A copy with some fields changed.

        Raises:
          ValueError: for a method of another rank or alpha, which `sites` hold for every weight.
        """
        method = changes.get("method")
        if isinstance(method, Method) and "sites" not in changes and self.sites:
            if len(method.parts) != len(self.method.parts):
                raise ValueError(f"replace(method=): {self.method!r} is not as many methods as {method!r}; apply anew")
            for (mine, _), (other, _) in zip(self.method.parts, method.parts, strict=True):
                _check_same_scale(mine, other)
        return dataclasses.replace(self, **changes)

    def as_weights(self, number: int = 0) -> Any:
        """The parameter tree, with a lazy `Weight` where a leaf is adapted and the trained value where it is an extra.

        Args:
          number: which of the adapted trees of one call this is.

        Raises:
          ValueError: if the factors are not those of this base.
        """
        named, structure = tree.leaves(self.base)
        self._check(named)
        factors = self.factors
        leaves, frozen = _beside(factors, (list(named.values()), self.buffers))
        named = dict(zip(named, leaves, strict=True))
        filled: dict[str, Any] = dict(named)
        acts, sites = self.method.acts, self.sites
        if self.key is not None:
            factors = self.method.sampled(tree.fold_path(self.key, ""), factors, sites)
        weights = acts.weights(named, sites, factors, frozen)
        for site in sites:
            if site.path in weights:
                weight = weights[site.path].replace(tree=number)
                draws = self.key is not None and weight.dropout > 0
                filled[site.path] = weight.replace(key=_site_key(self.key, site)) if draws else weight
        for extra in self.extras:
            value = _with_extra(named[extra.path], extra, self.factors[extra.path])
            filled[extra.path] = Trained(value, extra.path, number, optional=True)
        adapters = acts.adapters(self.method, sites, factors, number)
        return insert(jax.tree.unflatten(structure, filled.values()), adapters)

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """Context that is entered while a lifted function is traced: the interceptor of a method on activations."""
        return self.method.acts.entered(self.method)

    @property
    def needs(self) -> str:
        """Modules that a method on activations acts on, for errors; "" for one on weights."""
        return self.method.acts.needs

    def _check(self, named: Mapping[str, Any]) -> None:
        leaves = {site.path for site in self.sites} | {extra.path for extra in self.extras}
        shared = shared_shapes(self.method, self.sites)
        expected = leaves | ({SHARED} if shared else set())
        if expected != set(self.factors) or not leaves <= set(named):
            odd = sorted(expected.symmetric_difference(self.factors) | (leaves - set(named)))
            raise ValueError(
                f"the factors are those of another tree: {len(odd)} paths do not agree, first {odd[0]!r}; "
                "combine factors with the frozen part that they were split from"
            )
        for site in self.sites:
            shape = tuple(getattr(named[site.path], "shape", ()))
            if shape != site.shape:
                raise ValueError(
                    f"the factors are those of another tree: {site.path!r} has shape {shape} in the base, and its "
                    f"factors were made for {site.shape}"
                )
            _check_shapes(site.path, self.factors[site.path], factor_shapes(self.method, site))
        if shared:
            _check_shapes(SHARED, self.factors[SHARED], shared)
        for extra in self.extras:
            check_rows(extra, named[extra.path])  # a scatter drops those that a smaller table does not have
            _check_shapes(extra.path, self.factors[extra.path], extra_shapes(extra, named[extra.path]))


def _beside(factors: Factors, frozen: Any) -> Any:
    """`frozen`, whose derivative is zero wherever the factors have one: see `Adapted`."""
    leaves, structure = jax.tree.flatten(frozen)
    is_real = lambda x: isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.inexact)
    at = [i for i, leaf in enumerate(leaves) if is_real(leaf)]
    for i, leaf in zip(at, _still(factors, [leaves[i] for i in at]), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


@jax.custom_jvp
def _still(moving: Any, still: list[jax.Array]) -> list[jax.Array]:
    return still


@functools.partial(_still.defjvp, symbolic_zeros=True)
def _still_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (_, still), (moves, tangent) = primals, tangents
    if all(isinstance(t, SymbolicZero) for t in jax.tree.leaves(moves)):
        return still, tangent
    return still, [SymbolicZero(jax.typeof(x).to_tangent_aval()) for x in still]


def extra_shapes(extra: Extra, leaf: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of what is trained of a leaf that is trained as it is."""
    shape = tuple(np.shape(leaf))
    if extra.added is not None:
        return {"added": shape}
    return {"value": shape} if extra.rows is None else {"rows": (len(extra.rows), *shape[1:])}


def initial_extra(leaf: Any, extra: Extra) -> Arrays:
    """Initial values of an extra: float32, and shapes of a leaf of shapes."""
    if tree.is_abstract(leaf):
        return jax.eval_shape(lambda leaf: initial_extra(leaf, extra), leaf)
    value = jnp.asarray(tree.dense(leaf)).astype(jnp.float32)
    if extra.added is not None:
        return {"added": jnp.zeros_like(value)}
    if extra.rows is not None:
        return {"rows": on_auto_axes(lambda value: value[jnp.asarray(extra.rows)], value)}
    # A copy, even of a float32 leaf: the factors are donated to the train step, the base never is.
    return {"value": jnp.array(value, copy=True)}


def _check_shapes(path: str, arrays: Arrays, expected: Mapping[str, tuple[int, ...]]) -> None:
    got = {name: tuple(array.shape) for name, array in arrays.items()}
    if got != expected:
        raise ValueError(
            f"the factors are those of another tree: {path!r} has {_shapes(got)}, and this adapter {_shapes(expected)}"
        )


def _shapes(of: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(of.items()))


class _Numbers(NamedTuple):
    trainable: int
    total: int


class Count(_Numbers):
    """Numbers of parameters, `trainable, total = count`, and what they take.

    Attributes:
      bytes: of base, factors and buffers as they are held.
      bits: a parameter of the quantised weights, scales and constants included; None where none is quantised.
    """

    bytes: int
    bits: float | None

    def __new__(cls, trainable: int, total: int, held: int = 0, bits: float | None = None) -> "Count":
        self = super().__new__(cls, trainable, total)
        self.bytes, self.bits = held, bits
        return self

    def __repr__(self) -> str:
        bits = "" if self.bits is None else f", bits={self.bits:.4g}"
        return f"Count(trainable={self.trainable}, total={self.total}, bytes={self.bytes}{bits})"

    @property
    def percent(self) -> float:
        """Trainable parameters per hundred."""
        return 100.0 * self.trainable / max(self.total, 1)


def check_adapted(x: Any, caller: str) -> None:
    """Raises TypeError for what is no `Adapted`, such as plain parameters or a `TrainState`."""
    if not isinstance(x, Adapted):
        raise TypeError(f"{caller} takes an Adapted (from jlora.apply or jlora.load), got {type(x).__name__}")


def check_activations(adapted: Adapted) -> None:
    """Raises an error where a method on activations finds no linen parameters, or sites that contradict each other."""
    adapted.method.acts.check(adapted.method, adapted.base, adapted.sites, adapted.factors)


def from_arrays(
    params: Any, arrays: Factors, method: Method, sites: tuple[Target, ...], extras: tuple[Extra, ...]
) -> Adapted:
    """An `Adapted` from what `to_arrays` gives: the method's other buffers are computed from the base.

    NumPy's leaves get the dtype that JAX computes with (float64 becomes float32), here and not step by step.
    """
    params = tree.canonical(params)
    named, _ = tree.leaves(params)
    sites = tuple(s.of_dtype(str(named[s.path].dtype)) for s in sites)
    arrays = {path: _canonical(part) for path, part in arrays.items()}  # in tree order
    frozen = {s.path: {n: arrays[s.path][n] for n in method.of(s).acts.frozen if n in arrays[s.path]} for s in sites}
    computed = method.acts.computed(named, sites)
    buffers = {s.path: frozen[s.path] | _canonical(computed.get(s.path, {})) for s in sites}
    factors = {
        path: {name: array for name, array in part.items() if name not in frozen.get(path, {})}
        for path, part in arrays.items()
    }
    return Adapted(params, factors, {k: v for k, v in buffers.items() if v}, None, method, sites, extras)


def _canonical(arrays: Arrays) -> Arrays:
    """Floating-point arrays as float32, whatever a method's own arithmetic made of them (`jax_enable_x64`)."""

    def cast(x: Any) -> Any:
        if x.dtype == jnp.float32 or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
        return x.astype(jnp.float32)

    return {name: cast(array) for name, array in arrays.items()}


def to_arrays(adapted: Adapted) -> Factors:
    """Arrays of an adapter's file: the factors, and the initial arrays that the method keeps frozen."""
    frozen = {
        s.path: {
            n: adapted.buffers[s.path][n] for n in adapted.method.of(s).acts.frozen if n in adapted.buffers[s.path]
        }
        for s in adapted.sites
        if s.path in adapted.buffers
    }
    return {path: part | frozen.get(path, {}) for path, part in adapted.factors.items()}


def with_arrays(adapted: Adapted, arrays: Factors) -> Adapted:
    """`adapted` with other stored arrays; buffers that the base determines are kept, not computed again."""
    keep = lambda path: adapted.buffers.get(path, {})
    factors = {path: {n: part[n] for n in adapted.factors[path]} for path, part in arrays.items()}
    buffers = {
        path: keep(path) | {n: a for n, a in arrays[path].items() if n in keep(path)} for path in adapted.buffers
    }
    return adapted.replace(factors=factors, buffers=buffers)


def partition(adapted: Adapted) -> tuple[Factors, Adapted]:
    """Splits into what is trained and what is frozen (an `Adapted` without factors); `combine` is the inverse."""
    check_adapted(adapted, "partition")
    return adapted.factors, adapted.replace(factors={})


def combine(factors: Factors, frozen: Adapted) -> Adapted:
    """Puts factors, or updated ones, back: `combine(*partition(adapted))` is `adapted` again."""
    check_adapted(frozen, "combine, after the factors,")
    return frozen.replace(factors=factors)


def mask(adapted: Adapted) -> Adapted:
    """The same tree with True at what is trained and False elsewhere, for `optax.masked` and the like.

    `optax.masked` passes the updates of unmasked leaves through: it does not freeze. `jlora.optimizer` does.
    """
    frozen = jax.tree.map(lambda _: False, adapted)
    return frozen.replace(factors=jax.tree.map(lambda _: True, adapted.factors))


def with_dropout(adapted: Adapted, key: int | jax.Array) -> Adapted:
    """Switches dropout on: each site draws its mask from `key`, folded by path, and each stacked layer its own.

    A weight that the function uses several times has one mask for inputs of one shape. A materialised weight has none.
    """
    check_adapted(adapted, "with_dropout")
    return adapted.replace(key=tree.as_key(key))


def count(adapted: Adapted) -> Count:
    """Trainable parameters, and those of the adapted model: the base's plus the factors, an extra counted once.

    A quantised weight counts as the weight that it stands for; `bytes` are those of codes and scales, `bits` what these
    make a weight.

    Works on abstract trees (`jax.eval_shape`), so that nothing need be allocated.
    """
    check_adapted(adapted, "count")
    trainable = size_of(adapted.factors)
    inside = [e.path for e in adapted.extras if e.added is None]  # what is added to a leaf is no part of it
    extra = sum(size_of(adapted.factors[path]) for path in inside if path in adapted.factors)
    held = bytes_of((adapted.base, adapted.factors, adapted.buffers))
    return Count(trainable, size_of(adapted.base) + trainable - extra, held, bits_of(adapted.base))


def _check_same_scale(mine: Method, other: Method) -> None:
    for name in ("rank", "alpha"):
        if getattr(mine, name) != getattr(other, name):
            raise ValueError(
                f"replace(method=): {name} is {getattr(mine, name)} in {mine!r} and {getattr(other, name)} in "
                f"{other!r}, and would stay what it is: every site holds its own. jlora.scale(adapted, s) multiplies "
                "the update by s; for another rank, apply anew"
            )


# -- parts -------------------------------------------------------------------------------------------------------------


def _with_extra(leaf: Any, extra: Extra, factors: Arrays) -> jax.Array:
    if extra.added is not None:
        leaf = jnp.asarray(tree.dense(leaf))
        return (leaf.astype(jnp.float32) + np.float32(extra.added) * factors["added"]).astype(leaf.dtype)
    if extra.rows is None:
        return factors["value"].astype(leaf.dtype)
    put = lambda leaf, rows: leaf.at[jnp.asarray(extra.rows)].set(rows.astype(leaf.dtype))
    leaf = jnp.asarray(tree.dense(leaf))
    return on_auto_axes(put, leaf, factors["rows"], place=lambda _: spec_of(leaf))


def _site_key(key: Any, site: Target) -> jax.Array:
    shape = tuple(n if i in site.stack_axes else 1 for i, n in enumerate(site.shape))
    return jax.random.split(tree.fold_path(key, site.path), shape)


def size_of(arrays: Any) -> int:
    """The number of elements of a tree of arrays."""
    return sum(
        int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(arrays, is_leaf=tree.is_stored) if hasattr(leaf, "shape")
    )


def bytes_of(arrays: Any) -> int:
    """The bytes of a tree of arrays, codes and scales as they are."""
    return sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(arrays)
        if hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    )


def bits_of(arrays: Any) -> float | None:
    """Bits a parameter of the quantised leaves of a tree, with scales and constants; None where there are none."""
    stored = [leaf for leaf in jax.tree.leaves(arrays, is_leaf=tree.is_stored) if tree.is_stored(leaf)]
    return 8 * bytes_of(stored) / max(size_of(stored), 1) if stored else None
