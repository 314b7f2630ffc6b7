"""ViT's checkpoints: Hugging Face's `ViTForImageClassification` and `ViTModel`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.models.architecture import Architecture, Head, configured, unsupported, value_of
from jlora.models.bert.params import has_pooler
from jlora.models.fields import shown
from jlora.models.tensors import CONV, Leaf, layered, leaf, linear, norm
from jlora.models.vit.modeling import ViT, ViTConfig

BODY = "ViTModel"
KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "channels": "num_channels",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "nonlinearity": "hidden_act",
    "epsilon": "layer_norm_eps",
}
OPTIONAL = {"nonlinearity": "gelu", "epsilon": 1e-12}


def read(json: Mapping[str, Any], head: Head) -> ViTConfig:
    """A ViT's config.json."""
    unsupported(json, qkv_bias=True, pooler_act="tanh")
    for name in ("image_size", "patch_size"):
        if not isinstance(value_of(json, name), int):
            raise ValueError(f"config.json has {name}={shown(json[name])}; jlora's model has squares, of one number")
    config = configured(
        ViTConfig, json, KEYS, optional=OPTIONAL, head=head, pooler=has_pooler(json, head, BODY)
    )  # fmt: skip
    unsupported(json, pooler_output_size=(config.width, None))
    return config


def write(c: ViTConfig) -> dict[str, Any]:
    """Keys that `read` reads. transformers passes over `add_pooling_layer`, and makes a pooler of its own."""
    entries = {key: getattr(c, name) for name, key in KEYS.items()} | {KEYS["hidden"]: c.hidden or 4 * c.width}
    return entries | ({"add_pooling_layer": False} if c.head == "none" and not c.pooler else {})


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
    inputs=lambda c: (jax.ShapeDtypeStruct((1, c.image_size, c.image_size, c.channels), jnp.float32),),
    table=table,
    prefix="vit.",
    ignored=r"^vit\.pooler\.",  # where none is asked for
    modules=(
        (r"\bencoder\.layer\.(\d+)\.", r"layers.\1."),
        (r"\battention\.attention\.(query|key|value)\b", lambda m: f"attention.{m[1][0]}_proj"),
        (r"\battention\.output\.dense\b", "attention.o_proj"),
        (r"\bintermediate\.dense\b", "mlp.fc1"),
        (r"(layers\.\d+)\.output\.dense\b", r"\1.mlp.fc2"),
    ),
    renamed=((r"^pooler\.", "vit.pooler."),),  # by its full name in all classes, so that `ignored` knows it
)
