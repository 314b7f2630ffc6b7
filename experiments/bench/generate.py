"""Tokens per second of generation with a cache: the base, an adapter apart, and merged; greedy and with beams.

    python -m experiments.bench.generate
    python -m experiments.bench.generate --preset gpt2-medium --batch 8 --new-tokens 128 --beams 10

Weights are random, which costs what trained ones do. The forms take turns; each ratio is the median over the rounds of
the time to the base's in the same round. Merged weights run the very program of the base (tests/test_generate.py).
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from experiments.price import interleaved, ratio
from jlora import models
from jlora.models.gpt2 import GPT2, PRESETS

FORMS = ("base", "apart", "merged")


def forms(model: GPT2, rank: int, targets: str) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Function and parameters of each form of the model; the factors are not at their zero start."""
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    factors, rest = jlora.partition(jlora.apply(params, rank=rank, targets=targets))
    adapted = jlora.combine(jax.tree.map(lambda x: x + 0.01, factors), rest)
    lifted = jlora.lift(model.apply)
    return {"base": (model.apply, params), "apart": (lifted, adapted), "merged": (model.apply, jlora.merge(adapted))}


def measured(
    model: GPT2,
    made: dict[str, tuple[Callable[..., Any], Any]],
    *,
    batch: int,
    prompt: int,
    new: int,
    beams: int,
    rounds: int,
) -> dict[str, tuple[float, float]]:
    """Tokens per second of each form, and the time to the base's."""
    tokens = jax.random.randint(jax.random.key(1), (batch, prompt), 0, model.config.vocab_size)

    def call(form: str) -> Callable[[], Any]:
        apply, params = made[form]
        if beams > 1:
            return lambda: models.beam_search(model, params, tokens, beams=beams, new_tokens=new, apply=apply).tokens
        return lambda: models.generate(model, params, tokens, new_tokens=new, apply=apply)

    seconds = interleaved({form: call(form) for form in FORMS}, rounds)
    return {
        form: (batch * new / statistics.median(seconds[form]), ratio(seconds[form], seconds["base"])) for form in FORMS
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m experiments.bench.generate", description="Tokens per second.")
    parser.add_argument("--preset", default="gpt2", choices=sorted(PRESETS))
    parser.add_argument("--layers", type=int, help="fewer or more than the preset's")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4], help="1 is greedy")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="(attn|mlp)/")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    config = dataclasses.replace(PRESETS[options.preset], dtype=options.dtype, param_dtype=options.dtype)
    model = GPT2(config if options.layers is None else dataclasses.replace(config, layers=options.layers))
    made = forms(model, options.rank, options.targets)
    device = jax.devices()[0].device_kind
    print(f"{options.preset}: {options.prompt} tokens and {options.new_tokens} new; JAX {jax.__version__}, {device}\n")
    print("| batch | beams | " + " | ".join(f"{form}, tokens/s | to base" for form in FORMS) + " |")
    print("|---:|---:|" + "---:|---:|" * len(FORMS))
    for batch in options.batch:
        for beams in options.beams:
            found = measured(
                model, made, batch=batch, prompt=options.prompt, new=options.new_tokens, beams=beams,
                rounds=options.rounds,
            )  # fmt: skip
            cells = " | ".join(f"{found[form][0]:,.1f} | {found[form][1]:.2f}" for form in FORMS)
            print(f"| {batch} | {beams} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
