"""`jlora inspect`: what is in an adapter, a checkpoint or a file of tensors."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from jlora.cli import show
from jlora.cli.options import BaseOption, Component, Json, Pickled
from jlora.interop import formats, shards
from jlora.interop.layer import Layer
from jlora.interop.spectra import spectrum
from jlora.models import reading
from jlora.models.catalogue import ARCHITECTURES

KEPT = 8  # singular values and metadata that are shown


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Of an adapter, a checkpoint or a file of tensors.")],
    every: Annotated[bool, typer.Option("--all", help="A row for each layer or tensor, not for each kind.")] = False,
    base: BaseOption = None,
    component: Component = None,
    pickled: Pickled = False,
    as_json: Json = False,
) -> None:
    """Shows what is in an adapter, a checkpoint or a model file.

    Of an adapter the format, the method, the ranks, the size, and how large each update is: its norm, its largest
    singular value and its stable rank, norm^2 / largest^2, which says how many of its directions carry it.
    """
    found = formats.recognise(path)
    if found.format in formats.ADAPTERS:
        opened = formats.open_adapter(path, base, pickled=pickled, component=component)
        report = adapter_report(opened)
        show.show(report, as_json, lambda console: _adapter(console, report, every))
    else:
        report = _model_report(found)
        show.show(report, as_json, lambda console: _model(console, report, every))


# -- adapters ----------------------------------------------------------------------------------------------------------


def adapter_report(opened: formats.Opened) -> dict[str, Any]:
    """An adapter in numbers."""
    rows = [_layer_row(component, layer) for component, own in opened.components.items() for layer in own]
    files = [opened.path] if opened.path.is_file() else sorted(p for p in opened.path.iterdir() if p.is_file())
    return {
        "command": "inspect", "path": str(opened.path), "format": opened.format, "method": opened.method,
        "base": opened.base, "layers": len(rows), "left_out": opened.left_out,
        "parameters": sum(row["parameters"] for row in rows),
        "bytes": sum(p.stat().st_size for p in files),
        "ranks": dict(sorted(Counter(row["rank"] for row in rows if row["rank"]).items())),
        "scales": dict(sorted(Counter(row["scale"] for row in rows).items())),
        "dtypes": dict(Counter(str(x.dtype) for layer in opened.layers for x in layer.tensors.values())),
        "finite": all(row["finite"] for row in rows), "metadata": dict(opened.metadata), "modules": rows,
    }  # fmt: skip


def _layer_row(component: str, layer: Layer) -> dict[str, Any]:
    finite = all(bool(np.isfinite(np.asarray(x, np.float32)).all()) for x in layer.tensors.values())
    seen = spectrum(layer) if finite else None
    return {
        "component": component, "module": layer.module, "parameter": layer.parameter, "kind": layer.kind,
        "rank": layer.rank if layer.kind != "other" else 0, "scale": layer.scale, "finite": finite,
        "parameters": sum(x.size for x in layer.tensors.values()),
        "shapes": {name: list(x.shape) for name, x in layer.tensors.items()},
        "norm": seen and seen.norm, "largest": seen and seen.largest, "stable_rank": seen and seen.stable_rank,
        "singular": seen and list(seen.singular[:KEPT]),
    }  # fmt: skip


def _adapter(console: Console, report: dict[str, Any], every: bool) -> None:
    console.print(f"{report['path']}: {report['method']}, format {report['format']}", markup=False)
    base = f", base {report['base']}" if report["base"] else ""
    dtypes = ", ".join(report["dtypes"])
    console.print(
        f"{report['parameters']:,} parameters in {report['layers']} layers, {show.size(report['bytes'])}, "
        f"{dtypes}{base}",
        markup=False,
    )
    if not report["finite"]:
        wrong = next(row["module"] for row in report["modules"] if not row["finite"])
        console.print(f"values that are not finite, the first in {wrong}", markup=False)
    for name, text in list(report["metadata"].items())[:KEPT]:
        console.print(f"  {name} = {text:.80}", markup=False)
    groups = _groups(report["modules"], every)
    header = ("module", "layers", "kind", "rank", "scale", "norm", "largest", "stable rank")
    show.table(console, header, [_group_row(name, rows) for name, rows in groups.items()])


def _groups(rows: Sequence[dict[str, Any]], every: bool) -> dict[str, list[dict[str, Any]]]:
    """Layers by their names with numbers left out: "model.layers.*.self_attn.q_proj"."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        name = ".".join(filter(None, (row["component"], row["module"], row["parameter"].replace("weight", ""))))
        found[name if every else re.sub(r"(?<![^._/])\d+(?![^._/])", "*", name)].append(row)
    return found


