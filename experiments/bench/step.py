"""Costs of a training step: full fine-tuning, weights merged on the fly, the plain factored form and jlora.

    python -m experiments.bench.step                                   # for two CPU cores: a GPT-2 of 6 layers
    python -m experiments.bench.step --preset gpt2-medium              # for a GPU: 8,192 tokens a step in bfloat16
    python -m experiments.bench.step --preset gpt2 gpt2-medium --rank 4 16 64 --method lora dora --dtype bfloat16

All variants of one dtype live in one process and take their steps in turn, so that a machine which is busy for a while
slows all of them; a ratio is the median over the rounds of a step's time over that of full fine-tuning in the same
round. A step is loss, gradient and AdamW, its state donated. FLOPs and temporaries are those of XLA's compiled program.

The forms:
  full        all parameters are trained; no jlora in it.
  merged      `loss(jlora.merge(adapted))`: each weight W + (alpha/r) B A is built, and so is its gradient.
  plain       `jlora.lift(loss, forward_mode=True)`: autodiff of x W + (x A) B.
  jlora       `jlora.lift(loss)`: the same with jlora's backward pass.
  train_step  `jlora.train_step(loss, tx)`: what a user runs; jlora plus dropout keys, the norm and the checks.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from jlora.models.gpt2 import GPT2, PRESETS, GPT2Config

PyTree = Any
Loss = Callable[[PyTree, jax.Array], jax.Array]

FORMS = ("full", "merged", "plain", "jlora", "train_step")
METHODS: dict[str, Callable[[int], jlora.Method]] = {
    "lora": jlora.lora,
    "rslora": jlora.rslora,
    "dora": jlora.dora,
    "adalora": lambda rank: jlora.adalora(
        rank, max(1, 2 * rank // 3), total_steps=1000
    ),  # its budget: train_step alone
    "lora_fa": jlora.lora_fa,
    "lokr": jlora.lokr,
    "loha": lambda rank: jlora.loha(max(1, round(rank**0.5))),  # of the same rank in the lazy form
    "oft": jlora.oft,  # blocks of this side
    "pissa": lambda rank: jlora.pissa(rank, iterations=2),
    "vera": jlora.vera,
}
MEGA, GIGA = 1e6, 1e9


@dataclass(frozen=True)
class Preset:
    """A model, the tokens of a step, and the dtypes worth measuring."""

    model: GPT2Config
    batch: int
    length: int
    dtypes: tuple[str, ...]


def _published(name: str) -> Preset:
    return Preset(PRESETS[name], batch=8, length=1024, dtypes=("bfloat16",))


SIZES = {
    "smoke": Preset(GPT2Config(64, context=16, width=32, layers=2, heads=2), 2, 16, ("float32",)),
    "cpu": Preset(GPT2Config(256, context=128, width=512, layers=6, heads=8), 8, 128, ("float32",)),
    **{name: _published(name) for name in PRESETS},
}


@dataclass(frozen=True)
class Variant:
    """One way of training; rank and method are None for full fine-tuning."""

    form: str
    method: str | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Result:
    """Costs of one variant; the ratios are to full fine-tuning of the same model and dtype.

    Attributes:
      preset, dtype, form, method, rank: what was measured.
      trainable: number of trained parameters.
      milliseconds, time_ratio: of a step, medians over the rounds; None with `--rounds 0`.
      over_lora: as time_ratio, to LoRA of the same form and rank, where that was measured.
      gflops, flops_ratio: of a step, as XLA's cost analysis counts the compiled program.
      temporary_mb, temporary_ratio: what the program holds at its peak beside arguments and results.
      argument_mb: parameters, optimizer state and tokens.
      losses: of the first two steps.
    """

    preset: str
    dtype: str
    form: str
    method: str | None
    rank: int | None
    trainable: int
    milliseconds: float | None
    time_ratio: float | None
    over_lora: float | None
    gflops: float
    flops_ratio: float
    temporary_mb: float
    temporary_ratio: float
    argument_mb: float
    losses: tuple[float, float]


@dataclass
class Program:
    """A compiled step with the state that it goes on from; `advance` takes one and returns the loss."""

    variant: Variant
    compiled: Any
    step: Callable[[PyTree], tuple[PyTree, jax.Array]]
    state: PyTree
    trainable: int

    def advance(self) -> jax.Array:
        """One step, finished when this returns."""
        self.state, loss = self.step(self.state)
        jax.block_until_ready((self.state, loss))
        return loss


# -- the programs ------------------------------------------------------------------------------------------------------


def build(variant: Variant, loss: Loss, params: PyTree, tokens: jax.Array) -> Program:
    """Compiles one variant's step."""
    tx = optax.adamw(1e-3)
    if variant.form == "full":
        return _full(variant, loss, params, tokens, tx)
    assert variant.method is not None and variant.rank is not None
    sites = jlora.sites(loss, params, tokens)  # read from the program: a scanned kernel's axes are in no name
    adapted = jlora.apply(params, method=METHODS[variant.method](variant.rank), sites=sites, targets="kernel$")
    if variant.form == "train_step":
        return _train_step(variant, loss, adapted, tokens, tx)
    return _factors_alone(variant, loss, adapted, tokens, tx)


