"""The training loop of a comparison: short runs, many of them by one compiled program."""

from collections.abc import Callable

import optax

from experiments.config import Train
from experiments.tasks.task import Batches
from jlora.state import TrainState
from jlora.train import Step


def at_rate(train: Train, learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a clipped gradient, a linear warm-up and a cosine to zero, its peak rate in the state.

    `experiments.fit.optimizer` has the rate in the program. Here a step that was made at one rate trains at every
    other, without being compiled again: `TrainState.create(adapted, at_rate(train, 1e-3, steps))` says which.
    """
    warmup = max(1, round(train.warmup * steps))
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(steps, warmup + 1))

    def adamw(peak: float) -> optax.GradientTransformation:
        rule = optax.adamw(lambda count: peak * shape(count), b2=train.b2, weight_decay=train.weight_decay)
        return optax.chain(optax.clip_by_global_norm(train.clip), rule)

    return optax.inject_hyperparams(adamw)(peak=learning_rate)


def train(
    step: Step, state: TrainState, batches: Batches, steps: int, advance: Callable[[int], None] = lambda _: None
) -> TrainState:
    """Takes `steps` steps; `advance` is told of each.

    Raises:
      FloatingPointError: if a loss or a gradient is not finite, naming the step.
    """
    for i in range(steps):
        state, _ = step(state, batches(i))
        advance(i + 1)
    state.check()
    return state
