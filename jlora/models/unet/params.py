"""The UNet's checkpoints: diffusers' `UNet2DConditionModel`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.models.architecture import Architecture, Head, configured, unsupported, value_of
from jlora.models.fields import shown
from jlora.models.resnet import dotted
from jlora.models.resnet import rows as resnet
from jlora.models.tensors import Leaf, convolution, layered, linear, norm
from jlora.models.unet.modeling import SIZES, UNet, UNetConfig
from jlora.models.unet.targets import TARGETS

CLASS = "UNet2DConditionModel"
KEYS = {
    "size": "sample_size",
    "channels": "in_channels",
    "outputs": "out_channels",
    "layers": "layers_per_block",
    "context_width": "cross_attention_dim",
    "linear_projection": "use_linear_projection",
    "groups": "norm_num_groups",
    "epsilon": "norm_eps",
}
OPTIONAL = {
    "size": 64, "channels": 4, "outputs": 4, "layers": 2, "context_width": 1280, "linear_projection": False,
    "groups": 32, "epsilon": 1e-5,
}  # fmt: skip
DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
ABSENT = (
    "class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type", "time_cond_proj_dim",
    "time_embedding_act_fn", "timestep_post_act", "cross_attention_norm", "reverse_transformer_layers_per_block",
)  # fmt: skip
FIXED: dict[str, Any] = {
    "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "dropout": 0.0,
    "mid_block_scale_factor": 1, "act_fn": "silu", "dual_cross_attention": False, "only_cross_attention": False,
    "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional", "time_embedding_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "class_embeddings_concat": False, "mid_block_only_cross_attention": (
        None, False), "addition_embed_type": (None, "text_time"), "attention_type": "default",
}  # fmt: skip
"""Settings that there is one of here. What a config.json does not say is so, but for those that `read` looks at."""


# -- config.json -------------------------------------------------------------------------------------------------------


def read(json: Mapping[str, Any], head: Head) -> UNetConfig:
    """A UNet's config.json. "attention_head_dim" has the number of heads, there and in all files."""
    unsupported(json, **FIXED, **dict.fromkeys(ABSENT))
    widths = _several(json, "block_out_channels", [320, 640, 1280, 1280])
    attends = [True] * (len(widths) - 1) + [False]
    down = _blocks(json, "down_block_types", DOWN, attends)
    up = _blocks(json, "up_block_types", UP, attends[::-1])
    if up != down[::-1]:
        raise ValueError(
            f"config.json has down_block_types={shown(json.get('down_block_types'))} and up_block_types="
            f"{shown(json.get('up_block_types'))}: attention at different resolutions"
        )
    depths = _each(json, "transformer_layers_per_block", 1, len(widths))
    heads = _each(
        json, "attention_head_dim" if json.get("num_attention_heads") is None else "num_attention_heads", 8, len(widths)
    )
    computed: dict[str, Any] = {
        "widths": widths,
        "depths": tuple(depth if attends else 0 for depth, attends in zip(depths, down, strict=True)),
        "middle": depths[-1],
        "heads": heads,
    }
    if json.get("addition_embed_type") is not None:
        computed |= {
            "added": value_of(json, "projection_class_embeddings_input_dim"),
            "added_time": value_of(json, "addition_time_embed_dim"),
        }
    origins = {
        "widths": "block_out_channels", "depths": "transformer_layers_per_block", "heads": "attention_head_dim",
        "added": "projection_class_embeddings_input_dim", "added_time": "addition_time_embed_dim",
    }  # fmt: skip
    return configured(UNetConfig, json, KEYS, optional=OPTIONAL, origins=origins, head=head, **computed)


def write(c: UNetConfig) -> dict[str, Any]:
    """Keys that `read` reads."""
    attends = [bool(depth) for depth in c.depths]
    names = lambda kinds, order: [next(name for name, own in kinds.items() if own == wanted) for wanted in order]
    entries = {key: getattr(c, name) for name, key in KEYS.items()} | {
        "block_out_channels": list(c.widths),
        "down_block_types": names(DOWN, attends),
        "up_block_types": names(UP, attends[::-1]),
        "transformer_layers_per_block": _written(c),
        "attention_head_dim": list(c.heads),
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "act_fn": "silu",
    }
    if c.added is not None:
        entries |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": c.added_time,
            "projection_class_embeddings_input_dim": c.added,
        }
    return entries


def _written(c: UNetConfig) -> list[int]:
    """Depths, where there is no attention one that diffusers takes: the last is that of the middle, too."""
    depths = [depth or 1 for depth in c.depths]
    if c.depths[-1] not in (0, c.middle):
        raise ValueError(
            f"middle={c.middle} and depths={c.depths}: a config.json has the last depth for both, which have to agree"
        )
    return [*depths[:-1], c.middle]


def _several(json: Mapping[str, Any], key: str, default: list[Any]) -> tuple[Any, ...]:
    value = json.get(key, default)
    if not isinstance(value, list):
        raise ValueError(f"config.json has {key}={shown(value)}, expected a list")
    return tuple(value)


