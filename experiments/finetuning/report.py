"""What a fine-tuning experiment says: its first lines, and the tables at its end."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

import jlora
from experiments.finetuning.config import Finetune
from experiments.finetuning.loop import Result, Trainer
from experiments.finetuning.work import Work
from experiments.measure import Cost
from experiments.report import in_bytes, markdown_table
from jlora.state import TrainState

Cells = list[list[str]]
"""A table as text, its header first."""


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before its first step.

    Attributes:
      label: of the run.
      sites: adapted weights.
      count: parameters.
      factor_bytes, optimizer_bytes: of what is trained, and of the optimizer's state for it.
      temporary_bytes: the most that the compiled step holds beside its arguments and results.
      flops: of the compiled step.
    """

    label: str
    sites: int
    count: jlora.Count
    factor_bytes: int
    optimizer_bytes: int
    temporary_bytes: int
    flops: float


def planned(trainer: Trainer, state: TrainState) -> Plan:
    """Compiles the training step and says what it will cost."""
    batch = trainer.work.batches(trainer.schedule.batch, 0)(0)
    compiled: Any = trainer.step.lower(state, batch).compile()
    nbytes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    return Plan(
        label=trainer.run.label,
        sites=len(state.adapted.sites),
        count=jlora.count(state.adapted),
        factor_bytes=nbytes(state.adapted.factors),
        optimizer_bytes=nbytes(state.opt_state),
        temporary_bytes=int(compiled.memory_analysis().temp_size_in_bytes),
        flops=float(compiled.cost_analysis()["flops"]),
    )


def opening(experiment: Finetune, work: Work, params: Any, plans: Sequence[Plan], steps: int) -> list[str]:
    """The first lines: data, model, schedule, and what each run trains and needs."""
    leaves = jax.tree.leaves(params)
    total, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    dtypes = "/".join(sorted({str(leaf.dtype) for leaf in leaves}))
    width = max(len(plan.label) for plan in plans)
    train = experiment.train
    dropout = getattr(getattr(work.model, "config", None), "dropout", 0.0)
    return [
        f"{experiment.name}: {experiment.task.label}",
        f"data      {work.examples:,} training rows; {work.held_out}",
        f"model     {type(work.model).__name__}, {total:,} parameters, {dtypes}, {in_bytes(size)}",
        f"schedule  {steps:,} steps of {train.batch} rows"
        + (f" ({train.length})" if isinstance(train.length, str) else "")
        + f", {len(experiment.seeds)} seed{'s' if len(experiment.seeds) > 1 else ''} a run, "
        f"dropout {dropout:g} in the model",
        *(
            f"{plan.label.ljust(width)}  {plan.sites} weights; trains {plan.count.trainable:,} parameters "
            f"({100 * plan.count.trainable / plan.count.total:.2f} %); beside the model {in_bytes(plan.factor_bytes)} "
            f"trained, {in_bytes(plan.optimizer_bytes)} optimizer, {in_bytes(plan.temporary_bytes)} activations"
            for plan in plans
        ),
    ]


def scores(work: Work, plans: Mapping[str, Plan], results: Mapping[str, Sequence[Result]]) -> Cells:
    """The table of what each run reached: scores on the test split, mean ± sample deviation over the seeds."""
    first = work.shows.name
    names = [first, *(name for name in next(iter(results.values()))[0].test if name != first)]
    rows = [
        [plans[run].label + _diverged(found), *(_spread([result.test[name] for result in found]) for name in names)]
        for run, found in results.items()
    ]
    return [["", *names], *rows]


def prices(plans: Mapping[str, Plan], results: Mapping[str, Sequence[Result]], costs: Mapping[str, Cost]) -> Cells:
    """The table of what each run costs; times are relative to the first run's that did not diverge."""
    head = ["", "trained", "optimizer", "activations", "tokens/s", *(["time of a step"] if costs else [])]
    table = [head]
    for run, found in results.items():
        plan, speed = plans[run], statistics.median(result.tokens_per_second for result in found)
        row = [plan.label, f"{plan.count.trainable:,}", in_bytes(plan.optimizer_bytes), in_bytes(plan.temporary_bytes)]
        table.append([*row, f"{speed:,.0f}", *([_relative(costs.get(run))] if costs else [])])
    return table


def _relative(cost: Cost | None) -> str:
    return "" if cost is None else f"{cost.relative_time:.2f}"


def as_markdown(tables: Sequence[Cells], title: str, notes: Sequence[str], pictures: Sequence[str]) -> str:
    """The tables, what they were measured on, and the plots."""
    lines = [f"# {title}", ""]
    for table in tables:
        lines += [*markdown_table(table), ""]
    lines += [f"- {note}" for note in notes] + [""]
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n".join(lines) + "\n"


def as_json(
    plans: Mapping[str, Plan], results: Mapping[str, Sequence[Result]], costs: Mapping[str, Cost]
) -> dict[str, Any]:
    """Every number, unrounded."""
    return {
        name: {
            "plan": dataclasses.asdict(plans[name]) | {"count": plans[name].count._asdict()},
            "cost": dataclasses.asdict(costs[name]) if name in costs else None,
            "results": [dataclasses.asdict(result) for result in found],
        }
        for name, found in results.items()
    }


def _diverged(found: Sequence[Result]) -> str:
    """What is said of runs whose result is what was best before they diverged."""
    count = sum(result.diverged is not None for result in found)
    return f" ({count} of {len(found)} diverged)" if count else ""


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    digits = 2 if abs(mean) < 1000 else 0
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"
