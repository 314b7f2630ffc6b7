"""Prompts that a language model completes: descriptions of data (E2E, WebNLG, DART), answers, instructions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import devices
from experiments.config import ConfigError, Decoding, Schedule
from experiments.data.batches import Batches
from experiments.data.examples import Prompted, References
from experiments.data.pipeline import packed_rows, prompted_rows, tokenise_prompted
from experiments.tasks.checkpoint import check_fits, headed
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
from jlora import models

Measure = Callable[[Sequence[str], Sequence[References]], Scores]
LARGE = 8192
"""Ids of a vocabulary whose logits outweigh a model's other activations: losses are then taken in chunks of tokens."""


class Splits(NamedTuple):
    """Examples to learn, examples that decide by their loss, and prompts with all that may follow them."""

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
      joiner: text before the completion.
      packed: several examples in a row.
      truncate: cut what is longer; an error otherwise.
      pad: the token of padding, where the checkpoint's tokenizer has none.
      old: reads the splits of what the base knew before, to see what of it is forgotten.
    """

    label: str
    data: Callable[[], Splits]
    measure: Measure
    decoding: Decoding
    length: int = 512
    separated: bool = False
    joiner: str = " "
    packed: bool = False
    truncate: bool = True
    pad: str | None = None
    old: Callable[[], Splits] | None = None

    def open(self, source: Files, train: Schedule, evaluate_batch: int) -> Opened:
        """Reads the checkpoint and the data."""
        tokenizer = models.Tokenizer.load(source.folder, pad=self.pad)
        model, params = headed(source, head="causal_lm")
        check_fits(model, tokenizer, self.length)
        marks = self._marks(tokenizer, source)
        data = sides(self.data, self.old)
        rows, cut = self._rows(data, tokenizer, marks)
        prompts = {
            side: [[*marks.prefix_ids, *_encoder(tokenizer)(item.source), *marks.separator_ids] for item in splits.test]
            for side, splits in data.items()
        }
        writers = {side: self._writer(model, tokenizer, marks, found) for side, found in prompts.items()}

        def evaluator(apply: Apply) -> Evaluate:
            mean_loss = mean_token_loss(model, apply)

            def evaluate(params: Params, split: Split, side: Side) -> Scores:
                if split == "validation":
                    held_out = Batches(rows[side, "validation"], evaluate_batch, last="pad", epochs=1)
                    return {"loss": mean_loss(params, held_out)}
                return self.measure(writers[side](apply, params, len(prompts[side])), data[side].test)

            return evaluate

        def samples(apply: Apply, params: Params) -> list[str]:
            few = writers["new"](apply, params, 3)
            return [f"{item.source.strip()} -> {text}" for item, text in zip(data["new"].test[:3], few, strict=True)]

        def domain(side: Side) -> Domain:
            made = rows[side, "train"]
            return Domain(f"the {side} task", len(made), lambda batch, seed: shared(Batches(made, batch, seed)))

        shown = next(iter(self.measure(["a"], [References("a", ("a #### 1",))])))
        examples = len(data["new"].validation)
        return Opened(
            model=model,
            params=params,
            new=domain("new"),
            old=domain("old") if self.old else None,
            loss=token_loss(model, train.label_smoothing),
            outputs=logits_of,
            evaluator=evaluator,
            selection_metric=Metric("loss", "lower"),
            headline_metric=Metric(shown, "higher"),
            held_out=f"{examples:,} validation examples, {len(prompts['new']):,} test prompts{shortened(cut)}",
            tokens=lambda batch: int(batch["mask"].sum()),
            digest=digest_of(data.values()),
            samples=samples,
        )

    def _marks(self, tokenizer: models.Tokenizer, source: Files) -> "Marks":
        end = tokenizer.eos
        if end is None:
            raise ConfigError(f"the tokenizer in '{source.folder}' has no end token: a completion would have no end")
        begin = None if self.separated else tokenizer.bos
        pad = end if tokenizer.pad is None else tokenizer.pad
        return Marks([] if begin is None else [begin], [end] if self.separated else [], end, pad)

    def _rows(
        self, data: Mapping[Side, Splits], tokenizer: models.Tokenizer, marks: "Marks"
    ) -> tuple[dict[tuple[Side, str], Any], list[int]]:
        """The rows of tokens to train on and to validate with, and how many examples of each were cut."""
        made, cut = {}, []
        for side, splits in data.items():
            for name, examples in (("train", splits.train), ("validation", splits.validation)):
                items = tokenise_prompted(
                    examples, _encoder(tokenizer), length=self.length, begin=next(iter(marks.prefix_ids), None),
                    separator=next(iter(marks.separator_ids), None), end=marks.end, joiner=self.joiner,
                    truncate=self.truncate,
                )  # fmt: skip
                cut.append(items.cut)
                whole = packed_rows if self.packed and name == "train" else prompted_rows
                made[side, name] = whole(items, self.length, pad=marks.pad)
        return made, cut

    def _writer(
        self, model: Any, tokenizer: models.Tokenizer, marks: "Marks", prompts: Sequence[Sequence[int]]
    ) -> Callable[[Apply, Params, int], list[str]]:
        """(apply, params, count) -> what the model writes behind the first prompts."""
        width = max(map(len, prompts), default=0)
        if not 0 < width <= model.config.context - self.decoding.new_tokens:
            raise ConfigError(
                f"the longest test prompt has {width} tokens; with task.decoding.new_tokens={self.decoding.new_tokens} "
                f"it has to fit into the model's context, {model.config.context}"
            )
        return lambda apply, params, count: completed(
            model, params, apply, prompts[:count], width, tokenizer, self.decoding, marks.pad
        )


class Marks(NamedTuple):
    """Tokens around the texts: before a prompt, between it and the completion, at the end, and of padding."""

    prefix_ids: Sequence[int]
    separator_ids: Sequence[int]
    end: int
    pad: int


def _encoder(tokenizer: models.Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, special=False)


def shared(batches: Batches) -> Callable[[int], Batch]:
    """Batches with `share` (batch,): the tokens of the whole batch that count, per row; see `per_token`."""

    def batch(step: int) -> Batch:
        found = batches(step)
        count = found["loss_mask"][:, 1:].sum() / len(found["loss_mask"])
        return found | {"share": np.full(len(found["loss_mask"]), count, np.float32)}

    return batch


def per_token(sums: jax.Array, batch: Batch) -> jax.Array:
    """The mean loss of a batch's tokens, from `losses`; or such a part of it that the mean over the parts of a batch is
    the mean over its tokens, however many each part has.
    """
    return sums[:, 0].sum() / jnp.maximum(batch["share"].sum(), 1.0)


def shortened(cut: Sequence[int]) -> str:
    """Note on examples that were cut."""
    return f"; {sum(cut):,} examples were cut to the rows' length" if any(cut) else ""


def logits_of(apply: Apply, params: Params, batch: Batch, **rest: Any) -> Any:
    """Logits of each next token by a causal language model: (batch, length, vocabulary)."""
    return apply({"params": params}, batch["tokens"], **_inputs(batch), **rest)


def losses(apply: Apply, params: Params, batch: Batch, smoothing: float, *, in_chunks: bool, **rest: Any) -> jax.Array:
    """Sum of the losses and number of the tokens that count, per row: (batch, 2).

    `in_chunks`: by the model itself, which never has all logits at once.
    """
    counts, after = batch["loss_mask"][:, 1:].astype(jnp.float32), batch["tokens"][:, 1:]
    if in_chunks:
        labels = jnp.pad(after, ((0, 0), (0, 1)))  # nothing follows the last token, and that loss is left out
        each = logits_of(apply, params, batch, labels=labels, smoothing=smoothing, **rest)[:, :-1]
    else:
        each = smoothed(logits_of(apply, params, batch, **rest)[:, :-1], after, smoothing)
    return jnp.stack([(each * counts).sum(axis=1), counts.sum(axis=1)], axis=1)


def is_large(model: Any) -> bool:
    """Whether a model's loss is better taken in chunks of tokens.

    With few ids there is little to save, and the program, to the last digit of what it computes, stays what it was.
    """
    return bool(model.config.vocab_size >= LARGE)


def token_loss(model: Any, smoothing: float) -> Callable[[Params, Batch, jax.Array], jax.Array]:
    """(params, batch, key) -> the mean loss of the tokens that count, with the model's dropout."""

    def loss(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        rest: dict[str, Any] = {"deterministic": False, "rngs": {"dropout": key}}
        return per_token(losses(model.apply, params, batch, smoothing, in_chunks=is_large(model), **rest), batch)

    return loss


def mean_token_loss(model: Any, apply: Apply) -> Callable[[Params, Batches], float]:
    """(params, batches of all rows) -> the mean loss of the tokens that count, in nats."""
    forward = jax.jit(lambda params, batch: losses(apply, params, batch, 0.0, in_chunks=is_large(model)))

    def mean(params: Params, batches: Batches) -> float:
        total, count = outputs_of(forward, params, batches, ())["out"].sum(axis=0)
        return float(total / count)

    return mean


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
    here = devices.current()
    for start in range(0, len(prompts), decoding.batch):
        part = list(prompts[start : start + decoding.batch])
        filled = [*part, *[part[0]] * (decoding.batch - len(part))]
        tokens = np.array([[pad] * (width - len(row)) + list(row) for row in filled], np.int32)
        mask = np.array([[False] * (width - len(row)) + [True] * len(row) for row in filled])
        rows, real = here.put((tokens, mask))
        options: dict[str, Any] = {
            "mask": real, "new_tokens": decoding.new_tokens, "eos": tokenizer.eos, "pad": pad,
            "apply": apply,
        }  # fmt: skip
        if decoding.beams == 1:
            key = jax.random.fold_in(jax.random.key(0), start) if decoding.temperature else None
            out = models.generate(model, params, rows, sampling=decoding.sampling, key=key, **options)
        else:
            out = models.beam_search(
                model, params, rows, beams=decoding.beams, length_penalty=decoding.length_penalty,
                no_repeat_ngram=decoding.no_repeat_ngram, of_prompt=decoding.of_prompt, **options,
            ).tokens[:, 0]  # fmt: skip
        for row in here.fetched(out)[: len(part), width:].tolist():
            kept = row[: row.index(tokenizer.eos)] if tokenizer.eos in row else row
            texts.append(tokenizer.decode(kept).strip())
    return texts


def _inputs(batch: Batch) -> dict[str, Any]:
    if "segments" not in batch:
        return {"mask": batch["mask"]}
    segments = batch["segments"]
    return {"mask": segments[:, :, None] == segments[:, None, :], "positions": batch["positions"]}
