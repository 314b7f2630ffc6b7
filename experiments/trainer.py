"""The training loop of every run and of a pretrained base: evaluations, what is kept of them, resuming."""

import dataclasses
import functools
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from experiments import held
from experiments.average import average, averaged
from experiments.config import ConfigError, Experiment, Held, Run, Schedule, in_steps
from experiments.folder import read_json, write_json
from experiments.progress import Phase
from experiments.resume import loaded, restored
from experiments.sheet import draw
from experiments.tasks.task import Apply, Batch, Evaluate, Opened, Params, Scores, Side, Split
from experiments.tensorboard import TensorBoard
from jlora import host, tree
from jlora.checkpoint import Checkpoints
from jlora.methods.residual import is_taken_out
from jlora.quant import FORMATS
from jlora.state import TrainState
from jlora.train import Step, train_step

_RESULT, _CURVE = "result.json", "curve.json"


@dataclass(frozen=True)
class Point:
    """An evaluation on the validation split.

    Attributes:
      step: after which.
      loss: in nats, the mean over the steps since the point before.
      scores: of the new domain.
      old: of the old one, where there is one.
    """

    step: int
    loss: float | None
    scores: Scores
    old: Scores | None = None


@dataclass(frozen=True)
class Result:
    """Result of a run with a seed and a learning rate.

    Attributes:
      seed, learning_rate: of it.
      points: its evaluations.
      best: the step whose evaluation is kept; so is its adapter.
      tokens_per_second: in training, evaluations and the first step, which is compiled, aside.
      seconds: of those steps.
      test, old: the kept adapter's scores on the test split of the new and the old domain.
      diverged: the error's words; the result is what was kept before.
    """

    seed: int
    learning_rate: float
    points: tuple[Point, ...]
    best: int
    tokens_per_second: float
    seconds: float
    test: Scores | None = None
    old: Scores | None = None
    diverged: str | None = None

    @property
    def kept(self) -> Point:
        """The evaluation that is kept."""
        return next(point for point in self.points if point.step == self.best)


class Shared:
    """Common parts of all runs of an experiment: the task, its sites, the base, one evaluation of plain parameters.

    Attributes:
      opened: the task.
      sites: of its loss.
      statistics: training batches that data-driven methods start from.
      already: how the parameters are held that come, where all runs have them so; None for as they are.
      stored: whether some of those are held in few bits, as a checkpoint's may be by itself.
    """

    def __init__(
        self,
        opened: Opened,
        sites: tuple[jlora.Site, ...],
        statistics: int,
        already: Held | None = None,
        *,
        stored: bool = False,
    ) -> None:
        self.opened, self.sites, self.statistics, self.already, self.stored = opened, sites, statistics, already, stored
        self._held: dict[tuple[Held, str], tuple[Params, Params]] = {}

    @functools.cached_property
    def plain(self) -> Evaluate:
        """The scores of plain parameters."""
        return self.opened.evaluator(self.opened.model.apply)

    @property
    def apply(self) -> Apply:
        """The model's function of the base as it is kept."""
        return self.opened.model.apply if not self.stored else jlora.lift(self.opened.model.apply)

    @functools.cached_property
    def of_base(self) -> Evaluate:
        """The scores of the base as it is kept."""
        return self.plain if not self.stored else self.opened.evaluator(self.apply)

    def held(self, run: Run, params: Params) -> Params:
        """The base as a run holds it; runs that hold it alike share it. One that is held so already stays."""
        key = run.held, self.kept(run)
        if key not in self._held or self._held[key][0] is not params:
            self._held = {key: pair for key, pair in self._held.items() if pair[0] is params}  # another seed's go
            self._held[key] = params, self.hold(run, params)
        return self._held[key][1]

    def hold(self, run: Run, params: Params) -> Params:
        """The same, made anew; shapes of shapes."""
        if run.held == self.already:
            return params
        return held.hold(params, run.held, self.sites, self.kept(run))

    def kept(self, run: Run) -> str:
        """A pattern of what a run trains as it is."""
        return pattern_of(self.opened.head, run.extras)

    @functools.cached_property
    def merge(self) -> Callable[[jlora.Adapted], Params]:
        """Plain parameters again."""
        return jax.jit(jlora.merge)

    @classmethod
    def of(cls, experiment: Experiment, opened: Opened, params: Params) -> "Shared":
        """Shared parts of an experiment. Axes are read from the loss: no name says those of stacked layers."""
        already = experiment.held_by_all
        sites = sites_of(experiment, opened, params)
        stored = any(map(tree.is_stored, tree.leaves(params)[0].values()))
        return cls(opened, sites, experiment.statistics, None if already.plain else already, stored=stored)


