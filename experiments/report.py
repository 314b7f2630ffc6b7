"""The table at the end of an experiment: on the terminal, as Markdown and as JSON."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import jlora
from experiments.config import Run
from experiments.evaluate import Point, Scores
from experiments.measure import Cost


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
      run: its config.
      curve: on the validation split.
      scores: on the test split, after the last step.
      count: parameters.
      cost: of its training step.
      adapter_bytes: all files that `jlora.save` wrote.
      difference: the largest between the logits of the lifted and of the merged model.
    """

    run: Run
    curve: tuple[Point, ...]
    scores: Scores
    count: jlora.Count
    cost: Cost
    adapter_bytes: int
    difference: float


@dataclass(frozen=True)
class Base:
    """What the runs started from: scores on the test split, number of parameters, bytes of its checkpoint."""

    scores: Scores
    curve: tuple[Point, ...]
    parameters: int
    checkpoint_bytes: int


@dataclass(frozen=True)
class Results:
    """What an experiment came to.

    Attributes:
      new, old: the names of the domains.
      base: what all runs started from.
      outcomes: of the runs, in their order.
      reference: label of the run that the others' times are relative to.
    """

    new: str
    old: str
    base: Base
    outcomes: tuple[Outcome, ...]
    reference: str


Row = tuple[str, str, Callable[[Outcome], str]]


def rows(results: Results) -> list[Row]:
    """Name, value of the base and value of a run."""
    base, full = results.base, in_bytes(results.base.checkpoint_bytes)
    return [
        (f"bits/byte on {results.new} (new)", f"{base.scores.new:.3f}", lambda o: f"{o.scores.new:.3f}"),
        (f"bits/byte on {results.old} (old)", f"{base.scores.old:.3f}", lambda o: f"{o.scores.old:.3f}"),
        ("  learned (new: base - run)", "", lambda o: f"{base.scores.new - o.scores.new:.3f}"),
        ("  forgotten (old: run - base)", "", lambda o: f"{o.scores.old - base.scores.old:.3f}"),
        ("learning rate", "", lambda o: f"{o.run.learning_rate:g}"),
        ("trainable parameters", "", lambda o: f"{o.count.trainable:,}"),
        ("  percent of all", "", lambda o: f"{o.count.percent:.3g} %"),
        ("optimizer state", "", lambda o: in_bytes(o.cost.optimizer_bytes)),
        ("peak temporary memory, step", "", lambda o: in_bytes(o.cost.temporary_bytes)),
        ("FLOPs, step", "", lambda o: f"{o.cost.flops / 1e9:.2f} G"),
        ("time, step", "", lambda o: f"{o.cost.milliseconds:.0f} ms"),
        (f"  to {results.reference}", "", lambda o: f"{o.cost.relative_time:.2f}"),
        ("files (base: full checkpoint)", full, lambda o: in_bytes(o.adapter_bytes)),
        ("  to the full checkpoint", "", lambda o: f"{o.adapter_bytes / base.checkpoint_bytes:.3g}"),
        ("max |lifted - merged| logit", "", lambda o: f"{o.difference:.1e}"),
    ]


def cells(results: Results) -> list[list[str]]:
    """The table as text, a header first."""
    header = ["test split", "base", *(outcome.run.label for outcome in results.outcomes)]
    return [header] + [[name, of_base, *map(of_run, results.outcomes)] for name, of_base, of_run in rows(results)]


def best_rates(curves: Sequence[tuple[Run, Sequence[Point]]]) -> dict[str, float]:
    """For each label the learning rate whose run ends with the fewest bits per byte on the new domain (validation)."""
    best: dict[str, tuple[float, float]] = {}
    for run, curve in curves:
        best[run.label] = min((curve[-1].new, run.learning_rate), best.get(run.label, (float("inf"), 0.0)))
    return {label: rate for label, (_, rate) in best.items()}


def sweep_cells(curves: Sequence[tuple[Run, Sequence[Point]]]) -> list[list[str]]:
    """The ends of all runs by label and learning rate; a best one at the edge of the grid is said to be there."""
    ends = {(run.label, run.learning_rate): curve[-1].new for run, curve in curves}
    rates = sorted({rate for _, rate in ends})
    table = [["learning rate", *(f"{rate:g}" for rate in rates), "best"]]
    for label, best in best_rates(curves).items():
        edge = " (edge of the grid: widen it)" if best in (rates[0], rates[-1]) else ""
        values = [f"{ends[label, rate]:.4f}" + (" *" if rate == best else "") for rate in rates]
        table.append([label, *values, f"{best:g}{edge}"])
    return table


def rich_table(table: Sequence[Sequence[str]], title: str) -> Table:
    """For the terminal."""
    header, *body = table
    out = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    for i, name in enumerate(header):
        out.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for row in body:
        out.add_row(*row)
    return out


def markdown(table: Sequence[Sequence[str]], title: str, notes: Sequence[str], pictures: Sequence[str]) -> str:
    """The same table, what it was measured on, and the plots."""
    lines = [f"# {title}", "", *markdown_table(table), ""]
    lines += [f"- {note}" for note in notes] + [""]
    lines += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures]
    return "\n".join(lines) + "\n"


def markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose first row is the header."""
    header, *body = table
    return [_line(header), _line(["---", *("---:" for _ in header[1:])]), *map(_line, body)]


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |"


def as_json(results: Results) -> dict[str, Any]:
    """Every number, unrounded."""
    base, runs = results.base, []
    for outcome in results.outcomes:
        run = outcome.run
        runs.append(
            {
                "name": run.name,
                "label": run.label,
                "rank": run.rank,
                "learning_rate": run.learning_rate,
                "bits_per_byte": dataclasses.asdict(outcome.scores),
                "learned": base.scores.new - outcome.scores.new,
                "forgotten": outcome.scores.old - base.scores.old,
                "trainable_parameters": outcome.count.trainable,
                "trainable_percent": outcome.count.percent,
                "step": dataclasses.asdict(outcome.cost),
                "adapter_bytes": outcome.adapter_bytes,
                "adapter_fraction": outcome.adapter_bytes / base.checkpoint_bytes,
                "largest_lifted_merged_difference": outcome.difference,
                "curve": [dataclasses.asdict(point) for point in outcome.curve],
            }
        )
    return {
        "domains": {"new": results.new, "old": results.old},
        "reference": results.reference,
        "base": {
            "bits_per_byte": dataclasses.asdict(base.scores),
            "parameters": base.parameters,
            "checkpoint_bytes": base.checkpoint_bytes,
            "curve": [dataclasses.asdict(point) for point in base.curve],
        },
        "runs": runs,
    }


def in_bytes(count: float) -> str:
    """Bytes for people, in powers of 1000.

    >>> in_bytes(512), in_bytes(3_400_000)
    ('512 B', '3.4 MB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} GB"
