"""What an experiment is: frozen dataclasses, the Python file that builds them, and dotted overrides.

A config is a file with `def config() -> Experiment`, and `def small() -> Experiment` for a form that ends in seconds.
Experiments of other kinds (`experiments.comparison.Comparison`) are loaded, overridden and described by the same
functions.
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jlora
from experiments.data import Corpus
from jlora.models.gpt2 import GPT2Config

Kind = TypeVar("Kind")
Duration = int | str
"""How long: a number of steps, "2 epochs" or "5000 examples"."""


class ConfigError(ValueError):
    """A config file, an override or a run folder is not what it has to be. Shown without a traceback."""


@dataclass(frozen=True)
class Data:
    """The two domains: the base learns the old one, the runs learn the new one."""

    old: Callable[[], Corpus]
    new: Callable[[], Corpus]


@dataclass(frozen=True)
class Train:
    """How to train: AdamW, a linear warm-up and a cosine to zero.

    Attributes:
      steps: how long.
      batch: windows per step, each as long as the model's context.
      evaluate_every: steps between evaluations on both domains; the training state is kept at the same times.
      warmup: fraction of the steps.
      weight_decay, b2: of AdamW.
      clip: the largest norm of a gradient.
    """

    steps: Duration
    batch: int
    evaluate_every: int
    warmup: float = 0.05
    weight_decay: float = 0.0
    b2: float = 0.98
    clip: float = 1.0


@dataclass(frozen=True)
class Pretrain(Train):
    """How to make the base. The runs have a learning rate each, the base has this one."""

    learning_rate: float = dataclasses.field(kw_only=True)


@dataclass(frozen=True)
class Run:
    """One way to adapt the base.

    Attributes:
      name: of its folder, and in overrides: `runs.lora_r4.learning_rate=1e-3`.
      label: in tables and plots.
      learning_rate: the peak.
      rank: r; None for full fine-tuning.
      alpha: r when None.
      method: (rank, alpha) -> a method of `jlora`.
      targets: which weights, as in `jlora.apply`; all kernels of linear layers when None.
    """

    name: str
    label: str
    learning_rate: float
    rank: int | None = None
    alpha: float | None = None
    method: Callable[..., jlora.Method] = jlora.lora
    targets: str | None = None


@dataclass(frozen=True)
class Evaluate:
    """How much is evaluated.

    Attributes:
      validation, test: windows of each domain, during training and at the end.
      batch: windows at a time.
      rounds: how often each run's step is timed, in turn.
    """

    validation: int
    test: int
    batch: int = 32
    rounds: int = 12


@dataclass(frozen=True)
class Experiment:
    """A base, and runs that adapt it side by side.

    Attributes:
      name: of the run folder.
      learning_rates: for a sweep: each run is trained at each of them and the best by validation is reported; the test
        split is not read, nothing is timed.
      seed: of the initial values, the batches and the factors.
    """

    name: str
    model: GPT2Config
    data: Data
    pretrain: Pretrain
    train: Train
    runs: tuple[Run, ...]
    evaluate: Evaluate
    learning_rates: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"runs: at least one, and each with a name of its own; got {names}")
        for path, positive in (
            *(
                (f"{part}.{name}", getattr(getattr(self, part), name))
                for part in ("train", "pretrain")
                for name in ("batch", "evaluate_every")
            ),
            *((f"evaluate.{name}", getattr(self.evaluate, name)) for name in ("validation", "test", "batch", "rounds")),
        ):
            if positive < 1:
                raise ConfigError(f"{path} is at least 1, got {positive}")
        in_steps(self.pretrain.steps, batch=1, examples=1)
        in_steps(self.train.steps, batch=1, examples=1)


def in_steps(duration: Duration, *, batch: int, examples: int) -> int:
    """A duration in steps of `batch` examples, where an epoch has `examples`.

    >>> in_steps(300, batch=8, examples=80), in_steps("1.5 epochs", batch=8, examples=80)
    (300, 15)
    """
    count, _, unit = str(duration).strip().partition(" ")
    per_step = {"": 1.0, "steps": 1.0, "examples": 1 / batch, "epochs": examples / batch}.get(unit.strip())
    try:
        exact = float(count) * per_step if per_step else 0.0
    except ValueError:
        exact = 0.0
    if not 0 < exact < math.inf:
        raise ConfigError(f"a duration is a positive number of steps, '2 epochs' or '5000 examples'; got {duration!r}")
    if round(exact) < 1:
        raise ConfigError(f"{duration!r} is no whole step: an epoch has {examples} examples, a step {batch}")
    return round(exact)


# -- files -------------------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Iterable[str] = (), *, small: bool = False) -> Experiment:
    """The `Experiment` of a config file: see `load_as`."""
    return load_as(Experiment, path, overrides, small=small)


def load_as(kind: type[Kind], path: str | Path, overrides: Iterable[str] = (), *, small: bool = False) -> Kind:
    """Runs a config file and applies overrides to what its `config()` (or `small()`) returns.

    Args:
      kind: the dataclass that it has to return.
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
        raise ConfigError(f"config file '{path}' has no function {name}() -> {kind.__name__}")
    experiment = make()
    if not isinstance(experiment, kind):
        raise ConfigError(
            f"{name}() of config file '{path}' returns a {type(experiment).__name__}, expected an "
            f"{kind.__module__}.{kind.__name__}"
        )
    for item in overrides:
        experiment = override(experiment, item)
    return experiment


