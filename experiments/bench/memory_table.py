"""Memory of a training step of LLaMA in four sizes, trained whole, with LoRA and with QLoRA, on four kinds of devices.

    python -m experiments.bench.memory_table --folder out           # goes on where it was interrupted
    python -m experiments.bench.memory_table --folder out --only 65b --devices a6000 --gpt3

Each step is compiled on shapes by the device's own compiler (`jlora.plan`), and nothing is run: AdamW in float32 of
factors in float32, bfloat16 for the rest, one row of 512 tokens to a device, layers scanned and computed again, the
loss in chunks; LoRA and QLoRA with r=64 on all linear layers, QLoRA's base in NF4 with double quantisation. Paged: the
optimizer's state waits in the host's memory. `cells.json` keeps each plan, from which table and plot are made.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import jlora
from experiments.folder import read_json, write_json, write_text
from experiments.report.style import COLOURS, DASHED, INK, figure_of, legend
from experiments.report.tables import markdown_table
from jlora.models.sizes import model_of
from jlora.planning import devices
from jlora.planning.placing import fully_sharded
from jlora.state import TrainState

SIZES = ("7b", "13b", "33b", "65b")
METHODS = ("full fine-tuning", "LoRA", "QLoRA", "QLoRA, paged")
DEVICES = ("h100", "h200", "a6000", "v5e-16")
TOKENS = 512
PARTS = ("weights", "factors", "optimizer_state", "batch", "temporaries", "unused")
TX = optax.adamw(1e-4)


class Case(NamedTuple):
    """A step: a size's name, how it is trained, rows and tokens of its batch."""

    model: str
    method: str
    rows: int = 1
    tokens: int = TOKENS

    def planned(self, device: str) -> dict[str, Any]:
        """The plan, as JSON."""
        module, inputs = model_of(self.model, scan=True, remat=True, dtype="bfloat16", param_dtype="bfloat16")
        params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
        batch = jax.ShapeDtypeStruct((self.rows, self.tokens), jnp.int32)

        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
            return jnp.asarray(module.apply({"params": params}, tokens, labels=labels))[:, :-1].mean()

        sites = jlora.sites(loss, params, batch)
        if self.method.startswith("QLoRA"):
            params = jlora.quantize(params, "nf4", double=True, sites=sites)
        adapted = jlora.apply(params, method=method_of(self.method), targets=targets_of(self.method), sites=sites)
        kind = "pinned_host" if self.method.endswith("paged") else None
        state = TrainState.create(adapted, TX, memory_kind=kind) if kind else adapted
        mesh = mesh_of(device)
        rule = None if mesh is None else split(mesh, whole=self.method != "full fine-tuning")
        return {
            **jlora.plan(loss, state, TX, batch, mesh, device, rule=rule).as_dict(),
            "trainable": jlora.count(adapted).trainable,
        }


def mesh_of(device: str) -> AbstractMesh | None:
    """All chips in one axis, along which XLA places what is computed."""
    many = devices.find(device).total
    return AbstractMesh((many,), ("fsdp",), axis_types=(AxisType.Auto,)) if many else None


def split(mesh: AbstractMesh, *, whole: bool) -> Callable[[str, Any], PartitionSpec | None]:
    """Weights over all chips; what is trained too, if it is not to be whole on each."""
    rule = fully_sharded(mesh)
    return lambda path, x: rule(path if whole else path.replace("factors", "base", 1), x)


def method_of(name: str) -> jlora.Method:
    """LoRA r=64, r=4 of GPT-3 in the LoRA paper, or all weights."""
    if name == "full fine-tuning":
        return jlora.full()
    return jlora.lora(4) if name == "LoRA r=4 on q, v" else jlora.lora(64, alpha=16)


def targets_of(name: str) -> str | None:
    """All linear layers but the head."""
    if name == "full fine-tuning":
        return None
    return "attn/(query|value)/kernel" if name == "LoRA r=4 on q, v" else "(attn|mlp)/.*kernel"


def cases(device: str, sizes: Sequence[str] = SIZES, methods: Sequence[str] = METHODS) -> list[Case]:
    """All steps on a device: a row to each chip. A state on the host is the remedy of one GPU."""
    many = devices.find(device).total or 1
    return [
        Case(f"llama-{size}", method, many)
        for size in sizes
        for method in methods
        if many == 1 or not method.endswith("paged")
    ]


GPT3 = tuple(Case("gpt3-175b", method, 1, 2048) for method in ("full fine-tuning", "LoRA r=4 on q, v"))
"""The LoRA paper's largest model. Its batch and recipe are not said there; one row of the whole context here."""


