"""A training step and an image of jlora's Stable Diffusion beside diffusers with PEFT on PyTorch, on the same machine.

    python -m experiments.bench.diffusion                       # two CPU cores: a UNet of a quarter of SD 1.5's widths
    python -m experiments.bench.diffusion --device gpu          # SD 1.5 at 512 pixels in bfloat16
    python -m experiments.bench.diffusion --rows 1 --part unet step --form eager channels_last compiled

Both sides read the same random weights, from one folder that `jlora.models.diffusion.save` writes, and take their turns
in one process, on the same inputs; a ratio is the median over the rounds of a side's time over that of jlora's in the
same round. Before anything is timed, losses and images must agree.

  unet   a forward pass.
  step   LoRA r=4 on all attention: loss, gradient and AdamW, on latents and texts' embeddings that are there.
  image  text to image by DDIM with guidance, from the same noise: text encoder, UNet twice a step, decoder.

The forms of the other side: eager; channels_last, the same with its images' channels last in memory; compiled, eager
with `torch.compile` around the UNet. Without torch, diffusers and peft jlora's side is timed alone.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from experiments.bench.models import write
from experiments.bench.step import machine
from experiments.price import interleaved, ratio
from experiments.report.tables import markdown_table
from jlora.models import diffusion
from jlora.models.clip import CLIPText, CLIPTextConfig
from jlora.models.diffusion import Pipeline
from jlora.models.diffusion.noise import Noise, add
from jlora.models.tokenizer import Tokenizer
from jlora.models.unet import UNet, UNetConfig
from jlora.models.unet.targets import ATTENTION
from jlora.models.vae import VAE, VAEConfig

NEEDED = ("torch", "diffusers", "transformers", "peft")
FORMS = ("eager", "channels_last", "compiled")
PARTS = ("unet", "step", "image")
PROMPT = "a photo of a dog"
RANK, RATE, DECAY = 4, 1e-4, 1e-2
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Size:
    """Configs of a pipeline: of its UNet, its autoencoder and its text encoder."""

    unet: UNetConfig
    vae: VAEConfig
    text: CLIPTextConfig


def _text(width: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(514, width=width, layers=layers, heads=heads, hidden=4 * width, end=513, projection=width)


SIZES = {
    "smoke": Size(
        UNetConfig(8, widths=(16, 32), depths=(1, 0), heads=(2, 2), layers=1, context_width=16, groups=8),
        VAEConfig(16, widths=(8, 16), layers=1, groups=4),
        _text(16, 1, 2),
    ),
    "quarter": Size(
        UNetConfig(32, widths=(80, 160, 320, 320), context_width=192, groups=16),
        VAEConfig(256, widths=(32, 64, 128, 128), groups=16),
        _text(192, 12, 3),
    ),
    "sd15": Size(UNetConfig(), VAEConfig(), _text(768, 12, 12)),
}


@dataclass(frozen=True)
class Case:
    """Work to time: a size of `SIZES`, images at once, steps of an image, and how numbers are held."""

    size: str
    rows: int
    steps: int
    dtype: str
    device: str
    folder: str

    def arrays(self) -> dict[str, np.ndarray]:
        """Inputs of both sides, images with channels last."""
        config, rng = SIZES[self.size].unet, np.random.default_rng(0)
        draw = lambda *axes: rng.standard_normal((self.rows, *axes)).astype(np.float32)
        latents = (config.size, config.size, config.channels)
        return {
            "latents": draw(*latents), "noise": draw(*latents), "context": draw(77, config.context_width),
            "times": rng.integers(0, 1000, self.rows).astype(np.int32),
        }  # fmt: skip


@dataclass(frozen=True)
class Side:
    """A library at work.

    Attributes:
      name: of it.
      trainable: number of parameters that a step trains.
      calls: part -> call of it, which returns when it is done: with the prediction, the loss, or the images.
    """

    name: str
    trainable: int
    calls: Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Result:
    """Times of one side.

    Attributes:
      size, dtype, rows: what was timed.
      part: "unet", "step" or "image".
      side: "jlora" or a form of the other.
      trainable: parameters of a step.
      milliseconds: median over the rounds; None without rounds.
      over_jlora: median of the ratios to jlora's time in the same round.
    """

    size: str
    dtype: str
    rows: int
    part: str
    side: str
    trainable: int
    milliseconds: float | None
    over_jlora: float | None


# -- the folder --------------------------------------------------------------------------------------------------------


def write_pipeline(size: Size, folder: Path) -> None:
    """A pipeline of random weights, in diffusers' format."""
    _write_tokenizer(folder / "tokenizer")
    modules: dict[str, Any] = {"unet": UNet(size.unet), "vae": VAE(size.vae), "text_encoder": CLIPText(size.text)}
    side, pixels = size.unet.size, size.unet.size * size.vae.factor
    inputs = {
        "unet": (jnp.zeros((1, side, side, 4)), jnp.zeros(1), jnp.zeros((1, 77, size.unet.context_width))),
        "vae": (jnp.zeros((1, pixels, pixels, 3)),),
        "text_encoder": (jnp.zeros((1, 77), jnp.int32),),
    }
    key = jax.random.key(0)
    params = {name: jax.jit(module.init)(key, *inputs[name])["params"] for name, module in modules.items()}
    tokenizers = {"text_encoder": Tokenizer.load(folder / "tokenizer")}
    diffusion.save(folder, Pipeline(modules, params, tokenizers, Noise(), "ddim"))


