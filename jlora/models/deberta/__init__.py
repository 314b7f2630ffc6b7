"""DeBERTa v2 and v3: `Deberta`, its `DebertaConfig`, and the published sizes in `PRESETS`."""

from jlora.models.deberta.modeling import PRESETS as PRESETS
from jlora.models.deberta.modeling import Deberta as Deberta
from jlora.models.deberta.modeling import DebertaConfig as DebertaConfig
