"""All that a training run carries from step to step: `TrainState`."""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora import tree
from jlora.adapted.adapted import Adapted
from jlora.optim import of_method, transformation

PyTree = Any


@jax.tree_util.register_dataclass
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
    """

    adapted: Adapted
    opt_state: PyTree
    step: jax.Array
    key: jax.Array
    loss: jax.Array
    skipped: jax.Array = field(default_factory=lambda: jnp.zeros((), jnp.int32))

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
        tx = transformation(tx)
        key = tree.as_key(key)
        on_device = functools.partial(
            jax.tree.map, lambda x: jax.device_put(x) if isinstance(x, np.ndarray | np.generic) else x
        )
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
        `train_step(..., nonfinite="skip")` leaves such a step out and goes on.
        """
        loss = float(jax.device_get(self.loss))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss} at step {int(jax.device_get(self.step))} (nan also where the gradient alone is not "
                "finite): that update was not applied, the factors are those before it. Lower the learning rate, clip "
                "the gradient (optax.clip_by_global_norm), or look at this step's batch; "
                "jax.config.update('jax_debug_nans', True) names the operation."
            )
