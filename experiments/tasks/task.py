"""The protocol of a task. A new one is a file here, with a frozen dataclass that has `label` and `open`, and a config.

`task.open(source, train, evaluate_batch)` reads the data and returns an `Opened`: the model, its parameters, the loss,
training batches and evaluations. `source` is what the experiment's base offers: the `Files` of a checkpoint, or the
config of a model that is pretrained here. All else (sweeps, seeds, going on after an interruption, the best point,
forgetting, TensorBoard, prices, plots, samples) is the same for every task and written elsewhere, once.

A task has a *new* domain, which the runs learn, and may have an *old* one, which the base knows, so that one sees what
is forgotten.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments import devices

if TYPE_CHECKING:
    from experiments.config import Schedule

Params = Any
Batch = Any
"""A tree of arrays with the examples along their first axes."""
Apply = Callable[..., Any]
"""The model's `apply`, plain or lifted."""
Split = Literal["validation", "test"]
Side = Literal["new", "old"]
Scores = dict[str, float]
Evaluate = Callable[[Params, Split, Side], Scores]
Read = TypeVar("Read")


class Metric(NamedTuple):
    """A score, and which way is better.

    Attributes:
      name: among the scores.
      better: which way.
      unit: written behind a value.
      decimals: shown.
    """

    name: str
    better: Literal["higher", "lower"]
    unit: str = ""
    decimals: int = 2

    def beats(self, scores: Scores, best: Scores) -> bool:
        """Whether scores are better than the best so far; a NaN (a correlation of constants) is worse than any."""
        new, old = scores[self.name], best[self.name]
        if math.isnan(old):
            return not math.isnan(new)
        return new > old if self.better == "higher" else new < old

    def gain(self, before: float, after: float) -> float:
        """Difference by which `after` is better than `before`; below 0 if it is worse."""
        return before - after if self.better == "lower" else after - before

    def text(self, value: float) -> str:
        """A value as it is shown."""
        return f"{value:.{self.decimals}f}{self.unit}"


class Files(NamedTuple):
    """A checkpoint: its folder, and fields of its model's config that are set otherwise."""

    folder: Path
    options: Mapping[str, Any]


class Sheet(NamedTuple):
    """Pictures of some prompts, to look at.

    Attributes:
      prompts: of the rows.
      images: (prompts, of each, height, width, channels), in [0, 1].
    """

    prompts: Sequence[str]
    images: np.ndarray


@dataclass(frozen=True, eq=False)
class Domain:
    """One kind of data.

    Attributes:
      label: for people: "Python".
      examples: in an epoch.
      batches: (batch size, seed) -> step -> the training batch. The step is all there is to the position in the data,
        whatever the number of processes. Where reading a row costs something, what is returned has `rows_of`, (step,
        numbers) -> these rows of the batch, which is all that one of several processes asks for.
    """

    label: str
    examples: int
    batches: Callable[[int, int], Callable[[int], Batch]]


