"""How many tokens a mean was taken over, read from the program of a loss: `sum / count` is a mean of `count`."""

from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex

from jlora.transform.reach import reached

_SAME = ("convert_element_type", "copy", "squeeze", "reshape", "reduce_precision", "stop_gradient")


def count_of_mean(jaxpr: Any, still: int = 0) -> tuple[Any, bool] | None:
    """The variable of the count, and whether the loss takes it to be at least 1, if the first result is a sum over a
    sum that no argument moves behind the first `still` ones: else None.

    The sum above has to be one over whole arrays, maybe scaled by a constant; the count one over a whole array, maybe
    of at least 1. Both then add up over the parts of a batch, so that the counts are the weights of the parts.
    """
    if not jaxpr.outvars:
        return None
    made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    division = _maker(jaxpr.outvars[0], made)
    if division is None or division.primitive.name != "div" or division.outvars[0].aval.shape != ():
        return None
    above, below = division.invars
    while (eqn := _maker(above, made)) is not None and eqn.primitive.name in ("neg", "mul") and _scales(eqn):
        above = next(v for v in eqn.invars if not isinstance(v, jex.Literal))
    clamped = _maker(below, made)
    if clamped is not None and clamped.primitive.name == "max" and _is_one(clamped.invars):
        below = next(v for v in clamped.invars if not isinstance(v, jex.Literal))
    total, count = _maker(above, made), _maker(below, made)
    if not (_is_total(total) and _is_total(count) and _is_still(jaxpr, count.outvars[0], still)):
        return None
    if clamped is not count and not _is_counted(count.invars[0], made):
        return None  # a sum of fractions is below 1 where something is there
    return count.outvars[0], clamped is not count


def _maker(variable: Any, made: dict[Any, Any]) -> Any:
    """The equation that a value comes from, casts aside."""
    eqn = None if isinstance(variable, jex.Literal) else made.get(variable)
    while eqn is not None and eqn.primitive.name in _SAME:
        variable = eqn.invars[0]
        eqn = None if isinstance(variable, jex.Literal) else made.get(variable)
    return eqn


def _scales(eqn: Any) -> bool:
    return sum(not isinstance(v, jex.Literal) for v in eqn.invars) == 1


def _is_one(atoms: Any) -> bool:
    return any(isinstance(atom, jex.Literal) and float(atom.val) == 1.0 for atom in atoms)


def _is_total(eqn: Any) -> bool:
    """A sum over every axis of an array that has some."""
    return (
        eqn is not None
        and eqn.primitive.name == "reduce_sum"
        and len(eqn.params["axes"]) == len(eqn.invars[0].aval.shape) > 0
    )


def _is_still(jaxpr: Any, variable: Any, still: int) -> bool:
    """Whether no adapted weight takes part in a value: it is the batch's alone."""
    numbered = [frozenset() if i < still else frozenset((i,)) for i in range(len(jaxpr.invars))]
    return not reached(jaxpr.replace(outvars=[variable]), numbered)[0]


def _is_counted(variable: Any, made: dict[Any, Any]) -> bool:
    """Whether an array holds whole numbers: Booleans or integers, cast."""
    while jnp.issubdtype(variable.aval.dtype, jnp.inexact):
        if isinstance(variable, jex.Literal):
            return float(variable.val).is_integer()
        eqn = made.get(variable)
        if eqn is None or eqn.primitive.name not in (*_SAME, "broadcast_in_dim"):
            return False
        variable = eqn.invars[0]
    return True
