"""Files of kohya's scripts, LyCORIS, Civitai and ComfyUI: LoRA, LoCon, LoHa, LoKr, DoRA, whole differences, (IA)^3.

A key is a prefix, the module's path with underscores for dots, and what of the module it is:
`lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`. SDXL's UNet goes by the names of its authors' code.
The update of a module is alpha / rank times the product, where alpha is a tensor of the module, and its rank where that
is absent or 0.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.adapted.adapted import Adapted
from jlora.interop import assemble, cloneofsimo, modules, pipeline, tensor_file
from jlora.interop.assemble import Absent, Placed, Resolved, Role
from jlora.interop.layer import Layer
from jlora.interop.modules import Name, Shape, Shapes
from jlora.interop.pipeline import File
from jlora.models.tensors import Leaf
from jlora.models.unet.ldm import ldm_names

PREFIXES = {
    "unet": ("lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
ROLES = {
    "lora_down.weight": Role("lora", "A"),
    "lora_up.weight": Role("lora", "B"),
    "lora_mid.weight": Role("lora", "mid"),
    **{f"hada_{name}": Role("loha", name) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": Role("lokr", name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": Role("diff", "added"),
    "diff_b": Role("bias", "added"),
    "w_norm": Role("diff", "added"),
    "b_norm": Role("bias", "added"),
    "weight": Role("ia3", "weight"),
    "on_input": Role("ia3", "on_input"),
    "alpha": Role("any", "alpha"),
    "dora_scale": Role("any", "dora_scale"),
}
REFUSED = {
    "oft_blocks": "OFT", "oft_diag": "OFT", "rescale": "OFT", "a1.weight": "GLoRA", "a2.weight": "GLoRA",
    "b1.weight": "GLoRA", "b2.weight": "GLoRA", "bias_indices": "a sparse bias", "bias_values": "a sparse bias",
    "bias_size": "a sparse bias",
}  # fmt: skip
WRITTEN = {(role.kind, role.name): suffix for suffix, role in ROLES.items() if not suffix.endswith("_norm")}


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
      without: regular expression of the keys to leave out on purpose: "^lora_te" loads the UNet's part alone.
      pickled: read a pickle, without running what it says.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file of another base, and tensors that no module has, do not fit or are halves, all in one
        error; for embeddings of new tokens, which are no adapter: `read` gives them.

    Example:
      adapted = jlora.kohya.load("style.safetensors", {"unet": params}, {"unet": table}, without="^lora_te")["unet"]
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
    metadata: Mapping[str, str] | None = None,
    dtype: Any = None,
    force: bool = False,
) -> None:
    """Writes the adapters of a pipeline's components as one file.

    Alpha is a tensor of each module, and holds whatever the method's scale is: rsLoRA's alpha / sqrt(r) is an alpha of
    alpha sqrt(r).

    Args:
      file: its folder has to exist.
      adapted: of each component.
      names: their key tables.
      metadata: added to what the file says of itself, or in its place: {"modelspec.title": "sks dog"}.
      dtype: of the tensors; None leaves them in the factors' float32.
      force: replace a file that is there.

    Raises:
      FileExistsError: if there is such a file, without `force`.
      ValueError: for a method that such files have no form for.
    """
    bases = {component: own.base for component, own in adapted.items()}
    models = pipeline.models_of(bases, names)
    layers = {component: pipeline.layers_of(own, names[component]) for component, own in adapted.items()}
    pipeline.warn_of_residual(bases.values(), file)
    write(file, layers, models, metadata=metadata, dtype=dtype, force=force)


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
    if cloneofsimo.is_one(tensors):
        return cloneofsimo.layers_of(tensors, metadata, models, origin=origin)
    return File(assemble.assembled(tensors, models, resolver(models), scale_of, origin=origin), dict(metadata), {})


def scale_of(name: Name, rank: int, alpha: float | None) -> float:
    """Alpha / rank; an alpha that is absent or 0 is the rank."""
    return alpha / rank if alpha else 1.0


def resolver(models: Mapping[str, Shapes]) -> Callable[[str], Resolved]:
    """Key -> what it stands for, or why it stands for nothing."""
    known = names_of(models)

    def resolve(key: str) -> Resolved:
        stem, _, suffix = key.partition(".")
        name = known.get(stem)
        if name is None:
            return _unknown(stem, models)
        if suffix in REFUSED:
            return f"is of {REFUSED[suffix]}, which jlora does not read"
        if suffix not in ROLES:
            return f"is no part of an adapter that is known, of {assemble.shown(name)}"
        return Placed(name, ROLES[suffix])

    return resolve


def names_of(models: Mapping[str, Shapes]) -> dict[str, Name]:
    """All names that files have for the modules: `lora_unet_mid_block_attentions_0_proj_in`, and so on.

    Raises:
      ValueError: if two modules share one.
    """
    return modules.lookup(
        (prefix + spelling.replace(".", "_"), Name(component, module))
        for component, shapes in models.items()
        for spelling, module in modules.spellings(component, modules.parameters(shapes))
        for prefix in PREFIXES[component]
    )


def _unknown(stem: str, models: Mapping[str, Shapes]) -> Resolved:
    owner = next((c for c, prefixes in PREFIXES.items() if stem.startswith(prefixes)), None)
    if owner is None:
        return "is no key of a kohya file for a UNet or its text encoders"
    return f"is of the {owner}, which has no such module" if owner in models else Absent(owner)


# -- writing -----------------------------------------------------------------------------------------------------------


def write(
    file: str | os.PathLike[str],
    layers: Mapping[str, Sequence[Layer]],
    models: Mapping[str, Shapes],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: Any = None,
    force: bool = False,
) -> None:
    """Writes layers; see `save`. What `read` gave comes out bit for bit.

    Of alphas the number is kept, and written in the dtype of the factors, where that has it, else in float32; LoKr of
    whole matrices has none.
    """
    tensors = pipeline.cast(tensors_of(layers, models), dtype)
    said = described(layers, models) | {"sshs_model_hash": model_hash(tensors)}
    tensor_file.write(file, tensors, said | dict(metadata or {}), force=force)


def tensors_of(layers: Mapping[str, Sequence[Layer]], models: Mapping[str, Shapes]) -> dict[str, np.ndarray]:
    """The tensors of a file, by key.

    Raises:
      ValueError: for layers of which such a file has no form, all in one error.
    """
    modules.check_components(layers)
    found: dict[str, np.ndarray] = {}
    wrong: list[str] = []
    for component, own in layers.items():
        known = written(component, models)
        shapes = modules.parameters(models[component])
        for layer in own:
            if layer.module not in known or layer.parameter not in shapes[layer.module]:
                wrong.append(f"{component}'s {layer.key!r} is no tensor of the model")
                continue
            try:
                parts = _tensors_of(layer, shapes[layer.module])
            except ValueError as error:
                wrong.append(f"{component}'s {error}")
                continue
            found |= {f"{known[layer.module]}.{suffix}": x for suffix, x in parts.items()}
    pipeline.raise_all(wrong, "a kohya file cannot hold")
    return found


def written(component: str, models: Mapping[str, Shapes]) -> dict[str, str]:
    """The name under which each module is written: SDXL's UNet by its authors' names, all else by diffusers'."""
    xl = modules.is_xl(models)
    own = modules.parameters(models[component])
    names = {module: spelling for spelling, module in reversed(list(modules.spellings(component, own)))}
    if component == "unet" and xl:
        names |= ldm_names(own)
    prefix = "lora_te1_" if xl and component == "text_encoder" else PREFIXES[component][0]
    return {module: prefix + name.replace(".", "_") for module, name in names.items()}


