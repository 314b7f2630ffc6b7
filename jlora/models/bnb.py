"""Weights of a checkpoint that bitsandbytes holds in 4 bits: which tensors belong to one, and what they say of it.

A weight `k` of shape (out, in) is `k` (two codes to a byte, as one column), `k.absmax`, `k.quant_map`,
`k.quant_state.bitsandbytes__nf4` (JSON) and, where the scales are held in 8 bits, `k.nested_absmax` and
`k.nested_quant_map`. transformers turns GPT-2's matrices to (out, in) before it quantises them.
"""

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.models import files, reading
from jlora.models.fields import shown
from jlora.models.files import Tensor
from jlora.quant.formats import BLOCKS, FORMATS, FP4, NF4, Format
from jlora.quant.nested import GROUP, dynamic_map

STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
SCALES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
TABLES = {"nf4": NF4, "fp4": FP4}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
STORAGE: dict[str, Any] = {  # what codes may be packed in once more
    "U8": np.uint8, "I8": np.int8, "BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32
}  # fmt: skip
LONGEST = 2**12  # bytes of a quant_state
LARGEST = 2**40  # elements of a weight


class Packed(NamedTuple):
    """A weight in 4 bits.

    Attributes:
      number: its format.
      block: weights to a scale.
      codes: (ceil(n / 2), 1), row-major (out, in).
      scales: (blocks,) float32, or uint8 if there are scales of these.
      second: (groups,) float32, of the scales less the offset; None if they are in float32.
      offset: the mean of the scales.
      table: 256 numbers behind the scales' codes, where they are not those of `dynamic_map`.
    """

    number: Format
    block: int
    codes: Tensor
    scales: Tensor
    second: Tensor | None = None
    offset: float = 0.0
    table: np.ndarray | None = None


