"""Description of a model: all that reading and writing its checkpoints takes."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models.fields import FieldError, Rule, shown
from jlora.models.tensors import Leaf

Head = Literal[
    "none", "causal_lm", "masked_lm", "sequence_classification", "token_classification", "image_classification",
    "projection",
]  # fmt: skip
"""Output made of a model's last hidden states: nothing, next tokens, hidden tokens, a label, a label per token, or an
embedding."""
Config = TypeVar("Config")
TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)
"""Abstract tokens that a language model is initialised with."""


class Architecture(NamedTuple):
    """A model of jlora as Hugging Face knows it.

    Attributes:
      model_type: in config.json; of diffusers' parts the class there, "_class_name".
      config: the dataclass; it has `head`, `labels`, `dtype`, `param_dtype`, `scan` and the model's shape.
      classes: head -> the class of transformers; the first one with a head's name is written.
      read: (config.json, head) -> config. Raises a ValueError for what the model cannot do.
      write: config -> what config.json says of it, but for the class and the labels.
      build: config -> the linen module.
      inputs: config -> the shapes and dtypes of arguments to initialise the module with.
      table: config -> the rows of all parameters, under the keys of the class with that head.
      prefix: of the body's keys in the classes with a head; those without one are read with it and without it.
      bare: the class without a head has the keys without the prefix.
      ignored: a regex: keys that are no parameters, such as buffers.
      renamed: (regex, replacement) of keys in older checkpoints.
      modules: (regex, replacement) from keys of checkpoints to the names that transformers 5 has for the parameters in
        memory, which adapters' files go by.
      layers: (path before the layers' own, such as "text/"; key of config.json that says how many there are).
      fits: config -> whether it is this architecture's; for those that share a dataclass.
      library: whose checkpoints they are: diffusers has other names for files and for the class in config.json.
      targets: name -> pattern: sets of weights that people adapt, the usual one first.
    """

    model_type: str
    config: type
    classes: Mapping[Head, str]
    read: Callable[[Mapping[str, Any], Head], Any]
    write: Callable[[Any], dict[str, Any]]
    build: Callable[[Any], nn.Module]
    inputs: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]]
    table: Callable[[Any], list[Leaf]]
    prefix: str = ""
    bare: bool = True
    ignored: str = r"(?!)"
    renamed: tuple[tuple[str, str], ...] = ()
    modules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = ()
    layers: tuple[tuple[str, str], ...] = (("", "num_hidden_layers"),)
    fits: Callable[[Any], bool] = lambda config: True
    library: Literal["transformers", "diffusers"] = "transformers"
    targets: Mapping[str, str] = MappingProxyType({})


def check_head(head: str, heads: tuple[Head, ...]) -> None:
    """Raises a ValueError for a head that a model does not have."""
    if head not in heads:
        raise FieldError(f"head={head!r} is not one of {', '.join(map(repr, heads))}", "head")


# -- config.json -------------------------------------------------------------------------------------------------------


def configured(
    kind: type[Config],
    json: Mapping[str, Any],
    keys: Mapping[str, str],
    *,
    optional: Mapping[str, Any],
    origins: Mapping[str, str] | None = None,
    within: str = "",
    **computed: Any,
) -> Config:
    """A config from a config.json.

    Args:
      kind: the dataclass, which checks its fields.
      json: the config.json, or an object in it.
      keys: field -> key in `json`.
      optional: field -> its value where `json` has no such key. The other keys must be there.
      origins: computed field -> the key in `json` that it comes of, for errors.
      within: where `json` lies in config.json, "text_config.".
      computed: fields that are not one value of `json`.

    Raises:
      KeyError: for a key that is missing.
      ValueError: for fields that cannot be, by their keys and values in config.json.
    """
    found = {}
    for name, key in keys.items():
        if key in json or name not in optional:
            found[name] = value_of(json, key, within)
    try:
        return kind(**{**optional, **found, **computed})
    except FieldError as error:
        named = {**keys, **(origins or {})}
        entries = {named[name]: json.get(named[name]) for name in error.fields if name in named}
        raise refused(error, entries, within) from error


def refused(error: FieldError, entries: Mapping[str, Any], within: str = "") -> ValueError:
    """The error of fields that config.json says: by their keys and values there."""
    values = ", ".join(f"{within}{key}={shown(value)}" for key, value in entries.items())
    return ValueError(f"config.json has {values}: {error}" if values else str(error))


def value_of(json: Mapping[str, Any], key: str, within: str = "") -> Any:
    """The value of a key. Raises a KeyError that says where it should be."""
    if key not in json:
        raise KeyError(within + key)
    return json[key]


def number_of(json: Mapping[str, Any], key: str, rule: Rule) -> int:
    """A number from which others are computed. Raises a ValueError unless the rule allows it."""
    if wrong := rule.wrong(key, value_of(json, key)):
        raise ValueError(f"config.json: {wrong}")
    return int(json[key])


def object_of(json: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object in config.json, or an empty one where that is null or not there. Raises a ValueError for others."""
    value = json.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"config.json has {key}={shown(value)}, expected an object")
    return value or {}


def flag_of(json: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """True or False; the default where it is not there. Raises a ValueError for others."""
    value = json.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json has {key}={shown(value)}, expected true or false")
    return value


def names_of(json: Mapping[str, Any], key: str) -> list[str]:
    """A list of strings; empty where it is null or not there. Raises a ValueError for others."""
    value = json.get(key)
    if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise ValueError(f"config.json has {key}={shown(value)}, expected a list of strings")
    return value or []


def unsupported(json: Mapping[str, Any], **expected: Any) -> None:
    """Raises a ValueError for settings of a config.json that a model here does not have.

    Args:
      json: the config.
      expected: key=the only value, or a tuple of the values, that are supported; absent is supported.
    """
    for name, values in expected.items():
        allowed = values if isinstance(values, tuple) else (values,)
        if name in json and not any(_same(json[name], value) for value in allowed):
            known = " or ".join(map(shown, allowed))
            raise ValueError(f"config.json has {name}={shown(json[name])}; jlora's model has {known}")


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)  # to Python 1 is True
