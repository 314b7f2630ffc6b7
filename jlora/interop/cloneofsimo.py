"""Files of the first LoRA for Stable Diffusion, https://github.com/cloneofsimo/lora, which number the layers.

`unet:17:down` (r, in) and `unet:17:up` (out, r) are of the 18th layer, in torch's order, within the classes of modules
that the metadata lists; the update is their product. Any other key is a new token, and its tensor an embedding.
"""

import json
import re
from collections.abc import Iterable, Mapping

import numpy as np

from jlora.interop import assemble
from jlora.interop.assemble import Absent, Placed, Resolved, Role
from jlora.interop.modules import Name, Shapes, parameters
from jlora.interop.pipeline import File

_KEY = re.compile(r"(unet|text_encoder):(\d{1,6}):(up|down)")
_ROLES = {"down": Role("lora", "A"), "up": Role("lora", "B")}
_ATTENTION = ("CrossAttention", "Attention")  # one class, before and after it was renamed
# A block's layers in the order in which the diffusers of that time made them: ff between the two attentions.
_BLOCK = (
    *((f"attn1.{name}", _ATTENTION) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    ("ff.net.0.proj", ("GEGLU",)),
    *((f"attn2.{name}", _ATTENTION) for name in ("to_q", "to_k", "to_v", "to_out.0")),
)
_TEXT = tuple((f"self_attn.{name}", ("CLIPAttention",)) for name in ("k_proj", "v_proj", "q_proj", "out_proj"))
_SIDES = ("down_blocks", "up_blocks", "mid_block")  # the middle was made last
_CLASSES = {"unet": {*_ATTENTION, "GEGLU"}, "text_encoder": {"CLIPAttention"}}


def is_one(tensors: Iterable[str]) -> bool:
    """Whether the keys are those of such a file."""
    return any(_KEY.fullmatch(key) for key in tensors)


def layers_of(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], models: Mapping[str, Shapes], *, origin: str
) -> File:
    """The layers of a file, and its new tokens.

    Raises:
      ValueError: for classes of modules whose order is not known here, and tensors that do not fit.
    """
    order = {
        component: modules_of(component, shapes, _classes(component, metadata, origin))
        for component, shapes in models.items()
        if component in _CLASSES
    }
    tokens = {key: x for key, x in tensors.items() if metadata.get(key) == "<embed>"}

    def resolve(key: str) -> Resolved:
        match = _KEY.fullmatch(key)
        if not match:
            return "is neither of a numbered layer nor, by the metadata, a new token's"
        component, number, part = match[1], int(match[2]), match[3]
        if component not in order:
            return Absent(component)
        if number >= len(order[component]):
            return f"is of the {component}, whose layers of those classes are {len(order[component])}"
        return Placed(Name(component, order[component][number]), _ROLES[part])

    own = {key: x for key, x in tensors.items() if key not in tokens}
    layers = assemble.assembled(own, models, resolve, lambda name, rank, alpha: 1.0, origin=origin)
    return File(layers, dict(metadata), tokens)


def _classes(component: str, metadata: Mapping[str, str], origin: str) -> set[str]:
    """The classes of modules within which layers were adapted."""
    text = metadata.get(component)
    if text is None:
        return _CLASSES[component]
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    known = _CLASSES[component]
    if not isinstance(found, list) or not all(isinstance(name, str) and name in known for name in found):
        raise ValueError(
            f"{origin}: its layers of the {component} are those within {text}; jlora knows {sorted(known)}"
        )
    return set(found)


def modules_of(component: str, shapes: Shapes, classes: set[str]) -> list[str]:
    """The layers within modules of some classes, in the order that such files number them by."""
    own = parameters(shapes)
    wanted = [name for name, theirs in (_BLOCK if component == "unet" else _TEXT) if classes & set(theirs)]
    blocks = {block for module in own for block in [_block_of(component, module)] if block is not None}
    return [
        f"{'.'.join(b)}.{name}" for b in sorted(blocks, key=_place) for name in wanted if f"{'.'.join(b)}.{name}" in own
    ]


def _block_of(component: str, module: str) -> tuple[str, ...] | None:
    """The transformer block, or the layer of a text encoder, that has a module."""
    parts = module.split(".")
    marker = "transformer_blocks" if component == "unet" else "layers"
    return tuple(parts[: parts.index(marker) + 2]) if marker in parts else None


def _place(block: tuple[str, ...]) -> tuple[int, ...]:
    side = _SIDES.index(block[0]) if block[0] in _SIDES else 0
    return (side, *(int(part) for part in block if part.isdecimal()))
