"""One contender on one task: a sweep of learning rates, then further seeds at the best, all by one compiled step."""

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import jlora
from experiments.comparison.config import Comparison, Contender, Spec
from experiments.config import ConfigError, in_steps
from experiments.folder import read_json, write_json
from experiments.resume import loaded
from experiments.tasks import Score, Scorer, Scores, Task, at_rate, train
from jlora.state import TrainState
from jlora.train import Step, train_step

Params = Any
_DONE = "trials.json"


@dataclass(frozen=True)
class Trial:
    """One training run.

    Attributes:
      seed, learning_rate: of it.
      validation: its scores at the end; None if it diverged.
      test: the same on the test split, for the runs at the best rate alone.
      diverged: the error's words.
    """

    seed: int
    learning_rate: float
    validation: Scores | None
    test: Scores | None = None
    diverged: str | None = None


@dataclass(frozen=True)
class Trials:
    """All of a contender's runs on a task.

    Attributes:
      sweep: one per learning rate, with the first seed.
      best: the learning rate that was best on the validation split; None if all diverged.
      finals: one per seed at that rate, the sweep's among them.
    """

    sweep: tuple[Trial, ...]
    best: float | None
    finals: tuple[Trial, ...]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the first or the last of the grid, so that a better one may lie outside."""
        rates = [trial.learning_rate for trial in self.sweep]
        return len(rates) > 1 and self.best in (rates[0], rates[-1])


@dataclass(frozen=True)
class Bench:
    """What all contenders share on a task."""

    comparison: Comparison
    spec: Spec
    task: Task
    base: Params
    scorer: Scorer

    @property
    def steps(self) -> int:
        """Of every run."""
        how = self.spec.train
        return in_steps(how.steps, batch=how.batch, examples=self.task.batches("new", how.batch, 0).examples)


@dataclass(frozen=True, eq=False)
class Entry:
    """A contender on a task, with its programs: each is compiled at the first call, and once."""

    contender: Contender
    bench: Bench

    @functools.cached_property
    def step(self) -> Step:
        """The training step, for every learning rate."""
        return train_step(self.bench.task.loss, self.optimizer(self.contender.learning_rates[0]))

    @functools.cached_property
    def lifted(self) -> Callable[[jlora.Adapted, Any], jax.Array]:
        """The forward pass with the factors apart."""
        return jax.jit(jlora.lift(self.bench.task.forward))

    @functools.cached_property
    def merged(self) -> Callable[[jlora.Adapted], Params]:
        """Plain parameters again."""
        return jax.jit(jlora.merge)

    @property
    def merges(self) -> bool:
        """Whether the method can be merged; those that act on activations cannot."""
        return not self.contender.method.acts.unmergeable

    def optimizer(self, learning_rate: float) -> Any:
        """The optimizer at a rate; its states are alike for all of them."""
        return at_rate(self.bench.spec.train, learning_rate, self.bench.steps)

    def start(self, seed: int) -> jlora.Adapted:
        """The base with initial factors."""
        contender, bench = self.contender, self.bench
        if not contender.method.acts.statistic:
            return applied(
                contender, bench.base, key=seed
            )  # not compiled as a whole: contenders share the small programs
        batches = bench.task.batches("new", bench.spec.train.batch, seed)
        return applied(
            contender,
            bench.base,
            key=seed,
            statistics=jlora.measure(
                bench.task.loss,
                bench.base,
                [batches(i) for i in range(bench.comparison.statistics)],
                None,
                contender.method.acts.statistic,
                targets=contender.targets,
            ),
        )

    def state(self, start: jlora.Adapted, learning_rate: float, seed: int) -> TrainState:
        """Before the first step."""
        return TrainState.create(start, self.optimizer(learning_rate), key=seed)

    def scores(self, adapted: jlora.Adapted, split: Any) -> Scores:
        """Merged where that is possible, so that one program evaluates nearly all contenders; it is exact."""
        scorer = self.bench.scorer
        if self.merges:
            return scorer(self.merged(adapted), split)
        return scorer(adapted, split, self.lifted)


def applied(contender: Contender, params: Params, **rest: Any) -> jlora.Adapted:
    """`jlora.apply` as the contender has it."""
    method, targets, extras = contender.method, contender.targets, contender.extras
    return jlora.apply(params, method=method, targets=targets, extras=() if extras is None else extras, **rest)


def check(contender: Contender, spec: Spec, task: Task, steps: int) -> None:
    """Finds a contender that cannot be before anything is trained, on abstract parameters.

    Raises:
      ConfigError: naming the contender.
    """
    total = dict(contender.method.config).get("total_steps", steps)
    if total != steps:
        raise ConfigError(
            f"contenders.{contender.name}: {contender.method.name} is made for total_steps={total}, and a run of task "
            f"{spec.name!r} has {steps} steps"
        )
    if contender.method.acts.statistic:  # abstract parameters have no data to start from
        contender = dataclasses.replace(contender, method=jlora.lora(contender.method.rank or 1))
    try:
        jax.eval_shape(lambda: applied(contender, task.initial(0)))
    except ValueError as error:
        raise ConfigError(f"contenders.{contender.name}: {error}") from error


def compete(entry: Entry, folder: Path, advance: Callable[[int], None]) -> tuple[Trials, jlora.Adapted]:
    """All runs of a contender, and the adapter of the first seed at the best rate, which is kept in the folder too.

    `advance` is told of every step, counted over all runs.
    """
    bench, rates, seed = entry.bench, entry.contender.learning_rates, entry.bench.comparison.seed
    start = entry.start(seed)
    sweep, trained = [], {}
    for i, rate in enumerate(rates):
        trial, adapted = _trial(entry, start, rate, seed, _from(advance, i * bench.steps))
        sweep.append(trial)
        if adapted is not None:
            trained[rate] = adapted
    best = best_rate(sweep, bench.task)
    finals = []
    if best is not None:
        (at_best,) = (trial for trial in sweep if trial.learning_rate == best)
        finals.append(dataclasses.replace(at_best, test=entry.scores(trained[best], "test")))
        for i in range(1, bench.comparison.seeds):
            done = _from(advance, (len(rates) + i - 1) * bench.steps)
            trial, adapted = _trial(entry, entry.start(seed + i), best, seed + i, done)
            test = None if adapted is None else entry.scores(adapted, "test")
            finals.append(dataclasses.replace(trial, test=test))
    chosen = start if best is None else trained[best]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    jlora.save(folder / "adapter", chosen)
    trials = Trials(tuple(sweep), best, tuple(finals))
    write_json(folder / _DONE, dataclasses.asdict(trials))
    return trials, chosen


def earlier(folder: Path, base: Params) -> tuple[Trials, jlora.Adapted] | None:
    """What `compete` left in a folder, if it came to its end."""
    path = folder / _DONE
    if not path.exists():
        return None
    build = lambda read: Trials(tuple(map(_read, read["sweep"])), read["best"], tuple(map(_read, read["finals"])))
    return read_json(path, build), loaded(folder, base)


def best_rate(sweep: list[Trial], task: Task) -> float | None:
    """The rate with the best metric on the new task's validation split; of equal ones, that with the lowest loss."""
    ended = [(trial.validation.new, trial.learning_rate) for trial in sweep if trial.validation is not None]
    if not ended:
        return None
    _, rate = max(ended, key=lambda pair: (task.metric.gain(0.0, pair[0].value), -pair[0].loss))
    return rate


def _trial(
    entry: Entry, start: jlora.Adapted, learning_rate: float, seed: int, advance: Callable[[int], None]
) -> tuple[Trial, jlora.Adapted | None]:
    bench = entry.bench
    batches = bench.task.batches("new", bench.spec.train.batch, seed)
    try:
        state = train(entry.step, entry.state(start, learning_rate, seed), batches, bench.steps, advance)
    except FloatingPointError as error:
        advance(bench.steps)
        return Trial(seed, learning_rate, None, diverged=str(error).split(" (", 1)[0]), None
    validation = entry.scores(state.adapted, "validation")
    if not math.isfinite(validation.new.loss):
        return Trial(seed, learning_rate, None, diverged="the loss on the validation split is not finite"), None
    return Trial(seed, learning_rate, validation), state.adapted


def _from(advance: Callable[[int], None], done: int) -> Callable[[int], None]:
    return lambda step: advance(done + step)


def _read(trial: dict[str, Any]) -> Trial:
    read = lambda scores: scores and Scores(*(Score(*score) for score in scores))
    return Trial(**trial | {split: read(trial[split]) for split in ("validation", "test")})