def sites_of(experiment: Experiment, opened: Opened, params: Params) -> tuple[jlora.Site, ...]:
    """The sites of the loss, for parameters or their shapes, of which some may be held in few bits."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params, is_leaf=tree.is_stored)
    batch = opened.new.batches(experiment.train.batch, 0)(0)
    return jlora.sites(opened.loss, shapes, batch, jax.random.key(0))


def pattern_of(*patterns: str | None) -> str:
    """A pattern that fits what one of several fits; "" of none."""
    return "|".join(f"(?:{pattern})" for pattern in patterns if pattern)


@dataclass(frozen=True, eq=False)
class Trainer:
    """A run's programs: each is compiled once, for all seeds and learning rates.

    Attributes:
      run: what is trained.
      shared: with the other runs.
      schedule: how it is trained.
      first_rate: that the step is made at. The rate lies in the optimizer's state, so that it is another one's too.
      side: the domain that is learned.
    """

    run: Run
    shared: Shared
    schedule: Schedule
    first_rate: float
    side: Side = "new"

    @property
    def opened(self) -> Opened:
        """The task."""
        return self.shared.opened

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self.in_steps(self.schedule.steps)

    def in_steps(self, duration: int | str) -> int:
        """A duration in this run's steps."""
        return in_steps(duration, batch=self.schedule.batch, examples=self.opened.domain(self.side).examples)

    def batches(self, seed: int) -> Callable[[int], Batch]:
        """Step -> the training batch."""
        return self.opened.domain(self.side).batches(self.schedule.batch, seed)

    @functools.cached_property
    def step(self) -> Step:
        """The training step, for every learning rate."""
        return train_step(
            self.opened.loss, self.optimizer(self.first_rate), pass_key=True, accumulate=self.schedule.accumulate
        )

    def optimizer(self, learning_rate: float) -> optax.GradientTransformation:
        """The optimizer at a rate; its states are alike for all of them."""
        return optimizer(self.schedule, learning_rate, self.steps, self.run.slower)

    @functools.cached_property
    def apply(self) -> Apply:
        """The model's function for an evaluation: as it is with merged weights, lifted where there are none."""
        return self.opened.model.apply if self.merges else jlora.lift(self.opened.model.apply)

    @property
    def merges(self) -> bool:
        """Whether the method gives plain weights, and those of the base take the update without rounding it away."""
        takes = self.run.held.plain and not self.shared.stored and self.opened.model.config.param_dtype == "float32"
        return takes and not self.run.method.acts.unmergeable

    def held(self, params: Params, seed: int) -> Params:
        """The base as the run holds it: a run's own where it is less what the factors start from (LoftQ, QPiSSA)."""
        if not self.starts_from_base:
            return self.shared.held(self.run, params)
        return self._started(seed, params).base

    def _started(self, seed: int, params: Params) -> jlora.Adapted:
        """The start of a run whose base is its own, the last one kept: it takes singular values of every weight."""
        if self._own.get("of") != (id(params), seed):
            plain = self._beside(params, jax.random.key(seed)).replace(base=params)
            adapted = held.hold_adapted(plain, self.run.held, self.shared.sites, self.shared.kept(self.run))
            self._own.update(of=(id(params), seed), params=params, adapted=adapted)
        adapted = self._own["adapted"]
        # A training step gives its factors away.
        return jax.tree.map(jnp.copy, adapted.replace(base=None)).replace(base=adapted.base)

    @functools.cached_property
    def _own(self) -> dict[str, Any]:
        return {}

    @property
    def starts_from_base(self) -> bool:
        """Whether the factors' start is taken out of the base before it is quantised."""
        run = self.run
        return run.held.quantize in FORMATS and (run.held.loftq is not None or is_taken_out(run.method))

    def merged(self, adapted: jlora.Adapted) -> Params:
        """Parameters as `apply` takes them."""
        return self.shared.merge(adapted) if self.merges else adapted

    @functools.cached_property
    def _evaluator(self) -> Evaluate:
        return self.shared.plain if self.merges else self.opened.evaluator(self.apply)

    def evaluate(self, adapted: jlora.Adapted, split: Split) -> tuple[Scores, Scores | None]:
        """The scores of adapted parameters, of the new domain and of the old one."""
        params, old = self.merged(adapted), None
        new = self._evaluator(params, split, "new")
        if self.opened.old is not None:
            old = self._evaluator(params, split, "old")
        return new, old

    def adapted(self, seed: int, params: Params) -> jlora.Adapted:
        """The base, held as the run has it, with initial factors."""
        if self.starts_from_base:
            return self._started(seed, params)
        params = self.shared.held(self.run, params)
        run, opened, statistic = self.run, self.opened, self.run.method.acts.statistic
        if not statistic:
            return self._beside(params, jax.random.key(seed)).replace(base=params)
        batches, sites = self.batches(seed), self.shared.sites
        loss = lambda params, batch: opened.loss(params, batch, jax.random.key(seed))
        some = [batches(i) for i in range(self.shared.statistics)]
        found = jlora.measure(loss, params, some, sites, statistic, targets=run.targets)
        return self._apply(params, jax.random.key(seed), statistics=found)

    def _apply(self, params: Params, key: jax.Array, **statistics: Any) -> jlora.Adapted:
        run = self.run
        extras = self.shared.kept(run)
        options = statistics | ({"extras": extras} if extras else {})
        return jlora.apply(params, method=run.method, targets=run.targets, sites=self.shared.sites, key=key, **options)

    @functools.cached_property
    def _beside(self) -> Callable[[Params, jax.Array], jlora.Adapted]:
        """All of an adapter but its base, which is not copied. One program for all shapes of factors and all seeds."""
        return jax.jit(lambda params, key: self._apply(params, key).replace(base=None))

    def planned(self, params: Params) -> jlora.Adapted:
        """Shapes of the start: a base that is quantised with its factors has those of one that is quantised alone."""
        base = self.shared.hold(self.run, params)
        return self._apply(params, jax.random.key(0)).replace(base=base)

    def start(self, seed: int, params: Params, learning_rate: float | None = None) -> TrainState:
        """The state before the first step."""
        rate = self.first_rate if learning_rate is None else learning_rate
        kind = self.schedule.memory_kind
        return TrainState.create(self.adapted(seed, params), self.optimizer(rate), key=seed, memory_kind=kind)

    def result(self, state: TrainState) -> jlora.Adapted:
        """The adapter of a state as it is evaluated and kept: with averages of the factors, where there are some."""
        return state.adapted if self.schedule.ema is None else averaged(state, self.schedule.ema)

    def check(self, shapes: Params) -> None:
        """Finds a run that cannot be, on abstract parameters, before anything is trained.

        Raises:
          ConfigError: naming the run.
        """
        method, steps = self.run.method, self.steps
        total = dict(method.config).get("total_steps", steps)
        if total != steps:
            raise ConfigError(
                f"runs.{self.run.name}: {method.name} is made for total_steps={total}, and the run has {steps} steps"
            )
        run = self.run
        if method.acts.statistic:  # abstract parameters have no data to start from
            run = dataclasses.replace(run, method=jlora.lora(method.rank or 1))
        trainer = dataclasses.replace(self, run=run)
        try:
            self.optimizer(self.first_rate)
            found = jax.eval_shape(trainer.planned, shapes)
            _slowed(self.run.slower or {}).init(found.factors)
        except ValueError as error:
            raise ConfigError(f"runs.{self.run.name}: {error}") from error


