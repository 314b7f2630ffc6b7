"""Makes `diffusers/<style>/`: LoRA files for diffusion models in every spelling that they are shared in, on tiny random models.

    pip install torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 lycoris-lora==4.1.3 numpy
    PYTHONHASHSEED=0 python tests/golden/make_diffusion_files.py

The hash seed is for the sets in the metadata. There are three styles, `sd1`, `sd2` (linear layers around the transformers) and
`sdxl` (two text encoders, added conditions), each a UNet with two levels and text encoders with two layers. Their weights are in
no file: the array `key` of `component` (unet, text_encoder, text_encoder_2) is

    0.2 * np.random.RandomState(zlib.crc32(f"{component}.{key}".encode())).standard_normal(shape)

in float32, and 1 more than that if it is a vector and its key ends in ".weight": those are the scales of norms. A style has

    <component>/config.json     as diffusers and transformers write them
    <component>.jsonl           the layers, as in `modules/`; see make_modules.py
    <file>.safetensors          adapters, all on that base
    outputs.npz                 `inputs/<name>`, and for each file `<file>/<component>`, what the component puts out with it, and
                                `<file>/merged/<component>.<layer>`, the weights that it then has, for some layers, and
                                `<file>/half/<component>`, with the adapter at half its scale: PEFT's `scale_layer`, LyCORIS' multiplier

in float32 on the CPU, in torch's layout. For text encoders the output is the last hidden state, with a projection its result.
Diffusers reads the files of diffusers and of kohya again and computes the same, but for what it loses: the magnitudes in text
encoders, and alphas that are not the same for all layers. Those outputs are PEFT's with the alphas that are in the file. What
LyCORIS' layers compute is read off their outputs: its merge scales LoHa and factored LoKr by alpha / r twice. Files:

    plain            as diffusers saves today, in PEFT's names: alpha is r
    metadata         the same with LoraConfigs beside the tensors: other ranks and alphas for some layers
    dora             the same with magnitudes
    up_down          what the training scripts save: `lora.down` and `lora.up`, `lora_linear_layer` in text encoders
    attn_processor   older yet: attention's layers in its processor, the text encoder's under `text_model`
    kohya            as kohya's scripts save: alpha is 1 in all layers, r is 2
    kohya_alphas     the same with ranks and alphas that differ by layer
    kohya_sgm        kohya's with the names of the blocks that SDXL had in its authors' code
    locon* loha* lokr* dora_* full   of LyCORIS, in kohya's names, for six layers, and `merged` for all of them
    ia3 diag_oft glora               likewise, for their names alone
"""

import copy
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import numpy as np
import torch
import transformers.integrations.peft
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from lycoris.modules import diag_oft, full, glora, ia3, locon, loha, lokr
from make_modules import layers
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

HERE = Path(__file__).with_name("diffusers")
Arrays = dict[str, torch.Tensor]

UNET = {
    "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
}  # fmt: skip
SD2 = UNET | {"attention_head_dim": [2, 4], "use_linear_projection": True}
SDXL = SD2 | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 16, "transformer_layers_per_block": [1, 2], "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32,
}  # fmt: skip
TEXT = {
    "vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2,
    "max_position_embeddings": 9, "projection_dim": 8, "bos_token_id": 22, "eos_token_id": 23,
}  # fmt: skip
GELU = TEXT | {"hidden_act": "gelu"}


def text(kind: type, config: dict) -> Callable[[], torch.nn.Module]:
    return lambda: kind(CLIPTextConfig(**config, attn_implementation="eager"))


COMPONENTS = {
    "sd1": {"unet": lambda: UNet2DConditionModel(**UNET), "text_encoder": text(CLIPTextModel, TEXT)},
    "sd2": {"unet": lambda: UNet2DConditionModel(**SD2), "text_encoder": text(CLIPTextModel, GELU)},
    "sdxl": {"unet": lambda: UNet2DConditionModel(**SDXL), "text_encoder": text(CLIPTextModel, TEXT),
        "text_encoder_2": text(CLIPTextModelWithProjection, GELU)},
}  # fmt: skip

