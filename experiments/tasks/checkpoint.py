"""The model of a checkpoint, with a task's head, and its tokenizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

from experiments import devices
from experiments.config import ConfigError
from experiments.tasks.task import Files, Params
from jlora import models


class Headed(NamedTuple):
    """A checkpoint's model with a head.

    Attributes:
      model: a linen module.
      params: seed -> its parameters; a new head's are the seed's. With `quantize`, `block` and `double` of
        `jlora.models.load` they are held in few bits from the file on.
    """

    model: Any
    params: Callable[..., Params]


def headed(source: Files, **options: Any) -> Headed:
    """The checkpoint's model, its config with these options but where the experiment's base has others."""
    settings = {**options, **source.options}
    here = devices.current()
    load = lambda seed, **held: models.load(source.folder, seed=seed, **settings, **here.loading, **held).params
    return Headed(models.build(source.folder, **settings), load)


def check_fits(model: Any, tokenizer: models.Tokenizer, length: int) -> None:
    """Raises ConfigError for rows that are longer than the model's context or tokens that it does not have."""
    if length > model.config.context:
        raise ConfigError(f"task.length={length} is more than the model's context, {model.config.context}")
    tokenizer.check(model.config.vocab_size)
