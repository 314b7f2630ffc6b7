"""The files of a checkpoint: a folder or a hub's snapshot, its config, and the tensors in its safetensors files."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.models import place, reading
from jlora.models.fields import shown
from jlora.models.tensors import Shape

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}  # of the files, by whose they are
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
LARGEST_HEADER, LARGEST_INDEX = 2**25, 2**25  # bytes
AXES = 32  # that a tensor may have
CHUNK = 2**20  # elements of a tensor that are read at a time
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "vocab.bpe")  # config and tokenizer
WANTED = (*SMALL, "model*.safetensors")  # no pickles, no other copies of the tensors


class Tensor(NamedTuple):
    """Where a tensor lies, and what it is: dtype in safetensors' names, "F32", "BF16".

    `packed` is a `bnb.Packed` if several tensors hold it in 4 bits: then shape and dtype are those of the weight.
    `stored` is the shape in the file where that is another: with more axes of length 1 at the end, or fewer.
    """

    file: Path
    key: str
    shape: Shape
    dtype: str
    packed: Any = None
    stored: Shape | None = None


def folder_of(
    name: str | os.PathLike[str],
    revision: str | None = None,
    wanted: tuple[str, ...] = WANTED,
    *,
    config: str = CONFIG,
    what: str = "checkpoint",
    below: bool = False,
) -> Path:
    """A checkpoint's folder: the one that is named, or the hub's snapshot, of which the `wanted` files are downloaded.

    Args:
      name, revision: of the folder, or of the hub's repository.
      wanted: patterns of files.
      config: the file without which a folder is none.
      what: the folder holds, for errors.
      below: of a repository, files of its folders are wanted, too.

    Raises:
      FileNotFoundError: if the name is no folder and no repository that can be had, or a folder without the config.
      ValueError: if the folder's config is no regular file, or a link that leads elsewhere; for an address that is
        no local folder (see `place.folder_of`).
      ImportError: if a download needs huggingface_hub and it is absent.
    """
    folder = place.folder_of(name)
    if folder.is_dir():
        if not reading.has(folder / config):
            near = sorted(path.parent.name for path in folder.glob(f"*/{config}"))
            hint = f"; its folders {', '.join(map(repr, near[:5]))} hold one" if near else ""
            raise FileNotFoundError(f"'{folder}' is no {what}: there is no {config} in it{hint}")
        return folder
    if folder.is_absolute() or len(folder.parts) > 2 or str(name).startswith("."):
        raise FileNotFoundError(f"'{folder}' is no {what}: there is no such folder")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"'{name}' is no folder here, and to fetch it from the hub needs huggingface_hub: pip install jlora[models]"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(name),
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=[] if below else ["*/*"],
            )
        )
    except Exception as error:  # its own, its HTTP library's and the system's
        raise FileNotFoundError(
            f"'{name}' is no folder here, and the hub did not deliver it: {type(error).__name__}: {error}"
        ) from error


def names_of(library: str, variant: str | None = None) -> tuple[str, str]:
    """Names of a checkpoint's one file, and of the index of several.

    >>> names_of("diffusers", "fp16")
    ('diffusion_pytorch_model.fp16.safetensors', 'diffusion_pytorch_model.safetensors.index.fp16.json')
    """
    stem, more = STEMS[library], "" if variant is None else f".{variant}"
    return f"{stem}{more}.safetensors", f"{stem}.safetensors.index{more}.json"


def tensors(folder: Path, library: str = "transformers", variant: str | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by key, from one file or from those that an index names. Reads the headers alone.

    Args:
      folder: of the checkpoint.
      library: whose checkpoint it is: a key of `STEMS`.
      variant: of the files, "fp16"; those without a variant when None.

    Raises:
      FileNotFoundError: if there are none, or one that the index names is missing.
      ValueError: for a damaged file, a file that is not read (see `reading.regular`), or an index that says otherwise
        than its files.
    """
    if variant is not None and not re.fullmatch("[A-Za-z0-9_-]+", variant):
        raise ValueError(f"variant={shown(variant)} is no word that files are named by, such as 'fp16'")
    single, several = names_of(library, variant)
    if reading.has(folder / single):
        return headers(folder / single)
    if not reading.has(folder / several):
        raise FileNotFoundError(
            f"'{folder}' holds neither {single} nor {several}; {_instead(folder, library, variant)}"
        )
    index = _index(folder / several)
    found: dict[str, Tensor] = {}
    for name in sorted(set(index.values())):
        for key, tensor in headers(folder / name).items():
            if key in found:
                raise ValueError(f"'{folder}' holds {key!r} twice, in {found[key].file.name!r} and in {name!r}")
            found[key] = tensor
    wrong = [key for key, name in index.items() if key not in found or found[key].file.name != name]
    if wrong:
        raise ValueError(f"'{folder / several}' places {wrong[0]!r} in '{index[wrong[0]]}', and it is not there")
    return found


