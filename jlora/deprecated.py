"""Former names of public functions, each for one release: they warn once per place that calls them."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from jlora.adapted.adapted import with_dropout
from jlora.adapted.convert import bake_prompt
from jlora.adapted.merge import merge_error

P = ParamSpec("P")
R = TypeVar("R")


def _formerly(name: str, renamed: Callable[P, R], goes: str) -> Callable[P, R]:
    """The function under its former name, which goes in a release."""
    new = renamed.__name__

    @functools.wraps(renamed)
    def former(*args: P.args, **kwargs: P.kwargs) -> R:
        warnings.warn(f"jlora.{name} is jlora.{new} now, and goes in jlora {goes}", DeprecationWarning, stacklevel=2)
        return renamed(*args, **kwargs)

    former.__name__ = former.__qualname__ = name  # what pickle finds it by
    former.__module__ = __name__
    former.__doc__ = f"`{new}` under its former name; goes in jlora {goes}."
    return former


with_key = _formerly("with_key", with_dropout, "0.2")
rounding = _formerly("rounding", merge_error, "0.2")
to_plain = _formerly("to_plain", bake_prompt, "0.2")
