"""The files of a checkpoint: a folder or a hub's snapshot, its config, and the tensors in its safetensors files."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.models.tensors import Shape

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CHUNK = 2**20  # elements of a tensor that are read at a time
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "vocab.bpe")  # config and tokenizer
WANTED = (*SMALL, "model*.safetensors")  # no pickles, no other copies of the tensors


class Tensor(NamedTuple):
    """Where a tensor lies, and what it is: dtype in safetensors' names, "F32", "BF16"."""

    file: Path
    key: str
    shape: Shape
    dtype: str


def folder_of(name: str | os.PathLike[str], revision: str | None = None, wanted: tuple[str, ...] = WANTED) -> Path:
    """A checkpoint's folder: the one that is named, or the hub's snapshot, of which the `wanted` files are downloaded.

    Raises:
      FileNotFoundError: if the name is no folder and no repository that can be had, or a folder without config.json.
      ImportError: if a download needs huggingface_hub and it is absent.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            near = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
            hint = f"; its folders {', '.join(map(repr, near[:5]))} hold one" if near else ""
            raise FileNotFoundError(f"'{folder}' is no checkpoint: there is no {CONFIG} in it{hint}")
        return folder
    if folder.is_absolute() or len(folder.parts) > 2 or str(name).startswith("."):
        raise FileNotFoundError(f"'{folder}' is no checkpoint: there is no such folder")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"'{name}' is no folder here, and to fetch it from the hub needs huggingface_hub: pip install jlora[models]"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(name), revision=revision, allow_patterns=list(wanted), ignore_patterns=["*/*"]
            )
        )
    except Exception as error:  # its own, its HTTP library's and the system's
        raise FileNotFoundError(
            f"'{name}' is no folder here, and the hub did not deliver it: {type(error).__name__}: {error}"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises a ValueError that names the file for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' holds a {type(content).__name__}, expected an object")
    return content


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by key, from one file or from those that an index names. Reads the headers alone.

    Raises:
      FileNotFoundError: if there are none, or one that the index names is missing.
      ValueError: for a damaged file, or an index that says otherwise than its files.
    """
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"{pickles[0]} is a pickle" if pickles else "if its repository has pickles alone"
        raise FileNotFoundError(
            f"'{folder}' holds neither {SINGLE} nor {INDEX}; {hint}: load it with transformers, and save it again"
        )
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise ValueError(f"'{folder / INDEX}' has no 'weight_map'")
    absent = sorted({name for name in index.values() if not (folder / name).is_file()})
    if absent:
        raise FileNotFoundError(f"'{folder / INDEX}' names files that are missing: {', '.join(absent)}")
    found = {key: tensor for name in sorted(set(index.values())) for key, tensor in _header(folder / name).items()}
    wrong = [key for key, name in index.items() if key not in found or found[key].file.name != name]
    if wrong:
        raise ValueError(f"'{folder / INDEX}' places {wrong[0]!r} in '{index[wrong[0]]}', and it is not there")
    return found


def _header(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            return {key: Tensor(file, key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"'{file}' is damaged or no safetensors file: {error}") from error


def read_into(out: np.ndarray, tensor: Tensor, index: tuple[slice, ...]) -> None:
    """Reads some elements of a tensor, a part at a time: neither a copy of all of them nor the file's pages pile up."""
    if not tensor.shape:
        with safe_open(tensor.file, framework="numpy") as opened:
            out[...] = opened.get_tensor(tensor.key)
        return
    first, *rest = index
    rows = max(CHUNK // max(math.prod(out.shape[1:]), 1), 1)
    for start in range(first.start, first.stop, rows):
        stop = min(start + rows, first.stop)
        with safe_open(tensor.file, framework="numpy") as opened:  # anew: closing it gives the pages back
            out[start - first.start : stop - first.start] = opened.get_slice(tensor.key)[(slice(start, stop), *rest)]


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
