"""All that differs between versions of JAX: how a jaxpr is opened, run in part, and where its lines came from."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

_LIBRARIES = (
    contextlib.__file__,
    functools.__file__,
    *(
        os.path.dirname(spec.origin) + os.sep
        for name in ("jax", "jaxlib", "flax", "haiku", "equinox", "jlora", "optax")
        if (spec := importlib.util.find_spec(name)) and spec.origin
    ),
)  # whose lines are not the model's own


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs one equation on plain values, with no knowledge of its parameters."""
    variables: list[Any] = []
    operands: list[Any] = []
    for atom, value in zip(eqn.invars, values, strict=True):
        if not isinstance(atom, jex.Literal) and atom not in variables:
            variables.append(atom)
            operands.append(value)
    return _run([eqn], variables, list(eqn.outvars), operands)


def _run(eqns: Sequence[Any], variables: Sequence[Any], outvars: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    template = _template()
    kept = [v for v in outvars if not isinstance(v, jex.DropVar)] if hasattr(jex, "DropVar") else list(outvars)
    segment = template.replace(
        invars=list(variables),
        outvars=kept,
        eqns=list(eqns),
        effects=set().union(*(eqn.effects for eqn in eqns)),
        debug_info=template.debug_info.with_unknown_names(),
    )
    results = dict(zip(kept, jex.jaxpr_as_fun(jex.ClosedJaxpr(segment, []))(*operands), strict=True))
    return [results.get(v) for v in outvars]


@functools.cache
def _template() -> Any:
    """An empty jaxpr, to be filled with `replace`."""
    return open_jaxpr(jax.make_jaxpr(lambda: ())())[0]


def run_segment(jaxpr: Any, eqns: list[Any], env: dict[Any, Any], last_use: dict[Any, int], end: int) -> dict[Any, Any]:
    """Runs equations that have no lazy operand; returns the values that are read at or after position `end`."""
    if not eqns:
        return {}
    made = {v for eqn in eqns for v in eqn.outvars}
    needed = dict.fromkeys(
        v for eqn in eqns for v in eqn.invars if not isinstance(v, jex.Literal) and v not in made
    )  # fmt: skip
    outvars = [v for eqn in eqns for v in eqn.outvars if last_use.get(v, -1) >= end]
    return dict(zip(outvars, _run(eqns, list(needed), outvars, [env[v] for v in needed]), strict=True))


def last_uses(jaxpr: Any) -> dict[Any, int]:
    """For every variable, the position of the last equation that reads it; the results' is behind all of them."""
    last = {}
    for position, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            if not isinstance(v, jex.Literal):
                last[v] = position
    for v in jaxpr.outvars:
        if not isinstance(v, jex.Literal):
            last[v] = len(jaxpr.eqns)
    return last


def open_jaxpr(jaxpr: Any) -> tuple[Any, tuple[Any, ...]]:
    """A jaxpr and its constants. Sub-jaxprs are `ClosedJaxpr` in JAX 0.10 and `Jaxpr` with constants in 0.12."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def scope(eqn: Any) -> contextlib.AbstractContextManager[Any]:
    """The name stack of the equation, for profiles."""
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else contextlib.nullcontext()


def line_of(eqn: Any) -> str:
    """The innermost line of the traceback that is not a library's."""
    traceback = getattr(eqn.source_info, "traceback", None)
    if traceback is None:
        return ""
    for frame in traceback.frames:
        if not frame.file_name.startswith(_LIBRARIES):
            return f"{frame.file_name.rsplit('/', 1)[-1]}:{frame.line_num}"
    return ""


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of a scan's constants and carries."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12: flat trees of constants, carry, xs
    return len(consts), len(carry)


def opened_end(jaxpr: Any, consts: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """The same program with the jit that its first result comes from written out, if it is one.

    Returns:
      A jaxpr without constants, and what its first arguments are given in their place.
    """
    jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    made = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    first = jaxpr.outvars[0] if jaxpr.outvars else None
    at = None if isinstance(first, jex.Literal) else made.get(first)
    if at is None or jaxpr.eqns[at].primitive.name not in ("jit", "pjit"):
        return jaxpr, tuple(consts)
    call = jaxpr.eqns[at]
    body, more = open_jaxpr(call.params["jaxpr"])
    given = dict(zip(body.invars, call.invars, strict=True))
    rename = lambda names, atoms: [a if isinstance(a, jex.Literal) else names.get(a, a) for a in atoms]
    returned = dict(zip(call.outvars, rename(given, body.outvars), strict=True))
    eqns = [
        *jaxpr.eqns[:at],
        *(eqn.replace(invars=rename(given, eqn.invars)) for eqn in body.eqns),
        *(eqn.replace(invars=rename(returned, eqn.invars)) for eqn in jaxpr.eqns[at + 1 :]),
    ]
    invars, outvars = [*body.constvars, *jaxpr.invars], rename(returned, jaxpr.outvars)
    return opened_end(jaxpr.replace(invars=invars, eqns=eqns, outvars=outvars), (*more, *consts))


def constant(literal: Any) -> jax.Array:
    """The array that a literal of a jaxpr stands for; from a Python number, of a weak type."""
    value = np.asarray(literal.val, literal.aval.dtype)
    return jnp.asarray(value.item() if literal.aval.weak_type else value)


def bodies(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple) else (value,))]
    return [body for body in (open_jaxpr(v)[0] for v in values) if hasattr(body, "eqns")]


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The axes of a mesh over which a value differs from device to device, inside `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying
