"""One run: a method, a seed, a training loop that keeps what was best on the validation split."""

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jlora
from experiments.board import Board
from experiments.config import ConfigError, in_steps
from experiments.finetuning.schedule import Run, Schedule
from experiments.finetuning.work import Apply, Params, Scores, Split, Work
from experiments.folder import read_json, write_json
from experiments.progress import Live
from experiments.resume import restored
from jlora.checkpoint import Checkpoints
from jlora.state import TrainState
from jlora.train import Step, train_step

_RESULT, _CURVE = "result.json", "curve.json"


@dataclass(frozen=True)
class Point:
    """An evaluation on the validation split: the step, the mean training loss since the last one, the scores."""

    step: int
    loss: float | None
    scores: Scores


@dataclass(frozen=True)
class Result:
    """What a run with a seed came to.

    Attributes:
      seed: of it.
      points: its evaluations.
      best: the step whose evaluation decided.
      test: the scores there, on the test split.
      tokens_per_second: in training, evaluations and the first step, which is compiled, aside.
      seconds: of those steps.
      diverged: the error's words; the run's result is what was best before.
    """

    seed: int
    points: tuple[Point, ...]
    best: int
    test: Scores
    tokens_per_second: float
    seconds: float
    diverged: str | None = None


@dataclass(frozen=True, eq=False)
class Trainer:
    """A run's programs: each is compiled once, for all seeds.

    `sites` are the axes of the model's weights, as its loss uses them: no name says those of stacked layers.
    """

    run: Run
    work: Work
    schedule: Schedule
    sites: tuple[jlora.Site, ...]

    @property
    def steps(self) -> int:
        """Of the run."""
        return self.in_steps(self.schedule.length)

    def in_steps(self, duration: int | str) -> int:
        """A duration in this run's steps."""
        return in_steps(duration, batch=self.schedule.batch, examples=self.work.examples)

    @functools.cached_property
    def step(self) -> Step:
        """The training step."""
        tx = optimizer(self.schedule, self.run.learning_rate, self.steps)
        return train_step(self.work.loss, tx, pass_key=True, accumulate=self.schedule.accumulate)

    @functools.cached_property
    def apply(self) -> Apply:
        """How the model is called for an evaluation: as it is with merged weights, lifted where there are none."""
        return self.work.model.apply if self.merges else jlora.lift(self.work.model.apply)

    @property
    def merges(self) -> bool:
        """Whether the method gives plain weights, and those of the base take the update without rounding it away."""
        config: Any = self.work.model.config
        return not self.run.method.acts.unmergeable and config.param_dtype == "float32"

    @functools.cached_property
    def merged(self) -> Callable[[jlora.Adapted], Params]:
        """What `apply` takes."""
        return jax.jit(jlora.merge) if self.merges else lambda adapted: adapted

    @functools.cached_property
    def evaluate(self) -> Callable[[jlora.Adapted, Split], Scores]:
        """The scores of adapted parameters."""
        evaluator = self.work.evaluator(self.apply)
        return lambda adapted, split: evaluator(self.merged(adapted), split)

    def start(self, seed: int, params: Params) -> TrainState:
        """The state before the first step."""
        run, work = self.run, self.work
        extras = "|".join(f"(?:{pattern})" for pattern in (work.head, run.extras) if pattern)
        options: dict[str, Any] = {"sites": self.sites} | ({"extras": extras} if extras else {})
        if run.method.acts.statistic:
            batches = work.batches(self.schedule.batch, seed)
            fn, some = (
                lambda params, batch: work.loss(params, batch, jax.random.key(seed)),
                [batches(i) for i in range(4)],
            )
            kind = run.method.acts.statistic
            options["statistics"] = jlora.measure(fn, params, some, self.sites, kind, targets=run.targets)
        adapted = jlora.apply(params, method=run.method, targets=run.targets, key=seed, **options)
        return TrainState.create(adapted, self.step.tx, key=seed)


