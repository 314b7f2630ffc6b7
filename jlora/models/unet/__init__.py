"""The UNet of Stable Diffusion: `UNet`, `UNetConfig`, and published sizes in `PRESETS`."""

from jlora.models.unet.modeling import PRESETS as PRESETS
from jlora.models.unet.modeling import UNet as UNet
from jlora.models.unet.modeling import UNetConfig as UNetConfig
