"""Makes `diffusers/modules/`: the layers of the UNets and text encoders that LoRA files are made for, by name and shape.

    pip install torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 && python tests/golden/make_modules.py

Built from their published configs without weights. A file has a line of JSON for each layer that has a weight, in the order of
the model: `{"name": "down_blocks.0.resnets.0.conv1", "kind": "Conv2d", "weight": [320, 320, 3, 3], "bias": true}`, where the kind
is Linear, Conv2d, Embedding, LayerNorm or GroupNorm and the weight's shape torch's. The names of text encoders are those of
transformers 5, which left `text_model.` out of CLIPTextModel and kept it in CLIPTextModelWithProjection.
"""

import gzip
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

HERE = Path(__file__).with_name("diffusers") / "modules"

# What differs from the classes' defaults, which are those of Stable Diffusion 1.
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77}
VIT_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
VIT_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}

MODELS = {
    "unet_sd15": (lambda: UNet2DConditionModel(**SD15), 859_520_964),
    "unet_sd21": (lambda: UNet2DConditionModel(**SD21), 865_910_724),
    "unet_sdxl": (lambda: UNet2DConditionModel(**SDXL), 2_567_463_684),
    "text_vit_l": (lambda: CLIPTextModel(CLIPTextConfig(**TEXT, **VIT_L)), 123_060_480),
    "text_vit_h": (lambda: CLIPTextModel(CLIPTextConfig(**TEXT, **VIT_H)), 340_387_840),
    "text_big_g": (lambda: CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, **BIG_G)), 694_659_840),
}


def layers(model: torch.nn.Module) -> list[dict]:
    found = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            kind = next(kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn"))
            assert set(own) <= {"weight", "bias"}, (name, list(own))
            found.append(
                {"name": name, "kind": kind, "weight": list(own["weight"].shape), "bias": own.get("bias") is not None}
            )
    return found


if __name__ == "__main__":
    HERE.mkdir(parents=True, exist_ok=True)
    for name, (build, published) in MODELS.items():
        with torch.device("meta"):
            model = build()
        count = sum(value.numel() for value in model.parameters())
        assert count == published, (name, count, published)
        found = layers(model)
        text = "".join(json.dumps(layer) + "\n" for layer in found)
        (HERE / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        kinds = {
            kind: sum(layer["kind"] == kind for layer in found) for kind in sorted({layer["kind"] for layer in found})
        }
        print(f"{name}: {len(found)} layers, {kinds}, {(HERE / f'{name}.jsonl.gz').stat().st_size} bytes")
