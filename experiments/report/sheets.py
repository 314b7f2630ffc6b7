"""Sheets of pictures before and after each run."""

from collections.abc import Sequence
from pathlib import Path

import jlora
from experiments.resume import loaded
from experiments.sheet import draw
from experiments.tasks.task import Opened, Params, Sheet
from experiments.trial import Trial

SCALES = (0.0, 0.5, 1.0)


def sheets(opened: Opened, trials: Sequence[Trial], params: Params, folder: Path) -> None:
    """Writes `sheet_<run>.png` for each run's first seed, where the task draws pictures.

    Blocks from left to right: before, after with the factors apart, after with merged weights, and merged at parts of
    the update, where the method has such.
    """
    if opened.pictures is None:
        return
    before = opened.pictures(params)
    for trial in trials:
        if not trial.results:
            continue
        adapted = loaded(trial.place, trial.held(params))
        columns = {"before": before}
        if not trial.run.is_full:  # whose weights are all there is
            columns["after"] = opened.pictures(adapted)
        if trial.trainer.merges:
            columns["merged"] = opened.pictures(trial.trainer.merged(adapted))
            columns |= _scaled(opened, trial, adapted)
        draw(folder / f"sheet_{trial.run.name}.png", columns)


def _scaled(opened: Opened, trial: Trial, adapted: jlora.Adapted) -> dict[str, Sheet]:
    assert opened.pictures is not None
    if trial.run.is_full:
        return {}
    try:
        parts = {f"scale {s:g}": jlora.scale(adapted, s) for s in SCALES}
    except ValueError:  # of a method whose update has no parts, such as DoRA
        return {}
    return {name: opened.pictures(trial.trainer.merged(part)) for name, part in parts.items()}
