"""Makes `prompts/`: tiny text encoders of Stable Diffusion 1.x, 2.x and SDXL, and what diffusers makes of prompts with them.

    pip install torch==2.13.0 transformers==5.24.0 diffusers==0.42.1 numpy && python tests/golden/make_prompts.py

Each family is a folder of a pipeline: `text_encoder[_2]/` with config.json and model.safetensors (float16, so that they are
small: all is computed in float32 from these values), `tokenizer[_2]/` with the files beside vocab.json and merges.txt, which
are those of `models/tokenizers/clip`. The keys are spelt as the published files and transformers 5 do: SD 1.x with
`text_model.` and the buffer `position_ids`, SD 2.x without, SDXL without and with.

`golden.safetensors` in it has, for n in 0, 1 (the encoder) and k in 0, 1, 2 (the clip skip):

    tokens/n   (3, 77) int32
    states/n   (layers + 1, 3, 20, width): transformers' hidden_states, here and below at every fourth position
    context/k  (3, 20, widths): diffusers' encode_prompt for k = 0; for others of hidden_states, since its clip_skip raises with
               transformers 5: ln_f(hidden_states[-(k + 1)]), in SDXL hidden_states[-(k + 2)] of both
    pooled     (3, projection): SDXL's

and in the metadata's one key, `golden`, the JSON of `prompts` (the last is longer than the context) and the versions. Norm
epsilons and nonlinearities that are not the config's move the contexts by 1e-3 or more: the script looks.
"""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).with_name("prompts")
PIECES = Path(__file__).with_name("models") / "tokenizers" / "clip"
START, END = "<|startoftext|>", "<|endoftext|>"
PROMPTS = ["The cat sat on the mat!!", "", "a low-rank cat, " * 12 + "and its end is lost"]
EVERY = 4

LARGE = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "projection_dim": 8,
}
OPEN = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 3,
    "num_hidden_layers": 4,
    "hidden_act": "gelu",
}
IDS = {"vocab_size": 560, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
FAMILIES = {
    "sd1": [("CLIPTextModel", LARGE)],
    "sd2": [("CLIPTextModel", OPEN | {"projection_dim": 4})],
    "sdxl": [("CLIPTextModel", LARGE), ("CLIPTextModelWithProjection", OPEN | {"projection_dim": 10})],
}


def token(content: str, **more: object) -> dict:
    return more | {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def tokenizer_files(family: str, number: int) -> dict[str, dict]:
    """tokenizer_config.json and special_tokens_map.json as the published folders have them, by their names."""
    around = {"bos_token": START, "eos_token": END, "unk_token": END}
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    settings |= {"tokenizer_class": "CLIPTokenizer", "pad_token": END}
    if number:  # newer: with a list of the tokens
        decoder = {"0": token("!", special=True, normalized=False)}
        decoder |= {"558": token(START, special=True), "559": token(END, special=True)}
        settings |= around | {"pad_token": "!", "added_tokens_decoder": decoder}
    else:
        settings |= {role: token(text, __type="AddedToken") for role, text in around.items()}
    specials = {role: token(text) for role, text in around.items()}
    specials["pad_token"] = "!" if number or family == "sd2" else END  # SD 2.1 says another thing in each file
    return {"tokenizer_config.json": settings, "special_tokens_map.json": specials}


def tokenizer(family: str, number: int, folder: Path) -> transformers.CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(family, number).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    with tempfile.TemporaryDirectory() as whole:
        for file in (*folder.glob("*.json"), PIECES / "vocab.json", PIECES / "merges.txt"):
            shutil.copy(file, whole)
        return transformers.CLIPTokenizer.from_pretrained(whole)


def drawn(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            scale = "Norm" in type(module).__name__ and name == "weight"
            size = 0.05 if isinstance(module, torch.nn.Embedding) else 0.2
            noise = size * torch.randn(value.shape, generator=generator)
            value.data = (1 + noise if scale else noise).half().float()
    return model.eval()


def built(kind: str, config: dict, seed: int) -> torch.nn.Module:
    cls = getattr(transformers, kind)
    return drawn(cls(cls.config_class(**copy.deepcopy(IDS | config), attn_implementation="eager")), seed)


def write(family: str, number: int, model: torch.nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text().rstrip() + "\n")
    file = folder / "model.safetensors"
    tensors = {key: value.astype(np.float16) for key, value in load_file(file).items()}
    assert all(key.startswith(("text_model.", "text_projection")) == bool(number) for key in tensors), list(tensors)[:3]
    if family == "sd1":
        tensors = {f"text_model.{key}": value for key, value in tensors.items()}
        tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
    save_file(tensors, file, {"format": "pt"})


def hidden(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return model(ids, output_hidden_states=True).hidden_states


def encoded(family: str, models: list, tokenizers: list, skip: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """diffusers' context and pooled; those with a clip skip of the hidden states."""
    if skip:
        states = [hidden(model, ids_of(reader)) for model, reader in zip(models, tokenizers, strict=True)]
        if family == "sdxl":
            return torch.cat([each[-(skip + 2)] for each in states], -1), None
        return models[0].final_layer_norm(states[0][-(skip + 1)]), None
    if family == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=None, text_encoder=models[0], text_encoder_2=models[1], tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
            unet=None, scheduler=None,
        )  # fmt: skip
        context, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
        return context, pooled
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=models[0], tokenizer=tokenizers[0], unet=None, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0], None


def ids_of(reader: transformers.CLIPTokenizer) -> torch.Tensor:
    return reader(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def make(family: str) -> None:
    folder, parts = HERE / family, FAMILIES[family]
    shutil.rmtree(folder, ignore_errors=True)
    names = ["", "_2"][: len(parts)]
    tokenizers = [tokenizer(family, n, folder / f"tokenizer{name}") for n, name in enumerate(names)]
    models = [built(kind, config, n + 1) for n, (kind, config) in enumerate(parts)]
    arrays: dict[str, torch.Tensor] = {}
    for n, (name, model, reader) in enumerate(zip(names, models, tokenizers, strict=True)):
        write(family, n, model, folder / f"text_encoder{name}")
        arrays[f"tokens/{n}"] = ids_of(reader).int()
        arrays[f"states/{n}"] = torch.stack(hidden(model, ids_of(reader)))[:, :, ::EVERY]
    for skip in (0, 1, 2):
        context, pooled = encoded(family, models, tokenizers, skip)
        arrays[f"context/{skip}"] = context[:, ::EVERY]
        arrays |= {} if pooled is None else {"pooled": pooled}
    for n, (kind, config) in enumerate(parts):
        act = "gelu" if config.get("hidden_act") is None else "quick_gelu"
        for change in ({"layer_norm_eps": 1e-6}, {"hidden_act": act}):
            others = [built(kind, config | change, n + 1) if i == n else model for i, model in enumerate(models)]
            moved = (encoded(family, others, tokenizers, 0)[0][:, ::EVERY] - arrays["context/0"]).abs().max()
            print(f"{family} {n} {change}: context moves by {moved:.1e}")
            assert moved > 1e-3
    stored = {key: np.ascontiguousarray(value.numpy()) for key, value in arrays.items()}
    versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    save_file(stored, folder / "golden.safetensors", {"golden": json.dumps({"prompts": PROMPTS} | versions)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    for name in FAMILIES:
        make(name)
