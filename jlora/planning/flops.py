"""FLOPs of a program, counted in its jaxpr: compilers count the body of a loop once."""

import math
from collections.abc import Iterator
from typing import Any


def flops(jaxpr: Any) -> int:
    """Floating-point operations of all products of a jaxpr, on all devices together.

    A dot_general or a convolution counts `2 * out * contracted`: the elements of its result, times the elements that
    each is summed over (of a convolution the kernel's positions times the input features of a group). What lies in a
    scan counts `length` times, in a shard_map once for every device; of a cond the largest branch counts. A `while`
    loop's body counts once, since how often it runs is not known. Kernels (Pallas, cuDNN's attention) hold no products
    that could be counted; where a program has another branch for other platforms, as `jlora.models` have for attention,
    that one counts.

    Args:
      jaxpr: as from `jax.make_jaxpr(fn)(*args)`, closed or open.

    >>> import jax, jax.numpy as jnp
    >>> flops(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((8, 8))))
    1024
    """
    return sum(map(_of_equation, _open(jaxpr).eqns))


def has(jaxpr: Any, *names: str) -> bool:
    """Whether a primitive of one of these names is somewhere in a jaxpr."""
    return any(
        eqn.primitive.name in names or any(has(inner, *names) for inner in _inner(eqn)) for eqn in _open(jaxpr).eqns
    )


def _of_equation(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return _product(eqn, (eqn.invars[0].aval.shape[axis] for axis in contracted))
    if name == "conv_general_dilated":
        kernel, places = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        return _product(eqn, (kernel[axis] for axis in places[1:]))  # its input features are those of one group
    if name in ("ragged_dot", "ragged_dot_general"):
        return _ragged(eqn)
    inner = [flops(jaxpr) for jaxpr in _inner(eqn)]
    if name == "cond":
        return max(inner, default=0)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":
        return _copies(params) * sum(inner)
    return sum(inner)


def _product(eqn: Any, contracted: Iterator[int]) -> int:
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(contracted)


def _ragged(eqn: Any) -> int:
    """Rows of groups, each by its own matrix: every row meets one of them."""
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if numbers is None:
        return _product(eqn, iter((eqn.invars[0].aval.shape[-1],)))
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
