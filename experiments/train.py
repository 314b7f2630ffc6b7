"""Adapts a base to a task in several ways side by side, and reports what each learned, forgot and cost.

    python -m experiments.train configs/quickstart.py
    python -m experiments.train configs/quickstart.py train.steps=200 runs.lora_r4.method="lora(8)" --folder runs/rank8
    python -m experiments.train configs/minilm_sst2.py seeds=0 runs.lora_qv.learning_rate=1e-3
    python -m experiments.train configs/gpt2_medium_e2e_lora.py --small
    python -m experiments.train configs/quickstart.py --resume
    python -m experiments.launch local configs/quickstart.py --processes 2    # other machines: experiments/launch

The folder of an experiment is `runs/<name>`; each training has a folder in it with the adapter that is kept, the curve
and TensorBoard's events (`tensorboard --logdir runs`). Bases that are pretrained lie beside it, in `runs/bases`, and
are used again by every experiment with the same model, data and pretraining.
"""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from experiments import bases, configfile, devices, exports, hosts, report
from experiments.bases import Base
from experiments.config import Experiment, Pretrain, Study, all_of
from experiments.configfile import ConfigError
from experiments.data.files import DataError
from experiments.folder import is_run_folder, located, run_folder_of_all
from experiments.held import hold, while_loading
from experiments.launch.distributed import initialise
from experiments.launch.exits import PREEMPTED, Preempted, preemptible
from experiments.price import Plan, planned, priced
from experiments.progress import Progress
from experiments.report.results import outcome_of
from experiments.tasks.task import Opened, Params
from experiments.trainer import Shared, Trainer, check_memory, pattern_of, sites_of
from experiments.trial import Trial
from jlora import tree
from jlora.quant import FORMATS


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        several = initialise(detect=options.distributed)
    except (ConfigError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1  # who did not come may have died: GKE starts all anew
    if several:  # JAX's preemption service has the signal
        return _as_one_of_several(options)
    with preemptible():
        return _main(options)


_LOST = (
    "this process of several cannot go on: what is above is its own error, or another one has ended, which says why "
    "itself. The same command with --resume continues from the last state that was kept"
)


def _as_one_of_several(options: argparse.Namespace) -> int:
    """`_main`. After an error the process ends at once: regularly it would wait for the others, and they for it."""
    try:
        code = _main(options)
    except Exception:
        traceback.print_exc()
        print(f"error: {_LOST}", file=sys.stderr)
        code = 1
    if code not in (0, PREEMPTED):
        if hosts.is_first():
            time.sleep(1.0)  # the others lose their coordinator, and are given the time to say the same error
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _main(options: argparse.Namespace) -> int:
    console = Console()
    if not console.is_terminal:  # a log is as wide as its tables
        console = Console(width=160)
    console.quiet = not hosts.is_first()  # one report
    try:
        config: Experiment | Study = configfile.load(
            (Experiment, Study), options.config, options.overrides, small=options.small
        )
        folder = located(options.folder, config.name)
        going_on = (options.resume, options.resume_if_there)
        hosts.check_same(code=hosts.code(), config=configfile.describe(config), folder=str(folder), resume=going_on)
        with _most_optimizations_off() if options.small else contextlib.nullcontext():
            experiments = all_of(config)
            there = hosts.said_by_first({name: is_run_folder(folder / name) for name in experiments})
            begun = options.resume_if_there or (options.resume and any(there.values()))
            for name, experiment in experiments.items():
                resume = there[name] if begun else options.resume  # an experiment that a study did not come to begins
                run(experiment, folder / name, resume=resume, console=console)
    except (ConfigError, DataError, FileNotFoundError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume continues", file=sys.stderr)
        return 130
    except Preempted:
        print("preempted; the same command with --resume continues", file=sys.stderr)
        return PREEMPTED
    return 0


def run(experiment: Experiment, folder: Path, *, resume: bool, console: Console) -> None:
    """The whole experiment, from the base to the plots, in `folder`, on the devices of its mesh."""
    with _as_config_errors():
        here = devices.of(experiment.mesh)
    with devices.used(here):
        _run(experiment, folder, resume=resume, console=console)
    hosts.wait_for_all("the report is written")


def _run(experiment: Experiment, folder: Path, *, resume: bool, console: Console) -> None:
    started, here = time.monotonic(), devices.current()
    with _as_config_errors():
        source = bases.source(experiment, folder)
        opened = experiment.task.open(source, experiment.train, here.fitting(experiment.evaluate_batch))
    hosts.check_same(data=opened.digest, mesh=str(here))
    _check_devices(experiment, opened)
    work = _prepared(experiment, opened, folder)
    description = {"config": configfile.describe(experiment), "data": opened.digest}
    with run_folder_of_all(folder, description, resume=resume):
        for line in report.opening(experiment, opened, work.trials[0].trainer.steps):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        with Progress(console, work.phases()) as progress:
            with _as_config_errors():
                base = _base(work, progress, resume=resume)
            if opened.prepare is not None:
                opened.prepare(base.params(experiment.seed), folder, progress.print)
            plans = _plans(work, base.params(experiment.seed))
            for line in report.planned(opened, base.params(experiment.seed), work.trials, plans):
                progress.print(line)
            _trained(work, base, progress)
            results = _measured(work, base, plans, progress)
        report.write(experiment, results, opened, folder, time.monotonic() - started, console)
        for line in exports.write(experiment, work.trials, base.params(experiment.seed), source):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


# -- the parts of the story --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Work:
    """An experiment whose task is opened, the runs with their programs, and the folder."""

    experiment: Experiment
    opened: Opened
    folder: Path
    shared: Shared
    trials: list[Trial]
    loaded: Base | None

    def phases(self) -> dict[str, int]:
        """The bars, in steps."""
        base = self.experiment.base
        first = {bases.LABEL: self.base_trainer.steps} if isinstance(base, Pretrain) else {}
        return first | {trial.run.label: trial.trainings * trial.trainer.steps for trial in self.trials}

    @property
    def base_trainer(self) -> Trainer:
        """The pretraining of the base."""
        return bases.trainer_of(self.experiment, self.shared)


def _prepared(experiment: Experiment, opened: Opened, folder: Path) -> Work:
    """The runs; one that cannot be is found here, on abstract parameters where the base is not there yet."""
    seed, base = experiment.seed, None
    check_memory("train", experiment.train)
    if isinstance(experiment.base, Pretrain):
        check_memory("base.train", experiment.base.train)
    with _as_config_errors():
        if isinstance(experiment.base, Pretrain):
            shapes = jax.eval_shape(lambda: _held_by_all(experiment, opened, opened.params(seed)))
        else:
            base = bases.of_checkpoint(opened, seed, partial(_loaded, experiment, opened))
            shapes = jax.eval_shape(lambda params: params, base.params(seed))
    shared = Shared.of(experiment, opened, shapes)
    trials = []
    for each in experiment.runs:
        rates, each = experiment.rates_of(each), replace(each, held=experiment.held_by(each))
        trainer = Trainer(each, shared, experiment.train, rates[0])
        trainer.check(shapes)
        trials.append(Trial(trainer, rates, experiment.seeds, folder / each.name, experiment.measure.test))
    hosts.by_first(lambda: exports.check(experiment, trials))
    return Work(experiment, opened, folder, shared, trials, base)


def _check_devices(experiment: Experiment, opened: Opened) -> None:
    """Finds what the devices of the mesh cannot divide, and what several processes do not do."""
    here, schedules = devices.current(), {"train": experiment.train}
    if isinstance(experiment.base, Pretrain):
        schedules["base.train"] = experiment.base.train
    for name, schedule in schedules.items():
        parts = schedule.accumulate
        if schedule.batch // parts % here.parts:
            cut = f" in {parts} micro-batches" if parts > 1 else ""
            raise ConfigError(
                f"{name}.batch={schedule.batch}{cut} is not a multiple of {here.parts}, the devices that its rows are "
                f"dealt out to (mesh: {here}): take a multiple of {here.parts * parts}, or more devices along tp"
            )
    if here.rows is None or len(here.rows.spec) < 2:
        return
    rows = opened.new.batches(experiment.train.batch, experiment.seed)(0)
    if any(np.ndim(x) > 2 for x in jax.tree.leaves(rows)):
        raise ConfigError("mesh: sequence is for rows of tokens, and the rows of this task are pictures: leave it out")


def _held_by_all(experiment: Experiment, opened: Opened, params: Params) -> Params:
    """The base as all runs hold it, so that it is not kept beside that; as it is where they differ."""
    held, run = experiment.held_by_all, experiment.runs[0]
    if held.plain:
        return params
    return hold(params, held, sites_of(experiment, opened, params), pattern_of(opened.head, run.extras))


def _loaded(experiment: Experiment, opened: Opened, seed: int) -> Params:
    """A checkpoint as all runs hold it. What they hold in 4 or 8 bits is never held in more."""
    held = experiment.held_by_all
    here = devices.current()
    if held.quantize not in FORMATS:
        return _held_by_all(experiment, opened, here.placed(opened.params(seed)))
    return here.placed(opened.params(seed, **while_loading(held, pattern_of(opened.head, experiment.runs[0].extras))))


def _base(work: Work, progress: Progress, *, resume: bool) -> Base:
    """The checkpoint, or the base from an earlier start if there is one, else trained."""
    if work.loaded is not None:
        return work.loaded
    place, phase = work.folder.parent / "bases", progress.phase(bases.LABEL)
    hold = partial(_held_by_all, work.experiment, work.opened)
    return bases.pretrained(work.base_trainer, place, work.experiment.seed, phase, hold, resume=resume)


def _plans(work: Work, params: Params) -> dict[str, Plan]:
    """Plan of each run."""
    plans = {}
    for trial in work.trials:
        with _as_config_errors(f"runs.{trial.run.name}: "):
            plans[trial.run.name] = planned(trial.trainer, work.experiment.seed, params)
    return plans


def _trained(work: Work, base: Base, progress: Progress) -> None:
    """Every run with every seed; a head's parameters are another one's with another seed."""
    for seed in work.experiment.seeds:
        for trial in work.trials:
            trial.train(seed, base.params(seed), progress)


def _measured(work: Work, base: Base, plans: dict[str, Plan], progress: Progress) -> report.Results:
    """Scores of the base, what the runs cost beside each other, and samples."""
    experiment, opened, params = work.experiment, work.opened, base.params(work.experiment.seed)
    if experiment.measure.rounds:
        progress.say("timing the steps")
    ended = [t for t in work.trials if t.results and all(result.diverged is None for result in t.results)]
    prices = priced(experiment, ended, params, work.folder)
    shown = report.samples(opened, work.trials, params, work.folder)
    if shown:
        progress.print(shown)
    report.sheets(opened, work.trials, params, work.folder)
    new = old = None
    if opened.old is not None and experiment.measure.test:
        new, old = (work.shared.of_base(params, "test", side) for side in ("new", "old"))
    start = report.Start(sum(leaf.size for leaf in tree.leaves(params)[0].values()), base.bytes, new, old, base.curve)
    outcomes = tuple(outcome_of(t, plans[t.run.name], prices.get(t.run.name)) for t in work.trials)
    return report.Results.of(experiment, opened, start, outcomes)


@contextlib.contextmanager
def _most_optimizations_off() -> Iterator[None]:
    """XLA leaves out most optimizations: a small form's time is that of its compilations, which are thrice as fast."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@contextlib.contextmanager
def _as_config_errors(prefix: str = "") -> Iterator[None]:
    """Shows jlora's errors about a checkpoint or a method that does not fit without a traceback."""
    try:
        yield
    except ConfigError:
        raise
    except DataError:
        raise
    except ValueError as error:
        if hosts.collective_failed(error):
            raise
        raise ConfigError(f"{prefix}{error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m experiments.train", description="Adapt a base in several ways.")
    parser.add_argument("config", help="a Python file with `def config() -> Experiment`")
    parser.add_argument("overrides", nargs="*", help="dotted: train.steps=200 runs.lora_r4.method='lora(8)'")
    parser.add_argument("--folder", help="the experiment's folder; runs/<name> if not given")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--resume-if-there", action="store_true", help="continue if there is a run, else begin one")
    parser.add_argument(
        "--distributed", action="store_true", help="one of several processes, which JAX finds by itself"
    )
    parser.add_argument("--small", action="store_true", help="the config's small form, which ends in seconds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
