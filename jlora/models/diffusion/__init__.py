"""Diffusion: the noise of a model and the samplers that take it away."""

from jlora.models.diffusion import scheduler_config as scheduler_config
from jlora.models.diffusion.noise import Noise as Noise
from jlora.models.diffusion.samplers import ddim as ddim
from jlora.models.diffusion.samplers import ddpm as ddpm
from jlora.models.diffusion.samplers import dpmpp_2m as dpmpp_2m
from jlora.models.diffusion.samplers import dpmpp_2m_sde as dpmpp_2m_sde
from jlora.models.diffusion.samplers import euler as euler
from jlora.models.diffusion.samplers import euler_ancestral as euler_ancestral
from jlora.models.diffusion.samplers import lcm as lcm
from jlora.models.diffusion.samplers import pndm as pndm
from jlora.models.diffusion.scheduler_config import sampler as sampler
from jlora.models.diffusion.tables import Sampler as Sampler