def _group_row(name: str, rows: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    mean = lambda field: (
        float(np.mean([row[field] for row in rows])) if all(row[field] is not None for row in rows) else math.nan
    )
    ranks = sorted({row["rank"] for row in rows if row["rank"]})
    kinds = "+".join(dict.fromkeys(row["kind"] for row in rows))
    rank = "" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    return name, len(rows), kinds, rank, mean("scale"), mean("norm"), mean("largest"), mean("stable_rank")


# -- models ------------------------------------------------------------------------------------------------------------


def _model_report(found: formats.Found) -> dict[str, Any]:
    path = found.path
    report: dict[str, Any] = {"command": "inspect", "path": str(path), "format": found.format}
    if found.format == "pipeline":
        inner = sorted(p.name for p in path.iterdir() if p.is_dir() and any(p.glob("*.safetensors")))
        return report | {"components": inner}
    if found.format == "checkpoint":
        checkpoint = shards.open_checkpoint(path)
        entries, files = checkpoint.entries, [shard.file for shard in checkpoint.shards]
    elif path.suffix == ".safetensors":
        shard = shards.open_shard(path)
        entries, files = {entry.key: entry for entry in shard.entries}, [path]
        report["metadata"] = dict(shard.metadata)
    else:
        arrays = formats.pickled(path)
        files = [path]
        entries = {key: shards.Entry(key, str(x.dtype), x.shape, 0, x.nbytes) for key, x in arrays.items()}
    count = Counter[str]()
    for entry in entries.values():
        count[entry.dtype] += math.prod(entry.shape)
    config = path / "config.json" if path.is_dir() else path.parent / "config.json"
    record = reading.read_json(config) if reading.has(config) else {}
    kind = record.get("model_type") or record.get("_class_name") or ""
    return report | {
        "model_type": kind, "jlora": kind in {a.model_type for a in ARCHITECTURES},
        "quantised": bool(record.get("quantization_config")), "tensors": len(entries), "files": len(files),
        "parameters": sum(count.values()), "dtypes": dict(count), "bytes": sum(file.stat().st_size for file in files),
        "shapes": [{"key": e.key, "dtype": e.dtype, "shape": list(e.shape)} for e in entries.values()],
    }  # fmt: skip


def _model(console: Console, report: dict[str, Any], every: bool) -> None:
    if report["format"] == "pipeline":
        console.print(f"{report['path']}: a pipeline of {', '.join(report['components'])}", markup=False)
        return
    kind = f" of {report['model_type']}" if report["model_type"] else ""
    ours = " (jlora.models has it)" if report["jlora"] else ""
    console.print(f"{report['path']}: {report['format']}{kind}{ours}", markup=False)
    dtypes = ", ".join(f"{name} {n:,}" for name, n in report["dtypes"].items())
    console.print(
        f"{report['parameters']:,} parameters in {report['tensors']} tensors and {report['files']} files, "
        f"{show.size(report['bytes'])}: {dtypes}",
        markup=False,
    )
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in report["shapes"]:
        groups[row["key"] if every else re.sub(r"(?<![^.])\d+(?![^.])", "*", row["key"])].append(row)
    rows = [
        (
            name,
            len(own),
            own[0]["dtype"],
            " x ".join(map(str, own[0]["shape"])),
            sum(math.prod(r["shape"]) for r in own),
        )
        for name, own in groups.items()
    ]
    show.table(console, ("tensor", "number", "dtype", "shape", "parameters"), rows)
