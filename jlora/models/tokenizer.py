"""Texts to tokens and back, by a checkpoint's own tokenizer files and the tokenizers library."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from jlora.models import files

Side = Literal["left", "right"]
Truncate = bool | Literal["first", "second"]
WHOLE = "tokenizer.json"
SETTINGS, SPECIALS, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
PIECES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("vocab.txt",))  # the second are OpenAI's names
SENTENCEPIECE = ("tokenizer.model", "spm.model", "sentencepiece.bpe.model", "spiece.model")
ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")


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

        It is read from tokenizer.json, or else built from vocab.json and merges.txt (GPT-2 and RoBERTa; also under
        OpenAI's names, encoder.json and vocab.bpe) or from vocab.txt (BERT). tokenizer_config.json and config.json say
        which it is, and without them the vocabulary does. BERT's do_lower_case, where no file gives it, is whether no
        word has a capital.

        Each special token is the first that is found in tokenizer_config.json, special_tokens_map.json, the usual ones
        of these three models, tokenizer.json's padding, and the ids of config.json; a null says that there is none.

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
        library = _library()
        folder = Path(name)
        read = _Files.of(folder if folder.is_dir() else files.folder_of(name, revision))
        backend, family = _backend(library, read)
        padding, truncation = backend.padding or {}, backend.truncation or {}
        backend.no_padding()
        backend.no_truncation()
        _add(library, backend, read)
        specials = _specials(backend, read, family, padding.get("pad_token"))
        _register(library, backend, read, specials)
        named = {role: _content(token) for role, token in specials.items()}
        if pad is not None:
            if backend.token_to_id(pad) is None:
                raise ValueError(f"pad={pad!r} is no token of '{name}'; its special tokens are {named}")
            named["pad"] = pad
        side = read.side("padding_side", padding.get("direction"))
        return cls(backend, named, str(name), side, read.side("truncation_side", truncation.get("direction")))

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
            rows = self._fitted(rows, length, truncate, _side("cut", cut or self.cut))
        width = max(len(row.tokens) for row in rows)
        if multiple_of is not None:
            width = -(-width // multiple_of) * multiple_of
        if length is not None:
            width = length if multiple_of is None else min(width, length)
        return self._padded(rows, width, _side("side", side or self.side))

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
        return self._id("bos")

    @property
    def eos(self) -> int | None:
        return self._id("eos")

    @property
    def pad(self) -> int | None:
        return self._id("pad")

    @property
    def unk(self) -> int | None:
        return self._id("unk")

    @property
    def cls(self) -> int | None:
        return self._id("cls")

    @property
    def sep(self) -> int | None:
        return self._id("sep")

    @property
    def mask(self) -> int | None:
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
    """How many tokens of two texts stay, of which there are more than `room`. The rule is that of transformers.

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
    """Which tokens stay, (length,) bool: the special ones, and of each text so many from the end that is not cut.

    >>> kept(np.array([-1, 0, 0, 0, -1, 1, 1, -1]), (1, 2), "right").astype(int)
    array([1, 1, 0, 0, 1, 1, 1, 1])
    """
    stay = sequences < 0
    for text, count in enumerate(counts):
        (places,) = np.nonzero(sequences == text)
        stay[places[:count] if cut == "right" else places[len(places) - count :]] = True
    return stay


def _side(name: str, value: str) -> Side:
    if value not in ("left", "right"):
        raise ValueError(f"{name}={value!r}, expected 'left' or 'right'")
    return cast(Side, value)


# -- files -------------------------------------------------------------------------------------------------------------

Token = str | Mapping[str, Any]  # as the files have it: its text, or that as "content" with its settings


