"""Files of Hugging Face's diffusers, `pytorch_lora_weights.safetensors`: LoRA and DoRA of a whole pipeline.

Keys in PEFT's style, `unet.mid_block.attentions.0.proj_in.lora_A.weight`, are read and written; of the older ones
(`.lora.down.weight`, `.lora_linear_layer.down.weight`, and attention processors with a prefix or without) the first are
written, too. The update of a module is alpha / rank times the product: alpha is a tensor of the module, else what the
metadata's `lora_adapter_metadata` says, else the rank.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jlora.adapted.adapted import Adapted
from jlora.interop import assemble, modules, natives, pipeline, tensor_file
from jlora.interop.assemble import Absent, Placed, Resolved, Role
from jlora.interop.layer import Layer
from jlora.interop.modules import COMPONENTS, Name, Shape, Shapes
from jlora.interop.peft.patterns import QUICK, check_effort, check_expression
from jlora.interop.pipeline import File
from jlora.models.tensors import Leaf

CONFIG = "lora_adapter_metadata"  # the entry of the metadata that holds PEFT's configs
PEFT = {
    "lora_A.weight": Role("lora", "A"), "lora_B.weight": Role("lora", "B"), "lora_B.bias": Role("bias", "B_bias"),
    "lora_magnitude_vector": Role("any", "magnitude"), "lora_magnitude_vector.weight": Role("any", "magnitude"),
    "alpha": Role("any", "alpha"),
}  # fmt: skip
DOWN_UP = {
    f"{name}{side}.weight": Role("lora", factor)
    for name in ("lora.", "lora_linear_layer.")
    for side, factor in (("down", "A"), ("up", "B"))
}
PROCESSOR = {"down.weight": Role("lora", "A"), "up.weight": Role("lora", "B"), "alpha": Role("any", "alpha")}
Style = Literal["peft", "lora.up/down"]


def load(
    file: str | os.PathLike[str],
    params: Mapping[str, Any],
    names: Mapping[str, Sequence[Leaf]],
    *,
    without: str | None = None,
    pickled: bool = False,
) -> dict[str, Adapted]:
    """An `Adapted` of each component that the file adapts. All of the file is placed, or nothing.

    Args:
      file: a safetensors file; with `pickled`, or one of `torch.save` (.bin, .pt).
      params: of each component of the pipeline, "unet", "text_encoder", "text_encoder_2".
      names: their key tables, see `jlora.interop.modules.table`.
      without: regular expression of the keys to leave out on purpose: "^text_encoder" loads the UNet's part alone.
      pickled: read a pickle, without running what it says.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file of another base or of a transformer, and tensors that no module has, do not fit or are
        halves, all in one error.

    Example:
      adapted = jlora.diffusers.load("pytorch_lora_weights.safetensors", {"unet": params}, {"unet": table})["unet"]
    """
    found = read(file, pipeline.models_of(params, names), without=without, pickled=pickled)
    return pipeline.placed(found, params, names, origin=f"'{file}'")


def merge(
    file: str | os.PathLike[str],
    params: Mapping[str, Any],
    names: Mapping[str, Sequence[Leaf]],
    *,
    without: str | None = None,
    pickled: bool = False,
) -> dict[str, Any]:
    """The parameters of each component with the file merged into them, of kinds that jlora does not train, too.

    Arguments and errors are those of `load`. The sum is taken in float32 and rounded to the parameter's dtype.
    """
    found = read(file, pipeline.models_of(params, names), without=without, pickled=pickled)
    return pipeline.merged(found, params, names, origin=f"'{file}'")


def save(
    file: str | os.PathLike[str],
    adapted: Mapping[str, Adapted],
    names: Mapping[str, Sequence[Leaf]],
    *,
    style: Style = "peft",
    fold_alpha: bool = False,
    metadata: Mapping[str, str] | None = None,
    dtype: Any = None,
    force: bool = False,
) -> None:
    """Writes the adapters of a pipeline's components as one file.

    Diffusers' files have no alphas among their tensors. Ranks and alphas stand in `lora_adapter_metadata`, which
    diffusers reads since the middle of 2025; older versions, and other programs, take alpha = rank. For those
    `fold_alpha` multiplies B by the scale, after which alpha is the rank.

    Args:
      file: its folder has to exist.
      adapted: of each component, by `lora`, `rslora`, `dora` of one of them, or another method of factors A and B.
      names: their key tables.
      style: "lora.up/down" writes the names from before PEFT.
      fold_alpha: whether B is multiplied by alpha / rank.
      metadata: added to what the file says of itself, or in its place.
      dtype: of the tensors; None leaves them in the factors' float32.
      force: replace a file that is there.

    Raises:
      FileExistsError: if there is such a file, without `force`.
      ValueError: for a method that such files have no form for; `jlora.kohya.save` has more of them.
    """
    bases = {component: own.base for component, own in adapted.items()}
    models = pipeline.models_of(bases, names)
    layers = {component: pipeline.layers_of(own, names[component]) for component, own in adapted.items()}
    pipeline.warn_of_residual(bases.values(), file)
    write(file, layers, models, style=style, fold_alpha=fold_alpha, metadata=metadata, dtype=dtype, force=force)


# -- reading -----------------------------------------------------------------------------------------------------------


def read(
    file: str | os.PathLike[str],
    models: Mapping[str, Shapes],
    *,
    without: str | None = None,
    pickled: bool = False,
) -> File:
    """The layers of a file; see `load`.

    Args:
      file: a safetensors file.
      models: shapes of the tensors of each component, by key in torch's checkpoints.
      without: regular expression of the keys to leave out.
      pickled: read a pickle, without running what it says.
    """
    tensors, metadata = pipeline.read_tensors(file, without=without, pickled=pickled)
    return layers_of(tensors, metadata, models, origin=f"'{file}'")


def layers_of(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    models: Mapping[str, Shapes],
    *,
    origin: str = "the file",
) -> File:
    """`read`, of tensors that were read already."""
    modules.check_components(models)
    configs = configs_of(metadata, origin)

    def scale(name: Name, rank: int, alpha: float | None) -> float:
        if alpha is not None:
            return alpha / rank if alpha else 1.0
        return configs[name.component].scale(name.module, rank) if name.component in configs else 1.0

    layers = assemble.assembled(tensors, models, resolver(models), scale, origin=origin)
    return File(layers, dict(metadata), {})


def resolver(models: Mapping[str, Shapes]) -> Callable[[str], Resolved]:
    """Key -> what it stands for, or why it stands for nothing."""
    plain = modules.lookup(_names(models, lambda module: (module,)))
    old = modules.lookup(_names(models, modules.processor_spellings))
    tables = ((plain, PEFT | DOWN_UP), (old, PROCESSOR))

    def resolve(key: str) -> Resolved:
        for names, roles in tables:
            for suffix, role in roles.items():
                name = names.get(key.removesuffix(f".{suffix}")) if key.endswith(f".{suffix}") else None
                if name is not None:
                    return Placed(name, role)
        return _unknown(key, models)

    return resolve


def _names(models: Mapping[str, Shapes], also: Callable[[str], tuple[str, ...]]) -> Iterator[tuple[str, Name]]:
    """Pairs (name, module): with the component before it, of a UNet also without."""
    for component, shapes in models.items():
        for module in modules.parameters(shapes):
            for spelling in (module,) if component == "unet" else modules.text_spellings(module):
                for name in also(spelling):
                    yield f"{component}.{name}", Name(component, module)
                    if component == "unet":
                        yield name, Name(component, module)


def _unknown(key: str, models: Mapping[str, Shapes]) -> Resolved:
    component = key.split(".")[0]
    if key.startswith("lora_"):
        return "is a name of kohya's: read this file by jlora.kohya.load"
    if component in models:
        return f"is of the {component}, which has no such module"
    if component in COMPONENTS:
        return Absent(component)
    if component == "transformer":
        return "is of a transformer (SD 3, FLUX and others), which jlora does not have"
    return "is no key of a diffusers file for a UNet or its text encoders"


# -- PEFT's configs ----------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """The fields of a component's config that its scales come from."""

    component: str
    rank: int | None
    alpha: float | None
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    origin: str

    def scale(self, module: str, rank: int) -> float:
        """Of a module whose tensors have this rank.

        Raises:
          ValueError: if the config has another rank.
        """
        said = _resolved(self.ranks, module, self.rank)
        if said is not None and said != rank:
            raise ValueError(
                f"{self.origin}: {CONFIG} has rank {said:g} for {self.component}'s {module!r}, and its tensors {rank}"
            )
        alpha = _resolved(self.alphas, module, self.alpha)
        return 1.0 if alpha is None else alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _resolved(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The number of the first pattern that is the end of the module's path, as PEFT resolves them."""
    names = modules.text_spellings(module)
    for pattern, number in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return number
    return default


def configs_of(metadata: Mapping[str, str], origin: str) -> dict[str, Config]:
    """The config of each component that the metadata has one of. Of a UNet that was saved alone, no prefix says so.

    Raises:
      ValueError: if it is damaged.
    """
    if CONFIG not in metadata:
        return {}
    try:
        fields = json.loads(metadata[CONFIG])
        whole: dict[str, dict[str, Any]] = {}
        for key, value in fields.items():
            component, dot, name = key.partition(".")
            component, name = (component, name) if dot else ("unet", key)
            whole.setdefault(component, {})[name] = value
        return {component: _config(component, own, origin) for component, own in whole.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{origin}: {CONFIG} holds no configs of PEFT's: {error}") from error


def _config(component: str, fields: Mapping[str, Any], origin: str) -> Config:
    ranks, alphas = (dict(fields.get(name) or {}) for name in ("rank_pattern", "alpha_pattern"))
    for pattern in (*ranks, *alphas):
        check_expression(pattern, "a pattern")
    check_effort([rf"(.*\.)?{pattern}" for pattern in (*ranks, *alphas)], ["x" * 100] * 1000, QUICK, "patterns")
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    for name, number in [("r", rank), ("lora_alpha", alpha), *ranks.items(), *alphas.items()]:
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise ValueError(f"{name} is {number!r:.80}")
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{name} is {number}")
    return Config(component, rank, alpha, ranks, alphas, bool(fields.get("use_rslora")), origin)


# -- writing -----------------------------------------------------------------------------------------------------------


def write(
    file: str | os.PathLike[str],
    layers: Mapping[str, Sequence[Layer]],
    models: Mapping[str, Shapes],
    *,
    style: Style = "peft",
    fold_alpha: bool = False,
    metadata: Mapping[str, str] | None = None,
    dtype: Any = None,
    force: bool = False,
) -> None:
    """Writes layers; see `save`. What `read` gave comes out bit for bit, unless alphas are folded in."""
    tensors, said = tensors_of(layers, models, style=style, fold_alpha=fold_alpha)
    tensor_file.write(file, pipeline.cast(tensors, dtype), said | dict(metadata or {}), force=force)


def tensors_of(
    layers: Mapping[str, Sequence[Layer]],
    models: Mapping[str, Shapes],
    *,
    style: Style = "peft",
    fold_alpha: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file by key, and its metadata.

    Raises:
      ValueError: for layers of which such a file has no form, all in one error; for an unknown style.
    """
    if style not in ("peft", "lora.up/down"):
        raise ValueError(f"style={style!r}; expected 'peft' or 'lora.up/down'")
    modules.check_components(layers)
    found: dict[str, np.ndarray] = {}
    wrong: list[str] = []
    configs: dict[str, Any] = {}
    for component, own in layers.items():
        shapes = modules.parameters(models[component])
        written: dict[str, Layer] = {}
        biases: list[Layer] = []
        for layer in own:
            fault = _unwritable(layer, shapes, style)
            if fault:
                wrong.append(f"{component}'s {layer.key!r} {fault}")
            elif layer.kind == "diff":
                biases.append(layer)
            else:
                written[layer.module] = _shaped(layer, shapes[layer.module]["weight"], fold_alpha)
        wrong += [
            f"{component}'s {layer.key!r} is added to, and its weight has no factors"
            for layer in biases if layer.module not in written
        ]  # fmt: skip
        dora = [layer.module for layer in written.values() if "magnitude" in layer.tensors]
        if dora and len(dora) < len(written):
            plain = next(module for module in written if module not in dora)
            wrong.append(f"{component} has magnitudes of {dora[0]!r} and none of {plain!r}: PEFT has all or none")
        if wrong:
            continue
        for layer in written.values():
            found |= _tensors_of(component, layer, style)
        for layer in biases:
            own_scale = 1.0 if fold_alpha else written[layer.module].scale
            factor = 1.0 if layer.scale == own_scale else layer.scale / own_scale
            key = f"{_stem(component, layer.module)}.lora_B.bias"
            found[key] = _times(layer.tensors["added"], factor)
        configs |= {f"{component}.{name}": x for name, x in _config_of(component, written, bool(biases)).items()}
    pipeline.raise_all(wrong, "a diffusers file cannot hold")
    return found, {"format": "pt", CONFIG: json.dumps(configs, indent=2, sort_keys=True)}


def _unwritable(layer: Layer, shapes: Mapping[str, Mapping[str, Shape]], style: Style) -> str | None:
    """Why a file cannot hold a layer."""
    if layer.parameter not in shapes.get(layer.module, {}):
        return "is no tensor of the model"
    peft = style == "peft"
    if layer.kind == "diff" and layer.parameter == "bias" and peft:
        return None
    if layer.kind != "lora" or layer.parameter != "weight":
        return f"is of kind {layer.kind}: jlora.kohya.save has more kinds"
    if "input_magnitude" in layer.tensors:
        return "has magnitudes of its inputs: jlora.kohya.save has those"
    if "magnitude" in layer.tensors and not peft:
        return "has magnitudes, which style='peft' alone has"
    return None


def _shaped(layer: Layer, weight: Shape, fold_alpha: bool) -> Layer:
    """The layer in the shapes that PEFT has for a weight: (r, in, *window), (out, r, 1, ...), (1, out, 1, ...)."""
    t = dict(natives.plain(layer, weight).tensors)
    ones = [1] * (len(weight) - 2)
    t["A"] = t["A"].reshape(-1, *weight[1:])
    t["B"] = t["B"].reshape(weight[0], -1, *ones)
    if "magnitude" in t:
        t["magnitude"] = t["magnitude"].reshape(1, -1, *ones) if ones else t["magnitude"].reshape(-1)
    if not fold_alpha:
        return layer._replace(tensors=t)
    return layer._replace(tensors=t | {"B": _times(t["B"], layer.scale)}, scale=1.0)


def _times(x: np.ndarray, factor: float) -> np.ndarray:
    return x if factor == 1 else (x.astype(np.float32) * np.float32(factor)).astype(x.dtype)


def _stem(component: str, module: str) -> str:
    """A text encoder's with `text_model.`, which diffusers takes off where its transformers has none."""
    return f"{component}.{module if component == 'unet' else modules.text_spellings(module)[0]}"


def _tensors_of(component: str, layer: Layer, style: Style) -> dict[str, np.ndarray]:
    old = "lora" if component == "unet" else "lora_linear_layer"
    names = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
    if style == "lora.up/down":
        names = {"A": f"{old}.down.weight", "B": f"{old}.up.weight"}
    return {f"{_stem(component, layer.module)}.{names[name]}": x for name, x in layer.tensors.items()}


def _config_of(component: str, layers: Mapping[str, Layer], biased: bool) -> dict[str, Any]:
    """PEFT's config of a component: the commonest rank and alpha, and patterns for the others."""
    # A text encoder's modules without `text_model.`: PEFT takes a name for the end of a path, so that it fits both.
    names = {m: f"^{m}" if component == "unet" else modules.text_spellings(m)[-1] for m in layers}
    ranks = {module: layer.rank for module, layer in layers.items()}
    alphas = {module: natives.rounded(layer.scale * layer.rank) for module, layer in layers.items()}
    rank, alpha = (Counter(numbers.values()).most_common(1)[0][0] if numbers else 1 for numbers in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {names[module]: n for module, n in ranks.items() if n != rank},
        "alpha_pattern": {names[module]: _number(n) for module, n in alphas.items() if n != alpha},
        "target_modules": sorted(name.removeprefix("^") for name in names.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any("magnitude" in layer.tensors for layer in layers.values()),
        "lora_bias": biased,
    }


def _number(x: float) -> int | float:
    return int(x) if x == int(x) else x
