"""`jlora combine`: one adapter of several."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import typer
from rich.console import Console

from jlora.adapted.arithmetic import combine_adapters
from jlora.adapted.thin import How
from jlora.cli import show
from jlora.cli.convert import one_of
from jlora.cli.options import BaseOption, Component, DryRun, Force, Json
from jlora.interop import any_model, fit, formats, onto, peft, shards
from jlora.interop.layer import DELTAS, Layer

HOWS = get_args(How)


def combine(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, in PEFT's format.")],
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Two or more, of one base.")],
    weights: Annotated[
        str | None, typer.Option("--weights", help="0.7,0.3: one for each; 1 of each by default.")
    ] = None,
    how: Annotated[str, typer.Option("--how", help=f"One of {', '.join(HOWS)}.")] = "sum",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="The most that a weight gets.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Share of each squared norm that is kept.")] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Share of the entries, of ties, dare, magnitude.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of dare.")] = 0,
    base: BaseOption = None,
    component: Component = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Adds adapters up, with weights: their true updates, not their factors. (1, -1) takes one out of the other.

    The result is a LoRA of the lowest rank that holds the sum, in PEFT's format; --rank bounds it. BASE is needed for
    methods whose update depends on the weight: DoRA, (IA)^3, OFT.
    """
    if how not in HOWS:
        raise ValueError(f"--how {how} is not one of {', '.join(HOWS)}")
    if len(adapters) < 2 and weights is None:
        raise ValueError("combine takes two adapters or more, or one with --weights")
    given = _weights(weights, len(adapters))
    show.check_folder(out, force)
    checkpoint = shards.open_checkpoint(base) if base else None
    opened = [formats.open_adapter(path, base, component=component) for path in adapters]
    own = [_named(one, checkpoint) for one in opened]
    options = {"how": how, "rank": rank, "energy": energy, "density": density, "seed": seed}
    flags = {one.fan_in_fan_out for one in opened}
    with show.bar("combining", as_json) as progress:
        layers = combined(own, given, checkpoint, bool(flags == {True}), options, progress)
    if not layers:
        raise ValueError("the sum is zero: these adapters and --weights leave nothing to write")
    shapes = any_model.shapes_of(checkpoint) if checkpoint else any_model.of_layers(layers)
    layouts = fit.layouts({layer.key: [layer] for layer in layers}, shapes, flags == {True})
    adapted, rows = any_model.on_shapes(layers, shapes, layouts, any_model.reader(checkpoint) if checkpoint else None)
    names = {one.base for one in opened if one.base}
    name = names.pop() if len(names) == 1 else None
    with show.staged(out, force, dry_run) as folder:
        peft.save(folder, adapted, names=rows, base=name, force=True)
    ranks = sorted({layer.rank for layer in layers if layer.rank})
    report = {
        "command": "combine", "out": str(out), "adapters": [str(path) for path in adapters], "weights": given,
        "how": how, "layers": len(layers), "ranks": ranks, "dry_run": dry_run,
        "left_out": sum(one.left_out for one in opened),
    }  # fmt: skip
    show.show(report, as_json, lambda console: _text(console, report))


def _text(console: Console, report: dict[str, Any]) -> None:
    show.left_out(console, report["left_out"])
    verb = "would write" if report["dry_run"] else "wrote"
    ranks = report["ranks"]
    said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
    console.print(f"{verb} {report['layers']} layers of {said} to {report['out']}", markup=False)


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    try:
        given = [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights {text}: expected numbers with commas between them, 0.7,0.3") from None
    if len(given) != count:
        raise ValueError(f"--weights {text} has {len(given)} numbers, and there are {count} adapters")
    return given


def _named(opened: formats.Opened, base: shards.Checkpoint | None) -> list[Layer]:
    layers = one_of(opened, None)
    if base is not None:
        return any_model.renamed(layers, base)
    if not opened.resolved:
        raise ValueError(f"'{opened.path}' is of format {opened.format}, whose modules its base tells: pass --base")
    for layer in layers:
        if layer.kind not in DELTAS or {"magnitude", "input_magnitude"} & set(layer.tensors):
            raise ValueError(f"'{opened.path}': the update of {layer.key!r} depends on the weight: pass --base")
    return list(layers)


def combined(
    adapters: Sequence[Sequence[Layer]],
    weights: Sequence[float],
    base: shards.Checkpoint | None,
    flag: bool,
    options: dict[str, Any],
    progress: Callable[[int, int, str], None] | None,
) -> list[Layer]:
    """The layers of the sum, one tensor of the base after the other."""
    every = [layer for own in adapters for layer in own]
    shapes = any_model.shapes_of(base) if base else any_model.of_layers(every)
    read = any_model.reader(base) if base else lambda key: np.zeros(shapes[key], np.float32)
    keys = sorted({layer.key for layer in every})
    found: list[Layer] = []
    for i, key in enumerate(keys):
        if progress:
            progress(i, len(keys), key)
        parts = [(w, [layer for layer in own if layer.key == key]) for w, own in zip(weights, adapters, strict=True)]
        layouts = fit.layouts({key: [layer for _, own in parts for layer in own]}, shapes, flag)
        rows = any_model.rows({key: shapes[key]}, layouts)
        value = read(key).astype(np.float32)
        params = {rows[0].path: value.transpose(rows[0].order) if rows[0].order else value}
        there = [(w, onto.place(own, params, rows)) for w, own in parts if own]
        sum_of = combine_adapters([adapted for _, adapted in there], [w for w, _ in there], **options)
        found += onto.layers_of(sum_of, rows)
    return found
