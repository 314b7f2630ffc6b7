"""Checks of methods' arguments: each returns the value, as Python has it, or says what is wrong."""

import math
import numbers
import operator
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_LARGEST, _SMALLEST = 2.0**128 - 2.0**104, 2.0**-126  # of float32's normal numbers


def check_rank(rank: Any, where: str = "rank") -> int:
    """Returns a valid rank, or another number of things.

    Raises:
      ValueError: if it is not an integer of at least 1 (and below 2**31, which no axis or number of steps reaches).
    """
    number = whole(rank)
    if number is None:
        raise ValueError(f"{where} must be an integer of at least 1, not {rank!r}")
    if number < 1:
        raise ValueError(f"{where} must be at least 1, not {number}")
    if number >= 2**31:
        raise ValueError(f"{where} must be below 2**31, not {number!r:.40}")
    return number


def whole(value: Any) -> int | None:
    """An integer as Python has it; None of anything else, a Boolean included."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return int(value)


def check_whole(value: Any, where: str) -> int:
    """Returns an integer of at least 0.

    Raises:
      ValueError: if it is none.
    """
    number = whole(value)
    if number is None or number < 0:
        raise ValueError(f"{where} must be an integer of at least 0, not {value!r}")
    return number


def check_number(value: Any, where: str) -> float:
    """Returns a finite number of float32's range, as Python has it (a JAX or NumPy scalar is not hashable, nor JSON).

    Raises:
      ValueError: if it is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str | bool) or not abs(number) <= _LARGEST:
        raise ValueError(f"{where} must be a finite number, not {value!r:.200}")
    return int(number) if isinstance(value, int) else number


def check_integers(values: Any, where: str) -> tuple[int, ...]:
    """Returns integers, as Python has them.

    Raises:
      ValueError: if it is no sequence of integers: a float is not rounded, a boolean mask is no list of places.
    """
    try:
        found = [None if isinstance(value, str | bool | np.bool_) else operator.index(value) for value in values]
    except TypeError:
        found = [None]
    if isinstance(values, str | bytes | Mapping) or None in found:
        raise ValueError(f"{where} must be integers, not {values!r:.200}")
    return tuple(value for value in found if value is not None)


def check_pattern(pattern: Any, where: str = "pattern") -> str:
    """Returns a valid regular expression as text.

    Raises:
      ValueError: if it is none.
    """
    text = getattr(pattern, "pattern", pattern)
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a regular expression, not {pattern!r:.200}")
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{where}={text!r} is no regular expression: {error}") from error
    return text


def check_alpha(alpha: Any, where: str = "alpha") -> float | None:
    """Returns a valid numerator of the scale.

    Raises:
      ValueError: if it is neither None nor a finite number other than 0, which would train nothing. Below 2**-126 it is
        0 in float32.
    """
    if alpha is None:
        return None
    number = check_number(alpha, where)
    if abs(number) < _SMALLEST:
        zero = "" if number == 0 else f", as {number!r} is in float32"
        raise ValueError(f"{where} must not be 0{zero}: the factors would have no effect and no gradient")
    return number
