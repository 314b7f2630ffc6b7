"""All that a training run carries from step to step: `TrainState`."""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora import host, tree
from jlora.adapted.adapted import Adapted
from jlora.optim import of_method, transformation

PyTree = Any
Structure = Any  # jax.tree_util.PyTreeDef, which type checkers take for a variable


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["adapted", "opt_state", "step", "key", "loss", "skipped"],
    meta_fields=[],
    drop_fields=["before"],
)
@dataclass(frozen=True)
class TrainState:
    """All that a training run carries from step to step.

    Attributes:
      adapted: the base, the factors and the method.
      opt_state: state of `jlora.optimizer(tx)`, for the factors alone.
      step: how many steps were taken, int32, ().
      key: random key of the run (typed, as from `jax.random.key`); step t folds t into it and the key itself stays.
      loss: loss of the last step, float32, (); 0 at the start. NaN also where that step's gradient was not finite. A
        step that was left out and gone on from (`train_step(nonfinite=)`) leaves it as it was.
      skipped: how many steps had a loss or a gradient that was not finite, int32, ().
      before: loss of the step before that one, for `check(last=False)`; None where no step made this state. It is no
        part of the tree: a state that is mapped, replaced or restored has none.
    """

    adapted: Adapted
    opt_state: PyTree
    step: jax.Array
    key: jax.Array
    loss: jax.Array
    skipped: jax.Array = field(default_factory=lambda: jnp.zeros((), jnp.int32))
    before: jax.Array | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def create(
        cls,
        adapted: Adapted,
        tx: optax.GradientTransformation,
        *,
        key: int | jax.Array = 0,
        memory_kind: str | None = None,
    ) -> Self:
        """The state before the first step.

        Factors and optimizer state are copied, so that donation leaves `adapted` as it is. NumPy leaves of the base are
        put on the device, once; its other leaves are taken as they are.

        Of an `adapted` with shapes in place of arrays (`jlora.apply` on `jax.ShapeDtypeStruct`s, or under
        `jax.eval_shape`) the state is one of shapes, for `Step.lower`: nothing is computed and no byte is allocated.
        The base's shapes keep their shardings; factors without one lie, as arrays do, all over the base's mesh. What a
        method computes from a sharded base (DoRA's norms) has none, and where XLA would leave it is not known: give it
        one where every byte counts.

        Args:
          adapted: from `jlora.apply` or `jlora.load`; one leaf that is a shape makes all of the state shapes.
          tx: the step's optimizer (`step.tx`, or the transformation that `train_step` was given).
          key: seed or key.
          memory_kind: where the optimizer's arrays wait between two steps: "pinned_host" is the host's memory, as of
            QLoRA's paged optimizer. A step brings them to the device for the update and puts them back, and so it does
            with what a checkpoint restores. Scalars stay on the device. None: on the device, all of them. Under "jit"
            alone, and not on JAX 0.10's CPU, which has no such programs.

        Raises:
          TypeError: if `adapted` is no `Adapted`, or `key` neither a seed nor a typed key.
          ValueError: if there is nothing to train, or if there is no memory of that kind.
        """
        if not isinstance(adapted, Adapted):
            raise TypeError(f"TrainState.create takes an Adapted (from jlora.apply), got {type(adapted).__name__}")
        tx = transformation(tx)
        if tree.is_abstract(adapted):
            return cls._abstract(jax.tree.map(tree.abstract, adapted), tx, key, memory_kind)
        key = tree.as_key(key)
        on_device = functools.partial(
            jax.tree.map, lambda x: jax.device_put(x) if isinstance(x, np.ndarray | np.generic) else x
        )
        own = functools.partial(jax.tree.map, lambda x: jnp.array(x, copy=True))
        factors = own(adapted.factors)
        return cls(
            adapted=adapted.replace(base=on_device(adapted.base), buffers=on_device(adapted.buffers), factors=factors),
            opt_state=host.placed(own(of_method(tx, adapted).init(factors)), memory_kind),
            step=jnp.zeros((), jnp.int32),
            key=key,
            loss=jnp.zeros((), jnp.float32),
        )

    @classmethod
    def _abstract(cls, adapted: Adapted, tx: optax.GradientTransformation, key: Any, memory_kind: str | None) -> Self:
        """The same of shapes. What an optimizer keeps for each factor (moments, averages) lies as the factor does."""
        factors = adapted.factors
        structure: Structure = jax.tree.structure(factors)

        def rest(factors: PyTree) -> tuple[PyTree, ...]:
            counters = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
            return of_method(tx, adapted).init(factors), *counters

        def beside(part: PyTree) -> PyTree:
            return jax.tree.map(_lying_as, part, factors) if is_like_factors(part) else part

        is_like_factors = lambda part: jax.tree.structure(part) == structure
        opt_state, step, loss, skipped = jax.eval_shape(rest, factors)
        opt_state = jax.tree.map(beside, opt_state, is_leaf=is_like_factors)
        key = jax.eval_shape(tree.as_key, key) if tree.is_abstract(key) else jax.eval_shape(lambda: tree.as_key(key))
        return cls(adapted, host.placed(opt_state, memory_kind), step, key, loss, skipped)

    def after(self, earlier: "TrainState") -> Self:
        """This state, which knows the loss of the state that the step was given."""
        object.__setattr__(self, "before", earlier.loss)
        return self

    def check(self, *, last: bool = True) -> None:
        """Waits for the last step and raises FloatingPointError if its loss or its gradient was not finite.

        A step checks the state that it is given without its last step, so that the device has always one to do; call
        this after the loop. `train_step(..., nonfinite="skip")` leaves such a step out and goes on.

        Args:
          last: wait for the last step. False: for the step before it alone.
        """
        loss = float(jax.device_get(self.loss if last or self.before is None else self.before))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss} at step {int(jax.device_get(self.step))} (nan also where the gradient alone is not "
                "finite): that update was not applied, the factors are those before it. Lower the learning rate, clip "
                "the gradient (optax.clip_by_global_norm), or look at this step's batch; "
                "jax.config.update('jax_debug_nans', True) names the operation."
            )


def _lying_as(x: Any, factor: Any) -> Any:
    return x.update(sharding=factor.sharding) if x.shape == factor.shape else x
