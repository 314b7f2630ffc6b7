"""Stable Diffusion: pipelines from folders and files, prompts, the noise of a model, samplers, and images."""

from jlora.models.diffusion import scheduler_config as scheduler_config
from jlora.models.diffusion.generate import generate as generate
from jlora.models.diffusion.noise import Noise as Noise
from jlora.models.diffusion.pipeline import Pipeline as Pipeline
from jlora.models.diffusion.pipeline import load as load
from jlora.models.diffusion.pipeline import save as save
from jlora.models.diffusion.pixels import Pixels as Pixels
from jlora.models.diffusion.pixels import PixelsConfig as PixelsConfig
from jlora.models.diffusion.prompts import Encoded as Encoded
from jlora.models.diffusion.prompts import encode as encode
from jlora.models.diffusion.prompts import tokens_of as tokens_of
from jlora.models.diffusion.prompts import with_tokenizer as with_tokenizer
from jlora.models.diffusion.samplers import ddim as ddim
from jlora.models.diffusion.samplers import ddpm as ddpm
from jlora.models.diffusion.samplers import dpmpp_2m as dpmpp_2m
from jlora.models.diffusion.samplers import dpmpp_2m_sde as dpmpp_2m_sde
from jlora.models.diffusion.samplers import euler as euler
from jlora.models.diffusion.samplers import euler_ancestral as euler_ancestral
from jlora.models.diffusion.samplers import lcm as lcm
from jlora.models.diffusion.samplers import pndm as pndm
from jlora.models.diffusion.scheduler_config import sampler as sampler
from jlora.models.diffusion.single_file import load_file as load_file
from jlora.models.diffusion.tables import Sampler as Sampler
