"""Models that the papers used, to and from Hugging Face checkpoints. None of them knows of jlora's core."""

from jlora.models.beam import Beams as Beams
from jlora.models.beam import beam_search as beam_search
from jlora.models.checkpoint import Pretrained as Pretrained
from jlora.models.checkpoint import build as build
from jlora.models.checkpoint import load as load
from jlora.models.checkpoint import save as save
from jlora.models.generate import generate as generate
from jlora.models.sampling import Sampling as Sampling
from jlora.models.tokenizer import Tokenizer as Tokenizer
