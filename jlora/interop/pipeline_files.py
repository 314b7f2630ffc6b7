"""Files of kohya and Diffusers against folders: of a pipeline, or of one of its models."""

from collections.abc import Mapping
from pathlib import Path

from jlora.interop import diffusers, kohya, shards
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


def components(kind: str, file: Path, base: Path) -> dict[str, tuple[Layer, ...]]:
    """The layers of a file, by component, with the names of the base's modules."""
    models = models_of(base)
    only = next(iter(models)) if len(models) == 1 else None
    reader = {"kohya": kohya.read, "diffusers": diffusers.read}[kind]
    read = reader(file, models, without=_others(kind, only))
    return {name: tuple(layers) for name, layers in read.layers.items()}


def _others(kind: str, component: str | None) -> str | None:
    """A regular expression of the tensors of other components than the one that is there."""
    if component is None:
        return None
    own = {"unet": "lora_unet", "text_encoder": "lora_te1?_", "text_encoder_2": "lora_te2_"}
    if kind == "kohya":
        return rf"^lora_(?!{own[component].removeprefix('lora_')})"
    return rf"^(?!{component}\.)(?:{'|'.join(COMPONENTS)})\."
