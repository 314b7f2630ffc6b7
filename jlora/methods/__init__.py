"""The methods: one paper per file."""

import copyreg
import difflib
from typing import Any

from jlora.methods.adalora import adalora
from jlora.methods.corda import corda
from jlora.methods.dora import dora
from jlora.methods.dylora import dylora
from jlora.methods.eva import eva
from jlora.methods.houlsby import houlsby
from jlora.methods.ia3 import ia3
from jlora.methods.loha import loha
from jlora.methods.lokr import lokr
from jlora.methods.lora import lora
from jlora.methods.lora_fa import lora_fa
from jlora.methods.lora_ga import lora_ga
from jlora.methods.lora_xs import lora_xs
from jlora.methods.loraplus import loraplus
from jlora.methods.method import Method
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
from jlora.methods.together import together
from jlora.methods.vera import vera

METHODS = {
    constructor.__name__: constructor
    for constructor in (
        lora, rslora, loraplus, lora_fa, dora, adalora, pissa, olora, eva, lora_ga, corda, vera, loha, lokr, ia3, oft,
        dylora, bitfit, norms, full, top_layers, houlsby, pfeiffer, parallel_adapter, prefix_tuning, prompt_tuning,
        p_tuning, lora_xs, together,
    )
}  # fmt: skip

__all__ = [
    "METHODS",
    "Method",
    "adalora",
    "bitfit",
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
    "to_json",
    "together",
    "top_layers",
    "vera",
]


def to_json(method: Method) -> dict[str, Any]:
    """The method as JSON-able data: its name and options, nested methods likewise."""
    return {key: _to_value(value) for key, value in method.config}


def _to_value(value: Any) -> Any:
    if isinstance(value, Method):
        return to_json(value)
    return [_to_value(x) for x in value] if isinstance(value, tuple) else value


def from_json(data: dict[str, Any]) -> Method:
    """The inverse of `to_json`.

    Raises:
      ValueError: if the name is unknown, with the nearest known one, or an option is, or its value is refused.
    """
    if not isinstance(data, dict):
        raise ValueError(f"a method is its name and options, not {data!r:.200}")
    options = dict(data)
    name = options.pop("name", None)
    if not isinstance(name, str) or len(name) > 100:
        raise ValueError(f"a method's 'name' is one of {', '.join(sorted(METHODS))}, not {name!r:.200}")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; the nearest is {nearest(name)!r} of {', '.join(sorted(METHODS))}")
    if isinstance(options.get("inner"), dict):
        options["inner"] = from_json(options["inner"])
    try:
        several = [_part(entry) for entry in options.pop("*methods", ())]
        return METHODS[name](*several, **options)
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError, Warning) as error:
        raise ValueError(f"method {name!r}: {error}") from error


def _part(entry: Any) -> Any:
    """One of several methods, or it and its targets."""
    return (from_json(entry[0]), *entry[1:]) if isinstance(entry, list) and entry else from_json(entry)


def nearest(name: object) -> str:
    """The name of a method that is most like this one."""
    return difflib.get_close_matches(str(name), METHODS, n=1, cutoff=0.0)[0]


# A method's functions are closures: it is pickled as its config.
copyreg.pickle(Method, lambda method: (from_json, (to_json(method),)))
