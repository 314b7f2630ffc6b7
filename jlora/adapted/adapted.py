"""`apply` and what one does with its result: a frozen base, trainable factors, and the way back to plain parameters."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from jlora import tree
from jlora.adapted.select import (
    Extra,
    Pattern,
    check_rows,
    known_sites,
    resolve,
    rules_of,
    select_extras,
    select_parts,
    warn_of_left_out,
)
from jlora.adapted.statistics import statistics
from jlora.methods import Method, lora, nearest
from jlora.methods.acts import SHARED, Arrays, Factors
from jlora.methods.method import factor_shapes, shared_shapes
from jlora.transform.explicit import on_auto_axes, spec_of
from jlora.transform.intercept import insert
from jlora.transform.sites import Site, Target
from jlora.transform.weight import Weight


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
      key: a dropout key (`with_key`), None outside training.
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
            "TrainState.create(apply_fn=..., params=factors, tx=jlora.optimizer(tx)), and a loss of "
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
            filled[extra.path] = Weight(value, path=extra.path, trained=True, optional=True, tree=number)
        adapters = acts.adapters(self.method, sites, factors, number)
        return insert(jax.tree.unflatten(structure, filled.values()), adapters)

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """What is entered while a lifted function is traced: the interceptor of a method on activations."""
        return self.method.acts.entered(self.method)

    @property
    def needs(self) -> str:
        """What a method on activations acts on, for errors; "" for one on weights."""
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
    return {"value": shape} if extra.rows is None else {"rows": (len(extra.rows), *shape[1:])}


def _check_shapes(path: str, arrays: Arrays, expected: Mapping[str, tuple[int, ...]]) -> None:
    got = {name: tuple(array.shape) for name, array in arrays.items()}
    if got != expected:
        raise ValueError(
            f"the factors are those of another tree: {path!r} has {_shapes(got)}, and this adapter {_shapes(expected)}"
        )


def _shapes(of: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(of.items()))


class Count(NamedTuple):
    """Numbers of parameters."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Trainable parameters per hundred."""
        return 100.0 * self.trainable / max(self.total, 1)


