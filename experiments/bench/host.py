"""Host time of a call of a compiled step: jlora's own part of `step(state, batch)`, and the call of the program.

    python -m experiments.bench.host                       # 150, 600 and 2,400 factors
    python -m experiments.bench.host --weights 300         # 600

jlora's own part (flattening, checks, where arrays lie, the new state) is that of a step whose program returns at once
what it returned before. The model is a chain of tiny matrices. Times are those of the calling thread on the CPU
(`time.thread_time`), so that what else the machine does is not in them: the least over the rounds.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora

PyTree = Any
WIDTH = 4


class Result(NamedTuple):
    """Milliseconds of one call on the host, of a state with so many factors: jlora's own, and the program's."""

    factors: int
    own: float
    program: float


def measure(weights: int, rounds: int) -> Result:
    """A state with two factors for each weight."""
    params = {f"layer_{i}": {"kernel": jnp.eye(WIDTH)} for i in range(weights)}

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        for layer in params.values():
            x = x @ layer["kernel"]
        return jnp.mean(x)

    step = jlora.train_step(loss, optax.sgd(1e-3), donate=False)
    state, batch = jlora.TrainState.create(jlora.apply(params, rank=1), step.tx), jnp.ones((1, WIDTH))
    state, _ = step(state, batch)
    arguments = step.arguments(state, batch)
    program = step.compiled(arguments)
    made = jax.block_until_ready(program(*arguments))
    own = dataclasses.replace(step, compiled=lambda arguments: lambda *args: made)
    return Result(2 * weights, _least(lambda: own(state, batch), rounds), _least(lambda: program(*arguments), rounds))


def _least(call: Callable[[], Any], rounds: int) -> float:
    milliseconds = []
    for _ in range(rounds):
        start = time.thread_time()
        result = call()
        milliseconds.append(1e3 * (time.thread_time() - start))
        jax.block_until_ready(result)
    return min(milliseconds)


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    rows = [f"| {r.factors:,} | {r.own:.2f} | {r.program:.2f} |" for r in results]
    return "\n".join(["| factors | jlora's own, ms | the program's call, ms |", "|---|---|---|", *rows])


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser("python -m experiments.bench.host", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--weights", nargs="+", type=int, default=[75, 300, 1200], help="adapted weights, two factors each"
    )
    parser.add_argument("--rounds", type=int, default=50, help="timed calls of each")
    options = parser.parse_args(arguments)
    results = [measure(weights, options.rounds) for weights in options.weights]
    print(table(results))
    return results


if __name__ == "__main__":
    main()
