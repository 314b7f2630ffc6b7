"""Makes `peft/`: adapters as Hugging Face PEFT saves them, on tiny random models, with what PEFT computes from them.

    pip install torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy && PYTHONHASHSEED=0 python tests/golden/make_peft.py [row ...]

The hash seed is for the files' sake: PEFT writes sets, in the order that they happen to have. Each row of `ROWS` is a folder
with `adapter_config.json` and `adapter_model.safetensors` as `save_pretrained` wrote them. `base_model_name_or_path` is
`tiny/<base>`, a folder of `models/` or of `peft/bases/`; the network of convolutions has none, and `peft/bases/net` for its
weights. Every array that is trained was moved from where it started by 0.2 N(0, 1), so that none is zero, and PiSSA's and
OLoRA's are not those they start with. All is float32 on the CPU, in evaluation mode. `outputs.npz` in each folder has

    tokens, pixels        inputs: (batch, length) int32, (batch, channels, height, width) float32
    out                   the adapted model's logits (for CLIP, the logits per image); with prompts, of the prompt's tokens too
    merged_out            those after `merge_and_unload`, where PEFT has it
    merged/<key>          the arrays that this changed, under their keys in the base's state dict; of those whose keys differ in
                          a number alone, the last
    labels, sgd, adamw    (batch,) int32 for classifiers, and eight losses of training that goes on from the folder

Training goes on with `is_trainable=True`, still in evaluation mode, on the same batch: the mean cross entropy of the next
token, or of the labels. `sgd` is plain gradient descent at 0.1, `adamw` AdamW at 0.01 with betas 0.9 and 0.999, eps 1e-8 and
weight decay 0.01; loss 0 is that of the folder itself. A folder without `outputs.npz` is there for its names alone.
"""

import copy
import json
import os
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT asks the hub for the base's config.json when it saves

import make_models
import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

HERE = Path(__file__).with_name("peft")
STEPS, SGD, ADAMW = 8, 0.1, 0.01
GPT2, LLAMA, TIED = "gpt2_causal_lm", "llama2_causal_lm", "llama3_causal_lm"
BERT, ROBERTA, VIT = "bert_sequence_classification", "roberta_sequence_classification", "vit_image_classification"


class Row(NamedTuple):
    base: str
    config: peft.PeftConfig
    trained: bool = False  # whether to go on training from the folder
    merges: bool = True
    save: Mapping[str, bool] = MappingProxyType({})
    outputs: bool = True


def lora(**kwargs: object) -> LoraConfig:
    return LoraConfig(**({"r": 3, "lora_alpha": 5} | kwargs))


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
BERTS = ["query", "key", "value", "dense"]
CONVS = ["conv", "point", "groups"]

