"""Which format a path has, and any adapter as layers."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoint.folder import NAME as JLORA
from jlora.checkpoint.record import read_record
from jlora.interop import native_folder, peft, pipeline_files, shards, tensor_file
from jlora.interop.layer import Layer
from jlora.models import place, reading

PEFT, DIFFUSERS_FILE = "adapter_config.json", "pytorch_lora_weights.safetensors"
ADAPTERS = ("peft", "jlora", "diffusers", "kohya", "loralib")
Shapes = Mapping[str, tuple[int, ...]]

_ENDS = {
    "lora_down.weight": "A", "lora_up.weight": "B", "lora_mid.weight": "mid",
    "lora_A.weight": "A", "lora_B.weight": "B",
    "lora.down.weight": "A", "lora.up.weight": "B", "lora_linear_layer.down.weight": "A",
    "lora_A": "A", "lora_B": "B",
    "lora_linear_layer.up.weight": "B", "_lora.down.weight": "A", "_lora.up.weight": "B", "alpha": "alpha",
    "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude", "diff": "added",
    **{f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}  # fmt: skip


class Found(NamedTuple):
    """A path and the format of what lies there.

    Attributes:
      format: "peft", "jlora", "diffusers", "kohya" and "loralib" of adapters; "checkpoint", a folder of a model;
        "pipeline", a folder of several; "tensors", a file of a model or of whatever else.
      path: of the folder, or of the file where the format is one.
    """

    format: str
    path: Path


def recognise(path: Path) -> Found:
    """The format of a folder or a file, by the names of files and tensors.

    Raises:
      FileNotFoundError: if there is nothing.
      ValueError: for what is of no format that jlora knows.
    """
    path = place.folder_of(path)
    if path.is_dir():
        return _of_folder(path)
    if not path.exists():
        near = sorted(other.name for other in path.parent.iterdir())[:5] if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no '{path}'" + (f"; beside it lie {', '.join(near)}" if near else ""))
    if path.name in (PEFT, JLORA, "adapter_model.safetensors", "config.json"):
        return _of_folder(path.parent)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        keys = pickled(path)
        return Found("loralib" if any(key.endswith(".lora_A") for key in keys) else "tensors", path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"'{path}' is of no format that jlora knows: an adapter is a folder of PEFT or jlora or a file of kohya or "
            "Diffusers (*.safetensors), a model a folder of *.safetensors"
        )
    return Found(_of_keys([entry.key for entry in shards.open_shard(path).entries]), path)


def _of_folder(folder: Path) -> Found:
    if reading.has(folder / PEFT):
        return Found("peft", folder)
    if reading.has(folder / JLORA):
        return Found("jlora", folder)
    if reading.has(folder / pipeline_files.PIPELINE):
        return Found("pipeline", folder)
    if reading.has(folder / DIFFUSERS_FILE):
        return Found("diffusers", folder / DIFFUSERS_FILE)
    if any(folder.glob("*.safetensors")):
        return Found("checkpoint", folder)
    inner = sorted(p.parent.name for name in (PEFT, JLORA) for p in folder.glob(f"*/{name}"))
    hint = f"; its folders {', '.join(map(repr, inner[:5]))} hold adapters" if inner else ""
    pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt")))
    hint = hint or (f"; {pickles[0]} is a pickle: name the file itself" if pickles else "")
    raise ValueError(f"'{folder}' is neither an adapter nor a checkpoint: there is no *.safetensors in it{hint}")


def _of_keys(keys: list[str]) -> str:
    adapted = [key for key in keys if _end_of(key)]
    if not adapted:
        return "tensors"
    if any(key.startswith(("lora_unet_", "lora_te", "lycoris_")) for key in adapted):
        return "kohya"
    return "diffusers"


def _end_of(key: str) -> str:
    """The longest of the known ends of names that a tensor's name has; "" of others."""
    ends = [end for end in _ENDS if key.endswith(end) and (end[0] == "_" or key[: -len(end)].endswith("."))]
    return max(ends, key=len, default="")


