"""Checkpoints in one .safetensors file, in the layout of the authors' code: UNet, autoencoder and text encoders."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util

from jlora.models import checkpoint, clip, files, place, quantised, unet, vae
from jlora.models.catalogue import architecture_of
from jlora.models.clip.modeling import CLIPText, CLIPTextConfig
from jlora.models.diffusion.noise import Noise
from jlora.models.diffusion.pipeline import Pipeline, check_parts, table_of
from jlora.models.diffusion.prompts import with_tokenizer
from jlora.models.tensors import LINEAR, Leaf, Part, embedding, layered, leaf, linear, norm
from jlora.models.tokenizer import Tokenizer
from jlora.models.unet.ldm import ldm_names

UNET, VAE = "model.diffusion_model.", "first_stage_model."
PAD = "!"  # of OpenCLIP's encoders


class Family(NamedTuple):
    """A family of models.

    Attributes:
      name: people call it by.
      unet, vae: their configs.
      texts: part -> (the encoder's config, prefix of its keys, whether they have OpenCLIP's names).
      noise: that its UNet was trained with, None where the family has several.
    """

    name: str
    unet: unet.UNetConfig
    vae: vae.VAEConfig
    texts: Mapping[str, tuple[CLIPTextConfig, str, bool]]
    noise: Noise | None


VIT_L, VIT_H, BIG_G = (
    clip.PRESETS[name] for name in ("clip-vit-l-text", "openclip-vit-h-text", "openclip-vit-bigg-text")
)
FAMILIES = (
    Family(
        "Stable Diffusion 1.x", unet.PRESETS["sd15"], vae.PRESETS["sd15-vae"],
        {"text_encoder": (VIT_L, "cond_stage_model.transformer.", False)}, Noise(),
    ),
    Family(
        "Stable Diffusion 2.x", unet.PRESETS["sd21"], vae.PRESETS["sd15-vae"],
        {"text_encoder": (VIT_H, "cond_stage_model.model.", True)}, None,
    ),
    Family(
        "SDXL", unet.PRESETS["sdxl"], vae.PRESETS["sdxl-vae"],
        {
            "text_encoder": (VIT_L, "conditioner.embedders.0.transformer.", False),
            "text_encoder_2": (BIG_G, "conditioner.embedders.1.model.", True),
        },
        Noise(),
    ),
)  # fmt: skip


def load_file(
    file: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str],
    noise: Noise | None = None,
    configs: Mapping[str, Any] | None = None,
    parts: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Pipeline:
    """A pipeline from one .safetensors file, as hubs and Civitai have them. Its tensors say which family it is of.

    Args:
      file: the checkpoint; its tensors go to the devices one by one.
      tokenizer: a folder with CLIP's vocab.json and merges.txt, which no such file has: that of any pipeline's.
      noise: that the UNet was trained with. None for the family's; Stable Diffusion 2.x has two, which the file does
        not tell: `Noise()` for 512 pixels, `Noise(prediction="v_prediction")` for 768.
      configs: part -> its config, of models of other shapes than the published ones.
      parts, options: as in `load`: `dtype`, `param_dtype`, `scan`, `remat`, `attention`, `sharding`, `quantize`,
        `block`, `double`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a damaged file, one of no family that there is, tensors that are missing, unexpected or misshaped,
        all of a part in one error; for Stable Diffusion 2.x without `noise`.
    """
    path = place.folder_of(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'")
    found = files.headers(path)
    family = family_of(found, f"'{path}'")
    for name, own in (("parts", parts), ("configs", configs)):
        known = ["unet", "vae", *family.texts]
        unknown = sorted(set(own or {}) - set(known))
        if unknown:
            raise ValueError(
                f"load_file: {name}= speaks of {unknown[0]!r}; the parts of '{path}' are {', '.join(known)}"
            )
    noise = noise or _marked(found, f"'{path}'")
    if noise is None and family.noise is None:
        raise ValueError(
            f"'{path}' is of {family.name}, and no tensor says what its UNet predicts: pass noise=Noise() (512 pixels) "
            "or noise=Noise(prediction='v_prediction') (768 pixels), of jlora.models.diffusion"
        )
    xl, read = "text_encoder_2" in family.texts, {}
    for part, (kind, config, prefix, table, ignored) in _parts(family, found, configs or {}).items():
        own = {**options, **(parts or {}).get(part, {})}
        tensors = {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}
        read[part] = _read(f"the {part} in '{path}'", kind, config, table, tensors, ignored, own)
    tokenizers = {
        part: Tokenizer.load(tokenizer, pad=PAD if named_by_open_clip else None)
        for part, (_, _, named_by_open_clip) in family.texts.items()
    }
    modules: dict[str, Any] = {part: module for part, (module, _) in read.items()}
    modules |= {part: with_tokenizer(modules[part], own) for part, own in tokenizers.items()}
    check_parts(modules, xl=xl, what=f"'{path}'")
    params = {part: own for part, (_, own) in read.items()}
    sampler = "euler" if xl else "pndm" if noise in (None, Noise()) else "ddim"
    return Pipeline(modules, params, tokenizers, noise or family.noise or Noise(), sampler, xl)


def _marked(found: Mapping[str, files.Tensor], what: str) -> Noise | None:
    """The noise that tensors speak of which some files have for that; None where there are none."""
    if "edm_mean" in found:
        raise ValueError(f"{what} is of a UNet of EDM's noise (edm_mean, edm_std), which jlora has not")
    if "v_pred" not in found:
        return None
    plain = Noise(prediction="v_prediction")
    return dataclasses.replace(plain, zero_snr=True, spacing="trailing") if "ztsnr" in found else plain


def family_of(found: Mapping[str, files.Tensor], what: str) -> Family:
    """The family of a checkpoint by its tensors. Raises a ValueError if it is of none."""
    attends = any(key.startswith(UNET) and key.endswith("attn2.to_k.weight") for key in found)
    texts = {"SDXL": "conditioner.embedders.1.", "Stable Diffusion 2.x": "cond_stage_model.model."}
    for family in reversed(FAMILIES):
        own = texts.get(family.name, "cond_stage_model.transformer.")
        if attends and any(key.startswith(own) for key in found):
            return family
    start = sorted(found)[:3]
    raise ValueError(
        f"{what} is no checkpoint of {', '.join(family.name for family in FAMILIES)} in one file: a UNet under "
        f"{UNET!r} and its text encoder are not both there; its keys begin with {start}. A part of a folder is loaded "
        "with its folder: load(folder)"
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def _parts(
    family: Family, found: Mapping[str, files.Tensor], configs: Mapping[str, Any]
) -> dict[str, tuple[type[nn.Module], Any, str, Callable[[Any], list[Leaf]], str]]:
    """Of each part the module, config, prefix of keys, key table, and a pattern of keys that are not read."""
    channels = found.get(f"{UNET}input_blocks.0.0.weight")
    painting = channels is not None and channels.shape[1:2] == (9,)
    first = dataclasses.replace(family.unet, channels=9) if painting else family.unet
    known: dict[str, Any] = {
        "unet": (unet.UNet, first, UNET, unet_table, r"(?!)"),
        "vae": (vae.VAE, family.vae, VAE, vae_table, r"^(loss|model_ema)\."),
    }
    for part, (config, prefix, by_open_clip) in family.texts.items():
        layers = configs.get(part, config).layers
        ignored = rf"position_ids$|^logit_scale$|^text_projection$|^attn_mask$|^transformer\.resblocks\.{layers}\."
        known[part] = (CLIPText, config, prefix, open_clip_table if by_open_clip else _text_table, ignored)
    return {part: (own[0], configs.get(part, own[1]), *own[2:]) for part, own in known.items()}


def _read(
    what: str,
    kind: type[nn.Module],
    config: Any,
    table: Callable[[Any], list[Leaf]],
    found: Mapping[str, files.Tensor],
    ignored: str,
    options: Mapping[str, Any],
) -> tuple[nn.Module, Any]:
    """A part's module and parameters."""
    of_load = {name: value for name, value in options.items() if name in ("quantize", "block", "double", "sharding")}
    if not found:
        raise ValueError(f"{what}: there are no tensors of it in the file; give a folder, or a file that has all parts")
    given = {name: value for name, value in options.items() if name not in of_load}
    config = checkpoint.configured_for(config, found, given, what=what, call="load_file")
    module: Any = kind(config)
    rows, architecture = table(config), architecture_of(config)
    assert architecture is not None
    known = {key for row in rows for key in row.keys}
    read = checkpoint.parameters(
        rows, checkpoint.shapes_of(module, architecture.inputs(config)), found, what=f"{what} does not fit",
        optional=[key for key in found if key not in known and re.search(ignored, key)],
        sharding=of_load.get("sharding"),
        choose=quantised.choice(of_load.get("quantize"), of_load.get("block"), of_load.get("double")),
    )  # fmt: skip
    return module, traverse_util.unflatten_dict(read, sep="/")


