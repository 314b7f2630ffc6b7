"""What a training step costs: FLOPs and memory from the compiler, time from a clock."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from jlora.state import TrainState
from jlora.train import Step

Batch = Any
Key = TypeVar("Key")


@dataclass(frozen=True)
class Cost:
    """What one training step costs.

    Attributes:
      flops: as XLA counts them in the compiled program.
      temporary_bytes: the most that XLA holds beside arguments and results.
      optimizer_bytes: of the optimizer's state.
      milliseconds: median over the rounds.
      relative_time: median over the rounds of the time divided by the reference run's in the same round.
    """

    flops: float
    temporary_bytes: int
    optimizer_bytes: int
    milliseconds: float
    relative_time: float


def costs(
    programs: Mapping[str, tuple[Step, TrainState]], batch: Batch, *, reference: str, rounds: int
) -> dict[str, Cost]:
    """Measures the runs' training steps side by side: in each round every one takes a step, in turn.

    So a machine that is busy for a while slows all of them, and the ratio stays. The states are copied, not trained on.
    """
    seconds = step_seconds(programs, batch, rounds)
    measured = {}
    for name, (step, state) in programs.items():
        flops, temporary = compiled_cost(step, state, batch)
        measured[name] = Cost(
            flops=flops,
            temporary_bytes=temporary,
            optimizer_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
            milliseconds=1e3 * statistics.median(seconds[name]),
            relative_time=ratio(seconds[name], seconds[reference]),
        )
    return measured


def compiled_cost(step: Step, state: TrainState, batch: Batch) -> tuple[float, int]:
    """FLOPs and temporary bytes of a training step. One that has run is not compiled again for it."""
    compiled: Any = step.lower(state, batch).compile()
    return float(compiled.cost_analysis()["flops"]), int(compiled.memory_analysis().temp_size_in_bytes)


def step_seconds(programs: Mapping[str, tuple[Step, TrainState]], batch: Batch, rounds: int) -> dict[str, list[float]]:
    """The times of the training steps, taken in turn."""
    states = {name: TrainState.create(state.adapted, step.tx) for name, (step, state) in programs.items()}

    def call(name: str) -> Callable[[], Any]:
        def one_step() -> Any:
            states[name], _ = programs[name][0](states[name], batch)
            return states[name]

        return one_step

    return interleaved({name: call(name) for name in programs}, rounds)


def interleaved(calls: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, list[float]]:
    """The times of several computations, in seconds, each called once per round, in turn."""
    seconds: dict[Key, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i >= 2:  # the first two compile and warm up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """The median over the rounds of the time divided by the reference's in the same round."""
    return statistics.median(mine / its for mine, its in zip(seconds, reference, strict=True))
