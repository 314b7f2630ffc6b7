"""The result of a plan: its numbers, as a table and as JSON."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jlora.planning.collectives import Collective
from jlora.planning.devices import DEVICES
from jlora.planning.roofline import Roofline

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Memory, FLOPs, traffic and least time of a training step, bytes per device.

    Attributes:
      device: as it is called here.
      devices: how many, in all.
      slices: of TPUs, that they are in.
      mesh: their axes, empty for one device.
      compiler: the device whose compiler made the program: `device`, or the one that is nearest to it.
      limit: bytes that a program may fill.
      weights: of the base, in the form that it is stored in, and of what the method keeps beside it.
      factors: of what is trained.
      gradients: of the factors. They are among the temporaries, or in the place of what is donated, and add nothing.
      optimizer_state: of the factors, as much of it as lies on the device.
      optimizer_state_on_host: the rest of it, which waits in the host's memory (`memory_kind="pinned_host"`).
      batch: of one step.
      arguments: of the program, as the compiler counts them: the four parts above, the key and the counters, but for
        what the program does not use.
      temporaries: the most that the program holds beside its arguments and results: activations, gradients, copies.
      peak: the compiler's own figure for all of it. It can be less than arguments and temporaries, where those are let
        go of before these are made.
      unused: arguments that the program does not read, which the compiler leaves out of the peak; they lie there.
      host: bytes in the host's memory: that rest, and activations (`remat="offload"`). No other figure has them, but
        the peak of a CPU.
      flops: of one step, `jlora.planning.flops` divided by the devices.
      collectives: by kind.
      moved: bytes that the program's kernels read and write in the device's memory, `jlora.planning.moved`; 0 where the
        compiler refused the program.
      roofline: seconds of computing, of moving and of sending, each at best; None where the device's speeds are not
        known here, or the compiler refused the program.
      fits: whether `peak + unused` is at most `limit`.
      advice: sentences on what to change; empty where it fits.
      notes: sentences on how far the numbers can be trusted.
      compiled_in: seconds that the compiler took, or the reading of what was kept (`cache=`).
    """

    device: str
    devices: int
    mesh: Mapping[str, int]
    compiler: str
    limit: int
    weights: int
    factors: int
    gradients: int
    optimizer_state: int
    optimizer_state_on_host: int
    batch: int
    arguments: int
    temporaries: int
    peak: int
    unused: int
    host: int
    flops: float
    collectives: Mapping[str, Collective]
    moved: int = 0
    roofline: Roofline | None = None
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    compiled_in: float = field(default=0.0, compare=False)
    slices: int = 1

    @property
    def fits(self) -> bool:
        """Whether the device's memory is enough."""
        return self.peak + self.unused <= self.limit

    @property
    def wire(self) -> int:
        """Bytes that a device receives in a step, of all collectives."""
        return sum(one.wire for one in self.collectives.values())

    @property
    def dcn(self) -> int:
        """Those of them that come from other nodes or slices."""
        return sum(one.dcn for one in self.collectives.values())

    def as_dict(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        lists = {"advice": list(self.advice), "notes": list(self.notes)}
        best = self.roofline
        times = best and {**dataclasses.asdict(best), "seconds": best.seconds, "limiting": best.limiting}
        return {
            **dataclasses.asdict(self),
            "mesh": dict(self.mesh),
            "wire": self.wire,
            "dcn": self.dcn,
            "roofline": times,
            "fits": self.fits,
            **lists,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


PARTS = ("weights", "factors", "optimizer_state", "batch", "temporaries")


def size(count: float) -> str:
    """Bytes, in binary units, as devices' memory is sold.

    >>> size(900), size(3 * 2**30)
    ('900 B', '3.00 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def duration(seconds: float) -> str:
    """A time, in a unit of its size.

    >>> duration(0), duration(2.5e-6), duration(0.0314), duration(12.3)
    ('0 s', '2.5 us', '31.4 ms', '12.3 s')
    """
    for unit, one in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= one:
            return f"{seconds / one:.3g} {unit}"
    return f"{seconds / 1e-6:.2g} us" if seconds else "0 s"


def _lines(plan: Plan) -> list[str]:
    many = f"{plan.devices} devices" if plan.devices > 1 else "one device"
    many += f" in {plan.slices} slices" if plan.slices > 1 else ""
    mesh = "".join(f", {name}={n}" for name, n in plan.mesh.items())
    found = [f"A training step on {plan.device} ({many}{mesh}); per device:"]
    rows = [(name.replace("_", " "), getattr(plan, name)) for name in PARTS]
    rows += [("unused by the step", plan.unused), ("on the host", plan.host)]
    rows = [(name, value) for name, value in rows if value or name not in ("unused by the step", "on the host")]
    rows += [("peak", plan.peak), ("limit", plan.limit)]
    notes = {"temporaries": f"gradients of {size(plan.gradients)} among them"}
    if plan.optimizer_state_on_host:
        notes["on the host"] = f"optimizer state of {size(plan.optimizer_state_on_host)} among them"
    found += [f"  {name:<18} {size(value):>11}  {notes.get(name, '')}".rstrip() for name, value in rows]
    found.append(f"  {'FLOPs':<18} {plan.flops:>11.3e}")
    found += [
        f"  {kind:<18} {size(one.bytes):>11}  {one.count} of them, {size(one.wire)} received"
        + (f", {size(one.dcn)} of it from {_others(plan)}" if one.dcn else "")
        for kind, one in plan.collectives.items()
    ]
    found += _times(plan)
    found.append(
        "It fits." if plan.fits else f"It does not fit: {size(plan.peak + plan.unused - plan.limit)} too much."
    )
    return [*found, *(f"- {sentence}" for sentence in plan.advice), *(f"Note: {note}" for note in plan.notes)]


def _times(plan: Plan) -> list[str]:
    """Lines of the roofline's four times."""
    best, speed = plan.roofline, DEVICES[plan.device].speed
    if best is None or speed is None:
        return []
    link = "NVLink" if speed.node else "ICI"
    near = plan.wire - plan.dcn
    rows = [("compute", best.compute, f"{plan.flops:.3e} FLOPs at {speed.flops / 1e12:g} TFLOP/s")]
    rows += [("memory", best.memory, f"{size(plan.moved)} moved at {speed.memory / 1e9:g} GB/s")]
    if plan.collectives:
        rows += [
            (
                "ici",
                best.ici,
                f"{size(near)} received over {link}, {speed.link / 1e9:g} GB/s" + " a link" * (not speed.node),
            )
        ]
        rows += [("dcn", best.dcn, f"{size(plan.dcn)} received from {_others(plan)}, {speed.dcn / 1e9:g} GB/s")]
    found = [f"  {name:<18} {duration(seconds):>11}  {what}" for name, seconds, what in rows]
    return [*found, f"A step takes {duration(best.seconds)} at best, limited by {best.limiting}."]


def _others(plan: Plan) -> str:
    speed = DEVICES[plan.device].speed
    return "other nodes" if speed and speed.node else "other slices"
