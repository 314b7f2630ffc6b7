"""Fine-tunes a pretrained checkpoint on a task in several ways, and reports what each reached and what it cost.

    python -m experiments.finetune configs/roberta_base_glue_lora.py
    python -m experiments.finetune configs/minilm_sst2.py seeds=0 runs.lora_qv.learning_rate=1e-3 --folder runs/rate
    python -m experiments.finetune configs/gpt2_medium_e2e_lora.py --small
    python -m experiments.finetune configs/minilm_sst2.py --resume

The folder of an experiment is `runs/<name>`; each run has a folder in it with the best adapter, the curve and
TensorBoard's events (`tensorboard --logdir runs`).
"""

import argparse
import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
from rich.console import Console

import jlora
from experiments import config
from experiments.config import ConfigError
from experiments.data.files import DataError
from experiments.finetuning import Finetune, plots, report
from experiments.finetuning.loop import Result, Trainer, train
from experiments.finetuning.report import Plan
from experiments.finetuning.work import Params, Work
from experiments.folder import claim, located, write_json, write_text
from experiments.measure import Cost, costs
from experiments.progress import Live
from experiments.report import rich_table
from experiments.resume import loaded
from jlora.models.files import folder_of


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console()
    try:
        experiment = config.load_as(Finetune, options.config, options.overrides, small=options.small)
        folder = located(options.folder, experiment.name)
        with _compiled_in_haste() if options.small else contextlib.nullcontext():
            run(experiment, folder, resume=options.resume, console=console)
    except (ConfigError, DataError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume continues", file=sys.stderr)
        return 130
    return 0


def run(experiment: Finetune, folder: Path, *, resume: bool, console: Console) -> None:
    """The whole experiment, from the checkpoint to the plots, in `folder`."""
    started = time.monotonic()
    if jax.process_count() > 1:
        raise ConfigError(
            "experiments.finetune runs in one process: data and parameters are not sharded by process yet"
        )
    with _as_config_errors():
        checkpoint = _checkpoint(experiment, folder)
        work = experiment.task.open(checkpoint, experiment.train, experiment.evaluate_batch, **experiment.options)
    with claim(folder, {"config": config.describe(experiment), "data": work.digest}, resume=resume):
        _run(experiment, work, folder, started, console)


def _run(experiment: Finetune, work: Work, folder: Path, started: float, console: Console) -> None:
    with _as_config_errors():
        params = work.params(experiment.seeds[0])
    sites = jlora.sites(work.loss, params, work.batches(experiment.train.batch, 0)(0), jax.random.key(0))
    trainers = [Trainer(run, work, experiment.train, sites) for run in experiment.runs]
    plans = _plans(experiment, trainers, params)
    for line in report.opening(experiment, work, params, list(plans.values()), trainers[0].steps):
        console.print(line, highlight=False, soft_wrap=True)
    phases = {_title(experiment, t, seed): t.steps for seed in experiment.seeds for t in trainers}
    results: dict[str, list[Result]] = {t.run.name: [] for t in trainers}
    with Live(console, phases) as live:
        for seed in experiment.seeds:
            if (
                seed != experiment.seeds[0] and work.head
            ):  # another head; the old parameters go before the new ones come
                del params
                params = work.params(seed)
            for trainer in trainers:
                label = _title(experiment, trainer, seed)
                place = folder / trainer.run.name / f"seed_{seed}"
                results[trainer.run.name].append(train(trainer, seed, params, place, live, label))
        if experiment.rounds:
            live.say("timing the steps")
        finite = [t for t in trainers if all(result.diverged is None for result in results[t.run.name])]
        prices = _prices(experiment, finite, params)
    _say_samples(work, trainers, params, folder, experiment.seeds[0], console)
    _report(experiment, folder, work, plans, results, prices, time.monotonic() - started, console)


@contextlib.contextmanager
def _compiled_in_haste() -> Iterator[None]:
    """XLA leaves out most optimizations: a small form's time is that of its compilations, which are thrice as fast."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@contextlib.contextmanager
def _as_config_errors(prefix: str = "") -> Iterator[None]:
    """What jlora says of a checkpoint or a method that does not fit is the user's to mend: no traceback is shown."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


# -- the parts of the story --------------------------------------------------------------------------------------------


def _checkpoint(experiment: Finetune, folder: Path) -> Path:
    """Where the checkpoint lies: downloaded, named or made. What is made lies beside the runs' folders."""
    given = experiment.checkpoint
    if callable(given):
        return given(folder.parent / "checkpoints" / experiment.name)
    return folder_of(given, experiment.revision)


def _plans(experiment: Finetune, trainers: Sequence[Trainer], params: Params) -> dict[str, Plan]:
    """What each run will do. A run that cannot be is found here, before anything is trained."""
    plans = {}
    for trainer in trainers:
        with _as_config_errors(f"runs.{trainer.run.name}: "):
            plans[trainer.run.name] = report.planned(trainer, trainer.start(experiment.seeds[0], params))
    return plans


def _prices(experiment: Finetune, trainers: Sequence[Trainer], params: Params) -> dict[str, Cost]:
    if not experiment.rounds or not trainers:
        return {}
    programs = {t.run.name: (t.step, t.start(experiment.seeds[0], params)) for t in trainers}
    batch = trainers[0].work.batches(experiment.train.batch, 0)(0)
    return costs(programs, batch, reference=trainers[0].run.name, rounds=experiment.rounds)


def _say_samples(
    work: Work, trainers: Sequence[Trainer], params: Params, folder: Path, seed: int, console: Console
) -> None:
    """Texts of the model before and after."""
    if work.samples is None:
        return
    shown = [("before", work.samples(work.model.apply, params))]
    for trainer in trainers:
        adapted = loaded(folder / trainer.run.name / f"seed_{seed}", params)
        shown.append((trainer.run.label, work.samples(trainer.apply, trainer.merged(adapted))))
    text = "\n".join(f"{label}:\n" + "\n".join(f"  {line}" for line in lines) for label, lines in shown)
    write_text(folder / "samples.txt", text + "\n")
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _report(
    experiment: Finetune,
    folder: Path,
    work: Work,
    plans: Mapping[str, Plan],
    results: Mapping[str, Sequence[Result]],
    prices: Mapping[str, Cost],
    seconds: float,
    console: Console,
) -> None:
    of_all = plots.title_of(experiment.name, experiment.task.label)
    title = f"{of_all}, test"
    tables = [report.scores(work, plans, results), report.prices(plans, results, prices)]
    pictures = ["quality.png", "curves.png"]
    setting = {
        "config": config.describe(experiment),
        "data": work.digest,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "seconds": seconds,
    }
    metrics = {"decides": work.decides, "shows": work.shows}
    write_json(folder / "results.json", {"runs": report.as_json(plans, results, prices), "metrics": metrics} | setting)
    notes = [
        f"{work.examples:,} training rows; {work.held_out}; seeds {', '.join(map(str, experiment.seeds))}",
        f"Python {platform.python_version()}, JAX {jax.__version__}, {os.cpu_count()} CPUs, "
        f"{jax.devices()[0].device_kind}; {seconds:.0f} s",
    ]
    write_text(folder / "results.md", report.as_markdown(tables, title, notes, pictures))
    plots.quality(folder / pictures[0], work, plans, results, title)  # the numbers lie on disk by now
    plots.curves(folder / pictures[1], work, plans, results, of_all)
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    for table in tables:
        console.print(rich_table(table, ""))
    minutes, rest = divmod(round(seconds), 60)
    names = ", ".join(["results.md", "results.json", *pictures])
    console.print(f"{minutes}:{rest:02d} minutes; {names} are in {folder}", highlight=False, soft_wrap=True)


def _title(experiment: Finetune, trainer: Trainer, seed: int) -> str:
    return trainer.run.label if len(experiment.seeds) == 1 else f"{trainer.run.label}, seed {seed}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m experiments.finetune", description="Fine-tune a pretrained model.")
    parser.add_argument("config", help="a Python file with `def config() -> Finetune`")
    parser.add_argument("overrides", nargs="*", help="dotted: train.batch=16 runs.lora.learning_rate=1e-3")
    parser.add_argument("--folder", help="the experiment's folder; runs/<name> if not given")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--small", action="store_true", help="the config's small form, which ends in seconds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