def _instead(folder: Path, library: str, variant: str | None) -> str:
    """Advice where a checkpoint's files are not there."""
    if variant is not None and any(reading.has(folder / name) for name in names_of(library)):
        return f"there are files without a variant: leave out variant={variant!r}"
    names = (path.name.split(".")[1] for path in folder.glob(f"{STEMS[library]}.*.safetensors"))
    variants = sorted({re.sub(r"-\d+-of-\d+$", "", name) for name in names})
    if variants:
        return f"there are others: pass variant={variants[0]!r}"
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"{pickles[0]} is a pickle" if pickles else "if its repository has pickles alone"
    return f"{hint}: load it with {library}, and save it again"


def _index(file: Path) -> dict[str, str]:
    """The shard of each tensor. All shards are there."""
    index = reading.read_json(file, LARGEST_INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise ValueError(f"'{file}' has no 'weight_map'")
    for key, name in index.items():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise ValueError(
                f"'{file}' places {key!r} in {shown(name)}, expected the name of a safetensors file beside it"
            )
    absent = sorted({name for name in index.values() if not reading.has(file.parent / name)})
    if absent:
        raise FileNotFoundError(f"'{file}' names files that are missing: {', '.join(absent[:20])}")
    return index


def headers(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, by key. Raises a ValueError for a damaged one, or one that is no regular file."""
    _check_header(file)
    with _opened(file) as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        return {key: Tensor(file, key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}


def _check_header(file: Path) -> None:
    """Raises for what the safetensors library takes: whatever can be opened, a long header, a key twice, 1000 axes."""
    damaged = f"'{file}' is damaged or no safetensors file: its header "
    target = reading.regular(file)
    try:
        with target.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = content.read(min(length, LARGEST_HEADER))
    except OSError as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error
    if length > LARGEST_HEADER:
        raise ValueError(f"{damaged}is of {length} bytes, more than the {LARGEST_HEADER} that are read")
    try:
        entries = reading.parsed(header.decode("utf-8")) if len(header) == length > 0 else {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{damaged}is no text: {error}") from error
    except ValueError as error:
        raise ValueError(f"{damaged}{error}") from error
    for key, entry in entries.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and len(shape) > AXES:
            raise ValueError(f"{damaged}gives {key!r} {len(shape)} axes, more than {AXES}")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, its header checked by the library."""
    try:
        with safe_open(file, framework="numpy") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"'{file}' is damaged or no safetensors file: {error}") from error
    except OSError as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error


def read_into(out: np.ndarray, tensor: Tensor, index: tuple[slice, ...]) -> None:
    """Reads some elements of a tensor, a part at a time: neither a copy of all of them nor the file's pages pile up."""
    if not tensor.shape:
        with _opened(tensor.file) as opened:
            out[...] = opened.get_tensor(tensor.key)
        return
    axes = len(tensor.stored or tensor.shape)
    first, *rest = index[:axes]
    rest += [slice(None)] * (axes - len(index))  # of length 1, as are those that are left out
    rows = max(CHUNK // max(math.prod(out.shape[1:]), 1), 1)
    for start in range(first.start, first.stop, rows):
        stop = min(start + rows, first.stop)
        with _opened(tensor.file) as opened:  # anew: closing it gives the pages back
            part = out[start - first.start : stop - first.start]
            part[...] = opened.get_slice(tensor.key)[(slice(start, stop), *rest)].reshape(part.shape)


def aligned(shape: Shape, dtype: Any) -> np.ndarray:
    """An empty array at an address that JAX takes over on the CPU; another it would copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + size].view(dtype).reshape(shape)


def shards(sizes: Mapping[str, int], largest: int) -> list[list[str]]:
    """Keys in order, in as few groups as do not exceed `largest` bytes; a tensor that does has one of its own.

    >>> shards({"a": 3, "b": 3, "c": 9, "d": 1}, 6)
    [['a', 'b'], ['c'], ['d']]
    """
    groups: list[list[str]] = []
    room = 0
    for key, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = largest
        groups[-1].append(key)
        room -= size
    return groups
