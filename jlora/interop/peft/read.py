"""A folder of PEFT's, as layers: what each tensor is, by the end of its name, and what the config says of its scale."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.interop import tensor_file
from jlora.interop.layer import Layer
from jlora.interop.peft.config import CONFIG, PICKLE, PROMPTS, TENSORS, completed
from jlora.interop.peft.patterns import QUICK, check_effort, ends_with, value_for
from jlora.models import files, reading

PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Folder:
    """An adapter of PEFT's.

    Attributes:
      path: of the folder.
      config: its adapter_config.json, with PEFT's defaults.
      layers: one for each parameter that it changes.
      prompt: the `prompt_embeddings` of prompt methods, (tokens, width); None of others.
      saved: keys of the base's embeddings that lie beside the adapter (`save_embedding_layers`).
    """

    path: Path
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    prompt: np.ndarray | None = None
    saved: tuple[str, ...] = ()


def read(
    name: str | os.PathLike[str], *, shapes: Shapes | None = None, pickled: bool = False, revision: str | None = None
) -> Folder:
    """Reads a folder by PEFT's `save_pretrained`, or an adapter of the hub.

    Nothing but the config and the tensors is read: no tokenizer, no template, no code.

    Args:
      name: the folder, or the hub's name of the adapter.
      shapes: of the base's tensors, where they are known: they tell experts' parameters apart.
      pickled: read an `adapter_model.bin` where there are no safetensors, without running what it says.
      revision: of the hub.

    Raises:
      FileNotFoundError: if there is no such adapter.
      ValueError: for what is no such file or damaged, a method or option that jlora has not, a tensor with a name that
        says nothing, or a layer of which a tensor is missing.
    """
    wanted = (CONFIG, TENSORS, PICKLE) if pickled else (CONFIG, TENSORS)
    folder = files.folder_of(name, revision, wanted, config=CONFIG, what="adapter of PEFT's")
    config = completed(tensor_file.read_config(folder / CONFIG), f"'{folder / CONFIG}'")
    file = folder / TENSORS
    if not reading.has(file):
        if not reading.has(folder / PICKLE):
            raise FileNotFoundError(f"'{folder}' has a config, and no {TENSORS}")
        file = folder / PICKLE
    with tensor_file.open(file, pickled=pickled) as opened:
        tensors = opened.read_all()
    tensor_file.check_finite(file, tensors)
    try:
        return Folder(folder, config, *parsed(config, tensors, shapes))
    except ValueError as error:
        raise ValueError(f"'{file}': {error}") from error


class Parsed(NamedTuple):
    """Layers of a file, and what is in it beside them."""

    layers: tuple[Layer, ...]
    prompt: np.ndarray | None = None
    saved: tuple[str, ...] = ()


def parsed(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shapes: Shapes | None = None) -> Parsed:
    """The layers of a file's tensors."""
    if config["peft_type"] in PROMPTS:
        prompt = tensors.get("prompt_embeddings", np.zeros(()))
        if prompt.ndim != 2:
            raise ValueError(f"expected prompt_embeddings (tokens, width), found {', '.join(sorted(tensors)[:5])}")
        rest = {key.replace("base_model.", PREFIX, 1): x for key, x in tensors.items() if key != "prompt_embeddings"}
        heads = [_whole(key, x, config)[0] for key, x in rest.items()]
        return Parsed(tuple(layer for layer in heads if layer is not None), prompt)
    groups, rest = _grouped(tensors)
    for name in ("rank_pattern", "alpha_pattern"):
        expressions = [f"(.*\\.)?{text}" for text in config.get(name) or {}]
        check_effort(expressions, list(groups), QUICK, name)
    layers: list[Layer] = []
    for module, own in groups.items():
        layers += _adapted(module, own, config, rest, shapes)
    saved = []
    for key, value in list(rest.items()):
        if key.startswith("base_model.vera_"):
            continue
        layer, was_base = _whole(key, value, config)
        if layer is not None:
            layers.append(layer)
        if was_base and layer is not None:
            saved.append(layer.key)
    layers.sort(key=lambda layer: layer.kind != "full")  # what is replaced, then what is added to it
    return Parsed(tuple(_distinct(layers)), None, tuple(saved))


