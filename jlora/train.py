"""The compiled training step: `train_step`.

Of a step's arguments some are donated and come back changed (factors, optimizer state, step counter), the others are
kept (the base, the method's buffers, the key): those never leave the device, are no output of the program, and the new
state holds the same Python objects. Nothing is closed over, or the base would become a constant of the program.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, Sharding

from jlora import host, tree
from jlora.arguments import AXIS, Arguments, Carry, Skeleton, jit_arguments, mesh_of, pmap_arguments
from jlora.methods.checks import whole
from jlora.objective import Loss, Metrics, Parts, Shape, objective, value, value_and_gradient
from jlora.optim import Optimizer, of_method, optimizer
from jlora.sharding import MODELS, Layout
from jlora.state import TrainState

PyTree = Any
Structure = Any  # jax.tree_util.PyTreeDef, which type checkers take for a variable
NonFinite = Literal["raise", "skip", "optimizer"]


@dataclass(frozen=True)
class Step:
    """A compiled training step: `state, metrics = step(state, batch)`. Made by `train_step`.

    Attributes:
      tx: the optimizer of the factors, for `TrainState.create(adapted, step.tx)`.
      arguments: (state, batch) -> the program's arguments, on the devices where they belong.
      program: the step as a pure function of those, before compilation (for `jax.make_jaxpr`; the skeleton is static).
      compiled: arguments -> the compiled function for them.
    """

    tx: Optimizer
    arguments: Callable[[TrainState, PyTree], Arguments]
    program: Callable[..., tuple[Carry, jax.Array, Metrics]]
    compiled: Callable[[Arguments], Any]

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        """One update.

        Returns:
          The new state (the given one is used up where buffers are donated) and the metrics: `loss`, `grad_norm`, aux.

        Raises:
          FloatingPointError: if the last step but one had a non-finite loss or gradient; so the device always has a
            step to do, and waits for nobody. That update was left out, and so was what the step after it came to: the
            factors of `state` are those before it. `state.check()` looks at the last step, and waits for it.
          ValueError: if the batch does not divide, or if `state` was made for another optimizer.
        """
        _check_usable(state, batch)
        arguments = self.arguments(state, batch)
        state.check(last=False)
        carry, loss, metrics = self.compiled(arguments)(*arguments)
        frozen = arguments.skeleton.fill(arguments.kept)
        adapted = state.adapted.replace(base=frozen.base, buffers=frozen.buffers, factors=carry.factors)
        new = TrainState(adapted, carry.opt_state, carry.step, arguments.key, loss, carry.skipped)
        return new.after(state), metrics

    def lower(self, state: TrainState, batch: PyTree) -> jax.stages.Lowered:
        """The program for these arguments, not run: `.compile()` has `cost_analysis()` and `memory_analysis()`.

        Shapes do for arrays (`jax.ShapeDtypeStruct`), in the batch and in a state that `TrainState.create` made of
        them: nothing is allocated, and the program is that of the arrays.
        """
        arguments = self.arguments(state, batch)
        return self.compiled(arguments).lower(*arguments)


def train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    parallel: Literal["jit", "pmap"] = "jit",
    mesh: Mesh | None = None,
    layout: Layout = MODELS,
    accumulate: int = 1,
    has_aux: bool = False,
    weighted: bool = False,
    pass_key: bool = False,
    nonfinite: NonFinite | None = None,
    donate: bool = True,
) -> Step:
    """The training step of the factors, compiled.

    `loss_fn(params, batch)` is the loss of plain parameters: it is lifted here and differentiated with respect to the
    factors (and extras) alone, so that no gradient of the base is ever formed. A step whose loss or gradient is not
    finite changes nothing but the counters and `state.loss`, the next one nothing at all, and `state.check()`, or the
    call after that, raises, unless `nonfinite` says otherwise.

    Args:
      loss_fn: params, batch -> a real scalar, the mean over the batch's examples; with `weighted` a pair of it and its
        weight; with `has_aux` also a dict of further metrics, the last: (loss, aux) or (loss, weight, aux).
      tx: any Optax transformation, or an object with its `init` and `update` (`optax.MultiSteps`, which `accumulate`
        spares where the micro-batches fit into one call); `jlora.optimizer` is put around it. Its update is also given
        `value`, `grad`, and the functions of the factors `value_fn` and `obj_fn` (the loss) and `grad_fn`, for line
        searches, Polyak steps, Sophia and SAM.
      parallel: "jit": one program. Arrays of the base or the batch that lie on a mesh keep their shardings, and what
        has none is put beside it: on Auto axes factors along the axes of their weights, but for those of the batch, and
        so what the optimizer keeps for each of them; all else whole (`jlora.sharding`). A batch split over the mesh
        trains data-parallel.
        "pmap": data-parallel over all local devices: the batch's leading axis is split, the gradients averaged, and the
        base and the state copied to each device, once.
      mesh: what of the base does not lie on it is put there by the first step, as `layout` says, and the rows of every
        batch of NumPy arrays are split over it: in several processes those that each of them has (`put_rows`). Without
        it arrays lie where they are put.
      layout: which axes of the mesh split which weights: `jlora.sharding.MODELS`, by the names that all of jlora.models
        have, or your own.
      accumulate: number of micro-batches, one after the other, whose gradients are averaged. Micro-batch i is the rows
        i, i + accumulate, ..., so that the rows of a sharded batch stay on their devices.
      has_aux: with `accumulate` > 1 or "pmap" the aux is averaged too, and has to consist of real scalars.
      weighted: the loss is a mean over as many tokens (or examples) as its weight says, and the micro-batches and the
        devices of "pmap" are averaged by it: loss, gradient and aux are those of the whole batch, and a part of weight
        0 takes no part, though its loss be 0 / 0. The metrics hold the sum, `weight`. Without it, a loss whose last
        operation divides a sum by a sum of the batch's own numbers, `jnp.sum(each * real) / jnp.sum(real)`, is averaged
        by the latter, as if it had been returned. For any other loss every part weighs the same, which is another loss
        where the parts have unequal numbers of tokens: return `loss, jnp.sum(real)`, with `weighted=True`.
      pass_key: call `loss_fn(params, batch, key)`, with another key at every step, micro-batch and device. The
        method's own dropout has a key of its own in any case.
      nonfinite: what a step does whose loss or gradient is not finite. "raise": as above. "skip": it is left out, and
        counted by `state.skipped`; training goes on. "optimizer": `tx` is given the gradient as it is, and its updates
        and its new state are taken; only where the updates are not finite either, a call raises. That is for
        transformations that deal with it, as a dynamic loss scale does, and the default where `tx` has one of Optax's:
        `apply_if_finite`, `zero_nans`, or `MultiSteps` with `should_skip_update_fn`.
      donate: reuse the buffers of the given state's factors and optimizer state; never those of the base. What is kept
        of them beside the state, as the start of an average of the factors, has to be a copy
        (`jax.tree.map(jnp.copy, state.adapted.factors)`); what the optimizer keeps itself is its own.

    Raises:
      ValueError: if `parallel` or `nonfinite` is unknown, `mesh` goes with "pmap", or `accumulate` is below 1; at the
        first call if `layout` does not fit the base and the mesh, the loss is no scalar, or its gradient does not reach
        an adapted weight, which would be trained in name only.
      TypeError: if `tx` is no transformation.
    """
    if parallel not in ("jit", "pmap"):
        raise ValueError(f"parallel={parallel!r} is unknown: choose 'jit' or 'pmap'")
    if mesh is not None and parallel == "pmap":
        raise ValueError("mesh= is for parallel='jit': parallel='pmap' keeps a whole copy on every local device")
    if nonfinite not in (None, "raise", "skip", "optimizer"):
        raise ValueError(f"nonfinite={nonfinite!r} is unknown: choose 'raise', 'skip' or 'optimizer'")
    micro_batches = whole(accumulate)
    if micro_batches is None or micro_batches < 1:
        raise ValueError(f"accumulate is the number of micro-batches, an integer of at least 1, got {accumulate!r}")
    tx = optimizer(tx)
    parts = Parts(micro_batches, AXIS if parallel == "pmap" else None)
    shape = Shape(has_aux, pass_key, weighted, averaged=micro_batches > 1 or parallel == "pmap")
    # Sophia differentiates the loss forward over backward; the other callers of value_fn want its value or gradient.
    losses = objective(loss_fn, shape), objective(loss_fn, shape, forward_mode=True)

    def program(carry: Carry, kept: Any, key: jax.Array, batch: PyTree, skeleton: Skeleton, loss: jax.Array) -> Any:
        with mesh_of(carry, kept, batch):
            return _program(losses, tx, parts, nonfinite, Arguments(carry, kept, key, batch, skeleton, loss))

    if parallel == "jit":
        laid = None if mesh is None else (mesh, layout)
        return Step(tx, functools.partial(jit_arguments, micro_batches, laid=laid), program, _jit(program, donate))
    return Step(tx, functools.partial(pmap_arguments, micro_batches), program, _pmap(program, donate))


def _check_usable(state: Any, batch: PyTree) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(
            f"a step takes a TrainState and a batch, got {type(state).__name__}: TrainState.create(adapted, step.tx) "
            "makes the first one"
        )
    for name, of in (("state", state.step), ("batch", batch)):
        if tree.is_abstract(of):
            raise TypeError(
                f"this {name} holds shapes (jax.ShapeDtypeStruct) and no arrays: a step with it can be lowered and "
                "compiled, step.lower(state, batch).compile(), but not run"
            )
    try:
        used_up = state.step.is_deleted()
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            "the step is compiled already: call it outside of jit, vmap and scan, or use `step.program`"
        ) from error
    if used_up:
        raise ValueError(
            "this state was used up: a step donates the buffers of the state that it is given. Go on with the state "
            "that it returned, or pass train_step(donate=False)"
        )


# -- the program -------------------------------------------------------------------------------------------------------


def _program(
    losses: tuple[Callable[..., Loss], Callable[..., Loss]],
    tx: Optimizer,
    parts: Parts,
    nonfinite: NonFinite | None,
    arguments: Arguments,
) -> tuple[Carry, jax.Array, Metrics]:
    """One step as a pure function: (the new carry, the loss to remember, the metrics)."""
    carry, kept, key, batch, skeleton, before = arguments
    frozen = skeleton.fill(kept)
    tx = of_method(tx, frozen.replace(factors=carry.factors))
    _check_opt_state(tx, carry)
    nonfinite = nonfinite or ("optimizer" if _deals_with_nonfinite(carry.opt_state) else "raise")
    of_part, of_part_forward = (
        lambda factors, batch, key, of_part=of_part: of_part(factors, frozen, batch, key) for of_part in losses
    )
    key = jax.random.fold_in(key, carry.step)
    if parts.axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(parts.axis))
    loss, gradients = value_and_gradient(of_part, carry.factors, batch, key, parts)

    def value_fn(factors: PyTree, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
        """Optax's line searches hand on what else the update is given, by these names."""
        return value(of_part_forward, factors, batch, key, parts)

    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss.loss) & jnp.isfinite(norm)
    before_it = host.fetched(carry.opt_state)
    updates, opt_state = tx.update(
        gradients,
        before_it,
        carry.factors,
        value=loss.loss,
        grad=gradients,
        value_fn=value_fn,
        obj_fn=value_fn,
        grad_fn=lambda factors, step=None: value_and_gradient(of_part, factors, batch, key, parts)[1],
    )
    whole = jnp.isfinite(optax.tree.norm(updates)) if nonfinite == "optimizer" else finite
    new = (optax.apply_updates(carry.factors, updates), opt_state)
    # After a step that stops training the next one, which has been started by then, changes nothing at all.
    going = jnp.isfinite(before) if nonfinite != "skip" else jnp.bool_(True)
    taken = functools.partial(jax.lax.select, whole & going)
    factors, opt_state = jax.tree.map(taken, new, (carry.factors, before_it))
    opt_state = host.put_back(opt_state, carry.opt_state)
    skipped = carry.skipped + (going & jnp.logical_not(finite)).astype(jnp.int32)
    unusable = jnp.where(jnp.isfinite(loss.loss), jnp.float32(jnp.nan), loss.loss)
    if nonfinite != "raise":
        unusable = before if nonfinite == "skip" else jnp.where(whole, before, unusable)
        finite = finite & whole
    weight = {} if loss.weight is None else {"weight": loss.weight}
    metrics = {**weight, **loss.aux, "loss": jnp.where(going, loss.loss, before), "grad_norm": norm}
    remembered = jnp.where(going, jnp.where(finite, loss.loss, unusable), before)
    return Carry(factors, opt_state, carry.step + going.astype(jnp.int32), skipped), remembered, metrics


