"""A checkpoint's safetensors files, a tensor at a time: read without mapping them, written as the tensors come.

Neither the safetensors library's reader, which maps the file, nor its writer, which wants all tensors at once, keeps
the memory to one tensor. Only headers are held here; the bytes of a tensor that stays are copied as they are, of any
dtype.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.interop import headers
from jlora.models import reading

FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}  # fmt: skip
BITS: dict[str, int] = {**headers.BITS} | {  # of what is copied as it is, too
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
LARGEST_HEADER = 2**27  # bytes; the safetensors library has a limit of 100 MB
LARGEST_INDEX = 2**26
CHUNK = 2**20  # bytes that are copied at a time
ALIGNED = 8  # bytes: the data begin at a multiple
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
INDEX = ".safetensors.index.json"


class Entry(NamedTuple):
    """A tensor in a file: its dtype in safetensors' names, its shape, and its bytes, from the file's beginning."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Shard(NamedTuple):
    """A safetensors file: its tensors in the order of their bytes, and the metadata of its header."""

    file: Path
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.entries)


class Checkpoint(NamedTuple):
    """The tensors of a folder.

    Attributes:
      folder: that holds them.
      shards: its files.
      index_file: the index, or None of a single file.
    """

    folder: Path
    shards: tuple[Shard, ...]
    index_file: Path | None = None

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors by key."""
        return {entry.key: entry for shard in self.shards for entry in shard.entries}


def open_checkpoint(folder: Path) -> Checkpoint:
    """The headers of a folder's safetensors files: of the one that is there, or of those that the one index names.

    Raises:
      FileNotFoundError: if there is no such folder, no such file in it, or one that the index names is missing.
      ValueError: for several files without an index, or several indices; a damaged file; a tensor that two files have,
        or that is not in the file where the index places it.
    """
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"'{folder}' is a file: name the folder of the checkpoint")
        raise FileNotFoundError(f"there is no folder '{folder}'")
    indices = sorted(folder.glob(f"*{INDEX}"))
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(indices) > 1:
        raise ValueError(f"'{folder}' holds {len(indices)} indices ({_some(p.name for p in indices)}): leave one there")
    if indices:
        return _indexed(folder, indices[0])
    if not names:
        pickles = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        hint = f"; {pickles[0]} is a pickle: load it with transformers, and save it again" if pickles else ""
        raise FileNotFoundError(f"'{folder}' is no checkpoint: there is no *.safetensors in it{hint}")
    if "adapter_config.json" in {path.name for path in folder.glob("*.json")}:
        raise ValueError(f"'{folder}' is an adapter of PEFT, expected the folder of a whole checkpoint")
    usual = [name for name in names if name in SINGLE]
    if len(names) > 1 and len(usual) == 1:
        names = usual
    if len(names) > 1:
        raise ValueError(f"'{folder}' holds {len(names)} files of tensors ({_some(names)}) and no *{INDEX}")
    return Checkpoint(folder, (open_shard(folder / names[0]),))


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def _indexed(folder: Path, index: Path) -> Checkpoint:
    places = reading.read_json(index, LARGEST_INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"'{index}' has no 'weight_map'")
    for key, name in places.items():
        if not isinstance(name, str) or "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"'{index}' places {key!r} in {name!r:.80}, expected a safetensors file beside it")
    names = sorted(set(places.values()))
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise FileNotFoundError(f"'{index}' names files that are missing: {_some(absent)}. Download them again")
    shards = tuple(open_shard(folder / name) for name in names)
    found: dict[str, str] = {}
    for shard in shards:
        for entry in shard.entries:
            if entry.key in found:
                raise ValueError(f"'{folder}' holds {entry.key!r} twice, in {found[entry.key]} and {shard.file.name}")
            found[entry.key] = shard.file.name
    wrong = [key for key, name in places.items() if found.get(key) != name]
    if wrong:
        raise ValueError(f"'{index}' places {wrong[0]!r} in {places[wrong[0]]}, and it is not there")
    return Checkpoint(folder, shards, index)


def open_shard(file: Path) -> Shard:
    """The header of a safetensors file, checked: its tensors lie one after the other and end with the file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a damaged file, or one that leads out of its folder.
    """
    with reading.regular(file).open("rb") as opened:
        spans, metadata = headers.spans(opened, file, BITS, LARGEST_HEADER)
    entries = [
        Entry(key, span.header.dtype, span.header.shape, span.start, span.stop - span.start)
        for key, span in spans.items()
    ]
    return Shard(file, tuple(sorted(entries, key=lambda entry: (entry.start, entry.size))), metadata)


def read(opened: BufferedReader, entry: Entry, start: int = 0, stop: int | None = None) -> np.ndarray:
    """A tensor of floats from its open file, or its rows from start to stop.

    Raises:
      ValueError: for a tensor of other numbers, and if the file ends before it does.
    """
    shape = entry.shape if stop is None else (stop - start, *entry.shape[1:])
    if entry.dtype not in FLOATS:
        raise ValueError(f"'{opened.name}' has {entry.key!r} as {entry.dtype}: expected {', '.join(FLOATS)}")
    dtype = FLOATS[entry.dtype]
    out = np.empty(shape, dtype)
    opened.seek(entry.start + start * math.prod(entry.shape[1:]) * dtype.itemsize)
    if out.size and opened.readinto(out.reshape(-1).view(np.uint8).data) != out.nbytes:
        raise ValueError(f"'{opened.name}' ends within {entry.key!r}")
    return out


def chunks(opened: BinaryIO, entry: Entry, size: int = CHUNK) -> Iterator[bytes]:
    """The bytes of a tensor, some at a time."""
    opened.seek(entry.start)
    left = entry.size
    while left:
        content = opened.read(min(size, left))
        if not content:
            raise ValueError(f"'{opened.name}' ends within {entry.key!r}")
        left -= len(content)
        yield content


def header(entries: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data of a file that holds these tensors (key, dtype, shape) one after the other."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for key, dtype, shape in entries:
        size = math.prod(shape) * BITS[dtype] // 8
        content[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


class Written(NamedTuple):
    """A file that was written: its bytes and their SHA-256."""

    size: int
    sha256: str


@contextmanager
def writing(file: Path) -> Iterator[Callable[[Any], None]]:
    """A function that appends bytes to a new file; on an error the file is deleted, at the end it is on the disk."""
    try:
        with file.open("wb") as out:
            yield lambda content: _write(out, content)
            out.flush()
            os.fsync(out.fileno())
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _write(out: BinaryIO, content: Any) -> None:
    out.write(content)


def digest(file: Path) -> Written:
    """The size and the hash of a file, read some bytes at a time."""
    with file.open("rb") as opened:
        hashed = hashlib.file_digest(opened, "sha256")
    return Written(file.stat().st_size, hashed.hexdigest())
