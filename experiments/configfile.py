"""Config files, dotted overrides, and the identity of a config. Knows no experiment.

A config is a Python file with `def config()` that returns a frozen dataclass, and `def small()` for a form that ends in
seconds. Its fields are set by their dotted names: `train.steps=200`, `runs.lora.method="dora(16)"`.
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jlora
from jlora.methods import expression

Kind = TypeVar("Kind")


class ConfigError(ValueError):
    """A config file, an override or a run folder is not what it has to be. Shown without a traceback."""


# -- files -------------------------------------------------------------------------------------------------------------


def load(
    kind: type[Kind] | tuple[type[Any], ...], path: str | Path, overrides: Iterable[str] = (), *, small: bool = False
) -> Kind:
    """Runs a config file and applies overrides to what its `config()` (or `small()`) returns.

    Args:
      kind: the dataclass that it has to return, or several of which it is one.
      path: of the file.
      overrides: dotted, as in `override`.
      small: call `small()`.

    Raises:
      ConfigError: if the file does not exist, has no such function or returns something else; or for an override that
        names no field or has a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(_absent(path))
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file '{path}' is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name = "small" if small else "config"
    make = getattr(module, name, None)
    if not callable(make):
        raise ConfigError(f"config file '{path}' has no function {name}() -> {_names(kind)}")
    experiment = make()
    if not isinstance(experiment, kind):
        raise ConfigError(
            f"{name}() of config file '{path}' returns {type(experiment).__name__}, expected {_names(kind)}"
        )
    for item in overrides:
        experiment = override(experiment, item)
    return experiment


def _names(kind: Any) -> str:
    return " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))


def _absent(path: Path) -> str:
    found = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
    if not found:
        return f"config file '{path}' does not exist, and '{path.parent}' has no .py files"
    near = difflib.get_close_matches(str(path), found, 1, 0.0)[0]
    return f"config file '{path}' does not exist; the nearest is '{near}'"


# -- overrides ---------------------------------------------------------------------------------------------------------


def override(experiment: Kind, item: str) -> Kind:
    """Sets one field, as in `train.steps=200` or `runs.lora.method=lora(8)`; of a config of several the field of each.

    Raises:
      ConfigError: naming the nearest field, or the type that the field has.
    """
    path, equals, text = item.partition("=")
    path = path.strip()
    if not equals:
        raise ConfigError(f"an override has the form field=value (train.steps=200), got {item!r}")
    known = fields(experiment)
    paths = [path] if path in known else _in_each(experiment, path)
    absent = [each for each in paths if each not in known]
    if len(absent) == len(paths):
        near = difflib.get_close_matches(path, known, 1, 0.0)[0]
        raise ConfigError(f"there is no field {path!r}; the nearest is {near!r}")
    if absent:
        there = next(each for each in paths if each in known)
        raise ConfigError(f"there is no field {absent[0]!r}: set it where it is, as {there!r}")
    for each in paths:
        experiment = _replace(experiment, each.split("."), _parse(each, text.strip(), known[each]))
    return experiment


EACH = {"each": True}
"""Of a field with several dataclasses: a field that the config itself has not is set in all of them."""


def _in_each(node: Any, path: str) -> list[str]:
    several = [field for field in dataclasses.fields(node) if field.metadata.get("each")]
    return [f"{field.name}.{item.name}.{path}" for field in several for item in getattr(node, field.name)]


def fields(node: Any, prefix: str = "") -> dict[str, Any]:
    """The dotted names of all fields that hold values, with their types."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        path, value = prefix + _name(field), getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            found |= fields(value, f"{path}.")
        elif type(value) is tuple and any(map(dataclasses.is_dataclass, value)):  # each under its own name
            for item in value:
                found |= fields(item, f"{path}.{item.name}.")
        else:
            found[path] = hints[field.name]
    return found


def _name(field: Any) -> str:
    """A field's name in overrides, where its own parts may stand below another field: `base.quantize`."""
    return str(field.metadata.get("under", field.name))


def _replace(node: Any, path: list[str], value: Any) -> Any:
    if isinstance(node, tuple):
        return tuple(_replace(item, path[1:], value) if item.name == path[0] else item for item in node)
    name, *rest = path
    # Of two fields with one name the one that has the part.
    name = next(
        field.name
        for field in dataclasses.fields(node)
        if _name(field) == name and (not rest or _has(getattr(node, field.name), rest[0]))
    )
    try:
        return dataclasses.replace(node, **{name: _replace(getattr(node, name), rest, value) if rest else value})
    except ConfigError:
        raise
    except ValueError as error:  # from a dataclass that checks itself, such as a model's config
        raise ConfigError(str(error)) from error


def _has(value: Any, part: str) -> bool:
    if isinstance(value, tuple):
        return any(item.name == part for item in value)
    return dataclasses.is_dataclass(value) and any(_name(field) == part for field in dataclasses.fields(value))


def _parse(path: str, text: str, hint: Any) -> Any:
    """The value of a text as the type of its field: number, bool, str, tuple or dict of such, method, or a union."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    for kind in kinds:
        if kind is jlora.Method and isinstance(value, str):
            return method(path, value)
        if kind is float and type(value) is int:
            return float(value)
        if typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind):
            return value
        if typing.get_origin(kind) is tuple and isinstance(value, int | float | tuple):
            members = value if isinstance(value, tuple) else (value,)
            whole = typing.get_args(kind)[0] is int
            if all(type(member) in ((int,) if whole else (int, float)) for member in members):
                return members if whole else tuple(float(member) for member in members)
        if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] is str:
            members = value if isinstance(value, tuple) else (text,)
            if all(type(member) is str for member in members):
                return members
        if typing.get_origin(kind) is Mapping and isinstance(value, dict):
            return value
        if isinstance(kind, type) and type(value) is kind:
            return value
    if str in kinds:
        return text
    if any(typing.get_origin(kind) is Callable for kind in kinds):
        raise ConfigError(f"{path} is a function: set it in the config file")
    raise ConfigError(f"{path} is {' or '.join(map(_in_words, kinds))}, got {text!r}")


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    return "None" if kind is types.NoneType else f"of type {getattr(kind, '__name__', str(kind))}"


def method(path: str, text: str) -> jlora.Method:
    """The method that a text writes, see `jlora.methods.expression`.

    Args:
      path: of the field, for errors.
      text: to read.

    Raises:
      ConfigError: naming the nearest method or argument.
    """
    try:
        return expression.parse(text, path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


# -- identity ----------------------------------------------------------------------------------------------------------


UNSAID = {"unsaid": True}
"""Of a field that a description leaves out at its default: one that configs of before did not have."""


APART = {"apart": True}
"""Of a field that a description never has: it says where a run is computed, and changes no number of it."""


def describe(node: Any) -> Any:
    """A config as JSON: dataclasses as objects, functions by their names, methods as they are written."""
    if isinstance(node, jlora.Method):
        return repr(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        said = [(f, getattr(node, f.name)) for f in dataclasses.fields(node) if not f.metadata.get("apart")]
        return {f.name: describe(x) for f, x in said if not (f.metadata.get("unsaid") and x == f.default)}
    if isinstance(node, list | tuple):
        return [describe(item) for item in node]
    if isinstance(node, Mapping):
        return {str(key): describe(value) for key, value in node.items()}
    if isinstance(node, functools.partial):
        return [describe(node.func), describe(node.args), describe(node.keywords)]
    return f"{node.__module__}.{node.__qualname__}" if callable(node) else node


def key(*parts: Any) -> str:
    """A short hash of parts of a config and other JSON values."""
    text = json.dumps([describe(part) for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
