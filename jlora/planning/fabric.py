"""Where the devices of a program are: on which node or slice, and where in a TPU's torus."""

from typing import Any, NamedTuple

from jlora.planning.devices import Device


class Fabric(NamedTuple):
    """The places of devices, in the order in which a program numbers them.

    Attributes:
      nodes: the node (GPUs) or slice (TPUs) of each.
      coords: the place of its chip in the torus of a slice, (x, y, z); empty where the devices of a node all reach each
        other at one speed.
      ring: a torus' axis is closed to a ring where all of it is taken and its size is a multiple of this.
    """

    nodes: tuple[int, ...]
    coords: tuple[tuple[int, ...], ...] = ()
    ring: int = 0

    def nodes_of(self, group: tuple[int, ...]) -> int:
        """On how many nodes the devices of a group are."""
        return len({self.nodes[device] for device in group})

    def links(self, group: tuple[int, ...]) -> int:
        """How many links each device of a group receives over: one for each axis of the torus, two where it is closed.

        A line's end has one neighbour, which what it receives has to come from: so a line counts once.
        """
        if not self.coords:
            return 1
        extents = self._extents(group)
        whole = self._extents(tuple(range(len(self.coords))))
        closed = [n == all_ and n % self.ring == 0 for n, all_ in zip(extents, whole, strict=True)]
        return sum(1 + one for n, one in zip(extents, closed, strict=True) if n > 1) or 1

    def longest(self, group: tuple[int, ...]) -> int:
        """The longest side of a group in a torus; 1 where there is none."""
        return max(self._extents(group), default=1) if self.coords else 1

    def _extents(self, group: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(len(set(axis)) for axis in zip(*(self.coords[device] for device in group), strict=True))


def fabric_of(device: Device, devices: list[Any]) -> Fabric | None:
    """Where these devices are; None where no speeds of them are known.

    GPUs are numbered node by node, TPUs have their `slice_index` and their `coords`.
    """
    if device.speed is None:
        return None
    if device.speed.node:
        return Fabric(tuple(one.id // device.speed.node for one in devices))
    slices = tuple(int(getattr(one, "slice_index", 0) or 0) for one in devices)
    return Fabric(slices, tuple(tuple(one.coords) for one in devices), device.speed.ring)