def apply(
    params: Any,
    rank: int | None = None,
    *,
    method: Method | None = None,
    alpha: float | None = None,
    targets: Pattern | None = None,
    sites: Iterable[Site] | None = None,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    extras: str | Sequence[str] | Mapping[str, Sequence[int] | None] = (),
    key: int | jax.Array = 0,
    fn: Callable[..., Any] | None = None,
    batches: Iterable[Any] | None = None,
    mask: Callable[[Any], jax.Array] | None = None,
) -> Adapted:
    """Splits parameters into a frozen base and trainable low-rank factors.

    Args:
      params: any tree of arrays. It is not copied and not changed. Of NumPy arrays that JAX computes in another dtype
        (float64, unless `jax_enable_x64` is set) the base holds copies in that one.
      rank: r of plain LoRA, where `method` is not given.
      method: `jlora.lora(16)`, `jlora.rslora(16)`, `jlora.dora(16)`, ...
      alpha: of plain LoRA, where `method` is not given.
      targets: which weights to adapt: a regular expression searched in the path, a list of them, or a predicate on
        `Site`; None for all linear layers and convolutions; () for none.
      sites: the parameters' axes, from `jlora.sites(fn, params, *args)`. Flax's naming conventions when None.
      ranks, alphas: {pattern: value}, for sites that differ from the method; the first match wins.
      extras: leaves to train as they are (biases, norms, a new head): patterns, or {pattern: row numbers} for some rows
        of an embedding.
      key: seed or key of the factors' initial values. Each site's own is folded from it by path.
      fn, batches: for the methods that start from data (eva, corda, lora_ga): `fn(params, batch)`, a loss or any other
        function of the model, and some batches of the task. Progress is shown on a terminal.
      mask: for eva and corda, where `fn` returns logits or hidden states: batch -> which of their positions are real,
        (batch, length) or any other leading axes. An input of a weight is counted if a real position depends on it. A
        loss leaves padding out by itself.

    Returns:
      An `Adapted`.

    Warns:
      UserWarning: by default (`targets=None`) of weights of two axes or more that stay as they are: those whose names
        Flax's conventions do not know, or that no product of the program contracts. Embeddings, which are no default
        targets, are not named.

    Raises:
      ValueError: for a rank that is no integer of at least 1, a pattern that matches nothing, a tree without arrays, a
        weight that is integer or complex or whose axes cannot be told, and rules that contradict each other.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.apply({"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}, rank=2)
      >>> {name: factor.shape for name, factor in adapted.factors["kernel"].items()}
      {'A': (6, 1, 2), 'B': (1, 4, 2)}
    """
    if isinstance(params, Adapted):
        raise TypeError("apply: the parameters are adapted already; merge(adapted) first, or apply to adapted.base")
    _check_modules(params)
    if isinstance(rank, Method):
        raise TypeError(
            f"apply: the second argument is a rank; give the method by name: apply(params, method={rank!r})"
        )
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"apply: method is a Method such as jlora.rslora(16), not {method!r}{_nearest_to(method)}")
    if method is None and rank is None and targets != ():
        raise ValueError("apply: give a rank, or a method such as jlora.rslora(16)")
    if method is not None and (rank is not None or alpha is not None):
        raise ValueError(f"apply: {method!r} has its own rank and alpha: leave rank= and alpha= out")
    method = lora(1 if rank is None else rank, alpha) if method is None else method
    params = tree.canonical(params)
    named, _ = tree.leaves(params)
    if not any(hasattr(leaf, "dtype") for leaf in named.values()):
        raise ValueError("apply: the tree of parameters holds no arrays")
    known = known_sites(params, named, sites)
    rules = rules_of(method, targets, known)
    extra = select_extras(named, extras)
    own = {path: Extra(path, rows) for path, rows in method.acts.trained(named, known).items()}
    own |= {e.path: e for e in extra}
    extra = tuple(own[path] for path in named if path in own)
    from_program = sites is not None
    selected = select_parts(known, method, rules, {e.path for e in extra}, read_from_program=from_program)
    chosen = resolve(selected, method, ranks or {}, alphas or {})
    if None in rules:
        trained = {site.path for site in chosen} | {e.path for e in extra}
        warn_of_left_out(known, trained, read_from_program=from_program)
    both = [e.path for e in extra if e.path in {site.path for site in chosen}]
    if both:
        raise ValueError(
            f"contradicting rules: {both[0]!r} is matched by targets= (train factors of it) and by extras= (train the "
            "weight itself); keep one of them"
        )
    root = tree.as_key(key)
    measured: dict[str, jax.Array] = {}
    if not method.acts.statistic and not (fn is None and batches is None and mask is None):
        needless = "mask=" if fn is None and batches is None else "fn= and batches="
        raise ValueError(f"apply: {method.name} does not start from data: leave {needless} out")
    for number, part in ((i, part) for i, (part, _) in enumerate(method.parts) if part.acts.statistic):
        if fn is None or batches is None:
            raise ValueError(f"apply: {part.name} starts from data: pass fn= (of params and a batch) and batches=")
        batches = list(batches) if len(method.parts) > 1 and not hasattr(batches, "shape") else batches
        its = [site for site in chosen if site.part == number]
        measured |= statistics(part.acts.statistic, fn, params, batches, its, part.name, mask)
    chosen, arrays = method.acts.start(root, named, chosen, measured)
    arrays |= {e.path: _initial_extra(named[e.path], e) for e in extra}
    adapted = from_arrays(params, arrays, method, chosen, extra)
    check_activations(adapted)
    return adapted


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
    """What an adapter's file holds: the factors, and the initial arrays that the method keeps frozen."""
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
    return adapted.factors, adapted.replace(factors={})


