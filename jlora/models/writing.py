"""Parameters to a checkpoint's safetensors files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jlora.models import bnb_tensors, files
from jlora.models.tensors import Leaf, Shape, to_tensors


def check_params(flat: Mapping[str, Any], expected: Mapping[str, Shape]) -> None:
    """Raises a ValueError if parameters, by path, are not those of the model, or cannot be written here."""
    wrong = [f"{path!r} is missing" for path in expected if path not in flat]
    wrong += [f"{path!r} is unexpected" for path in flat if path not in expected]
    wrong += [
        f"{path!r} has shape {np.shape(flat[path])}, expected {shape}"
        for path, shape in expected.items()
        if path in flat and np.shape(flat[path]) != shape
    ]
    if wrong:
        raise ValueError("save: the parameters are not the model's:\n  " + "\n  ".join(wrong))
    for path, value in ((path, array) for path, leaf in flat.items() for array in jax.tree.leaves(leaf)):
        if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
            raise ValueError(f"save: {path!r} is spread over several processes: replicate the parameters, save on one")


def write_tensors(
    folder: Path,
    table: list[Leaf],
    flat: Mapping[str, Any],
    named: Mapping[str, str],
    *,
    library: str,
    largest: int,
) -> None:
    """One file, or shards and their index. One shard's tensors are in memory at a time.

    Args:
      folder: of the checkpoint.
      table: the rows of all parameters.
      flat: the parameters, by path.
      named: key of the table -> key in the file.
      library: whose files they are; see `files.STEMS`.
      largest: bytes of a file, unless one tensor has more.
    """
    stem, (single, several) = files.STEMS[library], files.names_of(library)
    sizes: dict[str, int] = {}
    for row in table:
        value = flat[row.path]
        for key in row.keys:
            sizes[key] = sizes.get(key, 0) + sum(x.nbytes for x in jax.tree.leaves(value)) // len(row.keys)
    groups = files.shards(sizes, largest)
    total = 0
    weight_map: dict[str, str] = {}
    written: dict[Path, Path] = {}
    for number, group in enumerate(groups, 1):
        name = single if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        small = [row for row in table if bnb_tensors.is_quantised(flat[row.path])]
        rows = [_within(row, group) for row in table if set(row.keys) & set(group) and row not in small]
        values = {row.path: _rows_of(flat[row.path], full, row) for full, row in _pairs(table, rows)}
        tensors = {named[key]: tensor for key, tensor in to_tensors(rows, values).items()}
        tensors |= bnb_tensors.tensors(small, flat, {key: named[key] for key in group})
        written[folder / name] = folder / f".{name}.tmp"
        save_file(tensors, written[folder / name], metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    parts = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors")  # without a variant
    for old in [*(path for path in folder.iterdir() if parts.fullmatch(path.name)), folder / several]:  # all is written
        old.unlink(missing_ok=True)
    for path, temporary in written.items():
        temporary.replace(path)
    if len(groups) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / several, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def _within(row: Leaf, group: list[str]) -> Leaf:
    kept = set(group)
    return row._replace(keys=tuple(key for key in row.keys if key in kept))


def _pairs(table: list[Leaf], rows: list[Leaf]) -> list[tuple[Leaf, Leaf]]:
    full = {row.path: row for row in table}
    return [(full[row.path], row) for row in rows]


def _rows_of(value: Any, full: Leaf, row: Leaf) -> np.ndarray:
    """A parameter on the host; of a stacked one the layers that a shard has."""
    if not row.stacked or row.keys == full.keys:
        return np.asarray(jax.device_get(value))
    return np.asarray(jax.device_get(value[jnp.asarray([full.keys.index(key) for key in row.keys])]))