class _Files(NamedTuple):
    """What the JSON files beside the vocabulary say; empty where there is no such file."""

    folder: Path
    settings: dict[str, Any]
    specials: dict[str, Any]
    added: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> "_Files":
        paths = [folder / name for name in (SETTINGS, SPECIALS, ADDED, files.CONFIG)]
        return cls(folder, *(files.read_json(path) if path.is_file() else {} for path in paths))

    @property
    def kind(self) -> str | None:
        """The tokenizer's class in transformers, or else the model's type."""
        classes = (content.get("tokenizer_class") for content in (self.settings, self.config))
        kind = next(filter(None, classes), None) or self.config.get("model_type")
        return None if kind is None else str(kind).removesuffix("Fast")

    def side(self, key: str, otherwise: str | None) -> Side:
        value = self.settings.get(key) or otherwise or "right"
        return _side(f"'{self.folder / SETTINGS}' has {key}", str(value).lower())

    def special(self, role: str, default: Token | None = None) -> Token | None:
        """The token of a role; None where a file says that there is none, `default` where none speaks of it."""
        key = f"{role}_token"
        for file, content in ((SETTINGS, self.settings), (SPECIALS, self.specials)):
            if key in content:
                return None if content[key] is None else _checked(content[key], self.folder / file, key)
        return default

    @property
    def more(self) -> list[Token]:
        """Special tokens that have no role."""
        key = "additional_special_tokens"
        listed = self.settings.get(key) or self.specials.get(key) or []
        return [_checked(token, self.folder, key) for token in listed]


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _checked(token: Any, file: Path, key: str) -> Token:
    if not isinstance(_content(token), str):
        raise ValueError(f"'{file}' has {key}={token!r}, expected a token")
    return cast(Token, token)


def _library() -> ModuleType:
    try:
        import tokenizers  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("to read a tokenizer needs the tokenizers library: pip install jlora[models]") from error
    return cast(ModuleType, tokenizers)


def _backend(library: ModuleType, read: _Files) -> tuple[Any, "_Family | None"]:
    """The tokenizer as its files have it, and which of the three it is, if it is one."""
    folder = read.folder
    if (folder / WHOLE).is_file():
        try:
            return library.Tokenizer.from_file(str(folder / WHOLE)), _FAMILIES.get(read.kind or "")
        except Exception as error:  # the library raises nothing more precise
            files.read_json(folder / WHOLE)
            raise ValueError(f"'{folder / WHOLE}' is damaged, or the tokenizers library too old: {error}") from error
    names = next((names for names in PIECES if (folder / names[0]).is_file()), None)
    if names is None:
        raise FileNotFoundError(_no_tokenizer(folder))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"'{folder}' holds {names[0]} and no {absent[0]}: it takes both, or {WHOLE}")
    if len(names) == 1:
        vocabulary, merges = {word: number for number, word in enumerate(_lines(folder / names[0]))}, []
    else:
        vocabulary, merges = _pieces(folder / names[0]), _merges(folder / names[1])
    family = _family(read, names, vocabulary)
    try:
        return family.build(library, read, vocabulary, merges), family
    except Exception as error:  # as above
        raise ValueError(f"no tokenizer can be made of {' and '.join(names)} in '{folder}': {error}") from error


_CONVERT = f"transformers makes a {WHOLE} of it, AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"


def _no_tokenizer(folder: Path) -> str:
    pieces = next((name for name in SENTENCEPIECE if (folder / name).is_file()), None)
    if pieces is not None:
        return f"the tokenizer of '{folder}' is {pieces}, SentencePiece: with sentencepiece installed, {_CONVERT}"
    looked = [(WHOLE,), *PIECES]
    near = sorted({path.parent.name for names in looked for path in folder.glob(f"*/{names[0]}")})
    hint = f"; its folders {', '.join(map(repr, near[:5]))} hold one" if near else ""
    return f"'{folder}' holds no tokenizer: no {', no '.join(' with '.join(names) for names in looked)}{hint}"


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would split at characters of the vocabulary
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is no text: {error}") from error
    return lines[:-1] if lines[-1] == "" else lines


