"""A user's own data, with no line of Python: `experiments.data.own` reads them, the other tasks learn them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from experiments import metrics
from experiments.config import ConfigError, Decoding, Schedule
from experiments.data.batches import Batches
from experiments.data.chat import PLAIN, Placed, Template, encoded, jinja, plain, template_of, tokenise_chats
from experiments.data.examples import Chat, Classified, Prompted
from experiments.data.forms import Kind
from experiments.data.held_out import Split as Part
from experiments.data.images import HALF, ImageFolder
from experiments.data.own import Labelled, Own, Row, read_own
from experiments.data.pipeline import packed_rows, prompted_rows, tokenise_prompted
from experiments.data.tokenised import Tokenised, cut_to
from experiments.data.understood import described, example_line, length_of, lengths_line
from experiments.tasks import classification, images, texts
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
)
from jlora import models
from jlora.models import reading
from jlora.models.architecture import Head

LOSS = Metric("loss", "lower", decimals=3)
WHOLE = 1 << 40  # tokens: none is cut


@dataclass(frozen=True)
class OwnData:
    """A task of data that a user names.

    Attributes:
      data: a file, a folder or the name of a data set; see `experiments.data.own.read_own`.
      kind: "chat", "completion", "classification", "text" or "images"; inferred when None.
      columns: to read, joined by commas, the label or the answer last; those that data sets usually have when empty.
      validation, test: files or folders of those splits.
      held_out: the share of the examples that is held out for those that are not given.
      length: of a row, in tokens; that of the longest example, at most 1,024 and the model's context, when None.
      template: of conversations: "checkpoint" for the one that comes with the tokenizer, "plain" for `System: ...`,
        `User: ...`, `Assistant: ...`; None for the first where there is one.
      joiner: text between a prompt and its completion; a blank when None, or nothing where all examples have one there.
      packed: several examples in a row.
      new_tokens: of the samples that are shown.
      label: in titles.
    """

    data: str = ""
    kind: str | None = None
    columns: str = ""
    validation: str | None = None
    test: str | None = None
    held_out: float = 0.1
    length: int | None = None
    template: str | None = None
    joiner: str | None = None
    packed: bool = False
    new_tokens: int = 32
    label: str = "your own data"

    def open(self, source: Files, train: Schedule, evaluate_batch: int) -> Opened:
        """Reads the data and the checkpoint."""
        if not self.data:
            raise ConfigError("task.data=... names no data: a file, a folder or the name of a data set")
        own = read_own(
            self.data,
            kind=cast(Kind | None, self.kind),
            columns=[name.strip() for name in self.columns.split(",") if name.strip()],
            validation=self.validation,
            test=self.test,
            share=self.held_out,
        )
        notes: list[str] = described(own)
        make = {
            "classification": self._classification, "images": self._images, "text": self._text,
            "chat": self._language, "completion": self._language,
        }[own.kind]  # fmt: skip
        opened: Opened = make(own, source, train, evaluate_batch, notes)
        classes = () if own.labels is None or own.labels.classes is None else own.labels.classes
        return dataclasses.replace(opened, understood=tuple(notes), classes=classes)

    # -- labels ----------------------------------------------------------------------------------------------------

    def _classification(
        self, own: Own, source: Files, train: Schedule, evaluate_batch: int, notes: list[str]
    ) -> Opened:
        tokenizer = models.Tokenizer.load(source.folder)
        splits = {name: [_classified(row, own) for row in part] for name, part in own.splits.items()}
        lengths = np.array([len(tokenizer.encode(e.text, e.pair)) for part in splits.values() for e in part])
        context = _context(source, head="sequence_classification")
        length = length_of(lengths, context, self.length)
        notes.append(lengths_line(lengths, length))
        classes = None if own.labels is None or own.labels.classes is None else len(own.labels.classes)
        task = classification.Classification(
            self.label,
            lambda: classification.Splits(**splits),
            classes,
            _values if classes is None else _classes,
            length=length,
        )
        return task.open(source, train, evaluate_batch)

    def _images(self, own: Own, source: Files, train: Schedule, evaluate_batch: int, notes: list[str]) -> Opened:
        if own.labels is None or own.labels.classes is None:
            raise ConfigError("images are read with classes, and these labels are values")
        classes, colours = own.labels.classes, _colours(source.folder)

        def read(size: int) -> images.Splits:
            mean, deviation = (", ".join(f"{x:g}" for x in values) for values in colours)
            notes.append(
                f"images    {size} x {size} pixels: the shorter side scaled, the centre cut out; mean {mean} and "
                f"deviation {deviation}"
            )
            made: dict[str, ImageFolder] = {}
            for name, part in own.splits.items():
                found = [(Path(_labelled(row).inputs[0]), _number(row, own)) for row in part]
                paths, numbers = [path for path, _ in found], [int(number) for _, number in found]
                made[name] = ImageFolder(paths, numbers, classes, size, *colours)
            return images.Splits(**made)

        return images.Images(self.label, read).open(source, train, evaluate_batch)

    # -- texts -----------------------------------------------------------------------------------------------------

    def _text(self, own: Own, source: Files, train: Schedule, evaluate_batch: int, notes: list[str]) -> Opened:
        tokenizer = models.Tokenizer.load(source.folder)
        between = tokenizer.specials.get("eos") or "\n\n"
        joined = {name: between.join(str(row.value) for row in part) for name, part in own.splits.items()}
        counts = {name: len(tokenizer.encode(text, special=False)) for name, text in joined.items()}
        context = _context(source, head="causal_lm")
        length = min(context, 512, *counts.values()) if self.length is None else self.length
        sizes = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        notes.append(f"lengths   {sizes} tokens, in windows of {length}; {between!r} between texts")
        prompt = " ".join(joined["validation"].split()[:4])
        new_tokens = min(self.new_tokens, context - len(tokenizer.encode(prompt)) - 1)
        task = texts.Texts(
            self.label, lambda: texts.Splits(**joined), (prompt,), Decoding(max(new_tokens, 1)), length=length
        )
        return task.open(source, train, evaluate_batch)

    def _language(self, own: Own, source: Files, train: Schedule, evaluate_batch: int, notes: list[str]) -> Opened:
        tokenizer = models.Tokenizer.load(source.folder)
        model, params = headed(source, head="causal_lm")
        written = self._chats(own, source, tokenizer) if own.kind == "chat" else self._prompts(own, tokenizer)
        lengths = np.concatenate([items.lengths for items in written.items.values()])
        length = length_of(lengths, model.config.context, self.length)
        check_fits(model, tokenizer, length)
        notes += [lengths_line(lengths, length), written.how, example_line(*written.example)]
        pad = next(token for token in (tokenizer.pad, tokenizer.eos, 0) if token is not None)
        places = {name: [row.place for row in part] for name, part in own.splits.items()}
        cut = {name: cut_to(items, length, places[name]) for name, items in written.items.items()}
        rows = (packed_rows if self.packed else prompted_rows)(cut["train"], length, pad=pad)
        kept: tuple[Split, ...] = ("validation", "test")
        held_out: dict[Split, Batches] = {
            name: Batches(prompted_rows(cut[name], length, pad=pad), evaluate_batch, last="pad", epochs=1)
            for name in kept
        }

        def evaluator(apply: Apply) -> Evaluate:
            mean_loss = mean_token_loss(model, apply)

            def evaluate(params: Params, split: Split, side: Side) -> Scores:
                mean = mean_loss(params, held_out[split])
                return {LOSS.name: mean, "perplexity": float(np.exp(min(mean, 80.0)))}

            return evaluate

        prompts = [written.prompt(row) for row in own.splits["test"][:3]]
        width = max(len(tokens) for tokens, _ in prompts)
        room = min(self.new_tokens, model.config.context - width)

        def samples(apply: Apply, params: Params) -> list[str]:
            tokens = [tokens for tokens, _ in prompts]
            made = completed(model, params, apply, tokens, width, tokenizer, Decoding(room, batch=len(tokens)), pad)
            return [f"{asked!r} -> {text!r}" for (_, asked), text in zip(prompts, made, strict=True)]

        return Opened(
            model=model,
            params=params,
            new=Domain("", len(rows), lambda batch, seed: shared(Batches(rows, batch, seed))),
            old=None,
            loss=token_loss(model, train.label_smoothing),
            outputs=logits_of,
            evaluator=evaluator,
            selection_metric=LOSS,
            headline_metric=LOSS,
            held_out=", ".join(f"{len(own.splits[name]):,} {name}" for name in kept) + " examples",
            tokens=lambda batch: int(batch["mask"].sum()),
            digest=digest_of([row.value for row in part] for part in own.splits.values()),
            samples=samples if room > 0 else None,
        )

    def _prompts(self, own: Own, tokenizer: models.Tokenizer) -> "_Written":
        """Prompts and completions as tokens."""
        rows = [row.value for part in own.splits.values() for row in part if isinstance(row.value, Prompted)]
        joiner = self.joiner
        if joiner is None:
            bring = [row.prompt[-1:].isspace() or row.completion[:1].isspace() for row in rows]
            joiner = "" if all(bring) else " "
        begin, end = tokenizer.bos, tokenizer.eos
        if end is None:
            raise ConfigError(f"the tokenizer of '{tokenizer.source}' has no end token: a completion would have no end")
        encode = functools.partial(tokenizer.encode, special=False)
        items = {
            name: tokenise_prompted(
                [row.value for row in part if isinstance(row.value, Prompted)],
                encode, length=WHOLE, begin=begin, end=end, joiner=joiner,
            )
            for name, part in own.splits.items()
        }  # fmt: skip
        first = rows[0]
        text = first.prompt + joiner + first.completion + tokenizer.specials["eos"]

        def prompt(row: Row) -> tuple[list[int], str]:
            assert isinstance(row.value, Prompted)
            return [*([] if begin is None else [begin]), *encode(row.value.prompt)], row.value.prompt

        how = (
            f"template  the prompt, {joiner!r}, the completion, the end token; the loss counts what follows the prompt"
        )
        return _Written(items, how, (text, [(len(first.prompt), len(text))]), prompt)

    def _chats(self, own: Own, source: Files, tokenizer: models.Tokenizer) -> "_Written":
        """Conversations as tokens."""
        template, how = self._template(source, tokenizer)
        items = {
            name: tokenise_chats(
                [Placed(row.place, row.value) for row in part if isinstance(row.value, Chat)], template, tokenizer
            )
            for name, part in own.splits.items()
        }
        first = own.splits["train"][0].value
        assert isinstance(first, Chat)

        def prompt(row: Row) -> tuple[list[int], str]:
            assert isinstance(row.value, Chat)
            tokens, counted = encoded(row.place, row.value, template, tokenizer)
            asked = next(m.content for m in reversed(row.value.messages[: _answer(row.value)]) if m.role != "system")
            return tokens[: int(np.argmax(counted))].tolist(), asked

        return _Written(items, how, template(first), prompt)

    def _template(self, source: Files, tokenizer: models.Tokenizer) -> tuple[Template, str]:
        if self.template not in (None, "checkpoint", "plain"):
            raise ConfigError(f"task.template={self.template!r}: expected 'checkpoint' or 'plain'")
        found = None if self.template == "plain" else template_of(source.folder)
        if found is not None:
            return jinja(found, tokenizer.specials), "template  the checkpoint's own chat template"
        if self.template == "checkpoint":
            raise ConfigError(f"task.template=checkpoint: the tokenizer in '{source.folder}' has no chat template")
        why = "" if self.template else ", as the checkpoint has no chat template"
        return plain(tokenizer), f"template  plain{why}: {PLAIN}"


class _Written(NamedTuple):
    """Tokenised examples of each split, their template in words, one of them, and a prompt of each row."""

    items: Mapping[Part, Tokenised]
    how: str
    example: tuple[str, Sequence[tuple[int, int]]]
    prompt: Callable[[Row], tuple[list[int], str]]


def _answer(chat: Chat) -> int:
    """The number of the first answer."""
    return next(i for i, message in enumerate(chat.messages) if message.role == "assistant")


def _labelled(row: Row) -> Labelled:
    assert isinstance(row.value, Labelled)
    return row.value


def _number(row: Row, own: Own) -> int | float:
    assert own.labels is not None
    return own.labels.number(row.place, _labelled(row).label)


def _classified(row: Row, own: Own) -> Classified:
    text, *pair = _labelled(row).inputs
    return Classified(text, _number(row, own), *pair)


def _classes(predictions: np.ndarray, labels: np.ndarray) -> Scores:
    return {"accuracy": metrics.accuracy(predictions, labels), "macro f1": metrics.macro_f1(predictions, labels)}


def _values(predictions: np.ndarray, labels: np.ndarray) -> Scores:
    return {"pearson": metrics.pearson(predictions, labels), "spearman": metrics.spearman(predictions, labels)}


def _context(source: Files, *, head: Head) -> int:
    return int(headed(source, head=head).model.config.context)


def _colours(folder: Path) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation of pixels, as the checkpoint's preprocessor has them; 0.5 where it has none."""
    path = folder / "preprocessor_config.json"
    record = reading.read_json(path) if reading.has(path) else {}
    found = []
    for key in ("image_mean", "image_std"):
        value = record.get(key, list(HALF))
        if not (isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)):
            raise ConfigError(f"'{path}' has {key}={value!r}, expected three numbers")
        found.append(cast(tuple[float, float, float], tuple(map(float, value))))
    return found[0], found[1]
