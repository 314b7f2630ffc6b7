"""Models that the papers used, to and from Hugging Face checkpoints. None of them knows of jlora's core."""

from jlora.models.checkpoint import Pretrained as Pretrained
from jlora.models.checkpoint import load as load
from jlora.models.checkpoint import save as save
