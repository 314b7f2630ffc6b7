"""Names, dtypes and shapes that a stranger's file of tensors may claim, and reads of as many bytes as it has."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
BITS: Mapping[str, int] = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
AXES, MOST_ELEMENTS = 32, 2**48
MOST_EMPTY = 2**24  # along the other axes of a tensor without elements: it costs its file nothing, and readers much
LONGEST_NAME = 1024
LARGEST_HEADER = 2**24  # bytes; the names of 100 thousand tensors take fewer
LARGEST_UNICODE = 2**22  # bytes of a header that is not ASCII: Python may take four for each of them, and again
MOST_TENSORS = 90_000
MOST_PARTS = {",": 10**6, ":": 420_000, "[": 250_000, "{": 150_000}  # of a header, in its texts too: 4 ":" a tensor
_WIDE = re.compile(rb"\\u[dD][89abAB]")  # the escape of a character beyond 16 bits


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


# -- safetensors -------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """A tensor, and the bytes of the file that are its."""

    header: Header
    start: int  # byte of the file
    stop: int


def spans(
    opened: BinaryIO, file: Path, bits: Mapping[str, int], largest: int = LARGEST_HEADER
) -> tuple[dict[str, Span], dict[str, str]]:
    """Where the tensors of a safetensors file lie, and its metadata. All bytes behind the header are one tensor's each.

    Args:
      opened, file: the file and its name.
      bits: of an element, by the dtypes that are known.
      largest: bytes of a header that is read.

    Raises:
      ValueError: for a file that is damaged, or says what no file of tensors does.
    """
    size = os.fstat(opened.fileno()).st_size
    text, start = _header(opened, file, size, largest)
    try:
        entries = reading.parsed(text)
        metadata = _metadata(entries.pop("__metadata__", {}))
        if len(entries) > MOST_TENSORS:
            raise ValueError(f"names {len(entries)} tensors, more than the {MOST_TENSORS} that are read")
        found = {}
        for name in list(entries):
            check_name(name)
            found[name] = _span(name, entries.pop(name), start, size - start, bits)
        _check_whole(found, start, size)
    except ValueError as error:
        raise ValueError(f"'{file}' is damaged or no safetensors file: its header {error}") from error
    return found, metadata


def _header(opened: BinaryIO, file: Path, size: int, largest: int) -> tuple[str, int]:
    wrong = f"'{file}' is damaged or no safetensors file: "
    opened.seek(0)
    length = int.from_bytes(opened.read(8), "little")
    if size < 10 or not 2 <= length <= size - 8:
        claimed = f"a header of {length} bytes in a file of {size}" if size >= 8 else f"it has {size} bytes"
        raise ValueError(f"{wrong}{claimed}")
    if length > largest:
        raise ValueError(f"{wrong}a header of {length} bytes, more than the {largest} that are read")
    content = opened.read(length)
    if len(content) < length:
        raise ValueError(f"{wrong}it was cut short while it was read")
    if not content.startswith(b"{"):
        raise ValueError(f"{wrong}its header begins with {content[:8]!r}, expected an object of JSON")
    if len(content) > LARGEST_UNICODE and (not content.isascii() or _WIDE.search(content)):
        raise ValueError(f"{wrong}a header of {length} bytes that are not ASCII; at most {LARGEST_UNICODE} are read")
    for part, most in MOST_PARTS.items():
        if content.count(part.encode()) > most:
            raise ValueError(f"{wrong}its header has more than {most} times {part!r}")
    try:
        return content.decode("utf-8"), 8 + length
    except UnicodeDecodeError as error:
        raise ValueError(f"{wrong}its header is no text: {error}") from error


def _metadata(content: Any) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise ValueError("has a '__metadata__' that is no object of texts")
    return content


def _span(name: str, entry: Any, start: int, data: int, bits: Mapping[str, int]) -> Span:
    """An entry of the header, of a file with `data` bytes of tensors from `start` on."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"describes {shown(name)} by {shown(entry)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in bits:
        raise ValueError(f"gives {shown(name)} the dtype {shown(dtype)}, expected one of {', '.join(bits)}")
    if not isinstance(shape, list):
        raise ValueError(f"gives {shown(name)} the shape {shown(shape)}, expected a list of whole numbers")
    size, odd = divmod(elements(name, shape) * bits[dtype], 8)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise ValueError(f"gives {shown(name)} the data_offsets {shown(offsets)}, expected two whole numbers")
    first, last = offsets
    if not 0 <= first <= last <= data:
        raise ValueError(f"places {shown(name)} in bytes {first} to {last} of {data}")
    if odd or last - first != size:
        raise ValueError(f"gives {shown(name)}, {dtype} of shape {shape}, {last - first} bytes, expected {size}")
    return Span(Header(tuple(shape), dtype), start + first, start + last)


def _check_whole(spans: Mapping[str, Span], start: int, stop: int) -> None:
    place = start
    for name, span in sorted(spans.items(), key=lambda item: item[1][1:]):
        if span.start != place:
            how = "overlaps another tensor" if span.start < place else "leaves bytes before it to no tensor"
            raise ValueError(f"places {shown(name)} in bytes {span.start - start} to {span.stop - start}, which {how}")
        place = span.stop
    if place != stop:
        raise ValueError(f"leaves the last {stop - place} bytes to no tensor")
