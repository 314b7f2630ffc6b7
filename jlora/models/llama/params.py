"""The checkpoints of Llama, Mistral and Qwen: Hugging Face's `LlamaForCausalLM` and its kin."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from jlora.models.architecture import (
    TOKENS,
    Architecture,
    Head,
    configured,
    flag_of,
    names_of,
    number_of,
    object_of,
    refused,
    unsupported,
)
from jlora.models.fields import LAYERS, ROWS, TOKEN, FieldError
from jlora.models.llama.modeling import Family, Llama, LlamaConfig
from jlora.models.llama.rope import Default, Dynamic, Linear, Llama3, Rope, Yarn
from jlora.models.tensors import Leaf, embedding, layered, leaf, linear

Json = Mapping[str, Any]
ROPES: dict[str, type[Rope]] = {
    "default": Default, "linear": Linear, "dynamic": Dynamic, "llama3": Llama3, "yarn": Yarn,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
KEYS = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "hidden": "intermediate_size",
    "nonlinearity": "hidden_act",
    "epsilon": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
ORIGINS = {"window": "sliding_window", "sliding": "layer_types", "rope": "rope_scaling"}
OPTIONAL = {"nonlinearity": "silu", "epsilon": 1e-6, "tied": False}
NOT_SAID = {"head", "labels", "dropout", "dtype", "param_dtype", "scan", "remat"}  # by `write`


# -- what a config.json says of the frequencies ------------------------------------------------------------------------


def read_rope(json: Json) -> Rope:
    """RoPE settings from `rope_parameters`, or `rope_scaling` and `rope_theta` as they were before transformers 5."""
    scaling = object_of(json, "rope_scaling") or object_of(json, "rope_parameters")
    entries = {k: v for k, v in scaling.items() if v is not None}
    entries = {"rope_type": entries.pop("type", "default"), "rope_theta": json.get("rope_theta", 10000.0)} | entries
    unsupported({**json, **entries}, rope_type=tuple(ROPES), partial_rotary_factor=(None, 1.0))
    entries.pop("partial_rotary_factor", None)
    kind = ROPES[name := entries.pop("rope_type")]
    known = {field.name: field.default is MISSING for field in fields(kind)}
    wrong = [f"lacks {key!r}" for key, needed in known.items() if needed and key not in entries]
    wrong += [f"has {key!r}, which is none of {', '.join(known)}" for key in entries if key not in known]
    if wrong:
        raise ValueError(f"RoPE of type {name!r} {wrong[0]}")
    try:
        return kind(**entries)
    except FieldError as error:
        raise refused(error, {name: entries.get(name) for name in error.fields}) from error


def write_rope(rope: Rope) -> dict[str, Any]:
    """Keys that `read_rope` reads, in both styles."""
    name = next(name for name, kind in ROPES.items() if type(rope) is kind)
    entries = {key: value for key, value in asdict(rope).items() if value is not None}
    theta = {"rope_theta": entries.pop("rope_theta")}
    scaling = {"rope_type": name} | entries
    return theta | {"rope_parameters": scaling | theta, "rope_scaling": scaling if entries else None}


# -- what each family says of itself -----------------------------------------------------------------------------------


def _windows(json: Json) -> dict[str, Any]:
    """Qwen's windows: of the layers that say so, or of all from a number on."""
    entries = {"max_window_layers": 28, "sliding_window": 4096, **json}
    layers = number_of(entries, "num_hidden_layers", LAYERS)
    kinds = names_of(json, "layer_types")
    for kind in kinds:
        unsupported({"layer_types": kind}, layer_types=(SLIDING, FULL))
    if json.get("layer_types") is None:
        first = number_of(entries, "max_window_layers", TOKEN)
        kinds = [SLIDING if i >= first else FULL for i in range(layers)]
    if len(kinds) != layers:
        raise ValueError(f"config.json has layer_types of {len(kinds)} layers, and num_hidden_layers={layers}")
    window = None if entries["sliding_window"] is None else number_of(entries, "sliding_window", ROWS)
    if window is None or not flag_of(json, "use_sliding_window", default=False):
        return {}
    return {"window": window, "sliding": tuple(kind == SLIDING for kind in kinds)}


def _window_entries(c: LlamaConfig) -> dict[str, Any]:
    slides = c.sliding or (c.window is not None,) * c.layers
    entries = {"use_sliding_window": c.window is not None, "layer_types": [SLIDING if one else FULL for one in slides]}
    if c.window is not None:
        entries["sliding_window"] = c.window
    if any(slides) and list(slides) == sorted(slides):
        entries["max_window_layers"] = slides.index(True)
    return entries


def _biases(json: Json) -> dict[str, Any]:
    bias = flag_of(json, "attention_bias", default=False)
    return {"qkv_bias": bias, "out_bias": bias}


