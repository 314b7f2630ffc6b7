"""Tensors out of a file of `torch.save`, without torch, and without doing what a pickle says.

Such a file is a zip: a pickle, and beside it each storage as raw numbers. The pickle alone says what is in it.
"""

import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from jlora.interop import unpickle, zipped
from jlora.interop.headers import check_name, elements, opened, read_bytes, shown

ZIP = b"PK\3\4"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch before 1.6 begin
ROOM = 2**26  # bytes that tensors which share their storage may take beyond the file's size
READS = 8  # times the file's size that they may lie apart in it


class Tensor(NamedTuple):
    """Where a tensor lies: elements of a storage, `strides` counted in them."""

    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: zipped.Entry

    @property
    def extent(self) -> int:
        """Elements from its first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


def is_pickle(start: bytes) -> bool:
    """Whether a file that begins so is one of `torch.save`, or another pickle, and no safetensors file."""
    return start.startswith(ZIP) or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and start[8:9] != b"{")


def read(file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a state dict, by name.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for what is no such file, is damaged, holds something else than a dict of tensors, or names a
        function.
    """
    path = Path(file)
    with opened(path) as source:
        return {name: read_tensor(source, path, name, tensor) for name, tensor in tensors(source, path).items()}


def tensors(source: BinaryIO, file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name. None of them is read. Raises what `read` does."""
    size = os.fstat(source.fileno()).st_size
    try:
        source.seek(0)
        if source.read(len(LEGACY)) == LEGACY:
            raise ValueError("it is a pickle of torch before 1.6; torch.load it, and torch.save it again")
        entries = zipped.entries(source, size)
        content, folder = _pickle(source, file, entries)
        described = unpickle.load(content)
        if type(described) is not dict or not all(isinstance(view, unpickle.View) for view in described.values()):
            raise _Other
        found = {name: _tensor(name, view, entries, folder) for name, view in described.items()}
        _check_sharing(found, size)
    except _Other:
        raise ValueError(f"'{file}' holds something else than a dict of tensors") from None
    except ValueError as error:
        raise ValueError(f"'{file}' is no file of tensors by torch.save, or is damaged: {error}") from error
    return found


class _Other(ValueError):
    """A pickle of something else."""


def _pickle(source: BinaryIO, file: Path, entries: Mapping[str, zipped.Entry]) -> tuple[bytes, str]:
    """The pickle, and the folder that the storages are in."""
    names = [name for name in entries if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise ValueError(f"it has {len(names)} entries data.pkl, expected one")
    folder = names[0].removesuffix("data.pkl")
    order = entries.get(f"{folder}byteorder")
    if order and order.size <= 16 and read_bytes(source, file, order.start, order.size).tobytes() != b"little":
        raise ValueError("its numbers are in big-endian order; torch.load it on a machine of today, and save it again")
    entry = entries[names[0]]
    if entry.size > unpickle.LARGEST:
        raise ValueError(f"its pickle has {entry.size} bytes, more than the {unpickle.LARGEST} that are read")
    content = read_bytes(source, file, entry.start, entry.size).tobytes()
    if zlib.crc32(content) != entry.crc:
        raise ValueError("its pickle is not the one that was written (CRC-32)")
    return content, folder


def _tensor(name: str, view: unpickle.View, entries: Mapping[str, zipped.Entry], folder: str) -> Tensor:
    storage, offset, shape, strides = view
    check_name(name)
    if min((offset, *shape, *strides)) < 0 or len(shape) != len(strides):
        raise ValueError(
            f"gives {shown(name)} offset {offset}, shape {shown(shape)}, strides {shown(strides)}, which no tensor has"
        )
    count = elements(name, shape)
    entry = entries.get(f"{folder}data/{storage.key}")
    if entry is None:
        raise ValueError(f"keeps {shown(name)} in the storage {shown(storage.key)}, which is not there")
    if entry.size != storage.length * storage.dtype.itemsize:
        raise ValueError(f"has a storage of {storage.length} {storage.dtype} in {entry.size} bytes, for {shown(name)}")
    tensor = Tensor(storage.dtype, shape, strides, offset, entry)
    if count and (offset + tensor.extent > storage.length or count > storage.length):
        last = offset + tensor.extent - 1
        raise ValueError(f"has {count} elements of {shown(name)}, to element {last}, in a storage of {storage.length}")
    return tensor


def _check_sharing(found: Mapping[str, Tensor], size: int) -> None:
    """Tensors may share a storage, but not so that a small file takes much memory, or is read again and again."""
    taken = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in found.values())
    apart = sum(tensor.extent * tensor.dtype.itemsize for tensor in found.values())
    if taken > size + ROOM or apart > READS * size + ROOM:
        raise ValueError(
            f"its tensors take {taken} bytes, out of {apart}, in a file of {size}: they share their storages"
        )


def read_tensor(source: BinaryIO, file: Path, name: str, tensor: Tensor) -> np.ndarray:
    """A tensor, in memory of its own."""
    itemsize = tensor.dtype.itemsize
    start = tensor.storage.start + tensor.offset * itemsize
    content = read_bytes(source, file, start, tensor.extent * itemsize)
    if content.size == tensor.storage.size and zlib.crc32(content.data) != tensor.storage.crc:
        raise ValueError(f"'{file}' is damaged: the numbers of {shown(name)} are not those that were written (CRC-32)")
    if tensor.dtype == np.bool_ and content.size and content.max() > 1:
        raise ValueError(f"'{file}' has bytes in {shown(name)}, a BOOL, that are neither 0 nor 1")
    flat = content.view(tensor.dtype)
    if 0 in tensor.shape:
        return flat.reshape(tensor.shape)
    strides = [itemsize * stride if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.strides, strict=True)]
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)
    if view.flags.c_contiguous and view.size == flat.size:
        return flat.reshape(tensor.shape)
    return view.copy()
