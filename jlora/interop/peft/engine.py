"""Plain LoRA as the serving engines read it: one rank, alpha = r, no field of the config that they do not heed."""

from jlora.adapted.adapted import Adapted
from jlora.interop.layer import Layer
from jlora.interop.names import Names


def layers(adapted: Adapted, names: Names, error: float | None) -> list[Layer]:
    """Later."""
    raise NotImplementedError