def _full(variant: Variant, loss: Loss, params: PyTree, tokens: jax.Array, tx: optax.GradientTransformation) -> Program:
    def update(params: PyTree, opt_state: PyTree, tokens: jax.Array) -> tuple[PyTree, PyTree, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = jax.tree.map(jnp.copy, params)  # donated below, and the other variants read the base
    state = (params, tx.init(params))
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*state, tokens).compile()

    def step(state: PyTree) -> tuple[PyTree, jax.Array]:
        params, opt_state, value = compiled(*state, tokens)
        return (params, opt_state), value

    return Program(variant, compiled, step, state, sum(leaf.size for leaf in jax.tree.leaves(params)))


def _factors_alone(
    variant: Variant, loss: Loss, adapted: jlora.Adapted, tokens: jax.Array, tx: optax.GradientTransformation
) -> Program:
    objectives: dict[str, Loss] = {
        "merged": lambda adapted, tokens: loss(jlora.merge(adapted), tokens),
        "plain": jlora.lift(loss, strict=True, forward_mode=True),
        "jlora": jlora.lift(loss, strict=True),
    }
    objective = objectives[variant.form]

    def update(
        factors: PyTree, opt_state: PyTree, frozen: jlora.Adapted, tokens: jax.Array
    ) -> tuple[PyTree, PyTree, jax.Array]:
        def of_factors(factors: PyTree) -> jax.Array:
            return objective(jlora.combine(factors, frozen), tokens)

        value, gradient = jax.value_and_grad(of_factors)(factors)
        updates, opt_state = tx.update(gradient, opt_state, factors)
        return optax.apply_updates(factors, updates), opt_state, value

    factors, frozen = jlora.partition(adapted)
    state = (factors, tx.init(factors))
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*state, frozen, tokens).compile()

    def step(state: PyTree) -> tuple[PyTree, jax.Array]:
        factors, opt_state, value = compiled(*state, frozen, tokens)
        return (factors, opt_state), value

    return Program(variant, compiled, step, state, jlora.count(adapted).trainable)


