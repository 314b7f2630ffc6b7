"""Stable Diffusion: pipelines of folders, prompts, the noise of a model and the samplers that take it away, images."""

from jlora.models.diffusion.noise import Noise as Noise
from jlora.models.diffusion.pipeline import Pipeline as Pipeline
from jlora.models.diffusion.pipeline import load as load
from jlora.models.diffusion.pipeline import save as save
from jlora.models.diffusion.prompts import Encoded as Encoded
from jlora.models.diffusion.prompts import encode as encode
from jlora.models.diffusion.prompts import tokens_of as tokens_of
from jlora.models.diffusion.prompts import with_tokenizer as with_tokenizer
from jlora.models.diffusion.samplers import Sampler as Sampler
from jlora.models.diffusion.samplers import ddim as ddim
from jlora.models.diffusion.samplers import euler as euler