def _distinct(layers: list[Layer]) -> list[Layer]:
    """Layers of which each parameter has one: what PEFT wrote twice under two names has to be the same."""
    found: dict[tuple[str, str], Layer] = {}
    for layer in layers:
        known = found.setdefault((layer.key, layer.kind), layer)
        if known is not layer and (
            layer.kind != "full" or not np.array_equal(known.tensors["value"], layer.tensors["value"])
        ):
            raise ValueError(f"{layer.key!r} is there twice, with two values")
    return list(found.values())


# -- names -------------------------------------------------------------------------------------------------------------

_PARTS = {
    "lora_A.weight": "A", "lora_A": "A", "lora_B.weight": "B", "lora_B": "B", "lora_B.bias": "bias", "lora_E": "E",
    "lora_embedding_A": "embedding_A", "lora_embedding_B": "embedding_B", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a",
    "hada_w2_b": "w2_b", "hada_t1": "t1", "hada_t2": "t2", "lokr_w1": "w1", "lokr_w1_a": "w1_a", "lokr_w1_b": "w1_b",
    "lokr_w2": "w2", "lokr_w2_a": "w2_a", "lokr_w2_b": "w2_b", "lokr_t2": "t2", "ia3_l": "l", "oft_R.weight": "R",
    "oft_R": "R", "oft_embedding_R.weight": "embedding_R", "vera_lambda_b": "b", "vera_lambda_d": "d",
    "token_adapter.trainable_tokens_delta": "tokens", "trainable_tokens_delta": "tokens",
}  # fmt: skip
_ENDS = tuple(sorted(_PARTS, key=len, reverse=True))
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared")  # modules of them, by name
_IGNORED = ("lora_ranknum", "ranknum")


