"""The architectures that there are."""

from jlora.models.architecture import Architecture
from jlora.models.gpt2.params import ARCHITECTURE as GPT2

ARCHITECTURES: tuple[Architecture, ...] = (GPT2,)
