"""BERT: `Bert`, its `BertConfig`, and the published sizes in `PRESETS`."""

from jlora.models.bert.modeling import PRESETS as PRESETS
from jlora.models.bert.modeling import Bert as Bert
from jlora.models.bert.modeling import BertConfig as BertConfig
