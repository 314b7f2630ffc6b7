"""A tag for each word: names of people, places and organisations, in BIO tags (CoNLL-2003 and its kin)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import ConfigError, Schedule
from experiments.data.batches import Batches
from experiments.data.files import DataError, existing, lines, shown
from experiments.data.pipeline import Row, Rows
from experiments.data.table import read_table
from experiments.tasks.checkpoint import check_fits, headed
from experiments.tasks.completion import per_token
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

F1 = Metric("f1", "higher")
OUTSIDE = "O"


class Sentence(NamedTuple):
    """Words and their tags, as many."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


class Entity(NamedTuple):
    """Words `begin` to `end`, the last one aside, that name something of a type."""

    kind: str
    begin: int
    end: int


class Splits(NamedTuple):
    """Sentences of the same tags."""

    train: Sequence[Sentence]
    validation: Sequence[Sentence]
    test: Sequence[Sentence]


@dataclass(frozen=True)
class TokenClassification:
    """A task of words with a tag each.

    The first token of a word has its tag, in the loss and in what is predicted; other tokens of it are ignored. A word
    without a token, or behind the end of the row, is predicted to be outside.

    Attributes:
      label: in titles.
      data: reads the splits.
      length: of a row, in tokens; what is longer is cut.
      strict: a predicted I- that continues no entity begins none; by conlleval, and so in published scores, it does.
      head: a pattern of the head's parameters.
      old: reads the splits of what the base knew before, of the same tags, to see what of it is forgotten.
    """

    label: str
    data: Callable[[], Splits]
    length: int = 128
    strict: bool = False
    head: str = "^(classifier|score)/"
    old: Callable[[], Splits] | None = None

    def open(self, source: Files, train: Schedule, evaluate_batch: int) -> Opened:
        """Reads the checkpoint and the data."""
        tokenizer = models.Tokenizer.load(source.folder)
        data = sides(self.data, self.old)
        classes = tags_of(data["new"].train)
        model, params = headed(source, head="token_classification", labels=len(classes))
        check_fits(model, tokenizer, self.length)
        rows = {
            (side, split): self._rows(split, part, classes, tokenizer)
            for side, splits in data.items()
            for split, part in splits._asdict().items()
        }

        def outputs(apply: Apply, params: Params, batch: Batch, **rest: Any) -> Any:
            return apply({"params": params}, batch["tokens"], mask=batch["mask"], **rest)  # (batch, length, tags)

        def loss(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
            logits = outputs(model.apply, params, batch, deterministic=False, rngs={"dropout": key})
            return per_token(_losses(logits, batch["labels"], train.label_smoothing), batch)

        def evaluator(apply: Apply) -> Evaluate:
            forward = jax.jit(lambda params, batch: outputs(apply, params, batch))

            def evaluate(params: Params, split: Split, side: Side) -> Scores:
                held_out = Batches(rows[side, split], evaluate_batch, last="pad", epochs=1)
                found = outputs_of(forward, params, held_out, ("labels", "words"))
                total, count = _losses(jnp.asarray(found["out"]), jnp.asarray(found["labels"]), 0.0).sum(axis=0)
                sentences = getattr(data[side], split)
                guessed = predicted(np.argmax(found["out"], axis=-1), found["words"], sentences, classes)
                return {
                    **scores([s.tags for s in sentences], guessed, strict=self.strict),
                    "loss": float(total / count),
                }

            return evaluate

        def domain(side: Side) -> Domain:
            made = rows[side, "train"]
            return Domain(f"the {side} tags", len(made), lambda batch, seed: _shared(Batches(made, batch, seed)))

        new = data["new"]
        return Opened(
            model=model,
            params=params,
            new=domain("new"),
            old=domain("old") if self.old else None,
            loss=loss,
            outputs=outputs,
            evaluator=evaluator,
            selection_metric=F1,
            headline_metric=F1,
            held_out=f"{len(new.validation):,} validation, {len(new.test):,} test sentences; {len(classes)} tags",
            tokens=lambda batch: int(batch["mask"].sum()),
            digest=digest_of(data.values()),
            head=self.head,
        )

    def _rows(self, split: str, part: Sequence[Sentence], classes: Sequence[str], tokenizer: models.Tokenizer) -> Rows:
        if not part:
            raise ConfigError(f"the {split} split has no sentences: take another one")
        numbers = {tag: number for number, tag in enumerate(classes)}
        for number, sentence in enumerate(part, 1):
            if unknown := sorted(set(sentence.tags) - set(numbers)):
                raise DataError(
                    f"the {split} split, sentence {number}: no sentence to train on has the tag {unknown[0]!r}; "
                    f"there are {', '.join(map(repr, classes))}"
                )
        pad = 0 if tokenizer.pad is None else tokenizer.pad
        aligned = [align(sentence.words, tokenizer, self.length) for sentence in part]

        def make(index: int) -> Row:
            tokens, words = aligned[index]
            filling = (0, self.length - len(tokens))
            words = np.pad(words, filling, constant_values=-1)  # (length,)
            tags = np.array([numbers[tag] for tag in part[index].tags], np.int32)
            return {
                "tokens": np.pad(tokens, filling, constant_values=pad),
                "mask": np.arange(self.length) < len(tokens),
                "words": words,
                "labels": np.where(words >= 0, tags[words], -1).astype(np.int32),
            }

        return Rows(len(part), make)


# -- files -------------------------------------------------------------------------------------------------------------


def read_sentences(path: str | Path) -> list[Sentence]:
    """CoNLL's columns, or JSON lines with "tokens" and "tags".

    In CoNLL's format a line is a word and its tag, in the first and the last of at least two columns; a blank line ends
    a sentence, and lines of `-DOCSTART-` are left out. Tags in IOB1, as in the files of CoNLL-2003 (B- only where two
    entities of a type touch), become BIO: B- for each first word.

    Raises:
      DataError: with the file and the line, for what is neither.

    Source: Tjong Kim Sang and De Meulder, "Introduction to the CoNLL-2003 Shared Task", arXiv cs/0306050.
    """
    path = existing(path)
    found = list(_json(path) if path.suffix == ".jsonl" else _columns(path))
    if not found:
        raise DataError(f"{path}: no sentences in this file")
    return found


def _columns(path: Path) -> Iterator[Sentence]:
    rows: list[tuple[str, str]] = []
    for number, line in [*lines(path), (0, "")]:
        cells = line.split("\t") if "\t" in line else line.split()
        if cells and cells[0] == "-DOCSTART-":
            continue
        if line.strip():
            if len(cells) < 2:
                raise DataError(f"{path}, line {number}: one column, expected a word and its tag: {shown(line)}")
            rows.append((cells[0], _tag(f"{path}, line {number}", cells[-1])))
        elif rows:
            words, tags = zip(*rows, strict=True)
            yield Sentence(words, as_bio(tags))
            rows = []


def _json(path: Path) -> Iterator[Sentence]:
    for record in read_table(path).records:
        words, tags = record.value("tokens"), record.value("tags")
        for name, value in (("tokens", words), ("tags", tags)):
            if not (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
                raise DataError(f"{record.place}: {name!r} is no list of texts, or an empty one: {shown(str(value))}")
        if len(words) != len(tags):
            raise DataError(f"{record.place}: {len(words)} tokens and {len(tags)} tags, expected one for each")
        yield Sentence(tuple(words), as_bio([_tag(record.place, tag) for tag in tags]))


def _tag(place: str, tag: str) -> str:
    if tag != OUTSIDE and not (tag[:2] in ("B-", "I-") and tag[2:]):
        raise DataError(f"{place}: the tag {tag!r}, expected O, B-... or I-...")
    return tag


# -- tags --------------------------------------------------------------------------------------------------------------


def entities(tags: Sequence[str], *, strict: bool = False) -> list[Entity]:
    """Entities that tags name, as conlleval and seqeval count it: I- after O or after another type begins an entity.

    With `strict`, as in seqeval's mode of that name for IOB2, it begins none.

    >>> entities(["B-PER", "I-PER", "B-PER", "O", "I-LOC"])
    [Entity(kind='PER', begin=0, end=2), Entity(kind='PER', begin=2, end=3), Entity(kind='LOC', begin=4, end=5)]
    """
    found: list[Entity] = []
    for place, tag in enumerate(tags):
        if tag == OUTSIDE:
            continue
        goes_on = tag[0] == "I" and bool(found) and found[-1].end == place and found[-1].kind == tag[2:]
        if goes_on:
            found[-1] = found[-1]._replace(end=place + 1)
        elif tag[0] == "B" or not strict:
            found.append(Entity(tag[2:], place, place + 1))
    return found


def as_bio(tags: Sequence[str]) -> tuple[str, ...]:
    """The same entities in BIO: IOB1 changes, BIO stays.

    >>> as_bio(["I-PER", "I-PER", "B-PER", "O"])
    ('B-PER', 'I-PER', 'B-PER', 'O')
    """
    written = [OUTSIDE] * len(tags)
    for kind, begin, end in entities(tags):
        written[begin:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - begin - 1)]
    return tuple(written)


def tags_of(sentences: Sequence[Sentence]) -> tuple[str, ...]:
    """The tags in order: O, then by type, B- before I-, both for each type."""
    kinds = sorted({tag[2:] for sentence in sentences for tag in sentence.tags if tag != OUTSIDE})
    if not kinds:
        raise DataError("no sentence to train on names anything: all tags are O")
    return (OUTSIDE, *(f"{place}-{kind}" for kind in kinds for place in "BI"))


def scores(true: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], *, strict: bool = False) -> Scores:
    """F1, precision and recall of entities in percent; one is right if its type and both ends are.

    All are 0 where there is none.

    Source: the script conlleval of CoNLL-2000 and CoNLL-2003.
    """
    right = counted = named = 0
    for tags, answer in zip(true, predictions, strict=True):
        expected, found = set(entities(tags)), set(entities(answer, strict=strict))
        right, counted, named = right + len(expected & found), counted + len(expected), named + len(found)
    precision, recall = 100 * right / max(named, 1), 100 * right / max(counted, 1)
    return {"f1": 200 * right / max(counted + named, 1), "precision": precision, "recall": recall}


