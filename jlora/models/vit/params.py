"""ViT's checkpoints: Hugging Face's `ViTForImageClassification` and `ViTModel`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jlora.models.architecture import Architecture, Head, unsupported
from jlora.models.bert.params import has_pooler
from jlora.models.tensors import CONV, Leaf, layered, leaf, linear, norm
from jlora.models.vit.modeling import ViT, ViTConfig

BODY = "ViTModel"


def read(json: Mapping[str, Any], head: Head) -> ViTConfig:
    """A ViT's config.json."""
    unsupported(json, qkv_bias=True, pooler_act="tanh", pooler_output_size=(json["hidden_size"], None))
    for name in ("image_size", "patch_size"):
        if not isinstance(json[name], int):
            raise ValueError(f"config.json has {name}={json[name]!r}; jlora's model has squares, of one number")
    return ViTConfig(
        image_size=json["image_size"],
        patch_size=json["patch_size"],
        channels=json["num_channels"],
        width=json["hidden_size"],
        layers=json["num_hidden_layers"],
        heads=json["num_attention_heads"],
        hidden=json["intermediate_size"],
        nonlinearity=json.get("hidden_act", "gelu"),
        epsilon=json.get("layer_norm_eps", 1e-12),
        head=head,
        pooler=has_pooler(json, head, BODY),
    )


def write(c: ViTConfig) -> dict[str, Any]:
    """What `read` reads. transformers passes over `add_pooling_layer`, and makes a pooler of its own."""
    return {
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "num_channels": c.channels,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.hidden or 4 * c.width,
        "hidden_act": c.nonlinearity,
        "layer_norm_eps": c.epsilon,
    } | ({"add_pooling_layer": False} if c.head == "none" and not c.pooler else {})


def table(c: ViTConfig) -> list[Leaf]:
    """Its rows."""
    block = [
        *norm("ln_1", "vit.encoder.layer.{i}.layernorm_before"),
        *linear("attn/query", "vit.encoder.layer.{i}.attention.attention.query"),
        *linear("attn/key", "vit.encoder.layer.{i}.attention.attention.key"),
        *linear("attn/value", "vit.encoder.layer.{i}.attention.attention.value"),
        *linear("attn/out", "vit.encoder.layer.{i}.attention.output.dense"),
        *norm("ln_2", "vit.encoder.layer.{i}.layernorm_after"),
        *linear("mlp/fc", "vit.encoder.layer.{i}.intermediate.dense"),
        *linear("mlp/proj", "vit.encoder.layer.{i}.output.dense"),
    ]
    pooler = linear("pooler", "vit.pooler.dense") if c.pooler else []
    return [
        leaf("cls", "vit.embeddings.cls_token"),
        leaf("positions", "vit.embeddings.position_embeddings"),
        leaf("patch/kernel", "vit.embeddings.patch_embeddings.projection.weight", CONV),
        leaf("patch/bias", "vit.embeddings.patch_embeddings.projection.bias"),
        *layered(block, c.layers, scan=c.scan),
        *norm("ln_f", "vit.layernorm"),
        *(linear("head", "classifier") if c.head == "image_classification" else pooler),
    ]


ARCHITECTURE = Architecture(
    model_type="vit",
    config=ViTConfig,
    classes={"none": BODY, "image_classification": "ViTForImageClassification"},
    read=read,
    write=write,
    build=ViT,
    inputs=lambda c: (jnp.zeros((1, c.image_size, c.image_size, c.channels)),),
    table=table,
    prefix="vit.",
    ignored=r"^vit\.pooler\.",  # where none is asked for
    renamed=((r"^pooler\.", "vit.pooler."),),  # by its full name in all classes, so that `ignored` knows it
)
