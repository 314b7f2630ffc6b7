"""Adapters of activations: applied while the function is traced, found again in its jaxpr."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax

from jlora.transform.jaxprs import bodies
from jlora.transform.trace import Use

_MARK = re.compile(r"adapter\[(\d+):([^\[\]|]*)\|([^|]*)\|(\d+)\|(\d+)\|([^\]]*)\]")


def mark(
    path: str, op: str, rank: int, flops: int, where: str, tree: int = 0
) -> contextlib.AbstractContextManager[Any]:
    """Marks the operations that apply an adapter, in their name stack: what JAX has traced before is found, too."""
    return jax.named_scope(f"adapter[{tree}:{path}|{op}|{rank}|{flops}|{where}]")


def applications(jaxpr: Any, repeat: int = 1) -> Iterator[Use]:
    """A use for every run of operations with one mark.

    Raises:
      ValueError: for one inside a function with a derivative of its own, whose rule is traced when the interceptors are
        gone: the gradient would be that of the base.
    """
    before = None
    for eqn in jaxpr.eqns:
        found = _MARK.search(str(eqn.source_info.name_stack))
        label = found[0] if found else None
        if found and label != before:
            tree, path, op, rank, flops, where = found.groups()
            yield Use(path, op, (), (), (), True, int(rank), int(flops) * repeat, where, tree=int(tree))
        before = label
        if found:
            continue
        times = repeat * eqn.params["length"] if eqn.primitive.name == "scan" else repeat
        for use in (use for body in bodies(eqn) for use in applications(body, times)):
            if eqn.primitive.name in ("custom_vjp_call", "custom_jvp_call"):
                raise ValueError(
                    f"the adapter of {use.path!r} is applied inside a function with a derivative of its own "
                    f"({eqn.primitive.name}), whose rule JAX traces later, without the adapter; leave the model out of "
                    "that function, or the weight out with targets="
                )
            yield use
