"""What a method is tried on: a model, the task that its base has learned, and a new one.

A `Task` is functions and arrays, the same for texts and for images; `TextTask` and `ImageTask` are the configs that
`open` makes one of. All of it works on plain parameters; for an `Adapted`, lift what takes parameters, or merge.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Params = Any
Batch = Any  # a tree of arrays with the examples along their first axes
Domain = Literal["old", "new"]
Split = Literal["validation", "test"]


class Batches(Protocol):
    """Training batches as a function of the step: the position in the data is the step's number."""

    @property
    def examples(self) -> int:
        """Examples per epoch."""

    def __call__(self, step: int) -> Batch:
        """The batch of a step."""


@dataclass(frozen=True)
class Metric:
    """How good a model is.

    Attributes:
      label: "bits per byte", "accuracy".
      unit: written behind a value.
      better: which way.
      decimals: shown.
    """

    label: str
    unit: str
    better: Literal["lower", "higher"]
    decimals: int

    def text(self, value: float) -> str:
        """A value as it is shown."""
        return f"{value:.{self.decimals}f}{self.unit}"

    def gain(self, before: float, after: float) -> float:
        """By how much `after` is better than `before`; below 0 if it is worse."""
        return before - after if self.better == "lower" else after - before


class Outcome(NamedTuple):
    """What became of each example: the metric's value, and the loss in nats; their means are those of the data."""

    values: jax.Array
    losses: jax.Array


class Score(NamedTuple):
    """The metric and the loss in nats, averaged over a split."""

    value: float
    loss: float


class Scores(NamedTuple):
    """On both tasks."""

    new: Score
    old: Score


@dataclass(frozen=True)
class Task:
    """A model, the old task of its base, and the new one.

    Attributes:
      name, label: for folders, and for people.
      metric: how good a model is, on either task.
      old, new: the tasks' names.
      model: the linen module.
      initial: seed -> random parameters.
      forward: (params, batch) -> logits. Labels that the batch has are not read.
      outcome: (logits, batch) -> each example's value and loss.
      batches: (domain, batch size, seed) -> training batches.
      held_out: the whole split of a domain, as one batch.
      digest: a hash of all data.
    """

    name: str
    label: str
    metric: Metric
    old: str
    new: str
    model: nn.Module
    initial: Callable[[int], Params]
    forward: Callable[[Params, Batch], jax.Array]
    outcome: Callable[[jax.Array, Batch], Outcome]
    batches: Callable[[Domain, int, int], Batches]
    held_out: Callable[[Domain, Split], Batch]
    digest: str

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        """The mean loss over a batch, in nats: what is trained."""
        return jnp.mean(self.outcome(self.forward(params, batch), batch).losses)


class Scorer:
    """Scores of models on the held-out splits of a task; for plain parameters by one program for all of them."""

    def __init__(self, task: Task, batch: int = 64) -> None:
        """`batch` examples go at a time."""
        self.task = task
        self.forward = jax.jit(task.forward)
        self._outcome = jax.jit(task.outcome)
        self._batch = batch

    def __call__(self, params: Any, split: Split, forward: Callable[[Any, Batch], jax.Array] | None = None) -> Scores:
        """The scores of plain parameters; or of anything that `forward` takes, such as an `Adapted` that is lifted."""
        run = self.forward if forward is None else forward
        return Scores(*(self._score(run, params, self.task.held_out(domain, split)) for domain in ("new", "old")))

    def _score(self, forward: Callable[[Params, Batch], jax.Array], params: Params, whole: Batch) -> Score:
        count = len(jax.tree.leaves(whole)[0])
        parts = []
        for start in range(0, count, self._batch):
            batch = jax.device_put(rows(whole, np.minimum(np.arange(start, start + self._batch), count - 1)))
            parts.append(self._outcome(forward(params, batch), batch))
        return Score(*(_mean(arrays, count) for arrays in zip(*parts, strict=True)))


def rows(batch: Batch, places: np.ndarray | slice) -> Batch:
    """Some examples of a batch. The last one may be repeated to fill a batch: one shape is compiled once."""
    return jax.tree.map(lambda array: array[places], batch)


def _mean(arrays: Sequence[jax.Array], count: int) -> float:
    return float(np.concatenate(jax.device_get(list(arrays)))[:count].mean(dtype=np.float64))
