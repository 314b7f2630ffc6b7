"""A step planned on several meshes of the same devices, and which of them to take: `layouts`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optax

from jlora.adapted.adapted import Adapted
from jlora.planning import devices
from jlora.planning.devices import Device
from jlora.planning.placing import Rule
from jlora.planning.planned import Full, plan
from jlora.planning.report import Plan, duration, size
from jlora.sharding import MODELS, Layout
from jlora.state import TrainState

PyTree = Any


@dataclass(frozen=True)
class Trial:
    """A mesh that was tried.

    Attributes:
      mesh: its axes and their sizes.
      plan: of the step on it; None where there is none.
      reason: why there is none: what does not divide, or is too large before anything is computed.
    """

    mesh: Mapping[str, int]
    plan: Plan | None
    reason: str = ""

    @property
    def fits(self) -> bool:
        """Whether the step can be run on this mesh."""
        return self.plan is not None and self.plan.fits


@dataclass(frozen=True)
class Layouts:
    """The meshes that were tried on some devices: `print` shows a table, `best` is the one to take.

    Attributes:
      device: as it is called here.
      devices: how many, in all.
      trials: in the order in which they were tried.
      slices: of TPUs, that the devices are in.
    """

    device: str
    devices: int
    trials: tuple[Trial, ...]
    slices: int = 1

    @property
    def best(self) -> Trial | None:
        """Of those that fit the one whose step is fastest at best (`Roofline.seconds`); None where none fits.

        Where two take as long, as layouts do that are limited by what they compute, the sum of the four times decides,
        then what is received, then the peak. Where no speeds of the device are known it is what is received.
        """
        return min((one for one in self.trials if one.fits), key=_cost, default=None)

    def as_dict(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        trials = [
            {"mesh": dict(one.mesh), "plan": one.plan and one.plan.as_dict(), "reason": one.reason}
            for one in self.trials
        ]
        best = None if self.best is None else dict(self.best.mesh)
        whole = {"device": self.device, "devices": self.devices, "slices": self.slices}
        return {**whole, "layouts": trials, "recommended": best}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def meshes(count: int, device: Device, slices: int = 1) -> list[dict[str, int]]:
    """The meshes that `layouts` tries on so many devices: seven at most, of the many that there are.

    "data" alone (weights whole everywhere) and "fsdp" alone; on several nodes of GPUs "data" between nodes with "fsdp"
    in each, so that only gradients leave a node; "fsdp" with "tp" of 2, 4 and 8, of 4, 8 and 16 from 64 devices on, but
    never over more devices than a node of GPUs has. "tp" comes last, its devices are neighbours. On several slices of
    TPUs "dcn" goes over the slices, which share the rows, and each of these meshes over the devices of one; and "fsdp"
    over all of them, whose weights come over the network.

    >>> from jlora.planning import DEVICES
    >>> meshes(16, DEVICES["h100"])[2:]
    [{'data': 2, 'fsdp': 8}, {'fsdp': 8, 'tp': 2}, {'fsdp': 4, 'tp': 4}, {'fsdp': 2, 'tp': 8}]
    >>> meshes(8, DEVICES["v5e"], slices=2)
    [{'dcn': 2, 'data': 4}, {'dcn': 2, 'fsdp': 4}, {'dcn': 2, 'fsdp': 2, 'tp': 2}, {'dcn': 2, 'tp': 4}, {'fsdp': 8}]
    """
    if slices > 1:
        return [{"dcn": slices} | mesh for mesh in meshes(count // slices, device)] + [{"fsdp": count}]
    node = device.speed.node if device.speed else 0
    found = [{"data": count}, {"fsdp": count}]
    if node and count > node and count % node == 0:
        found.append({"data": count // node, "fsdp": node})
    for tp in (2, 4, 8) if count < 64 else (4, 8, 16):
        if count % tp == 0 and (tp <= node or not node):
            rest = count // tp
            found += [{"fsdp": rest, "tp": tp}] if rest > 1 else [{"tp": tp}] if rest == 1 else []
    return found


def layouts(
    loss_fn: Callable[..., Any],
    adapted: Adapted | TrainState,
    tx: optax.GradientTransformation,
    batch: PyTree,
    device: str = "v5e-16",
    *,
    tried: Iterable[Mapping[str, int]] | None = None,
    rule: Rule | Layout | None = MODELS,
    heads: Sequence[int] = (),
    progress: Callable[[Trial], None] | None = None,
    **options: Any,
) -> Layouts:
    """Plans a step on several meshes of the same devices: which of them fit, how long each takes, and which to take.

    Each is a `jlora.plan`, which compiles the step: seconds for GPUs, a minute or more for TPUs. Not compiled is what
    cannot be, and what does not fit for its arguments alone.

    Args:
      loss_fn, adapted, tx, batch: as of `jlora.plan`.
      device: with a number: "v5e-256", "v5p:4x4x4", "64xh100", "2xv5e-256" (slices).
      tried: the meshes; those of `meshes` where there are none.
      rule: the layout, as of `jlora.plan`.
      heads: numbers of heads (of queries, of keys) that "tp" has to divide.
      progress: called with each as soon as it is planned.
      options: of `jlora.plan`: `memory_kind`, `cache`, and those of the train step.

    Raises:
      ValueError: if the name says no number of devices, or one alone.
      ImportError: with what to install, if the device's compiler is not there.
    """
    wanted = devices.find(device)
    count = wanted.total or 1
    if count < 2:
        raise ValueError(
            f"layouts are of several devices, as in 'v5e-16', 'v5e:4x4' or '8xh100'; device={device!r} is one"
        )
    found = []
    for mesh in meshes(count, wanted.device, wanted.slices) if tried is None else tried:
        found.append(_trial(mesh, heads, lambda mesh: plan(
            loss_fn, adapted, tx, batch, mesh, device, rule=rule, if_arguments_fit=True, **options
        )))  # fmt: skip
        if progress is not None:
            progress(found[-1])
    return Layouts(wanted.device.name, count, tuple(found), wanted.slices)


def _trial(mesh: Mapping[str, int], heads: Sequence[int], planned: Callable[[Mapping[str, int]], Plan]) -> Trial:
    tp = mesh.get("tp", 1)
    odd = [n for n in heads if n % tp]
    if odd:
        return Trial(mesh, None, f"tp={tp} does not divide {min(odd)} heads")
    try:
        return Trial(mesh, planned(mesh))
    except (Full, ValueError) as error:  # or a rule, of a mesh that does not divide a leaf
        return Trial(mesh, None, str(error))


def _cost(one: Trial) -> tuple[float, ...]:
    plan = one.plan
    assert plan is not None
    best = plan.roofline
    times = (0.0, 0.0) if best is None else (best.seconds, best.compute + best.memory + best.ici + best.dcn)
    return (*times, plan.wire, plan.peak)


COLUMNS = ("mesh", "peak", "fits", "TFLOP", "received", "of it DCN", "at best", "limited by", "compiled in")


def row(one: Trial) -> list[str]:
    """Cells of a mesh under `COLUMNS`; of one that could not be planned the first alone."""
    name, plan = " ".join(f"{axis}={n}" for axis, n in one.mesh.items()), one.plan
    if plan is None:
        return [name]
    best = plan.roofline
    return [
        name, size(plan.peak + plan.unused), "yes" if plan.fits else "no", f"{plan.flops / 1e12:.4g}",
        size(plan.wire), size(plan.dcn), duration(best.seconds) if best else "?", best.limiting if best else "?",
        f"{plan.compiled_in:.0f} s",
    ]  # fmt: skip


def _lines(found: Layouts) -> list[str]:
    rows = [list(COLUMNS), *map(row, found.trials)]
    planned = [cells for cells in rows if len(cells) > 1]
    names = max(len(cells[0]) for cells in rows)
    widths = [names, *(max(len(cells[at]) for cells in planned) for at in range(1, len(COLUMNS)))]
    slices = f" in {found.slices} slices" if found.slices > 1 else ""
    lines = [f"Layouts of {found.devices} {found.device}{slices}; per device and step:"]
    for cells, one in zip(rows, [None, *found.trials], strict=True):
        if one is not None and one.plan is None:
            lines.append(f"  {cells[0]:<{names}}  {one.reason}")
        else:
            pairs = zip(cells[1:], widths[1:], strict=True)
            lines.append("  " + "  ".join([f"{cells[0]:<{names}}", *(f"{cell:>{width}}" for cell, width in pairs)]))
    return [*lines, _advice(found)]


def _advice(found: Layouts) -> str:
    best = found.best
    if best is None:
        return f"None of them fits {found.devices} {found.device}: {_remedy(found)}"
    mesh = ",".join(f"{axis}={n}" for axis, n in best.mesh.items())
    assert best.plan is not None
    if best.plan.roofline is None:
        return f"Take --mesh {mesh}: of those that fit it receives least; no speeds of {found.device} are known here."
    return f"Take --mesh {mesh}: of those that fit it is the fastest at best, limited by {best.plan.roofline.limiting}."


def _remedy(found: Layouts) -> str:
    """The advice of the plan that is nearest to fitting."""
    plans = [one.plan for one in found.trials if one.plan is not None]
    if not plans:
        return "see each one's reason."
    near = min(plans, key=lambda plan: plan.peak + plan.unused)
    mesh = ",".join(f"{axis}={n}" for axis, n in near.mesh.items())
    over = size(near.peak + near.unused - near.limit)
    return f"{mesh} comes nearest, {over} too much a device.{''.join(chr(10) + '- ' + one for one in near.advice)}"
