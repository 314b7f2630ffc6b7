"""Files of kohya and Diffusers against folders: of a pipeline, or of one of its models."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jlora.interop import diffusers, kohya, shards, tensor_file
from jlora.interop.layer import Layer
from jlora.interop.modules import COMPONENTS
from jlora.models import reading

PIPELINE = "model_index.json"
CLASSES = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}
Shapes = Mapping[str, tuple[int, ...]]


def models_of(base: Path) -> dict[str, Shapes]:
    """The shapes of the tensors of each component: of all in a pipeline's folder, or of the model whose folder it is.

    Raises:
      ValueError: for a model that is none of a pipeline's, as its config.json or the folder's name says.
    """
    if reading.has(base / PIPELINE):
        inner = {name: base / name for name in COMPONENTS if (base / name).is_dir()}
    else:
        inner = {component_of(base): base}
    return {
        name: {key: entry.shape for key, entry in shards.open_checkpoint(folder).entries.items()}
        for name, folder in inner.items()
    }


def component_of(base: Path) -> str:
    """Which model of a pipeline a folder holds: by its config.json, else by its name."""
    config = base / "config.json"
    record = reading.read_json(config) if reading.has(config) else {}
    names = [record.get("_class_name"), *(record.get("architectures") or [])]
    found = [CLASSES[name] for name in names if isinstance(name, str) and name in CLASSES]
    name = base.resolve().name
    if name in COMPONENTS:
        return name
    if not found:
        raise ValueError(
            f"'{base}' is no folder of a pipeline's model: its config.json is of none of {', '.join(CLASSES)}, and its "
            f"name none of {', '.join(COMPONENTS)}"
        )
    return found[0]


class Read(NamedTuple):
    """The layers of a file by component, with the names of the base's modules, and how many tensors were left out."""

    layers: dict[str, tuple[Layer, ...]]
    left_out: int


def components(kind: str, file: Path, base: Path, component: str | None = None) -> Read:
    """The layers of a file.

    Args:
      kind: "kohya" or "diffusers".
      file: of adapters.
      base: the folder of a pipeline, or of one of its models.
      component: the one that is wanted, without those that the file has of others.

    Raises:
      ValueError: if the file adapts models that the base does not hold, and no component is named; if the base does
        not hold the component.
    """
    models = models_of(base)
    if component is not None and component not in models:
        raise ValueError(f"'{base}' has no {component}, but {', '.join(models)}")
    wanted = component or (next(iter(models)) if len(models) == 1 else None)
    without = None if wanted is None else _others(kind, wanted)
    left_out = 0
    if without is not None:
        with tensor_file.open(file) as opened:
            left_out = sum(re.search(without, key) is not None for key in opened.headers)
    if left_out and component is None:
        raise ValueError(
            f"'{base}' holds the {wanted} alone, and {left_out} tensors of '{file}' are of other models: name the "
            f"pipeline's folder, or leave them out by --component {wanted} (component={wanted!r})"
        )
    reader = {"kohya": kohya.read, "diffusers": diffusers.read}[kind]
    read = reader(file, models, without=without)
    if read.tokens and component is None:
        raise ValueError(
            f"'{file}' has embeddings of the new tokens {', '.join(map(repr, read.tokens))}, which are no adapter of a "
            f"model: leave them out by --component {next(iter(read.layers), wanted)}; jlora.{kind}.read gives them"
        )
    left_out += len(read.tokens)
    return Read({name: tuple(layers) for name, layers in read.layers.items()}, left_out)


def _others(kind: str, component: str) -> str:
    """A regular expression of the tensors of other components than one."""
    own = {"unet": "lora_unet", "text_encoder": "lora_te1?_", "text_encoder_2": "lora_te2_"}
    if kind == "kohya":
        return rf"^lora_(?!{own[component].removeprefix('lora_')})"
    return rf"^(?!{component}\.)(?:{'|'.join(COMPONENTS)})\."
