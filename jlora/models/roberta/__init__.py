"""RoBERTa: `Roberta`, its `RobertaConfig`, and the published sizes in `PRESETS`."""

from jlora.models.roberta.modeling import PRESETS as PRESETS
from jlora.models.roberta.modeling import Roberta as Roberta
from jlora.models.roberta.modeling import RobertaConfig as RobertaConfig
