"""Vision Transformer: `ViT`, its `ViTConfig`, and published sizes in `PRESETS`."""

from jlora.models.vit.modeling import PRESETS as PRESETS
from jlora.models.vit.modeling import ViT as ViT
from jlora.models.vit.modeling import ViTConfig as ViTConfig