def combine(factors: Factors, frozen: Adapted) -> Adapted:
    """Puts factors, or updated ones, back: `combine(*partition(adapted))` is `adapted` again."""
    return frozen.replace(factors=factors)


def mask(adapted: Adapted) -> Adapted:
    """The same tree with True at what is trained and False elsewhere, for `optax.masked` and the like.

    `optax.masked` passes the updates of unmasked leaves through: it does not freeze. `jlora.optimizer` does.
    """
    frozen = jax.tree.map(lambda _: False, adapted)
    return frozen.replace(factors=jax.tree.map(lambda _: True, adapted.factors))


def with_key(adapted: Adapted, key: int | jax.Array) -> Adapted:
    """Switches dropout on: each site draws its mask from `key`, folded by path, and each stacked layer its own.

    A weight that the function uses several times has one mask for inputs of one shape. A materialised weight has none.
    """
    return adapted.replace(key=tree.as_key(key))


def count(adapted: Adapted) -> Count:
    """Trainable parameters, and those of the adapted model: the base's plus the factors, an extra counted once.

    Works on abstract trees (`jax.eval_shape`), so that nothing need be allocated.
    """
    trainable = size_of(adapted.factors)
    extra = sum(size_of(adapted.factors[e.path]) for e in adapted.extras if e.path in adapted.factors)
    return Count(trainable, size_of(adapted.base) + trainable - extra)


def _check_modules(params: Any) -> None:
    """An NNX module as the parameters would lose the updates of its other state inside the trace."""
    modules = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Module))
    for module in (m for m in modules if isinstance(m, nnx.Module)):
        kinds = {type(leaf).__name__ for _, leaf in nnx.iter_graph(module) if isinstance(leaf, nnx.Variable)}
        other = sorted(kinds - {"Param"})
        if other:
            raise TypeError(
                f"apply: {type(module).__name__} holds {', '.join(other)} beside its Params, whose updates would be "
                "lost; split it: graph, params, rest = nnx.split(model, nnx.Param, ...)"
            )


def _check_same_scale(mine: Method, other: Method) -> None:
    for name in ("rank", "alpha"):
        if getattr(mine, name) != getattr(other, name):
            raise ValueError(
                f"replace(method=): {name} is {getattr(mine, name)} in {mine!r} and {getattr(other, name)} in "
                f"{other!r}, and would stay what it is: every site holds its own. jlora.scale(adapted, s) multiplies "
                "the update by s; for another rank, apply anew"
            )


def _nearest_to(given: Any) -> str:
    return f"; the nearest name is jlora.{nearest(given)}" if isinstance(given, str) else ""


# -- parts -------------------------------------------------------------------------------------------------------------


def _initial_extra(leaf: Any, extra: Extra) -> Arrays:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda leaf: _initial_extra(leaf, extra), leaf)
    value = jnp.asarray(leaf).astype(jnp.float32)
    if extra.rows is not None:
        return {"rows": on_auto_axes(lambda value: value[jnp.asarray(extra.rows)], value)}
    # A copy, even of a float32 leaf: the factors are donated to the train step, the base never is.
    return {"value": jnp.array(value, copy=True)}


def _with_extra(leaf: Any, extra: Extra, factors: Arrays) -> jax.Array:
    if extra.rows is None:
        return factors["value"].astype(leaf.dtype)
    put = lambda leaf, rows: leaf.at[jnp.asarray(extra.rows)].set(rows.astype(leaf.dtype))
    leaf = jnp.asarray(leaf)
    return on_auto_axes(put, leaf, factors["rows"], place=lambda _: spec_of(leaf))


def _site_key(key: Any, site: Target) -> jax.Array:
    shape = tuple(n if i in site.stack_axes else 1 for i, n in enumerate(site.shape))
    return jax.random.split(tree.fold_path(key, site.path), shape)


def size_of(arrays: Any) -> int:
    """The number of elements of a tree of arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(arrays) if hasattr(leaf, "shape"))