def _train_step(
    variant: Variant, loss: Loss, adapted: jlora.Adapted, tokens: jax.Array, tx: optax.GradientTransformation
) -> Program:
    take = jlora.train_step(loss, tx)
    state = jlora.TrainState.create(adapted, take.tx)
    compiled = take.lower(state, tokens).compile()

    def step(state: PyTree) -> tuple[PyTree, jax.Array]:
        state, metrics = take(state, tokens)
        return state, metrics["loss"] - metrics.get("regulariser", 0.0)  # AdaLoRA's

    return Program(variant, compiled, step, state, jlora.count(adapted).trainable)


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(name: str, preset: Preset, dtype: str, variants: Sequence[Variant], rounds: int) -> list[Result]:
    """All variants of one model and dtype, side by side; the first one is what the ratios refer to."""
    loss, params, tokens = model_of(preset, dtype)
    programs = []
    for variant in variants:
        _say(f"{name}, {dtype}: compiling {_title(variant)}")
        programs.append(build(variant, loss, params, tokens))
    losses = [(float(program.advance()), float(program.advance())) for program in programs]  # and warm
    _check(variants, losses, tolerance=1e-3 if dtype == "float32" else 2e-2)
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    for i in range(rounds):
        _say(f"{name}, {dtype}: round {i + 1} of {rounds}")
        for program in programs:
            start = time.perf_counter()
            program.advance()
            seconds[program.variant].append(time.perf_counter() - start)
    _say("")
    reference = compiled_cost(programs[0].compiled)
    return [
        _result(name, dtype, program, first_two, reference, seconds)
        for program, first_two in zip(programs, losses, strict=True)
    ]


class CompiledCost(NamedTuple):
    """FLOPs of a program; bytes of its temporaries and of its arguments."""

    flops: float
    temporary: int
    arguments: int


def compiled_cost(compiled: Any) -> CompiledCost:
    """Costs of a compiled program, by XLA's own analysis."""
    memory = compiled.memory_analysis()
    return CompiledCost(
        float(compiled.cost_analysis()["flops"]), memory.temp_size_in_bytes, memory.argument_size_in_bytes
    )


def _result(
    name: str,
    dtype: str,
    program: Program,
    losses: tuple[float, float],
    reference: CompiledCost,
    seconds: Mapping[Variant, list[float]],
) -> Result:
    cost, variant, mine = compiled_cost(program.compiled), program.variant, seconds[program.variant]
    lora = dataclasses.replace(variant, method="lora")

    def over(other: Variant) -> float | None:
        its = seconds.get(other)
        return statistics.median(x / y for x, y in zip(mine, its, strict=True)) if its else None

    return Result(
        name,
        dtype,
        **dataclasses.asdict(variant),
        trainable=program.trainable,
        milliseconds=1e3 * statistics.median(mine) if mine else None,
        time_ratio=over(Variant("full")),
        over_lora=over(lora) if variant.method not in (None, "lora") else None,
        gflops=cost.flops / GIGA,
        flops_ratio=cost.flops / reference.flops,
        temporary_mb=cost.temporary / MEGA,
        temporary_ratio=cost.temporary / reference.temporary,
        argument_mb=cost.arguments / MEGA,
        losses=losses,
    )


