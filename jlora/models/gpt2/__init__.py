"""GPT-2: `GPT2`, its `GPT2Config`, and the four published sizes in `PRESETS`."""

from jlora.models.gpt2.modeling import GPT2 as GPT2
from jlora.models.gpt2.modeling import PRESETS as PRESETS
from jlora.models.gpt2.modeling import GPT2Config as GPT2Config
