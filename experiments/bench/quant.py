"""Costs of a quantised base: a QLoRA step against the LoRA step, and ways of decoding four bits.

    python -m experiments.bench.quant                    # the CPU shapes of `bench.step`: a GPT-2 of 6 layers
    python -m experiments.bench.quant --dtype bfloat16 --rounds 0     # FLOPs and temporaries alone
    python -m experiments.bench.quant --decode           # nanoseconds a weight of each way of decoding

All variants live in one process and take their steps in turn, as in `bench.step`; a ratio is the median over the rounds
of a step's time over that of LoRA in the same round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jlora
from experiments.bench import step
from jlora.quant.formats import NF4, look_up
from jlora.quant.quantised import decode_halves, decode_repeated

BASES = ("", "nf4", "int8")  # "" is the base as it is
VARIANT = step.Variant("train_step", "lora", 16)


# -- steps -------------------------------------------------------------------------------------------------------------


def steps(preset: step.Preset, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """A LoRA step on each base: milliseconds, ratio to LoRA's, FLOPs, temporaries, bytes of arguments."""
    loss, params, tokens = step.model_of(preset, dtype)
    sites = jlora.sites(loss, params, tokens)
    bases = [jlora.quantize(params, name, sites=sites, targets="kernel$") if name else params for name in BASES]
    programs = [step.build(VARIANT, loss, base, tokens) for base in bases]
    for program in programs:
        program.advance()
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for program, own in zip(programs, seconds, strict=True):
            start = time.perf_counter()
            program.advance()
            own.append(time.perf_counter() - start)
    costs = [step.compiled_cost(program.compiled) for program in programs]
    return [
        {
            "base": name or dtype,
            "milliseconds": 1e3 * statistics.median(own) if own else None,
            "over_lora": statistics.median(x / y for x, y in zip(own, seconds[0], strict=True)) if own else None,
            "gflops": cost.flops / 1e9,
            "flops_over_lora": cost.flops / costs[0].flops,
            "temporary_mb": cost.temporary / 1e6,
            "argument_mb": cost.arguments / 1e6,
        }
        for name, own, cost in zip(BASES, seconds, costs, strict=True)
    ]


# -- decoding ----------------------------------------------------------------------------------------------------------


class Number:
    """A format's decoding alone."""

    def __init__(self, decode: Callable[[jax.Array], jax.Array]) -> None:
        self.decode = decode


def _gathered(codes: jax.Array) -> jax.Array:
    return jnp.asarray(NF4, jnp.float32).at[codes].get(mode="promise_in_bounds")


def _compared(codes: jax.Array) -> jax.Array:
    out = (codes & 0).astype(jnp.float32) + NF4[0]
    for code, value in enumerate(NF4[1:], 1):
        out = jnp.where(codes >= code, jnp.float32(value), out)
    return out


def _masked(codes: jax.Array) -> jax.Array:
    """The bits of the numbers, by masks of the bits of the codes."""
    masks = [-((codes.astype(jnp.int32) >> bit) & 1) for bit in range(4)]
    table = np.asarray(NF4, np.float32).view(np.int32)
    values: list[Any] = [np.int32(low) ^ (masks[0] & np.int32(low ^ high)) for low, high in table.reshape(8, 2)]
    for mask in masks[1:]:
        values = [low ^ (mask & (low ^ high)) for low, high in zip(values[::2], values[1::2], strict=True)]
    return lax.bitcast_convert_type(values[0], jnp.float32)


def _interleaved(number: Number, codes: jax.Array) -> jax.Array:
    """Codes interleaved, then decoded."""
    return number.decode(jnp.stack([codes >> 4, codes & 15], axis=-1)).reshape(*codes.shape[:-1], -1)


def _pairs(number: Number, codes: jax.Array) -> jax.Array:
    """A table of 256 pairs, looked up by the byte."""
    byte = np.arange(256)
    table = np.asarray(NF4, np.float32)[np.stack([byte >> 4, byte & 15], -1)]
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds").reshape(*codes.shape[:-1], -1)


TABLES = {
    "selected": lambda codes: look_up(codes, NF4),
    "compared": _compared,
    "masked": _masked,
    "gathered": _gathered,
}
UNPACKED = {"halves": decode_halves, "repeated": decode_repeated, "interleaved": _interleaved}


def decoding(rows: int, columns: int, rounds: int) -> list[dict[str, Any]]:
    """Nanoseconds a weight of every way, in turn: the least of the rounds; bytes of temporaries a weight."""
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 256, (rows, columns // 2)), jnp.uint8)
    scales = jnp.asarray(rng.uniform(size=(rows, columns // 64)), jnp.float32)
    ways = {f"{t}, {u}": (Number(TABLES[t]), UNPACKED[u]) for t in TABLES for u in UNPACKED}
    ways["pairs"] = (Number(_gathered), _pairs)
    results = []
    for dtype in ("float32", "bfloat16"):

        def weights(codes: jax.Array, scales: jax.Array, number: Any, unpack: Any, dtype: str = dtype) -> jax.Array:
            values = unpack(number, codes).reshape(rows, columns // 64, 64) * scales[..., None]
            return values.reshape(rows, columns).astype(dtype)

        compiled = {
            name: jax.jit(weights, static_argnums=(2, 3)).lower(codes, scales, *way).compile()
            for name, way in ways.items()
        }
        first, *others = [np.asarray(run(codes, scales)) for run in compiled.values()]
        assert all((first == other).all() for other in others), "the ways differ"
        least = dict.fromkeys(compiled, float("inf"))
        for _ in range(rounds):
            for name, run in compiled.items():
                start = time.perf_counter()
                run(codes, scales).block_until_ready()
                least[name] = min(least[name], time.perf_counter() - start)
        results += [
            {
                "dtype": dtype,
                "way": name,
                "ns_per_weight": 1e9 * least[name] / (rows * columns),
                "temporary_bytes_per_weight": step.compiled_cost(run).temporary / (rows * columns),
            }
            for name, run in compiled.items()
        ]
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Rows of numbers as a Markdown table."""
    names = list(results[0])
    show = lambda x: f"{x:.3f}" if isinstance(x, float) else str(x)
    lines = [names, ["---"] * len(names), *([show(row[name]) for name in names] for row in results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints the table, writes it beside the JSON."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        "python -m experiments.bench.quant", None, summary, rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--preset", choices=step.SIZES, default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--rounds", type=int, default=14)
    p.add_argument("--decode", action="store_true", help="ways of decoding in place of steps")
    p.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for quant.json and quant.md")
    options = p.parse_args(arguments)
    if options.decode:
        results = decoding(2048, 512, options.rounds)
    else:
        results = steps(step.SIZES[options.preset], options.dtype, options.rounds)
    shown, here = table(results), step.machine()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quant.json").write_text(json.dumps({"machine": here, "results": results}, indent=2) + "\n")
    caption = ", ".join(f"{key} {value}" for key, value in here.items())
    (options.out / "quant.md").write_text(f"{shown}\n\n{caption}\n")
    print(f"{shown}\n\n{caption}")
    return results


if __name__ == "__main__":
    main()