def weights(folder: Path, record: Mapping[str, Any], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint with one, (out, in), in the place of those of each weight in 4 bits.

    Raises:
      ValueError: for the checkpoint of another quantiser or of its 8 bits; scales without a quant_state; a quant_state
        of an unknown type, or that cannot be; and codes and scales that contradict it.
    """
    states = {match[1]: (match[2], tensor) for key, tensor in found.items() if (match := STATE.fullmatch(key))}
    _check_method(folder, record.get("quantization_config"), bool(states))
    owned = {f"{key}.{name}" for key in states for name in SCALES}
    for key in found:
        weight, _, name = key.rpartition(".")
        if name in SCALES and key not in owned and weight.endswith(".weight"):
            raise ValueError(
                f"'{folder}' has {key!r} and no quant_state of {weight!r}: expected "
                + " or ".join(repr(f"{weight}.quant_state.bitsandbytes__{name}") for name in TABLES)
            )
    rest = {k: t for k, t in found.items() if k not in owned and k not in states and not STATE.fullmatch(k)}
    return rest | {key: _weight(key, kind, state, found) for key, (kind, state) in states.items()}


def _check_method(folder: Path, config: Any, packed: bool) -> None:
    """Raises a ValueError for what config.json says of a quantisation that is not read."""
    if not config:
        return
    how = config.get("quant_method", "in some way") if isinstance(config, dict) else config
    if packed and how in ("bitsandbytes", "in some way"):
        return
    if how == "bitsandbytes":
        eight = isinstance(config, dict) and config.get("load_in_8bit")
        how = "bitsandbytes in 8 bits" if eight else "bitsandbytes, and no tensor has a quant_state"
    how = how if isinstance(how, str) else shown(how)
    raise ValueError(
        f"'{folder}' is quantised ({how[:80]}), and jlora reads bitsandbytes' 4 bits alone: load the checkpoint that "
        "it was made from, with quantize= for a base in few bits"
    )


def _weight(key: str, kind: str, state: Tensor, found: Mapping[str, Tensor]) -> Tensor:
    if kind not in TABLES:
        near = difflib.get_close_matches(kind, TABLES, 1, 0.0)[0]
        raise ValueError(f"{key!r} is of the unknown type {kind!r}: read are nf4 and fp4; the nearest is {near!r}")
    said = _state(key, kind, state)
    rows, columns = said["shape"]
    number = rows * columns
    blocks = -(-number // said["blocksize"])
    nested = f"{key}.nested_absmax" in found
    groups = -(-blocks // GROUP)
    expected = {f"{key}.absmax": (("U8",) if nested else ("F32",), (blocks,)), f"{key}.quant_map": (("F32",), (16,))}
    if nested:
        expected |= {f"{key}.nested_absmax": (("F32",), (groups,)), f"{key}.nested_quant_map": (("F32",), (256,))}
    codes = found.get(key)
    size = np.dtype(STORAGE[codes.dtype]).itemsize if codes and codes.dtype in STORAGE else 0
    if codes is None or not size or codes.shape != (-(-number // (2 * size)), 1):
        there = "is missing" if codes is None else f"is {codes.dtype} {codes.shape}"
        raise ValueError(
            f"{key!r} {there}, and its quant_state says a weight of shape {(rows, columns)} in 4 bits: expected U8 "
            f"{(-(-number // 2), 1)}"
        )
    for name, (dtypes, shape) in expected.items():
        tensor = found.get(name)
        if tensor is None or tensor.dtype not in dtypes or tensor.shape != shape:
            there = "is missing" if tensor is None else f"is {tensor.dtype} {tensor.shape}"
            raise ValueError(
                f"{name!r} {there}, and the quant_state says {blocks} blocks of {said['blocksize']}: expected "
                f"{' or '.join(dtypes)} {shape}"
            )
    if not np.array_equal(whole(found[f"{key}.quant_map"]), np.asarray(TABLES[kind], np.float32)):
        raise ValueError(f"'{key}.quant_map' holds other numbers than those of {kind}: made by another library?")
    packed = Packed(FORMATS[kind], said["blocksize"], codes, found[f"{key}.absmax"])
    if nested:
        table = whole(found[f"{key}.nested_quant_map"])
        own = None if np.array_equal(table, dynamic_map()) else table
        packed = packed._replace(second=found[f"{key}.nested_absmax"], offset=said["nested_offset"], table=own)
    return Tensor(codes.file, codes.key, (rows, columns), DTYPES[said["dtype"]], packed)


def _state(key: str, kind: str, tensor: Tensor) -> dict[str, Any]:
    """The JSON object of a quant_state, what is used of it checked."""
    name = f"{key}.quant_state.bitsandbytes__{kind}"
    if tensor.dtype not in ("U8", "I8") or len(tensor.shape) != 1 or tensor.shape[0] > LONGEST:
        raise ValueError(f"{name!r} is {tensor.dtype} {tensor.shape}, expected at most {LONGEST} bytes of JSON")
    try:
        said = reading.parsed(whole(tensor).tobytes().decode("utf-8"))
    except ValueError as error:  # of the text, too
        raise ValueError(f"{name!r} {error}") from error
    shape: Any = said.get("shape")
    block = said.get("blocksize")
    sizes = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    wrong = {
        "quant_type": said.get("quant_type") != kind and f"expected {kind!r}",
        "blocksize": (isinstance(block, bool) or block not in BLOCKS) and f"expected one of {BLOCKS}",
        "shape": not (sizes and len(shape) == 2 and math.prod(shape) < LARGEST) and "expected that of a matrix",
        "dtype": str(said.get("dtype")) not in DTYPES and f"expected one of {', '.join(DTYPES)}",
        "nested_blocksize": said.get("nested_blocksize", GROUP) != GROUP and f"expected {GROUP}",
        "nested_offset": not isinstance(said.get("nested_offset", 0.0), float | int) and "expected a number",
    }
    for field, problem in wrong.items():
        if problem:
            raise ValueError(f"{name!r} has {field}={shown(said.get(field))}, {problem}")
    if not math.isfinite(said.setdefault("nested_offset", 0.0)):
        raise ValueError(f"{name!r} has nested_offset={said['nested_offset']}, expected a finite number")
    return said


# -- numbers -----------------------------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> np.ndarray:
    """All elements of a small tensor."""
    return elements(tensor, 0, tensor.shape[0])


def elements(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """Some elements of a vector, or of a matrix of one column, as a vector."""
    out = np.empty((stop - start, *tensor.shape[1:]), STORAGE[tensor.dtype])
    files.read_into(out, tensor, (slice(start, stop), *(slice(0, n) for n in tensor.shape[1:])))
    return out.reshape(-1)


def codes_of(packed: Packed, start: int, stop: int) -> np.ndarray:
    """Some bytes of the codes, whatever numbers they are packed in."""
    size = np.dtype(STORAGE[packed.codes.dtype]).itemsize
    first = start // size
    return elements(packed.codes, first, -(-stop // size)).view(np.uint8)[start - first * size : stop - first * size]


def scales_of(packed: Packed, start: int, stop: int) -> np.ndarray:
    """The scales of some blocks in float32, as bitsandbytes computes them: `table[codes] * second + offset`."""
    found = elements(packed.scales, start, stop)
    if packed.second is None:
        return found
    table = dynamic_map() if packed.table is None else packed.table
    second = whole(packed.second)[np.arange(start, stop) // GROUP]
    return table[found] * second + np.float32(packed.offset)
