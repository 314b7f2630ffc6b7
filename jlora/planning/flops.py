"""FLOPs of a program, counted in its jaxpr: compilers count the body of a loop once."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jlora.transform.jaxprs import scan_counts


def flops(jaxpr: Any) -> int:
    """Floating-point operations of all products of a jaxpr, on all devices together.

    A dot_general or a convolution counts `2 * out * contracted`: the elements of its result, times the elements that
    each is summed over (of a convolution the kernel's positions times the input features of a group). What lies in a
    scan counts `length` times, in a shard_map once for every device; of a cond the largest branch counts. A `while`
    loop's body counts once, since how often it runs is not known. Kernels (Pallas, cuDNN's attention) hold no products
    that could be counted; where a program has another branch for other platforms, as `jlora.models` have for attention,
    that one counts. What no result needs is left out, as every compiler does: the gradient of a first layer's input.

    Args:
      jaxpr: as from `jax.make_jaxpr(fn)(*args)`, closed or open.

    >>> import jax, jax.numpy as jnp
    >>> flops(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((8, 8))))
    1024
    """
    return _count(jaxpr, [True] * len(_open(jaxpr).outvars))[0]


def has(jaxpr: Any, *names: str) -> bool:
    """Whether a primitive of one of these names is somewhere in a jaxpr."""
    return any(
        eqn.primitive.name in names or any(has(inner, *names) for inner in _inner(eqn)) for eqn in _open(jaxpr).eqns
    )


Counted = tuple[int, list[bool]]
"""FLOPs, and of each input whether they need it."""


def _count(jaxpr: Any, live: Sequence[bool]) -> Counted:
    """FLOPs of a jaxpr of whose results these are used, and its inputs that are."""
    jaxpr = _open(jaxpr)
    needed = _variables(jaxpr.outvars, live)
    total = 0
    for eqn in reversed(jaxpr.eqns):
        out = [v in needed for v in eqn.outvars]
        if any(out) or eqn.effects:
            count, ins = _of_equation(eqn, out)
            total += count
            needed |= _variables(eqn.invars, ins)
    return total, [v in needed for v in jaxpr.invars]


def _variables(atoms: Sequence[Any], live: Sequence[bool]) -> set[Any]:
    return {atom for atom, one in zip(atoms, live, strict=True) if one and not hasattr(atom, "val")}  # no literals


def _of_equation(eqn: Any, out: list[bool]) -> Counted:
    name, params, whole = eqn.primitive.name, eqn.params, [True] * len(eqn.invars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return _product(eqn, (eqn.invars[0].aval.shape[axis] for axis in contracted)), whole
    if name == "conv_general_dilated":
        kernel, places = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        return _product(eqn, (kernel[axis] for axis in places[1:])), whole  # its input features are a group's
    if name in ("ragged_dot", "ragged_dot_general"):
        return _ragged(eqn), whole
    inner = list(_inner(eqn))
    if name == "scan":
        return _scan(eqn, inner[0], out)
    if name == "cond":
        counts = [_count(branch, out) for branch in inner]
        return max(count for count, _ in counts), [
            True,
            *(any(ins) for ins in zip(*(ins for _, ins in counts), strict=True)),
        ]
    times = _copies(params) if name == "shard_map" else 1
    if len(inner) == 1 and _fits(eqn, inner[0]):
        count, ins = _count(inner[0], out)
        return times * count, ins
    return times * sum(map(flops, inner)), whole


def _fits(eqn: Any, jaxpr: Any) -> bool:
    """Whether an equation's operands and results are those of the jaxpr in it, in order."""
    jaxpr = _open(jaxpr)
    return len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars)


def _scan(eqn: Any, body: Any, out: list[bool]) -> Counted:
    """A carry is needed if its end is, or if the next round needs it."""
    consts, carries = scan_counts(eqn.params)
    carry = out[:carries]
    while True:
        count, ins = _count(body, [*carry, *out[carries:]])
        more = [a or b for a, b in zip(carry, ins[consts : consts + carries], strict=True)]
        if more == carry:
            return eqn.params["length"] * count, [*ins[:consts], *carry, *ins[consts + carries :]]
        carry = more


def _product(eqn: Any, contracted: Iterable[int]) -> int:
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(contracted)


def _ragged(eqn: Any) -> int:
    """Rows of groups, each by its own matrix: every row meets one of them."""
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if numbers is None:
        return _product(eqn, eqn.invars[0].aval.shape[-1:])
    (contracted, _), _ = numbers.dot_dimension_numbers
    ragged = set(numbers.lhs_ragged_dimensions) & set(contracted)
    shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    whole = 2 * math.prod(out) * math.prod(shape[axis] for axis in contracted)
    return whole // out[0] if ragged else whole  # out's leading axis is the groups': each sums over its own rows


def _copies(params: Any) -> int:
    """How many devices run the body of a shard_map, each on its own part."""
    names = params.get("manual_axes") or params["mesh"].axis_names
    return math.prod(params["mesh"].shape[name] for name in names)


def _inner(eqn: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    if eqn.primitive.name == "custom_jvp_call" or eqn.primitive.name.startswith("custom_vjp_call"):
        names = ("call_jaxpr", "fun_jaxpr")  # the rules beside it are not run
        values = [eqn.params[name] for name in names if name in eqn.params]
    else:
        values = list(eqn.params.values())
    for value in values:
        for one in value if isinstance(value, list | tuple) else (value,):
            if hasattr(one, "eqns") or hasattr(getattr(one, "jaxpr", None), "eqns"):
                yield one


def _open(jaxpr: Any) -> Any:
    return jaxpr if hasattr(jaxpr, "invars") else jaxpr.jaxpr
