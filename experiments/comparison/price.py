"""What contenders cost beside each other: parameters, bytes, a training step, a forward pass apart and merged."""

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora
from experiments.comparison.trial import Bench, Entry
from experiments.folder import read_json, size, write_json
from experiments.measure import compiled_cost, interleaved, ratio, step_seconds
from experiments.tasks import rows


@dataclass(frozen=True)
class Price:
    """What a contender costs on a task.

    Attributes:
      trainable, total: parameters.
      adapter_bytes: all files that `jlora.save` wrote.
      optimizer_bytes: of the optimizer's state.
      flops, temporary_bytes: of a training step, by XLA's count.
      milliseconds: of a training step, the median.
      relative_time: to each of the contenders named in `relative_to`, the median over rounds.
      forward: milliseconds of a forward pass with the factors apart, the median.
      apart, merged: that and the merged model's, to the base's forward pass; `merged` is None where merging is refused.
    """

    trainable: int
    total: int
    adapter_bytes: int
    optimizer_bytes: int
    flops: float
    temporary_bytes: int
    milliseconds: float
    relative_time: dict[str, float]
    forward: float
    apart: float
    merged: float | None


def prices(bench: Bench, trained: Mapping[str, tuple[Entry, jlora.Adapted]], folder: Path) -> dict[str, Price]:
    """Measures all contenders of a task, or reads what an earlier start measured.

    Args:
      bench: the task.
      trained: the contenders by name, each with what it trained.
      folder: of the task, with a folder of each contender's name in it; `prices.json` is kept there.
    """
    path = folder / "prices.json"
    if path.exists():
        return read_json(path, lambda read: {name: Price(**price) for name, price in read.items()})
    comparison = bench.comparison
    states = {name: entry.state(adapted, 0.0, 0) for name, (entry, adapted) in trained.items()}
    batch = bench.task.batches("new", bench.spec.train.batch, 0)(0)
    steps = {name: (entry.step, states[name]) for name, (entry, _) in trained.items()}
    seconds = step_seconds(steps, batch, comparison.rounds)
    forward = _forward_seconds(bench, trained)
    base = forward["base", True]
    measured = {}
    for name, (entry, adapted) in trained.items():
        flops, temporary = compiled_cost(entry.step, states[name], batch)
        count = jlora.count(adapted)
        measured[name] = Price(
            trainable=count.trainable,
            total=count.total,
            adapter_bytes=size(folder / name / "adapter"),
            optimizer_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(states[name].opt_state)),
            flops=flops,
            temporary_bytes=temporary,
            milliseconds=1e3 * statistics.median(seconds[name]),
            relative_time={other: ratio(seconds[name], seconds[other]) for other in comparison.relative_to},
            forward=1e3 * statistics.median(forward[name, False]),
            apart=ratio(forward[name, False], base),
            merged=ratio(forward[name, True], base) if (name, True) in forward else None,
        )
    write_json(path, {name: dataclasses.asdict(price) for name, price in measured.items()})
    return measured


def _forward_seconds(
    bench: Bench, trained: Mapping[str, tuple[Entry, jlora.Adapted]]
) -> dict[tuple[str, bool], list[float]]:
    """Times of forward passes by (contender, merged), those of the base among them.

    The programs take leaves, not an `Adapted`: to take a tree apart costs time in Python that is not the method's.
    """
    comparison, task = bench.comparison, bench.task
    batch = jax.device_put(rows(task.held_out("new", "test"), np.arange(comparison.inference_batch)))
    calls: dict[tuple[str, bool], Any] = {}

    def add(name: str, merged: bool, params: Any, program: Any) -> None:
        leaves = jax.tree.leaves(params)
        calls[name, merged] = lambda: program(leaves, batch)

    plain = _of_leaves(task.forward, bench.base)
    add("base", True, bench.base, plain)
    for name, (entry, adapted) in trained.items():
        add(name, False, adapted, _of_leaves(jlora.lift(task.forward), adapted))
        if entry.merges:
            add(name, True, entry.merged(adapted), plain)
    return interleaved(calls, comparison.inference_rounds)


def _of_leaves(forward: Any, like: Any) -> Any:
    structure = jax.tree.structure(like)
    return jax.jit(lambda leaves, batch: forward(jax.tree.unflatten(structure, leaves), batch))