def optimizer(schedule: Schedule, learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with the schedule's warm-up and decay."""
    warmup = round(schedule.warmup if schedule.warmup >= 1 else schedule.warmup * steps)
    if warmup >= steps:
        raise ConfigError(
            f"train.warmup={schedule.warmup:g} is {warmup} of the run's {steps} steps: none is left after it"
        )
    rise = optax.linear_schedule(0.0, learning_rate, max(warmup, 1))
    after: Any = {
        "linear": optax.linear_schedule(learning_rate, 0.0, steps - warmup),
        "cosine": optax.cosine_decay_schedule(learning_rate, steps - warmup),
        "constant": optax.constant_schedule(learning_rate),
    }[schedule.decay]
    rate = optax.join_schedules([rise, after], [warmup])
    adamw = optax.adamw(rate, b1=schedule.b1, b2=schedule.b2, eps=schedule.epsilon, weight_decay=schedule.weight_decay)
    return adamw if schedule.clip is None else optax.chain(optax.clip_by_global_norm(schedule.clip), adamw)


def train(trainer: Trainer, seed: int, params: Params, folder: Path, live: Live, label: str) -> Result:
    """Trains, or goes on after an interruption, or reads what an earlier call came to.

    The folder holds the adapter that was best on the validation split, the curve, the result, TensorBoard's events, and
    the training state up to the end.
    """
    if (folder / _RESULT).exists():
        live.skip(label, "done before")
        return read_result(folder)
    folder.mkdir(parents=True, exist_ok=True)
    work, every = trainer.work, trainer.in_steps(trainer.schedule.evaluate_every)
    batches, state = work.batches(trainer.schedule.batch, seed), trainer.start(seed, params)
    diverged: str | None = None
    with Checkpoints(folder / "training", keep=2) as checkpoints, Board(folder / "events") as board:
        points, seconds, tokens = _Points(trainer, folder, board), 0.0, 0
        state, position = restored(checkpoints, state, live.say)
        done = int(state.step)
        if position is not None:
            seconds, tokens = position
        points.read(done)
        if not points.all:
            points.add(0, [], state.adapted)
        live.begin(label, done)
        losses: list[jax.Array] = []
        try:
            for i in range(done, trainer.steps):
                began = time.monotonic()
                batch = batches(i)
                with jax.transfer_guard("disallow"):
                    state, metrics = trainer.step(state, batch)
                losses.append(metrics["loss"])
                # Half a period before the last evaluation there is no other: 155 steps by 77 have two, not three.
                end = i + 1 == trainer.steps or ((i + 1) % every == 0 and trainer.steps - i - 1 >= every / 2)
                if end:
                    state.check()
                if i == done:
                    state.check()  # the first step is compiled: it is waited for, and not counted
                else:
                    seconds, tokens = seconds + time.monotonic() - began, tokens + work.tokens(batch)
                if len(losses) > 1:  # the one before the last is there already: the step has looked at it
                    loss = float(jax.device_get(losses[-2]))
                    board.scalars(i, {"train/loss": loss, "train/tokens_per_second": tokens / max(seconds, 1e-9)})
                    live.note(label, f"loss {loss:.3f}  {tokens / max(seconds, 1e-9):,.0f} tokens/s")
                live.advance(label, i + 1)
                if end:
                    points.add(i + 1, losses, state.adapted)
                    checkpoints.save(state, [seconds, tokens])
                    live.line(label, i + 1, points.text())
                    losses = []
        except FloatingPointError as error:
            diverged = str(error).split(" (", 1)[0]
            live.say(f"{label}: {diverged}")
        best = jlora.load(folder / "adapter", params)
        result = Result(
            seed, tuple(points.all), points.best.step, trainer.evaluate(best, "test"),
            tokens / seconds if seconds else 0.0, seconds, diverged,
        )  # fmt: skip
        board.scalars(trainer.steps, {f"test/{name}": value for name, value in result.test.items()})
    write_json(folder / _RESULT, dataclasses.asdict(result))
    shutil.rmtree(folder / "training", ignore_errors=True)  # there is nothing left to go on with
    live.say(f"{label}: test {_text(result.test)}, of step {result.best}")
    return result


class _Points:
    """The curve of a run, in memory and on disk, and the adapter at its best point."""

    def __init__(self, trainer: Trainer, folder: Path, board: Board) -> None:
        self.all: list[Point] = []
        self._trainer, self._folder, self._board = trainer, folder, board

    @property
    def best(self) -> Point:
        """The point that decides."""
        best = self.all[0]
        for point in self.all[1:]:
            if self._trainer.work.decides.beats(point.scores, best.scores):
                best = point
        return best

    def read(self, done: int) -> None:
        """What an interrupted run left, up to the state that is gone on from."""
        path = self._folder / _CURVE
        if path.exists():
            read = read_json(path, lambda curve: list(map(_point, curve)))
            self.all = [point for point in read if point.step <= done]

    def add(self, step: int, losses: list[jax.Array], adapted: jlora.Adapted) -> None:
        loss = float(np.mean(jax.device_get(losses))) if losses else None
        self.all.append(Point(step, loss, self._trainer.evaluate(adapted, "validation")))
        if self.best is self.all[-1] or step == 0:
            jlora.save(self._folder / "adapter", adapted)
        write_json(self._folder / _CURVE, [dataclasses.asdict(point) for point in self.all])
        scores = self.all[-1].scores
        self._board.scalars(step, {f"validation/{name}": value for name, value in scores.items()})

    def text(self) -> str:
        return _text(self.all[-1].scores)


def read_result(folder: Path) -> Result:
    """What `train` left in a folder."""
    return read_json(folder / _RESULT, as_result)


def as_result(read: Mapping[str, Any]) -> Result:
    """A result from its JSON form."""
    return Result(**{**read, "points": tuple(map(_point, read["points"]))})


def _point(read: dict[str, Any]) -> Point:
    return Point(**read)


def _text(scores: Scores) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