def _write_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer without merges: bytes, bytes that end a word, and the two tokens around a text."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(i) for i in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": words[-2], **dict.fromkeys(("eos_token", "unk_token", "pad_token"), words[-1])}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


# -- the sides ---------------------------------------------------------------------------------------------------------


def jlora_side(case: Case, parts: Sequence[str]) -> Side:
    """The pipeline of the folder in jlora."""
    pipeline = diffusion.load(case.folder, dtype=case.dtype, param_dtype=case.dtype)
    unet, params = pipeline.modules["unet"], pipeline.params["unet"]
    arrays = {name: jnp.asarray(x) for name, x in case.arrays().items()}

    def loss(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        noisy = add(pipeline.noise, batch["latents"], batch["noise"], batch["times"])
        out: Any = unet.apply({"params": params}, noisy, batch["times"], batch["context"])
        return jnp.mean((out["out"] - batch["noise"]) ** 2)

    adapted = jlora.apply(params, RANK, targets=ATTENTION, sites=jlora.sites(loss, params, arrays))
    step = jlora.train_step(loss, optax.adamw(RATE, weight_decay=DECAY))
    state = jlora.TrainState.create(adapted, step.tx)
    predict = jax.jit(lambda params, *args: unet.apply({"params": params}, *args)["out"])  # type: ignore[call-overload]

    def train() -> float:
        nonlocal state
        state, metrics = step(state, arrays)
        return float(metrics["loss"])

    def image() -> np.ndarray:
        made = diffusion.generate(
            pipeline, [PROMPT] * case.rows, key=jax.random.key(0), steps=case.steps, latents=arrays["latents"]
        )
        return np.asarray(made)

    calls: dict[str, Callable[[], Any]] = {
        "unet": lambda: np.asarray(predict(params, *(arrays[name] for name in ("latents", "times", "context")))),
        "step": train,
        "image": image,
    }
    return Side("jlora", jlora.count(adapted).trainable, {part: calls[part] for part in parts})


def torch_side(case: Case, form: str, parts: Sequence[str]) -> Side:
    """The same in diffusers, adapted by PEFT."""
    torch, diffusers, _, peft = (importlib.import_module(name) for name in NEEDED)
    where, dtype = "cuda" if case.device == "gpu" else "cpu", getattr(torch, case.dtype)
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    load = lambda: diffusers.StableDiffusionPipeline.from_pretrained(
        case.folder, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False
    ).to(where)
    pipeline, trained = load(), load().unet
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    trained.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    trained.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    factors = [p for p in trained.parameters() if p.requires_grad]
    for p in factors:
        p.data = p.data.float()  # as the training scripts have them
    if form == "channels_last":
        for module in (pipeline.unet, pipeline.vae, trained):
            module.to(memory_format=torch.channels_last)
    if form == "compiled":
        pipeline.unet, trained = torch.compile(pipeline.unet), torch.compile(trained)
    optimizer = torch.optim.AdamW(factors, lr=RATE, weight_decay=DECAY, fused=True)
    kept = torch.channels_last if form == "channels_last" else torch.contiguous_format
    arrays = {name: torch.from_numpy(x).to(where) for name, x in case.arrays().items()}
    first = lambda name: arrays[name].permute(0, 3, 1, 2).contiguous(memory_format=kept)
    latents, noise = first("latents"), first("noise")
    times, context = arrays["times"].long(), arrays["context"].to(dtype)
    half = case.dtype != "float32"

    def predict() -> np.ndarray:
        with torch.no_grad():
            out = pipeline.unet(latents.to(dtype), times, context).sample
        return np.asarray(out.float().permute(0, 2, 3, 1).cpu().numpy())

    def train() -> float:
        with torch.autocast(where, dtype, enabled=half):
            noisy = pipeline.scheduler.add_noise(latents, noise, times).to(dtype)
            loss = torch.nn.functional.mse_loss(trained(noisy, times, context).sample.float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def image() -> np.ndarray:
        made = pipeline(
            [PROMPT] * case.rows, num_inference_steps=case.steps, latents=latents.to(dtype), output_type="np"
        )
        return np.asarray(made.images)

    calls: dict[str, Callable[[], Any]] = {"unet": predict, "step": train, "image": image}
    return Side(form, sum(p.numel() for p in factors), {part: calls[part] for part in parts})


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(case: Case, parts: Sequence[str], forms: Sequence[str], rounds: int) -> list[Result]:
    """All sides of a case, in turn; jlora's is the first."""
    sides = [jlora_side(case, parts), *(torch_side(case, form, parts) for form in forms)]
    results = []
    for part in parts:
        check(part, {side.name: side.calls[part]() for side in sides}, TOLERANCE[case.dtype])
        seconds = interleaved({side.name: side.calls[part] for side in sides}, rounds) if rounds else {}
        for side in sides:
            mine = seconds.get(side.name)
            middle = 1e3 * median(mine) if mine else None
            over = ratio(mine, seconds["jlora"]) if mine else None
            results.append(Result(case.size, case.dtype, case.rows, part, side.name, side.trainable, middle, over))
    return results


def check(part: str, found: Mapping[str, Any], tolerance: float) -> None:
    """Raises AssertionError where a side computes something else than jlora's."""
    expected = np.asarray(found["jlora"])
    for name, value in found.items():
        value = np.asarray(value)
        off = np.abs(value - expected).max() if value.shape == expected.shape else np.inf
        if not off <= tolerance * max(1.0, np.abs(expected).max()):
            raise AssertionError(f"{part}: {name} and jlora differ by {off:.2g} in {value.shape} and {expected.shape}")


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    head = ("size", "dtype", "batch", "part", "side", "trained", "ms", "÷ jlora")
    number = lambda value, form: "" if value is None else format(value, form)
    rows = []
    for r in results:
        times = (number(r.milliseconds, ",.0f"), number(r.over_jlora, ".2f"))
        rows.append((r.size, r.dtype, str(r.rows), r.part, r.side, f"{r.trainable:,}", *times))
    return "\n".join(markdown_table([head, *rows]))


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measures, prints the table, writes it beside the JSON."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m experiments.bench.diffusion",
        None,
        summary,
        rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, help="quarter, on a GPU sd15")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4], help="images at once")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--form", nargs="*", choices=FORMS, default=FORMS[:2])
    parser.add_argument("--steps", type=int, default=10, help="of an image")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each side")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args(arguments)
    on_gpu = options.device == "gpu"
    size, dtype = options.size or ("sd15" if on_gpu else "quarter"), "bfloat16" if on_gpu else "float32"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    forms = () if missing else options.form
    if missing:
        print(f"skipped: the other side needs {', '.join(missing)}: pip install {' '.join(NEEDED)}")
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder, jax.default_device(jax.devices(options.device)[0]):
        write_pipeline(SIZES[size], Path(folder))
        for rows in options.rows:
            case = Case(size, rows, options.steps, dtype, options.device, folder)
            results += measure(case, options.part, forms, options.rounds)
    record = {"machine": machine(), "rounds": options.rounds, "results": [dataclasses.asdict(r) for r in results]}
    write(options.out, "diffusion", table(results), record)
    return results


if __name__ == "__main__":
    main()