def _architecture(
    family: Family,
    classes: str,
    own: Callable[[Json], dict[str, Any]],
    entries: Callable[[LlamaConfig], dict[str, Any]],
    *,
    key_heads: int | None = None,
    head_width: int | None = None,
) -> Architecture:
    """A family's.

    Args:
      family: its model_type.
      classes: what the names of transformers' classes begin with.
      own, entries: to and from config.json, of what not all families have.
      key_heads, head_width: where config.json does not say them; None for those that follow from the other shapes.
    """

    def read(json: Json, head: Head) -> LlamaConfig:
        return configured(
            LlamaConfig, json, KEYS,
            optional=OPTIONAL | {"key_heads": key_heads, "head_width": head_width}, origins=ORIGINS,
            family=family, rope=read_rope(json), head=head, **own(json),
        )  # fmt: skip

    def write(c: LlamaConfig) -> dict[str, Any]:
        json = {
            **{key: getattr(c, name) for name, key in KEYS.items()},
            "num_key_value_heads": c.key_heads or c.heads,
            "head_dim": c.head_width or c.width // c.heads,
            **write_rope(c.rope),
            **entries(c),
        }
        again = read(json, c.head)
        for name in (field.name for field in fields(c) if field.name not in NOT_SAID):
            if getattr(again, name) != getattr(c, name):
                raise ValueError(f"a model of family {family!r} is not saved with {name}={getattr(c, name)!r}")
        return json

    return Architecture(
        model_type=family,
        config=LlamaConfig,
        classes={
            "none": f"{classes}Model",
            "causal_lm": f"{classes}ForCausalLM",
            "sequence_classification": f"{classes}ForSequenceClassification",
            "token_classification": f"{classes}ForTokenClassification",
        },
        read=read,
        write=write,
        build=Llama,
        inputs=lambda c: (TOKENS,),
        table=table,
        prefix="model.",
        ignored=r"\.rotary_emb\.inv_freq$|^lm_head\.weight$",
        fits=lambda c: c.family == family,
    )


def table(c: LlamaConfig) -> list[Leaf]:
    """The rows of all families."""
    block = [
        *_norm("ln_1", "model.layers.{i}.input_layernorm"),
        *linear("attn/query", "model.layers.{i}.self_attn.q_proj", bias=c.qkv_bias),
        *linear("attn/key", "model.layers.{i}.self_attn.k_proj", bias=c.qkv_bias),
        *linear("attn/value", "model.layers.{i}.self_attn.v_proj", bias=c.qkv_bias),
        *(_norm("attn/query_norm", "model.layers.{i}.self_attn.q_norm") if c.qk_norm else []),
        *(_norm("attn/key_norm", "model.layers.{i}.self_attn.k_norm") if c.qk_norm else []),
        *linear("attn/out", "model.layers.{i}.self_attn.o_proj", bias=c.out_bias),
        *_norm("ln_2", "model.layers.{i}.post_attention_layernorm"),
        *linear("mlp/gate", "model.layers.{i}.mlp.gate_proj", bias=c.mlp_bias),
        *linear("mlp/up", "model.layers.{i}.mlp.up_proj", bias=c.mlp_bias),
        *linear("mlp/down", "model.layers.{i}.mlp.down_proj", bias=c.mlp_bias),
    ]
    heads = {
        "causal_lm": [] if c.tied else linear("head", "lm_head", bias=False),
        "sequence_classification": linear("score", "score", bias=False),
        "token_classification": linear("classifier", "score"),
    }
    return [
        *embedding("wte", "model.embed_tokens"),
        *layered(block, c.layers, scan=c.scan),
        *_norm("ln_f", "model.norm"),
        *heads.get(c.head, []),
    ]


def _norm(path: str, key: str) -> list[Leaf]:
    """The row of an RMSNorm."""
    return [leaf(f"{path}/scale", f"{key}.weight")]


ARCHITECTURES = (
    _architecture(
        "llama", "Llama",
        own=lambda json: {**_biases(json), "mlp_bias": flag_of(json, "mlp_bias", default=False)},
        entries=lambda c: {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias},
    ),
    _architecture(
        "mistral", "Mistral",
        own=lambda json: {"window": json.get("sliding_window", 4096)},
        entries=lambda c: {"sliding_window": c.window},
        key_heads=8,
    ),
    _architecture(
        "qwen2", "Qwen2",
        own=lambda json: {"qkv_bias": True, **_windows(json)},
        entries=_window_entries,
        key_heads=32,
    ),
    _architecture(
        "qwen3", "Qwen3",
        own=lambda json: {"qk_norm": True, **_biases(json), **_windows(json)},
        entries=lambda c: {"attention_bias": c.qkv_bias, **_window_entries(c)},
        key_heads=32, head_width=128,
    ),
)  # fmt: skip
