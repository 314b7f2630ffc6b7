"""Host time of a call of a compiled step: jlora's own part of `step(state, batch)`, and the call of the program.

    python -m experiments.bench.host                       # 150, 600 and 2,400 factors
    python -m experiments.bench.host --weights 300         # 600

jlora's own part (flattening, checks, where arrays lie, the new state) is that of a step whose program returns at once
what it returned before. The model is a chain of tiny matrices. Times are those of the calling thread on the CPU
(`time.thread_time`), so that what else the machine does is not in them: the least over the rounds.

Idle is what a step takes longer, by the clock, in a loop that waits for each loss before it starts the next step, the
median over the rounds of a difference of two loops that are run in turn: so long the device has nothing to do there. A
step of jlora looks at the loss of the step before the last, and leaves no such gap.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora

PyTree = Any
WIDTH = 4
STEPS = 10  # of a loop that is timed
WORK = 768  # rows of the matrix whose products keep the device busy for longer than the host takes


class Result(NamedTuple):
    """Milliseconds of one call on the host, of a state with so many factors: jlora's own, and the program's; and of the
    device's idleness where a loop waits for each loss.
    """

    factors: int
    own: float
    program: float
    idle: float


def measure(weights: int, rounds: int) -> Result:
    """A state with two factors for each weight."""
    params = {f"layer_{i}": {"kernel": jnp.eye(WIDTH)} for i in range(weights)}

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        for layer in params.values():
            x = x @ layer["kernel"]
        return jnp.mean(x)

    def busy(params: PyTree, x: jax.Array) -> jax.Array:
        other = jax.lax.fori_loop(0, 4, lambda _, y: jnp.tanh(y @ y), jnp.full((WORK, WORK), x[0, 0] / WORK))
        return loss(params, x) + 0 * jnp.mean(jax.lax.stop_gradient(other))

    step = jlora.train_step(loss, optax.sgd(1e-3), donate=False)
    state, batch = jlora.TrainState.create(jlora.apply(params, rank=1), step.tx), jnp.ones((1, WIDTH))
    idle = _idle(jlora.train_step(busy, optax.sgd(1e-3), donate=False), state, batch, max(rounds // 5, 3))
    state, _ = step(state, batch)
    arguments = step.arguments(state, batch)
    program = step.compiled(arguments)
    made = jax.block_until_ready(program(*arguments))
    own = dataclasses.replace(step, compiled=lambda arguments: lambda *args: made)
    on_host = _least(lambda: own(state, batch), rounds)
    return Result(2 * weights, on_host, _least(lambda: program(*arguments), rounds), idle)


def _idle(step: jlora.train.Step, state: jlora.TrainState, batch: jax.Array, rounds: int) -> float:
    """Difference of two loops, in milliseconds a step."""

    def loop(state: jlora.TrainState, waits: bool) -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            state, _ = step(state, batch)
            if waits:
                state.check()
        state.check()
        return 1e3 * (time.perf_counter() - start) / STEPS

    loop(state, waits=False)  # compiles
    return statistics.median(loop(state, waits=True) - loop(state, waits=False) for _ in range(rounds))


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
    rows = [f"| {r.factors:,} | {r.own:.2f} | {r.program:.2f} | {r.idle:.2f} |" for r in results]
    head = "| factors | jlora's own, ms | the program's call, ms | idle if each loss is waited for, ms |"
    return "\n".join([head, "|---|---|---|---|", *rows])


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