# Layers of all kinds, some of each: files of all of them say no more.
LAYERS = (
    r"(conv_in|conv_out|.*\.(linear_1|attn2\.to_(q|out\.0)|attn1\.to_k|ff\.net\.0\.proj|proj_in|conv1|time_emb_proj"
    r"|conv_shortcut|(down|up)samplers\.0\.conv))"
)
ATTENTION = r".*\.(attn1|attn2)\.to_(q|k|v|out\.0)"
TEXT_LAYERS = r".*\.(q_proj|v_proj|out_proj|fc1|fc2)|text_projection"
TEXT_ATTENTION = r".*\.(q_proj|k_proj|v_proj|out_proj)"
RANKS = {
    "rank_pattern": {r".*\.conv1": 3, r".*\.to_q": 1, "fc1": 3},
    "alpha_pattern": {"proj_in": 1, r".*\.to_k": 5, "q_proj": 7},
}


class File(NamedTuple):
    name: str
    spelling: str
    config: dict
    unet: str = LAYERS
    text: str = TEXT_LAYERS


PLAIN = File("plain", "peft", {"r": 2, "lora_alpha": 2})
KOHYA = File("kohya", "kohya", {"r": 2, "lora_alpha": 1})
ALPHAS = File("kohya_alphas", "kohya", {"r": 2, "lora_alpha": 3} | RANKS)
LOST = [
    ("dora", "text_encoder"),
    ("kohya_alphas", "unet"),
    ("kohya_alphas", "text_encoder"),
    ("kohya_alphas", "text_encoder_2"),
]
FILES = {
    "sd1": [
        PLAIN,
        File("metadata", "metadata", {"r": 2, "lora_alpha": 3} | RANKS),
        File("dora", "peft", {"r": 2, "lora_alpha": 2, "use_dora": True}, r".*\.(to_q|conv1|proj_in)", r".*\.q_proj"),
        File("up_down", "up_down", {"r": 2, "lora_alpha": 2}, ATTENTION, TEXT_ATTENTION),
        File("attn_processor", "attn_processor", {"r": 2, "lora_alpha": 2}, ATTENTION, TEXT_ATTENTION),
        KOHYA,
        ALPHAS,
    ],
    "sd2": [PLAIN, ALPHAS],
    "sdxl": [PLAIN, ALPHAS, KOHYA._replace(name="kohya_sgm", spelling="kohya_sgm")],
}
MERGED = ["attn2.to_q", "proj_in", "downsamplers.0.conv", "q_proj"]

