"""Memory, traffic and least time of LoRA on pods that are not there: GPT-3 175B and Llama 2, and which layout to take.

    JAX_PLATFORMS=cpu python -m experiments.bench.pods --folder out --devices 64xh100     # a quarter of a minute a cell
    JAX_PLATFORMS=cpu python -m experiments.bench.pods --folder out --devices v5e-256 --models gpt3-175b
    JAX_PLATFORMS=cpu python -m experiments.bench.pods --folder out --scaling             # Llama 2 70B on 8 to 512 H100

Each step is compiled on shapes by the devices' own compiler (`jlora.planning.layouts`), and nothing is run: a sequence
of 2,048 tokens to each device, bfloat16, layers scanned and computed again, layout `jlora.sharding.MODELS`. LoRA is r=4
and r=8 on query and value of GPT-3 (Hu et al., table 4: 18.9 M and 37.7 M parameters), r=16 on all linear layers of
Llama; QLoRA holds the base in NF4. What is trained is float32, its AdamW too; full fine-tuning holds its start in
bfloat16 beside it. Table and plot are made from `cells.json`, which keeps each plan: the command goes on where it was.
"""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from experiments.folder import read_json, write_json, write_text
from experiments.report.style import COLOURS, DASHED, INK, figure_of, legend
from experiments.report.tables import markdown_table
from jlora.cli.workload import heads_of
from jlora.models.sizes import model_of
from jlora.planning import devices, layouts
from jlora.planning.trials import Trial, meshes

TOKENS = 2048
FULL = "full fine-tuning"
MODELS = ("gpt3-175b", "llama-2-70b", "llama-2-7b")
METHODS = {
    "gpt3-175b": ("LoRA r=4", "LoRA r=8", FULL),
    "llama-2-70b": ("LoRA", "QLoRA", FULL),
    "llama-2-7b": ("LoRA", "QLoRA", FULL),
}
TRAINED = {("gpt3-175b", "LoRA r=4"): 18_874_368, ("gpt3-175b", "LoRA r=8"): 37_748_736}
"""Of the LoRA paper: 96 layers x (query, value) x (A, B) x 12,288 x r."""
DEVICES = ("64xh100", "v5e-16", "v5e-64", "v5e-256", "2xv5e-256", "v5p-64")
NUMBERS = (8, 16, 32, 64, 128, 256, 512)
TX = optax.adamw(1e-4)
KEPT = (
    "mesh", "limit", "weights", "factors", "optimizer_state", "batch", "temporaries", "peak", "unused", "fits", "flops",
    "moved", "wire", "dcn", "collectives", "roofline", "compiled_in",
)  # fmt: skip
PARTS = ("weights", "factors", "optimizer_state", "temporaries")


