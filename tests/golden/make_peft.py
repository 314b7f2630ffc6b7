"""Makes `peft/`: adapters as Hugging Face PEFT saves them, on tiny random models, with what PEFT computes from them.

    pip install torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy && PYTHONHASHSEED=0 python tests/golden/make_peft.py [row ...]
    pip install transformers==4.57.1 && PYTHONHASHSEED=0 python tests/golden/make_peft.py older_vit older_clip_text

The hash seed is for the files' sake: PEFT writes sets, in the order that they happen to have. With it every run writes the same
bytes, but for last bits of `lokr_conv_effective`, which depend on where its arrays lie in memory. Each row of `ROWS` is a folder
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
import tempfile
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
from peft.tuners.lora import preprocess_loraga
from safetensors.torch import load_file, save_file

OLD = transformers.__version__.startswith("4.")
HERE = Path(__file__).absolute().with_name("peft")
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
    convert: bool = False  # to LoRA of twice the rank on the base that it started from


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
    "every_linear_clip_text": Row("clip_text", lora(target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])),
    "every_linear_clip": Row("clip", lora(target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "text_projection",
        "visual_projection"])),

    # LoRA: ranks, scales, initial values
    "lora": Row(GPT2, lora(task_type="CAUSAL_LM"), trained=True),
    "lora_llama": Row(LLAMA, lora(task_type="CAUSAL_LM"), trained=True),
    "lora_gaussian": Row(GPT2, lora(init_lora_weights="gaussian")),
    "lora_orthogonal": Row(LLAMA, lora(r=4, init_lora_weights="orthogonal")),
    "lora_pickled": Row(GPT2, lora(task_type="CAUSAL_LM"), save={"safe_serialization": False}),  # adapter_model.bin
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
    "conv_patch": Row(VIT, lora(target_modules=["projection", "q_proj"], r=2)),
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
    "dora_conv_patch": Row(VIT, lora(use_dora=True, target_modules=["projection", "v_proj"])),
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

    # tokens
    "tokens": Row(LLAMA, lora(trainable_token_indices=[40, 3, 9], task_type="CAUSAL_LM"), trained=True),
    "tokens_tied": Row(GPT2, lora(trainable_token_indices=[40, 3, 9], task_type="CAUSAL_LM"), trained=True),
    "tokens_of_both": Row(LLAMA, lora(trainable_token_indices={"embed_tokens": [5, 7], "lm_head": [9]})),
    "tokens_beside_lora_on_head": Row(LLAMA, lora(target_modules=["q_proj", "lm_head"], trainable_token_indices=[4, 5, 6])),
    "tokens_alone": Row(LLAMA, peft.TrainableTokensConfig(token_indices=[40, 3, 9], target_modules=["embed_tokens"])),
    "tokens_alone_tied": Row(TIED, peft.TrainableTokensConfig(token_indices=[40, 3, 9], task_type="CAUSAL_LM")),

    # parameters that are no module's weight: the experts of Mixtral, stacked
    "parameters": Row("mixtral", lora(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    "parameters_one": Row("mixtral", lora(target_modules=["q_proj"], target_parameters=["experts.down_proj"])),
    "parameters_patterns": Row("mixtral", lora(target_modules=["v_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.down_proj": 2}, alpha_pattern={"experts.gate_up_proj": 7})),
    "parameters_matrix": Row(LLAMA, lora(target_modules=[], target_parameters=["q_proj.weight"])),
    "parameters_router": Row("mixtral", lora(target_modules=[], target_parameters=["mlp.gate.weight"])),

    # LoRA that changes the base: as it is, for the changed base, and converted, for the original one
    "pissa": Row(LLAMA, lora(r=2, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])),
    "pissa_gpt2": Row(GPT2, lora(r=2, init_lora_weights="pissa")),
    "pissa_converted": Row(LLAMA, lora(r=2, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"]), convert=True),
    "pissa_converted_patterns": Row(LLAMA, lora(r=2, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"],
        rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 7}), convert=True),
    "pissa_converted_rslora": Row(LLAMA, lora(r=2, init_lora_weights="pissa", use_rslora=True, target_modules=["q_proj"]), convert=True),
    "olora": Row(LLAMA, lora(r=2, init_lora_weights="olora", target_modules=["q_proj", "down_proj"])),
    "olora_converted": Row(LLAMA, lora(r=2, init_lora_weights="olora", target_modules=["q_proj", "down_proj"]), convert=True),

    # AdaLoRA
    "adalora": Row(LLAMA, peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=20, target_modules=["q_proj", "down_proj"])),
    "adalora_gpt2": Row(GPT2, peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=6, total_step=20)),
    "adalora_cut": Row(LLAMA, peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, tinit=2, tfinal=2, deltaT=1, total_step=8,
        target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")),

    # LyCORIS' methods
    "loha": Row(LLAMA, peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"])),
    "loha_patterns": Row(LLAMA, peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 3},
        alpha_pattern={"^model.layers.0.self_attn.v_proj": 5})),
    "loha_conv": Row("net", peft.LoHaConfig(r=2, alpha=3, target_modules=["conv", "point", "line", "linear"])),
    "loha_conv_effective": Row("net", peft.LoHaConfig(r=2, alpha=3, target_modules=["conv", "point", "line", "linear"],
        use_effective_conv2d=True)),
    "lokr": Row(LLAMA, peft.LoKrConfig(r=1, alpha=3, target_modules=["q_proj", "down_proj"])),
    "lokr_whole": Row(LLAMA, peft.LoKrConfig(r=8, alpha=3, target_modules=["q_proj", "down_proj"])),
    "lokr_both": Row(LLAMA, peft.LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=["q_proj", "down_proj"])),
    "lokr_factor": Row(LLAMA, peft.LoKrConfig(r=1, alpha=3, decompose_factor=2, target_modules=["q_proj", "down_proj"])),
    "lokr_lycoris": Row(LLAMA, peft.LoKrConfig(r=1, alpha=3, init_weights="lycoris", target_modules=["q_proj"])),
    "lokr_conv": Row("net", peft.LoKrConfig(r=1, alpha=3, target_modules=["conv", "point", "line", "linear"])),
    "lokr_conv_effective": Row("net", peft.LoKrConfig(r=1, alpha=3, target_modules=["conv", "square", "point", "linear"],
        use_effective_conv2d=True)),

    # VeRA, with its projections in the file and with none, where they have to be drawn as torch draws them
    "vera": Row(LLAMA, peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"], projection_prng_key=7)),
    "vera_drawn": Row(LLAMA, peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"], projection_prng_key=7, save_projection=False)),
    "vera_shapes": Row(LLAMA, peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])),
    "vera_gpt2": Row(GPT2, peft.VeraConfig(r=4, target_modules=["c_attn", "mlp.c_proj"], bias="vera_only", fan_in_fan_out=True)),

    # IA3
    "ia3": Row(GPT2, peft.IA3Config(task_type="CAUSAL_LM"), trained=True),
    "ia3_llama": Row(LLAMA, peft.IA3Config(task_type="CAUSAL_LM"), trained=True),
    "ia3_bert": Row(BERT, peft.IA3Config(task_type="SEQ_CLS")),
    "ia3_feedforward": Row(LLAMA, peft.IA3Config(target_modules=["v_proj", "gate_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3_no_feedforward": Row(GPT2, peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=[])),
    "ia3_conv": Row("net", peft.IA3Config(target_modules=["conv", "point", "linear"], feedforward_modules=["point"])),

    # OFT
    "oft": Row(LLAMA, peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=["q_proj", "down_proj"])),
    "oft_blocks": Row(LLAMA, peft.OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, target_modules=["q_proj", "down_proj"])),
    "oft_neumann": Row(LLAMA, peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "down_proj"])),
    "oft_neumann_terms": Row(LLAMA, peft.OFTConfig(r=0, oft_block_size=4, num_cayley_neumann_terms=3, target_modules=["q_proj"])),
    "oft_shared": Row(LLAMA, peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, block_share=True, target_modules=["q_proj"])),
    "oft_coft": Row(LLAMA, peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, coft=True, eps=1e-2, target_modules=["q_proj"])),
    "oft_embedding": Row(LLAMA, peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=["embed_tokens"]),
        save={"save_embedding_layers": False}),
    "oft_conv": Row("net", peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=["point"])),
    "oft_conv_square": Row("net", peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=["square"])),
    "oft_conv_neumann": Row("net", peft.OFTConfig(r=0, oft_block_size=4, target_modules=["point"])),

    # prompts
    "prefix": Row(GPT2, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), merges=False),
    "prefix_projection": Row(GPT2, peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6,
        task_type="CAUSAL_LM"), merges=False),
    "prefix_llama": Row(LLAMA, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), merges=False),
    "prefix_grouped": Row(TIED, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), merges=False),
    "prompt_tuning": Row(GPT2, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), merges=False),
    "prompt_tuning_llama": Row(LLAMA, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), merges=False),
    "prompt_tuning_bert": Row(BERT, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"), merges=False),
    "p_tuning": Row(GPT2, peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=6, task_type="CAUSAL_LM"), merges=False),
    "p_tuning_lstm": Row(LLAMA, peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=6, encoder_reparameterization_type="LSTM",
        encoder_num_layers=1, task_type="CAUSAL_LM"), merges=False),
    "p_tuning_bert": Row(ROBERTA, peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=6, task_type="SEQ_CLS"), merges=False),

    # norms
    "ln_tuning": Row(GPT2, peft.LNTuningConfig(task_type="CAUSAL_LM")),
    "ln_tuning_llama": Row(LLAMA, peft.LNTuningConfig(task_type="CAUSAL_LM")),
    "ln_tuning_bert": Row(BERT, peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS"), merges=False),

    # what cannot be made again from its folder, or is not in jlora: for the names
    **{name: Row(base, config, outputs=False) for name, (base, config) in {
        "pissa_niter": (LLAMA, lora(r=2, init_lora_weights="pissa_niter_16")),  # its start is drawn anew at every load
        "alora": (LLAMA, lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")),
        "eva": (LLAMA, lora(init_lora_weights="eva", eva_config=peft.EvaConfig())),
        "lora_ga": (LLAMA, lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), target_modules=["q_proj"])),
        "qalora": (LLAMA, lora(use_qalora=True, qalora_group_size=4)),
        "xlora": (LLAMA, peft.XLoraConfig(hidden_size=16, adapters={"a": "./lora_llama", "b": "./lora_llama"}, task_type="CAUSAL_LM")),
        "layer_replication": (LLAMA, lora(layer_replication=[(0, 2), (1, 2)])),
        "multihead_attention": ("attention", lora(target_modules=["mha", "linear"])),
        "bdlora": (LLAMA, lora(r=4, target_modules=["q_proj", "o_proj"], use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["o_proj"],
            target_modules_bd_b=["q_proj"], nblocks=2))),
        "kasa": (LLAMA, lora(kasa_config=peft.KasaConfig())),
        "monteclora": (LLAMA, lora(monteclora_config=peft.MontecloraConfig())),
        "velora": (LLAMA, lora(velora_config=peft.VeloraConfig(num_groups=2))),
        "mica": (LLAMA, lora(init_lora_weights="mica")),
        "boft": (LLAMA, peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2)),
        "hra": (LLAMA, peft.HRAConfig(r=2)),
        "fourierft": (LLAMA, peft.FourierFTConfig(n_frequency=5)),
        "waveft": (LLAMA, peft.WaveFTConfig(n_frequency=5)),
        "c3a": (LLAMA, peft.C3AConfig(block_size=4)),
        "miss": (LLAMA, peft.MissConfig(r=2)),
        "delora": (LLAMA, peft.DeloraConfig(r=2)),
        "randlora": (LLAMA, peft.RandLoraConfig(r=2)),
        "vblora": (LLAMA, peft.VBLoRAConfig(r=2, num_vectors=4, vector_length=4)),
        "gralora": (LLAMA, peft.GraloraConfig(r=4, gralora_k=2)),
        "shira": (LLAMA, peft.ShiraConfig(r=2, random_seed=0)),
        "road": (LLAMA, peft.RoadConfig(group_size=4)),
        "hira": (LLAMA, peft.HiraConfig(r=2)),
        "poly": (LLAMA, peft.PolyConfig(r=2, n_tasks=2, n_skills=2)),
        "adaption_prompt": (LLAMA, peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")),
        "multitask_prompt_tuning": (GPT2, peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, num_ranks=2,
            task_type="CAUSAL_LM")),
        "cpt": (GPT2, peft.CPTConfig(cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1], task_type="CAUSAL_LM")),
    }.items()},
}  # fmt: skip


# transformers 5 gave some modules other names, and adapters have the names of their day: these rows are made with transformers 4
OLDER = {
    "older_vit": Row(VIT, lora(target_modules=["query", "key", "value", "dense", "projection"], modules_to_save=["classifier"])),
    "older_clip_text": Row("clip_text", lora(target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])),
}  # fmt: skip

# PEFT's merged model is another one than its adapted model here: a merge into a tied array changes the layer that shares it too,
# and patches that lie over each other are summed when OFT turns them.
OTHER_WHEN_MERGED = ["head_tied", "embedding_tied", "embedding_gpt2", "oft_conv_square"]


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = torch.nn.MultiheadAttention(8, 2)
        self.linear = torch.nn.Linear(8, 4)


class Net(torch.nn.Module):
    """What transformers' models have not: convolutions of each kind. Images of 4 channels and 7 by 7 pixels in, 5 logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, (3, 2), stride=2, padding=1)
        self.point = torch.nn.Conv2d(8, 8, 1, bias=False)
        self.groups = torch.nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.square = torch.nn.Conv2d(8, 6, 3, padding=1)
        self.line = torch.nn.Conv1d(6, 6, 3, padding=1)
        self.linear = torch.nn.Linear(6, 5)

    def forward(self, pixel_values: torch.Tensor) -> transformers.modeling_outputs.ImageClassifierOutput:
        x = torch.tanh(self.conv(pixel_values))
        x = torch.tanh(self.square(torch.tanh(self.groups(torch.tanh(self.point(x))))))
        x = torch.tanh(self.line(x.flatten(2))).mean(-1)
        return transformers.modeling_outputs.ImageClassifierOutput(logits=self.linear(x))


