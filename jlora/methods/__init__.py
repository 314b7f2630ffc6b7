"""The methods: one paper per file."""

import copyreg
import difflib
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from jlora.methods.acts import Data, OnActivations, OnLeaves, OnWeights
from jlora.methods.adalora import adalora
from jlora.methods.corda import corda
from jlora.methods.dora import dora
from jlora.methods.dylora import dylora
from jlora.methods.eva import eva
from jlora.methods.houlsby import houlsby
from jlora.methods.ia3 import ia3
from jlora.methods.loha import loha
from jlora.methods.lokr import lokr
from jlora.methods.lora import lora, low_rank
from jlora.methods.lora_fa import lora_fa
from jlora.methods.lora_ga import lora_ga
from jlora.methods.lora_xs import lora_xs
from jlora.methods.loraplus import loraplus
from jlora.methods.method import Config, Method, Training
from jlora.methods.oft import oft
from jlora.methods.olora import olora
from jlora.methods.p_tuning import p_tuning
from jlora.methods.parallel_adapter import parallel_adapter
from jlora.methods.pfeiffer import pfeiffer
from jlora.methods.pissa import pissa
from jlora.methods.prefix_tuning import prefix_tuning
from jlora.methods.prompt_tuning import prompt_tuning
from jlora.methods.rslora import rslora
from jlora.methods.selective import bitfit, full, norms, top_layers
from jlora.methods.tied import tied
from jlora.methods.together import together
from jlora.methods.vera import vera

METHODS = {
    constructor.__name__: constructor
    for constructor in (
        lora, rslora, loraplus, lora_fa, dora, adalora, pissa, olora, eva, lora_ga, corda, vera, loha, lokr, ia3, oft,
        dylora, bitfit, norms, full, top_layers, houlsby, pfeiffer, parallel_adapter, prefix_tuning, prompt_tuning,
        p_tuning, lora_xs, together, tied,
    )
}  # fmt: skip

__all__ = [
    "METHODS",
    "Constructor",
    "Data",
    "Method",
    "OnActivations",
    "OnLeaves",
    "OnWeights",
    "Training",
    "adalora",
    "bitfit",
    "constructors",
    "corda",
    "dora",
    "dylora",
    "eva",
    "from_json",
    "full",
    "houlsby",
    "ia3",
    "loha",
    "lokr",
    "lora",
    "lora_fa",
    "lora_ga",
    "lora_xs",
    "loraplus",
    "low_rank",
    "named_constructors",
    "nearest",
    "norms",
    "oft",
    "olora",
    "p_tuning",
    "parallel_adapter",
    "pfeiffer",
    "pissa",
    "prefix_tuning",
    "prompt_tuning",
    "rslora",
    "tied",
    "to_json",
    "together",
    "top_layers",
    "vera",
]


Constructor: TypeAlias = Callable[..., Method]


def to_json(method: Method) -> dict[str, Any]:
    """The method as JSON-able data: its name and options, nested methods likewise.

    Raises:
      ValueError: if a constructor that is none of jlora's has the name of one.
    """
    named_constructors((name,) if callable(name := dict(method.config)["name"]) else ())
    return {key: _to_value(value) for key, value in method.config} | {"name": method.name}


def _to_value(value: Any) -> Any:
    if isinstance(value, Method):
        return to_json(value)
    return [_to_value(x) for x in value] if isinstance(value, tuple) else value


def from_json(data: dict[str, Any], methods: Iterable[Constructor] = ()) -> Method:
    """The inverse of `to_json`. A name is looked up among jlora's methods and `methods`; nothing is imported.

    Args:
      data: the name and the options.
      methods: constructors of methods of your own.

    Raises:
      ValueError: if the name is unknown, with the nearest known one, or an option is, or its value is refused; if
        `methods` are no constructors, or one of them has the name of another one.
    """
    return _from_json(data, METHODS | named_constructors(methods))


