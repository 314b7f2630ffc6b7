"""The autoencoder of Stable Diffusion: `VAE`, `VAEConfig`, and published sizes in `PRESETS`."""

from jlora.models.vae.modeling import PRESETS as PRESETS
from jlora.models.vae.modeling import VAE as VAE
from jlora.models.vae.modeling import VAEConfig as VAEConfig
from jlora.models.vae.modeling import sampled as sampled
