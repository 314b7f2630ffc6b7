"""The autoencoder's checkpoints: diffusers' `AutoencoderKL`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.models.architecture import Architecture, Head, configured, unsupported
from jlora.models.fields import shown
from jlora.models.resnet import dotted
from jlora.models.resnet import rows as resnet
from jlora.models.tensors import Leaf, convolution, linear, norm
from jlora.models.vae.modeling import VAE, VAEConfig

CLASS = "AutoencoderKL"
KEYS = {
    "size": "sample_size",
    "channels": "in_channels",
    "latents": "latent_channels",
    "layers": "layers_per_block",
    "groups": "norm_num_groups",
    "scaling": "scaling_factor",
    "upcast": "force_upcast",
}
OPTIONAL = {
    "size": 32, "channels": 3, "latents": 4, "layers": 1, "groups": 32, "scaling": 0.18215, "upcast": True,
}  # fmt: skip
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
RENAMED = tuple(
    (rf"(mid_block\.attentions\.0)\.{old}\.", rf"\1.{new}.")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
)
"""The files of Stable Diffusion 1.x and 2.x, and the newer ones."""


# -- config.json -------------------------------------------------------------------------------------------------------


def read(json: Mapping[str, Any], head: Head) -> VAEConfig:
    """An autoencoder's config.json."""
    widths = json.get("block_out_channels", [64])
    if not isinstance(widths, list):
        raise ValueError(f"config.json has block_out_channels={shown(widths)}, expected a list")
    unsupported(
        json, act_fn="silu", shift_factor=(None, 0.0), latents_mean=None, latents_std=None, use_quant_conv=True,
        mid_block_add_attention=True, use_post_quant_conv=True, out_channels=json.get("in_channels", 3),
        down_block_types=[DOWN] * len(widths), up_block_types=[UP] * len(widths),
    )  # fmt: skip
    return configured(
        VAEConfig, json, KEYS, optional=OPTIONAL, origins={"widths": "block_out_channels"}, head=head,
        widths=tuple(widths),
    )  # fmt: skip


def write(c: VAEConfig) -> dict[str, Any]:
    """Keys that `read` reads."""
    return {key: getattr(c, name) for name, key in KEYS.items()} | {
        "out_channels": c.channels,
        "block_out_channels": list(c.widths),
        "down_block_types": [DOWN] * len(c.widths),
        "up_block_types": [UP] * len(c.widths),
        "act_fn": "silu",
    }


# -- tensors -----------------------------------------------------------------------------------------------------------


def table(c: VAEConfig) -> list[Leaf]:
    """The rows of all parameters."""
    return [
        *_side("encoder", c.widths, c.layers, "down_blocks", "downsamplers_0"),
        *convolution("quant_conv", "quant_conv"),
        *convolution("post_quant_conv", "post_quant_conv"),
        *_side("decoder", c.widths[::-1], c.layers + 1, "up_blocks", "upsamplers_0"),
    ]


def _side(side: str, widths: tuple[int, ...], layers: int, blocks: str, sampler: str) -> list[Leaf]:
    rows = [*convolution(f"{side}/conv_in", f"{side}.conv_in"), *_middle(f"{side}/mid_block")]
    width = widths[0]
    for i, own in enumerate(widths):
        for j in range(layers):
            rows += resnet(f"{side}/{blocks}_{i}/resnets_{j}", shortcut=width != own)
            width = own
        if i + 1 < len(widths):
            path = f"{side}/{blocks}_{i}/{sampler}"
            rows += convolution(f"{path}/conv", f"{dotted(path)}.conv")
    return [
        *rows,
        *norm(f"{side}/conv_norm_out", f"{side}.conv_norm_out"),
        *convolution(f"{side}/conv_out", f"{side}.conv_out"),
    ]


def _middle(path: str) -> list[Leaf]:
    own, key = f"{path}/attentions_0", f"{dotted(path)}.attentions.0"
    return [
        *resnet(f"{path}/resnets_0"),
        *norm(f"{own}/group_norm", f"{key}.group_norm"),
        *(row for name in ("to_q", "to_k", "to_v") for row in linear(f"{own}/{name}", f"{key}.{name}")),
        *linear(f"{own}/to_out", f"{key}.to_out.0"),
        *resnet(f"{path}/resnets_1"),
    ]


def _inputs(c: VAEConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct((1, c.factor, c.factor, c.channels), jnp.float32),)


ARCHITECTURE = Architecture(
    model_type=CLASS,
    library="diffusers",
    config=VAEConfig,
    classes={"none": CLASS},
    read=read,
    write=write,
    build=VAE,
    inputs=_inputs,
    table=table,
    renamed=RENAMED,
    layers=(),
)