def _grouped(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The tensors by module and part; and those that are no part of an adapter."""
    groups: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    rest = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        end = next((end for end in _ENDS if name.endswith(f".{end}") or name == end), None)
        if end is None:
            if not name.endswith(_IGNORED):
                rest[key] = value
            continue
        module = name.removesuffix(end).removesuffix(".")
        if _PARTS[end] in groups[module]:
            raise ValueError(f"{key!r} is there twice, under two names")
        groups[module][_PARTS[end]] = value
    return groups, rest


_SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")


def _whole(key: str, value: np.ndarray, config: Mapping[str, Any]) -> tuple[Layer | None, bool]:
    """A tensor that replaces a parameter, and whether `save_embedding_layers` put it there, as one of the base's."""
    name = key.removeprefix(PREFIX)
    if ".original_module." in name:  # PEFT writes a few of those with bias="all": nothing reads them
        return None, False
    name = _SAVED.sub("", name).replace(".ln_tuning_layers.", ".")
    wrapped = name.endswith(".base_layer.weight")
    module, _, parameter = name.replace(".base_layer.", ".").rpartition(".")
    if parameter not in ("weight", "bias") or not module:
        raise ValueError(f"{key!r} is no tensor of an adapter that jlora knows")
    saved = tuple(config.get("modules_to_save") or ())
    parts = module.split(".")
    trained = any(".".join(parts[: i + 1]).endswith(saved) for i in range(len(parts)))  # no dot before it, in PEFT
    is_base = wrapped or (parts[-1] in EMBEDDINGS and parameter == "weight" and not trained)
    return Layer(module, "full", {"value": value}, parameter=parameter), is_base


# -- each method -------------------------------------------------------------------------------------------------------


def _adapted(
    module: str, own: dict[str, np.ndarray], config: Mapping[str, Any], rest: Mapping[str, np.ndarray],
    shapes: Shapes | None,
) -> list[Layer]:  # fmt: skip
    if "tokens" in own:
        rows = np.asarray(_indices(module, config), np.int64)
        if len(rows) != len(own["tokens"]):
            raise ValueError(f"{module!r} has {len(own['tokens'])} rows, and the config {len(rows)} indices of tokens")
        return [Layer(module, "rows", {"rows": rows, "values": own["tokens"]})]
    return _METHODS[config["peft_type"]](module, own, config, rest, shapes)


def _indices(module: str, config: Mapping[str, Any]) -> list[int]:
    found = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(found, Mapping):
        found = next((value for name, value in found.items() if ends_with(module, [name])), None)
    if not isinstance(found, list) or not all(type(i) is int and i >= 0 for i in found):
        raise ValueError(f"{module!r} has rows of tokens, and the config no list of their numbers")
    return found


_VECTORS = ("b", "d", "bias", "magnitude")  # parts that may have one axis


def _need(module: str, own: Mapping[str, np.ndarray], *names: str) -> None:
    """Raises ValueError unless the parts are there, and have the axes of matrices where they are."""
    missing = [name for name in names if name not in own]
    if missing:
        raise ValueError(f"{module!r} has {', '.join(sorted(own))}, and no {', '.join(missing)}")
    flat = [name for name, x in own.items() if x.ndim < (1 if name in _VECTORS else 2)]
    if flat:
        raise ValueError(f"{module!r} has {flat[0]} of shape {own[flat[0]].shape}, expected a matrix")


def _rank_and_alpha(module: str, config: Mapping[str, Any], alpha: str) -> tuple[int, float]:
    """R and alpha as the config has them for a module."""
    rank = value_for(config.get("rank_pattern") or {}, module, config["r"])
    return int(rank) if not isinstance(rank, list) else config["r"], float(
        value_for(config.get("alpha_pattern") or {}, module, config[alpha])
    )


def _lora(
    module: str, own: dict[str, np.ndarray], config: Mapping[str, Any], rest: Any, shapes: Shapes | None
) -> list[Layer]:
    table = "embedding_A" in own or "embedding_B" in own
    if table:
        own = {name.removeprefix("embedding_"): x for name, x in own.items()}
    _need(module, own, "A", "B")
    module, parameter = _parameter(module, own, config, shapes)
    name = f"{module}.{parameter}" if parameter != "weight" else module
    rank, alpha = _rank_and_alpha(name, config, "lora_alpha")
    kind = "table" if table else "lora"
    if parameter != "weight" or _is_stack(own, rank):
        kind = "experts" if len(own["A"]) != rank or parameter != "weight" else kind
    elif len(own["A"]) != rank:
        raise ValueError(f"{module!r} has A of rank {len(own['A'])}, and the config r={rank}")
    if rank < 1:
        raise ValueError(f"{module!r} has rank {rank} in the config")
    scale = alpha / rank**0.5 if config["use_rslora"] else alpha / rank
    init = config.get("init_lora_weights")
    if kind == "lora" and init in ("pissa", "olora") and "magnitude" not in own:
        kind = str(init)
    elif kind == "lora" and init in ("pissa", "olora"):
        raise ValueError(f"{module!r}: DoRA on a base that {init} changed is none that jlora has")
    bias = own.pop("bias", None)
    layers = [Layer(module, kind, own, scale, parameter, declared=rank if kind == "experts" else 0)]
    if bias is not None:
        layers.append(Layer(module, "diff", {"added": bias}, scale, "bias"))
    return layers


def _is_stack(own: Mapping[str, np.ndarray], rank: int) -> bool:
    return rank > 0 and len(own["A"]) > rank and len(own["A"]) % rank == 0 and own["B"].shape[1] == len(own["A"])


def _parameter(
    module: str, own: Mapping[str, np.ndarray], config: Mapping[str, Any], shapes: Shapes | None
) -> tuple[str, str]:
    """The module and the name of the parameter that a layer adapts: "weight", or one of `target_parameters`.

    The key does not say which. Those of a module are wrapped one around the other in the order in which the module has
    them, the last one outside: where the shapes do not tell them apart, the config is taken to name them in that order.
    """
    depth = 0
    while module.endswith(".base_layer"):
        module, depth = module.removesuffix(".base_layer"), depth + 1
    wanted = config.get("target_parameters") or ()
    own_names = [t.rpartition(".")[2] for t in wanted if ends_with(module, [t.rpartition(".")[0]]) or "." not in t]
    names = list(dict.fromkeys(own_names))
    if not names:
        if depth:
            raise ValueError(f"{module}.base_layer is adapted, which is a kind of module that jlora does not have")
        return module, "weight"
    if shapes is not None:
        ends = {own["A"].shape[-1], own["B"].shape[0]}
        fitting = [name for name in names if set(shapes.get(f"{module}.{name}", ())[1:]) == ends]
        if len(fitting) == 1:
            return module, fitting[0]
    if depth >= len(names):
        raise ValueError(f"{module!r} has more layers than target_parameters names of its parameters")
    return module, names[len(names) - 1 - depth]


def _adalora(
    module: str, own: dict[str, np.ndarray], config: Mapping[str, Any], rest: Any, shapes: Shapes | None
) -> list[Layer]:
    _need(module, own, "A", "B", "E")
    alpha = config["lora_alpha"] if config["lora_alpha"] > 0 else float(config["init_r"])
    return [Layer(module, "adalora", own, alpha / (config["init_r"] + 1e-5))]  # the scale does not follow the rank


def _loha(
    module: str, own: dict[str, np.ndarray], config: Mapping[str, Any], rest: Any, shapes: Shapes | None
) -> list[Layer]:
    _need(module, own, "w1_a", "w1_b", "w2_a", "w2_b")
    rank, alpha = _rank_and_alpha(module, config, "alpha")
    return [Layer(module, "loha", own, alpha / max(rank, 1))]


def _lokr(
    module: str, own: dict[str, np.ndarray], config: Mapping[str, Any], rest: Any, shapes: Shapes | None
) -> list[Layer]:
    if ("w1" in own) == ("w1_a" in own or "w1_b" in own) or ("w2" in own) == ("w2_a" in own or "w2_b" in own):
        raise ValueError(f"{module!r} has {', '.join(sorted(own))}: a LoKr has each of w1 and w2 whole or in two parts")
    _need(module, own, *(() if "w1" in own else ("w1_a", "w1_b")), *(() if "w2" in own else ("w2_a", "w2_b")))
    rank, alpha = _rank_and_alpha(module, config, "alpha")
    return [Layer(module, "lokr", own, alpha / max(rank, 1), declared=rank)]


def _ia3(
    module: str, own: dict[str, np.ndarray], config: Mapping[str, Any], rest: Any, shapes: Shapes | None
) -> list[Layer]:
    _need(module, own, "l")
    x = own["l"]
    if x.ndim == 2 and 1 in x.shape and x.size > 1:
        inputs = x.shape[0] == 1
    else:
        inputs = is_feedforward(module, config.get("feedforward_modules"))
    if inputs:
        return [Layer(module, "ia3", {"l": own["l"].reshape(1, -1, *own["l"].shape[2:])})]
    outputs = own["l"].reshape(-1, 1, *own["l"].shape[2:])
    return [
        Layer(module, "ia3", {"l": outputs}),
        Layer(module, "ia3", {"l": outputs.reshape(-1)}, parameter="bias", optional=True),  # PEFT scales the output
    ]


def is_feedforward(module: str, names: Any) -> bool:
    """Whether (IA)^3 scales a module's inputs: PEFT takes the end of its path, with no dot before it."""
    return bool(re.fullmatch(names, module)) if isinstance(names, str) else module.endswith(tuple(names or ("?",)))


def _vera(
    module: str, own: dict[str, np.ndarray], config: Mapping[str, Any], rest: Mapping[str, np.ndarray],
    shapes: Shapes | None,
) -> list[Layer]:  # fmt: skip
    _need(module, own, "b", "d")
    a, b = (rest.get(f"base_model.vera_{name}") for name in ("A", "B"))
    if a is None or b is None:
        raise ValueError(
            "VeRA without its projections: PEFT draws them with torch's generator, which jlora does not have. Save it "
            "with save_projection=True"
        )
    return [Layer(module, "vera", own | {"A": a, "B": b})]


def _oft(
    module: str, own: dict[str, np.ndarray], config: Mapping[str, Any], rest: Any, shapes: Shapes | None
) -> list[Layer]:
    if "embedding_R" in own:
        raise ValueError(f"{module!r} is an embedding: jlora's OFT turns the inputs of linear layers alone")
    _need(module, own, "R")
    terms = config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else 0
    return [Layer(module, "oft", own | ({"terms": np.asarray(terms)} if terms else {}))]


def _none(
    module: str, own: dict[str, np.ndarray], config: Mapping[str, Any], rest: Any, shapes: Shapes | None
) -> list[Layer]:
    raise ValueError(f"{module!r} has {', '.join(sorted(own))}, which {config['peft_type']} does not have")


_Reader = Callable[
    [str, dict[str, np.ndarray], Mapping[str, Any], Mapping[str, np.ndarray], Shapes | None], list[Layer]
]
_METHODS: dict[str, _Reader] = {
    "LORA": _lora, "ADALORA": _adalora, "LOHA": _loha, "LOKR": _lokr, "VERA": _vera, "IA3": _ia3, "OFT": _oft,
    "LN_TUNING": _none, "TRAINABLE_TOKENS": _none,
}  # fmt: skip