def _pieces(file: Path) -> dict[str, int]:
    pieces = files.read_json(file)
    taken: set[int] = set()
    for piece, number in pieces.items():
        if type(number) is not int or number < 0 or number in taken:
            raise ValueError(
                f"'{file}' is damaged: {piece!r} has the id {number!r}, expected a number of its own from 0"
            )
        taken.add(number)
    return pieces


def _merges(file: Path) -> list[tuple[str, ...]]:
    merges = []
    for number, line in enumerate(_lines(file), 1):
        if line and not (number == 1 and line.startswith("#version")):
            merges.append(tuple(line.split(" ")))
            if len(merges[-1]) != 2:
                raise ValueError(f"'{file}' is damaged: line {number} is {line[:60]!r}, expected two pieces")
    return merges


# -- special tokens ----------------------------------------------------------------------------------------------------


def _add(library: ModuleType, backend: Any, read: _Files) -> None:
    """Adds the tokens that the files beside give ids to, where the vocabulary does not have them."""
    decoder = read.settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"'{read.folder / SETTINGS}' has an added_tokens_decoder that is no object")
    listed = [(number, token, ADDED) for token, number in read.added.items()]
    listed += [(number, token, SETTINGS) for number, token in decoder.items()]
    for number, token, file in listed:
        if not (str(number).isdecimal() and isinstance(_content(token), str)):
            raise ValueError(f"'{read.folder / file}' gives the token {token!r} the id {number!r}")
    special = {_content(token) for token in [*map(read.special, ROLES), *read.more]}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for number, token, file in sorted(listed, key=lambda row: int(row[0])):
        content = _content(token)
        if content not in known:
            marked = content in special or (isinstance(token, Mapping) and bool(token.get("special")))
            (backend.add_special_tokens if marked else backend.add_tokens)([_added(library, token, marked)])
            known.add(content)
        has = backend.token_to_id(content)
        if has != int(number):
            raise ValueError(f"'{read.folder / file}' gives {content!r} the id {number}, and the vocabulary {has}")


def _added(library: ModuleType, token: Token, special: bool) -> Any:
    given = token if isinstance(token, Mapping) else {}
    flags = {name: bool(given[name]) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in given}
    return library.AddedToken(_content(token), **({"normalized": not special} | flags))


def _specials(backend: Any, read: _Files, family: "_Family | None", pad: str | None) -> dict[str, Token]:
    """Special tokens by role. Those that no file names are had only where the vocabulary has them."""
    usual = ({} if pad is None else {"pad": pad}) | ({} if family is None else dict(family.specials))
    found = {}
    for role in ROLES:
        number = read.config.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number  # of several ends the first
        token = usual.get(role)
        if backend.token_to_id(_content(token) or "") is None:
            token = backend.id_to_token(number) if isinstance(number, int) and number >= 0 else None
        found[role] = read.special(role, token)
    return {role: token for role, token in found.items() if token is not None}


