"""A small Vision Transformer that has learned to read digits and learns to read them turned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import devices
from experiments.config import ConfigError, Schedule
from experiments.data import Digits as Images
from experiments.data import Labelled, Shuffled
from experiments.tasks.task import (
    Apply,
    Batch,
    Domain,
    Evaluate,
    Metric,
    Opened,
    Params,
    Scores,
    Side,
    Split,
    digest_of,
)
from jlora.models.vit import ViT, ViTConfig

ACCURACY = Metric("accuracy", "higher", " %", 1)


@dataclass(frozen=True)
class Digits:
    """A task of small images with a class each.

    Attributes:
      label: in titles.
      old, new: the images of the two domains.
    """

    label: str
    old: Callable[[], Images]
    new: Callable[[], Images]

    def open(self, source: Any, train: Schedule, evaluate_batch: int) -> Opened:
        """Reads the images."""
        if not isinstance(source, ViTConfig):
            raise ConfigError("a task of digits has a base that is pretrained here: base=Pretrain(ViTConfig(...), ...)")
        model, side_length = ViT(source), source.image_size
        data: dict[Side, Images] = {"new": self.new(), "old": self.old()}

        def outputs(apply: Apply, params: Params, batch: Batch) -> Any:
            return apply({"params": params}, batch.images)  # (batch, labels)

        def losses(logits: jax.Array, labels: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels)  # (batch,)

        def evaluator(apply: Apply) -> Evaluate:
            @jax.jit
            def forward(params: Params, batch: Labelled) -> tuple[jax.Array, jax.Array]:
                logits = outputs(apply, params, batch)
                return losses(logits, batch.labels), jnp.argmax(logits, axis=-1) == batch.labels

            def evaluate(params: Params, split: Split, side: Side) -> Scores:
                held_out: Labelled = getattr(data[side], split)
                count, parts, here = len(held_out.labels), [], devices.current()
                for start in range(0, count, evaluate_batch):
                    places = np.minimum(np.arange(start, start + evaluate_batch), count - 1)
                    batch = Labelled(*(array[places] for array in held_out))
                    parts.append(here.fetched(forward(params, here.put(batch))))
                lost, right = (np.concatenate(arrays)[:count] for arrays in zip(*parts, strict=True))
                return {ACCURACY.name: 100 * float(right.mean()), "loss": float(lost.mean(dtype=np.float64))}

            return evaluate

        def domain(side: Side) -> Domain:
            images = data[side].train
            return Domain(data[side].label, len(images.labels), lambda batch, seed: Shuffled(images, batch, seed))

        blank = jnp.zeros((1, side_length, side_length, source.channels))
        return Opened(
            model=model,
            params=lambda seed: jax.jit(model.init)(jax.random.key(seed), blank)["params"],
            new=domain("new"),
            old=domain("old"),
            loss=lambda params, batch, key: losses(outputs(model.apply, params, batch), batch.labels).mean(),
            outputs=outputs,
            evaluator=evaluator,
            selection_metric=ACCURACY,
            headline_metric=ACCURACY,
            held_out=f"{len(data['new'].validation.labels)} validation, {len(data['new'].test.labels)} test images",
            tokens=lambda batch: len(batch.labels) * (1 + source.patches),
            digest=digest_of(images.digest() for images in data.values()),
        )
