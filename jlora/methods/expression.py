"""A method as text: "lora(8)", "dora(lora(8, alpha=16))". For command lines and configs."""

import ast
import difflib
import inspect
from collections.abc import Callable
from typing import Any

from jlora.methods import METHODS, nearest
from jlora.methods.lora import lora
from jlora.methods.method import Method


def parse(text: str, what: str = "the method") -> Method:
    """The method that a text writes: a call of a constructor in `jlora.methods`, such as `dora(lora(8, alpha=16))`.

    Nothing is evaluated: names are those of `METHODS`, arguments are literals or methods. A wrapper that is given its
    inner method's rank has LoRA inside: `dora(16)` is `dora(lora(16))`.

    Args:
      text: to read.
      what: is read, for errors.

    Raises:
      ValueError: naming the nearest method or argument.

    >>> parse("dora(16)")
    dora(inner=lora(rank=16, alpha=None, init='gaussian', dropout=0.0))
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise _no_method(what, text) from None
    return _method(what, node, text)


def _no_method(what: str, text: str) -> ValueError:
    return ValueError(f"{what} is a method, written as 'lora(8, alpha=16)' or 'dora(lora(8))'; got {text!r}")


def _method(what: str, node: ast.expr, text: str) -> Method:
    if isinstance(node, ast.Name):
        raise ValueError(f"{what} is a method, written as a call: '{nearest(node.id)}(...)'; got {text!r}")
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise _no_method(what, text)
    name = node.func.id
    if name not in METHODS:
        raise ValueError(f"{what}: there is no method {name!r}; the nearest is {nearest(name)!r}")
    make: Callable[..., Method] = METHODS[name]
    known = list(inspect.signature(make).parameters)
    given = [_argument(what, argument, text) for argument in node.args]
    options = {str(keyword.arg): _argument(what, keyword.value, text) for keyword in node.keywords}
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1, 0.0)
            raise ValueError(
                f"{what}: {name} has no argument {option!r}" + (f"; the nearest is {near[0]!r}" if near else "")
            )
    if known[:1] == ["inner"] and given and type(given[0]) is int:
        given[0] = lora(given[0])
    try:
        return make(*given, **options)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{what}: {name}: {error}") from error


def _argument(what: str, node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call):
        return _method(what, node, text)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(
            f"{what}: {ast.unparse(node)!r} is no number, text or method: an argument is written out"
        ) from None
