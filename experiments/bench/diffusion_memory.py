"""Memory and FLOPs of a training step of Stable Diffusion 1.5 and SDXL: LoRA of three ranks, and full fine-tuning.

    python -m experiments.bench.diffusion_memory --folder out           # goes on where it was interrupted
    python -m experiments.bench.diffusion_memory --folder out --models sdxl --methods 16 --devices v5e --rows 1

Each step is compiled on shapes by the device's own compiler (`jlora.plan`), and nothing is run: bfloat16, blocks of one
kind scanned, activations of each block computed again, LoRA on all attention of the UNet, AdamW in float32. Latents and
the texts' embeddings come from a cache; "images and words" have the autoencoder's encoder and the text encoders, their
weights in NF4, in the step. `cells.json` keeps each plan, from which table and plot are made.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from experiments.bench.memory_table import PARTS, gigabytes, parts, whole
from experiments.folder import read_json, write_json, write_text
from experiments.report.style import COLOURS, DASHED, INK, figure_of, legend
from experiments.report.tables import markdown_table
from jlora.models.diffusion.noise import Noise, add, target
from jlora.models.sizes import PRESETS, model_of
from jlora.models.unet.targets import ATTENTION
from jlora.models.vae.modeling import sampled
from jlora.planning import devices

MODELS = ("sd15", "sdxl")
PIXELS = (512, 1024)
METHODS = ("4", "16", "128", "full")
ROWS = (1, 4)
DEVICES = ("h100", "v5e")
JUDGED = {"h100": ("rtx4090", "h100"), "v5e": ("v5e",)}
"""Devices whose memory a program of a device is held against."""
TEXTS = {"sd15": ("clip-vit-l-text",), "sdxl": ("clip-vit-l-text", "openclip-vit-bigg-text")}
TOKENS = 77
CAPTIONS = {"sd15": "SD 1.5", "sdxl": "SDXL"}
TX = optax.adamw(1e-4)


class Case(NamedTuple):
    """A step: the UNet's size, the sides of the images, a rank or "full", images of its batch, what is in the step."""

    model: str
    pixels: int
    method: str
    rows: int
    cached: bool = True

    @property
    def name(self) -> str:
        """Words for it."""
        how = "full fine-tuning" if self.method == "full" else f"LoRA r={self.method}"
        inside = "" if self.cached else ", images and words"
        return f"{CAPTIONS[self.model]}, {self.pixels}, {how}, batch {self.rows}{inside}"

    def planned(self, device: str) -> dict[str, Any]:
        """The plan, as JSON."""
        params, loss, batch = step_of(self)
        sites = jlora.sites(loss, params, batch, jax.random.key(0))
        if not self.cached:
            params = jlora.quantize(params, "nf4", double=True, targets="^text", sites=sites)
        if self.method == "full":
            adapted = jlora.apply(params, method=jlora.full(), sites=sites)
        else:
            adapted = jlora.apply(params, int(self.method), targets=ATTENTION, sites=sites)
        found = jlora.plan(loss, adapted, TX, batch, device=device, pass_key=True)
        return {**found.as_dict(), "trainable": jlora.count(adapted).trainable}


