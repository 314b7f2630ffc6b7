"""`jlora convert`: an adapter in another format."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jlora import models
from jlora.checkpoint import save as save_jlora
from jlora.cli import show
from jlora.cli.options import Adapter, BaseOption, Component, DryRun, Force, Json, Pickled
from jlora.interop import any_model, diffusers, fit, formats, kohya, native_folder, onto, peft, pipeline_files, shards
from jlora.interop.layer import Layer
from jlora.interop.names import names_of

TARGETS = ("peft", "jlora", "kohya", "diffusers")
FILES = ("kohya", "diffusers")  # the others are folders
DTYPES = ("float32", "bfloat16", "float16")


def convert(
    adapter: Adapter,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder for peft and jlora, a *.safetensors for others.")
    ],
    to: Annotated[str, typer.Option("--to", help="peft, jlora, kohya or diffusers.")],
    base: BaseOption = None,
    component: Component = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the tensors; float32 by default, and always of jlora's.")
    ] = None,
    pickled: Pickled = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Writes an adapter in another format, with the same update: factors bit for bit, scales by the format's own rule.

    BASE tells the modules: a pipeline's folder, or that of one of its models, for kohya and diffusers; a model that
    jlora.models has for jlora, whose adapters hold the fingerprint of their base.
    """
    if to not in TARGETS:
        raise ValueError(f"--to {to} is not one of {', '.join(TARGETS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    if to == "jlora" and dtype not in (None, "float32"):
        raise ValueError(f"--dtype {dtype}: jlora's adapters are float32; leave --dtype out")
    _check_suffix(out, to)
    if base is None:
        raise ValueError("convert needs the adapter's base: pass --base FOLDER")
    opened = formats.open_adapter(adapter, base, pickled=pickled, component=component)
    if opened.format == to:
        raise ValueError(f"'{adapter}' is of format {to} already")
    (show.check_free if to in FILES else show.check_folder)(out, force)
    write = {"peft": _to_peft, "jlora": _to_jlora, "kohya": _to_file, "diffusers": _to_file}[to]
    writer = write(opened, base, component, to)
    _written(writer, out, to, dtype, force, dry_run)
    report = {
        "command": "convert", "from": opened.format, "to": to, "out": str(out), "method": opened.method,
        "layers": len(opened.layers), "left_out": opened.left_out, "dry_run": dry_run,
    }  # fmt: skip
    show.show(report, as_json, lambda console: _text(console, report))


def _text(console: Console, report: Mapping[str, Any]) -> None:
    show.left_out(console, report["left_out"])
    verb = "would write" if report["dry_run"] else "wrote"
    how = f"from {report['from']} as {report['to']}"
    console.print(
        f"{verb} {report['layers']} layers of {report['method']} {how} to {report['out']}",
        markup=False,
    )


def _check_suffix(out: Path, to: str) -> None:
    if to in FILES and (out.suffix != ".safetensors" or out.is_dir()):
        raise ValueError(f"'{out}': --to {to} writes one file, name it *.safetensors")
    if to not in FILES and out.suffix == ".safetensors":
        raise ValueError(f"'{out}': --to {to} writes a folder, name it without .safetensors")


def _written(writer: Any, out: Path, to: str, dtype: str | None, force: bool, dry_run: bool) -> None:
    """Writes, of a dry run to a temporary folder, by which all is checked."""
    if to not in FILES:
        with show.staged(out, force, dry_run) as folder:
            writer(folder, dtype, True)
    elif dry_run:
        with tempfile.TemporaryDirectory(prefix="jlora-dry-run-") as name:
            writer(Path(name) / out.name, dtype, True)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer(out, dtype, force)


def one_of(opened: formats.Opened, component: str | None) -> tuple[Layer, ...]:
    """The layers of the one component that is asked for, or that there is."""
    names = [name for name, own in opened.components.items() if own]
    if component is None and len(names) == 1:
        return opened.components[names[0]]
    if component not in names:
        listed = ", ".join(filter(None, names)) or "one model"
        asked = f", and not {component}" if component else ": pass --component with one of them"
        raise ValueError(f"'{opened.path}' adapts {listed}{asked}")
    return opened.components[component]


# -- to each format: everything is checked before the writer is returned -----------------------------------------------


def _to_peft(opened: formats.Opened, base: Path, component: str | None, to: str) -> Any:
    name = opened.base or None
    if opened.format == "jlora":
        adapted, model = native_folder.opened(opened.path, base, concrete=True)
        return lambda out, dtype, force: peft.save(out, adapted, model=model, base=name, dtype=dtype, force=force)
    layers = one_of(opened, component)
    inner = next((base / part for part, own in opened.components.items() if own is layers and part), base)
    checkpoint = shards.open_checkpoint(inner if inner.is_dir() else base)
    return peft_writer(layers, checkpoint, opened.fan_in_fan_out, name)


def peft_writer(layers: Sequence[Layer], base: shards.Checkpoint, flag: bool | None, name: str | None) -> Any:
    """A function (folder, dtype, force) that writes layers as PEFT does."""
    named = any_model.renamed(layers, base)
    shapes = any_model.shapes_of(base)
    layouts = fit.layouts({layer.key: [layer] for layer in named}, shapes, flag)
    adapted, rows = any_model.on_shapes(named, shapes, layouts, any_model.reader(base))
    return lambda out, dtype, force: peft.save(out, adapted, names=rows, base=name, dtype=dtype, force=force)


def _to_jlora(opened: formats.Opened, base: Path, component: str | None, to: str) -> Any:
    loaded = models.load(base)
    names = names_of(loaded.model, None, "convert")
    layers = any_model.renamed(one_of(opened, component), shards.open_checkpoint(base))
    layers = [layer._replace(module=_module(names.read(layer.key), layer)) for layer in layers]
    adapted = onto.place(layers, loaded.params, names.rows, origin=f"'{opened.path}'")
    return lambda out, dtype, force: save_jlora(out, adapted)


def _module(key: str, layer: Layer) -> str:
    return key.removesuffix(f".{layer.parameter}")


def _to_file(opened: formats.Opened, base: Path, component: str | None, to: str) -> Any:
    shapes = pipeline_files.models_of(base)
    components = dict(opened.components)
    if set(components) == {""}:
        if component is None and len(shapes) > 1:
            raise ValueError(f"'{base}' is a pipeline of {', '.join(shapes)}: pass --component with one of them")
        name = component or next(iter(shapes))
        if name not in shapes:
            raise ValueError(f"--component {name} is not in '{base}', which has {', '.join(shapes)}")
        folder = base / name if (base / name).is_dir() else base
        components = {name: tuple(any_model.renamed(components[""], shards.open_checkpoint(folder)))}
    module = {"kohya": kohya, "diffusers": diffusers}[to]
    module.tensors_of(components, shapes)  # raises for what the format cannot hold
    return lambda out, dtype, force: module.write(out, components, shapes, dtype=dtype, force=force)
