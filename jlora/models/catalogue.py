"""The architectures that there are."""

from typing import Any

from jlora.models.architecture import Architecture
from jlora.models.bert.params import ARCHITECTURE as BERT
from jlora.models.clip.params import ARCHITECTURES as CLIP
from jlora.models.deberta.params import ARCHITECTURE as DEBERTA
from jlora.models.gpt2.params import ARCHITECTURE as GPT2
from jlora.models.llama.params import ARCHITECTURES as LLAMA
from jlora.models.roberta.params import ARCHITECTURE as ROBERTA
from jlora.models.unet.params import ARCHITECTURE as UNET
from jlora.models.vae.params import ARCHITECTURE as VAE
from jlora.models.vit.params import ARCHITECTURE as VIT

ARCHITECTURES: tuple[Architecture, ...] = (GPT2, *LLAMA, BERT, ROBERTA, DEBERTA, VIT, *CLIP, UNET, VAE)


def architecture_of(config: Any) -> Architecture | None:
    """The architecture of a model's config; None if it is none of jlora's."""
    return next((a for a in ARCHITECTURES if type(config) is a.config and a.fits(config)), None)
