"""A folder of PEFT's onto the parameters of a JAX model."""

import dataclasses
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jlora import methods, tree
from jlora.adapted.adapted import Adapted
from jlora.adapted.apply import apply
from jlora.interop import natives, onto
from jlora.interop.forms import form_of
from jlora.interop.layer import INITIAL, Layer
from jlora.interop.names import Names, modules_of, names_of
from jlora.interop.natives import NATIVE, Native
from jlora.interop.peft.config import DEFAULTS
from jlora.interop.peft.patterns import targeted
from jlora.interop.peft.read import Folder, read
from jlora.methods import Method
from jlora.methods.prefix_tuning import KEY
from jlora.models.tensors import Leaf, to_tensors
from jlora.transform.sites import Target


def load(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    model: nn.Module | None = None,
    names: Iterable[Leaf] | None = None,
    strict: bool = True,
    tied: bool = False,
    pickled: bool = False,
    revision: str | None = None,
) -> Adapted:
    """An adapter that Hugging Face PEFT saved, onto the parameters that it was trained on.

    The factors are those of the file bit for bit, in float32, and train on: the same methods, ranks and scales. Nothing
    of the base is changed, where PEFT changes it too (PiSSA and OLoRA: what was taken out of the weight is computed
    again, and taken out of the product). A matrix that is one tensor in torch and several here (GPT-2's c_attn) has A
    in each of its parts, which stay the same in training (`jlora.tied`). (IA)^3's scaled biases are leaves that are
    trained as they are.

    Args:
      folder: of `save_pretrained`, or the hub's name of the adapter.
      params: the base's parameters.
      model: one of `jlora.models`, whose key table says which tensor is which parameter.
      names: the key table of another model.
      strict: an error, and not a warning, where the config names modules or tokens that the file has nothing of.
      tied: take a low-rank adapter of an embedding that is the head, too. Here they are one parameter, and both change,
        as in PEFT once it merges.
      pickled: read an `adapter_model.bin` where there are no safetensors, without running what it says.
      revision: of the hub.

    Raises:
      FileNotFoundError: if there is no such adapter.
      ValueError: for a damaged file, a method or an option that jlora does not have, by its name; and for tensors that
        fit no parameter, and parameters that the config names and that have none: all of them in one error.
      TypeError: unless one of model= and names= is given.

    Source: PEFT 0.21, whose file format this is; see the README of `jlora/interop`.

    Example:
      base = jlora.models.load("meta-llama/Llama-3.2-1B")
      adapted = jlora.peft.load("someone/llama-3.2-1b-lora", base.params, model=base.model)
    """
    known = names_of(model, names, "peft.load")
    params = tree.canonical(params)
    shapes = {key: module.shape for key, module in modules_of(known, params).items()}
    found = read(
        folder, shapes={f"{key}.weight": shape for key, shape in shapes.items()}, pickled=pickled, revision=revision
    )
    origin = f"'{found.path}'"
    try:
        if found.prompt is not None:
            return _prompt(found, params, known)
        layers = _of_table(found, known, tied)
        _check_targets(found, known, params, strict)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    starting = [layer.key for layer in layers if layer.kind in INITIAL or (layer.kind == "ia3" and layer.optional)]
    if starting and tree.is_abstract(params):
        raise TypeError(
            f"peft.load: {origin} changes {starting[0]!r} by what the base has there, and these parameters are shapes "
            "(jax.ShapeDtypeStruct): load it onto arrays"
        )
    params, layers = _with_saved(found, params, layers, known)
    layers = _from_the_base(layers, params, known)
    return onto.place(layers, params, known.rows, kinds=NATIVE | _kinds(found.config), origin=origin)


def _of_table(found: Folder, names: Names, tied: bool) -> list[Layer]:
    """The layers, by the keys of the table.

    Raises:
      ValueError: for a tied embedding of which one of its two uses is adapted, unless `tied`.
    """
    layers = [layer._replace(module=names.read(layer.key).rpartition(".")[0]) for layer in found.layers]
    if not names.tied:
        return layers
    head = [layer for layer in layers if layer.key == "lm_head.weight"]
    table = [layer for layer in layers if layer.key == names.tied]
    rest = [layer for layer in layers if layer.key != "lm_head.weight"]
    if head and table and head[0].kind == table[0].kind and _same(head[0], table[0]):
        return rest
    is_base = {names.read(key) for key in found.saved} >= {layer.key for layer in (*head, *table)}
    if not head and (not table or is_base or (tied and table[0].kind != "full")):
        return rest
    which = "the head" if head else "the embedding"
    hint = "" if head or table[0].kind == "full" else "; tied=True changes both, as PEFT's merged model has it"
    raise ValueError(
        f"the adapter changes {which} alone of an embedding that is tied to the head: PEFT keeps the two apart, and "
        f"here they are one parameter{hint}"
    )


def _same(one: Layer, other: Layer) -> bool:
    """Whether both leave the same behind."""
    return one.kind in ("full", "rows") and all(np.array_equal(x, other.tensors[n]) for n, x in one.tensors.items())


