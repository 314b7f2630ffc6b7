"""The modules of a pipeline's models, and each name that files have for them, as tables built from the models' own.

A model is told by the shapes of its tensors, "mid_block.attentions.0.proj_in.weight" -> (320, 320, 1, 1), in torch's
order of axes. Every spelling is made forwards, from the module to the name, and looked up: which underscores of a name
were dots, the name does not say.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jlora import tree
from jlora.models.tensors import CONV, Leaf, leaf, linear, norm, tensor_shape
from jlora.models.unet.ldm import ldm_names

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


class Base(NamedTuple):
    """A family of models.

    Attributes:
      name: what people call it.
      width: of the texts that its UNet attends to.
      version: kohya's `ss_base_model_version`.
      architecture: modelspec's.
    """

    name: str
    width: int
    version: str
    architecture: str


BASES = (
    Base("SD 1.x", 768, "sd_v1", "stable-diffusion-v1"),
    Base("SD 2.x", 1024, "sd_v2", "stable-diffusion-v2-512"),
    Base("SDXL", 2048, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
)


class Name(NamedTuple):
    """A module of a component: what a name in a file stands for."""

    component: str
    module: str


# -- models ------------------------------------------------------------------------------------------------------------


def shapes_of(params: Any, rows: Iterable[Leaf]) -> dict[str, Shape]:
    """The shapes of a checkpoint's tensors, by the model's parameters and its key table.

    Raises:
      ValueError: if a row of the table is not among the parameters.
    """
    named, _ = tree.leaves(params)
    rows = list(rows)
    missing = [row.path for row in rows if row.path not in named]
    if missing:
        raise ValueError(f"{len(missing)} rows of the key table are no parameters, the first {missing[0]!r}")
    return {key: tensor_shape(row, tuple(np.shape(named[row.path]))) for row in rows for key in row.keys}


def table(shapes: Shapes) -> list[Leaf]:
    """The key table of a UNet whose parameters have torch's path with slashes, and Flax's names and orders of axes.

    >>> table({"conv_in.weight": (8, 4, 3, 3), "conv_in.bias": (8,)})[0]
    Leaf(path='conv_in/kernel', keys=('conv_in.weight',), order=(2, 3, 1, 0), part=None, stacked=False)
    """
    rows: list[Leaf] = []
    for module, own in parameters(shapes).items():
        path, axes = module.replace(".", "/"), len(own.get("weight", ()))
        if axes == 4:
            rows.append(leaf(f"{path}/kernel", f"{module}.weight", CONV))
            rows += [leaf(f"{path}/bias", f"{module}.bias")] if "bias" in own else []
        elif axes == 2:
            rows += linear(path, module, bias="bias" in own)
        elif axes == 1:
            rows += norm(path, module)
        else:
            raise ValueError(f"{module!r} has a weight of {axes} axes: no layer of a UNet has")
    return rows


def parameters(shapes: Shapes) -> dict[str, dict[str, Shape]]:
    """The parameters of each module: "conv_in" -> {"weight": (320, 4, 3, 3), "bias": (320,)}."""
    found: dict[str, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        module, _, parameter = key.rpartition(".")
        found.setdefault(module, {})[parameter] = tuple(shape)
    return found


def context_width(shapes: Shapes) -> int | None:
    """Width of the texts that a UNet attends to; None of another model."""
    found = (shape[1] for key, shape in shapes.items() if key.split(".")[-3:] == ["attn2", "to_k", "weight"])
    return next(found, None)


def base_of(models: Mapping[str, Shapes]) -> Base | None:
    """The family of a pipeline; None of one that its modules do not tell."""
    if is_xl(models):
        return BASES[2]
    width = context_width(models.get("unet", {}))
    return next((base for base in BASES[:2] if base.width == width), None)


def is_xl(models: Mapping[str, Shapes]) -> bool:
    """Whether a pipeline is SDXL's: of two text encoders, or with a UNet that is told the size of the image."""
    unet = models.get("unet", {})
    added = any(key.split(".")[0] == "add_embedding" for key in unet)
    return "text_encoder_2" in models or added or context_width(unet) == BASES[2].width


def check_components(names: Iterable[str]) -> None:
    """Raises ValueError for a component that is none of a Stable Diffusion pipeline's."""
    unknown = [name for name in names if name not in COMPONENTS]
    if unknown:
        raise ValueError(f"{unknown} are no components of a pipeline; expected of {list(COMPONENTS)}")


# -- spellings ---------------------------------------------------------------------------------------------------------

ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v"}


def text_spellings(module: str) -> tuple[str, ...]:
    """A text encoder's module with `text_model.` and without, as versions of transformers differ; with it first."""
    parts = module.split(".")
    inner = parts[1:] if parts[0] == "text_model" else parts
    if inner[0] not in ("embeddings", "encoder", "final_layer_norm"):
        return (module,)  # text_projection stands outside
    return ".".join(["text_model", *inner]), ".".join(inner)


def processor_spellings(module: str) -> tuple[str, ...]:
    """The names of an attention's projections in files of attention processors, which had the factors beside them."""
    match module.split("."):
        case [*above, "to_q" | "to_k" | "to_v" as name]:
            return (".".join([*above, "processor", f"{name}_lora"]),)
        case [*above, "to_out", "0"]:
            return (".".join([*above, "processor", "to_out_lora"]),)
        case [*above, "q_proj" | "k_proj" | "v_proj" as name]:
            return (".".join([*above, f"{ATTENTION[name]}_lora"]),)
        case [*above, "out_proj"]:
            return (".".join([*above, "to_out_lora"]),)
    return ()


def spellings(component: str, modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs (dotted name, module): a component's modules in every spelling, that of `written` first."""
    modules = list(modules)
    authors = ldm_names(modules) if component == "unet" else {}
    for module in modules:
        names = (module,) if component == "unet" else text_spellings(module)
        yield from ((name, module) for name in names)
        if module in authors:
            yield authors[module], module


def lookup(pairs: Iterable[tuple[str, Name]]) -> dict[str, Name]:
    """A table of names.

    Raises:
      ValueError: if one name stands for two modules.
    """
    found: dict[str, Name] = {}
    for name, target in pairs:
        if found.setdefault(name, target) != target:
            raise ValueError(f"{name!r} is a name of two modules, {found[name].module!r} and {target.module!r}")
    return found


def described(width: int) -> str:
    """A width of texts, and the family that has it.

    >>> described(2048)
    '2048 (SDXL)'
    """
    known = [f" ({base.name})" for base in BASES if base.width == width]
    return f"{width}{''.join(known)}"