# -- key tables --------------------------------------------------------------------------------------------------------


def unet_table(c: unet.UNetConfig) -> list[Leaf]:
    """The rows of a UNet under the authors' names."""
    rows = table_of(unet.UNet(c))
    names = ldm_names({key.rpartition(".")[0] for row in rows for key in row.keys})
    return _renamed(rows, lambda module: names[module])


def vae_table(c: vae.VAEConfig) -> list[Leaf]:
    """The rows of an autoencoder under the authors' names."""
    return _renamed(table_of(vae.VAE(c)), lambda module: _vae_name(module, len(c.widths)))


def _text_table(c: CLIPTextConfig) -> list[Leaf]:
    return table_of(CLIPText(c))


def open_clip_table(c: CLIPTextConfig) -> list[Leaf]:
    """The rows of a text encoder under OpenCLIP's names: query, key and value are one tensor."""
    layer = "transformer.resblocks.{i}"
    block = [*norm("ln_1", f"{layer}.ln_1"), *norm("ln_2", f"{layer}.ln_2")]
    for number, name in enumerate(("query", "key", "value")):
        part = Part(0, number, 3)
        block.append(leaf(f"attn/{name}/kernel", f"{layer}.attn.in_proj_weight", LINEAR, part))
        block.append(leaf(f"attn/{name}/bias", f"{layer}.attn.in_proj_bias", None, part))
    block += linear("attn/out", f"{layer}.attn.out_proj")
    block += [*linear("mlp/fc", f"{layer}.mlp.c_fc"), *linear("mlp/proj", f"{layer}.mlp.c_proj")]
    return [
        *embedding("wte", "token_embedding"),
        leaf("wpe/embedding", "positional_embedding"),
        *layered(block, c.layers, scan=c.scan),
        *norm("ln_f", "ln_final"),
        *([leaf("projection/kernel", "text_projection")] if c.head == "projection" else []),  # (in, out) there
    ]


