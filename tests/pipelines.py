"""Stable Diffusion's models by the shapes of their tensors, from golden/make_modules.py: whole, and with few channels."""

import functools
import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jlora.interop import modules

MODULES = Path(__file__).parent / "golden" / "diffusers" / "modules"
PIPELINES = {
    "sd15": {"unet": "unet_sd15", "text_encoder": "text_vit_l"},
    "sd21": {"unet": "unet_sd21", "text_encoder": "text_vit_h"},
    "sdxl": {"unet": "unet_sdxl", "text_encoder": "text_vit_l", "text_encoder_2": "text_big_g"},
}


@functools.cache
def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors by key."""
    found: dict[str, tuple[int, ...]] = {}
    for line in gzip.decompress((MODULES / f"{model}.jsonl.gz").read_bytes()).decode().splitlines():
        layer = json.loads(line)
        found[f"{layer['name']}.weight"] = tuple(layer["weight"])
        if layer["bias"]:
            found[f"{layer['name']}.bias"] = (layer["weight"][0],)
    return found


def whole(pipeline: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of a pipeline's tensors by component."""
    return {component: dict(shapes(model)) for component, model in PIPELINES[pipeline].items()}


def small(pipeline: str, keep: Callable[[str], bool] = lambda key: True) -> dict[str, dict[str, tuple[int, ...]]]:
    """A pipeline with a fortieth of the channels: 320 are 8, and the texts of SD 1.x, of SD 2.x and of SDXL have 19, 25, 51."""
    return {
        component: {key: tuple(n // 40 if n >= 320 else n for n in shape) for key, shape in own.items() if keep(key)}
        for component, own in whole(pipeline).items()
    }


def normal(shape: Iterable[int], seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Random numbers."""
    return np.random.default_rng(seed).normal(size=tuple(shape)).astype(dtype)


def low_rank(shape: tuple[int, ...], rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A (r, in, *window) and B (out, r, 1, ...) of a weight (out, in, *window)."""
    return normal((rank, *shape[1:]), seed), normal((shape[0], rank, *[1] * (len(shape) - 2)), seed + 1)


def weights(models: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, list[str]]:
    """The modules of each component that are linear or convolutions."""
    return {
        component: [
            key.removesuffix(".weight")
            for key, shape in own.items()
            if key.endswith(".weight") and len(shape) > 1 and "embeddings." not in key
        ]
        for component, own in models.items()
    }


def exactly(text: str) -> str:
    """A pattern for `pytest.raises` that matches this text alone."""
    return rf"\A{re.escape(text)}\Z"


def placed(models: dict) -> tuple[dict, dict, dict]:
    """The shapes of a pipeline's tensors, parameters of a JAX model of them, and its key tables."""
    names = {component: modules.table(shapes) for component, shapes in models.items()}
    params: dict = {}
    for component, rows in names.items():
        for i, row in enumerate(rows):
            tensor = normal(models[component][row.keys[0]], 100 + i)
            *path, last = [component, *row.path.split("/")]
            at = params
            for part in path:
                at = at.setdefault(part, {})
            at[last] = jnp.asarray(tensor.transpose(row.order) if row.order else tensor)
    return models, params, names
