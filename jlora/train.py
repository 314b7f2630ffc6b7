"""The training loop's state and its compiled step: `TrainState`, `train_step`.

Of a step's arguments some are donated and come back changed (factors, optimizer state, step counter), the others are
kept (the base, the method's buffers, the key): those never leave the device, are no output of the program, and the new
state holds the same Python objects. Nothing is closed over, or the base would become a constant of the program.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jlora import tree
from jlora.adapt import Adapted, combine, partition, with_key
from jlora.lift import lift
from jlora.optim import Optimizer, of_method, optimizer

PyTree = Any
Structure = Any  # jax.tree_util.PyTreeDef, which type checkers take for a variable
Kept = tuple[jax.Array | np.ndarray | np.generic | None, ...]
Metrics = dict[str, PyTree]

_AXIS = "devices"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a training run carries from step to step.

    Attributes:
      adapted: the base, the factors and the method.
      opt_state: state of `jlora.optimizer(tx)`, for the factors alone.
      step: how many steps were taken, int32, ().
      key: random key of the run (typed, as from `jax.random.key`); step t folds t into it and the key itself stays.
      loss: loss of the last step, float32, (); 0 at the start. NaN also where that step's gradient was not finite.
    """

    adapted: Adapted
    opt_state: PyTree
    step: jax.Array
    key: jax.Array
    loss: jax.Array

    @classmethod
    def create(cls, adapted: Adapted, tx: optax.GradientTransformation, *, key: int | jax.Array = 0) -> Self:
        """The state before the first step.

        Factors and optimizer state are copied, so that donation leaves `adapted` as it is. NumPy leaves of the base are
        put on the device, once; its other leaves are taken as they are.

        Args:
          adapted: from `jlora.apply` or `jlora.load`.
          tx: the step's optimizer (`step.tx`, or the transformation that `train_step` was given).
          key: seed or key.

        Raises:
          TypeError: if `adapted` is no `Adapted`, or `key` neither a seed nor a typed key.
          ValueError: if there is nothing to train.
        """
        if not isinstance(adapted, Adapted):
            raise TypeError(f"TrainState.create takes an Adapted (from jlora.apply), got {type(adapted).__name__}")
        if not isinstance(tx, optax.GradientTransformation):
            raise TypeError(f"tx is an Optax transformation, such as optax.adamw(2e-4), got {tx!r}")
        key = tree.as_key(key)
        on_device = functools.partial(jax.tree.map, lambda x: jax.device_put(x) if isinstance(x, np.ndarray) else x)
        own = functools.partial(jax.tree.map, lambda x: jnp.array(x, copy=True))
        factors = own(adapted.factors)
        return cls(
            adapted=adapted.replace(base=on_device(adapted.base), buffers=on_device(adapted.buffers), factors=factors),
            opt_state=own(of_method(tx, adapted).init(factors)),
            step=jnp.zeros((), jnp.int32),
            key=key,
            loss=jnp.zeros((), jnp.float32),
        )

    def check(self) -> None:
        """Waits for the last step and raises FloatingPointError if its loss or its gradient was not finite.

        A step checks the state that it is given, and so reports on the step before it; call this after the loop.
        """
        loss = float(jax.device_get(self.loss))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss} at step {int(jax.device_get(self.step))} (nan also where the gradient alone is not "
                "finite): that update was not applied, the factors are those before it. Lower the learning rate, clip "
                "the gradient (optax.clip_by_global_norm), or look at this step's batch; "
                "jax.config.update('jax_debug_nans', True) names the operation."
            )


class Carry(NamedTuple):
    """What a step changes; these buffers are donated."""

    factors: PyTree
    opt_state: PyTree
    step: jax.Array