LYCORIS_LAYERS = [
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.0.proj_in", "unet.down_blocks.0.downsamplers.0.conv", "unet.conv_in",
    "text_encoder.encoder.layers.0.self_attn.q_proj", "text_encoder.encoder.layers.1.mlp.fc1",
]  # fmt: skip
LYCORIS = {
    "locon": (locon.LoConModule, {}),
    "locon_tucker": (locon.LoConModule, {"use_tucker": True}),
    "locon_rslora": (
        locon.LoConModule,
        {"rs_lora": True},
    ),  # the alpha in the file is the one that alpha / r makes right
    "dora_out": (locon.LoConModule, {"weight_decompose": True, "wd_on_out": True}),
    "dora_in": (locon.LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "loha": (loha.LohaModule, {}),
    "loha_tucker": (loha.LohaModule, {"use_tucker": True}),
    "loha_dora_in": (loha.LohaModule, {"weight_decompose": True, "wd_on_out": False}),
    "lokr": (lokr.LokrModule, {"lora_dim": 1}),
    "lokr_tucker": (lokr.LokrModule, {"lora_dim": 1, "use_tucker": True}),
    "lokr_both": (lokr.LokrModule, {"lora_dim": 1, "decompose_both": True}),
    "lokr_whole": (lokr.LokrModule, {"full_matrix": True}),  # with alpha 2, r 2: there is no scale
    "lokr_factor": (lokr.LokrModule, {"lora_dim": 1, "factor": 2}),
    "lokr_dora_out": (lokr.LokrModule, {"lora_dim": 1, "weight_decompose": True, "wd_on_out": True}),
    "full": (full.FullModule, {}),
    "ia3": (ia3.IA3Module, {}),
    "diag_oft": (diag_oft.DiagOFTModule, {"constraint": 0.0}),
    "glora": (glora.GLoRAModule, {}),
}


def drawn(component: str, key: str, shape: torch.Size) -> torch.Tensor:
    values = 0.2 * np.random.RandomState(zlib.crc32(f"{component}.{key}".encode())).standard_normal(tuple(shape))
    return torch.tensor((values + (len(shape) == 1 and key.endswith(".weight"))).astype(np.float32))


def models(style: str) -> dict[str, torch.nn.Module]:
    found = {}
    for component, build in COMPONENTS[style].items():
        model = build().eval()
        model.load_state_dict({key: drawn(component, key, value.shape) for key, value in model.state_dict().items()})
        model.requires_grad_(False)
        found[component] = model
    return found


def inputs(style: str) -> Arrays:
    rng = np.random.RandomState(0)
    tokens = rng.randint(1, 22, (2, 7))
    tokens[:, 0], tokens[0, 5:], tokens[1, 6:] = 22, 23, 23
    context = UNET["cross_attention_dim"] * (1 + (style == "sdxl"))
    arrays = {"sample": rng.normal(size=(2, 4, 6, 8)), "context": rng.normal(size=(2, 5, context))}
    if style == "sdxl":
        arrays |= {"text_embeds": rng.normal(size=(2, 8)), "time_ids": rng.randint(1, 9, (2, 6))}
    arrays = {name: torch.tensor(value.astype(np.float32)) for name, value in arrays.items()}
    return arrays | {"timesteps": torch.tensor([3, 700]), "tokens": torch.tensor(tokens)}


@torch.no_grad()
def outputs(components: dict[str, torch.nn.Module], given: Arrays) -> Arrays:
    found = {}
    for component, model in components.items():
        if component == "unet":
            added = {key: given[key] for key in ("text_embeds", "time_ids") if key in given}
            found[component] = model(
                given["sample"], given["timesteps"], given["context"], added_cond_kwargs=added
            ).sample
        else:
            result = model(given["tokens"])
            found[component] = result.text_embeds if hasattr(result, "text_embeds") else result.last_hidden_state
    return found


# The spellings: the tensors of an adapter by component, in PEFT's names, and the components that have it, to what is in the file


def older_text(key: str) -> str:
    """With the text_model of transformers 4, where it is missing."""
    return key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}"


