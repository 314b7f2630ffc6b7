"""`jlora count`: what a method trains of a model, and what that takes, on shapes alone."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import typer
from rich.console import Console

from jlora.adapted.adapted import Adapted, bytes_of
from jlora.adapted.adapted import count as counted
from jlora.adapted.apply import apply
from jlora.adapted.quantize import quantize as quantized
from jlora.cli import show
from jlora.cli.options import Json
from jlora.methods import expression
from jlora.models.catalogue import architecture_of
from jlora.models.sizes import PRESETS, model_of
from jlora.quant.formats import format_of
from jlora.transform.sites import sites as found_sites

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def count(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=f"A size, {', '.join(list(PRESETS)[:3])}, ..., or a config.json.")
    ],
    method: Annotated[
        str | None, typer.Argument(metavar="METHOD", help="Such as lora(8), dora(16), lora(8, alpha=16).")
    ] = None,
    by_name: Annotated[str | None, typer.Option("--method", metavar="METHOD", help="The same, by name.")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            help="Pattern of weights to adapt, or a set's name (of a UNet attention, locon, ...); may be repeated.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the base's parameters: float32, bfloat16 or float16.")
    ] = "bfloat16",
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="Hold the base's linear weights in this form: nf4, int8.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Counts what a method trains of a model, and the memory that training takes beside activations.

    Nothing is allocated: a model of 70 B is counted on any machine. Gradients and Adam's two moments are float32, as
    the factors are. A quantised base is counted with its scales and constants, in bytes and in bits a parameter.

    UNets and text encoders have sets of weights that people adapt, by name; without --targets it is the first of them,
    attention, and the numbers of all others are printed, too. Of other models it is all linear layers.
    """
    if dtype not in SIZES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(SIZES)}")
    if quantize is not None:
        format_of(quantize)  # raises for an unknown one before the model is traced
    if (method is None) == (by_name is None):
        raise ValueError("count takes one method, as METHOD or by --method: jlora count sd15 'lora(4)'")
    made = expression.parse(method or by_name or "", "METHOD" if by_name is None else "--method")
    module, inputs = model_of(model, scan=True, param_dtype=dtype, dtype=dtype)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    places = found_sites(lambda params, *inputs: module.apply({"params": params}, *inputs), params, *inputs)
    held = params if quantize is None else quantized(params, quantize, sites=places)
    architecture = architecture_of(module.config)
    sets = {} if architecture is None else architecture.targets
    chosen = targets or list(sets)[:1]

    def adapt(names: Sequence[str]) -> Adapted:
        patterns = [sets.get(name, name) for name in names] or None
        return jax.eval_shape(lambda: apply(params_of(held), method=made, sites=places, targets=patterns))

    adapted = adapt(chosen)
    report = {
        "command": "count", "model": model, "method": repr(made), "quantize": quantize, "targets": chosen,
        **_report(adapted, params),
        "sets": {} if targets else {name: _size(adapted if [name] == chosen else adapt([name])) for name in sets},
    }  # fmt: skip
    show.show(report, as_json, lambda console: _text(console, report))


def params_of(shapes: Any) -> Any:
    """Zeros of these shapes, under eval_shape."""
    return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)


def _size(adapted: Adapted) -> dict[str, int]:
    """Numbers trained, and weights that are adapted: of scanned layers each is one."""
    stacked = (math.prod(site.shape[axis] for axis in site.stack_axes) for site in adapted.sites)
    return {"trainable": counted(adapted).trainable, "weights": sum(stacked)}


def _report(adapted: Any, params: Any) -> dict[str, Any]:
    numbers = counted(adapted)
    base, plain, factors = bytes_of(adapted.base), bytes_of(params), bytes_of(adapted.factors)
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "trainable": numbers.trainable, "total": numbers.total, "percent": 100 * numbers.trainable / numbers.total,
        "model_parameters": whole, "sites": len(adapted.sites), "weights": _size(adapted)["weights"],
        "bytes": {
            "parameters": base, "factors": factors, "gradients": factors, "adam": 2 * factors,
            "all": base + 4 * factors, "file": factors, "full_fine_tuning": plain + 12 * whole,
        },
        "bits": {"base": 8 * base / whole, "quantised": numbers.bits},
    }  # fmt: skip


def _text(console: Console, report: dict[str, Any]) -> None:
    b = report["bytes"]
    of = f"{report['trainable']:,} of {report['total']:,} parameters are trained, {report['percent']:.3g} %"
    console.print(
        f"{report['model']}, {report['method']}: {of}",
        markup=False,
    )
    where = f"of {', '.join(report['targets'])}" if report["targets"] else "all linear layers and convolutions"
    console.print(
        f"{report['model_parameters']:,} parameters of the model, {report['trainable']:,} of the adapter: "
        f"{report['weights']} weights, {where}",
        markup=False,
    )
    bits = report["bits"]
    base = f"base, {bits['base']:.4g} bits a parameter"
    base += f", {bits['quantised']:.4g} a quantised one ({report['quantize']})" if bits["quantised"] else ""
    rows = [
        (base, b["parameters"]), ("factors", b["factors"]), ("gradients", b["gradients"]),
        ("Adam's moments", b["adam"]),
        ("together, beside activations", b["all"]), ("full fine-tuning, beside activations", b["full_fine_tuning"]),
        ("the adapter's file", b["file"]),
    ]  # fmt: skip
    show.table(console, ("memory", ""), [(name, show.size(value)) for name, value in rows])
    if report["sets"]:
        sets = [(name, own["weights"], own["trainable"]) for name, own in report["sets"].items()]
        show.table(console, ("--targets", "weights", "trained"), sets)
