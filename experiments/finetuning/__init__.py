"""Fine-tuning of pretrained checkpoints on real tasks; `experiments.finetune` is the command."""

from experiments.finetuning.classification import Classification as Classification
from experiments.finetuning.completion import Completion as Completion
from experiments.finetuning.config import Finetune as Finetune
from experiments.finetuning.images import Images as Images
from experiments.finetuning.schedule import Decoding as Decoding
from experiments.finetuning.schedule import Run as Run
from experiments.finetuning.schedule import Schedule as Schedule
from experiments.finetuning.texts import Texts as Texts