def _renamed(rows: Iterable[Leaf], name: Callable[[str], str]) -> list[Leaf]:
    def renamed(key: str) -> str:
        module, _, parameter = key.rpartition(".")
        return f"{name(module)}.{parameter}"

    return [row._replace(keys=tuple(map(renamed, row.keys))) for row in rows]


def _vae_name(module: str, levels: int) -> str:
    """The authors' name of an autoencoder's module.

    >>> _vae_name("decoder.up_blocks.0.resnets.1.conv_shortcut", 4)
    'decoder.up.3.block.1.nin_shortcut'
    """
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    match module.split("."):
        case [side, "down_blocks" | "up_blocks" as blocks, i, "resnets", j, layer]:
            number = int(i) if blocks == "down_blocks" else levels - 1 - int(i)
            return f"{side}.{blocks.removesuffix('_blocks')}.{number}.block.{j}.{_vae_layer(layer)}"
        case [side, "down_blocks", i, "downsamplers", "0", "conv"]:
            return f"{side}.down.{i}.downsample.conv"
        case [side, "up_blocks", i, "upsamplers", "0", "conv"]:
            return f"{side}.up.{levels - 1 - int(i)}.upsample.conv"
        case [side, "mid_block", "resnets", j, layer]:
            return f"{side}.mid.block_{int(j) + 1}.{_vae_layer(layer)}"
        case [side, "mid_block", "attentions", "0", *layer]:
            return f"{side}.mid.attn_1.{attention['.'.join(layer)]}"
        case [side, "conv_norm_out"]:
            return f"{side}.norm_out"
    return module


def _vae_layer(name: str) -> str:
    return "nin_shortcut" if name == "conv_shortcut" else name
