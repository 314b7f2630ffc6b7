"""Pretrains a base, adapts it in several ways side by side, and reports what each learned, forgot and cost.

    python -m experiments.train configs/quickstart.py
    python -m experiments.train configs/quickstart.py train.steps=200 runs.lora_r4.rank=8 --folder runs/rank8
    python -m experiments.train configs/quickstart.py --resume

The folder of a run is `runs/<name>`; bases lie beside it, in `runs/bases`, and are used again by every experiment with
the same model, data and pretraining.
"""

import argparse
import dataclasses
import functools
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import jlora
from experiments import config, plots, pretrained, report
from experiments.config import ConfigError, Experiment, Run, Train, in_steps
from experiments.data import Corpus, Windows, spread
from experiments.evaluate import Evaluator, mean_loss
from experiments.fit import Curve, fit, optimizer, read_curve
from experiments.folder import claim, clear, located, locked, size, write_json, write_text
from experiments.measure import costs
from experiments.progress import Live
from experiments.report import Base, Outcome, Results
from experiments.resume import loaded
from jlora.checkpoint.lock import Lock
from jlora.models.gpt2 import GPT2
from jlora.state import TrainState
from jlora.train import Step, train_step

Params = Any
_BASE = "pretraining"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console()
    try:
        experiment = config.load(options.config, options.overrides, small=options.small)
        folder = located(options.folder, experiment.name)
        run(experiment, folder, resume=options.resume, console=console)
    except (ConfigError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume continues", file=sys.stderr)
        return 130
    return 0


def run(experiment: Experiment, folder: Path, *, resume: bool, console: Console) -> None:
    """The whole experiment, from texts to plots, in `folder`."""
    started = time.monotonic()
    work, held = _prepare(experiment, folder, resume)
    with held:
        _run(work, started, console)


# -- the parts of the story --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What all parts share."""

    experiment: Experiment
    model: GPT2
    old: Corpus
    new: Corpus
    evaluator: Evaluator
    folder: Path
    base_folder: Path
    resume: bool

    def windows(self, train: Train, corpus: Corpus) -> Windows:
        """The batches of a phase."""
        text = corpus.bytes("train")
        return Windows(text, self.experiment.model.context, train.batch, self.experiment.seed)

    def steps(self, train: Train, corpus: Corpus) -> int:
        """The length of a phase."""
        return in_steps(train.steps, batch=train.batch, examples=self.windows(train, corpus).examples)

    def step(self, train: Train, learning_rate: float, corpus: Corpus) -> Step:
        """The training step of a phase, not yet compiled."""
        return train_step(mean_loss(self.model), optimizer(train, learning_rate, self.steps(train, corpus)))


def _run(work: Work, started: float, console: Console) -> None:
    experiment = work.experiment
    runs = _expanded(experiment)
    phases = {_BASE: work.steps(experiment.pretrain, work.old)}
    phases |= {_title(r, runs): work.steps(experiment.train, work.new) for r in runs}
    with Live(console, phases) as live:
        base, base_curve = _pretrained(work, live)
        steps = [work.step(experiment.train, r.learning_rate, work.new) for r in runs]
        trained = [_adapted(work, base, r, step, _title(r, runs), live) for r, step in zip(runs, steps, strict=True)]
        if experiment.learning_rates:
            curves = [(r, curve) for r, (_, curve) in zip(runs, trained, strict=True)]
            return _report_sweep(work, curves, time.monotonic() - started, console)
        live.say("evaluating on the test split, timing the steps")
        results = _measured(work, base, base_curve, runs, steps, trained)
    _report(work, results, time.monotonic() - started, console)


def _prepare(experiment: Experiment, folder: Path, resume: bool) -> tuple[Work, Lock]:
    model = GPT2(experiment.model)
    _check_runs(model, experiment)
    old, new = experiment.data.old(), experiment.data.new()
    digests = {"old": old.digest(), "new": new.digest()}
    held = claim(folder, {"config": config.describe(experiment), "data": digests}, resume=resume)
    base_key = config.key(experiment.model, experiment.pretrain, experiment.seed, digests["old"])
    context, amount = experiment.model.context, experiment.evaluate
    windows = {
        split: (spread(new.bytes(split), context, count), spread(old.bytes(split), context, count))
        for split, count in (("validation", amount.validation), ("test", amount.test))
    }
    evaluator = Evaluator(model, windows, amount.batch)
    work = Work(experiment, model, old, new, evaluator, folder, folder.parent / "bases" / base_key, resume)
    return work, held


def _check_runs(model: GPT2, experiment: Experiment) -> None:
    """Splits the abstract parameters as every run will: a mistake is found before hours of pretraining."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    for run in experiment.runs:
        try:
            jax.eval_shape(functools.partial(_with_factors, run=run, seed=experiment.seed), shapes)
        except ValueError as error:
            raise ConfigError(f"runs.{run.name}: {error}") from error


def _pretrained(work: Work, live: Live) -> tuple[Params, Curve]:
    """The base: from an earlier start if there is one with the same model, data and pretraining, else trained."""
    experiment, train = work.experiment, work.experiment.pretrain
    initial = jax.jit(work.model.init)(jax.random.key(experiment.seed), jnp.zeros((1, 1), jnp.int32))["params"]
    if (work.base_folder / pretrained.NAME).exists():
        live.skip(_BASE, f"reused from {work.base_folder}")
        return pretrained.load(work.base_folder, initial), read_curve(work.base_folder)
    with locked(work.base_folder):  # other experiments have the same base
        if not work.resume:
            clear(work.base_folder)
        # A base is a full fine-tuning of random parameters: the same loop, the same state on disk.
        step = work.step(train, train.learning_rate, work.old)
        start = TrainState.create(jlora.apply(initial, targets=(), extras=".*"), step.tx, key=experiment.seed)
        state, curve = _fit(work, train, step, start, work.old, work.base_folder, _BASE, live)
        base = jlora.merge(state.adapted)
        pretrained.save(work.base_folder, base)
        shutil.rmtree(work.base_folder / "training")
        return base, curve


def _adapted(work: Work, base: Params, run: Run, step: Step, label: str, live: Live) -> tuple[jlora.Adapted, Curve]:
    """One run. Its adapter is on disk when it is done, and only then."""
    folder = work.folder / run.name
    if (folder / "adapter").exists():
        live.skip(label, "done before")
        return loaded(folder, base), read_curve(folder)
    start = TrainState.create(_with_factors(base, run, work.experiment.seed), step.tx, key=work.experiment.seed)
    state, curve = _fit(work, work.experiment.train, step, start, work.new, folder, label, live)
    jlora.save(folder / "adapter", state.adapted)
    shutil.rmtree(folder / "training")
    return state.adapted, curve


def _with_factors(base: Params, run: Run, seed: int) -> jlora.Adapted:
    if run.rank is None:
        return jlora.apply(base, targets=(), extras=".*")
    method = run.method(run.rank, run.alpha)
    # One program in place of one for every shape of a factor.
    return jax.jit(lambda base: jlora.apply(base, method=method, targets=run.targets, key=seed))(base)


def _fit(
    work: Work, train: Train, step: Step, start: TrainState, corpus: Corpus, folder: Path, label: str, live: Live
) -> tuple[TrainState, Curve]:
    return fit(
        step,
        start,
        work.windows(train, corpus),
        work.steps(train, corpus),
        every=train.evaluate_every,
        evaluate=lambda adapted: work.evaluator(adapted, "validation"),
        folder=folder,
        live=live,
        label=label,
    )


def _measured(
    work: Work,
    base: Params,
    base_curve: Curve,
    runs: Sequence[Run],
    steps: Sequence[Step],
    trained: Sequence[tuple[jlora.Adapted, Curve]],
) -> Results:
    """Scores on the test split, and what a step of each run costs beside those of the others."""
    experiment = work.experiment
    reference = next((run for run in runs if run.rank is None), runs[0])
    batch = work.windows(experiment.train, work.new)(0)
    programs = {
        run.name: (step, TrainState.create(adapted, step.tx))
        for run, step, (adapted, _) in zip(runs, steps, trained, strict=True)
    }
    cost = costs(programs, batch, reference=reference.name, rounds=experiment.evaluate.rounds)
    outcomes = [
        Outcome(
            run=run,
            curve=curve,
            scores=work.evaluator(adapted, "test"),
            count=jlora.count(adapted),
            cost=cost[run.name],
            adapter_bytes=size(work.folder / run.name / "adapter"),
            difference=work.evaluator.difference(adapted),
        )
        for run, (adapted, curve) in zip(runs, trained, strict=True)
    ]
    start = Base(
        scores=work.evaluator(base, "test"),
        curve=base_curve,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(base)),
        checkpoint_bytes=size(work.base_folder / pretrained.NAME),
    )
    return Results(work.new.label, work.old.label, start, tuple(outcomes), reference.label)


# -- the end -----------------------------------------------------------------------------------------------------------


def _report(work: Work, results: Results, seconds: float, console: Console) -> None:
    folder, table = work.folder, report.cells(results)
    title = f"{work.experiment.name}: {results.base.parameters:,} parameters"
    pictures = ["learning_curves.png", "learned_forgotten.png"]
    write_json(folder / "results.json", report.as_json(results) | _setting(work, seconds))
    write_text(folder / "results.md", report.markdown(table, title, _notes(work, seconds), pictures))
    plots.learning_curves(folder / pictures[0], results)  # the numbers lie on disk before anything is drawn
    plots.learned_forgotten(folder / pictures[1], results)
    console.print(report.rich_table(table, title))
    _print_files(folder, ["results.md", "results.json", *pictures], seconds, console)


def _report_sweep(work: Work, curves: Sequence[tuple[Run, Curve]], seconds: float, console: Console) -> None:
    folder, table = work.folder, report.sweep_cells(curves)
    title = f"bits per byte on {work.new.label} (validation) at each learning rate"
    ends = [{"label": r.label, "learning_rate": r.learning_rate, "new": c[-1].new, "old": c[-1].old} for r, c in curves]
    found = {
        "sweep": ends,
        "best": report.best_rates(curves),
        "domains": {"new": work.new.label, "old": work.old.label},
    }
    write_json(folder / "results.json", found | _setting(work, seconds))
    write_text(folder / "results.md", report.markdown(table, title, _notes(work, seconds), ["sweep.png"]))
    plots.sweep(folder / "sweep.png", curves, new=work.new.label)
    console.print(report.rich_table(table, title))
    _print_files(folder, ["results.md", "results.json", "sweep.png"], seconds, console)


def _print_files(folder: Path, names: Sequence[str], seconds: float, console: Console) -> None:
    minutes, rest = divmod(round(seconds), 60)
    console.print(f"{minutes}:{rest:02d} minutes; {', '.join(names)} are in {folder}", highlight=False, soft_wrap=True)


def _setting(work: Work, seconds: float) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "config": config.describe(work.experiment),
        "data": {
            name: {split: len(corpus.bytes(split)) for split in ("train", "validation", "test")}
            | {"digest": corpus.digest()}
            for name, corpus in (("old", work.old), ("new", work.new))
        },
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "seconds": seconds,
    }


def _notes(work: Work, seconds: float) -> list[str]:
    experiment, train = work.experiment, work.experiment.train
    steps, context = work.steps(train, work.new), experiment.model.context
    amount, splits = experiment.evaluate, list[str]()
    if not experiment.learning_rates:
        splits = [
            f"test split, at most {amount.test} windows of {context} bytes of each domain: the table, learned against "
            f"forgotten; validation split, at most {amount.validation} windows: the learning curves"
        ]
    return [
        f"{steps} steps of {train.batch} x {context} bytes, seed {experiment.seed}",
        *splits,
        f"Python {platform.python_version()}, JAX {jax.__version__}, {os.cpu_count()} CPUs, "
        f"{jax.devices()[0].device_kind}; this start took {seconds:.0f} s",
    ]


def _expanded(experiment: Experiment) -> list[Run]:
    """The runs, or for a sweep each of them at every learning rate."""
    if not experiment.learning_rates:
        return list(experiment.runs)
    return [
        dataclasses.replace(run, name=f"{run.name}_{rate:g}", learning_rate=rate)
        for run in experiment.runs
        for rate in experiment.learning_rates
    ]


def _title(run: Run, runs: Sequence[Run]) -> str:
    """The label, with the learning rate where there are several runs of one label."""
    shared = sum(other.label == run.label for other in runs) > 1
    return f"{run.label}, {run.learning_rate:g}" if shared else run.label


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m experiments.train", description="Pretrain, adapt, compare.")
    parser.add_argument("config", help="a Python file with `def config() -> Experiment`")
    parser.add_argument("overrides", nargs="*", help="dotted: train.steps=200 runs.lora_r4.rank=8")
    parser.add_argument("--folder", help="the run's folder; runs/<name> if not given")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--small", action="store_true", help="the config's small form, which ends in seconds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
