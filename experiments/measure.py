"""What a training step costs: FLOPs and memory from the compiler, time from a clock."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jlora.train import Step, TrainState


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
    programs: Mapping[str, tuple[Step, TrainState]], batch: np.ndarray, *, reference: str, rounds: int
) -> dict[str, Cost]:
    """Measures the runs' training steps side by side: in each round every one takes a step, in turn.

    So a machine that is busy for a while slows all of them, and the ratio stays. The states are copied, not trained on.
    """
    seconds = _step_seconds(programs, batch, rounds)
    measured = {}
    for name, (step, state) in programs.items():
        compiled: Any = step.lower(state, batch).compile()
        ratios = [mine / its for mine, its in zip(seconds[name], seconds[reference], strict=True)]
        measured[name] = Cost(
            flops=float(compiled.cost_analysis()["flops"]),
            temporary_bytes=int(compiled.memory_analysis().temp_size_in_bytes),
            optimizer_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
            milliseconds=1e3 * statistics.median(seconds[name]),
            relative_time=statistics.median(ratios),
        )
    return measured


def _step_seconds(
    programs: Mapping[str, tuple[Step, TrainState]], batch: np.ndarray, rounds: int
) -> dict[str, list[float]]:
    states = {name: TrainState.create(state.adapted, step.tx) for name, (step, state) in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(rounds + 2):
        for name, (step, _) in programs.items():
            start = time.perf_counter()
            states[name], _ = step(states[name], batch)
            jax.block_until_ready(states[name])
            if i >= 2:  # the first two compile and warm up
                seconds[name].append(time.perf_counter() - start)
    return seconds