# -- adapters ----------------------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """An adapter of any format.

    Attributes:
      format, path: see `Found`.
      components: its layers by the model of a pipeline that they belong to; by "" where there is one model.
      method: what it is called: "LoRA", "DoRA", "(IA)^3".
      base: the name of the base that its config says; "" where it says none.
      config: of PEFT's adapter_config.json, or jlora's method.
      metadata: of a file's header.
      fan_in_fan_out: what the config says of it; None where it says nothing.
      resolved: whether the modules have the base's names: not in a file of kohya that was read without a base.
      left_out: number of the file's tensors that are of other components than the one that was asked for.
    """

    format: str
    path: Path
    components: Mapping[str, tuple[Layer, ...]]
    method: str
    base: str = ""
    config: Mapping[str, Any] = {}
    metadata: Mapping[str, str] = {}
    fan_in_fan_out: bool | None = None
    resolved: bool = True
    left_out: int = 0

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of all components."""
        return tuple(layer for own in self.components.values() for layer in own)


def open_adapter(
    path: Path, base: Path | None = None, *, pickled: bool = False, component: str | None = None
) -> Opened:
    """Reads an adapter.

    Args:
      path: of any format in `ADAPTERS`.
      base: the folder of its base, which tells the modules of kohya's and Diffusers' files, and the parameters of
        jlora's adapters. Without it the layers have the names that the file has.
      pickled: read a pickle, without running what it says.
      component: of a pipeline's adapter, the one model that is wanted: those of the file's tensors that are of others
        are left out.

    Raises:
      FileNotFoundError: if there is nothing at the path.
      ValueError: for what is no adapter, or a damaged one, or one that does not fit the base; for one of several models
        where the base is one of them, and `component` is not given.
    """
    found = recognise(path)
    if found.format not in ADAPTERS:
        raise ValueError(f"'{path}' is a {found.format}, expected an adapter: one of {', '.join(ADAPTERS)}")
    readers: dict[str, Callable[[Path, Path | None], Opened]] = {
        "peft": partial(_peft, pickled=pickled), "jlora": _jlora, "loralib": _loralib,
        "diffusers": partial(_pipeline, component=component), "kohya": partial(_pipeline, component=component),
    }  # fmt: skip
    return readers[found.format](found.path, base)


def shapes_of(base: Path | None) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a checkpoint's tensors."""
    if base is None or (base.is_dir() and reading.has(base / pipeline_files.PIPELINE)):
        return None
    return {key: entry.shape for key, entry in shards.open_checkpoint(base).entries.items()}


NAMES = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA", "IA3": "(IA)^3"}


