"""CLIP as a judge of pictures: embeddings of pictures and of their prompts in one space."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments.configfile import ConfigError
from experiments.sheet import as_image
from jlora import models
from jlora.models.clip import CLIP, CLIPText, CLIPVision
from jlora.models.diffusion import tokens_of
from jlora.models.tokenizer import Tokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
BATCH = 16


@dataclass(frozen=True, eq=False)
class Judge:
    """A CLIP with its tokenizer."""

    model: CLIP
    params: Any
    tokenizer: Tokenizer

    @classmethod
    def load(cls, name: str) -> "Judge":
        """From a checkpoint of CLIP, "openai/clip-vit-base-patch32".

        Raises:
          ConfigError: for another model.
          ValueError: for a tokenizer that is another model's.
        """
        loaded = models.load(name)
        if not isinstance(loaded.model, CLIP):
            raise ConfigError(f"task.drawing.judge={name!r} is a {type(loaded.model).__name__}, expected a CLIP")
        tokenizer = Tokenizer.load(name)
        tokenizer.check(loaded.model.config.text.vocab_size)
        return cls(loaded.model, loaded.params, tokenizer)

    def images(self, images: np.ndarray) -> np.ndarray:
        """Embeddings of (pictures, height, width, 1 or 3) in [0, 1]: (pictures, features)."""
        tower = self.model.config.vision_tower
        pixels = np.stack([_prepared(image, tower.image_size) for image in images])
        module: Any = CLIPVision(tower)
        call = jax.jit(lambda params, x: module.apply({"params": params}, x)["out"])
        return self._in_parts(lambda x: call(self.params["vision"], x), pixels)

    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeddings of prompts, cut where they are too long: (prompts, features)."""
        tower = self.model.config.text_tower
        tokens = tokens_of(self.tokenizer, prompts, long="cut", context=tower.context)
        module: Any = CLIPText(tower)
        call = jax.jit(lambda params, x: module.apply({"params": params}, x)["out"])
        return self._in_parts(lambda x: call(self.params["text"], x), tokens)

    def _in_parts(self, call: Any, rows: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(rows), BATCH):
            places = np.minimum(np.arange(start, start + BATCH), len(rows) - 1)
            found.append(jax.device_get(call(jnp.asarray(rows[places]))))
        return np.concatenate(found)[: len(rows)]


def _prepared(image: np.ndarray, side: int) -> np.ndarray:
    """As CLIP sees an image: (side, side, 3)."""
    picture = as_image(image).convert("RGB")
    scale = side / min(picture.size)
    wide, high = (max(side, round(n * scale)) for n in picture.size)
    left, top = (wide - side) // 2, (high - side) // 2
    picture = picture.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    pixels = np.asarray(picture, np.float32) / np.float32(255)
    return (pixels - np.asarray(MEAN, np.float32)) / np.asarray(DEVIATION, np.float32)