@dataclass(frozen=True)
class Skeleton:
    """The static part of the frozen half of an Adapted: its structure, and the leaves that are no arrays."""

    structure: Structure
    leaves: tuple[Any, ...]

    def fill(self, arrays: Kept) -> Adapted:
        leaves = [leaf if array is None else array for array, leaf in zip(arrays, self.leaves, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)


class Arguments(NamedTuple):
    """The arguments of the compiled program. A leaf of the base that is no array (a module's function) is static."""

    carry: Carry
    kept: Kept
    key: jax.Array
    batch: PyTree
    skeleton: Skeleton


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
          FloatingPointError: if the step *before* this one had a non-finite loss or gradient. That update was left out,
            and `state` is still whole. The look at the last loss comes after the batch was sent and just before the
            next step is started, so that it costs no more than the start of one program.
          ValueError: if the batch does not divide, or if `state` was made for another optimizer.
        """
        _check_usable(state)
        arguments = self.arguments(state, batch)
        state.check()
        carry, loss, metrics = self.compiled(arguments)(*arguments)
        frozen = arguments.skeleton.fill(arguments.kept)
        adapted = state.adapted.replace(base=frozen.base, buffers=frozen.buffers, factors=carry.factors)
        return TrainState(adapted, carry.opt_state, carry.step, arguments.key, loss), metrics

    def lower(self, state: TrainState, batch: PyTree) -> jax.stages.Lowered:
        """The program for these arguments, not run: `.compile()` has `cost_analysis()` and `memory_analysis()`."""
        arguments = self.arguments(state, batch)
        return self.compiled(arguments).lower(*arguments)


def train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    parallel: Literal["jit", "pmap"] = "jit",
    accumulate: int = 1,
    has_aux: bool = False,
    pass_key: bool = False,
    donate: bool = True,
) -> Step:
    """The training step of the factors, compiled.

    `loss_fn(params, batch)` is the loss of plain parameters: it is lifted here and differentiated with respect to the
    factors (and extras) alone, so that no gradient of the base is ever formed. A step whose loss or gradient is not
    finite changes nothing but the counter and `state.loss`, and the next call, or `state.check()`, raises.

    Args:
      loss_fn: params, batch -> a real scalar, the mean over the batch's examples; with `has_aux` a pair of it and a
        dict of further metrics.
      tx: any Optax transformation; `jlora.optimizer` is put around it. Its update is also given `value=loss`.
      parallel: "jit": one program. Arrays of the base or the batch that lie on a mesh keep their shardings, and what
        has none (factors, optimizer state) is replicated over it; a batch split over the mesh trains data-parallel.
        "pmap": data-parallel over all local devices: the batch's leading axis is split, the gradients averaged, and the
        base and the state copied to each device, once.
      accumulate: number of micro-batches, one after the other, whose gradients are averaged. Micro-batch i is the rows
        i, i + accumulate, ..., so that the rows of a sharded batch stay on their devices.
      has_aux: with `accumulate` > 1 or "pmap" the aux is averaged too, and has to consist of real scalars.
      pass_key: call `loss_fn(params, batch, key)`, with another key at every step, micro-batch and device. The
        method's own dropout has a key of its own in any case.
      donate: reuse the buffers of the given state's factors and optimizer state; never those of the base.

    Raises:
      ValueError: if `parallel` is unknown or `accumulate` below 1; at the first call if the loss is no scalar.
    """
    if parallel not in ("jit", "pmap"):
        raise ValueError(f"parallel={parallel!r} is unknown: choose 'jit' or 'pmap'")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate is the number of micro-batches, an integer of at least 1, got {accumulate!r}")
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"tx is an Optax transformation, such as optax.adamw(2e-4), got {tx!r}")
    tx = optimizer(tx)
    averaged = accumulate > 1 or parallel == "pmap"
    objective = _objective(loss_fn, has_aux=has_aux, pass_key=pass_key, averaged=averaged)
    axis = _AXIS if parallel == "pmap" else None

    def program(carry: Carry, kept: Any, key: jax.Array, batch: PyTree, skeleton: Skeleton) -> Any:
        return _program(objective, tx, accumulate, axis, Arguments(carry, kept, key, batch, skeleton))

    if parallel == "jit":
        return Step(tx, functools.partial(_arguments, accumulate), program, _jit(program, donate))
    return Step(tx, functools.partial(_pmap_arguments, accumulate), program, _pmap(program, donate))


def _check_usable(state: TrainState) -> None:
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


def _objective(loss_fn: Callable[..., Any], *, has_aux: bool, pass_key: bool, averaged: bool) -> Callable[..., Any]:
    """(factors, frozen, batch, key) -> (loss, aux), checked while it is traced."""
    lifted = lift(loss_fn)

    def objective(factors: PyTree, frozen: Adapted, batch: PyTree, key: jax.Array) -> tuple[jax.Array, Metrics]:
        dropout, user = jax.random.split(key)
        params = with_key(combine(factors, frozen), dropout)
        out = lifted(params, batch, user) if pass_key else lifted(params, batch)
        loss, aux = _loss_and_aux(out, has_aux)
        if frozen.method.regulariser is not None:
            regulariser = frozen.method.regulariser(factors, frozen.sites)
            loss, aux = loss + regulariser, {**aux, "regulariser": regulariser}
        if averaged:
            _check_scalars(aux)
        return loss, aux

    return objective


def _loss_and_aux(out: Any, has_aux: bool) -> tuple[jax.Array, Metrics]:
    if has_aux:
        if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
            raise TypeError(f"has_aux=True: loss_fn returns (loss, dict of metrics), got {_kind(out)}")
        loss, aux = out
        taken = sorted({"loss", "grad_norm", "regulariser"} & set(aux))
        if taken:
            raise ValueError(f"the aux of loss_fn has {taken}, which the metrics hold already: rename them")
    else:
        loss, aux = out, {}
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | float):
        hint = "; pass has_aux=True for a pair of loss and metrics" if isinstance(out, tuple) else ""
        raise TypeError(f"loss_fn returns a real scalar, got {_kind(loss)}{hint}")
    loss = jnp.asarray(loss)
    if loss.shape != ():
        raise ValueError(f"loss_fn returns a scalar, got an array of shape {loss.shape}: take its mean")
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(f"loss_fn returns a real scalar, got one of type {loss.dtype}")
    return loss.astype(jnp.float32), aux


def _kind(x: Any) -> str:
    return f"a tuple of {len(x)}" if isinstance(x, tuple) else type(x).__name__


def _check_scalars(aux: Metrics) -> None:
    for path, leaf in jax.tree.leaves_with_path(aux):
        leaf = jnp.asarray(leaf)
        if leaf.shape != () or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"aux {jax.tree_util.keystr(path)} has shape {leaf.shape} and type {leaf.dtype}: over micro-batches "
                "and devices only means can be averaged, so return real scalars"
            )


def _program(
    objective: Callable[..., Any], tx: Optimizer, accumulate: int, axis: str | None, arguments: Arguments
) -> tuple[Carry, jax.Array, Metrics]:
    """One step as a pure function: (the new carry, the loss to remember, the metrics)."""
    carry, kept, key, batch, skeleton = arguments
    frozen = skeleton.fill(kept)
    tx = of_method(tx, frozen)
    _check_opt_state(tx, carry)

    def loss_of(factors: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, Metrics]:
        return objective(factors, frozen, batch, key)

    key = jax.random.fold_in(key, carry.step)
    if axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    (loss, aux), gradients = _value_and_gradient(loss_of, carry.factors, batch, key, accumulate)
    if axis is not None:
        loss, aux, gradients = jax.lax.pmean((loss, aux, gradients), axis)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = tx.update(gradients, carry.opt_state, carry.factors, value=loss)
    new = Carry(optax.apply_updates(carry.factors, updates), opt_state, carry.step)
    new = jax.tree.map(functools.partial(jax.lax.select, finite), new, carry)
    remembered = jnp.where(finite | ~jnp.isfinite(loss), loss, jnp.float32(jnp.nan))
    return new._replace(step=carry.step + 1), remembered, {**aux, "loss": loss, "grad_norm": norm}


def _check_opt_state(tx: Optimizer, carry: Carry) -> None:
    expected: Structure = jax.tree.structure(jax.eval_shape(tx.init, carry.factors))
    got: Structure = jax.tree.structure(carry.opt_state)
    if got != expected:
        raise ValueError(
            "the state's opt_state was made by another optimizer, or for other factors: make the state with "
            f"TrainState.create(adapted, step.tx). Expected {expected}, got {got}"
        )


def _value_and_gradient(
    loss_of: Callable[..., Any], factors: PyTree, batch: PyTree, key: jax.Array, accumulate: int
) -> tuple[tuple[jax.Array, Metrics], PyTree]:
    """((loss, aux), gradient) of `loss_of(factors, batch, key)`, averaged over the micro-batches."""
    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    if accumulate == 1:
        return gradient_of(factors, batch, jax.random.fold_in(key, 0))

    def micro_step(total: PyTree, inputs: tuple[jax.Array, PyTree]) -> tuple[PyTree, Any]:
        index, micro_batch = inputs
        out, gradient = gradient_of(factors, micro_batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, gradient), out

    # Row i goes to micro-batch i % accumulate. Consecutive rows would be gathered from all devices of a sharded batch.
    micro_batches = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0),  # (accumulate, rows, ...)
        batch,
    )
    zeros = jax.tree.map(jnp.zeros_like, factors)
    total, out = jax.lax.scan(micro_step, zeros, (jnp.arange(accumulate), micro_batches))
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), out), jax.tree.map(lambda x: x / accumulate, total)


# -- arguments and compilation -----------------------------------------------------------------------------------------


def _jit(program: Callable[..., Any], donate: bool) -> Callable[[Arguments], Any]:
    """Compiles with jit. On a mesh the carry comes back as it went in, or the second call would be compiled again."""
    jit = functools.partial(jax.jit, program, static_argnums=4, donate_argnums=(0,) if donate else ())
    plain = jit()

    @functools.lru_cache(maxsize=8)
    def pinned(structure: Structure, shardings: tuple[Sharding, ...]) -> Any:
        return jit(out_shardings=(jax.tree.unflatten(structure, shardings), None, None))

    def compiled(arguments: Arguments) -> Any:
        if len(arguments.carry.step.sharding.device_set) == 1:
            return plain
        leaves, structure = jax.tree.flatten(arguments.carry)
        return pinned(structure, tuple(leaf.sharding for leaf in leaves))

    return compiled


def _pmap(program: Callable[..., Any], donate: bool) -> Callable[[Arguments], Any]:
    """Compiles with pmap. What is not the batch is replicated, in and out: the state keeps its ordinary shapes."""
    mapped = jax.pmap(
        program,
        axis_name=_AXIS,
        in_axes=(None, None, None, 0, None),
        out_axes=None,
        static_broadcasted_argnums=4,
        donate_argnums=(0,) if donate else (),
    )
    return lambda arguments: mapped


def _split(state: TrainState) -> tuple[Carry, Kept, Skeleton]:
    factors, frozen = partition(state.adapted)
    leaves, structure = jax.tree.flatten(frozen)
    kept = tuple(leaf if isinstance(leaf, jax.Array | np.ndarray | np.generic) else None for leaf in leaves)
    rest = tuple(leaf if array is None else None for leaf, array in zip(leaves, kept, strict=True))
    return Carry(factors, state.opt_state, state.step), kept, Skeleton(structure, rest)


def _arguments(accumulate: int, state: TrainState, batch: PyTree) -> Arguments:
    """The arguments under jit: the state beside the base, and an unplaced batch too."""
    if accumulate > 1:
        _check_batch(batch, accumulate, f"{accumulate} micro-batches (accumulate={accumulate})")
    carry, kept, skeleton = _split(state)
    home = _home(jax.tree.leaves((kept, batch, carry)))
    carry, key = jax.tree.map(functools.partial(_beside, home), (carry, state.key))
    batch = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, home), batch)
    return Arguments(carry, kept, key, batch, skeleton)


def _home(leaves: list[Any]) -> Sharding | None:
    """Where the state belongs: all over the mesh of the first sharded array, else with the first committed one."""
    shardings = [x.sharding for x in leaves if isinstance(x, jax.Array) and x.committed]
    for sharding in shardings:
        if isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1:
            return NamedSharding(sharding.mesh, PartitionSpec())
    for sharding in shardings:
        if len(sharding.device_set) == 1:
            return SingleDeviceSharding(*sharding.device_set)
    return None


def _beside(home: Sharding | None, x: jax.Array) -> jax.Array:
    if home is None or (x.committed and x.sharding.device_set == home.device_set):
        return x
    return jax.device_put(x, home)


def _pmap_arguments(accumulate: int, state: TrainState, batch: PyTree) -> Arguments:
    """The arguments under pmap: the state replicated (nothing moves if it is), the batch as (devices, rows, ...)."""
    if jax.process_count() > 1:
        raise ValueError(
            "parallel='pmap' is for one process: with several, use 'jit' and a batch sharded over the mesh"
        )
    devices = jax.local_devices()
    parts = len(devices) * accumulate
    what = f"{len(devices)} devices" + (f" times {accumulate} micro-batches = {parts} parts" if accumulate > 1 else "")
    _check_batch(batch, parts, what)
    mesh = Mesh(np.array(devices), (_AXIS,))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(_AXIS))
    carry, kept, skeleton = _split(state)
    carry, kept, key = jax.tree.map(functools.partial(_replicated, everywhere), (carry, kept, state.key))
    batch = jax.tree.map(lambda x: jax.device_put(x.reshape(len(devices), -1, *x.shape[1:]), split), batch)
    return Arguments(carry, kept, key, batch, skeleton)


def _replicated(everywhere: NamedSharding, x: jax.Array) -> jax.Array:
    if isinstance(x, jax.Array):
        if x.sharding == everywhere:
            return x
        if not x.sharding.is_fully_replicated:
            raise ValueError(
                f"an array of shape {x.shape} is sharded as {x.sharding}: parallel='pmap' keeps a whole copy on every "
                "device; use parallel='jit', which keeps shardings"
            )
    return jax.device_put(x, everywhere)


def _check_batch(batch: PyTree, parts: int, what: str) -> None:
    """Every leaf of the batch has the same leading axis, and `parts` divides it."""
    leaves = jax.tree.leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"the batch has no arrays to divide over {what}")
    sizes = {f"batch{jax.tree_util.keystr(path)}": np.shape(leaf) for path, leaf in leaves}
    for name, shape in sizes.items():
        if not shape:
            raise ValueError(f"{name} has no leading axis to divide over {what}")
    first, *others = sizes
    for name in others:
        if sizes[name][0] != sizes[first][0]:
            raise ValueError(
                f"the leaves of the batch have different leading axes: {first} {sizes[first]}, {name} {sizes[name]}; "
                f"all are divided over {what}"
            )
    size = sizes[first][0]
    if size % parts:
        raise ValueError(f"the batch has {size} examples ({first} {sizes[first]}), which {what} do not divide")