def _register(library: ModuleType, backend: Any, read: _Files, specials: Mapping[str, Token]) -> None:
    """Makes special tokens whole in texts, and known to `skip_special`, where the vocabulary has them as words."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in [*specials.values(), *read.more]:
        if _content(token) not in known and backend.token_to_id(_content(token)) is not None:
            backend.add_special_tokens([_added(library, token, special=True)])
            known.add(_content(token))


# -- the tokenizers that can be built from a vocabulary ----------------------------------------------------------------


class _Family(NamedTuple):
    specials: Mapping[str, Token]  # of roles that no file speaks of
    build: Callable[[ModuleType, _Files, dict[str, Any], list[tuple[str, ...]]], Any]


def _family(read: _Files, names: tuple[str, ...], vocabulary: Mapping[str, Any]) -> _Family:
    if read.kind is None and len(names) == 1:
        return _BERT
    if read.kind is None:
        if not any("\u0120" in piece for piece in vocabulary):
            raise ValueError(
                f"'{read.folder / names[0]}' has no piece with '\u0120', the blank of GPT-2 and RoBERTa, and nothing "
                f"says what it is: {_CONVERT}"
            )
        return _ROBERTA if {"<s>", "</s>"} <= vocabulary.keys() else _GPT2
    possible = {kind: family for kind, family in _FAMILIES.items() if (family is _BERT) == (len(names) == 1)}
    if read.kind not in possible:
        raise ValueError(
            f"'{read.folder}' has no {WHOLE}, and of {' and '.join(names)} can be built {', '.join(possible)}, not "
            f"{read.kind!r}: {_CONVERT}"
        )
    if read.settings.get("add_bos_token"):
        raise ValueError(f"'{read.folder / SETTINGS}' has add_bos_token, which takes a {WHOLE}: {_CONVERT}")
    return possible[read.kind]


def _needed(read: _Files, family: _Family, role: str, vocabulary: Mapping[str, int]) -> tuple[str, int]:
    token = _content(read.special(role) or family.specials[role])
    if token not in vocabulary:
        raise ValueError(f"the {role} token, {token!r}, is not in the vocabulary")
    return token, vocabulary[token]


def _byte_level(library: ModuleType, read: _Files, vocabulary: dict[str, Any], merges: list[tuple[str, ...]]) -> Any:
    made = {"".join(pair) for pair in merges}
    lost = [piece for piece in vocabulary if len(piece) > 1 and piece not in made]
    if len(lost) > 0.1 * len(vocabulary):  # a few are special; a file of merges that is cut off is whole to its readers
        raise ValueError(f"{len(lost)} of {len(vocabulary)} pieces, such as {lost[-1]!r}, come of no merge")
    backend = library.Tokenizer(library.models.BPE(vocabulary, merges))
    blank = bool(read.settings.get("add_prefix_space", False))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=blank)
    backend.decoder = library.decoders.ByteLevel()
    backend.post_processor = library.processors.ByteLevel(trim_offsets=False)
    return backend


def _roberta(library: ModuleType, read: _Files, vocabulary: dict[str, Any], merges: list[tuple[str, ...]]) -> Any:
    backend = _byte_level(library, read, vocabulary, merges)
    sep, cls = (_needed(read, _ROBERTA, role, vocabulary) for role in ("sep", "cls"))
    backend.post_processor = library.processors.RobertaProcessing(sep, cls)  # <s> A </s>, and <s> A </s></s> B </s>
    return backend


def _word_pieces(library: ModuleType, read: _Files, vocabulary: dict[str, Any], merges: list[tuple[str, ...]]) -> Any:
    unk, cls, sep = (_needed(read, _BERT, role, vocabulary) for role in ("unk", "cls", "sep"))
    lower = read.settings.get("do_lower_case")
    if lower is None:  # transformers says True, and would make every capital of a cased vocabulary unreachable
        lower = all(word == word.lower() for word in vocabulary if not word.startswith("["))
    backend = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token=unk[0]))
    chinese, accents = bool(read.settings.get("tokenize_chinese_chars", True)), read.settings.get("strip_accents")
    backend.normalizer = library.normalizers.BertNormalizer(True, chinese, accents, bool(lower))
    backend.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    backend.decoder = library.decoders.WordPiece(prefix="##")
    backend.post_processor = library.processors.BertProcessing(sep, cls)  # [CLS] A [SEP], and [CLS] A [SEP] B [SEP]
    return backend


_GPT2 = _Family(dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>"), _byte_level)
_ROBERTA = _Family({
    "bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>",
    "mask": {"content": "<mask>", "lstrip": True},  # takes the blank before it, as a word does
}, _roberta)  # fmt: skip
_BERT = _Family({role: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}, _word_pieces)
_FAMILIES = {
    "GPT2Tokenizer": _GPT2, "gpt2": _GPT2, "RobertaTokenizer": _ROBERTA, "roberta": _ROBERTA, "BertTokenizer": _BERT,
    "bert": _BERT, "DistilBertTokenizer": _BERT, "distilbert": _BERT, "ElectraTokenizer": _BERT, "electra": _BERT,
}  # fmt: skip
