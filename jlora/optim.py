"""Optax over the trainable leaves alone: `optimizer`.

The base never reaches the optimizer. `optax.masked` is another way to leave weights alone, but it passes the updates
that it does not mask through as they came, so that a gradient of the base is *added* to the base. Here it is an error.
"""

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora import tree
from jlora.adapted.adapted import Adapted
from jlora.matrices import SlowState, is_state_different, on_matrices, tells_matrices
from jlora.transform.sites import Target

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
    """Result of `optimizer`: a type of its own, so that a second wrapping is seen and left out.

    Attributes:
      bare: the transformation that is wrapped.
      matrices: the argument of `optimizer`.
      of_method: whether it was made for an adapter, with all that its method adds.
    """

    bare: optax.GradientTransformation
    matrices: bool | None
    of_method: bool

    def __new__(
        cls, init: Any, update: Any, bare: optax.GradientTransformation, matrices: bool | None, of_method: bool
    ) -> "Optimizer":
        made = super().__new__(cls, init, update)
        made.bare, made.matrices, made.of_method = bare, matrices, of_method
        return made


def transformation(tx: Any) -> optax.GradientTransformation:
    """`tx`, or the transformation of an object that has `init` and `update`, such as `optax.MultiSteps`.

    Raises:
      TypeError: if it is none.
    """
    if isinstance(tx, optax.GradientTransformation):
        return tx
    init, update = getattr(tx, "init", None), getattr(tx, "update", None)
    if isinstance(tx, type) or not (callable(init) and callable(update)):
        raise TypeError(f"tx is an Optax transformation, such as optax.adamw(2e-4), got {tx!r}")
    return optax.GradientTransformationExtraArgs(init, update)


