"""The files of llama2.c: its first checkpoint format, and its tokenizer's.

Source: https://github.com/karpathy/llama2.c, `legacy_export` in export.py, tokenizer.py, and run.c, which reads both.
"""

import math
import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models import place, reading
from jlora.models.llama.modeling import Llama, LlamaConfig

HEADER = struct.Struct("<7i")
NEWER = 0x616B3432  # "ak42": what the formats from version 1 on begin with
UNKNOWN, BOS, EOS = 0, 1, 2
LARGEST = 2**24  # bytes of a tokenizer
BYTES = 3  # the token of byte 0; the other bytes follow


def load(path: str | os.PathLike[str]) -> tuple[Llama, Any]:
    """A model and its parameters from a version 0 checkpoint.

    The file has seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, which is negative where the
    head is not the embedding, and seq_len), then float32 tensors, each of all layers, with kernels as (out, in).
    There the features 2i and 2i + 1 of a head are turned together, here i and i + width / 2: the columns of queries and
    keys move accordingly, and their scores stay.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file of another size than its header says, of a newer version, or that is no regular one.
    """
    file = _regular(path)
    size = file.stat().st_size
    if size < HEADER.size:
        raise ValueError(f"'{path}' has {size} bytes, fewer than a llama2.c checkpoint's header")
    with file.open("rb") as opened:
        header = HEADER.unpack(opened.read(HEADER.size))
    width, hidden, layers, heads, key_heads, vocab, context = header
    if width == NEWER:
        raise ValueError(f"'{path}' is of llama2.c's format version {hidden}; version 0 is read")
    try:
        config = LlamaConfig(
            vocab_size=abs(vocab), context=context, width=width, layers=layers, heads=heads, key_heads=key_heads,
            hidden=hidden, epsilon=1e-5, tied=vocab > 0,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"'{path}' is no llama2.c checkpoint: it begins with {header}: {error}") from error
    head_width = width // heads
    shapes = {
        "wte": (abs(vocab), width),
        "ln_1": (layers, width),
        "query": (layers, width, width),
        "key": (layers, key_heads * head_width, width),
        "value": (layers, key_heads * head_width, width),
        "out": (layers, width, width),
        "ln_2": (layers, width),
        "gate": (layers, hidden, width),
        "down": (layers, width, hidden),
        "up": (layers, hidden, width),
        "ln_f": (width,),
        "angles": (2, context, head_width // 2),  # cosines and sines: computed here
        **({} if vocab > 0 else {"head": (abs(vocab), width)}),
    }
    sizes = [math.prod(shape) for shape in shapes.values()]
    expected = HEADER.size + 4 * sum(sizes)
    if size != expected:
        raise ValueError(f"'{path}' has {size} bytes, its header says {expected}: it is cut off, or no checkpoint")
    content = reading.read(file, expected)
    values = np.split(np.frombuffer(content, "<f4", offset=HEADER.size), np.cumsum(sizes)[:-1])
    read = {name: value.reshape(shapes[name]) for name, value in zip(shapes, values, strict=True)}
    read["query"], read["key"] = _halved(read["query"], head_width), _halved(read["key"], head_width)
    tree = {f"h_{i}": _block(read, i) for i in range(layers)}
    tree |= {"wte": {"embedding": read["wte"]}, "ln_f": {"scale": read["ln_f"]}}
    tree |= {} if config.tied else {"head": {"kernel": read["head"].T}}
    return Llama(config), jax.tree.map(jnp.asarray, tree)


def _regular(path: str | os.PathLike[str]) -> Path:
    """Where the file lies that a caller names: links are the caller's own."""
    file = place.folder_of(path)
    try:
        return reading.regular(file.resolve(strict=True))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no file '{path}'") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, before Python 3.13
        raise ValueError(f"'{path}' cannot be read: {error}") from error


def _halved(kernels: np.ndarray, width: int) -> np.ndarray:
    """Rows 0, 2, 4, ... of each head's `width` before rows 1, 3, 5, ...: (layers, heads * width, in)."""
    layers, _, features = kernels.shape
    pairs = kernels.reshape(layers, -1, width // 2, 2, features)  # (layers, heads, pair, in it, in)
    return pairs.swapaxes(2, 3).reshape(kernels.shape)


def _block(read: dict[str, np.ndarray], i: int) -> dict[str, Any]:
    kernels = lambda *names: {name: {"kernel": read[name][i].T} for name in names}
    norms = {name: {"scale": read[name][i]} for name in ("ln_1", "ln_2")}
    return norms | {"attn": kernels("query", "key", "value", "out"), "mlp": kernels("gate", "up", "down")}


class Tokenizer(NamedTuple):
    """Pieces of text and how much each is worth: SentencePiece's BPE as run.c does it, with bytes for what is unknown.

    Attributes:
      pieces: of each token, in UTF-8.
      scores: of each token: of two neighbours, those are merged first whose union has the highest.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, after that of the beginning."""
        number = {piece: token for token, piece in reversed(list(enumerate(self.pieces)))}
        tokens = [BOS]
        for character in " " + text if text else "":
            whole = number.get(character.encode())
            tokens += [BYTES + byte for byte in character.encode()] if whole is None else [whole]
        while True:
            unions = enumerate(number.get(self.pieces[a] + self.pieces[b]) for a, b in pairwise(tokens))
            found = [(self.scores[token], -i, token) for i, token in unions if token is not None]
            if not found:
                return tokens
            _, i, best = max(found)  # the first of the best
            tokens[-i : 2 - i] = [best]

    def decode(self, tokens: list[int]) -> str:
        """Their text; beginnings and ends have none, and neither has the space after a beginning."""
        text = b""
        for before, token in pairwise([UNKNOWN, *tokens]):
            if token in (BOS, EOS):
                continue
            piece = bytes([token - BYTES]) if BYTES <= token < BYTES + 256 else self.pieces[token]
            text += piece.removeprefix(b" ") if before == BOS else piece
        return text.decode(errors="replace")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Tokenizer from a tokenizer.bin.

    The file holds the longest piece's length (int32), then each token's score (float32), length and bytes.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file that ends within a token, a score that is no finite number, or no regular file.
    """
    content = reading.read(_regular(path), LARGEST)
    pieces: list[bytes] = []
    scores: list[float] = []
    at = 4
    try:
        while at < len(content):
            score, length = struct.unpack_from("<fi", content, at)
            (piece,) = struct.unpack_from(f"<{length}s", content, at + 8)
            if not math.isfinite(score):
                raise ValueError(f"'{path}' gives token {len(pieces)} the score {score}")
            pieces.append(piece)
            scores.append(score)
            at += 8 + length
    except struct.error as error:
        raise ValueError(f"'{path}' ends within token {len(pieces)}: it is cut off, or no tokenizer.bin") from error
    return Tokenizer(tuple(pieces), tuple(scores))
