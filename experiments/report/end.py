"""The end of an experiment: results.json, results.md and the plots."""

import os
import platform
from pathlib import Path

import jax
from rich.console import Console

from experiments import hosts
from experiments.config import Experiment
from experiments.configfile import describe
from experiments.folder import write_json, write_text
from experiments.report import plots
from experiments.report.results import Results, as_json
from experiments.report.tables import markdown, rich_table, tables
from experiments.tasks.task import Opened


def write(
    experiment: Experiment, results: Results, opened: Opened, folder: Path, seconds: float, console: Console
) -> None:
    """Writes the files into the folder and shows the tables."""
    setting = {
        "config": describe(experiment),
        "data": opened.digest,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "seconds": seconds,
    }
    write_json(folder / "results.json", as_json(results) | setting)
    title, found, pictures = plots.title_of(results), tables(results), plots.names(results)
    write_text(folder / "results.md", markdown(found, title, _notes(experiment, results, opened, seconds), pictures))
    if hosts.is_first():
        plots.draw(folder, results)  # the numbers lie on disk by now
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    for table in found:
        console.print(rich_table(table, ""))
    minutes, rest = divmod(round(seconds), 60)
    names = ", ".join(["results.md", "results.json", *pictures])
    console.print(f"{minutes}:{rest:02d} minutes; {names} are in {folder}", highlight=False, soft_wrap=True)


def _notes(experiment: Experiment, results: Results, opened: Opened, seconds: float) -> list[str]:
    train, measure = experiment.train, experiment.measure
    notes = [
        f"{results.start.parameters:,} parameters; {opened.new.examples:,} training rows; {opened.held_out}",
        f"{train.steps} steps of {train.batch} rows"
        if isinstance(train.steps, int)
        else f"{train.steps}, steps of {train.batch} rows",
        f"seeds {', '.join(map(str, experiment.seeds))}"
        + ("; mean ± sample standard deviation" if len(experiment.seeds) > 1 else ""),
    ]
    if any(outcome.sweep for outcome in results.outcomes):
        edges = [outcome.label for outcome in results.outcomes if outcome.at_edge]
        notes += [
            f"learning rates chosen on the validation split with seed {experiment.seed}",
            f"the best rate lies at the edge of the grid: {', '.join(edges) or 'for none'}",
        ]
    if measure.forward_rounds:
        notes.append(
            f"times are medians of {measure.rounds} rounds (steps, whose programs take turns) and "
            f"{measure.forward_rounds} (forward passes of {measure.forward_batch} examples)"
        )
    return [
        *notes,
        f"Python {platform.python_version()}, JAX {jax.__version__}, {os.cpu_count()} CPUs, "
        f"{jax.devices()[0].device_kind}; this start took {seconds:.0f} s",
    ]
