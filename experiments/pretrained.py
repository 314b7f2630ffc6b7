"""The pretrained base on disk: one safetensors file, whole or absent."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from experiments.config import ConfigError

Params = Any
NAME = "base.safetensors"


def save(folder: Path, params: Params) -> None:
    """Writes the parameters under their paths ("h_0/attn/query/kernel")."""
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{NAME}.tmp"
    save_file({path: np.ascontiguousarray(leaf) for path, leaf in flat.items()}, temporary)
    os.replace(temporary, folder / NAME)


def load(folder: Path, like: Params) -> Params:
    """Reads the parameters of a model that is initialised as `like`.

    Raises:
      ConfigError: if the file is damaged or holds other tensors.
    """
    file = folder / NAME
    try:
        flat = load_file(file)
    except SafetensorError as error:
        raise ConfigError(f"the base in '{file}' is damaged ({error}): delete it to pretrain again") from error
    expected = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(like, sep="/").items()}
    if {path: leaf.shape for path, leaf in flat.items()} != expected:
        raise ConfigError(f"the base in '{file}' has other tensors than the model: delete it to pretrain again")
    return jax.device_put(traverse_util.unflatten_dict(flat, sep="/"))
