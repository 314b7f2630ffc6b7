"""Optax over the trainable leaves alone: `optimizer`.

The base never reaches the optimizer. `optax.masked` is another way to leave weights alone, but it passes the updates
that it does not mask through as they came, so that a gradient of the base is *added* to the base. Here it is an error.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import optax

from jlora import tree
from jlora.adapt import Adapted

PyTree = Any
Structure = Any  # jax.tree_util.PyTreeDef, which type checkers take for a variable

_HOW = (
    "Differentiate the factors alone: `factors, frozen = jlora.partition(adapted)`, then "
    "`jax.grad(lambda factors: loss(jlora.combine(factors, frozen), batch))(factors)`."
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptimizerState:
    """State of the wrapped transformation, and the structure of the factors that it was made for."""

    inner: PyTree
    structure: Structure = field(metadata={"static": True})


class Optimizer(optax.GradientTransformationExtraArgs):
    """What `optimizer` returns: a type of its own, so that a second wrapping is seen and left out."""

    __slots__ = ()


def optimizer(tx: optax.GradientTransformation) -> Optimizer:
    """`tx` for the trainable leaves alone: state for the factors, and an error for any other gradient.

    `init` takes an `Adapted` (and reads its factors) or the factors. `update` takes gradients of the factors, with the
    `Adapted` or the factors as its `params`, and returns updates for `optax.apply_updates(factors, updates)`.

    Args:
      tx: any Optax transformation; one that `optimizer` made comes back as it is.

    Raises (in `init` and `update`):
      ValueError: if there is nothing to train, if the gradients (or the params) contain the base or are any tree other
        than that of the factors of `init`, or if a gradient's shape is not its factor's.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> factors = {"dense/kernel": {"A": jnp.ones((3, 1, 2)), "B": jnp.zeros((1, 4, 2))}}
      >>> tx = optimizer(optax.sgd(0.5))
      >>> state = tx.init(factors)
      >>> updates, state = tx.update(factors, state, factors)
      >>> float(optax.apply_updates(factors, updates)["dense/kernel"]["A"][0, 0, 0])
      0.5
    """
    if isinstance(tx, Optimizer):
        return tx
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> PyTree:
        factors = _factors(params)
        if not jax.tree.leaves(factors):
            raise ValueError("there is nothing to train: no factors and no extras (see `targets=` of jlora.apply)")
        return OptimizerState(inner.init(factors), jax.tree.structure(factors))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> tuple[PyTree, PyTree]:
        if isinstance(updates, Adapted):
            count = len(jax.tree.leaves(updates.base))
            raise ValueError(
                f"the gradients are an Adapted, with {count} arrays of the base that would be updated too. {_HOW}"
            )
        if not isinstance(state, OptimizerState):
            raise ValueError(
                f"the optimizer's state is a {type(state).__name__}, not one that this optimizer's init made"
            )
        _check_structure("gradients", updates, state.structure)
        factors = None if params is None else _factors(params)
        if factors is not None:
            _check_structure("params", factors, state.structure)
            _check_shapes(updates, factors)
        updates, new = inner.update(updates, state.inner, factors, **extra)
        return updates, OptimizerState(new, state.structure)

    return Optimizer(init, update)


def of_method(tx: optax.GradientTransformation, adapted: Adapted) -> Optimizer:
    """`optimizer(tx)` with what the method adds to it: LoRA+'s rates, AdaLoRA's budget."""
    tx = optimizer(tx)
    wrap = adapted.method.wrap
    return tx if wrap is None else optimizer(wrap(tx, adapted.sites))


def _factors(params: PyTree) -> PyTree:
    return params.factors if isinstance(params, Adapted) else params


def _paths(of: PyTree) -> list[str]:
    return [tree.name(keys) for keys, _ in jax.tree.leaves_with_path(of)]


def _check_structure(what: str, got: PyTree, structure: Structure) -> None:
    if jax.tree.structure(got) == structure:
        return
    expected = _paths(jax.tree.unflatten(structure, range(structure.num_leaves)))
    paths = _paths(got)
    foreign = [path for path in paths if path not in set(expected)]
    absent = [path for path in expected if path not in set(paths)]
    if not (foreign or absent):
        raise ValueError(f"the {what} are a {type(got).__name__} with the same paths in other containers. {_HOW}")
    raise ValueError(
        f"the {what} have {len(paths)} leaves and not the structure of the {len(expected)} factors that the optimizer "
        f"was initialised with: unexpected {_some(foreign)}, missing {_some(absent)}. {_HOW}"
    )


def _check_shapes(updates: PyTree, factors: PyTree) -> None:
    for path, gradient, factor in zip(_paths(factors), jax.tree.leaves(updates), jax.tree.leaves(factors), strict=True):
        if gradient.shape != factor.shape:
            raise ValueError(f"the gradient of {path!r} has shape {gradient.shape}, the factor {factor.shape}")


def _some(paths: list[str], limit: int = 4) -> str:
    """The first few of `paths`, quoted, and how many more there are."""
    shown = ", ".join(repr(path) for path in paths[:limit]) or "none"
    return shown + (f" and {len(paths) - limit} more" if len(paths) > limit else "")