def _deals_with_nonfinite(opt_state: PyTree) -> bool:
    """Whether one of Optax's transformations that deal with gradients that are not finite made part of the state."""

    def deals(x: Any) -> bool:
        skips = isinstance(x, optax.MultiStepsState) and x.skip_state != ()
        return skips or isinstance(x, optax.ApplyIfFiniteState | optax.ZeroNansState)

    return any(map(deals, jax.tree.leaves(opt_state, is_leaf=deals)))


def _check_opt_state(tx: Optimizer, carry: Carry) -> None:
    expected: Structure = jax.tree.structure(jax.eval_shape(tx.init, carry.factors))
    got: Structure = jax.tree.structure(carry.opt_state)
    if got != expected:
        raise ValueError(
            "the state's opt_state was made by another optimizer, or for other factors: make the state with "
            f"TrainState.create(adapted, step.tx). Expected {expected}, got {got}"
        )


# -- compilation -------------------------------------------------------------------------------------------------------


def _jit(program: Callable[..., Any], donate: bool) -> Callable[[Arguments], Any]:
    """Compiles with jit. On a mesh the carry comes back as it went in, or the second call would be compiled again."""
    jit = functools.partial(jax.jit, program, static_argnums=4, donate_argnums=(0,) if donate else ())
    plain = jit()

    @functools.lru_cache(maxsize=8)
    def pinned(structure: Structure, shardings: tuple[Sharding, ...]) -> Any:
        carry, loss = jax.tree.unflatten(structure, shardings)
        return jit(out_shardings=(carry, loss, None))

    def compiled(arguments: Arguments) -> Any:
        place = arguments.carry.step.sharding
        alone = place is None or len(place.device_set) == 1  # None: a shape that stands for an array of no place
        if alone and not any(map(host.waits, jax.tree.leaves(arguments.carry.opt_state))):
            return plain
        leaves, structure = jax.tree.flatten((arguments.carry, arguments.loss))
        return pinned(structure, tuple(leaf.sharding for leaf in leaves))

    return compiled


def _pmap(program: Callable[..., Any], donate: bool) -> Callable[[Arguments], Any]:
    """Compiles with pmap. What is not the batch is replicated, in and out: the state keeps its ordinary shapes."""
    mapped = jax.pmap(
        program,
        axis_name=AXIS,
        in_axes=(None, None, None, 0, None, None),
        out_axes=None,
        static_broadcasted_argnums=4,
        donate_argnums=(0,) if donate else (),
    )
    return lambda arguments: mapped