def _from_json(data: Any, known: Mapping[str, Constructor]) -> Method:
    if not isinstance(data, dict):
        raise ValueError(f"a method is its name and options, not {data!r:.200}")
    name, options = data.get("name"), {key: value for key, value in data.items() if key != "name"}
    if not isinstance(name, str) or len(name) > 100:
        raise ValueError(f"a method's 'name' is one of {', '.join(sorted(known))}, not {name!r:.200}")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown method {name!r}; the nearest is {near!r} of {', '.join(sorted(known))}. A method of your own has "
            "its constructor in its config, and is loaded with methods=(constructor,)"
        )
    if isinstance(options.get("inner"), dict):
        options["inner"] = _from_json(options["inner"], known)
    try:
        arguments = (
            (key, [_from_value(x, known) for x in value] if key[:1] == "*" else _from_value(value, known))
            for key, value in options.items()
        )
        method = _call(known[name], arguments)
        if not isinstance(method, Method):
            raise ValueError(f"its constructor gives {method!r:.200}, not a Method")
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError, Warning) as error:
        raise ValueError(f"method {name!r}: {error}") from error
    return method


def constructors(method: Method) -> tuple[Constructor, ...]:
    """The constructors of your own that a method is made by, those of nested methods among them."""
    found: dict[Constructor, None] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Method):
            if callable(own := dict(value.config)["name"]):
                found[own] = None
            visit(tuple(option for _, option in value.config))
        elif isinstance(value, tuple):
            for inner in value:
                visit(inner)

    visit(method)
    return tuple(found)


def nearest(name: object) -> str:
    """The name of a method that is most like this one."""
    return difflib.get_close_matches(str(name), METHODS, n=1, cutoff=0.0)[0]


# -- parts -------------------------------------------------------------------------------------------------------------


def named_constructors(methods: Any) -> dict[str, Constructor]:
    """Constructors by name."""
    if callable(methods) or isinstance(methods, str | Method):
        raise ValueError(f"methods= is a sequence of constructors, not {methods!r:.200}: (mine,) for one")
    found: dict[str, Constructor] = {}
    for constructor in methods:
        name = getattr(constructor, "__name__", None)
        if not callable(constructor) or not isinstance(name, str):
            raise ValueError(f"methods= are constructors, functions that give a Method, not {constructor!r:.200}")
        if (METHODS | found).get(name, constructor) is not constructor:
            whose = "a method of jlora" if name in METHODS else "two of them"
            raise ValueError(
                f"{constructor!r:.200}: {name!r} is the name of {whose}; a file names a method by it: rename it"
            )
        found[name] = constructor
    return found


def _from_value(value: Any, known: Mapping[str, Constructor]) -> Any:
    """An option as its constructor takes it: a nested method, or several values."""
    if isinstance(value, dict) and "name" in value:
        return _from_json(value, known)
    return tuple(_from_value(x, known) for x in value) if isinstance(value, list) else value


def _call(constructor: Constructor, arguments: Iterable[tuple[str, Any]]) -> Any:
    by_name = dict(arguments)
    by_position = [x for key in by_name if key[:1] == "*" for x in by_name[key]]
    return constructor(*by_position, **{key: value for key, value in by_name.items() if key[:1] != "*"})


def _from_config(config: Config) -> Method:
    (_, name), *arguments = config
    return _call(METHODS[name] if isinstance(name, str) else name, arguments)


def _reduce(method: Method) -> tuple[Callable[[Config], Method], tuple[Config]]:
    """How a method is pickled: its functions are closures, and its constructor makes them anew from the config."""
    name = dict(method.config)["name"]
    if isinstance(name, str) and name not in METHODS:
        raise pickle.PicklingError(
            f"{name!r} is no method of jlora: one of your own is pickled by its constructor, which its config has to "
            f"begin with: (('name', {name}), ...), not the text {name!r}"
        )
    return _from_config, (method.config,)


copyreg.pickle(Method, _reduce)
