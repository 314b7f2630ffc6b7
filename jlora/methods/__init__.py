"""Methods in weight space: one paper per file."""

import copyreg
import difflib
from typing import Any

from jlora.methods.dora import dora
from jlora.methods.lora import lora
from jlora.methods.method import Method
from jlora.methods.rslora import rslora

__all__ = ["METHODS", "Method", "dora", "from_json", "lora", "rslora", "to_json"]

METHODS = {constructor.__name__: constructor for constructor in (lora, rslora, dora)}


def to_json(method: Method) -> dict[str, Any]:
    """The method as JSON-able data: its name and options, nested methods likewise."""
    return {key: to_json_value(value) for key, value in method.config}


def to_json_value(value: Any) -> Any:
    """One option; a nested method's config is a tuple of pairs."""
    return {key: to_json_value(inner) for key, inner in value} if isinstance(value, tuple) else value


def from_json(data: dict[str, Any]) -> Method:
    """The inverse of `to_json`.

    Raises:
      ValueError: if the name is unknown, with the nearest known one, or an option is.
    """
    options = dict(data)
    name = options.pop("name", None)
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1, cutoff=0.0)
        raise ValueError(f"unknown method {name!r}; the nearest is {near[0]!r} of {', '.join(sorted(METHODS))}")
    if isinstance(options.get("inner"), dict):
        options["inner"] = from_json(options["inner"])
    try:
        return METHODS[name](**options)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from error


# A method's functions are closures: it is pickled as its config.
copyreg.pickle(Method, lambda method: (from_json, (to_json(method),)))