def check_memory(name: str, schedule: Schedule) -> None:
    """Raises ConfigError where the optimizer's state cannot wait where the schedule called `name` has it."""
    try:
        host.check_programs(schedule.memory_kind)
    except ValueError as error:
        raise ConfigError(f"{name}.optimizer_memory={schedule.optimizer_memory}: {error}") from error


def optimizer(
    schedule: Schedule, learning_rate: float, steps: int, slower: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """AdamW with the schedule's warm-up and decay, its peak rate in the state.

    Args:
      schedule: of the rate.
      learning_rate: its peak.
      steps: of the run.
      slower: patterns of paths, and the part of the rate that these weights have: see `Run`.

    Raises:
      ConfigError: if no step is left after the warm-up.
    """
    warmup = round(schedule.warmup if schedule.warmup >= 1 else schedule.warmup * steps)
    if warmup >= steps:
        raise ConfigError(
            f"train.warmup={schedule.warmup:g} is {warmup} of the run's {steps} steps: none is left after it"
        )

    def adamw(peak: Any) -> optax.GradientTransformation:
        after: Any = {
            "linear": lambda: optax.linear_schedule(peak, 0.0, steps - warmup),
            "cosine": lambda: optax.cosine_decay_schedule(peak, steps - warmup),
            "constant": lambda: optax.constant_schedule(peak),
        }[schedule.decay]()
        rate = optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])
        rule = optax.adamw(
            rate, b1=schedule.b1, b2=schedule.b2, eps=schedule.epsilon, weight_decay=schedule.weight_decay
        )
        return rule if schedule.clip is None else optax.chain(optax.clip_by_global_norm(schedule.clip), rule)

    made: optax.GradientTransformation = optax.inject_hyperparams(adamw, hyperparam_dtype=jnp.float32)(
        peak=learning_rate
    )
    if slower:
        made = optax.chain(made, _slowed(slower))
    return made if schedule.ema is None else optax.chain(made, average(schedule.ema))


