"""The end of a run as a checkpoint of its own: the base's weights with what was learned added to them.

The folder is one of the base's format, with the tokenizer's files and the names of the classes: `jlora.models.load` and
transformers' `from_pretrained` read it, and nothing of jlora is needed to use it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jlora
from experiments.config import Experiment
from experiments.configfile import ConfigError
from experiments.folder import size, write_json
from experiments.resume import loaded
from experiments.tasks.task import Files, Params
from experiments.trial import Trial
from jlora import models
from jlora.models.catalogue import architecture_of
from jlora.models.place import folder_of

MARK = "jlora_run.json"
"""Says which run a folder was saved from, so that the same one may write it again."""
_READERS = {True: "jlora.models.load and transformers", False: "jlora.models.diffusion.load and diffusers"}
_LOST = 0.05  # of an update's size: a merge that loses more is not passed over in silence


def check(experiment: Experiment, trials: Sequence[Trial]) -> None:
    """Finds what cannot be saved, before anything is trained.

    Args:
      experiment: says where.
      trials: the runs.

    Raises:
      ConfigError: for a method that has no weights to merge into, or a folder that holds something else.
    """
    for trial, folder in _places(experiment, trials):
        opened = trial.trainer.opened
        if opened.save is None and architecture_of(opened.model.config) is None:
            raise ConfigError(
                f"save.merged: a {type(opened.model).__name__} that is pretrained here has no file format"
            )
        if folder.exists() and not (
            folder.is_dir() and (not any(folder.iterdir()) or _mine(folder, experiment, trial))
        ):
            raise ConfigError(
                f"save.merged: '{folder}' is there already, and was not saved by this run: name another folder"
            )
        for part, _ in trial.run.method.parts:
            if part.acts.unmergeable:
                raise ConfigError(f"save.merged: runs.{trial.run.name}: {part.name} {part.acts.unmergeable}")


def write(experiment: Experiment, trials: Sequence[Trial], params: Params, source: object) -> list[str]:
    """Writes the merged checkpoints, and says where they are.

    Args:
      experiment: says where.
      trials: the runs, trained.
      params: the base, with the first seed's head.
      source: the files of the checkpoint that the base comes from, if it does from one.
    """
    lines = []
    for trial, folder in _places(experiment, trials):
        if not trial.results:
            lines.append(f"merged    nothing is saved of {trial.run.label}: it diverged")
            continue
        adapted, opened = loaded(trial.place, trial.held(params)), trial.trainer.opened
        origin = source.folder if isinstance(source, Files) else None
        plain = jlora.dequantize(jlora.merge(adapted))
        if opened.save is None:
            models.save(folder, opened.model, plain, source=origin)
        else:
            opened.save(folder, plain)
        if opened.classes:
            _name_classes(folder, opened.classes)
        write_json(folder / MARK, _of(experiment, trial))
        megabytes = f"{size(folder) / 1e6:,.1f} MB"
        lines.append(f"merged    {trial.run.label}: {folder}, {megabytes}, for {_READERS[opened.save is None]}")
        lost = max(jlora.merge_error(adapted).values(), default=0.0)
        if lost > _LOST:
            lines.append(
                f"note      the base's dtype takes {100 * lost:.0f} % of a weight's update away; train and save from a "
                "float32 base: options={'param_dtype': 'float32'} in the config"
            )
    return lines


def _places(experiment: Experiment, trials: Sequence[Trial]) -> list[tuple[Trial, Path]]:
    """The folder of each run; none where nothing is saved."""
    if experiment.save.merged is None:
        return []
    try:
        folder = folder_of(experiment.save.merged)
    except ValueError as error:
        raise ConfigError(f"save.merged: {error}") from error
    return [(trial, folder / trial.run.name if len(trials) > 1 else folder) for trial in trials]


def _of(experiment: Experiment, trial: Trial) -> dict[str, str]:
    return {"experiment": experiment.name, "run": trial.run.name}


def _mine(folder: Path, experiment: Experiment, trial: Trial) -> bool:
    try:
        return bool(json.loads((folder / MARK).read_text()) == _of(experiment, trial))
    except (OSError, ValueError):
        return False


def _name_classes(folder: Path, classes: Sequence[str]) -> None:
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record["id2label"] = {str(number): name for number, name in enumerate(classes)}
    record["label2id"] = {name: number for number, name in enumerate(classes)}
    write_json(path, record)