ROWS = {
    # each architecture of jlora.models, all kinds of its linear layers
    "every_linear_gpt2": Row(GPT2, lora(target_modules=["c_attn", "c_proj", "c_fc"])),
    "every_linear_llama": Row(LLAMA, lora(target_modules=GATED)),
    "every_linear_mistral": Row("mistral_causal_lm", lora(target_modules=GATED)),
    "every_linear_qwen2": Row("qwen2_causal_lm", lora(target_modules=GATED)),
    "every_linear_qwen3": Row("qwen3_causal_lm", lora(target_modules=GATED)),
    "every_linear_bert": Row(BERT, lora(target_modules=BERTS, task_type="SEQ_CLS")),
    "every_linear_roberta": Row(ROBERTA, lora(target_modules=r".*\.(query|key|value|dense)", exclude_modules=["classifier.dense"],
        task_type="SEQ_CLS")),
    "every_linear_deberta": Row("deberta_v3_sequence_classification", lora(target_modules=["query_proj", "key_proj", "value_proj", "dense"],
        task_type="SEQ_CLS")),
    "every_linear_vit": Row(VIT, lora(target_modules="all-linear", modules_to_save=["classifier"])),
    "every_linear_clip": Row("clip", lora(target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "text_projection",
        "visual_projection"])),

    # LoRA: ranks, scales, initial values
    "lora": Row(GPT2, lora(task_type="CAUSAL_LM"), trained=True),
    "lora_llama": Row(LLAMA, lora(task_type="CAUSAL_LM"), trained=True),
    "lora_gaussian": Row(GPT2, lora(init_lora_weights="gaussian")),
    "lora_orthogonal": Row(LLAMA, lora(r=4, init_lora_weights="orthogonal")),
    "lora_dropout": Row(GPT2, lora(lora_dropout=0.25)),  # of no effect in evaluation mode
    "patterns": Row(LLAMA, lora(target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"q_proj": 2, "down_proj": 5},
        alpha_pattern={"v_proj": 7, "down_proj": 2})),
    "patterns_anchored": Row(LLAMA, lora(target_modules=["q_proj", "v_proj"], rank_pattern={"^model.layers.0.self_attn.q_proj": 2,
        "^layers.1.self_attn.q_proj": 6}, alpha_pattern={"^model.layers.1.self_attn.v_proj": 7, "^self_attn.q_proj": 11})),
    "patterns_regex": Row(LLAMA, lora(target_modules=["q_proj", "v_proj"], rank_pattern={r"layers\.1\..*\.(q|v)_proj": 4, "v_proj": 2},
        alpha_pattern={r".*layers\.[1-9]\..*": 9, "q_proj": 3})),
    "rslora": Row(GPT2, lora(use_rslora=True), trained=True),
    "rslora_patterns": Row(LLAMA, lora(use_rslora=True, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 6},
        alpha_pattern={"v_proj": 2.5})),

    # which layers
    "suffixes": Row(GPT2, lora(target_modules=["attn.c_proj", "c_fc"])),
    "regex": Row(GPT2, lora(target_modules=r"transformer\.h\.[01]\.(attn\.c_attn|mlp\.c_proj)")),
    "all_linear_llama": Row(LLAMA, lora(target_modules="all-linear")),
    "all_linear_gpt2": Row(GPT2, lora(target_modules="all-linear")),
    "all_linear_bert": Row(BERT, lora(target_modules="all-linear", task_type="SEQ_CLS")),
    "excluded": Row(LLAMA, lora(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"])),
    "excluded_regex": Row(LLAMA, lora(target_modules="all-linear", exclude_modules=r".*\.mlp\..*")),
    "layers": Row(LLAMA, lora(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "layers_one": Row(GPT2, lora(target_modules=["c_attn"], layers_to_transform=1)),
    "conv1d": Row(GPT2, lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "conv1d_then_linear": Row("gpt2_token_classification", lora(target_modules=["c_attn", "classifier"], fan_in_fan_out=True)),
    "head_untied": Row(LLAMA, lora(target_modules=["q_proj", "lm_head"])),
    "head_tied": Row(TIED, lora(target_modules=["q_proj", "lm_head"])),
    "embedding": Row(LLAMA, lora(target_modules=["embed_tokens", "v_proj"])),
    "embedding_lean": Row(LLAMA, lora(target_modules=["embed_tokens", "v_proj"]), save={"save_embedding_layers": False}),
    "embedding_tied": Row(TIED, lora(target_modules=["embed_tokens"]), save={"save_embedding_layers": False}),
    "embedding_gpt2": Row(GPT2, lora(target_modules=["wte", "wpe", "c_attn"])),
    "embedding_and_head": Row(LLAMA, lora(target_modules=["embed_tokens", "lm_head"]), save={"save_embedding_layers": False}),
    "embedding_saved": Row(LLAMA, lora(target_modules=["q_proj"]), save={"save_embedding_layers": True}),
    "embedding_saved_tied": Row(GPT2, lora(), save={"save_embedding_layers": True}),
    "conv_patch": Row(VIT, lora(target_modules=["projection", "query"], r=2)),
    "conv_patch_clip": Row("clip", lora(target_modules=["patch_embedding", "position_embedding"], r=2)),
    "conv": Row("net", lora(target_modules=["conv", "point", "line", "linear"])),
    "conv_groups": Row("net", lora(target_modules=["groups"], r=4), merges=False),

    # DoRA
    "dora": Row(LLAMA, lora(use_dora=True, target_modules=GATED, task_type="CAUSAL_LM"), trained=True),
    "dora_gpt2": Row(GPT2, lora(use_dora=True, target_modules=["c_attn", "c_proj"])),
    "dora_rslora_patterns": Row(LLAMA, lora(use_dora=True, use_rslora=True, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 7})),
    "dora_bias": Row(BERT, lora(use_dora=True, target_modules=["query", "dense"], bias="all")),
    "dora_embedding": Row(LLAMA, lora(use_dora=True, target_modules=["embed_tokens", "v_proj"]), save={"save_embedding_layers": False}),
    "dora_conv_patch": Row(VIT, lora(use_dora=True, target_modules=["projection", "value"])),
    "dora_conv": Row("net", lora(use_dora=True, target_modules=["conv", "point", "line", "linear"])),

    # biases, and layers that are saved whole
    "bias_none": Row(BERT, lora(target_modules=["query", "value"], bias="none")),
    "bias_lora_only": Row(BERT, lora(target_modules=["query", "value"], bias="lora_only")),
    "bias_all": Row(BERT, lora(target_modules=["query", "value"], bias="all", task_type="SEQ_CLS"), trained=True),
    "bias_all_gpt2": Row(GPT2, lora(bias="all"), trained=True),
    "bias_all_modules_to_save": Row(ROBERTA, lora(target_modules=["query"], bias="all", modules_to_save=["classifier"])),
    "lora_bias": Row(GPT2, lora(target_modules=["c_attn", "c_fc"], lora_bias=True)),
    "lora_bias_conv": Row("net", lora(target_modules=["conv", "linear"], lora_bias=True)),
    "lora_bias_unmergeable": Row(LLAMA, lora(lora_bias=True), merges=False),  # there is no base bias to add to
    "modules_to_save": Row(BERT, lora(task_type="SEQ_CLS", modules_to_save=["classifier", "pooler"]), trained=True),
    "modules_to_save_head": Row(LLAMA, lora(modules_to_save=["lm_head", "embed_tokens"])),
    "modules_to_save_tied": Row(TIED, lora(modules_to_save=["embed_tokens"])),
    "modules_to_save_tied_ensured": Row(TIED, lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "modules_to_save_norm": Row(LLAMA, lora(modules_to_save=["norm"])),
    "sequence_classification_gpt2": Row("gpt2_sequence_classification", lora(task_type="SEQ_CLS")),
    "sequence_classification_llama": Row("llama_sequence_classification", lora(task_type="SEQ_CLS")),
    "token_classification_bert": Row("bert_token_classification", lora(task_type="TOKEN_CLS")),
    "feature_extraction_bert": Row("bert_base", lora(task_type="FEATURE_EXTRACTION")),
}  # fmt: skip


class Net(torch.nn.Module):
    """What transformers' models have not: convolutions of each kind. Images of 4 channels and 7 by 7 pixels in, 5 logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, (3, 2), stride=2, padding=1)
        self.point = torch.nn.Conv2d(8, 8, 1, bias=False)
        self.groups = torch.nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.line = torch.nn.Conv1d(8, 6, 3, padding=1)
        self.linear = torch.nn.Linear(6, 5)

    def forward(self, pixel_values: torch.Tensor) -> transformers.modeling_outputs.ImageClassifierOutput:
        x = torch.tanh(self.conv(pixel_values))
        x = torch.tanh(self.groups(torch.tanh(self.point(x))))
        x = torch.tanh(self.line(x.flatten(2))).mean(-1)
        return transformers.modeling_outputs.ImageClassifierOutput(logits=self.linear(x))


def base(name: str) -> torch.nn.Module:
    if name == "net":
        model = Net()
        model.load_state_dict(load_file(HERE / "bases" / name / "model.safetensors"))
        return model.eval()
    folder = make_models.HERE / name
    folder = folder if folder.exists() else HERE / "bases" / name
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    model.name_or_path = f"tiny/{name}"
    return model


def moved(model: torch.nn.Module, generator: torch.Generator, scale: float = 0.2) -> None:
    for value in model.parameters():
        if value.requires_grad:
            value.data += scale * torch.randn(value.shape, generator=generator)


def make_bases() -> None:
    folder = HERE / "bases" / "net"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Net()
    moved(model, torch.Generator().manual_seed(0))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def inputs(name: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if name == "net":
        return {"pixels": rng.normal(size=(2, 4, 7, 7)).astype(np.float32)}
    if name.startswith("vit"):
        return make_models.images(rng)["plain"]
    if name == "clip":
        return make_models.both(rng, end=20)["plain"]
    return {"tokens": make_models.tokens(rng, 2, 7)}


def called(model: torch.nn.Module, given: dict[str, np.ndarray], grad: bool = False) -> torch.Tensor:
    names = {"tokens": "input_ids", "pixels": "pixel_values"}
    arrays = {names[k]: torch.tensor(v) for k, v in given.items() if k in names}
    arrays = {k: v.long() if k == "input_ids" else v for k, v in arrays.items()}
    with torch.set_grad_enabled(grad):
        result = model(**arrays)
    for attribute in ("logits", "logits_per_image", "last_hidden_state"):
        if hasattr(result, attribute):
            return getattr(result, attribute)
    raise TypeError(type(result))


def losses(folder: Path, row: Row, given: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Of training that goes on from the folder."""
    model = peft.PeftModel.from_pretrained(base(row.base), folder, is_trainable=True).eval()
    parameters = [value for value in model.parameters() if value.requires_grad]
    if name == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=SGD)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=ADAMW)
    record = []
    for _ in range(STEPS):
        out = called(model, given, grad=True)
        if "labels" in given:
            loss = torch.nn.functional.cross_entropy(out, torch.tensor(given["labels"]).long())
        else:
            out, target = out[:, -given["tokens"].shape[1] : -1], torch.tensor(given["tokens"][:, 1:]).long()
            loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record.append(loss.item())
    return np.asarray(record, np.float32)


def merged(model: torch.nn.Module, row: Row, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    whole, before = model.merge_and_unload(), base(row.base).state_dict()
    arrays = {"merged_out": called(whole, given)}
    after = whole.state_dict()
    assert set(after) == set(before), set(after) ^ set(before)
    changed = [key for key, value in after.items() if not torch.equal(value, before[key])]
    last = {re.sub(r"\d+", "#", key): key for key in changed}
    arrays |= {f"merged/{key}": after[key] for key in last.values()}
    return {key: value.numpy().copy() for key, value in arrays.items()}


def make(name: str) -> None:
    row, folder, seed = ROWS[name], HERE / name, zlib.crc32(name.encode())
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    model = peft.get_peft_model(base(row.base), copy.deepcopy(row.config)).eval()
    moved(model, torch.Generator().manual_seed(seed))
    model.eval()
    save(model, folder, row.save)
    if not row.outputs:
        print(f"{name}: names alone")
        return
    rng = np.random.default_rng(seed)
    record = inputs(row.base, rng)
    plain, out = called(base(row.base), record), called(model, record)
    record["out"] = out.numpy()
    read = called(peft.PeftModel.from_pretrained(base(row.base), folder).eval(), record).numpy()
    differences = {"read": np.abs(read - record["out"]).max()}
    if plain.shape == out.shape:
        differences["base"] = (plain - out).abs().max().item()
    if row.trained:
        if "cls" in str(row.config.task_type).lower():
            record["labels"] = rng.integers(0, record["out"].shape[-1], 2).astype(np.int32)
        record |= {kind: losses(folder, row, record, kind) for kind in ("sgd", "adamw")}
    if row.merges:
        record |= merged(model, row, record)
        differences["merged"] = np.abs(record["merged_out"] - record["out"]).max()
    np.savez_compressed(folder / "outputs.npz", **record)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size / 1000:.0f} kB, differs from", {k: float(f"{v:.1e}") for k, v in differences.items()})


def save(model: torch.nn.Module, folder: Path, arguments: Mapping[str, bool]) -> None:
    model.save_pretrained(folder, **arguments)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").chmod(0o644)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        raise SystemExit(
            "run it with PYTHONHASHSEED=0, else the sets in adapter_config.json have another order each time"
        )
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore" if len(sys.argv) < 2 else "default")
    make_bases()
    for name in sys.argv[1:] or ROWS:
        make(name)
