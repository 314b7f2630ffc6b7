"""Llama and its kin: `Llama`, its `LlamaConfig`, and published sizes of Llama, Mistral and Qwen in `PRESETS`."""

from jlora.models.llama.modeling import PRESETS as PRESETS
from jlora.models.llama.modeling import Llama as Llama
from jlora.models.llama.modeling import LlamaConfig as LlamaConfig