MIXTRAL = make_models.Case("MixtralForCausalLM", {
    "vocab_size": 48, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_local_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-3,
}, make_models.decoder)  # fmt: skip


def base(name: str) -> torch.nn.Module:
    if name == "attention":
        return Attention().eval()
    if name == "net":
        model = Net()
        model.load_state_dict(load_file(HERE / "bases" / name / "model.safetensors"))
        return model.eval()
    folder = make_models.HERE / name
    folder = folder if folder.exists() else HERE / "bases" / name
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    if name == "clip_text" and OLD:  # which reads no file of the newer names
        model = kind(kind.config_class.from_pretrained(folder, attn_implementation="eager")).eval()
        model.load_state_dict({f"text_model.{k}": v for k, v in load_file(folder / "model.safetensors").items()})
    else:
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
    folder = HERE / "bases" / "mixtral"
    model = make_models.built(MIXTRAL, 0)
    model.config.architectures = [MIXTRAL.model]
    model.config.save_pretrained(folder)
    # as it is in memory: transformers would write a file of its older form, with each expert apart, and read both
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def inputs(name: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if name == "net":
        return {"pixels": rng.normal(size=(2, 4, 7, 7)).astype(np.float32)}
    if name.startswith("vit"):
        return make_models.images(rng)["plain"]
    if name == "clip_text":
        return make_models.captions(rng, end=47)["plain"]
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
    last = {re.sub(r"\.\d+\.", ".#.", key): key for key in changed}
    arrays |= {f"merged/{key}": after[key] for key in last.values()}
    return {key: value.numpy().copy() for key, value in arrays.items()}


def cut(model: torch.nn.Module, generator: torch.Generator) -> None:
    """AdaLoRA's steps up to the last, where it settles on the ranks and leaves the rest out of its files."""
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=SGD)
    for step in range(1, STEPS + 1):
        ids = torch.randint(4, 47, (2, 7), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)


