"""Texts, or pairs of texts, with a class or a value: GLUE and its kin."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import ConfigError
from experiments.data.batches import Batches
from experiments.data.examples import Classified
from experiments.data.pipeline import Rows, classified_rows, tokenise_classified
from experiments.finetuning.completion import shortened
from experiments.finetuning.schedule import Schedule
from experiments.finetuning.work import Apply, Inputs, Metric, Params, Scores, Split, Work, outputs, smoothed
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
    """

    label: str
    data: Callable[[], Splits]
    classes: int | None
    measure: Measure
    length: int = 128
    truncate: bool = True
    head: str = r"^(pooler|classifier|score)/"

    def open(self, folder: Path, train: Schedule, evaluate_batch: int, **options: Any) -> Work:
        """Reads the checkpoint and the data."""
        tokenizer = models.Tokenizer.load(folder)

        def pretrained(seed: int) -> models.Pretrained:
            return models.load(folder, head="sequence_classification", labels=self.classes or 1, seed=seed, **options)

        model: Any = models.build(folder, head="sequence_classification", labels=self.classes or 1, **options)
        if self.length > model.config.context:
            raise ConfigError(f"task.length={self.length} is more than the model's context, {model.config.context}")
        tokenizer.check(model.config.vocab_size)
        pad = 0 if tokenizer.pad is None else tokenizer.pad
        typed = getattr(model.config, "types", 0) > 1

        cut: list[int] = []

        def rows(examples: Sequence[Classified]) -> Rows:
            items = tokenise_classified(
                examples, tokenizer.encode, length=self.length, classes=self.classes, truncate=self.truncate
            )
            cut.append(items.cut)
            return classified_rows(items, self.length, pad=pad)

        def inputs(batch: Inputs) -> dict[str, Any]:
            return {"mask": batch["mask"]} | ({"types": batch["types"]} if typed else {})

        def loss(params: Params, batch: Inputs, key: jax.Array) -> jax.Array:
            out = model.apply(
                {"params": params}, batch["tokens"], **inputs(batch), deterministic=False, rngs={"dropout": key}
            )
            return jnp.mean(self._losses(out, batch["labels"], train.label_smoothing))

        if self.classes is None and train.label_smoothing:
            raise ConfigError("train.label_smoothing is of classes; this task has values (task.classes=None)")
        splits = self.data()
        for name, examples in splits._asdict().items():
            if not examples or examples[0].label is None:
                raise ConfigError(
                    f"the {name} split has {'no labels' if examples else 'no examples'}: take another one"
                )
        made: dict[str, Rows] = {"train": rows(splits.train)}
        held_out = {
            name: Batches(rows(getattr(splits, name)), evaluate_batch, last="pad", epochs=1)
            for name in ("validation", "test")
        }

        def evaluator(apply: Apply) -> Callable[[Params, Split], Scores]:
            forward = jax.jit(lambda params, batch: apply({"params": params}, batch["tokens"], **inputs(batch)))

            def evaluate(params: Params, split: Split) -> Scores:
                found = outputs(forward, params, held_out[split], ("labels",))
                losses = jax.device_get(self._losses(jnp.asarray(found["out"]), jnp.asarray(found["labels"]), 0.0))
                said = found["out"][:, 0] if self.classes is None else np.argmax(found["out"], axis=-1)
                return {**self.measure(said, found["labels"]), "loss": float(np.mean(losses))}

            return evaluate

        text = repr([[(e.text, e.pair, e.label) for e in part] for part in splits])
        shown = Metric(next(iter(self.measure(np.arange(2), np.arange(2)))), "higher")
        return Work(
            model=model,
            params=lambda seed: pretrained(seed).params,
            decides=shown,
            shows=shown,
            examples=len(splits.train),
            held_out=f"{len(splits.validation):,} validation, {len(splits.test):,} test examples{shortened(cut)}",
            batches=lambda batch, seed: Batches(made["train"], batch, seed),
            loss=loss,
            evaluator=evaluator,
            tokens=lambda batch: int(batch["mask"].sum()),
            head=self.head,
            digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        )

    def _losses(self, out: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
        """Of each row, in nats, or squared."""
        if self.classes is None:
            return (out[:, 0] - labels) ** 2
        return smoothed(out, labels, smoothing)
