"""From examples to rows of tokens: tokenised, then padded or packed. `experiments.data.batches` makes batches of rows.

A row is a dict of arrays of one length. What a model and its loss read:

| key | of | meaning |
|---|---|---|
| tokens | all | (length,) int32 |
| mask | all | (length,) bool, False where there is padding |
| types | classification | (length,) int32, 1 from the second sentence of a pair on |
| labels | classification | () int32, or float32 for regression |
| loss_mask | language models | (length,) bool, True where the token counts as a *target*: of the logits before it |
| segments | packed | (length,) int32: 1, 2, ... for the examples in the row, 0 for padding; attend within equal ones |
| positions | packed | (length,) int32, from 0 in each example |

    tokens = tokenise_prompted(examples, tokenizer.encode, length=512, separator=eos, end=eos)
    batches = Batches(packed_rows(tokens, 512), batch=8, seed=0)
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.data.examples import Classified, Prompted
from experiments.data.files import DataError
from experiments.data.packing import first_fit
from experiments.data.tokenised import Item, Tokenised, gather

Encode = Callable[..., Sequence[int]]
"""`encode(text)`, or `encode(text, pair)` for two texts, with the special tokens that the model expects."""
Row = dict[str, np.ndarray]


# -- tokens ------------------------------------------------------------------------------------------------------------


def tokenise_classified(
    examples: Sequence[Classified], encode: Encode, *, length: int, classes: int | None, truncate: bool = False
) -> Tokenised:
    """Tokens of texts to classify.

    Args:
      examples: all with a label, or none.
      encode: of the model's tokenizer.
      length: the context, in tokens.
      classes: their number; None for regression.
      truncate: cut what is longer, by whole words from the end of the longer text, so that special tokens stay.

    Raises:
      DataError: for an empty text, a label outside the range, or texts longer than the context: how many, and which is
        the longest.
    """
    _labels(examples, classes)
    texts = [tuple(part for part in (item.text, item.pair) if part is not None) for item in examples]
    encoded = [np.array(_encode(encode, number, parts), np.int32) for number, parts in enumerate(texts)]
    cut, longest = _overlong([len(tokens) for tokens in encoded], length, truncate)

    def items() -> Iterator[Item]:
        for example, parts, tokens in zip(examples, texts, encoded, strict=True):
            if len(tokens) > length:
                parts, tokens = _fitted(encode, parts, length)
            mark = _shared(tokens, encode(parts[0])) if len(parts) > 1 else len(tokens)
            yield Item(tokens, mark, example.label)

    unlabelled = examples[0].label is None
    kind = None if unlabelled else np.float32 if classes is None else np.int32
    return gather(items(), labels=kind, cut=cut, longest=longest)


def tokenise_prompted(
    examples: Sequence[Prompted],
    encode: Encode,
    *,
    length: int,
    begin: int | None = None,
    separator: int | None = None,
    end: int | None = None,
    joiner: str = " ",
    truncate: bool = False,
) -> Tokenised:
    """Tokens of prompts and completions: `[begin] prompt [separator] completion [end]`; completion and `end` count.

    The LoRA paper's code has `separator=end=50256` for GPT-2, and a blank before the completion.

    Args:
      examples: prompts with their completions.
      encode: text to tokens, without special tokens.
      length: the context, in tokens.
      begin, separator, end: special tokens before, between and behind; None for none.
      joiner: text before the completion.
      truncate: cut the end of what is longer.

    Raises:
      DataError: for an empty prompt or completion, for examples longer than the context, or with `truncate` for a
        prompt that leaves no room for its completion.

    Source: microsoft/LoRA, examples/NLG/src/gpt2_encode.py and data_utils.py.
    """
    prefix_ids, separator_ids, end_ids = ([] if token is None else [token] for token in (begin, separator, end))

    def item(number: int, example: Prompted) -> Item:
        prompt = [*prefix_ids, *_encode(encode, number, (example.prompt,)), *separator_ids]
        completion = _encode(encode, number, (example.completion,), before=joiner)
        return Item(np.array([*prompt, *completion, *end_ids], np.int32), len(prompt), None)

    items = [item(number, example) for number, example in enumerate(examples)]
    cut, longest = _overlong([len(item.tokens) for item in items], length, truncate)
    for number, (_, mark, *_) in enumerate(items):
        if mark >= length:
            raise DataError(
                f"the prompt of example {number} alone has {mark} tokens: nothing of its completion is left in a "
                f"context of {length}. Remove the example or shorten its prompt"
            )
    fitted = (item._replace(tokens=item.tokens[:length]) for item in items)
    return gather(fitted, labels=None, cut=cut, longest=longest)


def _labels(examples: Sequence[Classified], classes: int | None) -> None:
    if not examples:
        raise DataError("no examples")
    without = [number for number, example in enumerate(examples) if example.label is None]
    if 0 < len(without) < len(examples):
        raise DataError(f"{len(without)} of {len(examples)} examples have no label, the first is example {without[0]}")
    for number, example in enumerate(examples):
        label = example.label
        if label is None or (classes is None and np.isfinite(label)):
            continue
        if classes is None:
            raise DataError(f"example {number} has the value {label}, expected a finite number")
        if not (isinstance(label, int | np.integer) and 0 <= label < classes):
            raise DataError(
                f"example {number} has the label {label!r}, expected 0 to {classes - 1} ({classes} classes)"
            )


def _encode(encode: Encode, number: int, parts: tuple[str, ...], before: str = "") -> Sequence[int]:
    for part in parts:
        if not part.strip():
            raise DataError(f"example {number} has an empty text: remove it or fill it")
    tokens = encode(before + parts[0], *parts[1:])
    if not len(tokens):
        raise DataError(f"example {number} has no tokens: {parts[0][:60]!r}")
    return tokens


def _overlong(lengths: Sequence[int], length: int, truncate: bool) -> tuple[int, int]:
    """Number of items that are longer than the context, and the longest length."""
    over = sum(count > length for count in lengths)
    longest = max(lengths, default=0)
    if over and not truncate:
        raise DataError(
            f"{over} of {len(lengths)} examples are longer than the context of {length} tokens; the longest, example "
            f"{lengths.index(longest)}, has {longest}. Pass truncate=True to cut them, or a longer context"
        )
    return over, longest


def _fitted(encode: Encode, parts: tuple[str, ...], length: int) -> tuple[tuple[str, ...], np.ndarray]:
    """The texts with as many words each as fit, at most the same number, and their tokens.

    Where not even the first word does, a long link or a text without blanks, it is so many characters.
    """
    for unit in (r"\S+", r"\S"):
        ends = [[found.end() for found in re.finditer(unit, part)] for part in parts]

        def first(units: int, ends: list[list[int]] = ends) -> tuple[str, ...]:
            return tuple(part[: end[min(units, len(end)) - 1]] for part, end in zip(parts, ends, strict=True))

        low, high = 0, max(map(len, ends))  # fits, does not fit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if len(encode(*first(middle))) <= length else (low, middle)
        if low:
            return first(low), np.array(encode(*first(low)), np.int32)
    raise DataError(f"not even the first character fits in a context of {length} tokens: {parts[0][:60]!r}")


def _shared(tokens: np.ndarray, others: Sequence[int]) -> int:
    """Number of equal tokens at the beginning: where the second text of a pair begins, `others` being the first."""
    pairs = zip(tokens, others, strict=False)
    return next((i for i, (token, other) in enumerate(pairs) if token != other), min(len(tokens), len(others)))


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows by number, made when they are asked for."""

    count: int
    make: Callable[[int], Row]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        return self.make(index)


