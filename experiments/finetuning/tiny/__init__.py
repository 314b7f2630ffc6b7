"""Checkpoints and data in the formats of the real ones, so small that an experiment on them ends in seconds.

Each is a function of a folder that it writes into, and returns where a reader looks. The same is written every time.
"""

from experiments.finetuning.tiny.checkpoints import bert as bert
from experiments.finetuning.tiny.checkpoints import deberta as deberta
from experiments.finetuning.tiny.checkpoints import gpt2 as gpt2
from experiments.finetuning.tiny.checkpoints import llama as llama
from experiments.finetuning.tiny.checkpoints import llama2c as llama2c
from experiments.finetuning.tiny.checkpoints import roberta as roberta
from experiments.finetuning.tiny.checkpoints import vit as vit
from experiments.finetuning.tiny.files import e2e as e2e
from experiments.finetuning.tiny.files import glue as glue
from experiments.finetuning.tiny.files import gsm8k as gsm8k
from experiments.finetuning.tiny.files import images as images
from experiments.finetuning.tiny.files import metamath as metamath
from experiments.finetuning.tiny.files import shakespeare as shakespeare
from experiments.finetuning.tiny.files import sst2 as sst2
from experiments.finetuning.tiny.files import temporary as temporary
from experiments.finetuning.tiny.files import trec as trec