def model_of(preset: Preset, dtype: str) -> tuple[Loss, PyTree, jax.Array]:
    """The loss, parameters in `dtype`, and tokens: the targets are the tokens moved by one, (batch, length + 1)."""
    config = dataclasses.replace(preset.model, dtype=dtype, param_dtype=dtype)
    model = GPT2(config)
    tokens = jax.random.randint(jax.random.key(1), (preset.batch, preset.length + 1), 0, config.vocab_size)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:, :-1])["params"]

    def loss(params: PyTree, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss, params, tokens


def _check(variants: Sequence[Variant], losses: Sequence[tuple[float, float]], tolerance: float) -> None:
    """Raises an error where the programs compute different things: their times would say nothing.

    All start from the same function; after one update those of one method and rank still agree.
    """
    start, _ = losses[0]
    updated: dict[tuple[str | None, int | None], float] = {}
    for variant, (first, second) in zip(variants, losses, strict=True):
        expected = updated.setdefault((variant.method, variant.rank), second)
        if abs(first - start) > tolerance * start or abs(second - expected) > tolerance * expected:
            raise AssertionError(
                f"{_title(variant)}: losses of the first steps are {first}, {second}, expected {start}, {expected}"
            )


# -- what is printed and kept ------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    costs = ("ms", "÷ full", "÷ LoRA", "GFLOP", "÷ full", "temp MB", "÷ full", "args MB")
    head = ("model", "dtype", "form", "method", "rank", "trainable", *costs)
    cells = [head, *map(_cells, results)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _cells(r: Result) -> tuple[str, ...]:
    times = (
        "" if t is None else f"{t:.{places}f}"
        for t, places in ((r.milliseconds, 1), (r.time_ratio, 3), (r.over_lora, 3))
    )
    costs = (f"{r.gflops:.1f}", f"{r.flops_ratio:.3f}", f"{r.temporary_mb:.1f}", f"{r.temporary_ratio:.3f}")
    what = (r.preset, r.dtype, r.form, r.method or "", str(r.rank or ""))
    return (*what, f"{r.trainable:,}", *times, *costs, f"{r.argument_mb:.1f}")


def machine() -> dict[str, Any]:
    """Machine and versions that the numbers were measured on."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _title(variant: Variant) -> str:
    return " ".join(str(part) for part in (variant.form, variant.method, variant.rank) if part is not None)


def _say(line: str) -> None:
    """One line that the next one overwrites, where somebody looks."""
    if os.isatty(2):
        os.write(2, f"\r\x1b[K{line}".encode())


# -- the command -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        "python -m experiments.bench.step", None, summary, rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--preset", nargs="+", choices=SIZES, default=["cpu"], help="models to measure, one after the other")
    p.add_argument("--form", nargs="+", choices=FORMS[1:], default=FORMS[1:], help="beside full fine-tuning")
    p.add_argument("--method", nargs="+", choices=METHODS, default=["lora", "dora"])
    p.add_argument("--rank", nargs="+", type=int, default=[16], metavar="R")
    p.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help="of parameters and computation")
    p.add_argument("--rounds", type=int, default=14, help="timed steps of each variant; 0: FLOPs and memory alone")
    p.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for step.json and step.md")
    shape = p.add_argument_group("in place of the preset's")
    shape.add_argument("--batch", type=int)
    shape.add_argument("--length", type=int, help="tokens per example")
    for name in ("layers", "width", "heads"):
        shape.add_argument(f"--{name}", type=int)
    shape.add_argument("--vocab", dest="vocab_size", type=int, metavar="VOCAB")
    shape.add_argument(
        "--scan", action="store_true", default=None, help="XLA counts a loop's FLOPs once, not per layer"
    )
    shape.add_argument("--remat", action="store_true", default=None)
    return p


def preset_of(name: str, options: argparse.Namespace) -> Preset:
    """The preset with the options that were given in place of its own."""

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names if getattr(options, name) is not None}

    preset = dataclasses.replace(SIZES[name], **given("batch", "length"))
    changes = given("layers", "width", "heads", "vocab_size", "scan", "remat")
    model = dataclasses.replace(preset.model, context=max(preset.length, preset.model.context), **changes)
    return dataclasses.replace(preset, model=model, dtypes=tuple(options.dtype or preset.dtypes))


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measures, prints the table, writes it beside the JSON."""
    options = parser().parse_args(arguments)
    adapted = [Variant(f, m, r) for r in options.rank for m in options.method for f in FORMS if f in options.form]
    results: list[Result] = []
    for name in options.preset:
        preset = preset_of(name, options)
        for dtype in preset.dtypes:
            results += measure(name, preset, dtype, [Variant("full"), *adapted], options.rounds)
    shown = table(results)
    here = machine()
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": here,
        "options": {**vars(options), "out": str(options.out)},
        "results": [dataclasses.asdict(result) for result in results],
    }
    (options.out / "step.json").write_text(json.dumps(record, indent=2) + "\n")
    caption = ", ".join(f"{key} {value}" for key, value in here.items())
    (options.out / "step.md").write_text(f"{shown}\n\n{caption}\n")
    print(f"{shown}\n\n{caption}\n{options.out}/step.json, {options.out}/step.md")
    return results


if __name__ == "__main__":
    main()
