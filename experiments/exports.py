"""The end of a run in files of other programs: the base with what was learned added to it, and the adapter alone.

A merged folder is one of the base's format, with the tokenizer's files and the names of the classes:
`jlora.models.load` and transformers' `from_pretrained` read it, and nothing of jlora is needed to use it. An adapter's
folder is Hugging Face PEFT's; that of Stable Diffusion's holds diffusers' `pytorch_lora_weights.safetensors`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jlora
from experiments import devices
from experiments.config import Experiment
from experiments.configfile import ConfigError
from experiments.folder import size, temporary_of, write_json
from experiments.resume import loaded
from experiments.tasks.task import Files, Params
from experiments.trial import Trial
from jlora import models
from jlora.models.catalogue import architecture_of
from jlora.models.place import folder_of

MARK = "jlora_run.json"
"""Says which run saves in a folder, from before the first file on, so that the same one may write it again."""
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
    for field, trial, folder in _places(experiment, trials):
        opened = trial.trainer.opened
        if opened.save is None and architecture_of(opened.model.config) is None:
            raise ConfigError(
                f"save.{field}: a {type(opened.model).__name__} that is pretrained here has no file format"
            )
        if folder.exists() and not (folder.is_dir() and (_is_empty(folder) or _mine(folder, experiment, trial))):
            raise ConfigError(
                f"save.{field}: '{folder}' is there already, and was not saved by this run: name another folder"
            )
        for part, _ in trial.run.method.parts if field == "merged" else ():
            if part.acts.unmergeable:
                raise ConfigError(f"save.merged: runs.{trial.run.name}: {part.name} {part.acts.unmergeable}")
    folders = [folder.resolve() for _, _, folder in _places(experiment, trials)]
    if len(set(folders)) < len(folders):
        raise ConfigError("save.adapter: a folder of its own; beside the merged weights it would be added once more")
    if experiment.save.adapter is not None and all(trial.run.is_full for trial in trials):
        raise ConfigError("save.adapter: full fine-tuning has no adapter; save.merged writes its checkpoint")


def write(experiment: Experiment, trials: Sequence[Trial], params: Params, source: object) -> list[str]:
    """Writes the merged checkpoints and the adapters, and says where they are.

    Args:
      experiment: says where.
      trials: the runs, trained.
      params: the base, with the first seed's head.
      source: the files of the checkpoint that the base comes from, if it does from one.
    """
    lines = []
    for field, trial, folder in _places(experiment, trials):
        if not trial.results:
            lines.append(f"{field:<9} nothing is saved of {trial.run.label}: it diverged")
            continue
        adapted = loaded(trial.place, trial.held(params))
        if field == "adapter":
            whole = devices.current().gathered(adapted)
            lines += [] if whole is None else [_write_adapter(experiment, trial, folder, whole)]
        else:
            lines += _write_merged(experiment, trial, folder, adapted, source)
    return lines


def _write_merged(
    experiment: Experiment, trial: Trial, folder: Path, adapted: jlora.Adapted, source: object
) -> list[str]:
    opened = trial.trainer.opened
    plain = devices.current().gathered(jlora.dequantize(jlora.merge(adapted)))
    lost = max(jlora.merge_error(adapted).values(), default=0.0)
    if plain is None:
        return []
    _claim(folder, experiment, trial)
    if opened.save is None:
        origin = source.folder if isinstance(source, Files) else None
        models.save(folder, opened.model, plain, source=origin)
    else:
        opened.save(folder, plain)
    if opened.classes:
        _name_classes(folder, opened.classes)
    megabytes = f"{size(folder) / 1e6:,.1f} MB"
    lines = [f"merged    {trial.run.label}: {folder}, {megabytes}, for {_READERS[opened.save is None]}"]
    if lost > _LOST:
        lines.append(
            f"note      the base's dtype takes {100 * lost:.0f} % of a weight's update away; train and save from a "
            "float32 base: options={'param_dtype': 'float32'} in the config"
        )
    return lines


def _write_adapter(experiment: Experiment, trial: Trial, folder: Path, adapted: jlora.Adapted) -> str:
    opened, base = trial.trainer.opened, experiment.base
    there = folder.exists()
    _claim(folder, experiment, trial)
    try:
        if opened.save_adapter is None:
            named = base if isinstance(base, str) else None
            jlora.peft.save(folder, adapted, model=opened.model, base=named, force=True)
        else:
            opened.save_adapter(folder, adapted)
    except ValueError as error:
        if [path.name for path in folder.iterdir()] == [MARK]:  # else it has what this run saved earlier
            (folder / MARK).unlink()
            if not there:
                folder.rmdir()
        return (
            f"note      no other program has a form for the adapter of {trial.run.label} ({error}): jlora.load reads "
            f"that of {trial.place}"
        )
    reader = "PeftModel.from_pretrained" if opened.save_adapter is None else "load_lora_weights of diffusers"
    return f"adapter   {trial.run.label}: {folder}, {size(folder) / 1e6:,.1f} MB, for {reader}"


def _places(experiment: Experiment, trials: Sequence[Trial]) -> list[tuple[str, Trial, Path]]:
    """The field of `save` and the folder of each run; none where nothing is saved."""
    places = []
    for field, named in (("merged", experiment.save.merged), ("adapter", experiment.save.adapter)):
        if named is None:
            continue
        try:
            folder = folder_of(named)
        except ValueError as error:
            raise ConfigError(f"save.{field}: {error}") from error
        places += [
            (field, trial, folder / trial.run.name if len(trials) > 1 else folder)
            for trial in trials
            if field == "merged" or not trial.run.is_full
        ]
    return places


def _of(experiment: Experiment, trial: Trial) -> dict[str, str]:
    return {"experiment": experiment.name, "run": trial.run.name}


def _is_empty(folder: Path) -> bool:
    """Whether nothing lies there but the half of a mark: see `_claim`."""
    return all(path == temporary_of(folder / MARK) for path in folder.iterdir())


def _claim(folder: Path, experiment: Experiment, trial: Trial) -> None:
    """Marks a folder as this run's before anything else lies in it: a run that is killed while it writes goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARK, _of(experiment, trial))


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
