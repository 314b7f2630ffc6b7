"""Texts to tokens and back, by a checkpoint's own tokenizer files and the tokenizers library."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from jlora.models import files, place, vocabulary
from jlora.models.vocabulary import Side, as_side

Truncate = bool | Literal["first", "second"]


class Batch(NamedTuple):
    """Rows of tokens at one width, (rows, width) all."""

    tokens: np.ndarray  # int32, the pad token where there is padding
    mask: np.ndarray  # bool, False where there is padding
    types: np.ndarray  # int32, 1 in the second text of a pair where the tokenizer tells the two apart, else 0


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Texts to tokens and back.

    Nothing changes its state, so threads may share it (padding and truncation, in the tokenizers library, are switched
    on for all of them at once), and it can be pickled for other processes.

    Attributes:
      backend: the `tokenizers.Tokenizer`, its padding and truncation off.
      specials: the special tokens by role, `{"pad": "<pad>"}`.
      source: the checkpoint, for errors.
      side: where `batch` pads by default.
      cut: where `batch` truncates by default.
      bos, eos, pad, unk, cls, sep, mask: the ids of the special tokens, None where there is none.
    """

    backend: Any
    specials: Mapping[str, str]
    source: str
    side: Side = "right"
    cut: Side = "right"

    @classmethod
    def load(cls, name: str | os.PathLike[str], revision: str | None = None, *, pad: str | None = None) -> "Tokenizer":
        """The tokenizer of a checkpoint.

        It is read from tokenizer.json, or else built from vocab.json and merges.txt (GPT-2, RoBERTa and CLIP; also
        under OpenAI's names, encoder.json and vocab.bpe) or from vocab.txt (BERT). tokenizer_config.json and
        config.json say which it is, and without them the vocabulary does. BERT's do_lower_case, where no file gives it,
        is whether no word has a capital.

        Each special token is the first that is found in tokenizer_config.json, special_tokens_map.json, the usual ones
        of these four models, tokenizer.json's padding, and the ids of config.json; a null says that there is none. A
        tokenizer_config.json without added_tokens_decoder is older, and special_tokens_map.json comes before it.

        Args:
          name: a folder with a tokenizer's files, a checkpoint's others are not needed; or "openai-community/gpt2".
          revision: of the repository: a branch, tag or commit.
          pad: the token to pad with, where the checkpoint names none: GPT-2 can take "<|endoftext|>".

        Raises:
          FileNotFoundError: if there is no such folder or repository, or files are missing.
          ValueError: for damaged files, files that contradict each other, a tokenizer that cannot be built from its
            vocabulary alone, and a `pad` that is no token.
          ImportError: if the tokenizers library is absent.

        Example:
          >>> import pathlib, tempfile
          >>> folder = pathlib.Path(tempfile.mkdtemp())
          >>> _ = (folder / "vocab.txt").write_text("[PAD] [UNK] [CLS] [SEP] low rank ##s".replace(" ", chr(10)))
          >>> tokenizer = Tokenizer.load(folder)
          >>> tokenizer.encode("Low ranks")
          [2, 4, 5, 6, 3]
          >>> tokenizer.batch(["Low ranks", "low"]).tokens
          array([[2, 4, 5, 6, 3],
                 [2, 4, 3, 0, 0]], dtype=int32)
          >>> tokenizer.decode([2, 4, 5, 6, 3])
          'low ranks'
        """
        folder = place.folder_of(name)
        found = vocabulary.read(folder if folder.is_dir() else files.folder_of(name, revision, files.SMALL))
        specials = dict(found.specials)
        if pad is not None:
            if found.backend.token_to_id(pad) is None:
                raise ValueError(f"pad={pad!r} is no token of '{name}'; its special tokens are {specials}")
            specials["pad"] = pad
        return cls(found.backend, specials, str(name), found.side, found.cut)

    def encode(self, text: str, pair: str | None = None, *, special: bool = True) -> list[int]:
        """The tokens of a text, or of two, with the special tokens that the model expects around them.

        An empty text may give none: GPT-2 has nothing to put around it.
        """
        return list(self.backend.encode(text, pair, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """The text of a row of tokens.

        An id that no token has gives no text, as in transformers: the vocabularies of many models are rounded up.

        Raises:
          ValueError: for anything but one row of integers from 0.
        """
        row = np.asarray(ids)
        if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
            raise ValueError(f"decode takes one row of ids, got {row.dtype} of shape {row.shape}")
        if (row < 0).any():
            raise ValueError(f"there is {row.min()} among the ids, and they start at 0: leave out what is no token")
        return str(self.backend.decode(row.tolist(), skip_special_tokens=skip_special))

    def batch(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        length: int | None = None,
        truncate: Truncate = False,
        side: Side | None = None,
        cut: Side | None = None,
        multiple_of: int | None = None,
    ) -> Batch:
        """The tokens of texts, or of pairs of texts, padded to one width.

        Args:
          texts: one for each row.
          pairs: the second text of each row.
          length: the width. None for that of the longest row.
          truncate: what to do with a row longer than `length`: True cuts the longer of its two texts until it fits,
            "first" and "second" cut that one alone. Special tokens stay.
          side: where to pad; `Tokenizer.side` when None. A decoder that generates needs "left".
          cut: the end of the text to cut off; `Tokenizer.cut` when None.
          multiple_of: the width is that of the longest row rounded up to a multiple, and `length` is the largest that
            it may be: few different shapes, so few compilations.

        Raises:
          ValueError: for a row without tokens, a row longer than `length` (unless `truncate`), a `length` that leaves
            no room for text, padding without a pad token, or texts and pairs that differ in number.
          TypeError: for one string in the place of a list.
        """
        rows = self._rows(texts, pairs)
        for name, value in (("length", length), ("multiple_of", multiple_of)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if length is not None:
            rows = self._fitted(rows, length, truncate, as_side("cut", cut or self.cut))
        width = max(len(row.tokens) for row in rows)
        if multiple_of is not None:
            width = -(-width // multiple_of) * multiple_of
        if length is not None:
            width = length if multiple_of is None else min(width, length)
        return self._padded(rows, width, as_side("side", side or self.side))

    def _rows(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list["_Row"]:
        for name, value in (("texts", texts), ("pairs", pairs)):
            if isinstance(value, str):
                raise TypeError(f"{name} is a string, expected a list of them: pass [text], or call encode")
        if len(texts) == 0:
            raise ValueError("texts is empty: a batch has at least one row")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts and {len(pairs)} pairs: each text needs the one that it goes with")
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        rows = [_row(encoding) for encoding in self.backend.encode_batch(inputs)]
        for number, row in enumerate(rows):
            if not len(row.tokens):
                what = f"texts[{number}]={texts[number]!r}" + ("" if pairs is None else f" with pairs[{number}]")
                raise ValueError(f"{what} gives no tokens: leave it out, or put a text or a special token in its place")
        return rows

    def _fitted(self, rows: list["_Row"], length: int, truncate: Truncate, cut: Side) -> list["_Row"]:
        over = [number for number, row in enumerate(rows) if len(row.tokens) > length]
        if over and truncate is False:
            more = f" ({len(over)} of the {len(rows)} texts are too long)" if len(over) > 1 else ""
            raise ValueError(
                f"texts[{over[0]}] has {len(rows[over[0]].tokens)} tokens, and length={length}{more}: "
                "pass truncate=True to cut it, or a larger length"
            )
        rows = list(rows)
        for number in over:
            sequences = rows[number].sequences
            special = int((sequences < 0).sum())
            if length <= special:
                raise ValueError(f"length={length} leaves no room for text beside {special} special tokens")
            counts = [int((sequences == part).sum()) for part in (0, 1)]
            left = shares(counts[0], counts[1], length - special, truncate)
            if truncate in ("first", "second") and left[truncate == "second"] < 1:
                raise ValueError(
                    f"texts[{number}] has {counts[0]} and {counts[1]} tokens, and length={length} has room for "
                    f"{length - special}: to cut the {truncate} alone leaves nothing of it, truncate=True cuts both"
                )
            keep = kept(sequences, left, cut)
            rows[number] = _Row(*(values[keep] for values in rows[number]))
        return rows

    def _padded(self, rows: list["_Row"], width: int, side: Side) -> Batch:
        short = [number for number, row in enumerate(rows) if len(row.tokens) < width]
        if short and self.pad is None:
            why = f"not the {self.specials['pad']!r} that it names" if "pad" in self.specials else "no pad token"
            raise ValueError(
                f"texts[{short[0]}] is to be padded from {len(rows[short[0]].tokens)} to {width} tokens, and "
                f"'{self.source}' has {why}: pass one, Tokenizer.load(..., pad={self.specials.get('eos', '...')!r})"
            )
        shape = (len(rows), width)
        batch = Batch(np.full(shape, self.pad or 0, np.int32), np.zeros(shape, bool), np.zeros(shape, np.int32))
        for number, row in enumerate(rows):
            count = len(row.tokens)
            place = slice(0, count) if side == "right" else slice(width - count, width)
            batch.tokens[number, place], batch.types[number, place] = row.tokens, row.types
            batch.mask[number, place] = True
        return batch

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding needs."""
        return max(self.backend.get_vocab().values(), default=-1) + 1

    def check(self, vocab_size: int) -> None:
        """Raises a ValueError if there are tokens that a model with this vocabulary has no embedding for.

        JAX would not: what lies beyond an array reads as NaN, or as its last row.
        """
        if self.vocab_size > vocab_size:
            last = self.vocab_size - 1
            raise ValueError(
                f"the tokenizer of '{self.source}' does not fit a vocabulary of {vocab_size}: its largest id is {last} "
                f"({self.backend.id_to_token(last)!r}). It belongs to another model, or the embedding has to grow to "
                f"{self.vocab_size} rows"
            )

    def _id(self, role: str) -> int | None:
        token = self.specials.get(role)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos(self) -> int | None:
        """Number of the token of the beginning; None where there is none."""
        return self._id("bos")

    @property
    def eos(self) -> int | None:
        """Number of the token of the end; None where there is none."""
        return self._id("eos")

    @property
    def pad(self) -> int | None:
        """Number of the token of padding; None where there is none."""
        return self._id("pad")

    @property
    def unk(self) -> int | None:
        """Number of the token for what is unknown; None where there is none."""
        return self._id("unk")

    @property
    def cls(self) -> int | None:
        """Number of the token before a text; None where there is none."""
        return self._id("cls")

    @property
    def sep(self) -> int | None:
        """Number of the token behind a text, and between two; None where there is none."""
        return self._id("sep")

    @property
    def mask(self) -> int | None:
        """Number of the token for what is masked; None where there is none."""
        return self._id("mask")


# -- truncation --------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    tokens: np.ndarray
    types: np.ndarray
    sequences: np.ndarray  # which text a token is of, 0 or 1; -1 for the special tokens around them


def _row(encoding: Any) -> _Row:
    sequences = [-1 if text is None else text for text in encoding.sequence_ids]
    return _Row(*(np.asarray(values, np.int32) for values in (encoding.ids, encoding.type_ids, sequences)))


def shares(first: int, second: int, room: int, truncate: Truncate) -> tuple[int, int]:
    """Numbers of tokens that stay of two texts, which have more than `room`. The rule is that of transformers.

    >>> shares(9, 3, 8, True), shares(9, 5, 8, True), shares(5, 9, 7, True)
    ((5, 3), (4, 4), (3, 4))
    >>> shares(9, 3, 8, "first"), shares(9, 3, 10, "second")
    ((5, 3), (9, 1))
    """
    if truncate == "first":
        return room - second, second
    if truncate == "second":
        return first, room - first
    short = min(first, second, room // 2)
    return (room - short, short) if first > second else (short, room - short)


def kept(sequences: np.ndarray, counts: tuple[int, int], cut: Side) -> np.ndarray:
    """Mask of the tokens that stay, (length,) bool: special ones, and of each text so many from the uncut end.

    >>> kept(np.array([-1, 0, 0, 0, -1, 1, 1, -1]), (1, 2), "right").astype(int)
    array([1, 1, 0, 0, 1, 1, 1, 1])
    """
    stay = sequences < 0
    for text, count in enumerate(counts):
        (places,) = np.nonzero(sequences == text)
        stay[places[:count] if cut == "right" else places[len(places) - count :]] = True
    return stay
