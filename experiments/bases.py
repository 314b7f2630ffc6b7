"""Where a base comes from: a checkpoint of the hub, of a folder or made, or a pretraining here, which is kept."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import jlora
from experiments import devices, hosts
from experiments.config import Experiment, Pretrain, Run
from experiments.configfile import ConfigError, describe, key
from experiments.folder import by_first_locked, clear, replace, size
from experiments.loop import Point, read_curve, train
from experiments.progress import Phase
from experiments.resume import loaded
from experiments.tasks.task import Files, Opened, Params
from experiments.trainer import Shared, Trainer
from jlora import tree

NAME = "base.safetensors"
LABEL = "pretraining"


@dataclass(frozen=True, eq=False)
class Base:
    """Base that the runs start from.

    Attributes:
      params: seed -> the parameters, a new head's values being the seed's.
      bytes: of its file.
      curve: of its pretraining.
    """

    params: Callable[[int], Params]
    bytes: int
    curve: tuple[Point, ...] = ()


def source(experiment: Experiment, folder: Path) -> Any:
    """Source that the task opens: the checkpoint's files, or the config of the model that is pretrained.

    A checkpoint that is made lies beside the folders of the experiments.
    """
    base = experiment.base
    if isinstance(base, Pretrain):
        return base.model
    if callable(base):
        made = hosts.by_first(lambda: str(base(folder.parent / "checkpoints" / experiment.name)))
        return Files(Path(made), experiment.options)
    from jlora.models.files import folder_of

    if not base:
        raise ConfigError("base=... names no checkpoint: a folder, or a repository such as openai-community/gpt2")
    return Files(folder_of(base, experiment.revision), experiment.options)


def trainer_of(experiment: Experiment, shared: Shared) -> Trainer:
    """The pretraining of a base: full fine-tuning of random parameters on the old domain."""
    base = experiment.base
    assert isinstance(base, Pretrain)
    run = Run(LABEL, LABEL, jlora.full(), base.learning_rate)
    return Trainer(run, shared, base.train, base.learning_rate, side="old")


def of_checkpoint(opened: Opened, seed: int, load: Callable[[int], Params]) -> Base:
    """A checkpoint's parameters, those of one seed at a time: the old ones go before new ones come.

    Args:
      opened: the task.
      seed: the first.
      load: seed -> the parameters, as all runs hold them.
    """
    there: dict[int, Params] = {seed: load(seed)}
    total = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in tree.leaves(there[seed])[0].values())

    def params(seed: int) -> Params:
        if seed not in there and opened.head:  # another head
            there.clear()
            there[seed] = load(seed)
        return next(iter(there.values()))

    return Base(params, total)


def pretrained(
    trainer: Trainer,
    folder: Path,
    seed: int,
    phase: Phase,
    hold: Callable[[Params], Params] | None = None,
    *,
    resume: bool = False,
) -> Base:
    """The base from a file in `folder` if there is one with the same model, data and pretraining, else trained.

    Args:
      trainer: of the base, see `trainer_of`.
      folder: of bases of all kinds; each has a folder of its own in it.
      seed: of the initial values and the batches.
      phase: where progress is shown.
      hold: gives the parameters as all runs hold them; None leaves them as they are.
      resume: keep what an interrupted pretraining left.

    Raises:
      FloatingPointError: if the pretraining diverges.
      ConfigError: if the file is damaged, or another process is at the same base.
    """
    opened = trainer.opened
    model = {"class": type(opened.model).__name__, "shape": describe(opened.model.config)}
    own = folder / key(model, trainer.schedule, trainer.first_rate, seed, opened.old_digest or opened.digest)
    initial = devices.current().placed(opened.params(seed))
    if hosts.said_by_first((own / NAME).exists()):
        phase.skip(f"reused from {own}")
    else:
        with by_first_locked(own):  # other experiments have the same base
            if not resume and hosts.is_first():
                clear(own)
            hosts.wait_for_all("the base begins")
            result = train(trainer, seed, trainer.first_rate, initial, own, phase, test=False)
            if result.diverged:
                raise FloatingPointError(f"the base: {result.diverged}")
            write(own, trainer.merged(loaded(own, initial)))
            if hosts.is_first():
                shutil.rmtree(own / "adapter")
    params = devices.current().placed(read(own, initial))
    params = params if hold is None else hold(params)
    return Base(lambda _: params, size(own / NAME), read_curve(own))


def write(folder: Path, params: Params) -> None:
    """Writes parameters under their paths ("h_0/attn/query/kernel"): one file, whole or absent."""
    flat = traverse_util.flatten_dict(devices.current().fetched(params), sep="/")
    contiguous = lambda: {path: np.ascontiguousarray(leaf) for path, leaf in flat.items()}
    replace(folder / NAME, lambda temporary: save_file(contiguous(), temporary))
    hosts.wait_for_all(f"{NAME} is written")


def read(folder: Path, like: Params) -> Params:
    """Reads the parameters of a model that is initialised as `like`.

    Raises:
      ConfigError: if the file is damaged or holds other tensors.
    """
    file = folder / NAME
    try:
        flat = load_file(file)
    except SafetensorError as error:
        raise ConfigError(f"the base in '{file}' is damaged ({error}): delete it to pretrain again") from error
    expected = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(like, sep="/").items()}
    if {path: leaf.shape for path, leaf in flat.items()} != expected:
        raise ConfigError(f"the base in '{file}' has other tensors than the model: delete it to pretrain again")
    return jax.device_put(traverse_util.unflatten_dict(flat, sep="/"))
