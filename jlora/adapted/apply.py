"""`apply` in three steps: `choose`, with every refusal; `start`, the initial arrays; and `from_arrays`."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jlora import tree
from jlora.adapted.adapted import Adapted, check_activations, from_arrays, initial_extra
from jlora.adapted.select import (
    Extra,
    Pattern,
    check_not_stored,
    known_sites,
    resolve,
    rules_of,
    select_extras,
    select_parts,
    warn_of_left_out,
)
from jlora.adapted.statistics import Mask, measure, shape_of
from jlora.methods import Method, lora, nearest
from jlora.methods.acts import Factors
from jlora.methods.matrix import known
from jlora.transform.explicit import on_auto_axes
from jlora.transform.sites import Site, Target


def apply(
    params: Any,
    rank: int | None = None,
    *,
    method: Method | None = None,
    alpha: float | None = None,
    targets: Pattern | None = None,
    sites: Iterable[Site | Target] | None = None,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    extras: str | Sequence[str] | Mapping[str, Sequence[int] | None] = (),
    key: int | jax.Array = 0,
    statistics: Mapping[str, jax.Array] | None = None,
    fn: Callable[..., Any] | None = None,
    batches: Iterable[Any] | None = None,
    mask: Mask | None = None,
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
      statistics: for the methods that start from data (eva, corda, lora_ga): what `jlora.measure` gives for the same
        targets, or for more than these.
      fn, batches, mask: the arguments of `measure`, which `apply` calls itself. Deprecated: until 0.2.

    Returns:
      An `Adapted`.

    Warns:
      UserWarning: by default (`targets=None`) of weights of two axes or more that stay as they are: those whose names
        Flax's conventions do not know, or that no product of the program contracts. Embeddings, which are no default
        targets, are not named.

    Raises:
      ValueError: for a rank that is no integer of at least 1, a pattern that matches nothing, a tree without arrays, a
        weight that is integer or complex or whose axes cannot be told, a quantised one that is to be trained as it is,
        rules that contradict each other, and statistics that are not those of the targets.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.apply({"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}, rank=2)
      >>> {name: factor.shape for name, factor in adapted.factors["kernel"].items()}
      {'A': (6, 1, 2), 'B': (1, 4, 2)}
    """
    _check_params(params)
    method = _method_of(rank, method, alpha, targets)
    choice = choose(params, method, targets=targets, sites=sites, ranks=ranks, alphas=alphas, extras=extras)
    if not (fn is None and batches is None and mask is None):
        statistics = _measured(choice, fn, batches, mask, statistics)
    chosen, arrays = start(choice, tree.as_key(key), statistics)
    adapted = from_arrays(choice.params, arrays, choice.method, chosen, choice.extras)
    check_activations(adapted)
    return adapted


@dataclasses.dataclass(frozen=True)
class Choice:
    """Everything that `apply` is to adapt and to train.

    Attributes:
      params: the tree, in the dtypes that JAX computes in.
      method: how.
      targets: the weights, in tree order, each with its rank and alpha.
      extras: the leaves to train as they are, the method's own among them.
    """

    params: Any
    method: Method
    targets: tuple[Target, ...]
    extras: tuple[Extra, ...]


def choose(
    params: Any,
    method: Method,
    *,
    targets: Pattern | None = None,
    sites: Iterable[Site | Target] | None = None,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    extras: Any = (),
) -> Choice:
    """Reads the rules of `apply`, whose arguments these are; raises and warns what it says. No array is made."""
    params = tree.canonical(params)
    named, _ = tree.leaves(params)
    if not any(hasattr(leaf, "dtype") for leaf in named.values()):
        raise ValueError("apply: the tree of parameters holds no arrays")
    known, from_program = known_sites(params, named, sites), sites is not None
    rules = rules_of(method, targets, known)
    given = select_extras(named, extras)
    own = {path: Extra(path, rows) for path, rows in method.acts.trained(named, known).items()}
    own |= {extra.path: extra for extra in given}
    check_not_stored(named, tuple(own.values()))
    selected = select_parts(known, method, rules, set(own), read_from_program=from_program)
    chosen = resolve(selected, method, ranks or {}, alphas or {})
    adapted = {target.path for target in chosen}
    if None in rules:
        warn_of_left_out(known, adapted | set(own), read_from_program=from_program)
    both = [path for path in named if path in own and path in adapted]
    if both:
        raise ValueError(
            f"contradicting rules: {both[0]!r} is matched by targets= (train factors of it) and by extras= (train the "
            "weight itself); keep one of them"
        )
    return Choice(params, method, chosen, tuple(own[path] for path in named if path in own))


def start(
    choice: Choice, key: jax.Array, statistics: Mapping[str, jax.Array] | None = None
) -> tuple[tuple[Target, ...], Factors]:
    """The initial arrays of a choice, by path, and its targets: a data-driven method may change ranks.

    Args:
      choice: from `choose`.
      key: each target's own is folded from it by path.
      statistics: of the targets whose method starts from data; those of other weights are not read.

    Raises:
      ValueError: for statistics that are missing or are not those of the targets, or that no method reads.
    """
    named, _ = tree.leaves(choice.params)
    _check_statistics(choice, named, statistics)
    chosen, arrays = choice.method.acts.start(key, named, choice.targets, statistics or {})
    return chosen, arrays | {extra.path: initial_extra(named[extra.path], extra) for extra in choice.extras}


# -- parts -------------------------------------------------------------------------------------------------------------


