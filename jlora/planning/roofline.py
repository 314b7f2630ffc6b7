"""The least time of a step: what it computes, moves and sends, each by what a device can do at best."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from jlora.planning.collectives import Sent, received
from jlora.planning.devices import Speed
from jlora.planning.fabric import Fabric


class Work(NamedTuple):
    """Work of a device in a step: FLOPs of products, bytes moved in its memory, collectives."""

    flops: float
    moved: int
    sent: Iterable[Sent] = ()


@dataclass(frozen=True)
class Roofline:
    """Seconds that each part of a step takes at best, if all else is free.

        compute = FLOPs / peak                 memory = bytes moved / bandwidth of the memory
        ici = sum of bytes / (links x W)       dcn = sum of bytes from other nodes / W of the network

    Bytes of a collective over n devices, m of them on each of k nodes (of GPUs 8 by NVLink, of TPUs a slice), V being
    the whole array; see `Collective`:

        within the node    gather, scatter V (m-1)/m,     all-reduce 2 V (m-1)/m,     to all R (m-1)/n on each device
        from other nodes   gather, scatter V (k-1)/(k m), all-reduce 2 V (k-1)/(k m), to all R (n-m)/n

    Links: of a GPU its NVLinks together. Of a TPU one for each axis of the torus that the collective's devices extend
    over, two where that axis is a ring: all of it, of 16 chips (v5e, v6e) or a multiple of 4 (v4, v5p, 7x). On a torus
    an all-to-all goes by up to a quarter of a ring, and takes times a quarter of the longest side. Latencies, 1 us a
    hop and more, are left out. All four go on at the same time at best: the step takes the longest of them, and no
    device reaches that; 40 to 60 % of the peak is usual.

    Attributes:
      compute: of the products, as in bfloat16: a program in float32 is slower.
      memory: of `Plan.moved`.
      ici: of collectives between devices of one node or slice.
      dcn: of collectives between nodes or slices.

    Source: Austin et al., "How to Scale Your Model" (2025), chapters 3 and 12; Williams, Waterman and Patterson,
    "Roofline", CACM 52(4), 2009.
    """

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """The longest of the four: what a step takes at least."""
        return max(self.compute, self.memory, self.ici, self.dcn)

    @property
    def limiting(self) -> str:
        """Its name."""
        return max(("compute", "memory", "ici", "dcn"), key=lambda name: float(getattr(self, name)))


def roofline(work: Work, speed: Speed, fabric: Fabric | None) -> Roofline:
    """The least times of a device's work; of collectives none where `fabric` is None, one device."""
    ici = dcn = 0.0
    for one in work.sent:
        if fabric is None:
            break
        near, far = received(one, fabric)
        group = max(one.groups, key=len)
        spread = max(1.0, fabric.longest(group) / 4) if one.kind.endswith("all-to-all") else 1.0
        ici += one.times * near * spread / (speed.link * fabric.links(group))
        dcn += one.times * far / speed.dcn
    return Roofline(work.flops / speed.flops, work.moved / speed.memory, ici, dcn)
