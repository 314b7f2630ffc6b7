"""What jlora has to know of a model to read and write its checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from flax import linen as nn

from jlora.models.tensors import Leaf

Head = Literal[
    "none", "causal_lm", "masked_lm", "sequence_classification", "token_classification", "image_classification",
    "projection",
]  # fmt: skip
"""What a model makes of its last hidden states: nothing, next tokens, hidden tokens, a label, a label per token, or an
embedding."""


class Architecture(NamedTuple):
    """A model of jlora as Hugging Face knows it.

    Attributes:
      model_type: in config.json.
      config: the dataclass; it has `head`, `labels`, `dtype`, `param_dtype`, `scan` and the model's shape.
      classes: head -> the class of transformers; the first one with a head's name is written.
      read: (config.json, head) -> config. Raises a ValueError for what the model cannot do.
      write: config -> what config.json says of it, but for the class and the labels.
      build: config -> the linen module.
      inputs: config -> arguments to initialise the module with.
      table: config -> the rows of all parameters, under the keys of the class with that head.
      prefix: of the body's keys in the classes with a head; those without one are read with it and without it.
      bare: the class without a head has the keys without the prefix.
      ignored: a regex: keys that are no parameters, such as buffers.
      renamed: (regex, replacement) of keys in older checkpoints.
      fits: config -> whether it is this architecture's; for those that share a dataclass.
    """

    model_type: str
    config: type
    classes: Mapping[Head, str]
    read: Callable[[Mapping[str, Any], Head], Any]
    write: Callable[[Any], dict[str, Any]]
    build: Callable[[Any], nn.Module]
    inputs: Callable[[Any], tuple[Any, ...]]
    table: Callable[[Any], list[Leaf]]
    prefix: str = ""
    bare: bool = True
    ignored: str = r"(?!)"
    renamed: tuple[tuple[str, str], ...] = ()
    fits: Callable[[Any], bool] = lambda config: True


def check_head(head: str, heads: tuple[Head, ...], labels: int) -> None:
    """Raises a ValueError for a head that a model does not have, or fewer than one label."""
    if head not in heads:
        raise ValueError(f"head={head!r} is not one of {', '.join(map(repr, heads))}")
    if labels < 1:
        raise ValueError(f"labels must be at least 1, got {labels}")


def unsupported(json: Mapping[str, Any], **expected: Any) -> None:
    """Raises a ValueError for settings of a config.json that a model here does not have.

    Args:
      json: the config.
      expected: key=the only value, or a tuple of the values, that are supported; absent is supported.
    """
    for name, values in expected.items():
        allowed = values if isinstance(values, tuple) else (values,)
        if name in json and json[name] not in allowed:
            known = " or ".join(map(repr, allowed))
            raise ValueError(f"config.json has {name}={json[name]!r}; jlora's model has {known}")
