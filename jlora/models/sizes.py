"""Models without their parameters: by the name of a published size, or by a config.json alone."""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from jlora.models import bert, clip, deberta, files, gpt2, llama, roberta, unet, vae, vit
from jlora.models.architecture import Architecture
from jlora.models.catalogue import architecture_of
from jlora.models.checkpoint import described

PRESETS: dict[str, Any] = {
    name: config
    for package in (gpt2, llama, bert, roberta, deberta, vit, clip, unet, vae)
    for name, config in package.PRESETS.items()
}

HUB = re.compile(r"[\w.-]+/[\w.-]+(?<!\.json)")  # owner/name


def model_of(name: str, **options: Any) -> tuple[nn.Module, tuple[jax.ShapeDtypeStruct, ...]]:
    """A model, and shapes of arguments to initialise it with: nothing is allocated, no tensors are read.

    Args:
      name: of a published size, "llama-3.1-8b"; the path of a config.json, or of a folder with one; or the hub's name
        of a repository, "owner/name", of which config.json alone is fetched.
      options: fields of the model's config.

    Raises:
      FileNotFoundError: if there is neither.
      ValueError: for an architecture that jlora has not.

    >>> model_of("gpt2-xl")[0].config.layers
    48
    """
    path = Path(name)
    if name in PRESETS:
        config = PRESETS[name]
        architecture = architecture_of(config)
        assert architecture is not None
        return _built(architecture, config, options)
    if HUB.fullmatch(name) and not path.exists():
        path = files.folder_of(name, wanted=(files.CONFIG,))
    file = path / files.CONFIG if path.is_dir() else path
    if not file.exists():
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise FileNotFoundError(
            f"{name!r} is no published size, no folder and no config.json; the nearest size is {near!r}"
        )
    return _built(*described(file), options)


def _built(
    architecture: Architecture, config: Any, options: dict[str, Any]
) -> tuple[nn.Module, tuple[jax.ShapeDtypeStruct, ...]]:
    known = {field.name for field in dataclasses.fields(config)}
    config = dataclasses.replace(config, **{name: value for name, value in options.items() if name in known})
    return architecture.build(config), architecture.inputs(config)