def _keywords(update: Any) -> set[str] | None:
    """The names of what an update takes beside the usual three (SAM's takes `grad_fn` alone); None for any."""
    parameters = inspect.signature(update).parameters.values()
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def optimizer(
    tx: optax.GradientTransformation, adapted: Adapted | None = None, *, matrices: bool | None = None
) -> Optimizer:
    """`tx` for the trainable leaves alone: state for the factors, and an error for any other gradient.

    `init` takes an `Adapted` (and reads its factors) or the factors. `update` takes gradients of the factors, with the
    `Adapted` or the factors as its `params`, and returns updates for `optax.apply_updates(factors, updates)`.

    Args:
      tx: any Optax transformation, or an object with its `init` and `update`; one that `optimizer` made comes back as
        it is.
      adapted: what is trained, for a loop of your own: with it the optimizer has what the method adds (LoRA+'s rates,
        AdaLoRA's budget) and can show matrices. `train_step` and `TrainState.create` know it themselves.
      matrices: whether `tx` sees A and B as matrices, (inputs, r) and (r, outputs), one for each stacked weight, in
        place of their broadcast form, (in, 1, r) and (1, out, r). None: where it keeps another state for matrices, as
        Muon does, which gives all else to Adam. Its state is then that of the matrices, but for the factors that are
        read from it, schedule-free's z and lookahead's slow ones.
        One whose state is the same for either cannot be told: `optax.adaptive_grad_clip` takes norms over axes by
        their number, those of single numbers of B in broadcast form, and needs True.

    Raises:
      TypeError: if `tx` is no transformation.

    Raises (in `init` and `update`):
      ValueError: if there is nothing to train, if the method of an `Adapted` adds to the optimizer and no `adapted` is
        given, if `tx` treats matrices in a way of its own and no `adapted` is given to
        make them, if the gradients (or the params) contain the base or are any tree other
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
    if not isinstance(tx, Optimizer):
        tx = _checked(transformation(tx), matrices)
    elif matrices not in (None, tx.matrices):
        tx = _checked(tx.bare, matrices)
    return tx if adapted is None else of_method(tx, adapted)


def _checked(tx: optax.GradientTransformation, matrices: bool | None, *, of_method: bool = False) -> Optimizer:
    inner = optax.with_extra_args_support(tx) if of_method else _alone(tx)

    def init(params: PyTree) -> PyTree:
        factors = _factors(params)
        if not jax.tree.leaves(factors):
            raise ValueError("there is nothing to train: no factors and no extras (see `targets=` of jlora.apply)")
        if isinstance(params, Adapted) and not of_method and params.method.has_optimizer:
            raise ValueError(f"{params.method.name} trains with an optimizer of its own: jlora.optimizer(tx, adapted)")
        if matrices is None and not of_method and is_state_different(inner, factors, _without_ones(factors)):
            raise ValueError(
                "this optimizer treats matrices in a way of its own (Muon gives all else to Adam), and factors have an "
                "axis for each of the weight's: jlora.optimizer(tx, adapted) shows it matrices, as jlora.train_step "
                "does; matrices=False leaves them as they are"
            )
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

    return Optimizer(init, update, tx, matrices, of_method)


def of_method(tx: optax.GradientTransformation, adapted: Adapted) -> Optimizer:
    """`optimizer(tx)` on matrices where it wants them, and with what the method adds: LoRA+'s rates, AdaLoRA's budget.

    What the method adds reads factors in broadcast form, and so is put around.
    """
    tx = optimizer(tx)
    if tx.of_method:
        return tx
    wants_matrices = tx.matrices
    if wants_matrices is None:
        wants_matrices = _wants_matrices(tx.bare, *_shapes(adapted.factors), adapted.sites)
    bare = on_matrices(_alone(tx.bare), adapted) if wants_matrices else _alone(tx.bare)
    bare = adapted.method.wrapped(bare, adapted.sites, functools.partial(_checked, matrices=None, of_method=True))
    return _checked(bare, None, of_method=True)


@functools.lru_cache(maxsize=32)
def _wants_matrices(
    tx: optax.GradientTransformation, structure: Structure, shapes: tuple[Any, ...], sites: tuple[Target, ...]
) -> bool:
    """Whether `tx` is to be shown matrices; asked where a state is made and where a step is traced."""
    factors = jax.tree.unflatten(structure, shapes)
    return tells_matrices(_alone(tx), factors, sites)


def _shapes(factors: PyTree) -> tuple[Structure, tuple[Any, ...]]:
    """Structure, shapes and dtypes, hashable."""
    leaves, structure = jax.tree.flatten(factors)
    return structure, tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)


def _without_ones(factors: PyTree) -> PyTree:
    """Shapes of the factors without the axes that they do not span; extras have those of their leaves."""

    def shape(keys: Any, x: Any) -> Any:
        trained_whole = tree.name(keys[-1:]) in ("value", "rows")
        spanned = tuple(x.shape) if trained_whole else tuple(n for n in x.shape if n != 1)
        return jax.ShapeDtypeStruct(spanned, x.dtype)

    return jax.tree.map_with_path(shape, factors)


_AROUND = (
    "optax.lookahead is inside a transformation that cannot pass on its pairs of parameters: put it around, as in "
    "optax.lookahead(optax.apply_if_finite(optax.sgd(0.1), 3), 5, 0.5)"
)


def _alone(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` of the factors alone, which is passed the keywords that it knows; of `optax.lookahead`, the fast ones.

    The slow factors are part of the state, and what `tx` makes of them is applied there.
    """
    inner = optax.with_extra_args_support(tx)
    accepted = _keywords(inner.update)

    def init(factors: PyTree) -> PyTree:
        if _looks_ahead(inner, *_shapes(factors)):
            slow = jax.tree.map(jnp.copy, factors)
            return SlowState(slow, inner.init(optax.LookaheadParams(factors, slow)))
        state = inner.init(factors)
        if _has_lookahead(state):
            raise ValueError(_AROUND)
        return state

    def update(gradients: PyTree, state: PyTree, factors: PyTree = None, **extra: Any) -> tuple[PyTree, PyTree]:
        more = {name: x for name, x in extra.items() if accepted is None or name in accepted}
        if not isinstance(state, SlowState):
            return inner.update(gradients, state, factors, **more)
        try:
            updates, new = inner.update(gradients, state.inner, optax.LookaheadParams(factors, state.slow), **more)
        except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            if isinstance(state.inner, optax.LookaheadState):
                raise
            raise ValueError(_AROUND) from error
        return updates.fast, SlowState(optax.apply_updates(state.slow, updates.slow), new)

    return optax.GradientTransformationExtraArgs(init, update)


@functools.lru_cache(maxsize=32)
def _looks_ahead(tx: optax.GradientTransformation, structure: Structure, shapes: tuple[Any, ...]) -> bool:
    """Whether `tx` is `optax.lookahead`, or has it inside."""
    factors = jax.tree.unflatten(structure, shapes)
    try:
        state = jax.eval_shape(tx.init, optax.LookaheadParams(factors, factors))
    except (TypeError, ValueError, AttributeError, IndexError, KeyError):
        return False  # what cannot take a pair at all
    return _has_lookahead(state)


def _has_lookahead(state: PyTree) -> bool:
    is_state = lambda x: isinstance(x, optax.LookaheadState)
    return any(map(is_state, jax.tree.leaves(state, is_leaf=is_state)))


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