class Case(NamedTuple):
    """A step: a size's name, how it is trained, the devices."""

    model: str
    method: str
    device: str

    @property
    def many(self) -> int:
        """Devices, each with a sequence."""
        return devices.find(self.device).total or 1

    def meshes(self) -> list[dict[str, int]]:
        """GPUs are compiled for in seconds, and all of `meshes` are tried; of TPUs two that are different."""
        wanted = devices.find(self.device)
        if wanted.device.compiler == "cuda":
            return meshes(self.many, wanted.device)
        slices, each = {"dcn": wanted.slices} if wanted.slices > 1 else {}, self.many // wanted.slices
        return [slices | {"fsdp": each}, slices | {"fsdp": each // 4, "tp": 4}]

    def step(self) -> "Step":
        """On shapes, which are not compiled."""
        module: Any
        module, inputs = model_of(
            self.model, scan=True, remat=True, dtype="bfloat16", param_dtype="bfloat16", context=TOKENS
        )
        params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
        batch = jax.ShapeDtypeStruct((self.many, TOKENS), jnp.int32)

        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            labels = jnp.roll(tokens, -1, axis=1)
            return jnp.asarray(module.apply({"params": params}, tokens, labels=labels))[:, :-1].mean()

        return Step(loss, adapt(self, loss, params, batch), batch, heads_of(module))

    def tried(self, mesh: Mapping[str, int]) -> dict[str, Any]:
        """The plan on a mesh, as JSON, or why there is none."""
        loss, adapted, batch, heads = self.step()
        trained = jlora.count(adapted).trainable
        assert trained == TRAINED.get(self[:2], trained), (self, trained)
        (trial,) = layouts(loss, adapted, TX, batch, self.device, tried=[mesh], heads=heads).trials
        return {"trained": trained, **cell(trial)}


class Step(NamedTuple):
    """A step to plan: the loss of parameters and tokens, the model with its method, the tokens, numbers of heads."""

    loss: Any
    adapted: jlora.Adapted
    batch: jax.ShapeDtypeStruct
    heads: tuple[int, ...]


def adapt(case: Case, loss: Any, params: Any, batch: Any) -> jlora.Adapted:
    """The method on shapes."""
    if case.method == FULL:
        return jlora.apply(params, method=jlora.full())
    sites = jlora.sites(loss, params, batch)
    if case.method == "QLoRA":
        params = jlora.quantize(params, "nf4", double=True, sites=sites)
    if case.method.startswith("LoRA r="):
        rank = int(case.method.removeprefix("LoRA r="))
        return jlora.apply(params, rank=rank, targets="attn/(query|value)/kernel", sites=sites)
    return jlora.apply(params, rank=16, targets="(attn|mlp)/.*kernel", sites=sites)


def cell(trial: Trial) -> dict[str, Any]:
    """The figures of a plan that the table needs."""
    if trial.plan is None:
        return {"mesh": dict(trial.mesh), "reason": trial.reason, "fits": False}
    told = trial.plan.as_dict()
    return {name: told[name] for name in KEPT}


def key(case: Case, mesh: Mapping[str, int]) -> str:
    """Name of a cell."""
    return f"{case.model}, {case.method}, {case.device}, {words(mesh)}"


def words(mesh: Mapping[str, int]) -> str:
    """A mesh in words: "fsdp 8, tp 8"."""
    return ", ".join(f"{axis} {n}" for axis, n in mesh.items())


def scaling() -> list[tuple[Case, dict[str, int]]]:
    """Llama 2 70B on more and more H100: fully sharded, and sharded in each node with copies between nodes."""
    found = []
    for n in NUMBERS:
        device = f"{n}xh100"
        found += [(Case("llama-2-70b", method, device), {"fsdp": n}) for method in ("LoRA", FULL)]
        if n > 8:
            found.append((Case("llama-2-70b", "LoRA", device), {"data": n // 8, "fsdp": 8}))
    return found


def fill(found: dict[str, Any], wanted: Iterable[tuple[Case, dict[str, int]]], keep: Any) -> None:
    """Plans what is not there yet."""
    for case, mesh in wanted:
        name = key(case, mesh)
        if name not in found:
            found[name] = case.tried(mesh)
            print(f"{name}: {shown(found[name])}", flush=True)
            keep(found)


def shown(plan: Mapping[str, Any]) -> str:
    """A line on a cell."""
    if "reason" in plan:
        return str(plan["reason"])
    best = plan["roofline"]
    times = f", {best['seconds']:.3f} s by {best['limiting']}" if best else ""
    return (
        f"{whole(plan) / 1e9:.1f} GB, {plan['wire'] / 1e9:.1f} received{times}, compiled in {plan['compiled_in']:.0f} s"
    )


def whole(plan: Mapping[str, Any]) -> int:
    """Bytes that the step needs on a device."""
    return int(plan["peak"] + plan["unused"])


def best(found: Mapping[str, Any], case: Case) -> dict[str, Any] | None:
    """The fastest plan that fits; of those that do not, the smallest; None where nothing was tried."""
    plans = [plan for mesh in case.meshes() if (plan := found.get(key(case, mesh))) and "reason" not in plan]
    fits = [plan for plan in plans if plan["fits"]]
    if fits:
        return min(fits, key=_cost)
    return min(plans, key=whole, default=None)


def _cost(plan: Mapping[str, Any]) -> tuple[float, float]:
    times = plan["roofline"] or {"seconds": 0.0, "compute": 0.0, "memory": 0.0, "ici": 0.0, "dcn": float(plan["wire"])}
    return times["seconds"], sum(times[name] for name in ("compute", "memory", "ici", "dcn"))


HEADER = (
    "devices", "model", "method", "trained", "layout", "weights", "optimizer", "peak, GB", "fits", "TFLOP",
    "received, GB", "of it DCN", "compute", "memory", "ICI", "DCN, s", "limited by",
)  # fmt: skip


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """A line for each step: the layout to take, GB of its parts on a device, GB received, seconds at best."""
    rows = []
    for case in (Case(m, how, device) for device in DEVICES for m in MODELS for how in METHODS[m]):
        plan, tried = best(found, case), [found[name] for mesh in case.meshes() if (name := key(case, mesh)) in found]
        if tried:
            rows.append([case.device, case.model, case.method, f"{tried[0]['trained']:,}", *_cells(plan)])
    return [list(HEADER), *rows]


def _cells(plan: Mapping[str, Any] | None) -> list[str]:
    if plan is None:
        return ["none", *[""] * (len(HEADER) - 5)]
    sizes = [gigabytes(plan[part]) for part in ("weights", "optimizer_state")]
    peak = f"**{gigabytes(whole(plan))}**" if plan["fits"] else gigabytes(whole(plan))
    times = plan["roofline"]
    seconds = [f"{times[name]:.2f}" for name in ("compute", "memory", "ici", "dcn")] if times else [""] * 4
    return [
        words(plan["mesh"]), *sizes, peak, "yes" if plan["fits"] else "no", f"{plan['flops'] / 1e12:.0f}",
        *received(plan), *seconds, times["limiting"] if times else "refused",
    ]  # fmt: skip


def layouts_of(found: Mapping[str, Any]) -> list[list[str]]:
    """A line for each layout of each step: what it takes and receives, or why it cannot be."""
    header = [
        "devices",
        "model",
        "method",
        "layout",
        "peak, GB",
        "received, GB",
        "of it DCN",
        "s at best",
        "limited by",
    ]
    rows = []
    for case in (Case(m, how, device) for device in DEVICES for m in MODELS for how in METHODS[m]):
        for mesh in case.meshes():
            if plan := found.get(key(case, mesh)):
                rows.append([case.device, case.model, case.method, words(mesh), *_short(plan)])
    return [header, *rows]


def _short(plan: Mapping[str, Any]) -> list[str]:
    if "reason" in plan:
        why = "too large" if "alone are" in plan["reason"] else "does not divide"
        return [why, "", "", "", ""]
    times = plan["roofline"]
    peak = f"**{gigabytes(whole(plan))}**" if plan["fits"] else gigabytes(whole(plan))
    return [peak, *received(plan), *([f"{times['seconds']:.2f}", times["limiting"]] if times else ["", "refused"])]


def received(plan: Mapping[str, Any]) -> list[str]:
    """GB that a device receives, and of it from other nodes; nothing of a program that the compiler refused."""
    return [gigabytes(plan["wire"]), gigabytes(plan["dcn"])] if plan["roofline"] else ["", ""]


def scaled(found: Mapping[str, Any]) -> list[list[str]]:
    """GB that a device receives in a step, and of it from other nodes, by the number of H100."""
    header = [
        "H100",
        "full, fsdp",
        "of it DCN",
        "LoRA, fsdp",
        "of it DCN",
        "÷ full",
        "LoRA, data x fsdp 8",
        "of it DCN",
    ]
    rows = []
    for n in NUMBERS:
        line = Line(found, n)
        full, sharded, copies = line.of(FULL, False), line.of("LoRA", False), line.of("LoRA", n > 8)
        if sharded and copies:
            of = lambda plan: ["", ""] if plan is None else [gigabytes(plan["wire"]), gigabytes(plan["dcn"])]
            share = f"{sharded['wire'] / full['wire']:.2f}" if full else ""
            rows.append([str(n), *of(full), *of(sharded), share, *of(copies)])
    return [header, *rows]


class Line(NamedTuple):
    """The scaling's plans on so many devices."""

    found: Mapping[str, Any]
    many: int

    def of(self, method: str, copies: bool) -> dict[str, Any] | None:
        """The plan of a method, fully sharded or with copies in each node; None where it does not fit."""
        mesh = {"data": self.many // 8, "fsdp": 8} if copies else {"fsdp": self.many}
        found = self.found.get(key(Case("llama-2-70b", method, f"{self.many}xh100"), mesh))
        return None if found is None or "reason" in found else found


def gigabytes(count: float) -> str:
    """In 10^9 bytes."""
    return f"{count / 1e9:.1f}"


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Left: GB of the best layouts, stacked, dashed the limits. Right: GB received by the number of H100."""
    cases = [Case(m, how, device) for device in DEVICES for m in MODELS for how in METHODS[m]]
    bars = [(case, plan) for case in cases if (plan := best(found, case))]
    if not bars:
        return
    with figure_of(path, (max(9.0, 0.45 * len(bars) + 6.0), 6.5), 2) as (figure, (left, right)):
        for at, (_, plan) in enumerate(bars):
            below = 0.0
            for part, colour in zip(PARTS, COLOURS, strict=False):
                height = plan[part] if part != "temporaries" else whole(plan) - sum(plan[p] for p in PARTS[:-1])
                height = max(height, 0) / 1e9
                left.bar(at, height, 0.8, below, color=colour, label=part.replace("_", " ") if not at else None)
                below += height
            left.text(at, below, f"{below:.0f}", ha="center", va="bottom", fontsize=8)
            left.plot([at - 0.5, at + 0.5], [plan["limit"] / 1e9] * 2, color=INK, linestyle=DASHED, linewidth=1.0)
        names = [f"{case.device}, {case.model}, {case.method}" for case, _ in bars]
        left.set_xticks(range(len(bars)), names, rotation=90, fontsize=8)
        left.set_ylabel("GB on each device; dashed: its memory")
        left.set_title("Best layout of each step")
        legend(figure, left.get_legend_handles_labels()[0])
        _draw_scaling(right, found)


def _draw_scaling(axes: Any, found: Mapping[str, Any]) -> None:
    lines = {"full, fsdp": (FULL, False), "LoRA, fsdp": ("LoRA", False), "LoRA, data x fsdp 8": ("LoRA", True)}
    for (name, (method, copies)), colour in zip(lines.items(), COLOURS, strict=False):
        plans = {n: Line(found, n).of(method, copies and n > 8) for n in NUMBERS}
        there = {math.log2(n): plan for n, plan in plans.items() if plan}
        for of, dash in (("wire", "-"), ("dcn", DASHED)):
            heights = [plan[of] / 1e9 for plan in there.values()]
            axes.plot(
                list(there), heights, color=colour, linestyle=dash, marker="o", label=name if of == "wire" else None
            )
    axes.set_xticks([math.log2(n) for n in NUMBERS], [str(n) for n in NUMBERS])
    axes.set_xlabel("H100; Llama 2 70B, a sequence of 2,048 to each")
    axes.set_ylabel("GB received in a step; dashed: from other nodes")
    axes.set_title("Traffic")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center right", bbox_to_anchor=(1.0, 0.33))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m experiments.bench.pods", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of cells.json, results.md and pods.png")
    parser.add_argument("--devices", nargs="*", choices=DEVICES, default=())
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", help="of those of the model")
    parser.add_argument("--meshes", type=int, help="so many of each step, the first ones")
    parser.add_argument("--scaling", action="store_true", help="Llama 2 70B on 8 to 512 H100")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "cells.json"
    found: dict[str, Any] = read_json(file) if file.exists() else {}
    cases = [Case(m, how, device) for device in options.devices for m in options.models for how in METHODS[m]]
    cases = [case for case in cases if not options.methods or case.method in options.methods]
    wanted = [(case, mesh) for case in cases for mesh in case.meshes()[: options.meshes]]
    fill(found, [*wanted, *(scaling() if options.scaling else [])], lambda found: write_json(file, found))
    lines = [*markdown_table(table(found)), "", *markdown_table(scaled(found)), "", *markdown_table(layouts_of(found))]
    write_text(options.folder / "results.md", "\n".join(lines) + "\n")
    draw(options.folder / "pods.png", found)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
