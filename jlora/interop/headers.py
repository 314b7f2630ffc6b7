"""Names, dtypes and shapes that a stranger's file of tensors may claim, and reads of as many bytes as it has."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.checkpoint.folder import open_file
from jlora.models import reading

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16), "F8_E4M3": np.dtype(jnp.float8_e4m3fn), "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32), "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}  # fmt: skip
NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
AXES, MOST_ELEMENTS = 32, 2**48
MOST_EMPTY = 2**24  # along the other axes of a tensor without elements: it costs its file nothing, and readers much
LONGEST_NAME = 1024


class Header(NamedTuple):
    """A tensor as its file describes it; `dtype` in safetensors' names, "F32", "BF16"."""

    shape: tuple[int, ...]
    dtype: str


def check_name(name: object) -> None:
    """Raises a ValueError for a tensor's name that is empty, long, or could be taken for a path out of somewhere."""
    if not isinstance(name, str):
        raise ValueError(f"names a tensor {shown(name)}, expected a text")
    if not 0 < len(name) <= LONGEST_NAME:
        raise ValueError(f"names a tensor with {len(name)} characters, expected 1 to {LONGEST_NAME}: {shown(name)}")
    if not name.isprintable():
        raise ValueError(f"names a tensor with characters that cannot be printed, {shown(name)}")
    parts = re.split(r"[/\\]", name)
    if ".." in parts or (len(parts) > 1 and (not parts[0] or parts[0].endswith(":"))):
        raise ValueError(f"names a tensor {shown(name)}, a path that leads elsewhere")


def elements(name: str, shape: Sequence[int]) -> int:
    """The number of elements of a shape. Raises a ValueError for one that no tensor has."""
    if not all(type(n) is int for n in shape):
        raise ValueError(f"gives {shown(name)} the shape {shown(shape)}, expected whole numbers")
    if len(shape) > AXES:
        raise ValueError(f"gives {shown(name)} {len(shape)} axes, more than {AXES}")
    most = MOST_EMPTY if 0 in shape else MOST_ELEMENTS
    if not all(0 <= n <= most for n in shape) or math.prod(max(n, 1) for n in shape) > most:
        raise ValueError(f"gives {shown(name)} the shape {shown(tuple(shape))}, which no tensor has")
    return math.prod(shape)


def opened(file: Path) -> BinaryIO:
    """A regular file that lies in its folder, or in the hub's blobs, open for reading.

    Raises:
      FileNotFoundError: if there is none, or a link to nothing.
      ValueError: for a folder, a pipe, a device, or a link that leads out of the folder.
    """
    reading.regular(file)  # says what is wrong
    return open_file(file)  # and waits for nothing, whatever has taken its place by now


def read_bytes(opened: BinaryIO, file: Path, start: int, count: int) -> np.ndarray:
    """Bytes of a file, as writable memory.

    Raises:
      ValueError: if the file has fewer, before memory is taken for them.
    """
    cut = f"'{file}' has fewer bytes than its header says: it was cut short"
    if start + count > os.fstat(opened.fileno()).st_size:
        raise ValueError(cut)
    content = np.empty(count, np.uint8)
    opened.seek(start)
    done = 0
    while done < count:
        got = opened.readinto(content[done:].data)  # type: ignore[attr-defined]  # BinaryIO's files have it
        if not got:
            raise ValueError(cut)
        done += got
    return content


def shown(value: object) -> str:
    """A value of a file in an error: its beginning, or the type of what is large."""
    large = isinstance(value, dict | list | tuple) and len(value) > AXES
    text = f"a {type(value).__name__} of {len(value)}" if large else repr(value)  # type: ignore[arg-type]
    return text if len(text) <= 120 else f"{text[:116]} ..."
