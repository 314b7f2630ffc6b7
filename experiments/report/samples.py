"""Texts of the model before and after."""

from collections.abc import Sequence
from pathlib import Path

from experiments.folder import write_text
from experiments.resume import loaded
from experiments.tasks.task import Opened, Params
from experiments.trial import Trial


def samples(opened: Opened, trials: Sequence[Trial], params: Params, folder: Path) -> str:
    """Lines of the base and of every run's first seed, which `samples.txt` keeps; "" where a task has none."""
    if opened.samples is None:
        return ""
    shown = [("before", opened.samples(trials[0].trainer.shared.apply, params))]
    for trial in trials:
        if trial.results:
            merged = trial.trainer.merged(loaded(trial.place, trial.held(params)))
            shown.append((trial.run.label, opened.samples(trial.trainer.apply, merged)))
    text = "\n".join(f"{label}:\n" + "\n".join(f"  {line}" for line in lines) for label, lines in shown)
    write_text(folder / "samples.txt", text + "\n")
    return text