def _check_targets(found: Folder, names: Names, params: Any, strict: bool) -> None:
    """Refuses modules that the config names and the file has nothing of: PEFT leaves them untrained in silence.

    Raises:
      ValueError: if there is some, unless not strict.
    """
    missing = _left_out(found, names, params)
    if missing:
        if strict:
            raise ValueError(f"{missing[0]}. Pass strict=False to load what is there")
        warnings.warn(f"'{found.path}': {missing[0]}", stacklevel=3)
    config = found.config
    keys = {key for row in names.rows for key in row.keys if names.written(key) != key}
    older = any(layer.key in keys for layer in found.layers)  # by the names of checkpoints, as before transformers 5
    modules = modules_of(dataclasses.replace(names, modules=()) if older else names, params)
    if config["peft_type"] in ("LN_TUNING", "TRAINABLE_TOKENS") or not config.get("target_modules"):
        return
    try:
        expected = targeted(config, modules)
    except ValueError as error:
        if strict:
            raise ValueError(f"{error}. Pass strict=False to load what is there") from error
        warnings.warn(f"'{found.path}': {error}", stacklevel=3)
        return
    there = {layer.module for layer in found.layers if layer.kind not in onto.AS_THEY_ARE}
    missing = [name for name in expected if name not in there]
    if missing:
        text = (
            f"the config's target_modules name {len(missing)} modules that the file has nothing of, first "
            f"{missing[0]!r}: they would stay untrained"
        )
        if strict:
            raise ValueError(f"{text}. Pass strict=False to load what is there")
        warnings.warn(f"'{found.path}': {text}", stacklevel=3)


def _left_out(found: Folder, names: Names, params: Any) -> list[str]:
    """Faults: fields of the config, beside its targets, of which the file has nothing."""
    config, kind = found.config, found.config["peft_type"]
    kinds = {layer.kind for layer in found.layers}
    whole = {layer.module for layer in found.layers if layer.kind == "full"}
    missing = []
    if config.get("use_dora") and not any("magnitude" in layer.tensors for layer in found.layers):
        missing.append("the config says use_dora, and the file has no magnitudes")
    if config.get("lora_bias") and "diff" not in kinds:
        missing.append("the config says lora_bias, and the file has no biases")
    if config.get("bias", "none") != "none" and not any(k.endswith(".bias") for k in (x.key for x in found.layers)):
        missing.append(f"the config says bias={config['bias']!r}, and the file has no biases")
    if (config.get("trainable_token_indices") or config.get("token_indices")) and "rows" not in kinds:
        missing.append("the config names trained tokens, and the file has no rows")
    for name in config.get("modules_to_save") or ():
        saved = [module for module in modules_of(names, params) if module == name or module.endswith(f".{name}")]
        inside = [module for module in saved if module not in whole]
        if inside and not (names.tied and inside[0] in (names.tied.removesuffix(".weight"), "lm_head")):
            missing.append(f"the config's modules_to_save name {inside[0]!r}, of which the file has nothing")
    unknown = [
        name
        for name, value in config.items()
        if name not in DEFAULTS[kind]
        and name not in ("peft_type", "peft_version")
        and value not in (None, False, {}, [])
    ]
    if unknown:
        missing.append(f"the config has {unknown[0]}={config[unknown[0]]!r:.60}, which jlora does not know")
    return missing


def _with_saved(found: Folder, params: Any, layers: Sequence[Layer], names: Names) -> tuple[Any, list[Layer]]:
    """The base with the embeddings that lie beside the adapter: PEFT loads them into the base, too."""
    saved = {names.read(key) for key in found.saved}
    beside = [layer for layer in layers if layer.kind == "full" and layer.key in saved]
    if not beside:
        return params, list(layers)
    named, structure = tree.leaves(params)
    replaced = onto.place(beside, params, names.rows, origin=f"'{found.path}'")
    for extra in replaced.extras:
        leaf = named[extra.path]
        named[extra.path] = jnp.asarray(replaced.factors[extra.path]["value"]).astype(leaf.dtype)
    rest = [layer for layer in layers if layer not in beside]
    return jax.tree.unflatten(structure, named.values()), rest


def _from_the_base(layers: Sequence[Layer], params: Any, names: Names) -> list[Layer]:
    """PiSSA and OLoRA with the factors that they began with, computed from the base."""
    wanted = {layer.key for layer in layers if layer.kind in INITIAL}
    if not wanted:
        return list(layers)
    named, _ = tree.leaves(params)
    rows = [row for row in names.rows if set(row.keys) & wanted]
    folded = [row.path for row in rows if named[row.path].ndim - row.stacked != len(row.order or (0, 1))]
    if folded:
        raise ValueError(
            f"{folded[0]!r} has axes that torch's matrix has not: PiSSA and OLoRA of it are not computed again"
        )
    host = {row.path: np.asarray(jax.device_get(tree.dense(named[row.path])), np.float32) for row in rows}
    tensors = to_tensors(rows, host)
    by_key = {key: row for row in rows for key in row.keys}
    result = []
    for layer in layers:
        if layer.kind in INITIAL:
            row = by_key.get(layer.key)
            if row is None:
                raise ValueError(f"{layer.key!r} is no tensor of the model")
            in_out = form_of(row, host[row.path].shape[row.stacked :]).layout == "in_out"
            if in_out and layer.kind == "olora":
                raise ValueError(
                    f"{layer.key!r}: PEFT's OLoRA takes the wrong matrix out of GPT-2's Conv1D; save it there "
                    "with path_initial_model_for_weight_conversion"
                )
            weight = tensors[layer.key].T if in_out else tensors[layer.key]
            a, b = INITIAL[layer.kind](weight, layer)
            layer = layer._replace(tensors={**layer.tensors, "A0": a, "B0": b})
        result.append(layer)
    return result