def fill(found: dict[str, Any], wanted: Sequence[tuple[Case, str]], keep: Any) -> None:
    """Plans what is not there yet. H100 and H200 run the same program, which is compiled once."""
    for case, device in wanted:
        name = key(case, device)
        if name in found:
            continue
        twin = found.get(key(case, {"h100": "h200", "h200": "h100"}.get(device, "")))
        if twin is None:
            found[name] = case.planned(device)
        else:
            limit = devices.find(device).device.memory
            found[name] = {**twin, "limit": limit, "fits": twin["peak"] + twin["unused"] <= limit}
        print(f"{name}: {gigabytes(whole(found[name]))} GB of {gigabytes(found[name]['limit'])}", flush=True)
        keep(found)


def key(case: Case, device: str) -> str:
    """Name of a plan."""
    return f"{case.model}, {case.method}, {device}"


def whole(plan: Mapping[str, Any]) -> int:
    """Bytes that the step needs on a device."""
    return int(plan["peak"] + plan["unused"])


def gigabytes(count: float) -> str:
    """In 10^9 bytes, as papers and vendors count."""
    return f"{count / 1e9:.1f}"


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """A line for each size and method, a column for each device: GB of each, in bold what fits."""
    there = of_devices(found)
    limits = [next(iter(plans.values()))["limit"] for plans in there.values()]
    header = ["GB on each device", *(f"{d} ({gigabytes(x)})" for d, x in zip(there, limits, strict=True))]
    rows = [f"llama-{size}, {method}" for size in SIZES for method in METHODS]
    body = [[name, *(cell(plans.get(name)) for plans in there.values())] for name in rows]
    return [header, *(row for row in body if any(row[1:]))]


def cell(plan: Mapping[str, Any] | None) -> str:
    """Peak of the step, in bold where it fits."""
    if plan is None:
        return ""
    return f"**{gigabytes(whole(plan))}**" if plan["fits"] else gigabytes(whole(plan))


def of_devices(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The plans of LLaMA by device, each under its model and method."""
    there: dict[str, dict[str, Any]] = {}
    for device in DEVICES:
        end = f", {device}"
        plans = {name.removesuffix(end): p for name, p in found.items() if name.endswith(end) and "llama" in name}
        if plans:
            there[device] = plans
    return there


def parts(plan: Mapping[str, Any]) -> dict[str, int]:
    """The parts of a bar, whose sum is what the step needs: of the temporaries what the peak has beside the others."""
    on_device = plan["optimizer_state"] - min(plan["host"], plan["optimizer_state"])
    given = {name: plan[name] for name in PARTS} | {"optimizer_state": on_device}
    beside = sum(given[name] for name in PARTS if name != "temporaries")
    return given | {"temporaries": max(whole(plan) - beside, 0)}


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Stacked bars: a panel for each device, up to three times its limit; what is higher has its height written."""
    there = of_devices(found)
    with figure_of(path, (4.0 * len(there), 5.5), len(there)) as (figure, panels):
        for axes, (device, plans) in zip(panels, there.items(), strict=True):
            names = [name for s in SIZES for m in METHODS if (name := f"llama-{s}, {m}") in plans]
            limit = next(iter(plans.values()))["limit"] / 1e9
            for at, name in enumerate(names):
                below = 0.0
                for part, colour in zip(PARTS, COLOURS, strict=False):
                    height = parts(plans[name])[part] / 1e9
                    axes.bar(at, height, 0.8, below, color=colour, label=part.replace("_", " ") if not at else None)
                    below += height
                axes.text(at, min(below, 2.8 * limit), f"{below:.0f}", ha="center", va="bottom", fontsize=8)
            axes.axhline(limit, color=INK, linestyle=DASHED, linewidth=1.5)
            axes.set_ylim(0, 3 * limit)
            axes.set_xticks(range(len(names)), [name.removeprefix("llama-") for name in names], rotation=90, fontsize=8)
            axes.set_title(f"{device}, {limit:.0f} GB (dashed)")
        panels[0].set_ylabel("GB on each device")
        legend(figure, panels[0].get_legend_handles_labels()[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m experiments.bench.memory_table", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of cells.json, memory.md and memory.png")
    parser.add_argument("--only", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=DEVICES)
    parser.add_argument("--gpt3", action="store_true", help="GPT-3's two steps too, on an H100 that is large enough")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "cells.json"
    found: dict[str, Any] = read_json(file) if file.exists() else {}
    wanted = [(c, d) for d in options.devices for c in cases(d, options.only, options.methods)]
    wanted += [(case, "h100") for case in GPT3] if options.gpt3 else []
    fill(found, wanted, lambda found: write_json(file, found))
    lines = markdown_table(table(found))
    write_text(options.folder / "memory.md", "\n".join(lines) + "\n")
    draw(options.folder / "memory.png", found)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
