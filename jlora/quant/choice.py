"""Rules that `jlora.quantize` and `load` of the models share: the weights that are quantised by default, and how."""

import numbers
from typing import Any

import numpy as np

from jlora.quant.formats import BLOCKS, Format

# Modules that make the model's output: kept in full precision by default, as bitsandbytes keeps `lm_head`.
HEADS = ("head", "lm_head", "score", "classifier", "qa_outputs", "logits", "output_projection")


def is_head(path: str) -> bool:
    """Whether a leaf belongs to a module that makes the model's output, by the module's whole name."""
    return bool(set(path.split("/")[:-1]) & set(HEADS))


def check_block(number: Format, block: Any) -> int:
    """Weights to a scale, 0 where it is an output channel's. Raises a ValueError for what does not fit the format."""
    if not number.blocks:
        if block is not None:
            raise ValueError(f"{number.name} has one scale for each output channel: leave out block={block!r:.50}")
        return 0
    size = 64 if block is None else block
    if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size not in BLOCKS:
        raise ValueError(f"block={block!r:.50} does not fit: it is a power of two from {BLOCKS[0]} to {BLOCKS[-1]}")
    return int(size)


def check_double(number: Format, double: Any) -> bool:
    """Whether scales are held in 8 bits. Raises a ValueError for what does not fit the format."""
    if double is not None and not isinstance(double, bool | np.bool_):
        raise ValueError(f"double is True, False or None, not {double!r:.50}")
    if double and not number.blocks:
        raise ValueError(f"{number.name} has one scale for each output channel, too few to be quantised: double=False")
    return number.blocks if double is None else bool(double)