def _kinds(config: Mapping[str, Any]) -> dict[str, Native]:
    """How the kinds of layers are trained, by what the config says beside the tensors."""
    dropout = config.get("lora_dropout", 0.0)
    of = methods.rslora if config.get("use_rslora") else methods.lora
    make = partial(natives.low_rank_method, of=of, init="kaiming_uniform", dropout=float(dropout or 0.0))
    alpha = NATIVE["lora"].alpha
    if config.get("use_rslora"):
        alpha = lambda layer: natives.rounded(layer.scale * layer.rank**0.5)
    kinds = {kind: NATIVE[kind]._replace(method=make, alpha=alpha) for kind in ("lora", "table")}
    if config["peft_type"] == "ADALORA":
        kinds["adalora"] = NATIVE["adalora"]._replace(method=partial(_adalora, config))
    if config["peft_type"] == "VERA":
        kinds["vera"] = NATIVE["vera"]._replace(method=partial(_vera, config))
    return kinds


def _adalora(config: Mapping[str, Any], targets: Sequence[Target], layers: Sequence[Layer]) -> Method:
    rank = config["init_r"]
    return methods.adalora(
        rank,
        max(1, min(config["target_r"], rank)),
        float(config["lora_alpha"]) or None,
        total_steps=config["total_step"] or config["tinit"] + config["tfinal"] + 1,
        warmup=config["tinit"],
        final=config["tfinal"],
        interval=config["deltaT"],
        betas=(config["beta1"], config["beta2"]),
        orthogonality=config["orth_reg_weight"],
    )


def _vera(config: Mapping[str, Any], targets: Sequence[Target], layers: Sequence[Layer]) -> Method:
    return methods.vera(
        max(target.rank for target in targets),
        seed=config["projection_prng_key"],
        start=config["d_initial"],
        stored=True,
    )


# -- prompts -----------------------------------------------------------------------------------------------------------


def _prompt(found: Folder, params: Any, names: Names) -> Adapted:
    assert found.prompt is not None
    value = np.asarray(found.prompt, np.float32)
    length = len(value)
    if found.config["peft_type"] != "PREFIX_TUNING":
        adapted = apply(params, method=methods.prompt_tuning(length))
        (path,) = adapted.factors
        adapted = _filled(adapted, {path: {"prompt": value}})
    else:
        adapted = apply(params, method=methods.prefix_tuning(length))
        adapted = _filled(adapted, _prefixes(adapted, value))
    if not found.layers:
        return adapted
    heads = onto.place(_of_table(found, names, False), params, names.rows, origin=f"'{found.path}'")
    return adapted.replace(factors=adapted.factors | heads.factors, extras=heads.extras)


def _prefixes(adapted: Adapted, value: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """The prefix of each key and value: PEFT has them in one row per token, layer by layer, the key first."""
    layers = sum(site.shape[0] if site.stack_axes else 1 for site in adapted.sites) // 2
    if value.shape[1] % (2 * layers):
        raise ValueError(f"prompt_embeddings has {value.shape[1]} columns, for the keys and values of {layers} layers")
    parts = value.reshape(len(value), layers, 2, -1).transpose(1, 2, 0, 3)  # (layers, 2, tokens, width)
    factors: dict[str, dict[str, np.ndarray]] = {}
    used = [0, 0]
    for site in sorted(adapted.sites, key=lambda site: natives.layer_number(site.path)):
        which = int(not _is_key(site.path))
        count = site.shape[0] if site.stack_axes else 1
        own = parts[used[which] : used[which] + count, which]
        shape = adapted.factors[site.path]["prefix"].shape
        factors[site.path] = {"prefix": (own if site.stack_axes else own[0]).reshape(shape)}
        used[which] += count
    return factors


def _is_key(path: str) -> bool:
    return re.search(KEY, path) is not None


def _filled(adapted: Adapted, factors: Mapping[str, Mapping[str, np.ndarray]]) -> Adapted:
    wrong = [
        f"{path!r} takes {adapted.factors[path][name].shape}, and the file has {x.shape}"
        for path, arrays in factors.items()
        for name, x in arrays.items()
        if adapted.factors[path][name].shape != x.shape
    ]
    if wrong:
        raise ValueError(f"the prompt does not fit the model: {wrong[0]}")
    return adapted.replace(factors={path: {n: jnp.asarray(x) for n, x in own.items()} for path, own in factors.items()})
