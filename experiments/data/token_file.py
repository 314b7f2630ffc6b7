"""Texts larger than memory: their tokens are written to a file once, and windows of it are read as they are needed."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from experiments.data.files import DataError, existing

_PIECE = 1 << 16  # bytes of a text that are held at once, about


def read_pieces(path: str | Path, pattern: str = "*.txt") -> Iterator[tuple[str, bool]]:
    """A text file, or the files below a folder in order of their names, piece by piece: (piece, is it the last one?).

    A piece is 64 kilobytes or a little more, whole lines. A tokenizer that joins line breaks sees each piece alone.

    Args:
      path: of the file or the folder.
      pattern: which files of a folder.

    Raises:
      DataError: if the path is missing, there are no such files, one of them is blank, or for a line that is not UTF-8.
    """
    path = existing(path, "file or folder")
    files = sorted(file for file in path.rglob(pattern) if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise DataError(f"'{path}' has no files {pattern}")
    for file in files:
        yield from _pieces(file)


def _pieces(path: Path) -> Iterator[tuple[str, bool]]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            piece, blank = "", True
            while lines := file.readlines(_PIECE):
                if piece:
                    yield piece, False
                piece = "".join(lines)
                blank = blank and not piece.strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start} of a block)") from error
    if blank:
        raise DataError(f"{path}: empty text: remove the file or fill it")
    yield piece, True


def write_tokens(
    path: str | Path,
    pieces: Iterable[tuple[str, bool]],
    encode: Callable[[str], Sequence[int]],
    *,
    vocabulary: int,
    end: int | None = None,
) -> np.ndarray:
    """Writes the tokens of texts to a `.npy` file and maps it: (count,) uint16, or uint32 for a large vocabulary.

    Memory holds a piece and its tokens. The file takes its name when it is complete: an interrupted call leaves none.

    Args:
      path: of the `.npy`.
      pieces: (text, is it the last piece of its document?), as from `read_pieces`.
      encode: text to tokens.
      vocabulary: number of tokens that the model knows.
      end: token behind each document.

    Raises:
      DataError: for a token outside the vocabulary.
    """
    path = Path(path)
    kind = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    count = 0
    try:
        with unfinished.open("wb") as file:
            begin = _header(file, kind, 0)
            for text, last in pieces:
                for tokens in (encode(text), [end] if last and end is not None else []):
                    file.write(_checked(np.asarray(tokens, np.int64), vocabulary).astype(kind).tobytes())
                    count += len(tokens)
            file.seek(0)
            if _header(file, kind, count) != begin:  # NumPy leaves room in the header for the length to grow
                raise AssertionError(f"the header of {path} has grown")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return read_tokens(path)


def read_tokens(path: str | Path) -> np.ndarray:
    """The tokens that `write_tokens` wrote, mapped: nothing is read before it is asked for.

    Raises:
      DataError: if the file is missing, cut short or holds something else.
    """
    try:
        tokens = np.load(existing(path), mmap_mode="r")
    except ValueError as error:
        raise DataError(f"{path}: not a file of tokens, or cut short ({error}): write it again") from error
    if tokens.ndim != 1 or tokens.dtype.kind != "u":
        raise DataError(f"{path}: {tokens.dtype} of shape {tokens.shape}, expected one row of unsigned tokens")
    return tokens


def _checked(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if len(wrong):
        raise DataError(f"token {wrong[0]} is outside the vocabulary of {vocabulary}: another tokenizer's?")
    return tokens


def _header(file: BinaryIO, kind: np.dtype, count: int) -> int:
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (count,)}
    )
    return file.tell()


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of a row of tokens, by number, each token but the first being a target once.

    A window begins with the last token of the one before it, whose target it was: `loss_mask` is False there.

    Attributes:
      tokens: (count,) of integers, in memory or mapped.
      length: tokens of a window.
    """

    tokens: np.ndarray | Sequence[int]
    length: int

    def __post_init__(self) -> None:
        if self.length < 2 or len(self) < 1:
            raise DataError(f"{len(self.tokens)} tokens are too few for windows of {self.length}, or a window has one")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // (self.length - 1)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * (self.length - 1)
        counted = np.ones(self.length, np.bool_)
        counted[0] = False
        return {
            "tokens": np.asarray(self.tokens[start : start + self.length], np.int32),  # (length,)
            "mask": np.ones(self.length, np.bool_),
            "loss_mask": counted,
        }