def _absent(path: Path) -> str:
    found = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
    if not found:
        return f"config file '{path}' does not exist, and '{path.parent}' has no .py files"
    near = difflib.get_close_matches(str(path), found, 1, 0.0)[0]
    return f"config file '{path}' does not exist; the nearest is '{near}'"


# -- overrides ---------------------------------------------------------------------------------------------------------


def override(experiment: Kind, item: str) -> Kind:
    """Sets one field, as in `train.steps=200` or `runs.lora_r4.rank=8`.

    Raises:
      ConfigError: naming the nearest field, or the type that the field has.
    """
    path, equals, text = item.partition("=")
    path = path.strip()
    if not equals:
        raise ConfigError(f"an override has the form field=value (train.steps=200), got {item!r}")
    known = fields(experiment)
    if path not in known:
        near = difflib.get_close_matches(path, known, 1, 0.0)[0]
        raise ConfigError(f"there is no field {path!r}; the nearest is {near!r}")
    changed: Kind = _replace(experiment, path.split("."), _parse(path, text.strip(), known[path]))
    return changed


def fields(node: Any, prefix: str = "") -> dict[str, Any]:
    """The dotted names of all fields that hold values, with their types."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        path, value = prefix + field.name, getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            found |= fields(value, f"{path}.")
        elif type(value) is tuple and any(map(dataclasses.is_dataclass, value)):  # each under its own name
            for item in value:
                found |= fields(item, f"{path}.{item.name}.")
        else:
            found[path] = hints[field.name]
    return found


def _replace(node: Any, path: list[str], value: Any) -> Any:
    if isinstance(node, tuple):
        return tuple(_replace(item, path[1:], value) if item.name == path[0] else item for item in node)
    name, *rest = path
    try:
        return dataclasses.replace(node, **{name: _replace(getattr(node, name), rest, value) if rest else value})
    except ConfigError:
        raise
    except ValueError as error:  # from a dataclass that checks itself, such as GPT2Config
        raise ConfigError(str(error)) from error


def _parse(path: str, text: str, hint: Any) -> Any:
    """The value of a text as the type of its field: int, float, bool, str, a tuple of numbers, or a union of these."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    for kind in kinds:
        if kind is float and type(value) is int:
            return float(value)
        if typing.get_origin(kind) is tuple and isinstance(value, int | float | tuple):
            members = value if isinstance(value, tuple) else (value,)
            whole = typing.get_args(kind)[0] is int
            if all(type(member) in ((int,) if whole else (int, float)) for member in members):
                return members if whole else tuple(float(member) for member in members)
        if isinstance(kind, type) and type(value) is kind:
            return value
    if str in kinds:
        return text
    if any(not isinstance(kind, type) and typing.get_origin(kind) is not tuple for kind in kinds):
        raise ConfigError(f"{path} is a function: set it in the config file")
    names = " or ".join("None" if k is types.NoneType else getattr(k, "__name__", str(k)) for k in kinds)
    raise ConfigError(f"{path} is of type {names}, got {text!r}")


# -- identity ----------------------------------------------------------------------------------------------------------


def describe(node: Any) -> Any:
    """A config as JSON: dataclasses as objects, functions by their names, methods as they are written."""
    if isinstance(node, jlora.Method):
        return repr(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {field.name: describe(getattr(node, field.name)) for field in dataclasses.fields(node)}
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
