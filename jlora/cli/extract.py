"""`jlora extract`: a LoRA out of two checkpoints."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from jlora.adapted.extract import extract_lora
from jlora.cli import show
from jlora.cli.options import Base, DryRun, Force, Json
from jlora.interop import any_model, fit, onto, peft, shards
from jlora.interop.layer import Layer, merged
from jlora.methods.checks import check_pattern
from jlora.transform.sites import Site


def extract(
    base: Base,
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The folder of what fine-tuning made of BASE.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, in PEFT's format.")],
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="The most that a weight gets.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Share of each squared norm that is kept, such as 0.99.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", help="Regex of modules that get factors; all by default.")
    ] = None,
    ignore: Annotated[str | None, typer.Option("--ignore", help="Regex of tensors whose change is left out.")] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The base's name on the hub, for the config.")
    ] = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Makes a LoRA of what fine-tuning changed: of each changed matrix the best approximation of the given rank.

    Tensor by tensor, in the memory of one. Changed biases and norms are kept whole; a changed embedding is an error
    unless --ignore names it.
    """
    if rank is None and energy is None:
        raise ValueError("extract needs --rank or --energy")
    wanted, ignored = _compiled(targets, "--targets"), _compiled(ignore, "--ignore")
    show.check_folder(out, force)
    before, after = shards.open_checkpoint(base), shards.open_checkpoint(tuned)
    shapes, given = any_model.shapes_of(before), any_model.shapes_of(after)
    wrong = sorted(set(shapes) ^ set(given)) or sorted(key for key in shapes if shapes[key] != given[key])
    if wrong:
        raise ValueError(f"'{base}' and '{tuned}' differ in {len(wrong)} names or shapes, the first {wrong[0]!r}")
    layouts = fit.layouts_of(shapes)
    with show.bar("extracting", as_json) as progress:
        layers, errors = _layers(before, after, shapes, layouts, rank, energy, wanted, ignored, progress)
    if not layers:
        raise ValueError(f"'{base}' and '{tuned}' hold the same values: there is nothing to extract")
    adapted, rows = any_model.on_shapes(layers, shapes, layouts, any_model.reader(before))
    with show.staged(out, force, dry_run) as folder:
        peft.save(folder, adapted, names=rows, base=base_model, force=True)
    report = {
        "command": "extract", "out": str(out), "layers": len(layers), "dry_run": dry_run,
        "ranks": {layer.key: layer.rank for layer in layers}, "errors": errors,
    }  # fmt: skip
    show.show(report, as_json, lambda console: _text(console, report))


def _compiled(text: str | None, option: str) -> re.Pattern[str] | None:
    return None if text is None else re.compile(check_pattern(text, option))


def _layers(
    before: shards.Checkpoint,
    after: shards.Checkpoint,
    shapes: fit.Shapes,
    layouts: dict[str, Any],
    rank: int | None,
    energy: float | None,
    targets: re.Pattern[str] | None,
    ignore: re.Pattern[str] | None,
    progress: Callable[[int, int, str], None] | None,
) -> tuple[list[Layer], dict[str, float]]:
    """The layers, and of each matrix the share of the change's norm that is lost."""
    first, second = any_model.reader(before), any_model.reader(after)
    found: list[Layer] = []
    errors: dict[str, float] = {}
    lost: list[str] = []
    for i, key in enumerate(shapes):
        if progress:
            progress(i, len(shapes), key)
        if before.entries[key].dtype not in shards.FLOATS or (ignore and ignore.search(key)):
            continue
        w, v = first(key).astype(np.float32), second(key).astype(np.float32)
        if np.array_equal(w, v):
            continue
        module, _, parameter = key.rpartition(".")
        table = module.rpartition(".")[2] in fit.TABLES
        if len(shapes[key]) < 2:
            found.append(Layer(module, "full", {"value": v}, parameter=parameter))
        elif table or (targets and not targets.search(module)) or parameter != "weight":
            lost.append(key)
        else:
            layer = _factored(key, w, v, layouts, rank, energy)
            found.append(layer)
            errors[key] = _error(layer, w, v, layouts)
    if lost:
        raise ValueError(
            f"{len(lost)} tensors changed that get no factors, the first {lost[0]!r}: leave their change out with "
            "--ignore, or name them with --targets"
        )
    return found, errors


def _factored(
    key: str, w: np.ndarray, v: np.ndarray, layouts: dict[str, Any], rank: int | None, energy: float | None
) -> Layer:
    (row,) = any_model.rows({key: w.shape}, layouts)
    order = row.order or tuple(range(w.ndim))
    kernel = w.transpose(order)
    inputs = tuple(range(w.ndim - 1))  # Flax has the outputs last
    site = Site(row.path, kernel.shape, "float32", inputs, (w.ndim - 1,), (), "linear" if w.ndim == 2 else "conv")
    adapted = extract_lora({row.path: kernel}, {row.path: v.transpose(order)}, rank=rank, energy=energy, sites=[site])
    (layer,) = onto.layers_of(adapted, [row])
    return layer


def _error(layer: Layer, w: np.ndarray, v: np.ndarray, layouts: dict[str, Any]) -> float:
    made = merged(layer, w, layouts.get(layer.key, "out_in"))
    return float(np.linalg.norm(made - v) / np.linalg.norm(v - w))


def _text(console: Console, report: dict[str, Any]) -> None:
    rows = sorted(report["errors"].items(), key=lambda row: -row[1])[:10]
    show.table(console, ("tensor", "rank", "lost"), [(key, report["ranks"][key], error) for key, error in rows])
    verb = "would write" if report["dry_run"] else "wrote"
    console.print(f"{verb} {report['layers']} layers to {report['out']}", markup=False)