def _peft(folder: Path, base: Path | None, *, pickled: bool) -> Opened:
    read = peft.read(folder, shapes=shapes_of(base), pickled=pickled)
    config = read.config
    kind = str(config.get("peft_type"))
    init = config.get("init_lora_weights")
    parts = [
        "rsLoRA" if config.get("use_rslora") else NAMES.get(kind, kind),
        *(["DoRA"] if config.get("use_dora") else []),
        *([str(init)] if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal") else []),
    ]
    named = config.get("base_model_name_or_path") or ""
    flag = bool(config.get("fan_in_fan_out"))  # methods without the field have Linear layers alone
    return Opened("peft", folder, {"": tuple(read.layers)}, " + ".join(parts), str(named), config, {}, flag)


def _jlora(folder: Path, base: Path | None) -> Opened:
    record = read_record(folder / JLORA)
    name = _called(record["method"])
    if base is not None:
        layers, flag = native_folder.layers(folder, base)
        return Opened("jlora", folder, {"": layers}, name, "", record, {}, flag)
    tensors = _arrays(folder / record["tensors"]["file"])[0]
    alphas = {site["path"]: site.get("alpha") for site in record["sites"] if isinstance(site, Mapping)}
    layers = tuple(_of_factors(path, own, alphas.get(path), name) for path, own in _by_site(tensors).items())
    return Opened("jlora", folder, {"": layers}, name, "", record, {}, None, resolved=False)


def _called(method: Any) -> str:
    """A method's name, with those inside it: "dora(rslora)"."""
    if not isinstance(method, Mapping):
        return "?"
    inner = [
        _called(x)
        for value in method.values()
        for x in (value if isinstance(value, list) else [value])
        if isinstance(x, Mapping) and "name" in x
    ]
    return f"{method.get('name')}({', '.join(inner)})" if inner else str(method.get("name"))


def _by_site(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, x in tensors.items():
        site, _, name = key.rpartition("/")
        found.setdefault(site, {})[name] = x
    return found


def _of_factors(path: str, own: Mapping[str, np.ndarray], alpha: Any, method: str) -> Layer:
    """A layer to look at: factors keep the parameter's axes, A the rank last, and are made matrices here."""
    if {"A", "B"} <= set(own) and own["A"].shape[-1] == own["B"].shape[-1]:
        rank = own["A"].shape[-1]
        a, b = own["A"].reshape(-1, rank).T, own["B"].reshape(-1, rank)
        scale = float(alpha) / (math.sqrt(rank) if "rslora" in method else rank) if alpha else 1.0
        return Layer(path, "lora", {**own, "A": a, "B": b}, scale)
    return Layer(path, "full" if "value" in own else "other", dict(own))


def _pipeline(file: Path, base: Path | None, *, component: str | None) -> Opened:
    tensors, metadata = _arrays(file)
    kind = _of_keys(list(tensors))
    groups = _grouped(tensors)
    method = " + ".join(dict.fromkeys(_method_of(layer) for layer in groups))
    named = metadata.get("ss_sd_model_name") or metadata.get("ss_base_model_version") or ""
    if base is None:
        return Opened(kind, file, {"": groups}, method, named, {}, metadata, False, resolved=False)
    read = pipeline_files.components(kind, file, base, component)
    return Opened(kind, file, read.layers, method, named, {}, metadata, False, left_out=read.left_out)


def _loralib(file: Path, base: Path | None) -> Opened:
    layers = _grouped(pickled(file))
    return Opened("loralib", file, {"": layers}, "LoRA", fan_in_fan_out=False)


def pickled(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a pickle, which is followed step by step and does not run."""
    with tensor_file.open(file, pickled=True) as opened:
        return opened.read_all()


def _method_of(layer: Layer) -> str:
    name = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "full": "full"}.get(layer.kind, layer.kind)
    return f"{name} + DoRA" if "magnitude" in layer.tensors else name


def _arrays(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of floats of a file, and its metadata."""
    shard = shards.open_shard(file)
    with file.open("rb") as opened:
        tensors = {entry.key: shards.read(opened, entry) for entry in shard.entries if entry.dtype in shards.FLOATS}
    return tensors, dict(shard.metadata)


def _grouped(tensors: Mapping[str, np.ndarray]) -> tuple[Layer, ...]:
    """Layers with the names that a file has for its modules."""
    own: dict[str, dict[str, np.ndarray]] = {}
    rest: dict[str, np.ndarray] = {}
    for key, x in tensors.items():
        end = _end_of(key)
        if end:
            own.setdefault(key[: -len(end)].rstrip("."), {})[_ENDS[end]] = x
        else:
            rest[key] = x
    layers = [_layer(module, parts) for module, parts in own.items()]
    for key, x in rest.items():
        module, _, parameter = key.rpartition(".")
        layers.append(Layer(module, "full", {"value": x}, parameter=parameter))
    return tuple(layers)


def _layer(module: str, parts: dict[str, np.ndarray]) -> Layer:
    alpha = parts.pop("alpha", None)
    names = set(parts)
    kind = "lora" if {"A", "B"} <= names else "loha" if {"w1_a", "w1_b", "w2_a", "w2_b"} <= names else ""
    kind = kind or ("diff" if "added" in names else "lokr" if names & {"w1", "w1_a"} else "other")
    layer = Layer(module, kind, parts)
    rank = layer.rank if kind in ("lora", "loha", "lokr") else 0
    number = float(alpha.reshape(-1)[0]) if alpha is not None else 0.0
    scale = number / rank if rank and number and math.isfinite(number) else 1.0
    return layer._replace(scale=scale)
