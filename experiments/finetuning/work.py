"""What every task comes down to once its checkpoint and its data are read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.data.batches import Batch, Batches

Params = Any
Apply = Callable[..., Any]
Split = Literal["validation", "test"]
Scores = dict[str, float]
Inputs = Mapping[str, Any]
"""A batch on the device."""


class Metric(NamedTuple):
    """What decides between two evaluations: its name among the scores, and which way is better."""

    name: str
    better: Literal["higher", "lower"]

    def beats(self, scores: Scores, best: Scores) -> bool:
        """Whether scores are better than the best so far; a NaN (a correlation of constants) is worse than any."""
        new, old = scores[self.name], best[self.name]
        if math.isnan(old):
            return not math.isnan(new)
        return new > old if self.better == "higher" else new < old


@dataclass(frozen=True, eq=False)
class Work:
    """A task on a pretrained model.

    Attributes:
      model: the linen module, with the task's head.
      params: seed -> its parameters, a new head's values being the seed's.
      decides: which evaluation of a run is its result, on the validation split.
      shows: the score of the plot and the table's first column, on the test split.
      examples: in an epoch.
      held_out: what the other splits have, for people: "872 validation, 1,821 test examples".
      batches: (batch size, seed) -> step -> the training batch.
      loss: (params, batch, key) -> the mean loss in nats, with the model's dropout.
      evaluator: apply -> a function (params, split) -> scores; "loss" is among those of the validation split.
      tokens: batch -> how many tokens are no padding; images have patches.
      head: a pattern of the head's parameters, "" for none: they are trained beside the factors.
      samples: (apply, params) -> lines to look at; None for no such thing.
      digest: a hash of the data.
    """

    model: nn.Module
    params: Callable[[int], Params]
    decides: Metric
    shows: Metric
    examples: int
    held_out: str
    batches: Callable[[int, int], Callable[[int], Batch]]
    loss: Callable[[Params, Inputs, jax.Array], jax.Array]
    evaluator: Callable[[Apply], Callable[[Params, Split], Scores]]
    tokens: Callable[[Batch], int]
    head: str
    digest: str
    samples: Callable[[Apply, Params], Sequence[str]] | None = None


def smoothed(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross entropy in nats with `smoothing` of the probability spread over all classes: (..., classes) -> (...)."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    target = -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    return (1 - smoothing) * target - smoothing * jnp.mean(log_probs, axis=-1) if smoothing else target


def outputs(
    forward: Callable[[Params, Inputs], Any], params: Params, batches: Batches, read: Sequence[str]
) -> dict[str, np.ndarray]:
    """The outputs of a forward pass and some arrays of all rows, in order, without those that fill the last batch."""
    found: dict[str, list[np.ndarray]] = {}
    for step in range(batches.steps_per_epoch):
        batch = batches(step)
        valid = batch.pop("valid")
        out = jax.device_get(forward(params, jax.device_put(batch)))
        for name, value in {"out": out, **{name: batch[name] for name in read}}.items():
            found.setdefault(name, []).append(value[valid])
    return {name: np.concatenate(parts) for name, parts in found.items()}
