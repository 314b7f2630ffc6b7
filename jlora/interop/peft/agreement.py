"""Whether a config that is given says of an adapter what it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from jlora.interop import onto
from jlora.interop.layer import Layer
from jlora.interop.names import Module
from jlora.interop.peft.config import completed
from jlora.interop.peft.patterns import targeted, value_for
from jlora.interop.peft.read import is_feedforward


def and_above(module: str) -> list[str]:
    """A module's path, and those of the modules that it is in."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def taken_over(
    config: dict[str, Any], given: Mapping[str, Any], layers: Sequence[Layer], modules: Mapping[str, Module]
) -> dict[str, Any]:
    """The given config, if it says of this adapter what it is.

    Raises:
      ValueError: for the fields that say something else.
    """
    whole = completed(given, "config=")
    wrong = [name for name, value in config.items() if name not in _FREE and not _says(name, value, whole, modules)]
    if config["peft_type"] == "ADALORA" and whole["lora_alpha"] != config["lora_alpha"]:
        wrong.append("lora_alpha")
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"), ("alpha", "alpha_pattern")):
        if name not in config or pattern not in config or config["peft_type"] == "ADALORA":
            continue
        for layer in layers:
            path = layer.key if layer.kind == "experts" else layer.module
            mine, theirs = (value_for(c.get(pattern) or {}, path, c.get(name)) for c in (config, whole))
            if layer.kind not in onto.AS_THEY_ARE and mine != theirs:
                wrong.append(f"{name} of {path!r}")
    if wrong:
        raise ValueError(f"config= says otherwise than the adapter in {', '.join(wrong[:5])}")
    return whole


# Fields that a config may have otherwise: what does not decide the function, and what is compared by what it means.
_FREE = (
    "auto_mapping", "base_model_name_or_path", "decompose_both", "decompose_factor", "deltaT", "beta1", "beta2",
    "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_weights", "init_ia3_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "megatron_core", "module_dropout",
    "orth_reg_weight", "peft_version", "projection_prng_key", "qalora_group_size", "rank_dropout",
    "rank_dropout_scale", "revision", "target_r", "task_type", "tfinal", "tinit", "total_step", "vera_dropout", "eps",
    "d_initial", "use_effective_conv2d", "corda_config", "eva_config", "lora_ga_config", "megatron_config",
    "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern",
)  # fmt: skip


def _says(name: str, value: Any, given: Mapping[str, Any], modules: Mapping[str, Module]) -> bool:
    """Whether a given config means the same by a field."""
    theirs = given.get(name)
    if name == "target_modules":
        if value is None or given.get("target_parameters"):
            return True
        mine = {"target_modules": value, "modules_to_save": given.get("modules_to_save")}
        return sorted(targeted(given, modules)) == sorted(targeted(mine, modules))
    if name == "modules_to_save":
        trained = lambda names: {m for m in modules for end in and_above(m) if end.endswith(tuple(names or ("?",)))}
        return trained(value) == trained(theirs)
    if name == "feedforward_modules":
        named = lambda names: {m for m in modules if is_feedforward(m, names)}
        return named(value) == named(theirs)
    if name == "init_lora_weights":
        started = ("pissa", "olora")
        return value == theirs if value in started or theirs in started else True
    if name == "trainable_token_indices":
        return _indices(value) == _indices(theirs)
    if name == "target_parameters":
        ends = lambda names: {text.rpartition(".")[2] for text in names or ()}
        return not value or ends(value) == ends(theirs)
    if name == "oft_block_size" or (name == "num_cayley_neumann_terms" and not given.get("use_cayley_neumann")):
        return name != "oft_block_size" or theirs == value or theirs == 0
    return bool(value == theirs)


def _indices(value: Any) -> list[list[int]]:
    return sorted(value.values()) if isinstance(value, dict) else [value] if value else []
