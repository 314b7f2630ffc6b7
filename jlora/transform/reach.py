"""Which results of a traced function a gradient can flow back from, to which of its arguments."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex

from jlora.transform.jaxprs import open_jaxpr, scan_counts

Reached = frozenset[int]
NONE: Reached = frozenset()
_FLAT = ("stop_gradient", "sign", "round", "floor", "ceil", "is_finite", "nextafter")  # whose derivative is zero


def reached(jaxpr: Any, args: Sequence[Reached]) -> list[Reached]:
    """For each result, the arguments (by the numbers in `args`) that it depends on differentiably."""
    env: dict[Any, Reached] = dict.fromkeys(jaxpr.constvars, NONE) | dict(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: NONE if isinstance(atom, jex.Literal) else env[atom]
    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in _FLAT or not any(given):
            results = [NONE] * len(eqn.outvars)
        elif name in _BODIES:
            results = _BODIES[name](eqn, given)
        else:
            results = [NONE.union(*given)] * len(eqn.outvars)
        floating = [jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.inexact) for v in eqn.outvars]
        env.update(zip(eqn.outvars, (r if f else NONE for r, f in zip(results, floating, strict=True)), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _call(eqn: Any, given: list[Reached]) -> list[Reached]:
    (body, *_) = [eqn.params[name] for name in ("jaxpr", "call_jaxpr") if name in eqn.params]
    return reached(open_jaxpr(body)[0], given)


def _scan(eqn: Any, given: list[Reached]) -> list[Reached]:
    jaxpr, _ = open_jaxpr(eqn.params["jaxpr"])
    num_consts, num_carry = scan_counts(eqn.params)
    consts, carry, xs = given[:num_consts], given[num_consts : num_consts + num_carry], given[num_consts + num_carry :]
    carry = _fixed_point(carry, lambda carry: reached(jaxpr, [*consts, *carry, *xs])[:num_carry])
    return [*carry, *reached(jaxpr, [*consts, *carry, *xs])[num_carry:]]


def _while(eqn: Any, given: list[Reached]) -> list[Reached]:
    jaxpr, _ = open_jaxpr(eqn.params["body_jaxpr"])
    edges = [*itertools.accumulate((eqn.params["cond_nconsts"], eqn.params["body_nconsts"])), len(given)]
    consts, carry = (given[i:j] for i, j in itertools.pairwise(edges))
    return _fixed_point(carry, lambda carry: reached(jaxpr, [*consts, *carry]))


def _cond(eqn: Any, given: list[Reached]) -> list[Reached]:
    branches = [reached(open_jaxpr(branch)[0], given[1:]) for branch in eqn.params["branches"]]
    return [NONE.union(*each) for each in zip(*branches, strict=True)]


def _fixed_point(carry: list[Reached], body: Callable[[list[Reached]], list[Reached]]) -> list[Reached]:
    while (after := [old | new for old, new in zip(carry, body(carry), strict=True)]) != carry:
        carry = after
    return carry


_BODIES: dict[str, Callable[[Any, list[Reached]], list[Reached]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "shard_map"), _call),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
