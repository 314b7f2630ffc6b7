"""Plain LoRA as the serving engines read it: one rank, alpha = r, no field of the config that they do not heed."""

from collections.abc import Sequence

import numpy as np

from jlora.adapted.adapted import Adapted
from jlora.adapted.convert import to_lora
from jlora.interop import natives
from jlora.interop.layer import Layer
from jlora.interop.names import Names
from jlora.methods import Method

PLAIN = ("lora", "rslora", "loraplus", "lora_fa", "eva")


def prepared(adapted: Adapted, names: Names, error: float) -> Adapted:
    """The adapter as plain LoRA, without anything beside its factors; itself, if it is that.

    Raises:
      ValueError: for leaves that are trained as they are, which the engines leave out in silence; and for a method that
        is no product of factors, unless its best one is no further off than `error`.
    """
    if adapted.extras:
        paths = [extra.path for extra in adapted.extras]
        raise ValueError(
            f"for_engine: {len(paths)} leaves are trained as they are, first {paths[0]!r}, and the engines would serve "
            "the base's: merge the adapter instead"
        )
    if all(natives.inner_of(method).name in PLAIN and not _has_gain(method) for method, _ in adapted.method.parts):
        return adapted
    try:
        return to_lora(adapted)
    except ValueError as wrong:
        if error <= 0:
            raise ValueError(
                f"for_engine: {wrong}. for_engine=0.02 takes the best product that is at most 2 % off; or merge it"
            ) from wrong
    return to_lora(adapted, energy=1 - error**2)


def _has_gain(method: Method) -> bool:
    return dict(method.config)["name"] == "dora" or any(
        isinstance(inner, Method) and _has_gain(inner) for inner in dict(method.config).values()
    )


def uniform(layers: Sequence[Layer]) -> list[Layer]:
    """All of the largest rank, padded with zeros, and of scale 1: the scale is in B."""
    if not layers:
        raise ValueError("for_engine: the adapter changes nothing: none of its products is other than zero")
    if wrong := [layer.key for layer in layers if layer.kind not in ("lora", "table")]:
        raise ValueError(
            f"for_engine: {wrong[0]!r} is a stack of experts, of which the engines' files differ: merge it"
        )
    rank = max(layer.rank for layer in layers)
    result = []
    for layer in layers:
        a, b = layer.tensors["A"], layer.tensors["B"]
        more = rank - len(a)
        a = np.pad(a, [(0, more), *[(0, 0)] * (a.ndim - 1)])
        b = np.pad(b * np.float32(layer.scale), [(0, 0), (0, more), *[(0, 0)] * (b.ndim - 2)])
        result.append(layer._replace(tensors={"A": a, "B": b}, scale=1.0))
    return result