def _tensors_of(layer: Layer, shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """The tensors of a layer, by suffix."""
    t = dict(layer.tensors)
    if layer.kind == "diff":
        added = t["added"] if layer.scale == 1 else np.asarray(t["added"] * layer.scale, t["added"].dtype)
        if len(shapes.get("weight", ())) == 1:
            return {"w_norm" if layer.parameter == "weight" else "b_norm": added}
        return {"diff" if layer.parameter == "weight" else "diff_b": added}
    if layer.kind == "ia3" and layer.parameter == "weight":
        factor = t["l"]
        on_input = factor.ndim > 1 and factor.shape[0] == 1 and shapes["weight"][0] > 1
        window = len(shapes["weight"]) - 2
        flat = (np.asarray(factor, np.float32) - 1).reshape(1, -1, *[1] * window)
        return {"weight": flat if window else flat.reshape(-1), "on_input": np.asarray(int(on_input), np.int64)}
    if layer.kind not in ("lora", "loha", "lokr"):
        raise ValueError(f"{layer.key!r} is of kind {layer.kind}")
    if layer.kind == "lokr" and {"w1", "w2"} <= set(t):  # readers know no scale of such a product
        t["w1"] = t["w1"] if layer.scale == 1 else np.asarray(t["w1"] * np.float32(layer.scale), t["w1"].dtype)
    magnitude = t.pop("magnitude", None)
    of_inputs = t.pop("input_magnitude", None)
    found = {WRITTEN[layer.kind, name]: x for name, x in t.items()}
    ones = [1] * (len(shapes["weight"]) - 2)
    if magnitude is not None:
        found["dora_scale"] = magnitude if _is_column(magnitude) else magnitude.reshape(-1, 1, *ones)
    if of_inputs is not None:
        found["dora_scale"] = of_inputs
    if not (layer.kind == "lokr" and {"w1", "w2"} <= set(t)):
        found["alpha"] = _alpha(layer)
    return found


def _is_column(x: np.ndarray) -> bool:
    """Whether all numbers lie on the first of several axes, so that the norm goes over the others."""
    return x.ndim > 1 and x.size == x.shape[0]


def _alpha(layer: Layer) -> np.ndarray:
    """The number that makes alpha / rank the layer's scale, in the factors' dtype if that has it."""
    alpha = layer.scale * layer.rank
    near = np.float32(alpha)
    dtype = next(x.dtype for x in layer.tensors.values())
    return near.astype(dtype) if near.astype(dtype).astype(np.float32) == near else np.asarray(near)


# -- what a file says of itself ----------------------------------------------------------------------------------------


def described(layers: Mapping[str, Sequence[Layer]], models: Mapping[str, Shapes]) -> dict[str, str]:
    """The metadata of a file: all are strings, and none carries the scale, which the alphas do."""
    own = [layer for found in layers.values() for layer in found]
    kinds = {layer.kind for layer in own}
    low_rank = [layer for layer in own if layer.rank]
    plain = kinds <= {"lora"} and not any({"mid", "magnitude", "input_magnitude"} & set(layer.tensors) for layer in own)
    base = modules.base_of(models)
    said = {"ss_network_module": "networks.lora" if plain else "lycoris.kohya"}
    if low_rank:
        said["ss_network_dim"] = _common(layer.rank for layer in low_rank)
        said["ss_network_alpha"] = _common(float(np.float32(layer.scale * layer.rank)) for layer in low_rank)
    if not plain:
        algorithm = next((kind for kind in ("loha", "lokr", "lora", "ia3") if kind in kinds), "full")
        said["ss_network_args"] = json.dumps({"algo": "locon" if algorithm == "lora" else algorithm})
    if base is not None:
        said |= {
            "ss_base_model_version": base.version,
            "ss_v2": str(base.version == "sd_v2"),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{base.architecture}/lora",
        }
    return said


def _common(values: Iterable[float]) -> str:
    """The number that all have, else "Dynamic", as kohya's tools call several."""
    found = Counter(values)
    return "Dynamic" if len(found) > 1 else f"{next(iter(found)):g}"


def model_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """The sha256 of all behind the header, the tensors in the order in which they are written."""
    digest = hashlib.sha256()
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
