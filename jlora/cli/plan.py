"""`jlora plan`: whether a training step fits on a device, by the device's own compiler and without the device."""

from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console

from jlora.cli import show, workload
from jlora.cli.options import Json
from jlora.planning.compiled import folder
from jlora.planning.devices import find
from jlora.planning.planned import plan as planned
from jlora.planning.report import Plan
from jlora.planning.trials import Layouts, layouts
from jlora.sharding import MODELS


def plan(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="A config of experiments (.py), or a model: a size, a config.json.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Of a config: train.batch=4.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Of a model: lora(16), dora(16). Default lora(16).")
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", help="Of a model: rows x length, 1x512. Default 1x512.")
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option("--targets", help="Of a model: pattern of weights; several times for several.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of a model: bfloat16 (default) or float32.")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Of a config with several runs: which.")] = None,
    small: Annotated[bool, typer.Option("--small", help="Of a config: its small form.")] = False,
    quantize: Annotated[str | None, typer.Option("--quantize", help="Hold the base in this form: nf4, int8.")] = None,
    remat: Annotated[bool, typer.Option("--remat", help="Compute activations again in the backward pass.")] = False,
    accumulate: Annotated[int | None, typer.Option("--accumulate", min=1, help="Micro-batches of a step.")] = None,
    optimizer_memory: Annotated[
        str | None, typer.Option("--optimizer-memory", help="Where the optimizer's state waits: device, pinned_host.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, h100, a6000, v5e-16, 2xv5e-16, 8xh100, ...")] = "v5e",
    mesh: Annotated[
        str | None,
        typer.Option(
            "--mesh", help="Axes of several devices: fsdp=8,tp=2. Default: some are tried, one is recommended."
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option("--cache", metavar="FOLDER|off", help="Of compiled programs. Default ~/.cache/jlora/plans."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compiles a training step on shapes, for devices that need not be there, and says what it takes and if it fits.

    Of several devices (v5e-16, 8xh100; 2xv5e-16, two slices) it tries some layouts, shows memory, traffic and least
    time of each, and recommends one; --mesh plans that one alone. Real devices need their compilers: "jlora[plan]" has
    that of TPUs, "jlora[plan-gpu]" that of NVIDIA's GPUs; --device cpu needs neither.
    """
    axes = _mesh(mesh)
    jax.config.update("jax_platforms", "cpu")  # nothing is run, and a GPU that is here is left alone
    if what.endswith(".py"):
        given = {"--method": method, "--batch": batch, "--targets": targets, "--dtype": dtype}
        if stray := [name for name, value in given.items() if value]:
            raise ValueError(
                f"{', '.join(stray)}: of a model; a config has its own, and fields are set as in train.batch=4"
            )
        step = workload.of_config(
            Path(what), overrides or (), run=run, small=small, accumulate=accumulate, remat=remat, quantised=quantize,
            memory_kind=optimizer_memory,
        )  # fmt: skip
    else:
        if stray := [*(overrides or ()), *(["--run"] if run else ()), *(["--small"] if small else ())]:
            raise ValueError(f"{', '.join(stray)}: for a config (.py), and {what!r} is a model")
        step = workload.of_model(
            what, method or "lora(16)", batch or "1x512", targets=targets, dtype=dtype or "bfloat16",
            accumulate=accumulate or 1, remat=remat, quantised=quantize, memory_kind=optimizer_memory,
        )  # fmt: skip
    options = {"memory_kind": step.memory_kind, "cache": _folder(cache, device), **step.options}
    found: Plan | Layouts
    if axes is None and _several(device):
        found = layouts(step.loss, step.adapted, step.tx, step.batch, device, heads=step.heads, **options)
    else:
        rule = MODELS if axes else None
        found = planned(step.loss, step.adapted, step.tx, step.batch, axes, device, rule=rule, **options)
    shapes = {name: list(x.shape) for name, x in step.batch.items()}
    report = {
        "command": "plan",
        "model": step.name,
        "method": repr(step.method),
        "batch_shapes": shapes,
        **found.as_dict(),
    }
    show.show(report, as_json, lambda console: _text(console, step, found))


def _text(console: Console, step: workload.Workload, found: Plan | Layouts) -> None:
    rows = ", ".join(f"{name} {'x'.join(map(str, x.shape))}" for name, x in step.batch.items())
    console.print(f"{step.name}, {step.method!r}, {rows}", markup=False)
    console.print(str(found), markup=False, soft_wrap=True)  # a table: its lines stay whole


def _folder(cache: str | None, device: str) -> Path | None:
    """Where programs are kept: those of a CPU, which takes a moment to make one, only where it is said."""
    if cache is None:
        return None if find(device).device.compiler == "cpu" else folder()
    return None if cache == "off" else Path(cache)


def _several(device: str) -> bool:
    return (find(device).total or 1) > 1


def _mesh(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and size.isdigit() and int(size) for name, _, size in pairs):
        raise ValueError(f"--mesh is name=size, several with commas: fsdp=8,tp=2; got {text!r}")
    return {name.strip(): int(size) for name, _, size in pairs}
