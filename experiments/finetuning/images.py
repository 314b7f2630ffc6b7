"""Images with a class each."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import metrics
from experiments.config import ConfigError
from experiments.data.batches import Batches
from experiments.data.images import ImageFolder
from experiments.finetuning.schedule import Schedule
from experiments.finetuning.work import Apply, Inputs, Metric, Params, Scores, Split, Work, outputs, smoothed
from jlora import models


class Splits(NamedTuple):
    """Images of the same classes and size."""

    train: ImageFolder
    validation: ImageFolder
    test: ImageFolder


@dataclass(frozen=True)
class Images:
    """A task of images in folders.

    Attributes:
      label: in titles.
      data: side in pixels -> the splits.
      head: a pattern of the head's parameters.
    """

    label: str
    data: Callable[[int], Splits]
    head: str = "^head/"

    def open(self, folder: Path, train: Schedule, evaluate_batch: int, **options: Any) -> Work:
        """Reads the checkpoint and the data."""
        body: Any = models.build(folder, head="none", **options)
        splits = self.data(body.config.image_size)
        for name, split in splits._asdict().items():
            if split.classes != splits.train.classes:
                raise ConfigError(
                    f"the {name} images are of the classes {', '.join(split.classes)}, those to train on of "
                    f"{', '.join(splits.train.classes)}"
                )
        told = {"head": "image_classification", "labels": len(splits.train.classes), **options}
        model: Any = models.build(folder, **told)

        def loss(params: Params, batch: Inputs, key: jax.Array) -> jax.Array:
            logits = model.apply({"params": params}, batch["images"], deterministic=False, rngs={"dropout": key})
            return jnp.mean(smoothed(logits, batch["labels"], train.label_smoothing))

        held_out = {
            name: Batches(getattr(splits, name), evaluate_batch, last="pad", epochs=1)
            for name in ("validation", "test")
        }

        def evaluator(apply: Apply) -> Callable[[Params, Split], Scores]:
            forward = jax.jit(lambda params, batch: apply({"params": params}, batch["images"]))

            def evaluate(params: Params, split: Split) -> Scores:
                found = outputs(forward, params, held_out[split], ("labels",))
                losses = smoothed(jnp.asarray(found["out"]), jnp.asarray(found["labels"]), 0.0)
                right = metrics.accuracy(np.argmax(found["out"], axis=-1), found["labels"])
                return {"accuracy": right, "loss": float(jnp.mean(losses))}

            return evaluate

        text = repr([[(path.name, label) for path, label in zip(s.paths, s.labels, strict=True)] for s in splits])
        return Work(
            model=model,
            params=lambda seed: models.load(folder, seed=seed, **told).params,
            decides=Metric("accuracy", "higher"),
            shows=Metric("accuracy", "higher"),
            examples=len(splits.train),
            held_out=f"{len(splits.validation):,} validation, {len(splits.test):,} test images",
            batches=lambda batch, seed: Batches(splits.train, batch, seed),
            loss=loss,
            evaluator=evaluator,
            tokens=lambda batch: len(batch["labels"]) * (1 + model.config.patches),
            head=self.head,
            digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        )
