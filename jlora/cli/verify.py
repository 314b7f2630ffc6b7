"""`jlora verify`: an adapter against a base."""

from typing import Any

import numpy as np
import typer
from rich.console import Console

from jlora.cli import show
from jlora.cli.options import Adapter, Base, Component, Json, Pickled
from jlora.interop import fit, formats, shards
from jlora.interop.layer import KINDS, Layer, merged

LARGEST = 2**24  # elements of a tensor whose merge is tried
SHOWN = 20


def verify(
    adapter: Adapter, base: Base, component: Component = None, pickled: Pickled = False, as_json: Json = False
) -> None:
    """Checks every tensor of an adapter against a base: names, shapes, ranks, dtypes, that all values are finite.

    The exit code is 0 if it fits and 1 if not. Neither is loaded as a whole.
    """
    checkpoint = shards.open_checkpoint(base)
    opened = formats.open_adapter(adapter, base, pickled=pickled, component=component)
    faults = [fault for own in opened.components.values() for fault in _faults(own, checkpoint, opened.fan_in_fan_out)]
    report = {
        "command": "verify", "adapter": str(adapter), "base": str(base), "method": opened.method,
        "layers": len(opened.layers), "left_out": opened.left_out, "fits": not faults, "faults": faults,
    }  # fmt: skip
    show.show(report, as_json, lambda console: _text(console, report))
    if faults:
        raise typer.Exit(1)


def _faults(layers: tuple[Layer, ...], checkpoint: shards.Checkpoint, flag: bool | None) -> list[str]:
    faults = [
        f"{layer.key!r}: {name} has values that are not finite"
        for layer in layers
        for name, x in layer.tensors.items()
        if not np.isfinite(np.asarray(x, np.float32)).all()
    ]
    entries = checkpoint.entries
    shapes = {key: entry.shape for key, entry in entries.items()}
    try:
        placed, _ = fit.fitted(layers, shapes, fit.aliases(checkpoint.folder, shapes), tied=True)
    except ValueError as error:
        return [*faults, str(error)]
    for key, own in placed.items():
        if entries[key].dtype not in shards.FLOATS:
            faults.append(f"{key!r} is of {entries[key].dtype}, into which nothing is merged")
            continue
        try:
            layout = fit.layouts({key: own}, shapes, flag)[key]
            if not faults:
                _try(own, shapes[key], layout)
        except (ValueError, IndexError) as error:
            faults.append(f"{error}")
    return faults


def _try(layers: list[Layer], shape: tuple[int, ...], layout: Any) -> None:
    """Merges into zeros, where that is cheap: the shapes of all kinds are checked by what they do."""
    if int(np.prod(shape)) <= LARGEST:
        weight = np.zeros(shape, np.float32)
        for layer in layers:
            assert layer.kind in KINDS
            weight = merged(layer, weight, layout)


def _text(console: Console, report: dict[str, Any]) -> None:
    show.left_out(console, report["left_out"])
    if report["fits"]:
        console.print(
            f"{report['adapter']} ({report['method']}, {report['layers']} layers) fits {report['base']}", markup=False
        )
        return
    console.print(f"{report['adapter']} does not fit {report['base']}:", markup=False)
    for fault in report["faults"][:SHOWN]:
        console.print(f"  {fault}", markup=False)
    if len(report["faults"]) > SHOWN:
        console.print(f"  and {len(report['faults']) - SHOWN} more", markup=False)
