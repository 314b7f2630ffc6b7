"""A language model of bytes that has learned one kind of text and learns another."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import devices
from experiments.config import ConfigError, Schedule
from experiments.data import Corpus, Windows, spread
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
from jlora.models.gpt2 import GPT2, GPT2Config

BITS = Metric("bits per byte", "lower", decimals=3)


@dataclass(frozen=True)
class Bytes:
    """A task of windows of bytes.

    Attributes:
      label: in titles.
      old, new: the texts.
      validation, test: windows of each that are evaluated, at most.
      length: of a window, in bytes; the model's context when None. Prompts need some of the context for themselves: the
        base is pretrained on windows of all of it, so that it knows the last positions too.
    """

    label: str
    old: Callable[[], Corpus]
    new: Callable[[], Corpus]
    validation: int
    test: int
    length: int | None = None

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            if getattr(self, name) < 1:
                raise ConfigError(f"task.{name} is at least 1, got {getattr(self, name)}")

    def open(self, source: Any, train: Schedule, evaluate_batch: int) -> Opened:
        """Reads the texts."""
        if not isinstance(source, GPT2Config):
            raise ConfigError("a task of bytes has a base that is pretrained here: base=Pretrain(GPT2Config(...), ...)")
        model, context = GPT2(source), source.context
        length = context if self.length is None else self.length
        texts: dict[Side, Corpus] = {"new": self.new(), "old": self.old()}
        counts: dict[Split, int] = {"validation": self.validation, "test": self.test}
        windows = {(d, s): spread(text.bytes(s), length, n) for d, text in texts.items() for s, n in counts.items()}

        def outputs(apply: Apply, params: Params, windows: Batch) -> Any:
            return apply({"params": params}, windows[:, :-1])  # (batch, length, 256)

        def losses(apply: Apply, params: Params, windows: Batch) -> jax.Array:
            logits = outputs(apply, params, windows)
            return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(axis=1)  # (batch,)

        def evaluator(apply: Apply) -> Evaluate:
            forward = jax.jit(lambda params, windows: losses(apply, params, windows))

            def evaluate(params: Params, split: Split, side: Side) -> Scores:
                nats = _mean(forward, params, windows[side, split], evaluate_batch)
                return {BITS.name: nats / math.log(2), "loss": nats}

            return evaluate

        def domain(side: Side, length: int) -> Domain:
            text = texts[side].bytes("train")
            return Domain(
                texts[side].label, Windows(text, length, 1, 0).examples,
                lambda batch, seed: Windows(text, length, batch, seed),
            )  # fmt: skip

        return Opened(
            model=model,
            params=lambda seed: jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"],
            new=domain("new", length),
            old=domain("old", context),
            loss=lambda params, windows, key: losses(model.apply, params, windows).mean(),
            outputs=outputs,
            evaluator=evaluator,
            selection_metric=BITS,
            headline_metric=BITS,
            held_out=", ".join(f"{len(windows['new', split])} {split}" for split in counts)
            + f" windows of {length} bytes",
            tokens=lambda windows: windows[:, 1:].size,
            digest=digest_of(text.digest() for text in texts.values()),
        )


def _mean(forward: Any, params: Params, windows: np.ndarray, batch: int) -> float:
    parts, here = [], devices.current()
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        whole = part[np.minimum(np.arange(batch), len(part) - 1)]  # every call has the same shape and compiles once
        parts.append(here.fetched(forward(params, here.put(whole))))
    return float(np.concatenate(parts)[: len(windows)].mean(dtype=np.float64))
