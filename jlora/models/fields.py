"""Values that the fields of a model's config may hold: declared by their types, checked wherever a config is made.

A config.json is read into the same constructors as are called by hand, so that both go through the same checks. Sizes
are bounded, the larger the further from any published model, so that no product of them leaves 64 bits and nothing
long is built from a number that a file merely claims.
"""

import dataclasses
import math
import numbers
import reprlib
import types
import typing
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import jax.numpy as jnp


class FieldError(ValueError):
    """A config's fields hold what they cannot.

    Attributes:
      fields: their names.
    """

    def __init__(self, message: str, *fields: str) -> None:
        super().__init__(message)
        self.fields = fields


class Rule(Protocol):
    """The second argument of a field's `Annotated` type."""

    def wrong(self, name: str, value: Any) -> str | None:
        """The error for a value that the field `name` cannot hold, or None."""


class Whole(NamedTuple):
    """Whole numbers from `lowest` to `highest`."""

    lowest: int
    highest: int

    def wrong(self, name: str, value: Any) -> str | None:
        """The error for a value that the rule forbids, or None; see `Rule`."""
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            return f"{name} must be a whole number, got {shown(value)}"
        return _outside(name, value, self.lowest, self.highest)


class Real(NamedTuple):
    """Finite numbers from `lowest` to `highest`; from beyond `lowest` on, to before `highest`, where these are open."""

    lowest: float
    highest: float
    opened: Literal["", "low", "high"] = ""

    def wrong(self, name: str, value: Any) -> str | None:
        """The error for a value that the rule forbids, or None; see `Rule`."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            return f"{name} must be a finite number, got {shown(value)}"
        if self.opened == "low" and value == self.lowest:
            return f"{name} must be above {self.lowest}, got {shown(value)}"
        if self.opened == "high" and value == self.highest:
            return f"{name} must be below {self.highest}, got {shown(value)}"
        return _outside(name, value, self.lowest, self.highest)


class OneOf(NamedTuple):
    """Some strings."""

    values: tuple[str, ...]

    def wrong(self, name: str, value: Any) -> str | None:
        """The error for a value that the rule forbids, or None; see `Rule`."""
        if not isinstance(value, str) or value not in self.values:
            return f"{name}={shown(value)} is not one of {', '.join(self.values)}"
        return None


class Several(NamedTuple):
    """A tuple of 1 to `most` values, each of which `each` allows."""

    each: Rule
    most: int

    def wrong(self, name: str, value: Any) -> str | None:
        """The error for a value that the rule forbids, or None; see `Rule`."""
        if not isinstance(value, tuple) or not 0 < len(value) <= self.most:
            return f"{name} must be a tuple of 1 to {self.most}, got {shown(value)}"
        wrong = (self.each.wrong(f"{name}[{i}]", entry) for i, entry in enumerate(value))
        return next((message for message in wrong if message), None)


class FloatingPoint(NamedTuple):
    """Dtypes of floating-point numbers, as `jnp.dtype` takes them."""

    def wrong(self, name: str, value: Any) -> str | None:
        """The error for a value that the rule forbids, or None; see `Rule`."""
        try:
            if jnp.issubdtype(jnp.dtype(value), jnp.floating) and value is not None:
                return None
        except (TypeError, ValueError):  # which NumPy raises for what is no dtype
            pass
        return f"{name} must be the name of a floating-point dtype, got {shown(value)}"


TOKEN, ROWS = Whole(0, 2**31 - 1), Whole(1, 2**31 - 1)
LAYERS, LABELS = Whole(1, 2**12), Whole(1, 2**20)
Rows = Annotated[int, ROWS]
"""Of a vocabulary, or of a context: tokens and positions are int32."""
Token = Annotated[int, TOKEN]
OptionalRows = Annotated[int | None, ROWS]
Features = Annotated[int, Whole(1, 2**24)]
OptionalFeatures = Annotated[int | None, Whole(1, 2**24)]
Layers = Annotated[int, LAYERS]
Heads = Annotated[int, Whole(1, 2**12)]
OptionalHeads = Annotated[int | None, Whole(1, 2**12)]
Labels = Annotated[int, LABELS]
Projection = Annotated[int, Whole(1, 2**16)]
Pixels = Annotated[int, Whole(1, 2**14)]
Channels = Annotated[int, Whole(1, 2**10)]
Epsilon = Annotated[float, Real(1e-30, 1.0)]
Dropout = Annotated[float, Real(0.0, 1.0, "high")]
OptionalDropout = Annotated[float | None, Real(0.0, 1.0, "high")]
Dtype = Annotated[str, FloatingPoint()]


def check_fields(config: Any) -> None:
    """Raises a `FieldError` for the first field of a dataclass that holds what its type does not have.

    >>> @dataclasses.dataclass
    ... class Config:
    ...     layers: Layers
    ...     hidden: Annotated[int | None, Whole(1, 9)] = None
    >>> check_fields(Config(2))
    >>> check_fields(Config(0))
    Traceback (most recent call last):
    jlora.models.fields.FieldError: layers must be at least 1, got 0
    >>> check_fields(Config(2, hidden=2.5))
    Traceback (most recent call last):
    jlora.models.fields.FieldError: hidden must be a whole number or None, got 2.5
    """
    for field in dataclasses.fields(config):
        if wrong := _wrong(field.name, field.type, getattr(config, field.name)):
            raise FieldError(wrong, field.name)


def check_multiple(config: Any, whole: str, part: str) -> None:
    """Raises a `FieldError` unless one field of a config is a multiple of another."""
    of, by = getattr(config, whole), getattr(config, part)
    if of % by:
        raise FieldError(f"{whole}={of} is not a multiple of {part}={by}", whole, part)


def shown(value: Any) -> str:
    """A value in an error: its `repr`, but not all of a long or deep one.

    >>> shown([1.5, "a"]), shown(10**5000), len(shown("a" * 10**6))
    ("[1.5, 'a']", 'a number of over 20 digits', 80)
    """
    if isinstance(value, int) and abs(value) >= 10**20:  # Python has no decimal digits of what is longer still
        return "a number of over 20 digits"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


# -- one value ---------------------------------------------------------------------------------------------------------


def _wrong(name: str, hint: Any, value: Any) -> str | None:
    """The error for a field's value; `hint` is the type that the field was declared with."""
    if typing.get_origin(hint) is not Annotated:
        return _mistyped(name, hint, value)
    kind, rule = typing.get_args(hint)
    optional = types.NoneType in typing.get_args(kind)
    if optional and value is None:
        return None
    wrong: str | None = rule.wrong(name, value)
    return wrong.replace(" number, got", " number or None, got") if wrong and optional else wrong


def _mistyped(name: str, hint: Any, value: Any) -> str | None:
    if typing.get_origin(hint) is Literal:
        known = ", ".join(map(repr, typing.get_args(hint)))
        return None if value in typing.get_args(hint) else f"{name}={shown(value)} is not one of {known}"
    union = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in union)
    if isinstance(value, kinds):
        return None
    known = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
    return f"{name} must be of type {known}, got {shown(value)}"


def _outside(name: str, value: Any, lowest: float, highest: float) -> str | None:
    if value < lowest:
        return f"{name} must be at least {lowest}, got {shown(value)}"
    return f"{name} must be at most {highest}, got {shown(value)}" if value > highest else None