@dataclass(frozen=True, eq=False)
class Opened:
    """A task whose data are read.

    Attributes:
      model: a linen module, with the task's head.
      params: seed -> its parameters: those of the checkpoint, a new head's being the seed's; random ones where the base
        is pretrained here. Those of a checkpoint take `quantize`, `block` and `double` of `jlora.models.load`.
      new, old: the domains; there may be no old one.
      loss: (params, batch, key) -> the mean loss in nats, with the model's dropout: what is trained.
      outputs: (apply, params, batch) -> the model's outputs without dropout, for a batch of training.
      evaluator: apply -> (params, split, side) -> scores. "loss", in nats, is among those of the validation split.
      selection_metric: which evaluation of a run is its result, and which learning rate is the best, by the validation
        split of the new domain.
      headline_metric: the first score of tables and plots, on the test split.
      held_out: what the other splits have, for people: "872 validation, 1,821 test examples".
      tokens: batch -> how many tokens are no padding, for the speed.
      digest: a hash of all data.
      head: a pattern of a new head's parameters, "" for none: they are trained beside the factors.
      samples: (apply, params) -> lines to look at; None for no such thing.
      understood: what the data were taken for, in lines that a run begins with; none where the task is told all of it.
      classes: the names of a classification's, for the config.json of a merged checkpoint; none for the checkpoint's.
      prepare: (the base, the experiment's folder, say) makes what the batches need of the base, before the first run,
        and keeps it in the folder; None for nothing. Batches of before have the same shapes.
      pictures: (parameters, plain or adapted) -> pictures, of the same prompts and seeds each time; None for none.
      save: (folder, plain parameters) writes a merged checkpoint; None for `jlora.models.save`.
      save_adapter: (folder, adapted) writes an adapter in the format of other programs; None for `jlora.peft.save`.
      old_digest: a hash of the old domain's data alone: bases pretrained on the same are one. `digest` when "".
    """

    model: Any
    params: Callable[..., Params]
    new: Domain
    old: Domain | None
    loss: Callable[[Params, Batch, jax.Array], jax.Array]
    outputs: Callable[[Apply, Params, Batch], Any]
    evaluator: Callable[[Apply], Evaluate]
    selection_metric: Metric
    headline_metric: Metric
    held_out: str
    tokens: Callable[[Batch], int]
    digest: str
    head: str = ""
    samples: Callable[[Apply, Params], Sequence[str]] | None = None
    understood: Sequence[str] = ()
    classes: Sequence[str] = ()
    prepare: Callable[[Params, Path, Callable[[str], None]], None] | None = None
    pictures: Callable[[Params], Sheet] | None = None
    save: Callable[[Path, Params], None] | None = None
    save_adapter: Callable[[Path, jlora.Adapted], None] | None = None
    old_digest: str = ""

    def domain(self, side: Side) -> Domain:
        """The new domain or the old one."""
        found = self.new if side == "new" else self.old
        assert found is not None, f"the task has no {side} domain"
        return found


class Task(Protocol):
    """The config of a task, a frozen dataclass: its fields are set by overrides, `task.length=64`."""

    @property
    def label(self) -> str:
        """Name of the task in titles."""

    def open(self, source: Any, train: "Schedule", evaluate_batch: int) -> Opened:
        """Reads the data.

        Args:
          source: `Files`, or the config of a model that is pretrained here.
          train: how the runs train; the loss has its label smoothing.
          evaluate_batch: examples at a time in an evaluation.

        Raises:
          ConfigError: if the fields do not go together.
          DataError: if the data are absent or not as expected.
        """


# -- what tasks share --------------------------------------------------------------------------------------------------


def sides(new: Callable[[], Read], old: Callable[[], Read] | None) -> dict[Side, Read]:
    """The data of the domains."""
    read: dict[Side, Read] = {"new": new()}
    return read if old is None else {**read, "old": old()}


def digest_of(data: Iterable[Any]) -> str:
    """A hash of what data are written as."""
    return hashlib.sha256(repr(list(data)).encode()).hexdigest()[:16]


def smoothed(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross entropy in nats with `smoothing` of the probability spread over all classes: (..., classes) -> (...)."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    target = -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    return (1 - smoothing) * target - smoothing * jnp.mean(log_probs, axis=-1) if smoothing else target


class Steps(Protocol):
    """Batches of all rows in order, as `experiments.data.batches.Batches` with `last="pad"`."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""

    def __call__(self, step: int) -> dict[str, Any]:
        """The batch of a step; `valid` says which rows are no copies."""


def outputs_of(
    forward: Callable[[Params, Batch], Any], params: Params, batches: Steps, read: Sequence[str]
) -> dict[str, np.ndarray]:
    """The outputs of a forward pass, "out", and some arrays of all rows, in order, without those that fill the last
    batch.
    """
    found: dict[str, list[np.ndarray]] = {}
    here = devices.current()
    for step in range(batches.steps_per_epoch):
        batch = batches(step)
        valid = batch.pop("valid")
        out = here.fetched(forward(params, here.put(batch)))
        for name, value in {"out": out, **{name: batch[name] for name in read}}.items():
            found.setdefault(name, []).append(value[valid])
    return {name: np.concatenate(parts) for name, parts in found.items()}
