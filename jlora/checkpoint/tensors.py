"""The file of tensors of an adapter: what it has to hold, and that it holds that and nothing else."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_tensors

from jlora.adapted.adapted import extra_shapes
from jlora.adapted.select import Extra
from jlora.checkpoint.record import naming, parse, shown
from jlora.methods import Method
from jlora.methods.acts import SHARED
from jlora.methods.method import shared_shapes
from jlora.transform.sites import Target

Tensors = dict[str, np.ndarray]
Read = Callable[[int, str], bytes]  # the most bytes there may be, and what takes them -> the content of a file
Described = Mapping[str, tuple[tuple[int, ...], str]]  # shape and dtype of each

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_ROOM = 2**16  # bytes of a header beside what the names and shapes of its tensors take


def expected_tensors(
    named: Mapping[str, Any], method: Method, sites: tuple[Target, ...], extras: tuple[Extra, ...]
) -> Described:
    """Shape and dtype of every tensor that the adapter has to hold. Nothing is allocated.

    Raises:
      ValueError: if the method has no factors for a site.
    """
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    for site in sites:
        arrays = method.acts.arrays(site.of_dtype(str(named[site.path].dtype)))
        expected |= {f"{site.path}/{name}": (a.shape, str(a.dtype)) for name, a in arrays.items()}
    expected |= {f"{SHARED}/{name}": (shape, "float32") for name, shape in shared_shapes(method, sites).items()}
    for extra in extras:
        shapes = extra_shapes(extra, named[extra.path])
        expected |= {f"{extra.path}/{name}": (shape, "float32") for name, shape in shapes.items()}
    return expected


def read_tensors(read: Read, file: Path | str, sha256: str, origin: Path | str, expected: Described) -> Tensors:
    """The tensors of a file that is not larger than what they take.

    Args:
      read, file: the file's content, of a size that is bounded, and its name.
      sha256: of its content, in `origin`, the JSON that names it.
      expected: what it has to hold.

    Raises:
      ValueError: if it holds something else, is damaged, or has values that are not finite.
    """
    data = sum(4 * math.prod(shape) for shape, _ in expected.values())
    header = sum(128 + len(json.dumps(name)) + 24 * len(shape) for name, (shape, _) in expected.items())
    content = read(8 + header + _ROOM + data, "the tensors of this adapter take")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"'{file}' is damaged: it is not the file that '{origin}' was written with (sha256)")
    check_described(file, _header(content, file), expected)
    try:
        tensors = parse_tensors(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"'{file}' is no safetensors file: {error!s:.300}") from error
    check_finite(file, tensors)
    return tensors


def _header(content: bytes, file: Path | str) -> Described:
    """Shapes and dtypes as the file's header says them."""
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= len(content) - 8:
        raise ValueError(f"'{file}' is no safetensors file: a header of {length} bytes in a file of {len(content)}")
    entries = parse(content[8 : 8 + length].rstrip(), file)
    described = {}
    with naming(file):
        for name, entry in entries.items() if isinstance(entries, dict) else [("", entries)]:
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if name == "__metadata__":
                continue
            if not isinstance(shape, list) or len(shape) > 64 or not all(isinstance(n, int) for n in shape):
                raise ValueError(f"no safetensors file: the header's entry {shown(name)} is {shown(entry)}")
            dtype = entry.get("dtype")
            described[name] = (tuple(shape), _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else shown(dtype))
    return described


# -- checks ------------------------------------------------------------------------------------------------------------


def check_described(file: Path | str, tensors: Described, expected: Described) -> None:
    """Raises ValueError that lists missing, unexpected and misshaped tensors."""
    wrong = [f"{name!r} is missing" for name in expected if name not in tensors]
    wrong += [f"{name!r:.200} is unexpected" for name in tensors if name not in expected]
    for name, (shape, dtype) in tensors.items():
        if name in expected and (shape, dtype) != expected[name]:
            other, of = expected[name]
            wrong.append(f"{name!r} is {dtype} of shape {shape}, expected {of} of shape {other}")
    if wrong:
        raise ValueError(f"'{file}': {some(wrong)}")


def check_finite(file: Path | str, tensors: Tensors) -> None:
    """Raises ValueError that lists the tensors with values that are not finite."""
    wrong = [f"{name!r} has values that are not finite" for name, value in tensors.items() if not _finite(value)]
    if wrong:
        raise ValueError(f"'{file}': {some(wrong)}")


def some(wrong: list[str], limit: int = 6) -> str:
    """The first of a list of faults, and how many more there are."""
    return "; ".join(wrong[:limit]) + (f"; and {len(wrong) - limit} more" if len(wrong) > limit else "")


def _finite(value: np.ndarray) -> bool:
    return bool(np.isfinite(value).all())
