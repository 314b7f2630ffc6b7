"""Texts, or pairs of texts, with a class or a value: GLUE and its kin."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import ConfigError, Schedule
from experiments.data.batches import Batches
from experiments.data.examples import Classified
from experiments.data.pipeline import Rows, classified_rows, tokenise_classified
from experiments.tasks.checkpoint import check_fits, headed
from experiments.tasks.completion import shortened
from experiments.tasks.task import (
    Apply,
    Batch,
    Domain,
    Evaluate,
    Files,
    Metric,
    Opened,
    Params,
    Scores,
    Side,
    Split,
    digest_of,
    outputs_of,
    sides,
    smoothed,
)
from jlora import models

Measure = Callable[[np.ndarray, np.ndarray], Scores]


class Splits(NamedTuple):
    """Examples; the test split may be the validation split where the labels of the real one are not published."""

    train: Sequence[Classified]
    validation: Sequence[Classified]
    test: Sequence[Classified]


@dataclass(frozen=True)
class Classification:
    """A task of texts with labels.

    Attributes:
      label: in titles.
      data: reads the splits.
      classes: their number; None for values, with the squared error.
      measure: (predictions, labels) -> scores; the first one is shown and decides.
      length: of a row, in tokens.
      truncate: cut what is longer; an error otherwise.
      head: a pattern of the head's parameters.
      old: reads the splits of what the base knew before, to see what of it is forgotten.
    """

    label: str
    data: Callable[[], Splits]
    classes: int | None
    measure: Measure
    length: int = 128
    truncate: bool = True
    head: str = r"^(pooler|classifier|score)/"
    old: Callable[[], Splits] | None = None

    def open(self, source: Files, train: Schedule, evaluate_batch: int) -> Opened:
        """Reads the checkpoint and the data."""
        tokenizer = models.Tokenizer.load(source.folder)
        model, params = headed(source, head="sequence_classification", labels=self.classes or 1)
        check_fits(model, tokenizer, self.length)
        if self.classes is None and train.label_smoothing:
            raise ConfigError("train.label_smoothing is of classes; this task has values (task.classes=None)")
        typed = getattr(model.config, "types", 0) > 1
        data = sides(self.data, self.old)
        for splits in data.values():
            _check(splits)
        rows, cut = self._rows(data, tokenizer)

        def inputs(batch: Batch) -> dict[str, Any]:
            return {"mask": batch["mask"]} | ({"types": batch["types"]} if typed else {})

        def outputs(apply: Apply, params: Params, batch: Batch, **rest: Any) -> Any:
            return apply({"params": params}, batch["tokens"], **inputs(batch), **rest)

        def loss(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
            out = outputs(model.apply, params, batch, deterministic=False, rngs={"dropout": key})
            return jnp.mean(self._losses(out, batch["labels"], train.label_smoothing))

        def evaluator(apply: Apply) -> Evaluate:
            forward = jax.jit(lambda params, batch: outputs(apply, params, batch))

            def evaluate(params: Params, split: Split, side: Side) -> Scores:
                held_out = Batches(rows[side, split], evaluate_batch, last="pad", epochs=1)
                found = outputs_of(forward, params, held_out, ("labels",))
                losses = jax.device_get(self._losses(jnp.asarray(found["out"]), jnp.asarray(found["labels"]), 0.0))
                predictions = found["out"][:, 0] if self.classes is None else np.argmax(found["out"], axis=-1)
                return {**self.measure(predictions, found["labels"]), "loss": float(np.mean(losses))}

            return evaluate

        def domain(side: Side) -> Domain:
            made = rows[side, "train"]
            return Domain(f"the {side} task", len(made), lambda batch, seed: Batches(made, batch, seed))

        shown = Metric(next(iter(self.measure(np.arange(2), np.arange(2)))), "higher")
        new = data["new"]
        return Opened(
            model=model,
            params=params,
            new=domain("new"),
            old=domain("old") if self.old else None,
            loss=loss,
            outputs=outputs,
            evaluator=evaluator,
            selection_metric=shown,
            headline_metric=shown,
            held_out=f"{len(new.validation):,} validation, {len(new.test):,} test examples{shortened(cut)}",
            tokens=lambda batch: int(batch["mask"].sum()),
            digest=digest_of([(e.text, e.pair, e.label) for e in part] for splits in data.values() for part in splits),
            head=self.head,
        )

    def _rows(
        self, data: Mapping[Side, Splits], tokenizer: models.Tokenizer
    ) -> tuple[dict[tuple[Side, str], Rows], list[int]]:
        """The rows of tokens of all domains and splits, and how many examples of each were cut."""
        made, cut = {}, []
        pad = 0 if tokenizer.pad is None else tokenizer.pad
        for side, splits in data.items():
            for name, examples in splits._asdict().items():
                items = tokenise_classified(
                    examples, tokenizer.encode, length=self.length, classes=self.classes, truncate=self.truncate
                )
                cut.append(items.cut)
                made[side, name] = classified_rows(items, self.length, pad=pad)
        return made, cut

    def _losses(self, out: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
        """Losses of the rows, in nats, or squared."""
        if self.classes is None:
            return (out[:, 0] - labels) ** 2
        return smoothed(out, labels, smoothing)


def _check(splits: Splits) -> None:
    for name, examples in splits._asdict().items():
        if not examples or examples[0].label is None:
            raise ConfigError(f"the {name} split has {'no labels' if examples else 'no examples'}: take another one")
