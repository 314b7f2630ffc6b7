"""The result of a plan: its numbers, as a table and as JSON."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jlora.planning.collectives import Collective

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Memory, FLOPs and traffic of a training step, bytes per device.

    Attributes:
      device: as it is called here.
      devices: how many.
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
      fits: whether `peak + unused` is at most `limit`.
      advice: sentences on what to change; empty where it fits.
      notes: sentences on how far the numbers can be trusted.
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
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the device's memory is enough."""
        return self.peak + self.unused <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        lists = {"advice": list(self.advice), "notes": list(self.notes)}
        return {**dataclasses.asdict(self), "mesh": dict(self.mesh), "fits": self.fits, **lists}

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


def _lines(plan: Plan) -> list[str]:
    many = f"{plan.devices} devices" if plan.devices > 1 else "one device"
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
        for kind, one in plan.collectives.items()
    ]
    found.append(
        "It fits." if plan.fits else f"It does not fit: {size(plan.peak + plan.unused - plan.limit)} too much."
    )
    return [*found, *(f"- {sentence}" for sentence in plan.advice), *(f"Note: {note}" for note in plan.notes)]
