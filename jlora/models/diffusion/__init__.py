"""Stable Diffusion: prompts to the arrays that condition a UNet."""

from jlora.models.diffusion.prompts import Encoded as Encoded
from jlora.models.diffusion.prompts import encode as encode
from jlora.models.diffusion.prompts import tokens_of as tokens_of
from jlora.models.diffusion.prompts import with_tokenizer as with_tokenizer