def make(name: str) -> None:
    row, folder, seed = (OLDER if OLD else ROWS)[name], HERE / name, zlib.crc32(name.encode())
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    model, config = base(row.base), copy.deepcopy(row.config)
    if name == "lora_ga":
        ids = torch.randint(4, 47, (8, 9))
        preprocess_loraga(model, config, lambda: model(input_ids=ids, labels=ids).loss.backward())
    if name == "xlora":
        model.config.use_cache = False
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as start:
        if row.convert:
            config = model.peft_config["default"]
            kind, config.init_lora_weights = config.init_lora_weights, True
            model.save_pretrained(start)
            config.init_lora_weights = kind
        moved(model, generator)
        if name == "adalora_cut":
            cut(model, generator)
        model.save_pretrained(
            folder, **row.save, **({"path_initial_model_for_weight_conversion": start} if row.convert else {})
        )
    for file in folder.rglob("README.md"):
        file.unlink()
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    if not row.outputs:
        print(f"{name}: names alone")
        return
    rng = np.random.default_rng(seed)
    record = inputs(row.base, rng)
    if name.startswith("tokens"):  # else those that were trained are not seen
        record["tokens"][0] = [40, 3, 9, 5, 7, 4, 6]
    plain, out = called(base(row.base), record), called(model, record)
    record["out"] = out.numpy()
    read = called(peft.PeftModel.from_pretrained(base(row.base), folder).eval(), record).numpy()
    differences = {"read": np.abs(read - record["out"]).max()}
    if plain.shape == out.shape:
        differences["base"] = (plain - out).abs().max().item()
        assert differences["base"] > 5e-3, (name, differences)
    if row.trained:
        if "cls" in str(row.config.task_type).lower():
            record["labels"] = rng.integers(0, record["out"].shape[-1], 2).astype(np.int32)
        record |= {kind: losses(folder, row, record, kind) for kind in ("sgd", "adamw")}
    if row.merges:
        record |= merged(model, row, record)
        differences["merged"] = np.abs(record["merged_out"] - record["out"]).max()
        assert (differences["merged"] > 0.1) == (name in OTHER_WHEN_MERGED), (name, differences)
    np.savez_compressed(folder / "outputs.npz", **record)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size / 1000:.0f} kB, differs from", {k: float(f"{v:.1e}") for k, v in differences.items()})


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        raise SystemExit(
            "run it with PYTHONHASHSEED=0, else the sets in adapter_config.json have another order each time"
        )
    if (set(sys.argv[1:]) == set(OLDER)) != OLD:
        raise SystemExit(f"{list(OLDER)} need transformers 4, and nothing else does")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore" if len(sys.argv) < 2 else "default")
    if len(sys.argv) < 2:
        for folder in HERE.iterdir():
            if folder.name not in OLDER:
                shutil.rmtree(folder)
    if not OLD:
        make_bases()
    os.chdir(HERE)  # X-LoRA has the paths of others in its config
    for name in sys.argv[1:] or ROWS:
        make(name)