def scales(model: torch.nn.Module) -> dict[str, float]:
    return {name: layer.scaling["default"] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def kohya(tensors: dict[str, Arrays], components: dict[str, torch.nn.Module], sgm: bool = False) -> Arrays:
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    if len(components) > 2:
        prefixes["text_encoder"] = "lora_te1"
    found = {}
    for component, arrays in tensors.items():
        scale = scales(components[component])
        for key, value in arrays.items():
            name, part = re.fullmatch(r"(.*)\.lora_([AB])\.weight", key).groups()
            written = (blocks(name) if sgm else name) if component == "unet" else older_text(name)
            written = f"{prefixes[component]}_{written.replace('.', '_')}"
            found[f"{written}.lora_{'down' if part == 'A' else 'up'}.weight"] = value
            if part == "A":
                found[f"{written}.alpha"] = torch.tensor(scale[name] * value.shape[0])
    return found


def blocks(name: str) -> str:
    """The name of a layer in the UNet of SDXL's authors, for one layer to a block."""
    whole = {
        "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    }  # fmt: skip
    if name in whole:
        return whole[name]
    resnet = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    side, rest = re.fullmatch(r"(down_blocks|mid_block|up_blocks)\.(.*)", name).groups()
    block, rest = (0, rest) if side == "mid_block" else rest.split(".", 1)
    kind, index, rest = rest.split(".", 2)
    rest = resnet[rest] if kind == "resnets" else rest
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{rest}"
    inner = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
    layer = 2 * int(block) + (1 if kind.endswith("samplers") else int(index))
    if side == "down_blocks":
        return f"input_blocks.{1 + layer}.{inner}.{'op' if kind == 'downsamplers' else rest}"
    return f"output_blocks.{layer}.{inner}.{rest}"


def saved(file: File, components: dict[str, torch.nn.Module], path: Path) -> None:
    tensors = {component: get_peft_model_state_dict(model) for component, model in components.items()}
    tensors = {
        component: {key: value.contiguous() for key, value in arrays.items()} for component, arrays in tensors.items()
    }
    if file.spelling.startswith("kohya"):
        metadata = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "3.0"}
        save_file(kohya(tensors, components, sgm=file.spelling == "kohya_sgm"), path, metadata)
        return
    if file.spelling == "up_down":
        tensors = {component: convert_state_dict_to_diffusers(arrays) for component, arrays in tensors.items()}
    if file.spelling == "attn_processor":
        names = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", r"to_out\.0": "to_out"}
        for component, arrays in tensors.items():
            for old, new in names.items():
                arrays = {re.sub(rf"\b{old}\.lora_", f"{new}.lora_", key): value for key, value in arrays.items()}
            middle = "processor." if component == "unet" else ""
            spelt = {"A": "_lora.down", "B": "_lora.up"}
            tensors[component] = {
                re.sub(
                    r"(to_\w+)\.lora_([AB])", lambda m: middle + m[1] + spelt[m[2]], key if middle else older_text(key)
                ): value
                for key, value in arrays.items()
            }
    pipeline = StableDiffusionXLPipeline if len(components) > 2 else StableDiffusionPipeline
    given = {f"{component}_lora_layers": arrays for component, arrays in tensors.items()}
    if file.spelling == "metadata":
        given |= {
            f"{component}_lora_adapter_metadata": model.peft_config["default"].to_dict()
            for component, model in components.items()
        }
    pipeline.save_lora_weights(path.parent, weight_name=path.name, **given)
    path.chmod(0o644)


def read(style: str, path: Path) -> dict[str, torch.nn.Module]:
    """The components with a file, as diffusers reads it."""
    components = models(style)
    pipeline = StableDiffusionXLPipeline if style == "sdxl" else StableDiffusionPipeline
    tensors, alphas, metadata = pipeline.lora_state_dict(
        str(path), unet_config=components["unet"].config, return_lora_metadata=True
    )
    pipeline.load_lora_into_unet(tensors, alphas, components["unet"], metadata=metadata)
    for component in list(components)[1:]:
        pipeline.load_lora_into_text_encoder(
            tensors, alphas, components[component], prefix=component, metadata=metadata
        )
    return components


def make(style: str, file: File, given: Arrays) -> Arrays:
    components, generator = models(style), torch.Generator().manual_seed(zlib.crc32(f"{style}/{file.name}".encode()))
    torch.manual_seed(0)
    for component, model in components.items():
        targets = file.unet if component == "unet" else file.text
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the patterns are for all components, and not all keys are for each
            model.add_adapter(LoraConfig(target_modules=targets, **copy.deepcopy(file.config)))
        model.eval()
        for value in model.parameters():
            if value.requires_grad:
                value.data += 0.2 * torch.randn(value.shape, generator=generator)
    path = HERE / style / f"{file.name}.safetensors"
    saved(file, components, path)
    found, plain = outputs(components, given), outputs(models(style), given)
    again = outputs(read(style, path), given)
    for component in found:
        moved, apart = ((found[component] - other[component]).abs().max().item() for other in (plain, again))
        assert moved > 0.01 and (apart < 1e-4) != ((file.name, component) in LOST), (
            style,
            file.name,
            component,
            moved,
            apart,
        )
        print(f"{style}/{file.name} {component}: moves {moved:.2g}, read by diffusers {apart:.1g} apart")
    found |= {f"half/{component}": value for component, value in halved(components, given).items()}
    merged = {}
    for component, model in components.items():
        for name, layer in model.named_modules():
            end = next((end for end in MERGED if name.endswith(end)), None)
            if end and isinstance(layer, LoraLayer):  # the last of its kind
                merged[component, end] = (name, layer)
    for (component, _), (name, layer) in merged.items():
        layer.merge()
        found[f"merged/{component}.{name}"] = layer.get_base_layer().weight.detach()
    return found


def halved(components: dict[str, torch.nn.Module], given: Arrays) -> Arrays:
    """Outputs with all adapters at half their scale, as PEFT has it."""
    layers = [layer for model in components.values() for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.scale_layer(0.5)
    found = outputs(components, given)
    for layer in layers:
        layer.unscale_layer(0.5)
    return found


def settled(path: Path) -> None:
    """The file with its metadata in order: safetensors writes them in another order each time."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


# LyCORIS


@torch.no_grad()
def effective(layer: torch.nn.Module, shape: torch.Size) -> torch.Tensor:
    """The weight of a linear layer or a convolution, read off what it puts out for single ones."""
    if len(shape) == 2:
        return (layer(torch.eye(shape[1])) - layer(torch.zeros(1, shape[1]))).T.contiguous()
    (_, channels, *kernel), (stride, _), (padding, _) = shape, layer.stride, layer.padding
    place = -(-padding // stride)  # of the first output whose patch is whole
    start = place * stride - padding
    ones = torch.zeros(
        channels * kernel[0] * kernel[1], channels, start + kernel[0] + padding, start + kernel[1] + padding
    )
    patch = torch.eye(len(ones)).reshape(len(ones), channels, *kernel)
    ones[:, :, start : start + kernel[0], start : start + kernel[1]] = patch
    out = layer(ones)[:, :, place, place] - layer(torch.zeros_like(ones[:1]))[:, :, place, place]
    return out.T.reshape(shape).contiguous()


def make_lycoris(name: str, given: Arrays) -> Arrays:
    kind, arguments = LYCORIS[name]
    components, generator = models("sd1"), torch.Generator().manual_seed(zlib.crc32(name.encode()))
    torch.manual_seed(0)
    tensors, wrapped, wrappers = {}, {}, []
    for path in LYCORIS_LAYERS:
        component, layer = path.split(".", 1)
        module = components[component].get_submodule(layer)
        written = layer if component == "unet" else older_text(layer)
        written = f"{'lora_unet' if component == 'unet' else 'lora_te'}_{written.replace('.', '_')}"
        wrapper = kind(written, module, 1.0, **({"lora_dim": 2, "alpha": 3.0} | arguments)).eval()
        for value in wrapper.parameters():
            value.data += 0.2 * torch.randn(value.shape, generator=generator)
        shape = module.weight.shape  # some take the weight away
        wrapper.apply_to()
        tensors |= {
            f"{written}.{key}": value.detach().clone().contiguous()
            for key, value in wrapper.state_dict(destination={}).items()
        }
        wrapped[path] = (module, shape)
        wrappers.append(wrapper)
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": kind.name} | arguments)}
    save_file(tensors, HERE / "sd1" / f"{name}.safetensors", metadata)
    found, plain = outputs(components, given), outputs(models("sd1"), given)
    moved = {component: float(f"{(found[component] - plain[component]).abs().max().item():.2g}") for component in found}
    assert min(moved.values()) > 1e-3, (name, moved)
    print(f"sd1/{name}: moves {moved}")
    if name in ("ia3", "diag_oft", "glora"):
        return {}
    found |= {f"merged/{path}": effective(*layer) for path, layer in wrapped.items()}
    if "weight_decompose" in arguments:  # which has no half that others agree with
        return found
    for wrapper in wrappers:
        wrapper.multiplier = 0.5
    return found | {f"half/{component}": value for component, value in outputs(components, given).items()}


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        raise SystemExit("run it with PYTHONHASHSEED=0, else the sets in the metadata have another order each time")
    transformers.integrations.peft.MIN_PEFT_VERSION = "0.21.2"  # it asks for one that is not released
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    for style, files in FILES.items():
        shutil.rmtree(HERE / style, ignore_errors=True)
        for component, model in models(style).items():
            (model.save_config if component == "unet" else model.config.save_pretrained)(HERE / style / component)
            lines = "".join(json.dumps(layer) + "\n" for layer in layers(model))
            (HERE / style / f"{component}.jsonl").write_text(lines)
        given = inputs(style)
        record = {f"inputs/{key}": value for key, value in given.items()}
        for file in files:
            record |= {f"{file.name}/{key}": value for key, value in make(style, file, given).items()}
        for name in LYCORIS if style == "sd1" else ():
            record |= {f"{name}/{key}": value for key, value in make_lycoris(name, given).items()}
        np.savez_compressed(
            HERE / style / "outputs.npz", **{key: value.detach().numpy() for key, value in record.items()}
        )
        for path in sorted((HERE / style).glob("*.safetensors")):
            settled(path)
            print(f"  {path.stat().st_size / 1000:.0f} kB, {len(load_file(path))} tensors: {path.name}")