# -- tokens ------------------------------------------------------------------------------------------------------------


def align(words: Sequence[str], tokenizer: models.Tokenizer, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a sentence, (n,) int32, and the word that each is the first of, (n,) int32, -1 for all others.

    The words stand with blanks between them, so that they have the tokens that they have in a text. What is longer than
    `length` is cut at the end, but for the special tokens there.
    """
    encoding = tokenizer.backend.encode(" ".join(words))
    ends = np.cumsum([len(word) + 1 for word in words])  # behind the blank after each word
    firsts, seen = np.full(len(encoding.ids), -1, np.int32), -1
    for place, (begin, end) in enumerate(encoding.offsets):
        text = encoding.sequence_ids[place] == 0 and end > begin
        word = int(np.searchsorted(ends, end - 1, side="right"))
        if text and word > seen and end - 1 < ends[word] - 1:  # not the blank alone
            firsts[place], seen = word, word
    tokens = np.array(encoding.ids, np.int32)
    keep = models.tokenizer.kept(
        np.array([-1 if text is None else text for text in encoding.sequence_ids]),
        (max(length - sum(text is None for text in encoding.sequence_ids), 0), 0),
        "right",
    )
    return tokens[keep], firsts[keep]


def predicted(
    numbers: np.ndarray, words: np.ndarray, sentences: Sequence[Sentence], classes: Sequence[str]
) -> list[list[str]]:
    """The tag of each word: (sentences, length) classes of tokens and the words that they are the first tokens of."""
    predictions = [[OUTSIDE] * len(sentence.words) for sentence in sentences]
    for answer, row, firsts in zip(predictions, numbers, words, strict=True):
        for place in np.flatnonzero(firsts >= 0):
            answer[firsts[place]] = classes[row[place]]
    return predictions


def _losses(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Sum of the losses and number of the tokens that have a tag, per row: (batch, 2)."""
    counts = (labels >= 0).astype(jnp.float32)  # (batch, length)
    lost = smoothed(logits, jnp.maximum(labels, 0), smoothing) * counts
    return jnp.stack([lost.sum(axis=1), counts.sum(axis=1)], axis=1)


def _shared(batches: Batches) -> Callable[[int], Mapping[str, np.ndarray]]:
    """Batches with `share` (batch,): the tagged tokens of the whole batch, per row; see `per_token`."""

    def batch(step: int) -> Mapping[str, np.ndarray]:
        found = batches(step)
        count = (found["labels"] >= 0).sum() / len(found["labels"])
        return found | {"share": np.full(len(found["labels"]), count, np.float32)}

    return batch
