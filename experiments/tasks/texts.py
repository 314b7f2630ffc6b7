"""A text that a language model learns to go on with."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from experiments.config import ConfigError, Decoding, Schedule
from experiments.data.batches import Batches
from experiments.data.files import DataError
from experiments.data.token_file import TokenWindows
from experiments.tasks.checkpoint import check_fits, headed
from experiments.tasks.completion import completed, logits_of, mean_token_loss, shared, token_loss
from experiments.tasks.task import (
    Apply,
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
    sides,
)
from jlora import models

BITS = Metric("bits per byte", "lower")


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
      old: reads the splits of what the base knew before, to see what of it is forgotten.
    """

    label: str
    data: Callable[[], Splits]
    prompts: tuple[str, ...]
    decoding: Decoding
    length: int = 256
    old: Callable[[], Splits] | None = None

    def open(self, source: Files, train: Schedule, evaluate_batch: int) -> Opened:
        """Reads the checkpoint and the data."""
        tokenizer = models.Tokenizer.load(source.folder)
        model, params = headed(source, head="causal_lm")
        check_fits(model, tokenizer, self.length)
        data = sides(self.data, self.old)
        windows, ratio = self._windows(data, tokenizer)

        def evaluator(apply: Apply) -> Evaluate:
            mean_loss = mean_token_loss(model, apply)

            def evaluate(params: Params, split: Split, side: Side) -> Scores:
                held_out = Batches(windows[side, split], evaluate_batch, last="pad", epochs=1)
                mean = mean_loss(params, held_out)
                return {BITS.name: mean * ratio[side, split] / math.log(2), "loss": mean}

            return evaluate

        def domain(side: Side) -> Domain:
            made = windows[side, "train"]
            return Domain(f"the {side} text", len(made), lambda batch, seed: shared(Batches(made, batch, seed)))

        validation, test = (len(windows["new", split]) for split in ("validation", "test"))
        return Opened(
            model=model,
            params=params,
            new=domain("new"),
            old=domain("old") if self.old else None,
            loss=token_loss(model, train.label_smoothing),
            outputs=logits_of,
            evaluator=evaluator,
            selection_metric=BITS,
            headline_metric=BITS,
            held_out=f"{validation:,} validation, {test:,} test windows",
            tokens=lambda batch: int(batch["mask"].sum()),
            digest=digest_of(data.values()),
            samples=self._samples(model, tokenizer),
        )

    def _windows(
        self, data: Mapping[Side, Splits], tokenizer: models.Tokenizer
    ) -> tuple[dict[tuple[Side, str], TokenWindows], dict[tuple[Side, str], float]]:
        """The windows of all domains and splits, and tokens per byte."""
        windows, ratio = {}, {}
        for side, splits in data.items():
            for name, text in splits._asdict().items():
                if not text.strip():
                    raise DataError(f"the {name} text is empty")
                tokens = np.array(tokenizer.encode(text, special=False), np.int32)
                windows[side, name] = TokenWindows(tokens, self.length)
                ratio[side, name] = len(tokens) / len(text.encode())
        return windows, ratio

    def _samples(self, model: Any, tokenizer: models.Tokenizer) -> Callable[[Apply, Params], list[str]]:
        prefix_ids = [] if tokenizer.bos is None else [tokenizer.bos]
        pad = next((token for token in (tokenizer.pad, tokenizer.eos) if token is not None), 0)
        prompts = [[*prefix_ids, *tokenizer.encode(prompt, special=False)] for prompt in self.prompts]
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

        return samples


def _lines(prompt: str, text: str) -> list[str]:
    first, *others = f"{prompt} -> {text}".split("\n")
    return [first, *(f"  {line}" for line in others)]
