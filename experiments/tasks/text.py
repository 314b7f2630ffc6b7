"""A byte-level GPT-2 that has learned one kind of text and learns another."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.config import Data, Pretrain, Train
from experiments.data import Corpus, Windows, spread
from experiments.tasks.task import Batch, Batches, Domain, Metric, Outcome, Params, Split, Task
from jlora.models.gpt2 import GPT2, GPT2Config


@dataclass(frozen=True)
class TextTask:
    """The config of a task on texts; see `Task` for what `open` makes of it.

    Attributes:
      name, label: for folders and overrides, and for people.
      model: of bytes.
      data: the old and the new text.
      pretrain: how the base is made, on the old text.
      train: how it is adapted to the new one.
      validation, test: windows of each domain.
      length: of a window, in bytes; the model's context when None. Prompts need some of the context for themselves: the
        base is pretrained on windows of all of it, so that it knows the last positions too.
    """

    name: str
    label: str
    model: GPT2Config
    data: Data
    pretrain: Pretrain
    train: Train
    validation: int
    test: int
    length: int | None = None

    def open(self) -> Task:
        """Reads the texts."""
        model, context = GPT2(self.model), self.model.context
        length = context if self.length is None else self.length
        texts: dict[Domain, Corpus] = {"old": self.data.old(), "new": self.data.new()}
        counts: dict[Split, int] = {"validation": self.validation, "test": self.test}
        held_out = {(d, s): spread(text.bytes(s), length, n) for d, text in texts.items() for s, n in counts.items()}

        def initial(seed: int) -> Params:
            return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]

        def forward(params: Params, windows: Batch) -> jax.Array:
            logits: Any = model.apply({"params": params}, windows[:, :-1])  # (batch, length, 256)
            return logits

        def outcome(logits: jax.Array, windows: Batch) -> Outcome:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(axis=1)  # (batch,)
            return Outcome(losses / math.log(2), losses)

        def batches(domain: Domain, batch: int, seed: int) -> Batches:
            return Windows(texts[domain].bytes("train"), context if domain == "old" else length, batch, seed)

        return Task(
            name=self.name,
            label=self.label,
            metric=Metric("bits per byte", "", "lower", 3),
            old=texts["old"].label,
            new=texts["new"].label,
            model=model,
            initial=initial,
            forward=forward,
            outcome=outcome,
            batches=batches,
            held_out=lambda domain, split: held_out[domain, split],
            digest=texts["old"].digest() + texts["new"].digest(),
        )
