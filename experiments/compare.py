"""Compares methods on tasks: each is given its best learning rate and several seeds, and all are timed side by side.

    python -m experiments.compare configs/compare_methods.py
    python -m experiments.compare configs/compare_methods.py --small
    python -m experiments.compare configs/compare_methods.py --resume

The folder of a run is `runs/<name>`, with a folder per task and contender in it. A contender that came to its end is
not run again by `--resume`. Bases lie in `runs/bases` and are used again by every comparison with the same model, data
and pretraining.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments import config
from experiments.comparison import Comparison, plots, report
from experiments.comparison.config import Contender, Spec
from experiments.comparison.price import prices
from experiments.comparison.report import Entrant, TaskResults
from experiments.comparison.trial import Bench, Entry, Trials, check, compete, earlier
from experiments.config import ConfigError, in_steps
from experiments.folder import claim, located, write_json, write_text
from experiments.progress import Live
from experiments.report import rich_table
from experiments.tasks import Scorer, Task, pretrained
from jlora.checkpoint.lock import Lock


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console()
    if not console.is_terminal:  # a log is as wide as its tables
        console = Console(width=160)
    try:
        comparison = config.load_as(Comparison, options.config, options.overrides, small=options.small)
        folder = located(options.folder, comparison.name)
        run(comparison, folder, resume=options.resume, console=console)
    except (ConfigError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume continues", file=sys.stderr)
        return 130
    return 0


def run(comparison: Comparison, folder: Path, *, resume: bool, console: Console) -> None:
    """The whole comparison, from the data to the plots, in `folder`."""
    started = time.monotonic()
    works, held = _prepare(comparison, folder, resume)
    with held:
        with Live(console, {label: steps for work in works for label, steps in work.phases().items()}) as live:
            results = [_competed(work, live) for work in works]
        _report(comparison, results, folder, time.monotonic() - started, console)


# -- the parts of the story --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A task, opened, and where its results go."""

    comparison: Comparison
    spec: Spec
    task: Task
    folder: Path

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """Those that can do the task."""
        return self.comparison.of(self.spec)

    @property
    def steps(self) -> tuple[int, int]:
        """Of the base, and of a run."""
        old, new = self.spec.pretrain, self.spec.train
        return (
            in_steps(old.steps, batch=old.batch, examples=self.task.batches("old", old.batch, 0).examples),
            in_steps(new.steps, batch=new.batch, examples=self.task.batches("new", new.batch, 0).examples),
        )

    def runs(self, contender: Contender) -> int:
        """How often a contender is trained: at each learning rate, and at the best one with the other seeds."""
        return len(contender.learning_rates) + self.comparison.seeds - 1

    def phases(self) -> dict[str, int]:
        """The task's bars, in steps."""
        base, each = self.steps
        return {self.base_bar: base, self.bar: each * sum(map(self.runs, self.contenders))}

    @property
    def base_bar(self) -> str:
        """Label of the bar of the pretraining."""
        return f"{self.spec.name}: base"

    @property
    def bar(self) -> str:
        """Label of the bar of the contenders."""
        return f"{self.spec.name}: methods"


def _prepare(comparison: Comparison, folder: Path, resume: bool) -> tuple[list[Work], Lock]:
    works = [Work(comparison, spec, spec.open(), folder / spec.name) for spec in comparison.tasks]
    for work in works:
        for contender in work.contenders:
            check(contender, work.spec, work.task, work.steps[1])
    data = {work.spec.name: work.task.digest for work in works}
    return works, claim(folder, {"config": config.describe(comparison), "data": data}, resume=resume)