def _each(json: Mapping[str, Any], key: str, default: int, count: int) -> tuple[Any, ...]:
    """One value for each resolution, where a single one may stand for all."""
    value = json.get(key, default)
    value = tuple(value) if isinstance(value, list) else (value,) * count
    if len(value) != count:
        raise ValueError(f"config.json has {key}={shown(json[key])}, expected {count} of them, or one")
    return value


def _blocks(json: Mapping[str, Any], key: str, kinds: Mapping[str, bool], otherwise: list[bool]) -> list[bool]:
    """Whether there is attention at each resolution; as `otherwise` says where the key is not there."""
    if key not in json:
        return otherwise
    names, count = _several(json, key, []), len(otherwise)
    if len(names) != count or not all(isinstance(name, str) and name in kinds for name in names):
        raise ValueError(f"config.json has {key}={shown(list(names))}, expected {count} of {', '.join(kinds)}")
    return [kinds[name] for name in names]


# -- tensors -----------------------------------------------------------------------------------------------------------


def table(c: UNetConfig) -> list[Leaf]:
    """The rows of all parameters."""
    rows = [
        *convolution("conv_in", "conv_in"),
        *_time("time_embedding"),
        *([] if c.added is None else _time("add_embedding")),
    ]
    top = len(c.widths) - 1
    width, shown = c.widths[0], [c.widths[0]]  # channels of what comes in, and of all that the way up is shown
    for i, own in enumerate(c.widths):
        for j in range(c.layers):
            rows += _pair(c, f"down_blocks_{i}", j, c.depths[i], shortcut=width != own)
            width = own
            shown.append(own)
        if i < top:
            rows += _sampler(f"down_blocks_{i}/downsamplers_0")
            shown.append(own)
    rows += [*_pair(c, "mid_block", 0, c.middle), *resnet("mid_block/resnets_1", time=True)]
    for i, own in enumerate(reversed(c.widths)):
        for j in range(c.layers + 1):
            rows += _pair(c, f"up_blocks_{i}", j, c.depths[top - i], shortcut=width + shown.pop() != own)
            width = own
        if i < top:
            rows += _sampler(f"up_blocks_{i}/upsamplers_0")
    return [*rows, *norm("conv_norm_out", "conv_norm_out"), *convolution("conv_out", "conv_out")]


def _pair(c: UNetConfig, within: str, number: int, depth: int, *, shortcut: bool = False) -> list[Leaf]:
    """A residual block, and the attention behind it."""
    rows = resnet(f"{within}/resnets_{number}", time=True, shortcut=shortcut)
    return [*rows, *(_transformer(c, f"{within}/attentions_{number}", depth) if depth else [])]


def _sampler(path: str) -> list[Leaf]:
    return convolution(f"{path}/conv", f"{dotted(path)}.conv")


def _time(name: str) -> list[Leaf]:
    return [row for part in ("linear_1", "linear_2") for row in linear(f"{name}/{part}", f"{name}.{part}")]


def _transformer(c: UNetConfig, path: str, depth: int) -> list[Leaf]:
    key, layer = dotted(path), linear if c.linear_projection else convolution
    inner = f"{key}.transformer_blocks.{{i}}"
    block = [
        *(row for name in ("norm1", "norm2", "norm3") for row in norm(name, f"{inner}.{name}")),
        *(row for name in ("attn1", "attn2") for row in _attention(name, f"{inner}.{name}")),
        *linear("ff/net_0", f"{inner}.ff.net.0.proj"),
        *linear("ff/net_2", f"{inner}.ff.net.2"),
    ]
    blocks = layered(block, depth, scan=c.scan, name="transformer_blocks")
    return [
        *norm(f"{path}/norm", f"{key}.norm"),
        *layer(f"{path}/proj_in", f"{key}.proj_in"),
        *(row._replace(path=f"{path}/{row.path}") for row in blocks),
        *layer(f"{path}/proj_out", f"{key}.proj_out"),
    ]


def _attention(path: str, key: str) -> list[Leaf]:
    rows = [row for name in ("to_q", "to_k", "to_v") for row in linear(f"{path}/{name}", f"{key}.{name}", bias=False)]
    return [*rows, *linear(f"{path}/to_out", f"{key}.to_out.0")]


def _inputs(c: UNetConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    side = 2 ** (len(c.widths) - 1)
    added = () if c.pooled is None else (shape(1, c.pooled), shape(1, SIZES))
    return (shape(1, side, side, c.channels), shape(1), shape(1, 1, c.context_width), *added)


ARCHITECTURE = Architecture(
    model_type=CLASS,
    library="diffusers",
    config=UNetConfig,
    classes={"none": CLASS},
    read=read,
    write=write,
    build=UNet,
    inputs=_inputs,
    table=table,
    layers=(),
    targets=TARGETS,
)
