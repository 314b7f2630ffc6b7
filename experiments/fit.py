"""The training loop of the base and of every run: it evaluates, keeps its state, continues where it was cut off."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax

import jlora
from experiments.config import Train
from experiments.evaluate import Point, Scores, bits
from experiments.folder import read_json, write_json
from experiments.progress import Live
from experiments.resume import restored
from jlora.checkpoint import Checkpoints
from jlora.state import TrainState
from jlora.train import Step

Curve = tuple[Point, ...]


def optimizer(train: Train, learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a clipped gradient, a linear warm-up and a cosine to zero."""
    warmup = max(1, round(train.warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    adamw = optax.adamw(schedule, b2=train.b2, weight_decay=train.weight_decay)
    return optax.chain(optax.clip_by_global_norm(train.clip), adamw)


def fit(
    step: Step,
    state: TrainState,
    batches: Callable[[int], np.ndarray],
    steps: int,
    *,
    every: int,
    evaluate: Callable[[jlora.Adapted], Scores],
    folder: Path,
    live: Live,
    label: str,
) -> tuple[TrainState, Curve]:
    """Trains for `steps` steps, or for what is left of them after an interruption.

    `batches` is a function of the step, so that the step is all there is to the position in the data. The state is kept
    after each evaluation, and the points of the curve up to a kept state are on disk before it: a resumed run has the
    same numbers as one that was never cut off.

    Args:
      step, state: from `jlora.train_step` and `jlora.TrainState.create`.
      batches: step -> (batch, length + 1) int32.
      every: steps between evaluations.
      evaluate: the scores of an Adapted.
      folder: of this run; `training/` in it holds the states, `curve.json` the points.
      live, label: where progress is shown.

    Returns:
      The last state and the learning curve.

    Raises:
      FloatingPointError: at the first evaluation after a non-finite loss, naming the step.
    """
    with Checkpoints(folder / "training", keep=2) as checkpoints:
        state, _ = restored(checkpoints, state, live.say)
        done = int(state.step)
        curve = [point for point in read_curve(folder) if point.step <= done]
        if not curve:
            curve = [_point(0, [], evaluate(state.adapted))]
        live.begin(label, done)
        losses: list[jax.Array] = []
        for i in range(done, steps):
            with jax.transfer_guard("disallow"):  # what goes to the device and back is written down as such
                state, metrics = step(state, batches(i))
                losses.append(metrics["loss"])
                live.advance(label, i + 1)
                if (i + 1) % every and i + 1 < steps:
                    continue
                state.check()
                curve.append(_point(i + 1, losses, evaluate(state.adapted)))
            losses = []
            write_json(folder / "curve.json", [dataclasses.asdict(point) for point in curve])
            checkpoints.save(state)
            live.point(label, curve[-1])
    return state, tuple(curve)


def _point(step: int, losses: list[jax.Array], scores: Scores) -> Point:
    train = bits(float(np.mean(jax.device_get(losses)))) if losses else None
    return Point(step, train, scores.new, scores.old)


def read_curve(folder: Path) -> Curve:
    """The learning curve that `fit` left in a folder."""
    path = folder / "curve.json"
    return read_json(path, lambda curve: tuple(Point(**point) for point in curve)) if path.exists() else ()