def _slowed(parts: Mapping[str, float]) -> optax.GradientTransformation:
    """Updates by path, each times the part of the first pattern that is found in its path."""

    def pattern_of(path: str) -> str | None:
        return next((pattern for pattern in parts if re.search(pattern, path)), None)

    def init(params: Params) -> optax.OptState:
        unused = [pattern for pattern in parts if pattern not in map(pattern_of, params)]
        if unused:
            raise ValueError(f"slower: {unused[0]!r} is the first found in no path of a weight that is trained")
        return optax.EmptyState()

    def update(updates: Params, state: optax.OptState, params: Params = None) -> tuple[Params, optax.OptState]:
        part = {path: parts.get(pattern_of(path) or "", 1.0) for path in updates}
        return {path: jax.tree.map(lambda x, p=part[path]: x * p, own) for path, own in updates.items()}, state

    return optax.GradientTransformation(init, update)


# -- the loop ----------------------------------------------------------------------------------------------------------


def train(
    trainer: Trainer, seed: int, rate: float, params: Params, folder: Path, phase: Phase, *, test: bool = True
) -> Result:
    """Trains, or goes on after an interruption, or reads what an earlier call came to.

    The folder holds the adapter that is kept, the curve, the result, TensorBoard's events, and the training state up to
    the end. The state is kept after each evaluation, and the points up to it are on disk before it: a resumed run has
    the same numbers as one that was never cut off.

    Args:
      trainer: the run.
      seed, rate: of this training.
      params: the base.
      folder: of this training alone.
      phase: where progress is shown.
      test: score what is kept on the test split.
    """
    if (folder / _RESULT).exists():
        phase.skip("done before")
        return read_result(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with Checkpoints(folder / "training", keep=2) as checkpoints, TensorBoard(folder / "events") as board:
        points = _Points(trainer, folder, board)
        seconds, tokens, diverged = _loop(trainer, trainer.start(seed, params, rate), seed, points, checkpoints, phase)
        speed = tokens / seconds if seconds else 0.0
        result = Result(seed, rate, tuple(points.all), points.kept.step, speed, seconds, diverged=diverged)
        if test:
            result = _tested(trainer, result, folder, params, board, phase)
    write_json(folder / _RESULT, dataclasses.asdict(result))
    shutil.rmtree(folder / "training", ignore_errors=True)  # there is nothing left to go on with
    return result


def _loop(
    trainer: Trainer, state: TrainState, seed: int, points: "_Points", checkpoints: Checkpoints, phase: Phase
) -> tuple[float, int, str | None]:
    """All steps that are left. Returns seconds and tokens of training, and the words of an error."""
    every, batches, steps = trainer.in_steps(trainer.schedule.evaluate_every), trainer.batches(seed), trainer.steps
    drawn = trainer.schedule.pictures_every
    sheet_every = 0 if drawn is None or trainer.opened.pictures is None else trainer.in_steps(drawn)
    state, position = restored(checkpoints, state, phase.say)
    done, (seconds, tokens) = int(state.step), position or (0.0, 0)
    points.read(done)
    if not points.all:
        points.add(0, [], trainer.result(state))
    if sheet_every and not done:
        points.draw(0, state.adapted)
    phase.begin(done)
    losses: list[jax.Array] = []
    try:
        for i in range(done, steps):
            began, batch = time.monotonic(), batches(i)
            with jax.transfer_guard("disallow"):  # what goes to the device and back is written down as such
                state, metrics = trainer.step(state, batch)
            losses.append(metrics["loss"])
            # Half a period before the last evaluation there is no other: 155 steps by 77 have two, not three.
            end = i + 1 == steps or ((i + 1) % every == 0 and steps - i - 1 >= every / 2)
            if end or i == done:
                state.check()  # the first step is compiled: it is waited for, and not counted
            if i != done:
                seconds, tokens = seconds + time.monotonic() - began, tokens + trainer.opened.tokens(batch)
            if len(losses) > 1:  # the one before the last is there already: the step has looked at it
                points.training(i, float(jax.device_get(losses[-2])), tokens / max(seconds, 1e-9), phase)
            phase.advance(i + 1)
            if sheet_every and (i + 1) % sheet_every == 0:
                points.draw(i + 1, trainer.result(state))
            if end:
                points.add(i + 1, losses, trainer.result(state))
                checkpoints.save(state, [seconds, tokens])
                phase.line(i + 1, points.text())
                losses = []
    except FloatingPointError as error:
        words = str(error).split(" (", 1)[0]
        phase.say(f"{phase.title}: {words}")
        return seconds, tokens, words
    return seconds, tokens, None


def score(trainer: Trainer, result: Result, folder: Path, params: Params, phase: Phase) -> Result:
    """The result of an earlier training with the scores on the test split, which are written down."""
    if result.test is None:
        with TensorBoard(folder / "events") as board:
            result = _tested(trainer, result, folder, params, board, phase)
        write_json(folder / _RESULT, dataclasses.asdict(result))
    return result


def _tested(trainer: Trainer, result: Result, folder: Path, params: Params, board: TensorBoard, phase: Phase) -> Result:
    new, old = trainer.evaluate(loaded(folder, trainer.held(params, result.seed)), "test")
    board.scalars(trainer.steps, _named("test", new, old))
    phase.say(f"{phase.title}: test {_text(new)}, of step {result.best}")
    return dataclasses.replace(result, test=new, old=old)


class _Points:
    """The curve of a run, in memory and on disk, and the adapter at the point that is kept."""

    def __init__(self, trainer: Trainer, folder: Path, board: TensorBoard) -> None:
        self.all: list[Point] = []
        self._trainer, self._folder, self._board = trainer, folder, board

    @property
    def kept(self) -> Point:
        """The point that is a run's result."""
        if self._trainer.schedule.keep == "last":
            return self.all[-1]
        best = self.all[0]
        for point in self.all[1:]:
            if self._trainer.opened.selection_metric.beats(point.scores, best.scores):
                best = point
        return best

    def read(self, done: int) -> None:
        """Points that an interrupted run left, up to the state that is gone on from."""
        self.all = [point for point in read_curve(self._folder) if point.step <= done]

    def add(self, step: int, losses: list[jax.Array], adapted: jlora.Adapted) -> None:
        loss = float(np.mean(jax.device_get(losses))) if losses else None
        point = Point(step, loss, *self._trainer.evaluate(adapted, "validation"))
        self.all.append(point)
        if self.kept is point:
            jlora.save(self._folder / "adapter", adapted)
        write_json(self._folder / _CURVE, [dataclasses.asdict(point) for point in self.all])
        self._board.scalars(step, _named("validation", point.scores, point.old))

    def draw(self, step: int, adapted: jlora.Adapted) -> None:
        """A sheet of pictures, beside the curve."""
        pictures = self._trainer.opened.pictures
        assert pictures is not None
        folder = self._folder / "sheets"
        folder.mkdir(exist_ok=True)
        draw(folder / f"step_{step:06d}.png", {f"step {step}": pictures(self._trainer.merged(adapted))})

    def training(self, step: int, loss: float, speed: float, phase: Phase) -> None:
        """Losses that a step reports."""
        self._board.scalars(step, {"train/loss": loss, "train/tokens_per_second": speed})
        phase.note(f"loss {loss:.3f}  {speed:,.0f} tokens/s")

    def text(self) -> str:
        """The last evaluation."""
        point = self.all[-1]
        return _text(point.scores) + ("" if point.old is None else f"  old: {_text(point.old)}")


def read_curve(folder: Path) -> tuple[Point, ...]:
    """The evaluations that `train` left in a folder."""
    path = folder / _CURVE
    return read_json(path, lambda curve: tuple(Point(**point) for point in curve)) if path.exists() else ()


def read_result(folder: Path) -> Result:
    """Result that `train` left in a folder."""
    return read_json(folder / _RESULT, as_result)


def as_result(read: Mapping[str, Any]) -> Result:
    """A result from its JSON form."""
    return Result(**{**read, "points": tuple(Point(**point) for point in read["points"])})


def is_finite(result: Result) -> bool:
    """Whether a training came to its end with a loss that is a number."""
    return result.diverged is None and math.isfinite(result.kept.scores.get("loss", 0.0))


def _named(split: str, new: Scores, old: Scores | None) -> dict[str, float]:
    return {f"{split}/{name}": x for name, x in new.items()} | {f"{split}_old/{n}": x for n, x in (old or {}).items()}


def _text(scores: Scores) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
