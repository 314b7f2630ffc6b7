"""Checkpoints and data in the formats of the real ones, so small that an experiment on them ends in seconds.

Each is a function of a folder that it writes into, and returns where a reader looks. The same is written every time.
"""

from experiments.recipes.tiny.checkpoints import bert as bert
from experiments.recipes.tiny.checkpoints import deberta as deberta
from experiments.recipes.tiny.checkpoints import gpt2 as gpt2
from experiments.recipes.tiny.checkpoints import llama as llama
from experiments.recipes.tiny.checkpoints import llama2c as llama2c
from experiments.recipes.tiny.checkpoints import roberta as roberta
from experiments.recipes.tiny.checkpoints import vit as vit
from experiments.recipes.tiny.files import e2e as e2e
from experiments.recipes.tiny.files import glue as glue
from experiments.recipes.tiny.files import gsm8k as gsm8k
from experiments.recipes.tiny.files import guanaco as guanaco
from experiments.recipes.tiny.files import images as images
from experiments.recipes.tiny.files import metamath as metamath
from experiments.recipes.tiny.files import shakespeare as shakespeare
from experiments.recipes.tiny.files import sst2 as sst2
from experiments.recipes.tiny.files import temporary as temporary
from experiments.recipes.tiny.files import trec as trec
from experiments.recipes.tiny.pipelines import clip as clip
from experiments.recipes.tiny.pipelines import photos as photos
from experiments.recipes.tiny.pipelines import stable_diffusion as stable_diffusion
from experiments.recipes.tiny.pipelines import stable_diffusion_xl as stable_diffusion_xl
