"""A text that a language model learns to go on with."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.config import ConfigError
from experiments.data.batches import Batches
from experiments.data.files import DataError
from experiments.data.token_file import TokenWindows
from experiments.finetuning.completion import completed, losses, per_token, shared
from experiments.finetuning.schedule import Decoding, Schedule
from experiments.finetuning.work import Apply, Inputs, Metric, Params, Scores, Split, Work, outputs
from jlora import models

BITS = "bits per byte"


class Splits(NamedTuple):
    """One text each."""

    train: str
    validation: str
    test: str


@dataclass(frozen=True)
class Texts:
    """A task of windows of a text. The loss counts every token.

    Attributes:
      label: in titles.
      data: reads the splits.
      prompts: beginnings of the samples that are shown before and after.
      decoding: how those go on.
      length: of a window, in tokens.
    """

    label: str
    data: Callable[[], Splits]
    prompts: tuple[str, ...]
    decoding: Decoding
    length: int = 256

    def open(self, folder: Path, train: Schedule, evaluate_batch: int, **options: Any) -> Work:
        """Reads the checkpoint and the data."""
        tokenizer = models.Tokenizer.load(folder)
        model: Any = models.build(folder, head="causal_lm", **options)
        if self.length > model.config.context:
            raise ConfigError(f"task.length={self.length} is more than the model's context, {model.config.context}")
        tokenizer.check(model.config.vocab_size)
        splits = self.data()
        windows, ratio = {}, {}
        for name, text in splits._asdict().items():
            if not text.strip():
                raise DataError(f"the {name} text is empty")
            tokens = np.array(tokenizer.encode(text, special=False), np.int32)
            windows[name] = TokenWindows(tokens, self.length)
            ratio[name] = len(tokens) / len(text.encode())

        def loss(params: Params, batch: Inputs, key: jax.Array) -> jax.Array:
            rest: dict[str, Any] = {"deterministic": False, "rngs": {"dropout": key}}
            return per_token(losses(model.apply, params, batch, train.label_smoothing, **rest), batch)

        def evaluator(apply: Apply) -> Callable[[Params, Split], Scores]:
            forward = jax.jit(lambda params, batch: losses(apply, params, batch, 0.0))

            def evaluate(params: Params, split: Split) -> Scores:
                held_out = Batches(windows[split], evaluate_batch, last="pad", epochs=1)
                total, count = outputs(forward, params, held_out, ())["out"].sum(axis=0)
                mean = float(total / count)
                return {BITS: mean * ratio[split] / math.log(2), "loss": mean}

            return evaluate

        first = [] if tokenizer.bos is None else [tokenizer.bos]
        pad = next((token for token in (tokenizer.pad, tokenizer.eos) if token is not None), 0)
        prompts = [[*first, *tokenizer.encode(prompt, special=False)] for prompt in self.prompts]
        if not prompts or not all(prompts):
            raise ConfigError(f"task.prompts: at least one, and none without tokens; got {list(self.prompts)}")
        width = max(map(len, prompts))
        if width + self.decoding.new_tokens > model.config.context:
            raise ConfigError(
                f"task.prompts: {width} tokens and decoding.new_tokens={self.decoding.new_tokens} are more than the "
                f"model's context, {model.config.context}"
            )

        def samples(apply: Apply, params: Params) -> list[str]:
            texts = completed(model, params, apply, prompts, width, tokenizer, self.decoding, pad)
            return [line for prompt, text in zip(self.prompts, texts, strict=True) for line in _lines(prompt, text)]

        return Work(
            model=model,
            params=lambda seed: models.load(folder, head="causal_lm", seed=seed, **options).params,
            decides=Metric(BITS, "lower"),
            shows=Metric(BITS, "lower"),
            examples=len(windows["train"]),
            held_out=f"{len(windows['validation']):,} validation, {len(windows['test']):,} test windows",
            batches=lambda batch, seed: shared(Batches(windows["train"], batch, seed)),
            loss=loss,
            evaluator=evaluator,
            tokens=lambda batch: int(batch["mask"].sum()),
            head="",
            digest=hashlib.sha256("\0".join(splits).encode()).hexdigest()[:16],
            samples=samples,
        )


def _lines(prompt: str, text: str) -> list[str]:
    first, *others = f"{prompt} -> {text}".split("\n")
    return [first, *(f"  {line}" for line in others)]
