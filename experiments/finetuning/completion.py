"""Prompts that a language model completes: descriptions of data (E2E, WebNLG, DART), answers, instructions."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import ConfigError
from experiments.data.batches import Batch, Batches
from experiments.data.examples import Prompted, References
from experiments.data.pipeline import packed_rows, prompted_rows, tokenise_prompted
from experiments.finetuning.schedule import Decoding, Schedule
from experiments.finetuning.work import Apply, Inputs, Metric, Params, Scores, Split, Work, outputs, smoothed
from jlora import models

Measure = Callable[[Sequence[str], Sequence[References]], Scores]


class Splits(NamedTuple):
    """What is learned, what decides by its loss, and prompts with all that may follow them."""

    train: Sequence[Prompted]
    validation: Sequence[Prompted]
    test: Sequence[References]


@dataclass(frozen=True)
class Completion:
    """A task of prompts and completions. The loss counts the completion alone.

    Attributes:
      label: in titles.
      data: reads the splits.
      measure: (texts, what they are compared with) -> scores of the test split; the first one is shown.
      decoding: how those texts are made.
      length: of a row, in tokens.
      separated: the end token stands between prompt and completion too, as in the LoRA paper's GPT-2.
      glue: text before the completion.
      packed: several examples in a row.
      truncate: cut what is longer; an error otherwise.
      pad: the token of padding, where the checkpoint's tokenizer has none.
    """

    label: str
    data: Callable[[], Splits]
    measure: Measure
    decoding: Decoding
    length: int = 512
    separated: bool = False
    glue: str = " "
    packed: bool = False
    truncate: bool = True
    pad: str | None = None

    def open(self, folder: Path, train: Schedule, evaluate_batch: int, **options: Any) -> Work:
        """Reads the checkpoint and the data."""
        tokenizer = models.Tokenizer.load(folder, pad=self.pad)
        model: Any = models.build(folder, head="causal_lm", **options)
        if self.length > model.config.context:
            raise ConfigError(f"task.length={self.length} is more than the model's context, {model.config.context}")
        tokenizer.check(model.config.vocab_size)
        end = tokenizer.eos
        if end is None:
            raise ConfigError(f"the tokenizer in '{folder}' has no end token: a completion would have no end")
        pad = end if tokenizer.pad is None else tokenizer.pad
        separator = end if self.separated else None
        begin = None if self.separated else tokenizer.bos

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, special=False)

        cut: list[int] = []

        def rows(examples: Sequence[Prompted], *, packed: bool) -> Any:
            items = tokenise_prompted(
                examples, encode, length=self.length, begin=begin, separator=separator, end=end, glue=self.glue,
                truncate=self.truncate,
            )  # fmt: skip
            cut.append(items.cut)
            return (packed_rows if packed else prompted_rows)(items, self.length, pad=pad)

        def loss(params: Params, batch: Inputs, key: jax.Array) -> jax.Array:
            rest: dict[str, Any] = {"deterministic": False, "rngs": {"dropout": key}}
            return per_token(losses(model.apply, params, batch, train.label_smoothing, **rest), batch)

        splits = self.data()
        made = rows(splits.train, packed=self.packed)
        held_out = Batches(rows(splits.validation, packed=False), evaluate_batch, last="pad", epochs=1)
        first, behind = ([] if token is None else [token] for token in (begin, separator))
        prompts = [[*first, *encode(item.source), *behind] for item in splits.test]
        width = max(map(len, prompts), default=0)
        if not 0 < width <= model.config.context - self.decoding.new_tokens:
            raise ConfigError(
                f"the longest test prompt has {width} tokens; with task.decoding.new_tokens={self.decoding.new_tokens} "
                f"it has to fit into the model's context, {model.config.context}"
            )

        def evaluator(apply: Apply) -> Callable[[Params, Split], Scores]:
            forward = jax.jit(lambda params, batch: losses(apply, params, batch, 0.0))

            def evaluate(params: Params, split: Split) -> Scores:
                if split == "validation":
                    total, count = outputs(forward, params, held_out, ())["out"].sum(axis=0)
                    return {"loss": float(total / count)}
                texts = completed(model, params, apply, prompts, width, tokenizer, self.decoding, pad)
                return self.measure(texts, splits.test)

            return evaluate

        def samples(apply: Apply, params: Params) -> list[str]:
            few = completed(model, params, apply, prompts[:3], width, tokenizer, self.decoding, pad)
            return [f"{item.source.strip()} -> {text}" for item, text in zip(splits.test[:3], few, strict=True)]

        shown = next(iter(self.measure(["a"], [References("a", ("a #### 1",))])))
        return Work(
            model=model,
            params=lambda seed: models.load(folder, head="causal_lm", seed=seed, **options).params,
            decides=Metric("loss", "lower"),
            shows=Metric(shown, "higher"),
            examples=len(made),
            held_out=f"{len(splits.validation):,} validation examples, {len(prompts):,} test prompts{shortened(cut)}",
            batches=lambda batch, seed: shared(Batches(made, batch, seed)),
            loss=loss,
            evaluator=evaluator,
            tokens=lambda batch: int(batch["mask"].sum()),
            head="",
            digest=hashlib.sha256(repr(splits).encode()).hexdigest()[:16],
            samples=samples,
        )


def shared(batches: Batches) -> Callable[[int], Batch]:
    """Batches with `share` (batch,): the tokens of the whole batch that count, per row; see `per_token`."""

    def batch(step: int) -> Batch:
        found = batches(step)
        count = found["loss_mask"][:, 1:].sum() / len(found["loss_mask"])
        return found | {"share": np.full(len(found["loss_mask"]), count, np.float32)}

    return batch


def per_token(sums: jax.Array, batch: Inputs) -> jax.Array:
    """The mean loss of a batch's tokens, from `losses`; or such a part of it that the mean over the parts of a batch is
    the mean over its tokens, however many each part has.
    """
    return sums[:, 0].sum() / jnp.maximum(batch["share"].sum(), 1.0)


def shortened(cut: Sequence[int]) -> str:
    """What is said of examples that were cut."""
    return f"; {sum(cut):,} examples were cut to the rows' length" if any(cut) else ""


def losses(apply: Apply, params: Params, batch: Inputs, smoothing: float, **rest: Any) -> jax.Array:
    """Sum of the losses and number of the tokens that count, per row: (batch, 2)."""
    logits = apply({"params": params}, batch["tokens"], **_inputs(batch), **rest)[:, :-1]
    counts = batch["loss_mask"][:, 1:].astype(jnp.float32)
    lost = smoothed(logits, batch["tokens"][:, 1:], smoothing) * counts
    return jnp.stack([lost.sum(axis=1), counts.sum(axis=1)], axis=1)


def completed(
    model: Any,
    params: Params,
    apply: Apply,
    prompts: Sequence[Sequence[int]],
    width: int,
    tokenizer: models.Tokenizer,
    decoding: Decoding,
    pad: int,
) -> list[str]:
    """The texts that follow prompts, in batches of one shape, padded on the left to `width` tokens."""
    texts: list[str] = []
    for start in range(0, len(prompts), decoding.batch):
        part = list(prompts[start : start + decoding.batch])
        filled = [*part, *[part[0]] * (decoding.batch - len(part))]
        tokens = np.array([[pad] * (width - len(row)) + list(row) for row in filled], np.int32)
        mask = np.array([[False] * (width - len(row)) + [True] * len(row) for row in filled])
        told: dict[str, Any] = {
            "mask": jnp.asarray(mask), "new_tokens": decoding.new_tokens, "eos": tokenizer.eos, "pad": pad,
            "apply": apply,
        }  # fmt: skip
        if decoding.beams == 1:
            key = jax.random.fold_in(jax.random.key(0), start) if decoding.temperature else None
            out = models.generate(model, params, jnp.asarray(tokens), sampling=decoding.sampling, key=key, **told)
        else:
            out = models.beam_search(
                model, params, jnp.asarray(tokens), beams=decoding.beams, length_penalty=decoding.length_penalty,
                no_repeat_ngram=decoding.no_repeat_ngram, of_prompt=decoding.of_prompt, **told,
            ).tokens[:, 0]  # fmt: skip
        for row in jax.device_get(out)[: len(part), width:].tolist():
            kept = row[: row.index(tokenizer.eos)] if tokenizer.eos in row else row
            texts.append(tokenizer.decode(kept).strip())
    return texts


def _inputs(batch: Inputs) -> dict[str, Any]:
    if "segments" not in batch:
        return {"mask": batch["mask"]}
    segments = batch["segments"]
    return {"mask": segments[:, :, None] == segments[:, None, :], "positions": batch["positions"]}
