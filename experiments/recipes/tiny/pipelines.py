"""Random pipelines of Stable Diffusion in diffusers' folders, and photos to train them on."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tokenizers import pre_tokenizers

from experiments.recipes.tiny.checkpoints import random_params
from jlora import models
from jlora.models import diffusion
from jlora.models.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig, CLIPVisionConfig
from jlora.models.diffusion import Noise, Pipeline
from jlora.models.tokenizer import Tokenizer
from jlora.models.unet import UNet, UNetConfig
from jlora.models.vae import VAE, VAEConfig

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
CONTEXT = 40  # tokens, which are letters here


def stable_diffusion(folder: Path) -> Path:
    """As stable-diffusion-v1-5."""
    return _written(folder, xl=False)


def stable_diffusion_xl(folder: Path) -> Path:
    """As stable-diffusion-xl-base-1.0: two text encoders, sizes as conditions, linear projections."""
    return _written(folder, xl=True)


def photos(folder: Path) -> Path:
    """Five photos of a red thing, one of them upright, two with captions of their own."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (high, wide) in enumerate(((40, 40), (32, 32), (64, 36), (48, 48), (40, 36))):
        pixels = rng.integers(0, 90, (high, wide, 3))
        pixels[high // 4 : 3 * high // 4, wide // 4 : 3 * wide // 4, 0] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    for number in (0, 3):
        (folder / f"{number}.txt").write_text("a red thing\n")
    return folder


def _written(folder: Path, *, xl: bool) -> Path:
    texts = ("text_encoder", "text_encoder_2") if xl else ("text_encoder",)
    for name in texts:
        _tokenizer(folder / name.replace("text_encoder", "tokenizer"))
    tokenizers = {name: Tokenizer.load(folder / name.replace("text_encoder", "tokenizer")) for name in texts}
    width = 16
    text: dict[str, Any] = {
        "vocab_size": tokenizers["text_encoder"].vocab_size, "context": CONTEXT, "width": width, "layers": 2,
        "heads": 2, "hidden": 32,
    }  # fmt: skip
    end = tokenizers["text_encoder"].eos
    assert end is not None
    modules: dict[str, Any] = {
        "unet": UNet(
            UNetConfig(
                size=16, widths=(16, 32), depths=(0, 1) if xl else (1, 0), heads=(2, 4), layers=1, groups=8,
                context_width=width * len(texts), linear_projection=xl, added=16 + 6 * 8 if xl else None, added_time=8,
            )
        ),
        "vae": VAE(VAEConfig(size=32, widths=(8, 16), layers=1, groups=4)),
        "text_encoder": CLIPText(CLIPTextConfig(**text, end=end)),
    }  # fmt: skip
    if xl:
        two = CLIPTextConfig(**text, end=end, head="projection", projection=16, nonlinearity="gelu")
        modules["text_encoder_2"] = CLIPText(two)
    tokens = jnp.zeros((1, CONTEXT), jnp.int32)
    context = jnp.zeros((1, CONTEXT, width * len(texts)))
    inputs: dict[str, tuple[jax.Array, ...]] = {
        "unet": (jnp.zeros((1, 16, 16, 4)), jnp.zeros(1, jnp.int32), context),
        "vae": (jnp.zeros((1, 32, 32, 3)),), "text_encoder": (tokens,), "text_encoder_2": (tokens,),
    }  # fmt: skip
    if xl:
        inputs["unet"] = (*inputs["unet"], jnp.zeros((1, 16)), jnp.zeros((1, 6)))
    params = {name: random_params(module, *inputs[name]) for name, module in modules.items()}
    diffusion.save(folder, Pipeline(modules, params, tokenizers, Noise(), "ddim", xl))
    return folder


def clip(folder: Path) -> Path:
    """As openai/clip-vit-base-patch32."""
    _tokenizer(folder)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos is not None
    text = CLIPTextConfig(tokenizer.vocab_size, CONTEXT, 16, 2, 2, 32, end=tokenizer.eos)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2, hidden=32)
    model = CLIP(CLIPConfig(text, vision, projection=12))
    params = random_params(model, jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 16, 16, 3)))
    models.save(folder, model, params)
    return folder


def _tokenizer(folder: Path) -> None:
    """CLIP's tokenizer without a merge: letters are tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *SPECIAL]
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    roles = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[1], "unk_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **roles}) + "\n")