def _competed(work: Work, live: Live) -> TaskResults:
    """A task: its base, every contender's runs, and what they cost beside each other."""
    comparison, task = work.comparison, work.task
    bases = work.folder.parent.parent / "bases"
    live.begin(work.base_bar)
    advance = lambda done: live.advance(work.base_bar, done)
    base, place, was_there = pretrained(task, work.spec.pretrain, bases, seed=comparison.seed, advance=advance)
    bench = Bench(comparison, work.spec, task, base, Scorer(task, comparison.batch))
    scores = bench.scorer(base, "test")
    new, old = (
        f"{task.metric.text(score.value)} on {name}" for score, name in zip(scores, (task.new, task.old), strict=True)
    )
    found = f"{task.metric.label} (test): {old}, {new}" + (f"; reused from {place}" if was_there else "")
    live.skip(work.base_bar, found)
    trained: dict[str, tuple[Entry, Any]] = {}
    trials: dict[str, Trials] = {}
    live.begin(work.bar)
    done = 0
    for contender in work.contenders:
        entry = Entry(contender, bench)
        live.note(work.bar, contender.label)
        trials[contender.name], adapted = _contender(work, entry, done, live)
        trained[contender.name] = entry, adapted
        done += work.runs(contender) * bench.steps
        live.advance(work.bar, done)
    live.note(work.bar, "timing")
    live.say(f"{work.bar}: timing all side by side")
    price = prices(bench, trained, work.folder)
    live.note(work.bar, "done")
    entrants = tuple(Entrant(c, trials[c.name], price[c.name]) for c in work.contenders)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(base))
    return TaskResults(task.name, task.label, task.metric, task.old, task.new, scores, parameters, entrants)


def _contender(work: Work, entry: Entry, done: int, live: Live) -> tuple[Trials, Any]:
    """The runs of one contender; those of an earlier start if it came to its end."""
    contender, metric = entry.contender, work.task.metric
    folder = work.folder / contender.name
    before = earlier(folder, entry.bench.base)
    trials, adapted = before or compete(entry, folder, lambda step: live.advance(work.bar, done + step))
    values = [trial.test.new.value for trial in trials.finals if trial.test is not None]
    shown = ", ".join(map(metric.text, values)) or "all diverged"
    at = "" if trials.best is None else f" at {trials.best:g}" + (", the edge of its grid" if trials.at_edge else "")
    live.say(f"{work.bar}  {contender.label:24s} {shown}{at}{'  (done before)' if before else ''}")
    return trials, adapted


# -- the end -----------------------------------------------------------------------------------------------------------


def _report(
    comparison: Comparison, results: Sequence[TaskResults], folder: Path, seconds: float, console: Console
) -> None:
    notes = _notes(comparison, results, seconds)
    setting = {
        "config": config.describe(comparison),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "seconds": seconds,
    }
    write_json(folder / "results.json", report.as_json(results) | setting)
    pictures = {task.name: plots.draw(folder, task) for task in results}  # the numbers lie on disk by now
    write_text(folder / "results.md", report.markdown(f"{comparison.name}: methods compared", results, notes, pictures))
    for task in results:
        for table, title in ((report.quality(task), task.label), (report.cost(task), ""), (report.rates(task), "")):
            console.print(rich_table(table, title))
    minutes, rest = divmod(round(seconds), 60)
    names = ["results.md", "results.json", *(name for task in results for name in pictures[task.name])]
    console.print(f"{minutes}:{rest:02d} minutes; {', '.join(names)} are in {folder}", highlight=False, soft_wrap=True)


def _notes(comparison: Comparison, results: Sequence[TaskResults], seconds: float) -> list[str]:
    runs = [f"{spec.label}: {spec.train.steps} steps of {spec.train.batch}" for spec in comparison.tasks]
    edges = [f"{e.contender.label} ({task.name})" for task in results for e in task.entrants if e.trials.at_edge]
    return [
        "; ".join(runs),
        f"learning rates chosen on the validation split with seed {comparison.seed}; on the test split mean ± standard "
        f"deviation over {comparison.seeds} seeds of factors and batches, one base",
        f"times are medians of {comparison.rounds} rounds (steps, whose programs take turns) and "
        f"{comparison.inference_rounds} (forward passes of {comparison.inference_batch} examples)",
        f"the best rate lies at the edge of the grid: {', '.join(edges) or 'for none'}",
        f"Python {platform.python_version()}, JAX {jax.__version__}, {os.cpu_count()} CPUs, "
        f"{jax.devices()[0].device_kind}; this start took {seconds:.0f} s",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m experiments.compare", description="Compare methods on tasks.")
    parser.add_argument("config", help="a Python file with `def config() -> Comparison`")
    parser.add_argument("overrides", nargs="*", help="dotted: seeds=5 contenders.dora.learning_rates=1e-3,3e-3")
    parser.add_argument("--folder", help="the run's folder; runs/<name> if not given")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--small", action="store_true", help="the config's small form")
    return parser


if __name__ == "__main__":
    sys.exit(main())
