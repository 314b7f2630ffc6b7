"""The files of a tokenizer: what they say, and the tokenizers that are built from a vocabulary where none is whole."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

from jlora.models import files, reading
from jlora.models.fields import TOKEN, shown

Side = Literal["left", "right"]
WHOLE = "tokenizer.json"
SETTINGS, SPECIALS, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
PIECES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("vocab.txt",))  # the second are OpenAI's names
SENTENCEPIECE = ("tokenizer.model", "spm.model", "sentencepiece.bpe.model", "spiece.model")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of a token
WORD_END = "</w>"  # closes the last piece of each word in CLIP's vocabulary
CLIP_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
LARGEST = 2**27  # bytes of a vocabulary
ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")


class Read(NamedTuple):
    """A tokenizer as its files have it: the library's object, its special tokens by role, where it pads and cuts."""

    backend: Any
    specials: dict[str, str]
    side: Side
    cut: Side


def read(folder: Path) -> Read:
    """The tokenizer in a folder; errors are those of `Tokenizer.load`."""
    library, read = _library(), _Files.of(folder)
    backend, family = _backend(library, read)
    if family is _CLIP:
        _spell(library, backend)
    padding, truncation = backend.padding or {}, backend.truncation or {}
    backend.no_padding()
    backend.no_truncation()
    _add(library, backend, read)
    specials = _specials(backend, read, family, padding.get("pad_token"))
    _register(library, backend, read, specials)
    _check_ids(backend, folder)
    named = {role: _content(token) for role, token in specials.items()}
    side = read.side("padding_side", padding.get("direction"))
    return Read(backend, named, side, read.side("truncation_side", truncation.get("direction")))


def as_side(name: str, value: str) -> Side:
    """The value of a setting, checked."""
    if value not in ("left", "right"):
        raise ValueError(f"{name}={value!r}, expected 'left' or 'right'")
    return cast(Side, value)


# -- files -------------------------------------------------------------------------------------------------------------

Token = str | Mapping[str, Any]  # as the files have it: its text, or that as "content" with its settings