def _check_params(params: Any) -> None:
    """An NNX module as the parameters would lose the updates of its other state inside the trace."""
    whole = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Module | Adapted))
    if any(isinstance(x, Adapted) for x in whole):
        raise TypeError("apply: the parameters are adapted already; merge(adapted) first, or apply to adapted.base")
    for module in (x for x in whole if isinstance(x, nnx.Module)):
        kinds = {type(leaf).__name__ for _, leaf in nnx.iter_graph(module) if isinstance(leaf, nnx.Variable)}
        other = sorted(kinds - {"Param"})
        if other:
            raise TypeError(
                f"apply: {type(module).__name__} holds {', '.join(other)} beside its Params, whose updates would be "
                "lost; split it: graph, params, rest = nnx.split(model, nnx.Param, ...)"
            )


def _method_of(rank: Any, method: Any, alpha: float | None, targets: Pattern | None) -> Method:
    if isinstance(rank, Method):
        raise TypeError(
            f"apply: the second argument is a rank; give the method by name: apply(params, method={rank!r})"
        )
    if method is None:
        if rank is None and targets != ():
            raise ValueError("apply: give a rank, or a method such as jlora.rslora(16)")
        return lora(1 if rank is None else rank, alpha)
    if not isinstance(method, Method):
        near = f"; the nearest name is jlora.{nearest(method)}" if isinstance(method, str) else ""
        raise TypeError(f"apply: method is a Method such as jlora.rslora(16), not {method!r}{near}")
    if rank is not None or alpha is not None:
        raise ValueError(f"apply: {method!r} has its own rank and alpha: leave rank= and alpha= out")
    return method


def _from_data(choice: Choice) -> dict[str, tuple[Method, list[Target]]]:
    """By statistic: a method that starts from it, and the targets of which it is needed."""
    found: dict[str, tuple[Method, list[Target]]] = {}
    for target in choice.targets:
        method = choice.method.of(target)
        if method.acts.statistic:
            found.setdefault(method.acts.statistic, (method, []))[1].append(target)
    return found


def _check_statistics(choice: Choice, named: Mapping[str, Any], statistics: Mapping[str, jax.Array] | None) -> None:
    needed = _from_data(choice)
    if statistics is not None and not needed:
        raise ValueError(f"apply: {choice.method.name} does not start from data: leave statistics= out")
    for kind, (method, targets) in needed.items():
        call = f"statistics = jlora.measure(fn, params, batches, sites, {kind!r})"
        if statistics is None:
            raise ValueError(f"apply: {method.name} starts from data: {call}, and pass statistics=")
        for target in targets:
            if target.path not in statistics:
                raise ValueError(
                    f"apply: statistics= lack {target.path!r}, whose {kind} {method.name} starts from: {call} of the "
                    "same targets"
                )
            shape, expected = jnp.shape(statistics[target.path]), shape_of(kind, target.site)
            if shape != expected:
                raise ValueError(
                    f"apply: statistics= are those of other weights, or of another kind: {target.path!r} has shape "
                    f"{shape}, and its {kind} {expected}"
                )
            if tree.is_abstract(named[target.path]):
                raise TypeError(
                    f"apply: {method.name} starts from data, and {target.path!r} is a shape (jax.ShapeDtypeStruct), "
                    "no array"
                )
            _check_values(target.path, kind, statistics[target.path])


def _check_values(path: str, kind: str, value: jax.Array) -> None:
    """A square weight's gradient has the shape of its covariance; eigenvalues would be read off half of it."""
    if tree.is_abstract(value):
        raise TypeError(f"apply: statistics= hold a shape (jax.ShapeDtypeStruct) and no numbers of {path!r}")
    if known(jnp.isfinite(value).all()) is False:
        raise ValueError(f"apply: statistics= have a {kind} of {path!r} that is not finite")
    largest = lambda x: jnp.max(jnp.abs(x), initial=0)
    is_symmetric = lambda c: largest(c - jnp.swapaxes(c, 1, 2)) <= 1e-3 * largest(c)
    if kind == "covariance" and known(on_auto_axes(is_symmetric, value)) is False:
        raise ValueError(f"apply: statistics= have no covariance of {path!r}: it is not symmetric")


def _measured(
    choice: Choice,
    fn: Callable[..., Any] | None,
    batches: Iterable[Any] | None,
    mask: Mask | None,
    statistics: Mapping[str, jax.Array] | None,
) -> dict[str, jax.Array]:
    """Statistics of the targets by `measure`, where `apply` is given a function and batches."""
    warnings.warn(
        "apply(fn=, batches=, mask=) goes in jlora 0.2: statistics = jlora.measure(fn, params, batches, sites, "
        "method.acts.statistic), and apply(statistics=statistics)",
        DeprecationWarning,
        stacklevel=3,
    )
    needed = _from_data(choice)
    if not needed:
        needless = "mask=" if fn is None and batches is None else "fn= and batches="
        raise ValueError(f"apply: {choice.method.name} does not start from data: leave {needless} out")
    if fn is None or batches is None or statistics is not None:
        name = next(iter(needed.values()))[0].name
        raise ValueError(
            f"apply: {name} starts from data: pass statistics=, or fn= (of params and a batch) and batches="
        )
    several = list(batches) if len(needed) > 1 else batches
    found: dict[str, jax.Array] = {}
    for kind, (_, targets) in needed.items():
        sites = [target.site for target in targets]
        found |= measure(fn, choice.params, several, sites, kind, mask=mask)
    return found