def step_of(case: Case) -> tuple[dict[str, Any], Callable[..., jax.Array], dict[str, Any]]:
    """Shapes of the parameters, the loss of them, a batch and a key, and shapes of the batch."""
    module, inputs = _model(case.model)
    config = module.config
    params = {"unet": _params(module, inputs)}
    shape = lambda *axes, dtype="float32": jax.ShapeDtypeStruct((case.rows, *axes), dtype)
    sizes = {} if config.added is None else {"sizes": shape(6)}
    latents = shape(case.pixels // 8, case.pixels // 8, config.channels)

    def predict(params: Any, x0: jax.Array, context: jax.Array, batch: Any, key: jax.Array, *pooled: Any) -> jax.Array:
        noise, (of_time, of_noise) = Noise(), jax.random.split(key)
        t = jax.random.randint(of_time, (case.rows,), 0, noise.steps)
        eps = jax.random.normal(of_noise, x0.shape)
        beside = (*pooled, batch["sizes"]) if pooled else ()
        out: Any = module.apply({"params": params["unet"]}, add(noise, x0, eps, t), t, context, *beside)
        return jnp.mean((out["out"] - target(noise, x0, eps, t)) ** 2)

    if case.cached:
        words = shape(TOKENS, config.context_width, dtype="bfloat16")
        pooled = {} if config.added is None else {"pooled": shape(config.pooled)}

        def of_cache(params: Any, batch: Any, key: jax.Array) -> jax.Array:
            more = [batch["pooled"]] if pooled else []
            return predict(params, batch["latents"], batch["context"], batch, key, *more)

        return params, of_cache, {"latents": latents, "context": words, **pooled, **sizes}

    vae, images = _model(f"{case.model}-vae")
    texts = [_model(name) for name in TEXTS[case.model]]
    whole_vae = _params(vae, images)
    params |= {"vae": {name: whole_vae[name] for name in ("encoder", "quant_conv")}}
    params |= {f"text_encoder_{i}": _params(*own) for i, own in enumerate(texts)}

    def of_images(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        of_latents, key = jax.random.split(key)
        encoded: Any = vae.apply({"params": params["vae"]}, batch["images"], method="encode")
        x0 = vae.config.scaling * sampled(encoded, of_latents)
        said: list[Any] = [
            module.apply({"params": params[f"text_encoder_{i}"]}, batch["tokens"], states=len(texts) > 1)
            for i, (module, _) in enumerate(texts)
        ]
        if len(texts) == 1:
            return predict(params, x0, said[0]["out"], batch, key)
        context = jnp.concatenate([own["states"][-2] for own in said], axis=-1)  # (rows, tokens, 768 + 1280)
        return predict(params, x0, context, batch, key, said[-1]["out"])

    tokens = shape(TOKENS, dtype="int32")
    return params, of_images, {"images": shape(case.pixels, case.pixels, 3), "tokens": tokens, **sizes}


def _model(name: str) -> tuple[Any, tuple[Any, ...]]:
    return model_of(name, scan=True, remat=True, dtype="bfloat16", param_dtype="bfloat16")


def _params(module: Any, inputs: tuple[Any, ...]) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def cases(models: Sequence[str], pixels: Sequence[int], methods: Sequence[str], rows: Sequence[int]) -> list[Case]:
    """All steps, and one with images and words for each model at the size that it was trained at."""
    found = [Case(m, p, how, n) for n in rows for how in methods for m in models for p in pixels]
    inside = [Case(m, 8 * PRESETS[m].size, "16", 1, cached=False) for m in models if "16" in methods and 1 in rows]
    return [*found, *(case for case in inside if case.pixels in pixels)]


def key(case: Case, device: str) -> str:
    """Name of a plan."""
    return f"{case.name}, {device}"


def table(found: Mapping[str, Any], wanted: Sequence[Case]) -> list[list[str]]:
    """A line for each step: GB of each part as compiled for an H100, and the whole on each device, bold if it fits."""
    limits = {name: devices.find(name).device.memory for names in JUDGED.values() for name in names}
    judged = [f"{name} ({gigabytes(limit)})" for name, limit in limits.items()]
    header = ["GB", "trained", "TFLOP", *(part.replace("_", " ") for part in PARTS if part != "unused"), *judged]
    rows = []
    for case in wanted:
        plans = {device: found.get(key(case, device)) for device in JUDGED}
        first = next((plan for plan in plans.values() if plan), None)
        if first is None:
            continue
        shown = [gigabytes3(parts(first)[part]) for part in PARTS if part != "unused"]
        cells = [cell(plans[device], limits[name]) for device, names in JUDGED.items() for name in names]
        rows.append([case.name, f"{first['trainable']:,}", f"{first['flops'] / 1e12:.2f}", *shown, *cells])
    return [header, *rows]


def cell(plan: Mapping[str, Any] | None, limit: int) -> str:
    """Peak of the step, in bold where it fits."""
    if plan is None:
        return ""
    return f"**{gigabytes3(whole(plan))}**" if whole(plan) <= limit else gigabytes3(whole(plan))


def gigabytes3(count: float) -> str:
    """In 10^9 bytes, to ten megabytes."""
    return f"{count / 1e9:.2f}"


def draw(path: Path, found: Mapping[str, Any], wanted: Sequence[Case]) -> None:
    """Stacked bars of the steps as compiled for an H100, lines at 16, 24 and 80 GB; a panel for each model."""
    there = [case for case in wanted if key(case, "h100") in found]
    models = [model for model in MODELS if any(case.model == model for case in there)]
    if not models:
        return
    with figure_of(path, (7.0 * len(models), 6.0), len(models)) as (figure, panels):
        for axes, model in zip(panels, models, strict=True):
            own = [case for case in there if case.model == model]
            for at, case in enumerate(own):
                below, plan = 0.0, found[key(case, "h100")]
                for part, colour in zip(PARTS, COLOURS, strict=False):
                    height = parts(plan)[part] / 1e9
                    axes.bar(at, height, 0.8, below, color=colour, label=part.replace("_", " ") if not at else None)
                    below += height
                axes.text(at, below, f"{below:.1f}", ha="center", va="bottom", fontsize=8)
            for limit in (16, 24, 80):
                axes.axhline(limit, color=INK, linestyle=DASHED, linewidth=1.0)
            axes.set_yscale("symlog", linthresh=8)
            axes.set_yticks([0, 2, 4, 8, 16, 24, 80], ["0", "2", "4", "8", "16", "24", "80"])
            axes.set_ylim(0, 120)
            names = [case.name.removeprefix(f"{CAPTIONS[model]}, ") for case in own]
            axes.set_xticks(range(len(own)), names, rotation=90, fontsize=8)
            axes.set_title(f"{CAPTIONS[model]}, one H100; dashed 16, 24 and 80 GB")
        panels[0].set_ylabel("GB, from 8 on logarithmic")
        legend(figure, panels[0].get_legend_handles_labels()[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m experiments.bench.diffusion_memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--folder", type=Path, required=True, help="of cells.json, results.md and memory.png")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--pixels", nargs="+", type=int, choices=PIXELS, default=PIXELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rows", nargs="+", type=int, choices=ROWS, default=ROWS)
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=DEVICES)
    parser.add_argument("--only-table", action="store_true", help="of the plans that are there")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "cells.json"
    wanted = cases(options.models, options.pixels, options.methods, options.rows)
    for device in () if options.only_table else options.devices:
        for case in wanted:
            found: dict[str, Any] = read_json(file) if file.exists() else {}
            if key(case, device) not in found:
                made = case.planned(device)
                found = (read_json(file) if file.exists() else {}) | {key(case, device): made}
                write_json(file, found)
                print(f"{key(case, device)}: {gigabytes3(whole(made))} GB", flush=True)
    found = read_json(file)
    lines = markdown_table(table(found, cases(MODELS, PIXELS, METHODS, ROWS)))
    write_text(options.folder / "results.md", "\n".join(lines) + "\n")
    draw(options.folder / "memory.png", found, cases(MODELS, PIXELS, METHODS, ROWS))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
