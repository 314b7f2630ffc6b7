"""An adapter as a folder that Hugging Face PEFT reads."""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jlora import tree
from jlora.adapted.adapted import Adapted, check_adapted
from jlora.interop import natives, onto, pipeline, tensor_file
from jlora.interop.layer import Layer
from jlora.interop.names import Module, Names, modules_of, names_of
from jlora.interop.peft import engine
from jlora.interop.peft.agreement import and_above, taken_over
from jlora.interop.peft.config import CONFIG, DEFAULTS, PROMPTS, TENSORS, completed
from jlora.interop.peft.patterns import targeted, value_for
from jlora.interop.peft.read import EMBEDDINGS, PREFIX, is_feedforward
from jlora.methods import lora
from jlora.methods.acts import SHARED
from jlora.methods.adalora import SCALE_EPSILON
from jlora.methods.prefix_tuning import KEY
from jlora.models import place
from jlora.models.tensors import Leaf

VERSION = "0.21.2"  # of PEFT, whose format this is
TASKS = {
    "causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "token_classification": "TOKEN_CLS",
}  # fmt: skip
_KINDS = {
    "lora": "LORA", "table": "LORA", "experts": "LORA", "pissa": "LORA", "olora": "LORA", "diff": "LORA",
    "adalora": "ADALORA", "loha": "LOHA", "lokr": "LOKR", "vera": "VERA", "ia3": "IA3", "oft": "OFT",
}  # fmt: skip
_NAMES = {
    "lora": {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
    "table": {"A": "lora_embedding_A", "B": "lora_embedding_B", "magnitude": "lora_magnitude_vector"},
    "adalora": {"A": "lora_A", "B": "lora_B", "E": "lora_E"},
    "loha": {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "lokr": {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "vera": {"b": "vera_lambda_b", "d": "vera_lambda_d"},
    "ia3": {"l": "ia3_l"},
    "oft": {"R": "oft_R.weight"},
}
_NAMES |= {"pissa": _NAMES["lora"], "olora": _NAMES["lora"], "experts": _NAMES["lora"]}


def save(
    folder: str | os.PathLike[str],
    adapted: Adapted,
    *,
    model: nn.Module | None = None,
    names: Iterable[Leaf] | None = None,
    base: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: Any = None,
    save_embedding_layers: bool = False,
    tied: bool = False,
    for_engine: bool | float = False,
    force: bool = False,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, as PEFT's `save_pretrained` does.

    The factors are written bit for bit, and the config so that PEFT multiplies them by the same scale: ranks and alphas
    that differ stand in `rank_pattern` and `alpha_pattern`. Leaves that were trained as they are become
    `modules_to_save`, `bias` or `trainable_token_indices`. Parts of one tensor of torch's whose A's differ (GPT-2's
    query, key and value after training) are written as one product of as many times the rank, which is exact.

    Args:
      folder: made if absent.
      adapted: of the parameters of `model`.
      model, names: as in `load`.
      base: the hub's name of the base model, for `base_model_name_or_path`.
      config: an `adapter_config.json` whose fields are taken over, where they say of this adapter what it is: that of
        the folder that it came from.
      dtype: of the tensors, such as "bfloat16"; None for float32.
      save_embedding_layers: write the base's embedding beside the adapter, as PEFT does for a grown vocabulary.
      tied: write factors of an embedding that is the head, too, which PEFT applies to the embedding alone until it
        merges.
      for_engine: a folder that vLLM, SGLang and TGI read right, which heed neither patterns nor rsLoRA nor DoRA: plain
        LoRA of one rank, padded with zeros, with alpha = r and the scale in B. A method that is no product of factors
        is refused; a number is the relative error up to which its best product stands for it (see `jlora.to_lora`).
      force: replace an adapter that is there.

    Raises:
      FileExistsError: if there is an adapter in the folder, unless `force`.
      ValueError: for a method that PEFT does not have, such as bottleneck adapters; several methods at once; leaves
        that no field of the config can name; a `config` that says otherwise than the adapter; factors that are not
        finite.
      TypeError: unless one of model= and names= is given.

    Warns:
      UserWarning: where a start changed the base (`jlora.loftq`, PiSSA under `jlora.quantize`), which the folder fits
        alone, and how it can be made to fit the original one.

    Source: PEFT 0.21, whose file format this is; see the README of `jlora/interop`.

    Example:
      jlora.peft.save("out", state.adapted, model=base.model, base="meta-llama/Llama-3.2-1B")
    """
    check_adapted(adapted, "peft.save, after the folder,")
    if tree.is_abstract(adapted):
        raise TypeError("peft.save: this adapter holds shapes (jax.ShapeDtypeStruct) and no arrays")
    known = names_of(model, names, "peft.save")
    modules = modules_of(known, adapted.base)
    if for_engine:
        adapted = engine.prepared(adapted, known, 0.0 if for_engine is True else float(for_engine))
    if adapted.method.name in ("prefix_tuning", "prompt_tuning"):
        tensors, written = _prompt(adapted, known, config)
    else:
        layers = _layers(adapted, known, tied)
        if for_engine:
            layers = engine.uniform(layers)
            adapted = dataclasses.replace(adapted, method=lora(layers[0].rank))
        layers = _started(layers, modules)
        written = _config(layers, adapted, known, modules, config)
        norms = {layer.module for layer in layers if _is_norm(layer, modules)}
        tensors = _tensors(layers, norms if written["peft_type"] == "LN_TUNING" else set(), modules)
        if save_embedding_layers:
            tensors |= _embeddings(adapted, known, layers)
    if base is not None:
        written["base_model_name_or_path"] = base
    place_of = place.folder_of(folder)
    if not force and any((place_of / name).exists() for name in (CONFIG, TENSORS)):
        raise FileExistsError(f"'{place_of}' holds an adapter; force=True replaces it")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"peft.save: dtype must be of floating-point numbers, not {dtype!r}")
    tensor_file.check_finite(place_of / TENSORS, tensors)
    cast = pipeline.cast(tensors, dtype)
    pipeline.warn_of_residual([adapted.base], place_of / TENSORS)
    place_of.mkdir(parents=True, exist_ok=True)
    (place_of / CONFIG).unlink(missing_ok=True)  # between the two there is no adapter, and not half of one
    tensor_file.write(place_of / TENSORS, cast, {"format": "pt"}, force=force)
    _write(place_of / CONFIG, written)


def _write(file: Path, config: Mapping[str, Any]) -> None:
    """The config, whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    temporary.replace(file)


# -- tensors -----------------------------------------------------------------------------------------------------------


def _layers(adapted: Adapted, names: Names, tied: bool) -> list[Layer]:
    """The layers under the names that torch has for the modules, without what (IA)^3 does to biases by itself."""
    layers = onto.layers_of(adapted, names.rows)
    scaled = {
        f"{layer.module}.bias": layer for layer in layers if layer.kind == "ia3" and layer.tensors["l"].shape[0] > 1
    }
    trained = {layer.key: layer for layer in layers if layer.kind == "full" and layer.key in scaled}
    known = {key for row in names.rows for key in row.keys}
    for key, layer in scaled.items():
        if key in known:
            start = onto.base_tensor(adapted.base, key, names.rows)
            value = trained[key].tensors["value"] if key in trained else start
            if not np.array_equal(value, start * layer.tensors["l"].reshape(-1)):
                raise ValueError(
                    f"{layer.module!r} has a bias, which PEFT's (IA)^3 scales, too, and jlora's does not: merge it, or "
                    "train it by LoRA"
                )
    kept = []
    for layer in layers:
        if layer.key in trained:
            continue
        if layer.key == names.tied and (layer.kind == "full" or (layer.kind == "rows" and len(layers) == 1)):
            kept.append(layer._replace(module="lm_head"))
        elif layer.key == names.tied and layer.kind != "rows" and not tied:
            raise ValueError(
                f"{layer.key!r} is the head, too, and PEFT applies its factors to the embedding alone until it merges: "
                "tied=True writes them, jlora.merge changes both"
            )
        kept.append(layer)
    return [layer._replace(module=names.written(layer.key).rpartition(".")[0]) for layer in kept]


def _started(layers: Sequence[Layer], modules: Mapping[str, Module]) -> list[Layer]:
    """PiSSA and OLoRA as they are where PEFT starts all layers so, and as plain LoRA of twice the rank where not."""
    kinds = {layer.kind for layer in layers if layer.kind not in onto.AS_THEY_ARE}
    wrong = any(layer.kind == "olora" and modules[layer.module].kind == "conv1d" for layer in layers)  # PEFT's fault
    return list(map(natives.without_initial, layers)) if len(kinds) > 1 or wrong else list(layers)


def _tensors(layers: Sequence[Layer], norms: set[str], modules: Mapping[str, Module]) -> dict[str, np.ndarray]:
    """PEFT's tensors of the layers; `norms` are the modules that LN tuning trains."""
    tensors: dict[str, np.ndarray] = {}
    adapted = {layer.module for layer in layers if layer.kind not in onto.AS_THEY_ARE}
    windows = {name for name, module in modules.items() if module.kind == "conv"}
    beyond = Counter(layer.module for layer in layers if layer.kind == "experts")
    for layer in layers:
        start = f"{PREFIX}{layer.module}"
        t = layer.tensors
        if layer.kind == "full":
            inner = ".base_layer" if layer.module in adapted else ".ln_tuning_layers" if layer.module in norms else ""
            tensors[f"{start}{inner}.{layer.parameter}"] = t["value"]
        elif layer.kind == "diff":
            tensors[f"{start}.lora_B.bias"] = t["added"]
        elif layer.kind == "rows":
            tensors[f"{start}.{'token_adapter.' if adapted else ''}trainable_tokens_delta"] = t["values"]
        else:
            if layer.kind == "experts":  # one wrapped around the other, a module's last parameter outside
                beyond[layer.module] -= 1
                start += ".base_layer" * beyond[layer.module]
            for name, end in _NAMES[layer.kind].items():
                if name in t:
                    tensors[f"{start}.{end}"] = _as_peft(layer, t[name], convolution=layer.module in windows)
    return tensors | _projections(layers)


def _as_peft(layer: Layer, x: np.ndarray, *, convolution: bool) -> np.ndarray:
    if layer.kind == "ia3" and convolution:  # PEFT keeps those of a convolution on its second axis
        return x.reshape(1, -1, 1, 1)
    return x


def _projections(layers: Sequence[Layer]) -> dict[str, np.ndarray]:
    """VeRA's, which all layers share: the largest of each.

    Raises:
      ValueError: if two layers have other ones.
    """
    found: dict[str, np.ndarray] = {}
    for layer in layers:
        if layer.kind != "vera":
            continue
        for name, axis in (("A", 1), ("B", 0)):
            x, key = layer.tensors[name], f"base_model.vera_{name}"
            known = found.get(key, x)
            n = min(known.shape[axis], x.shape[axis])
            if not np.array_equal(known.take(range(n), axis), x.take(range(n), axis)):
                raise ValueError(
                    f"{layer.module!r} has projections of its own, and PEFT's VeRA shares them: jlora.to_lora first"
                )
            found[key] = max(known, x, key=lambda y: y.shape[axis])
    return found


def _embeddings(adapted: Adapted, names: Names, layers: Sequence[Layer]) -> dict[str, np.ndarray]:
    """The base's embedding and head, as PEFT's `save_embedding_layers` writes them: those that are adapted, or all."""
    wrapped = {layer.module for layer in layers if layer.kind not in onto.AS_THEY_ARE}
    keys = [key for row in names.rows for key in row.keys if key.split(".")[-2:-1] and key.split(".")[-2] in EMBEDDINGS]
    values = {names.written(key): onto.base_tensor(adapted.base, key, names.rows) for key in keys}
    if names.tied:
        values["lm_head.weight"] = values[names.written(names.tied)]
    inside = {key for key in values if key.rpartition(".")[0] in wrapped}
    if inside:
        return {f"{PREFIX}{key.removesuffix('.weight')}.base_layer.weight": values[key] for key in sorted(inside)}
    return {f"{PREFIX}{key}": value for key, value in values.items()}


# -- the config --------------------------------------------------------------------------------------------------------


def _config(
    layers: Sequence[Layer], adapted: Adapted, names: Names, modules: Mapping[str, Module],
    given: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    low = [layer for layer in layers if layer.kind not in onto.AS_THEY_ARE]
    kinds = {_KINDS[layer.kind] for layer in low if layer.parameter == "weight" or layer.kind == "experts"}
    kinds |= {"LORA"} if any(layer.kind == "diff" for layer in layers) else set()
    rows = [layer for layer in layers if layer.kind == "rows"]
    if len(kinds) > 1:
        raise ValueError(f"a folder of PEFT's holds one method, and this adapter has {', '.join(sorted(kinds))}")
    (kind,) = kinds or {"TRAINABLE_TOKENS" if rows and len(rows) == len(layers) else "LN_TUNING"}
    config: dict[str, Any] = DEFAULTS[kind] | {"peft_type": kind, "peft_version": VERSION}
    if kind == "TRAINABLE_TOKENS":
        config["token_indices"] = rows[0].tensors["rows"].tolist()
        config["target_modules"] = sorted(
            {layer.module.rpartition(".")[2] for layer in rows if layer.module in modules}
        )
        config["task_type"] = _task(names, config)
        return config if given is None else taken_over(config, given, layers, modules)
    if kind == "LN_TUNING":
        norms = {layer.module for layer in layers if _is_norm(layer, modules)}
        config |= _trained_as_they_are([layer for layer in layers if layer.module not in norms], [], names, kind)
        config["target_modules"] = _suffixes(sorted(norms), modules, config)
        config["task_type"] = _task(names, config)
        return config if given is None else taken_over(config, given, layers, modules)
    experts = sorted({layer.key for layer in low if layer.kind == "experts"})
    if experts:
        config["target_parameters"] = experts
    own = sorted({layer.module for layer in low if layer.kind != "experts"})
    _check_kinds(kind, own, modules)
    config |= _trained_as_they_are(layers, own, names, kind)
    config["task_type"] = _task(names, config)
    config["target_modules"] = _suffixes(own, modules, config) if own else None
    config |= _METHODS[kind](low, adapted, modules)
    return config if given is None else taken_over(config, given, layers, modules)


def _is_norm(layer: Layer, modules: Mapping[str, Module]) -> bool:
    return layer.module in modules and modules[layer.module].kind == "other"


def _task(names: Names, config: Mapping[str, Any]) -> str | None:
    """PEFT's name of the task: of classifiers only where the head is trained, which PEFT takes for granted."""
    task = TASKS.get(names.head)
    return None if task in ("SEQ_CLS", "TOKEN_CLS") and not config.get("modules_to_save") else task


def _suffixes(own: Sequence[str], modules: Mapping[str, Module], config: Mapping[str, Any]) -> list[str]:
    """The shortest names that mean these modules and no others: the last part, or the whole path."""
    last = sorted({name.rpartition(".")[2] for name in own})
    saved = {"modules_to_save": config.get("modules_to_save")}
    return last if sorted(targeted({"target_modules": last, **saved}, modules)) == sorted(own) else list(own)


def _trained_as_they_are(layers: Sequence[Layer], adapted: Sequence[str], names: Names, kind: str) -> dict[str, Any]:
    """The fields `bias`, `lora_bias`, `modules_to_save` and `trainable_token_indices`."""
    fields: dict[str, Any] = {}
    whole = {layer.key for layer in layers if layer.kind == "full"}
    if names.tied:
        whole.discard("lm_head.weight")  # which is written beside the embedding that it is
    parameters: dict[str, set[str]] = {}
    for row in names.rows:
        for key in map(names.written, row.keys):
            parameters.setdefault(key.rpartition(".")[0], set()).add(key)
    saved = sorted(
        {module for module, keys in parameters.items() if keys <= whole and any(k.endswith(".weight") for k in keys)}
    )
    biases = {key for keys in parameters.values() for key in keys if key.endswith(".bias")}
    rest = whole - {key for module in saved for key in parameters[module]}
    if rest:
        if rest == {f"{module}.bias" for module in adapted} & biases:
            fields["bias"] = f"{kind.lower()}_only"
        elif rest == biases - {key for module in saved for key in parameters[module]}:
            fields["bias"] = "all"
        else:
            raise ValueError(
                f"PEFT's config cannot name {len(rest)} leaves that are trained as they are, first {min(rest)!r}: it "
                "has whole modules, all biases, or those of the adapted modules"
            )
    if saved and names.tied and names.written(names.tied) in whole:
        fields["ensure_weight_tying"] = True
    if saved:
        fields["modules_to_save"] = _modules_to_save(saved, parameters)
    added = {layer.module for layer in layers if layer.kind == "diff"}
    if added:
        if added != set(adapted):
            raise ValueError("PEFT's lora_bias is of all adapted modules or of none")
        fields["lora_bias"] = True
    rows = {layer.module: layer.tensors["rows"].tolist() for layer in layers if layer.kind == "rows"}
    if rows:
        if kind != "LORA":
            raise ValueError(f"PEFT trains rows of an embedding beside LoRA, and not beside {kind}")
        short = {name.rpartition(".")[2]: indices for name, indices in rows.items()}
        fields["trainable_token_indices"] = short if len(short) == len(rows) else rows
    return fields


def _modules_to_save(saved: Sequence[str], parameters: Mapping[str, Any]) -> list[str]:
    """Names of the saved modules: of the module above that holds nothing else, and its last part where that does."""
    heads = set()
    for name in saved:
        while "." in name:
            above = name.rpartition(".")[0]
            if not {module for module in parameters if module == above or module.startswith(f"{above}.")} <= set(saved):
                break
            name = above
        heads.add(name)
    last = tuple({name.rpartition(".")[2] for name in heads})
    hit = {end for module in parameters for end in and_above(module) if end.endswith(last)}  # no dot before it, in PEFT
    return sorted(last if hit == heads else heads)


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A `rank_pattern` or `alpha_pattern`: by the last part of the names where that is enough."""
    odd = {name: value for name, value in values.items() if value != default}
    last: dict[str, set[Any]] = {}
    for name, value in values.items():
        last.setdefault(name.rpartition(".")[2], set()).add(value)
    short = {name.rpartition(".")[2]: value for name, value in odd.items() if len(last[name.rpartition(".")[2]]) == 1}
    if all(value_for(short, name, default) == value for name, value in values.items()):
        return dict(sorted(short.items()))
    return {f"^{name}": value for name, value in sorted(odd.items())}


def _common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _lora(low: Sequence[Layer], adapted: Adapted, modules: Mapping[str, Module]) -> dict[str, Any]:
    stabilised = all(natives.inner_of(method).name == "rslora" for method, _ in adapted.method.parts)
    products = [layer for layer in low if layer.kind != "diff"]
    name = lambda layer: layer.key if layer.kind == "experts" else layer.module
    ranks = {name(layer): layer.rank for layer in products}
    alphas = {
        name(layer): natives.rounded(layer.scale * (layer.rank**0.5 if stabilised else layer.rank))
        for layer in products
    }
    alphas = {name: int(alpha) if float(alpha).is_integer() else alpha for name, alpha in alphas.items()}
    with_magnitude = {"magnitude" in layer.tensors for layer in products}
    if len(with_magnitude) > 1:
        raise ValueError("PEFT's DoRA is of all adapted modules or of none")
    started = {layer.kind for layer in products} & {"pissa", "olora"}
    rank, alpha = _common(ranks.values()), _common(alphas.values())
    inner = natives.inner_of(adapted.method.parts[0][0])
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": _patterns(alphas, alpha),
        "use_rslora": stabilised,
        "use_dora": with_magnitude == {True},
        "lora_dropout": dict(inner.config).get("dropout", 0.0),
        "fan_in_fan_out": _fan_in(products, modules),
        "init_lora_weights": started.pop() if started else True,
    }


def _fan_in(low: Sequence[Layer], modules: Mapping[str, Module]) -> bool:
    """Whether the adapted matrices are kept (in, out): PEFT looks again at each of them."""
    kinds = {modules[layer.module].kind for layer in low if layer.module in modules}
    return "conv1d" in kinds and "linear" not in kinds


def _adalora(low: Sequence[Layer], adapted: Adapted, modules: Mapping[str, Module]) -> dict[str, Any]:
    config = dict(natives.inner_of(adapted.method).config)
    rank = config["rank"]
    alphas = {natives.rounded(layer.scale * (rank + SCALE_EPSILON)) for layer in low}
    if len(alphas) > 1 or any(layer.rank > rank for layer in low):
        raise ValueError("PEFT's AdaLoRA has one first rank and one alpha: convert it first, with jlora.to_lora")
    (alpha,) = alphas
    left = {
        f"{layer.module}.lora_E": [i < layer.rank for i in range(rank)] for layer in low
    }  # which triplets of the first ones these are is not known any more
    return {
        "init_r": rank, "target_r": config["target_rank"], "r": DEFAULTS["LORA"]["r"], "lora_alpha": alpha,
        "total_step": config["total_steps"], "tinit": config["warmup"], "tfinal": config["final"],
        "deltaT": config["interval"],
        "rank_pattern": left if any(layer.rank < rank for layer in low) else None,
        "beta1": config["betas"][0], "beta2": config["betas"][1],
        "orth_reg_weight": config["orthogonality"], "fan_in_fan_out": _fan_in(low, modules),
    }  # fmt: skip


def _by_rank(low: Sequence[Layer], adapted: Adapted, modules: Mapping[str, Module]) -> dict[str, Any]:
    ranks = {layer.module: layer.rank for layer in low}
    alphas = {layer.module: natives.rounded(layer.scale * layer.rank) for layer in low}
    rank, alpha = _common(ranks.values()), _common(alphas.values())
    fields = {
        "r": rank, "alpha": alpha, "rank_pattern": _patterns(ranks, rank), "alpha_pattern": _patterns(alphas, alpha),
    }  # fmt: skip
    factor = dict(natives.inner_of(adapted.method).config).get("factor")
    return fields if factor is None else fields | {"decompose_factor": factor}


def _vera(low: Sequence[Layer], adapted: Adapted, modules: Mapping[str, Module]) -> dict[str, Any]:
    config = dict(natives.inner_of(adapted.method).config)
    return {
        "r": low[0].rank, "projection_prng_key": config["seed"], "d_initial": config["start"], "save_projection": True,
        "fan_in_fan_out": _fan_in(low, modules),
    }  # fmt: skip


def _ia3(low: Sequence[Layer], adapted: Adapted, modules: Mapping[str, Module]) -> dict[str, Any]:
    inputs = {layer.module for layer in low if layer.tensors["l"].shape[0] == 1}
    last = sorted({name.rpartition(".")[2] for name in inputs})
    if {name for name in modules if is_feedforward(name, last)} != inputs:
        last = sorted(inputs)
    return {
        "feedforward_modules": last,
        "fan_in_fan_out": _fan_in(low, modules),
    }


def _oft(low: Sequence[Layer], adapted: Adapted, modules: Mapping[str, Module]) -> dict[str, Any]:
    sides = {natives.group(layer)[1] for layer in low}
    terms = {natives.group(layer)[2] for layer in low}
    blocks = {len(layer.tensors["R"]) for layer in low}
    if len(terms) > 1 or (len(sides) > 1 and len(blocks) > 1):
        raise ValueError("PEFT's OFT has one size or one number of blocks, and one number of terms")
    (term,) = terms
    fields: dict[str, Any] = {"oft_block_size": sides.pop(), "r": 0} if len(sides) == 1 else {
        "oft_block_size": 0, "r": blocks.pop()}  # fmt: skip
    fields |= {"use_cayley_neumann": bool(term), "fan_in_fan_out": _fan_in(low, modules)}
    return fields | ({"num_cayley_neumann_terms": term} if term else {})


_METHODS: dict[str, Any] = {
    "LORA": _lora, "ADALORA": _adalora, "LOHA": _by_rank, "LOKR": _by_rank, "VERA": _vera, "IA3": _ia3, "OFT": _oft,
}  # fmt: skip


_ALLOWED = {  # kinds of modules that PEFT 0.21's methods adapt; those of others it leaves out, or fails
    "ADALORA": ("linear", "conv1d"), "LOHA": ("linear", "conv"), "LOKR": ("linear", "conv"),
    "VERA": ("linear", "conv1d"), "IA3": ("linear", "conv1d", "conv"), "OFT": ("linear",),
    "LORA": ("linear", "conv1d", "conv", "embedding"),
}  # fmt: skip


def _check_kinds(kind: str, own: Sequence[str], modules: Mapping[str, Module]) -> None:
    wrong = [name for name in own if name in modules and modules[name].kind not in _ALLOWED[kind]]
    if wrong:
        raise ValueError(
            f"PEFT has no {kind} of {modules[wrong[0]].kind} layers, and {len(wrong)} are adapted, first {wrong[0]!r}: "
            "convert it first, with jlora.to_lora"
        )


# -- prompts -----------------------------------------------------------------------------------------------------------


def _prompt(
    adapted: Adapted, names: Names, given: Mapping[str, Any] | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The one tensor of a prompt method, and its config."""
    prompts = {site.path: adapted.factors[site.path] for site in adapted.sites}
    if SHARED in adapted.factors or any(set(own) not in ({"prompt"}, {"prefix"}) for own in prompts.values()):
        raise ValueError("peft.save: a network makes this prompt: jlora.bake_prompt first")
    config: dict[str, Any]
    if adapted.method.name == "prompt_tuning":
        (own,) = prompts.values()
        value = np.asarray(own["prompt"])
        config = DEFAULTS["PROMPT_TUNING"] | {"peft_type": "PROMPT_TUNING", "token_dim": value.shape[1]}
    else:
        parts: dict[bool, list[np.ndarray]] = {True: [], False: []}
        for site in sorted(adapted.sites, key=lambda site: natives.layer_number(site.path)):
            x = np.asarray(adapted.factors[site.path]["prefix"])
            stack = x if site.stack_axes else x[None]
            which = re.search(KEY, site.path) is not None
            parts[which] += [one.reshape(len(one), -1) for one in stack]
        pairs = [part for pair in zip(parts[True], parts[False], strict=True) for part in pair]
        value = np.concatenate(pairs, axis=1)
        config = DEFAULTS["PREFIX_TUNING"] | {
            "peft_type": "PREFIX_TUNING", "num_layers": len(parts[True]), "token_dim": parts[True][0].shape[1],
        }  # fmt: skip
    config |= {"num_virtual_tokens": len(value), "task_type": TASKS.get(names.head), "peft_version": VERSION}
    extras = onto.layers_of(
        adapted.replace(sites=(), factors={e.path: adapted.factors[e.path] for e in adapted.extras}), names.rows
    )
    heads = [layer._replace(module=names.written(layer.key).rpartition(".")[0]) for layer in extras]
    if heads:
        config |= {n: x for n, x in _trained_as_they_are(heads, [], names, "PROMPT").items() if n == "modules_to_save"}
        config["task_type"] = _task(names, config)
    tensors = {f"base_model.{layer.key}": layer.tensors["value"] for layer in heads} | {"prompt_embeddings": value}
    config["num_transformer_submodules"] = 1
    if given is None:
        return tensors, config
    whole = completed(given, "config=")
    if whole["peft_type"] not in PROMPTS or whole["num_virtual_tokens"] != len(value):
        raise ValueError("config= says otherwise than the adapter in peft_type or num_virtual_tokens")
    return tensors, whole
