"""Weights in 4 or 8 bits: number formats, blocks, and the leaf that holds codes and scales in a weight's place."""

from jlora.quant.formats import FORMATS as FORMATS
from jlora.quant.formats import Format as Format
from jlora.quant.formats import format_of as format_of
from jlora.quant.layout import Layout as Layout
from jlora.quant.layout import layout_of as layout_of
from jlora.quant.nested import Nested as Nested
from jlora.quant.quantised import Quantised as Quantised
from jlora.quant.quantised import encode as encode
