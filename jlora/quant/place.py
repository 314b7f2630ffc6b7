"""Where codes and scales lie on a mesh: along the axes of the weight that they stand for."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.quant.nested import Nested, encode
from jlora.transform.explicit import names_of, on_auto_axes


def shardings_of(of: Any, sharding: NamedSharding, path: str) -> Any:
    """Shardings of the codes and scales of a `Quantised` (or of its shapes), in their places, for that of the weight.

    A block lies on one device whole. Scales in 8 bits follow the weight; those of the second level, one to 16,384
    weights, are on every device.

    Raises:
      ValueError: if the mesh cuts through a block, naming the leaf, the axis and what fits.
    """
    spec = (*sharding.spec, *[None] * (of.ndim - len(sharding.spec)))
    order = of.layout.order_of(of.ndim)
    names = [spec[axis] for axis in order]  # in the order of the codes
    if of.layout.tail:
        _check_tail(of, sharding, names, path)
        names = names[: len(order) - len(of.layout.tail) + 1]
    scales = of.scales.codes if isinstance(of.scales, Nested) else of.scales
    stack = of.scales.offset.ndim if isinstance(of.scales, Nested) else 0
    place: Any = lambda names: NamedSharding(sharding.mesh, PartitionSpec(*names))
    of_scales: Any = place(name if n != 1 else None for name, n in zip(names, scales.shape, strict=True))
    if isinstance(of.scales, Nested):
        lead = place(names[:stack])
        of_scales = Nested(of_scales, lead, lead)
    return dataclasses.replace(of, codes=place(names), scales=of_scales)


def spec_of_weight(of: Any, codes: PartitionSpec) -> PartitionSpec:
    """How the weight lies that is behind codes which lie so: the other way round."""
    spec: list[Any] = [None] * of.ndim
    for axis, names in zip(of.layout.order_of(of.ndim), codes, strict=False):
        spec[axis] = names
    return PartitionSpec(*spec)


def nest(scales: jax.Array, stack: int, where: Nested) -> Nested:
    """Scales in 8 bits, of which the first `stack` axes are a stack, on the devices that `where` says."""
    named = all(isinstance(at, NamedSharding) for at in jax.tree.leaves(where))

    def run(scales: jax.Array) -> Nested:
        specs = lambda _: jax.tree.map(lambda at: at.spec, where)
        return on_auto_axes(lambda x: encode(x, stack), scales, place=specs) if named else encode(scales, stack)

    nested: Nested = jax.jit(run, out_shardings=where)(scales)
    return nested


def _check_tail(of: Any, sharding: NamedSharding, names: list[Any], path: str) -> None:
    tail, block = of.layout.tail, of.layout.block
    first, *rest = names[-len(tail) :]
    order = of.layout.order_of(of.ndim)[-len(tail) :]
    for axis, name, inner in zip(order, (first, *rest), (math.prod(tail[1:]), *[0] * len(rest)), strict=True):
        parts = _parts(sharding, name)
        if parts == 1:
            continue
        size = of.shape[axis]
        if inner and size % parts == 0 and (size // parts) * inner % block == 0 and len(names) > len(tail):
            continue
        free = [i for i in range(of.ndim) if i not in order]
        fits = [n for n in range(parts, 0, -1) if inner and size % n == 0 and (size // n) * inner % block == 0]
        raise ValueError(
            f"{path!r} of shape {of.shape}: axis {axis} of size {size} lies along {name!r} in {parts} parts, which cut "
            f"through its blocks of {block} weights along the axes {list(order)}; what fits is "
            + (f"{fits[0]} parts of this axis" if fits else "this axis whole")
            + (f", or the mesh along the axes {free}" if free else "")
        )


def _parts(sharding: NamedSharding, name: Any) -> int:
    return math.prod(sharding.mesh.shape[n] for n in names_of(name))
