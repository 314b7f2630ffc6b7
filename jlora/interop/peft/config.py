"""adapter_config.json: what PEFT 0.21 writes into it, and what of that jlora does not have, by name."""

import math
from collections.abc import Mapping
from typing import Any

from jlora.interop.peft.patterns import check_expression

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
METHODS = (
    "LORA", "ADALORA", "LOHA", "LOKR", "VERA", "IA3", "OFT", "LN_TUNING", "TRAINABLE_TOKENS", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING",
)  # fmt: skip
PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")

_NOT_OURS = {
    "alora_invocation_tokens": "aLoRA (an adapter that begins in the middle of the text)",
    "arrow_config": "Arrow's routing between adapters",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
_CHANGES_THE_BASE = {
    "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ", "kasa": "KaSA", "pissa_niter": "PiSSA's randomised SVD",
}  # fmt: skip

_LORA: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": None,
    "target_modules": None, "target_parameters": None, "task_type": None, "trainable_token_indices": None,
    "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip
_SHARED = {
    name: _LORA[name]
    for name in (
        "auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "revision", "task_type",
    )
}  # fmt: skip
_TARGETS = {"target_modules": None, "exclude_modules": None}
_LAYERS = {"layers_pattern": None, "layers_to_transform": None}
_PATTERNS: dict[str, Any] = {"alpha_pattern": {}, "rank_pattern": {}}
_PROMPT = {
    name: value for name, value in _SHARED.items() if name not in ("modules_to_save",)
} | {
    "modules_to_save": None, "num_attention_heads": None, "num_layers": None, "num_transformer_submodules": None,
    "num_virtual_tokens": None, "token_dim": None,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "LORA": _LORA,
    "ADALORA": _LORA | {
        "beta1": 0.85, "beta2": 0.85, "deltaT": 1, "init_r": 12, "orth_reg_weight": 0.5, "rank_pattern": None,
        "target_r": 8, "tfinal": 0, "tinit": 0, "total_step": None,
    },
    "LOHA": _SHARED | _TARGETS | _LAYERS | _PATTERNS | {
        "alpha": 8, "init_weights": True, "module_dropout": 0.0, "r": 8, "rank_dropout": 0.0,
        "use_effective_conv2d": False,
    },
    "LOKR": _SHARED | _TARGETS | _LAYERS | _PATTERNS | {
        "alpha": 8, "decompose_both": False, "decompose_factor": -1, "init_weights": True, "module_dropout": 0.0,
        "r": 8, "rank_dropout": 0.0, "rank_dropout_scale": False, "use_effective_conv2d": False,
    },
    "VERA": _SHARED | _TARGETS | _LAYERS | {
        "bias": "none", "d_initial": 0.1, "fan_in_fan_out": False, "init_weights": True, "projection_prng_key": 0,
        "r": 256, "save_projection": True, "vera_dropout": 0.0,
    },
    "IA3": _SHARED | _TARGETS | {"fan_in_fan_out": False, "feedforward_modules": None, "init_ia3_weights": True},
    "OFT": _SHARED | _TARGETS | _LAYERS | {
        "bias": "none", "block_share": False, "coft": False, "eps": 6e-05, "fan_in_fan_out": False,
        "init_weights": True, "module_dropout": 0.0, "num_cayley_neumann_terms": 5, "oft_block_size": 32, "r": 0,
        "use_cayley_neumann": True,
    },
    "LN_TUNING": _SHARED | _TARGETS,
    "TRAINABLE_TOKENS": _SHARED | {
        "ensure_weight_tying": False, "init_weights": True, "target_modules": None, "token_indices": [],
    },
    "PREFIX_TUNING": _PROMPT | {"encoder_hidden_size": None, "prefix_projection": False},
    "PROMPT_TUNING": _PROMPT | {
        "prompt_tuning_init": "RANDOM", "prompt_tuning_init_state_dict_path": None, "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None, "tokenizer_name_or_path": None,
    },
    "P_TUNING": _PROMPT | {
        "encoder_dropout": 0.0, "encoder_hidden_size": None, "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    },
}  # fmt: skip


def completed(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config with PEFT's defaults for what it does not say, after a check that jlora has what it asks for.

    Raises:
      ValueError: for a method or an option that jlora has not, by its name, or a field of another type.
    """
    kind = config.get("peft_type")
    if kind not in METHODS:
        raise ValueError(f"{where}: peft_type={kind!r:.60} is none of those that jlora reads: {', '.join(METHODS)}")
    whole = DEFAULTS[kind] | dict(config)
    for name, what in _NOT_OURS.items():
        if whole.get(name) not in (None, False, {}, []):
            raise ValueError(f"{where}: {name}={whole[name]!r:.60} is {what}, which jlora does not have")
    init = whole.get("init_lora_weights")
    if isinstance(init, str) and (change := next((n for n in _CHANGES_THE_BASE if init.startswith(n)), None)):
        raise ValueError(
            f"{where}: init_lora_weights={init!r} ({_CHANGES_THE_BASE[change]}) trains on a changed base, which cannot "
            "be had again from the file: save it in PEFT with path_initial_model_for_weight_conversion"
        )
    if kind == "OFT" and (whole["block_share"] or whole["coft"]):
        raise ValueError(f"{where}: OFT with block_share or coft is none that jlora has")
    _check_types(whole, where)
    return whole


def _check_types(config: Mapping[str, Any], where: str) -> None:
    def wrong(name: str, expected: str) -> ValueError:
        return ValueError(f"{where}: {name} is {config[name]!r:.100}, expected {expected}")

    for name in ("r", "init_r", "num_virtual_tokens"):
        value = config.get(name)
        if value is not None and (type(value) is not int or not 0 <= value <= 2**20):
            raise wrong(name, "a rank or length from 0 to 2**20")
    for name in ("lora_alpha", "alpha"):
        if name in config and not _is_number(config[name]):
            raise wrong(name, "a finite number")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, Mapping) or len(patterns) > 10_000:
            raise wrong(name, "an object of patterns")
        for pattern, value in patterns.items():
            check_expression(pattern, f"{where}: {name}")
            if not (_is_number(value) or (name == "rank_pattern" and isinstance(value, list))):
                raise ValueError(f"{where}: {name}[{pattern!r:.100}] is {value!r:.100}, expected a finite number")
    for name in ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules", "target_parameters"):
        value = config.get(name)
        if value is not None and not (isinstance(value, str) or _are_texts(value)):
            raise wrong(name, "a string or a list of strings")
    for name, default in DEFAULTS[config["peft_type"]].items():
        value = config[name]
        if isinstance(default, bool) and name not in _LOOSE and not isinstance(value, bool):
            raise wrong(name, "true or false")
        if isinstance(default, int | float) and not isinstance(default, bool) and not _is_number(value):
            raise wrong(name, "a finite number")
        if isinstance(default, int) and not isinstance(default, bool) and name not in _REAL and value != int(value):
            raise wrong(name, "an integer")
    if not 0 <= config.get("lora_dropout", 0) < 1:
        raise wrong("lora_dropout", "a number from 0 to 1")
    layers = config.get("layers_to_transform")
    if layers is not None and not all(type(n) is int for n in (layers if isinstance(layers, list) else [layers])):
        raise wrong("layers_to_transform", "the number of a layer, or a list of them")
    pattern = config.get("layers_pattern")
    for text in [] if pattern is None else pattern if isinstance(pattern, list) else [pattern]:
        check_expression(text, f"{where}: layers_pattern")
    for name in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(config.get(name), str):
            check_expression(config[name], f"{where}: {name}")
    if not isinstance(config.get("bias", "none"), str):
        raise wrong("bias", "a string")


_LOOSE = ("init_lora_weights", "init_weights", "use_bdlora", "init_ia3_weights")  # true, false or a name
_REAL = ("lora_alpha", "alpha")  # integers by default, and numbers in files


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
