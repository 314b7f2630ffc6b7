"""CLIP: `CLIP`, its towers `CLIPText` and `CLIPVision`, a config for each, and published sizes in `PRESETS`."""

from jlora.models.clip.modeling import CLIP as CLIP
from jlora.models.clip.modeling import PRESETS as PRESETS
from jlora.models.clip.modeling import CLIPConfig as CLIPConfig
from jlora.models.clip.modeling import CLIPText as CLIPText
from jlora.models.clip.modeling import CLIPTextConfig as CLIPTextConfig
from jlora.models.clip.modeling import CLIPVision as CLIPVision
from jlora.models.clip.modeling import CLIPVisionConfig as CLIPVisionConfig
