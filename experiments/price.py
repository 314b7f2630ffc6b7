"""Prices of runs beside each other: parameters, bytes, FLOPs, time of a step and of a forward pass, a file."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

import jlora
from experiments import devices, hosts
from experiments.config import Experiment
from experiments.folder import read_json, size, write_json
from experiments.resume import loaded
from experiments.tasks.task import Batch, Params
from experiments.trainer import Trainer
from experiments.trial import Trial
from jlora import host
from jlora.state import TrainState
from jlora.train import Step

Key = TypeVar("Key")


@dataclass(frozen=True)
class Plan:
    """Plan of a run, known before its first step.

    Attributes:
      sites: adapted weights.
      trainable, total: parameters.
      factor_bytes, optimizer_bytes: of what is trained, and of the optimizer's state for it.
      temporary_bytes: the most that the compiled step holds beside its arguments and results.
      flops: of the compiled step, as XLA counts them.
      base_bytes: of the base as the run holds it.
    """

    sites: int
    trainable: int
    total: int
    factor_bytes: int
    optimizer_bytes: int
    temporary_bytes: int
    flops: float
    base_bytes: int = 0

    @property
    def percent(self) -> float:
        """Trained parameters per hundred."""
        return 100 * self.trainable / self.total


@dataclass(frozen=True)
class Price:
    """Price of a run beside the others.

    Attributes:
      adapter_bytes: all files that `jlora.save` wrote.
      milliseconds: of a training step, the median over the rounds.
      relative_time: to each of the runs that times are divided by, the median over the rounds of the ratio in a round.
      difference: the largest between the outputs of the lifted and of the merged model; None where there is no merging.
      forward: milliseconds of a forward pass with the factors apart, the median; None where it was not timed.
      apart, merged: that and the merged model's, to the base's forward pass.
    """

    adapter_bytes: int
    milliseconds: float
    relative_time: dict[str, float]
    difference: float | None = None
    forward: float | None = None
    apart: float | None = None
    merged: float | None = None


def planned(trainer: Trainer, seed: int, params: Params) -> Plan:
    """Compiles the training step and says what it will cost."""
    state = trainer.start(seed, params)
    flops, temporary = compiled_cost(trainer.step, state, trainer.batches(0)(0))
    count = jlora.count(state.adapted)
    return Plan(
        sites=len(state.adapted.sites),
        trainable=count.trainable,
        total=count.total,
        factor_bytes=_bytes(state.adapted.factors),
        optimizer_bytes=_bytes(state.opt_state),
        temporary_bytes=temporary,
        flops=flops,
        base_bytes=_bytes(state.adapted.base),
    )


def priced(experiment: Experiment, trials: Sequence[Trial], params: Params, folder: Path) -> dict[str, Price]:
    """Measures the runs side by side, or reads what an earlier start measured.

    Args:
      experiment: how often, and relative to which runs.
      trials: those that came to an end.
      params: the base, with the first seed's head.
      folder: of the experiment; `prices.json` is kept there.
    """
    measure, path = experiment.measure, folder / "prices.json"
    if not measure.rounds or not trials:
        return {}
    there = hosts.by_first(lambda: _read(path))
    if there is not None:
        return {name: Price(**price) for name, price in there.items()}
    trained = {trial.run.name: (trial, loaded(trial.place, trial.held(params))) for trial in trials}
    batch, whole = trials[0].trainer.batches(0)(0), trials[0].trainer.whole_batches(0)(0)
    kind = experiment.train.memory_kind
    states = {
        name: TrainState.create(adapted, trial.trainer.step.tx, memory_kind=kind)
        for name, (trial, adapted) in trained.items()
    }
    steps = {name: (trial.trainer.step, states[name]) for name, (trial, _) in trained.items()}
    seconds = step_seconds(steps, batch, measure.rounds)
    few = devices.current().put(jax.tree.map(lambda array: array[: measure.forward_batch], whole))
    forward = _forward_seconds(trained, params, few, measure.forward_rounds) if measure.forward_rounds else {}
    references = [name for name in measure.relative_to or (trials[0].run.name,) if name in trained]
    found = {}
    for name, (trial, adapted) in trained.items():
        passes = {merged: forward[name, merged] for merged in (False, True) if (name, merged) in forward}
        found[name] = Price(
            adapter_bytes=size(trial.place / "adapter"),
            milliseconds=1e3 * statistics.median(seconds[name]),
            relative_time={other: ratio(seconds[name], seconds[other]) for other in references},
            difference=_difference(trial.trainer, adapted, few),
            forward=1e3 * statistics.median(passes[False]) if passes else None,
            apart=ratio(passes[False], forward["", True]) if passes else None,
            merged=ratio(passes[True], forward["", True]) if True in passes else None,
        )
    write_json(path, {name: dataclasses.asdict(price) for name, price in found.items()})
    return found


def _read(path: Path) -> dict[str, dict[str, Any]] | None:
    """The prices of an earlier start."""
    if not path.exists():
        return None
    return read_json(path, lambda read: {name: dataclasses.asdict(Price(**price)) for name, price in read.items()})


def _difference(trainer: Trainer, adapted: jlora.Adapted, batch: Batch) -> float | None:
    """The largest absolute difference between the outputs of the lifted and of the merged model."""
    if not trainer.merges:
        return None
    opened = trainer.opened
    lifted = jax.jit(lambda adapted, batch: opened.outputs(jlora.lift(opened.model.apply), adapted, batch))
    plain = jax.jit(lambda params, batch: opened.outputs(opened.model.apply, params, batch))
    return float(jnp.abs(lifted(adapted, batch) - plain(trainer.merged(adapted), batch)).max())


def _forward_seconds(
    trained: Mapping[str, tuple[Trial, jlora.Adapted]], base: Params, batch: Batch, rounds: int
) -> dict[tuple[str, bool], list[float]]:
    """Times of forward passes by (run, merged), the base's under ("", True).

    The programs take leaves, not an `Adapted`: to take a tree apart costs time in Python that is not the method's.
    """
    calls: dict[tuple[str, bool], Any] = {}
    opened = next(iter(trained.values()))[0].trainer.opened

    def program(apply: Any, like: Any) -> Any:
        structure = jax.tree.structure(like)
        return jax.jit(lambda leaves, batch: opened.outputs(apply, jax.tree.unflatten(structure, leaves), batch))

    def add(name: str, merged: bool, params: Any, program: Any) -> None:
        leaves = jax.tree.leaves(params)
        calls[name, merged] = lambda: program(leaves, batch)

    plain = program(next(iter(trained.values()))[0].trainer.shared.apply, base)
    add("", True, base, plain)
    for name, (trial, adapted) in trained.items():
        add(name, False, adapted, program(jlora.lift(opened.model.apply), adapted))
        if trial.trainer.merges:
            add(name, True, trial.trainer.merged(adapted), plain)
    return interleaved(calls, rounds)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def compiled_cost(step: Step, state: TrainState, batch: Batch) -> tuple[float, int]:
    """FLOPs and temporary bytes of a training step. One that has run is not compiled again for it."""
    compiled: Any = step.lower(state, batch).compile()
    return float(compiled.cost_analysis()["flops"]), int(compiled.memory_analysis().temp_size_in_bytes)


def step_seconds(programs: Mapping[str, tuple[Step, TrainState]], batch: Batch, rounds: int) -> dict[str, list[float]]:
    """The times of the training steps, taken in turn."""
    states = {
        name: TrainState.create(state.adapted, step.tx, memory_kind=host.kind_of(state.opt_state))
        for name, (step, state) in programs.items()
    }

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