def classified_rows(items: Tokenised, length: int, *, pad: int = 0) -> Rows:
    """Rows with `tokens`, `mask`, `types` and, where there are labels, `labels`.

    Args:
      items: of `tokenise_classified`.
      length: of every row.
      pad: the token of padding.
    """
    _fits(items, length)

    def make(index: int) -> Row:
        tokens, mark, *_ = items[index]
        row = _padded(tokens, length, pad)
        row["types"] = np.asarray(row["mask"] & (np.arange(length) >= mark), np.int32)  # (length,)
        return row if items.labels is None else {**row, "labels": items.labels[index]}

    return Rows(len(items), make)


def prompted_rows(items: Tokenised, length: int, *, pad: int = 0) -> Rows:
    """Rows with `tokens`, `mask` and `loss_mask`, one example in each.

    Args:
      items: of `tokenise_prompted`.
      length: of every row.
      pad: the token of padding.
    """
    _fits(items, length)

    def make(index: int) -> Row:
        item = items[index]
        counted = _counted(item)
        return {**_padded(item.tokens, length, pad), "loss_mask": np.pad(counted, (0, length - len(counted)))}

    return Rows(len(items), make)


def packed_rows(items: Tokenised, length: int, *, pad: int = 0) -> Rows:
    """Rows with `tokens`, `mask`, `loss_mask`, `segments` and `positions`, as many examples in each as fit.

    Which examples share a row is the same in every epoch; the rows are shuffled. The first token of an example never
    counts, whatever its mark: what stands before it in the row is another example.

    Args:
      items: of `tokenise_prompted`.
      length: of every row.
      pad: the token of padding.
    """
    _fits(items, length)
    rows = first_fit(items.lengths.tolist(), length)

    def make(index: int) -> Row:
        found = [items[number] for number in rows[index]]
        sizes = [len(item.tokens) for item in found]
        row = _padded(np.concatenate([item.tokens for item in found]), length, pad)
        positions = np.concatenate([np.arange(size) for size in sizes])
        counted = np.concatenate([_counted(item) & (np.arange(len(item.tokens)) > 0) for item in found])
        segments = np.repeat(np.arange(1, len(found) + 1), sizes)
        filling = length - len(positions)
        return {
            **row,
            "loss_mask": np.pad(counted, (0, filling)),
            "segments": np.pad(segments, (0, filling)).astype(np.int32),
            "positions": np.pad(positions, (0, filling)).astype(np.int32),
        }

    return Rows(len(rows), make)


def _counted(item: Item) -> np.ndarray:
    """Mask of the tokens that count as targets: (n,) bool."""
    return np.arange(len(item.tokens)) >= item.mark if item.counted is None else item.counted


def _fits(items: Tokenised, length: int) -> None:
    if len(items) and int(items.lengths.max()) > length:
        raise DataError(f"an example has {int(items.lengths.max())} tokens, a row {length}: tokenise with this length")


def _padded(tokens: np.ndarray, length: int, pad: int) -> Row:
    filling = length - len(tokens)
    return {
        "tokens": np.pad(tokens, (0, filling), constant_values=pad).astype(np.int32),
        "mask": np.arange(length) < len(tokens),
    }