class _Files(NamedTuple):
    """Contents of the JSON files beside the vocabulary; empty where there is no such file."""

    folder: Path
    settings: dict[str, Any]
    specials: dict[str, Any]
    added: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> "_Files":
        paths = [folder / name for name in (SETTINGS, SPECIALS, ADDED, files.CONFIG)]
        return cls(folder, *(reading.read_json(path) if reading.has(path) else {} for path in paths))

    @property
    def kind(self) -> str | None:
        """The tokenizer's class in transformers, or else the model's type."""
        places = [(SETTINGS, self.settings, "tokenizer_class")]
        places += [(files.CONFIG, self.config, key) for key in ("tokenizer_class", "model_type")]
        for file, content, key in places:
            name = content.get(key)
            if name is not None and not isinstance(name, str):
                raise ValueError(f"'{self.folder / file}' has {key}={shown(name)}, expected a string")
        names: list[str] = [content[key] for _, content, key in places if content.get(key)]
        return names[0].removesuffix("Fast") if names else None

    def flag(self, key: str) -> bool | None:
        """A setting; None where there is none."""
        value = self.settings.get(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"'{self.folder / SETTINGS}' has {key}={shown(value)}, expected true or false")
        return value

    def side(self, key: str, otherwise: str | None) -> Side:
        value = self.settings.get(key)
        side = otherwise or "right" if value is None else shown(value) if not isinstance(value, str) else value
        return as_side(f"'{self.folder / SETTINGS}' has {key}", side.lower())

    def special(self, role: str, default: Token | None = None) -> Token | None:
        """The token of a role; None where a file says that there is none, `default` where none speaks of it."""
        key = f"{role}_token"
        found = [(file, content[key]) for file, content in self._beside if key in content]
        tokens = [None if token is None else _checked(token, self.folder / file, key) for file, token in found]
        return tokens[0] if tokens else default

    @property
    def more(self) -> list[Token]:
        """Special tokens that have no role."""
        key = "additional_special_tokens"
        tokens = []
        for file, content in self._beside:
            listed = content.get(key)
            if listed is not None and not isinstance(listed, list):
                raise ValueError(f"'{self.folder / file}' has {key}={shown(listed)}, expected a list of tokens")
            tokens.append([_checked(token, self.folder / file, key) for token in listed or []])
        return next(filter(None, tokens), [])

    @property
    def _beside(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """The files that name special tokens, the one to believe first.

        Since transformers 4.34 tokenizer_config.json has an added_tokens_decoder and says all; before, it was the map
        that counted where the two disagree, as they do in Stable Diffusion 2.1 about the padding.
        """
        settings, specials = (SETTINGS, self.settings), (SPECIALS, self.specials)
        return (settings, specials) if "added_tokens_decoder" in self.settings else (specials, settings)

    def number(self, role: str) -> int | None:
        """The token of a role by its id in config.json; None where there is none, which -1 says, too."""
        key = f"{role}_token_id"
        number: Any = self.config.get(key)
        number = number[0] if isinstance(number, list) and number else number  # of several ends the first
        if number is not None and number != -1 and (wrong := TOKEN.wrong(key, number)):
            raise ValueError(f"'{self.folder / files.CONFIG}': {wrong}")
        return None if number is None or number == -1 else int(number)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _checked(token: Any, file: Path, key: str) -> Token:
    flags = [token[name] for name in FLAGS if name in token] if isinstance(token, Mapping) else []
    if not isinstance(_content(token), str) or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(f"'{file}' has {key}={shown(token)}, expected a token")
    return cast(Token, token)


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("to read a tokenizer needs the tokenizers library: pip install jlora[models]") from error
    return tokenizers


def _backend(library: ModuleType, read: _Files) -> tuple[Any, "_Family | None"]:
    """The tokenizer as its files have it, and which of the three it is, if it is one."""
    folder = read.folder
    if reading.has(folder / WHOLE):
        return _whole(library, folder / WHOLE), _FAMILIES.get(read.kind or "")
    names = next((names for names in PIECES if reading.has(folder / names[0])), None)
    if names is None:
        raise FileNotFoundError(_no_tokenizer(folder))
    absent = [name for name in names if not reading.has(folder / name)]
    if absent:
        raise FileNotFoundError(f"'{folder}' holds {names[0]} and no {absent[0]}: it takes both, or {WHOLE}")
    if len(names) == 1:
        vocabulary, merges = {word: number for number, word in enumerate(_lines(folder / names[0]))}, []
    else:
        vocabulary, merges = _pieces(folder / names[0]), _merges(folder / names[1])
    family = _family(read, names, vocabulary)
    with _library_errors(f"no tokenizer can be made of {' and '.join(names)} in '{folder}'"):
        return family.build(library, read, vocabulary, merges), family


def _whole(library: ModuleType, file: Path) -> Any:
    """The tokenizer of a tokenizer.json."""
    text = reading.read_text(file, LARGEST, what="JSON")
    try:
        with _library_errors(f"'{file}' is damaged, or the tokenizers library too old"):
            backend = library.Tokenizer.from_str(text)
    except ValueError:
        if len(text) <= reading.LARGEST:
            reading.read_json(file)
        raise
    ids = list(backend.get_vocab(with_added_tokens=False).values())
    if len({*ids}) < len(ids):
        raise ValueError(f"'{file}' is damaged: it gives {len(ids) - len({*ids})} tokens the id of another")
    return backend


@contextmanager
def _library_errors(message: str) -> Iterator[None]:
    """Errors of the tokenizers library, which raises nothing more precise than Exception, or panics."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's, no Exception
            raise
        raise ValueError(f"{message}: {error}") from error


def _check_ids(backend: Any, folder: Path) -> None:
    """Raises a ValueError for ids that no array of tokens holds, and for those around texts that no token has."""
    largest = max(backend.get_vocab().values(), default=0)
    if largest > TOKEN.highest:
        raise ValueError(f"the tokenizer of '{folder}' gives {backend.id_to_token(largest)!r} the id {largest}")
    with _library_errors(f"the tokenizer of '{folder}' cannot be used"):
        around = {*backend.encode("").ids, *backend.encode("", "").ids}
    wrong = sorted(number for number in around if backend.id_to_token(number) is None)
    if wrong:
        raise ValueError(f"the tokenizer of '{folder}' puts the id {wrong[0]} around texts, and no token has it")


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
    text = reading.read_text(file, LARGEST).replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")  # splitlines would split at characters of the vocabulary
    return lines[:-1] if lines[-1] == "" else lines


def _pieces(file: Path) -> dict[str, int]:
    pieces = reading.read_json(file, LARGEST)
    taken: set[int] = set()
    for piece, number in pieces.items():
        if TOKEN.wrong("id", number) or number in taken:
            raise ValueError(
                f"'{file}' is damaged: {piece!r} has the id {shown(number)}, expected a number of its own from 0"
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
    decoder = read.settings.get("added_tokens_decoder")
    decoder = {} if decoder is None else decoder
    if not isinstance(decoder, dict):
        raise ValueError(f"'{read.folder / SETTINGS}' has an added_tokens_decoder that is no object")
    listed = [(number, token, ADDED) for token, number in read.added.items()]
    listed += [(number, token, SETTINGS) for number, token in decoder.items()]
    for number, token, file in listed:
        _checked(token, read.folder / file, f"the id {shown(number)}")
        if not re.fullmatch("[0-9]{1,10}", str(number)) or int(number) > TOKEN.highest:
            raise ValueError(f"'{read.folder / file}' gives the token {shown(token)} the id {shown(number)}")
    special = {_content(token) for token in [*map(read.special, ROLES), *read.more]}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for number, token, file in sorted(listed, key=lambda row: int(row[0])):
        content = _content(token)
        if content not in known:
            marked = content in special or (isinstance(token, Mapping) and bool(token.get("special")))
            with _library_errors(f"'{read.folder / file}' has a token that cannot be added"):
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
        number = read.number(role)
        token = usual.get(role)
        if backend.token_to_id(_content(token) or "") is None:
            token = None if number is None else backend.id_to_token(number)
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
    if read.kind is None and {"<|startoftext|>", "<|endoftext|>", f"a{WORD_END}"} <= vocabulary.keys():
        return _CLIP
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
    if read.flag("add_bos_token"):
        raise ValueError(f"'{read.folder / SETTINGS}' has add_bos_token, which takes a {WHOLE}: {_CONVERT}")
    return possible[read.kind]


def _needed(read: _Files, family: _Family, role: str, vocabulary: Mapping[str, int]) -> tuple[str, int]:
    token = _content(read.special(role) or family.specials[role])
    if token not in vocabulary:
        raise ValueError(f"the {role} token, {token!r}, is not in the vocabulary")
    return token, vocabulary[token]


def _check_merges(vocabulary: Mapping[str, Any], merges: list[tuple[str, ...]], suffix: str = "") -> None:
    """Raises a ValueError where many pieces cannot be reached."""
    made = {"".join(pair) for pair in merges}
    lost = [piece for piece in vocabulary if len(piece.removesuffix(suffix)) > 1 and piece not in made]
    if len(lost) > 0.1 * len(vocabulary):  # a few are special; a file of merges that is cut off is whole to its readers
        raise ValueError(f"{len(lost)} of {len(vocabulary)} pieces, such as {lost[-1]!r}, come of no merge")


def _byte_level(library: ModuleType, read: _Files, vocabulary: dict[str, Any], merges: list[tuple[str, ...]]) -> Any:
    _check_merges(vocabulary, merges)
    backend = library.Tokenizer(library.models.BPE(vocabulary, merges))
    blank = bool(read.flag("add_prefix_space"))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=blank)
    backend.decoder = library.decoders.ByteLevel()
    backend.post_processor = library.processors.ByteLevel(trim_offsets=False)
    return backend


def _roberta(library: ModuleType, read: _Files, vocabulary: dict[str, Any], merges: list[tuple[str, ...]]) -> Any:
    backend = _byte_level(library, read, vocabulary, merges)
    sep, cls = (_needed(read, _ROBERTA, role, vocabulary) for role in ("sep", "cls"))
    backend.post_processor = library.processors.RobertaProcessing(sep, cls)  # <s> A </s>, and <s> A </s></s> B </s>
    return backend


def _clip(library: ModuleType, read: _Files, vocabulary: dict[str, Any], merges: list[tuple[str, ...]]) -> Any:
    """Words in lower case, each closed by `</w>`; blanks are left out. <|startoftext|> A <|endoftext|>."""
    _check_merges(vocabulary, merges, WORD_END)
    eos, bos, unk = (_needed(read, _CLIP, role, vocabulary) for role in ("eos", "bos", "unk"))
    backend = library.Tokenizer(library.models.BPE(vocabulary, merges, unk_token=unk[0], end_of_word_suffix=WORD_END))
    normalizers, pre_tokenizers = library.normalizers, library.pre_tokenizers
    blanks = normalizers.Replace(library.Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    words = pre_tokenizers.Split(library.Regex(CLIP_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.post_processor = library.processors.RobertaProcessing(eos, bos, trim_offsets=False, add_prefix_space=False)
    return backend


def _spell(library: ModuleType, backend: Any) -> None:
    """Has CLIP's texts spelt with a blank where a word ends; tokenizer.json leaves `</w>` there."""
    decoders = library.decoders
    ends, around = decoders.Replace(WORD_END, " "), decoders.Replace(library.Regex(r"\A\s+|\s+\z"), "")
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), ends, around])


