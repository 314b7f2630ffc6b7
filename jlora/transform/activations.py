"""Whether a program on a mesh says where its activations lie."""

from collections.abc import Collection, Sequence
from typing import Any

from jlora.transform.explicit import names_of
from jlora.transform.jaxprs import bodies


def places_activations(jaxpr: Any, given: Sequence[bool], axes: Collection[str]) -> bool:
    """Whether something computed from an input is placed: by a constraint over some of the axes, or in `shard_map`.

    Constraints on weights alone, as linen's boxes make them, do not count.

    Args:
      jaxpr: of the function.
      given: of each of its arguments, whether it is an input, in place of a weight.
      axes: of the mesh, of kind Auto.
    """
    inputs = {v for v, is_input in zip(jaxpr.invars, given, strict=True) if is_input}
    for eqn in jaxpr.eqns:
        read = [not hasattr(atom, "val") and atom in inputs for atom in eqn.invars]  # a literal has no hash
        if not any(read):
            continue
        inputs.update(eqn.outvars)
        if eqn.primitive.name == "shard_map" or (eqn.primitive.name == "sharding_constraint" and _is_over(eqn, axes)):
            return True
        for body in bodies(eqn):
            same = len(read) == len(body.invars)  # else a branch or a condition: any of its arguments may be an input
            if places_activations(body, read if same else [True] * len(body.invars), axes):
                return True
    return False


def _is_over(eqn: Any, axes: Collection[str]) -> bool:
    spec = getattr(eqn.params["sharding"], "spec", ())
    return any(name in axes for part in spec for name in (names_of(part) if isinstance(part, str | tuple) else ()))
