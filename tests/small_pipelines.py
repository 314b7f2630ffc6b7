"""Tiny pipelines of Stable Diffusion as folders, from golden/make_pipelines.py: weights by its rule, and what diffusers makes."""

import functools
import json
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from jlora.models.checkpoint import described
from jlora.models.tensors import tensor_shape

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("sd1", "sd2", "sdxl", "paint")
PIECES = GOLDEN / "models" / "tokenizers" / "clip"


def drawn(component: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a checkpoint, by the rule of make_pipelines.py."""
    values = 0.2 * np.random.RandomState(zlib.crc32(f"{component}.{key}".encode())).standard_normal(shape)
    values += len(shape) == 1 and key.endswith(".weight")
    if component == "vae" and key.startswith("quant_conv"):
        values[shape[0] // 2 :] = -60.0 if len(shape) == 1 else 0.0
    if component == "unet" and key.startswith("conv_out"):
        values *= 0.1
    return values.astype(np.float32)


def shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a part by its config.json."""
    architecture, config = described(file)
    tree = jax.eval_shape(architecture.build(config).init, jax.random.key(0), *architecture.inputs(config))["params"]
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {key: tensor_shape(row, flat[row.path].shape) for row in architecture.table(config) for key in row.keys}


def write(family: str, folder: Path) -> Path:
    """A folder that diffusers could have saved."""
    shutil.copytree(GOLDEN / "pipelines" / family, folder, ignore=shutil.ignore_patterns("golden.npz", "cases.json"))
    texts = GOLDEN / "prompts" / ("sd1" if family == "paint" else family)
    for path in texts.glob("*_encoder*"):
        shutil.copytree(path, folder / path.name)
    for path in texts.glob("tokenizer*"):
        shutil.copytree(path, folder / path.name)
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(PIECES / name, folder / path.name)
    for part in ("unet", "vae"):
        shapes = shapes_of(folder / part / "config.json")
        tensors = {key: drawn(part, key, shape) for key, shape in shapes.items()}
        save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


@functools.cache
def golden(family: str) -> dict[str, np.ndarray]:
    """The arrays of a family, channels last."""
    found = np.load(GOLDEN / "pipelines" / family / "golden.npz")
    return {name: found[name].transpose(0, 2, 3, 1) for name in found.files}


@functools.cache
def cases(family: str) -> dict:
    return json.loads((GOLDEN / "pipelines" / family / "cases.json").read_text())
