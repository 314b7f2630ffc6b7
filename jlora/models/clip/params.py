"""CLIP's checkpoints: Hugging Face's `CLIPModel`, and those of one tower."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import jax
import jax.numpy as jnp

from jlora.models.architecture import TOKENS, Architecture, Config, Head, configured, object_of, unsupported, value_of
from jlora.models.clip.modeling import (
    CLIP,
    CLIPConfig,
    CLIPText,
    CLIPTextConfig,
    CLIPVision,
    CLIPVisionConfig,
    Tower,
)
from jlora.models.clip.targets import TARGETS
from jlora.models.fields import shown
from jlora.models.tensors import CONV, Leaf, embedding, layered, leaf, linear, norm

SHAPE = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "nonlinearity": "hidden_act",
    "epsilon": "layer_norm_eps",
    "projection": "projection_dim",
}
TEXT = SHAPE | {"vocab_size": "vocab_size", "context": "max_position_embeddings", "end": "eos_token_id"}
VISION = SHAPE | {"image_size": "image_size", "patch_size": "patch_size", "channels": "num_channels"}
BOTH = {"projection": "projection_dim", "temperature": "logit_scale_init_value"}
IGNORED = r"(^|\.)embeddings\.position_ids$"  # a buffer


# -- config.json -------------------------------------------------------------------------------------------------------


def read_text(json: Mapping[str, Any], head: Head) -> CLIPTextConfig:
    """The config.json of a tower for texts. What it does not say is as in transformers, whose defaults are ours."""
    return _read(CLIPTextConfig, json, TEXT, head, "end")


def write_text(c: CLIPTextConfig) -> dict[str, Any]:
    """Keys that `read_text` reads."""
    return _write(c, TEXT)


def read_vision(json: Mapping[str, Any], head: Head) -> CLIPVisionConfig:
    """The config.json of a tower for images."""
    return _read(CLIPVisionConfig, json, VISION, head, "image_size", "patch_size")


def write_vision(c: CLIPVisionConfig) -> dict[str, Any]:
    """Keys that `read_vision` reads."""
    return _write(c, VISION)


def read(json: Mapping[str, Any], head: Head) -> CLIPConfig:
    """The config.json of both. Older ones say things twice: "text_config_dict" goes before "text_config"."""
    names = [f"{name}_config" for name in ("text", "vision")]
    names = [name if json.get(f"{name}_dict") is None else f"{name}_dict" for name in names]
    for name in names:
        value_of(json, name)
    (text, towers), (vision, images) = ((object_of(json, name), f"{name}.") for name in names)
    unsupported(text, model_type="clip_text_model")
    unsupported(vision, model_type="clip_vision_model")
    return _read(
        CLIPConfig, json, BOTH, head,
        text=_read(CLIPTextConfig, text, TEXT, "none", "end", within=towers),
        vision=_read(CLIPVisionConfig, vision, VISION, "none", "image_size", "patch_size", within=images),
    )  # fmt: skip


def write(c: CLIPConfig) -> dict[str, Any]:
    """Keys that `read` reads."""
    return _write(c, BOTH) | {
        "text_config": {"model_type": "clip_text_model"} | write_text(c.text),
        "vision_config": {"model_type": "clip_vision_model"} | write_vision(c.vision),
    }


def _read(
    kind: type[Config],
    json: Mapping[str, Any],
    keys: Mapping[str, str],
    head: Head,
    *numbers: str,
    within: str = "",
    **computed: Any,
) -> Config:
    """A config whose fields all have defaults; `numbers` are those that other models have several of."""
    for name in numbers:
        found = json.get(keys[name], 0)
        if not isinstance(found, int):
            raise ValueError(f"config.json has {within}{keys[name]}={shown(found)}; jlora's model has one number")
    defaults = {field.name: field.default for field in fields(cast(Any, kind)) if field.name in keys}
    return configured(kind, json, keys, optional=defaults, within=within, head=head, **computed)


def _write(c: Tower | CLIPConfig, names: Mapping[str, str]) -> dict[str, Any]:
    return {name: getattr(c, field) for field, name in names.items()}


# -- tensors -----------------------------------------------------------------------------------------------------------


def text_table(c: CLIPTextConfig) -> list[Leaf]:
    """The rows of a tower for texts."""
    return [
        *embedding("wte", "text_model.embeddings.token_embedding"),
        *embedding("wpe", "text_model.embeddings.position_embedding"),
        *_blocks(c, "text_model"),
        *norm("ln_f", "text_model.final_layer_norm"),
        *(linear("projection", "text_projection", bias=False) if c.head == "projection" else []),
    ]


def vision_table(c: CLIPVisionConfig) -> list[Leaf]:
    """The rows of a tower for images."""
    return [
        leaf("cls", "vision_model.embeddings.class_embedding"),
        leaf("patch/kernel", "vision_model.embeddings.patch_embedding.weight", CONV),
        *embedding("wpe", "vision_model.embeddings.position_embedding"),
        *norm("ln_e", "vision_model.pre_layrnorm"),  # as it is spelt
        *_blocks(c, "vision_model"),
        *norm("ln_f", "vision_model.post_layernorm"),
        *(linear("projection", "visual_projection", bias=False) if c.head == "projection" else []),
    ]


def table(c: CLIPConfig) -> list[Leaf]:
    """The rows of both."""
    towers = {"text": text_table(c.text_tower), "vision": vision_table(c.vision_tower)}
    rows = [row._replace(path=f"{name}/{row.path}") for name, tower in towers.items() for row in tower]
    return [*rows, leaf("logit_scale", "logit_scale")]


def _blocks(c: Tower, name: str) -> list[Leaf]:
    layer = f"{name}.encoder.layers.{{i}}"
    block = [
        *norm("ln_1", f"{layer}.layer_norm1"),
        *linear("attn/query", f"{layer}.self_attn.q_proj"),
        *linear("attn/key", f"{layer}.self_attn.k_proj"),
        *linear("attn/value", f"{layer}.self_attn.v_proj"),
        *linear("attn/out", f"{layer}.self_attn.out_proj"),
        *norm("ln_2", f"{layer}.layer_norm2"),
        *linear("mlp/fc", f"{layer}.mlp.fc1"),
        *linear("mlp/proj", f"{layer}.mlp.fc2"),
    ]
    return layered(block, c.layers, scan=c.scan)


def _images(c: CLIPVisionConfig) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, c.image_size, c.image_size, c.channels), jnp.float32)


TEXT_ARCHITECTURE = Architecture(
    model_type="clip_text_model",
    config=CLIPTextConfig,
    classes={"none": "CLIPTextModel", "projection": "CLIPTextModelWithProjection"},
    read=read_text,
    write=write_text,
    build=CLIPText,
    inputs=lambda c: (TOKENS,),
    table=text_table,
    targets=TARGETS,
    prefix="text_model.",
    modules=((r"^text_model\.", ""),),
    bare=False,  # transformers 4 knows no others; 5 reads both
    ignored=IGNORED,
)
VISION_ARCHITECTURE = Architecture(
    model_type="clip_vision_model",
    config=CLIPVisionConfig,
    classes={"none": "CLIPVisionModel", "projection": "CLIPVisionModelWithProjection"},
    read=read_vision,
    write=write_vision,
    build=CLIPVision,
    inputs=lambda c: (_images(c),),
    table=vision_table,
    prefix="vision_model.",
    modules=((r"^vision_model\.", ""),),
    bare=False,  # transformers 4 knows no others; 5 reads both
    ignored=IGNORED,
)
ARCHITECTURE = Architecture(
    model_type="clip",
    config=CLIPConfig,
    classes={"none": "CLIPModel"},
    read=read,
    write=write,
    build=CLIP,
    inputs=lambda c: (TOKENS, _images(c.vision)),
    table=table,
    ignored=IGNORED,
    layers=(("text/", "text_config.num_hidden_layers"), ("vision/", "vision_config.num_hidden_layers")),
)
ARCHITECTURES = (ARCHITECTURE, TEXT_ARCHITECTURE, VISION_ARCHITECTURE)
