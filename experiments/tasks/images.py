"""Images with a class each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import metrics
from experiments.config import ConfigError, Schedule
from experiments.data.batches import Batches
from experiments.data.images import ImageFolder
from experiments.tasks.checkpoint import headed
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
      old: reads what the base knew before, of the same classes, to see what of it is forgotten.
    """

    label: str
    data: Callable[[int], Splits]
    head: str = "^head/"
    old: Callable[[int], Splits] | None = None

    def open(self, source: Files, train: Schedule, evaluate_batch: int) -> Opened:
        """Reads the checkpoint and the data."""
        size, old = headed(source, head="none").model.config.image_size, self.old
        data = sides(lambda: self.data(size), None if old is None else lambda: old(size))
        classes = data["new"].train.classes
        for name, split in ((name, split) for splits in data.values() for name, split in splits._asdict().items()):
            if split.classes != classes:
                raise ConfigError(
                    f"the {name} images are of the classes {', '.join(split.classes)}, those to train on of "
                    f"{', '.join(classes)}"
                )
        model, params = headed(source, head="image_classification", labels=len(classes))

        def outputs(apply: Apply, params: Params, batch: Batch, **rest: Any) -> Any:
            return apply({"params": params}, batch["images"], **rest)

        def loss(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
            logits = outputs(model.apply, params, batch, deterministic=False, rngs={"dropout": key})
            return jnp.mean(smoothed(logits, batch["labels"], train.label_smoothing))

        def evaluator(apply: Apply) -> Evaluate:
            forward = jax.jit(lambda params, batch: outputs(apply, params, batch))

            def evaluate(params: Params, split: Split, side: Side) -> Scores:
                held_out = Batches(getattr(data[side], split), evaluate_batch, last="pad", epochs=1)
                found = outputs_of(forward, params, held_out, ("labels",))
                losses = smoothed(jnp.asarray(found["out"]), jnp.asarray(found["labels"]), 0.0)
                right = metrics.accuracy(np.argmax(found["out"], axis=-1), found["labels"])
                return {"accuracy": right, "loss": float(jnp.mean(losses))}

            return evaluate

        def domain(side: Side) -> Domain:
            images = data[side].train
            return Domain(f"the {side} images", len(images), lambda batch, seed: Batches(images, batch, seed))

        shown, new = Metric("accuracy", "higher"), data["new"]
        named = [[list(zip((p.name for p in s.paths), s.labels, strict=True)) for s in one] for one in data.values()]
        return Opened(
            model=model,
            params=params,
            new=domain("new"),
            old=domain("old") if old else None,
            loss=loss,
            outputs=outputs,
            evaluator=evaluator,
            selection_metric=shown,
            headline_metric=shown,
            held_out=f"{len(new.validation):,} validation, {len(new.test):,} test images",
            tokens=lambda batch: len(batch["labels"]) * (1 + model.config.patches),
            digest=digest_of(named),
            head=self.head,
        )
