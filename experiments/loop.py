"""The training loop of every run and of a pretrained base: evaluations, what is kept of them, going on, stopping."""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora
from experiments import hosts
from experiments.ahead import Ahead
from experiments.folder import read_json, write_json
from experiments.launch.exits import Preempted, held_back
from experiments.progress import Phase
from experiments.resume import loaded, restored
from experiments.sheet import draw
from experiments.tasks.task import Params, Scores
from experiments.tensorboard import TensorBoard
from experiments.trainer import Trainer
from jlora.checkpoint import Checkpoints
from jlora.state import TrainState

_RESULT, _CURVE = "result.json", "curve.json"
_SLOW = 0.05  # of the time: what waiting for data is spoken of from here on


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


def train(
    trainer: Trainer, seed: int, rate: float, params: Params, folder: Path, phase: Phase, *, test: bool = True
) -> Result:
    """Trains, or goes on after an interruption, or reads what an earlier call came to.

    The folder holds the adapter that is kept, the curve, the result, TensorBoard's events, and the training state up to
    the end. The state is kept after each evaluation, and the points up to it are on disk before it: a resumed run has
    the same numbers as one that was never cut off. It is kept, too, after the step in which SIGTERM came.

    Args:
      trainer: the run.
      seed, rate: of this training.
      params: the base.
      folder: of this training alone.
      phase: where progress is shown.
      test: score what is kept on the test split.
    """
    done = hosts.by_first(lambda: dataclasses.asdict(read_result(folder)) if (folder / _RESULT).exists() else None)
    if done is not None:
        phase.skip("done before")
        return as_result(done)
    folder.mkdir(parents=True, exist_ok=True)
    with Checkpoints(folder / "training", keep=2) as checkpoints, TensorBoard(folder / "events") as board:
        points = _Points(trainer, folder, board)
        seconds, tokens, diverged = _loop(trainer, trainer.start(seed, params, rate), seed, points, checkpoints, phase)
        speed = tokens / seconds if seconds else 0.0
        result = Result(seed, rate, tuple(points.all), points.kept.step, speed, seconds, diverged=diverged)
        if test:
            result = _tested(trainer, result, folder, params, board, phase)
    write_json(folder / _RESULT, dataclasses.asdict(result))
    hosts.wait_for_all("a training is over")
    if hosts.is_first():
        shutil.rmtree(folder / "training", ignore_errors=True)  # there is nothing left to go on with
    return result


def _loop(
    trainer: Trainer, state: TrainState, seed: int, points: "_Points", checkpoints: Checkpoints, phase: Phase
) -> tuple[float, int, str | None]:
    """All steps that are left. Returns seconds and tokens of training, and the words of an error.

    Raises:
      Preempted: after SIGTERM, with the state kept.
    """
    steps, drawn = trainer.steps, trainer.schedule.pictures_every
    sheet_every = 0 if drawn is None or trainer.opened.pictures is None else trainer.in_steps(drawn)
    state, position = restored(checkpoints, state, phase.say)
    done, run = int(state.step), _Position.of(position)
    points.read(done)
    if not points.all or (trainer.is_evaluated(done) and points.all[-1].step < done):
        points.add(done, run.losses, trainer.result(state))
    if points.all[-1].step == done:  # also where SIGTERM came behind the evaluation
        run.losses = []
    run.reported = len(run.losses)
    if sheet_every and not done:
        points.draw(0, state.adapted)
    phase.begin(done)
    try:
        with Ahead(trainer.batches(seed), done, steps) as batches:
            for i in range(done, steps):
                # The first step is compiled, for longer than machines are left after SIGTERM, and nothing is lost yet.
                with held_back() if i > done else contextlib.nullcontext():
                    state = _stepped(trainer, state, batches, run, i == done, points, phase)
                    if hosts.is_told_to_stop():
                        checkpoints.save(state, run.as_json())
                        raise Preempted
                try:
                    if sheet_every and (i + 1) % sheet_every == 0:
                        points.draw(i + 1, trainer.result(state))
                    if trainer.is_evaluated(i + 1):
                        points.add(i + 1, run.losses, trainer.result(state))
                except Preempted:
                    checkpoints.save(state, run.as_json())
                    raise
                if trainer.is_evaluated(i + 1):
                    run.losses, run.reported = [], 0
                    checkpoints.save(state, run.as_json())
                    phase.line(i + 1, points.text() + run.waiting)
    except FloatingPointError as error:
        words = str(error).split(" (", 1)[0]
        phase.say(f"{phase.title}: {words}")
        return run.seconds, run.tokens, words
    return run.seconds, run.tokens, None


def _stepped(
    trainer: Trainer, state: TrainState, batches: Ahead, run: "_Position", first: bool, points: "_Points", phase: Phase
) -> TrainState:
    """One step. It reports the loss of the step before the last, which the step has looked at: nobody waits for it."""
    began, waited = time.monotonic(), batches.waited
    batch = next(batches)
    with jax.transfer_guard("disallow"):  # what goes to the device and back is written down as such
        state, metrics = trainer.step(state, batch)
    run.losses.append(metrics["loss"])
    step = batches.given
    waits = trainer.is_evaluated(step) or first  # the first step is compiled, and not counted
    if waits:
        state.check()
    if not first:
        run.seconds, run.waited = run.seconds + time.monotonic() - began, run.waited + batches.waited - waited
        run.tokens += trainer.tokens(batch)
    count = len(run.losses)
    for i in range(run.reported, count if waits else count - 2):
        points.training(step - count + 1 + i, float(jax.device_get(run.losses[i])), run, phase)
        run.reported = i + 1
    phase.advance(step)
    return state


@dataclass
class _Position:
    """Position of a run, beside its state.

    Attributes:
      seconds, tokens: of all steps but the first after each start.
      losses: of the steps since the last evaluation.
      waited: those of the seconds that went by before a batch was there.
      reported: how many of the losses were.
    """

    seconds: float = 0.0
    tokens: int = 0
    losses: list[Any] = dataclasses.field(default_factory=list)
    waited: float = 0.0
    reported: int = 0

    @classmethod
    def of(cls, kept: Sequence[Any] | None) -> "_Position":
        """From `as_json`; runs of before kept seconds and tokens alone."""
        there, unsaid = list(kept or ()), [0.0, 0, [], 0.0]
        seconds, tokens, losses, waited = there + unsaid[len(there) :]
        return cls(seconds, tokens, [np.float32(x) for x in losses], waited)

    def as_json(self) -> list[Any]:
        """As a checkpoint keeps it; losses are float32, and so they come back."""
        return [self.seconds, self.tokens, [float(x) for x in jax.device_get(self.losses)], self.waited]

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def waiting(self) -> str:
        """Words on a reader that is slower than the steps; none of one that is not."""
        share = self.waited / self.seconds if self.seconds else 0.0
        return f"  {100 * share:.0f} % of the time waiting for data" if share >= _SLOW else ""


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
        there = hosts.by_first(lambda: [dataclasses.asdict(point) for point in read_curve(self._folder)])
        self.all = [Point(**point) for point in there if point["step"] <= done]

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

    def training(self, step: int, loss: float, run: "_Position", phase: Phase) -> None:
        """Losses that a step reports."""
        self._board.scalars(step, {"train/loss": loss, "train/tokens_per_second": run.speed})
        phase.note(f"loss {loss:.3f}  {run.speed:,.0f} tokens/s{run.waiting}")

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
