"""`apply`: parameters split into a frozen base and trainable factors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jlora import tree
from jlora.adapted.adapted import Adapted, check_activations, from_arrays
from jlora.adapted.select import (
    Extra,
    Pattern,
    known_sites,
    resolve,
    rules_of,
    select_extras,
    select_parts,
    warn_of_left_out,
)
from jlora.adapted.statistics import statistics
from jlora.methods import Method, lora, nearest
from jlora.methods.acts import Arrays
from jlora.transform.explicit import on_auto_axes
from jlora.transform.sites import Site


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


def _nearest_to(given: Any) -> str:
    return f"; the nearest name is jlora.{nearest(given)}" if isinstance(given, str) else ""


def _initial_extra(leaf: Any, extra: Extra) -> Arrays:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda leaf: _initial_extra(leaf, extra), leaf)
    value = jnp.asarray(leaf).astype(jnp.float32)
    if extra.rows is not None:
        return {"rows": on_auto_axes(lambda value: value[jnp.asarray(extra.rows)], value)}
    # A copy, even of a float32 leaf: the factors are donated to the train step, the base never is.
    return {"value": jnp.array(value, copy=True)}
