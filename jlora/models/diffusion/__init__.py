"""Diffusion: the noise of a model and the samplers that take it away."""

from jlora.models.diffusion.noise import Noise as Noise
from jlora.models.diffusion.samplers import Sampler as Sampler
from jlora.models.diffusion.samplers import ddim as ddim
from jlora.models.diffusion.samplers import euler as euler
