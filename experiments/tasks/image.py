"""A small Vision Transformer that has learned to read digits and learns to read them turned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.config import Pretrain, Train
from experiments.data import Digits, Labelled, Shuffled
from experiments.tasks.task import Batches, Domain, Metric, Outcome, Params, Split, Task
from jlora.models.vit import ViT, ViTConfig


@dataclass(frozen=True)
class ImageTask:
    """The config of a task on images; see `Task` for what `open` makes of it.

    Attributes:
      name, label: for folders and overrides, and for people.
      model: for images of the data's size.
      old, new: the images of the two domains.
      pretrain: how the base is made, on the old images.
      train: how it is adapted to the new ones.
    """

    name: str
    label: str
    model: ViTConfig
    old: Callable[[], Digits]
    new: Callable[[], Digits]
    pretrain: Pretrain
    train: Train

    def open(self) -> Task:
        """Reads the images."""
        model = ViT(self.model)
        domains: dict[Domain, Digits] = {"old": self.old(), "new": self.new()}

        def initial(seed: int) -> Params:
            side = self.model.image_size
            return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, side, side, self.model.channels)))["params"]

        def forward(params: Params, batch: Labelled) -> jax.Array:
            logits: Any = model.apply({"params": params}, batch.images)  # (batch, labels)
            return logits

        def outcome(logits: jax.Array, batch: Labelled) -> Outcome:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)  # (batch,)
            right = jnp.argmax(logits, axis=-1) == batch.labels
            return Outcome(100.0 * right.astype(jnp.float32), losses)

        def batches(domain: Domain, batch: int, seed: int) -> Batches:
            return Shuffled(domains[domain].train, batch, seed)

        def held_out(domain: Domain, split: Split) -> Labelled:
            return getattr(domains[domain], split)

        return Task(
            name=self.name,
            label=self.label,
            metric=Metric("accuracy", " %", "higher", 1),
            old=domains["old"].label,
            new=domains["new"].label,
            model=model,
            initial=initial,
            forward=forward,
            outcome=outcome,
            batches=batches,
            held_out=held_out,
            digest=domains["old"].digest() + domains["new"].digest(),
        )
