"""Quantised parameters as transformers saves bitsandbytes' 4 bits: the tensors, and what config.json says."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.bnb import DTYPES, TABLES
from jlora.models.tensors import LINEAR, Leaf
from jlora.quant.nested import GROUP, Nested, dynamic_map
from jlora.quant.quantised import Quantised

TIED = ("lm_head", "lm_head.decoder", "cls.predictions.decoder")  # heads that are no tensor, and modules all the same


def is_quantised(value: Any) -> bool:
    """Whether a parameter is held in few bits."""
    return isinstance(value, Quantised)


def check(table: Iterable[Leaf], flat: Mapping[str, Any]) -> None:
    """Raises a ValueError for quantised parameters that bitsandbytes' files cannot hold."""
    parts: dict[str, list[tuple[Leaf, Any]]] = {}
    for row in table:
        for key in row.keys:
            parts.setdefault(key, []).append((row, flat[row.path]))
    for key, own in parts.items():
        quantised = [(row, value) for row, value in own if is_quantised(value)]
        for row, value in quantised:
            _check_parameter(row, value)
        if not quantised:
            continue
        paths = ", ".join(repr(row.path) for row, _ in own)
        kinds = {(value.number, value.layout.block, str(value.dtype)) for _, value in quantised}
        if len(quantised) < len(own) or len(kinds) > 1:
            raise ValueError(f"save: {paths} are one tensor, {key!r}, and not quantised alike: quantise all or none")
        if len(own) > 1 and any(_weights(row, value) % value.layout.block for row, value in quantised):
            raise ValueError(
                f"save: {paths} are one tensor, {key!r}, and their blocks of {quantised[0][1].layout.block} do not end "
                "where they do: jlora.dequantize(params) first"
            )


def _check_parameter(row: Leaf, value: Quantised) -> None:
    last = len(value.shape) - 1
    if value.number.name not in TABLES:
        raise ValueError(
            f"save: {row.path!r} is {value!r}, and transformers' files hold nf4 and fp4 of bitsandbytes alone: "
            "jlora.dequantize(params) first"
        )
    order = value.layout.order_of(last + 1)
    if not row.path.endswith("/kernel") or order != (*range(last - 1), last, last - 1):
        raise ValueError(
            f"save: {row.path!r} is {value!r}, and bitsandbytes has the weights of linear layers alone in 4 bits: "
            "jlora.dequantize it first"
        )
    if str(value.dtype) not in DTYPES:
        raise ValueError(f"save: {row.path!r} is of {value.dtype}, expected one of {', '.join(DTYPES)}")


def _weights(row: Leaf, value: Quantised) -> int:
    return math.prod(value.shape[int(row.stacked) :])


def tensors(table: Iterable[Leaf], flat: Mapping[str, Quantised], named: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The tensors of quantised parameters, of some keys of the table alone, under the names that these have."""
    parts: dict[str, dict[int, Quantised]] = {}
    for row in table:
        for layer, key in enumerate(row.keys):
            if key in named:
                # Of one layer alone: the others stay where they are.
                own = jax.tree.map(lambda x, i=layer: x[i], flat[row.path]) if row.stacked else flat[row.path]
                parts.setdefault(key, {})[row.part.number if row.part else 0] = jax.device_get(own)
    found: dict[str, np.ndarray] = {}
    for key, own in parts.items():
        found |= _of_weight(named[key], [own[i] for i in sorted(own)])
    return found


def _of_weight(key: str, parts: Sequence[Quantised]) -> dict[str, np.ndarray]:
    """A weight of which the parameters are the rows, one after another."""
    first = parts[0]
    kind = first.number.name
    codes = np.concatenate([np.asarray(part.codes).reshape(-1) for part in parts])
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": first.layout.block,
        "dtype": str(jnp.dtype(first.dtype)),
        "shape": [sum(part.shape[-1] for part in parts), first.shape[-2]],
    }
    nested = [part.scales for part in parts if isinstance(part.scales, Nested)]
    found = {key: codes.reshape(-1, 1), f"{key}.quant_map": np.asarray(TABLES[kind], np.float32)}
    if len(nested) == len(parts) and _is_one(nested):
        state |= {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": float(nested[0].offset)}
        found |= {
            f"{key}.absmax": np.concatenate([np.asarray(each.codes).reshape(-1) for each in nested]),
            f"{key}.nested_absmax": np.concatenate([np.asarray(each.scales).reshape(-1) for each in nested]),
            f"{key}.nested_quant_map": dynamic_map(),
        }
    else:  # scales of each part's own offset: in float32 they are what they were
        found[f"{key}.absmax"] = np.concatenate([_scales(part) for part in parts])
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return found | {f"{key}.quant_state.bitsandbytes__{kind}": text}


def _is_one(nested: Sequence[Nested]) -> bool:
    """Whether scales of parts, one after another, are those of the whole: one offset, groups that end where they do."""
    whole = all(np.size(each.codes) % GROUP == 0 for each in nested[:-1])
    return whole and len({float(each.offset) for each in nested}) == 1


def _scales(part: Quantised) -> np.ndarray:
    """In float32, computed as bitsandbytes does, without a rounding left out."""
    if not isinstance(part.scales, Nested):
        return np.asarray(part.scales, np.float32).reshape(-1)
    codes = np.asarray(part.scales.codes).reshape(-1)
    second = np.asarray(part.scales.scales).reshape(-1)[np.arange(codes.size) // GROUP]
    return dynamic_map()[codes] * second + np.float32(part.scales.offset)


def config(table: Iterable[Leaf], flat: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any] | None:
    """The `quantization_config` of a config.json; None if nothing is quantised.

    Args:
      table: of the model.
      flat: its parameters, by path.
      named: keys of the table -> keys of the checkpoint.
    """
    rows = [row for row in table if row.path.endswith("/kernel") and row.order in (None, LINEAR)]
    module = lambda row: {named[key].removesuffix(".weight") for key in row.keys}
    values = [flat[row.path] for row in rows if is_quantised(flat[row.path])]
    if not values:
        return None
    small = {name for row in rows if is_quantised(flat[row.path]) for name in module(row)}
    plain = {name for row in rows if not is_quantised(flat[row.path]) for name in module(row)}
    tied = {name for name in TIED if not any(f"{own}.".startswith(f"{name}.") for own in small)}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": values[0].number.name,
        "bnb_4bit_use_double_quant": any(isinstance(value.scales, Nested) for value in values),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(jnp.dtype(values[0].dtype)),
        "llm_int8_skip_modules": sorted(plain | tied),
    }
