"""The base of a task: pretrained once, kept, and used again by whoever has the same model, data and pretraining."""

from collections.abc import Callable
from pathlib import Path

import jax

import jlora
from experiments import config
from experiments import pretrained as disk
from experiments.config import Pretrain, in_steps
from experiments.folder import locked
from experiments.tasks.loop import at_rate, train
from experiments.tasks.task import Params, Task
from jlora.state import TrainState
from jlora.train import train_step


def pretrained(
    task: Task, how: Pretrain, folder: Path, *, seed: int = 0, advance: Callable[[int], None] = lambda _: None
) -> tuple[Params, Path, bool]:
    """The base of a task, from a file in `folder` if there is one, else trained on the old task.

    Args:
      task: its model and old data.
      how: steps, batch, learning rate.
      folder: of bases of all kinds; each has a folder of its own in it.
      seed: of the initial values and the batches.
      advance: told of every step.

    Returns:
      The parameters, the base's own folder, and whether it was there.

    Raises:
      FloatingPointError: if the pretraining diverges.
      ConfigError: if another process is at the same base.
    """
    model = {"class": type(task.model).__name__, "shape": config.describe(getattr(task.model, "config", None))}
    own = folder / config.key(model, how, seed, task.digest)
    initial = task.initial(seed)
    if (own / disk.NAME).exists():
        return disk.load(own, initial), own, True
    with locked(own):
        batches = task.batches("old", how.batch, seed)
        steps = in_steps(how.steps, batch=how.batch, examples=batches.examples)
        step = train_step(task.loss, at_rate(how, how.learning_rate, steps))
        state = TrainState.create(jlora.apply(initial, method=jlora.full()), step.tx, key=seed)
        base = jax.jit(jlora.merge)(train(step, state, batches, steps, advance).adapted)
        disk.save(own, base)
        return base, own, False