def _word_pieces(library: ModuleType, read: _Files, vocabulary: dict[str, Any], merges: list[tuple[str, ...]]) -> Any:
    unk, cls, sep = (_needed(read, _BERT, role, vocabulary) for role in ("unk", "cls", "sep"))
    lower = read.flag("do_lower_case")
    if lower is None:  # transformers says True, and would make every capital of a cased vocabulary unreachable
        lower = all(word == word.lower() for word in vocabulary if not word.startswith("["))
    backend = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token=unk[0]))
    chinese, accents = read.flag("tokenize_chinese_chars") is not False, read.flag("strip_accents")
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
_CLIP = _Family(dict.fromkeys(("eos", "pad", "unk"), "<|endoftext|>") | {"bos": "<|startoftext|>"}, _clip)
_BERT = _Family({role: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}, _word_pieces)
_FAMILIES = {
    "GPT2Tokenizer": _GPT2, "gpt2": _GPT2, "RobertaTokenizer": _ROBERTA, "roberta": _ROBERTA, "BertTokenizer": _BERT,
    "bert": _BERT, "DistilBertTokenizer": _BERT, "distilbert": _BERT, "ElectraTokenizer": _BERT, "electra": _BERT,
    "CLIPTokenizer": _CLIP, "clip": _CLIP, "clip_text_model": _CLIP,
}  # fmt: skip
