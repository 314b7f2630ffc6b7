"""The training step compiled on shapes for a device that need not be there: `plan`."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding

from jlora import host, tree
from jlora.adapted.adapted import Adapted
from jlora.arguments import Arguments
from jlora.planning import devices, targets
from jlora.planning.advice import Facts, advice
from jlora.planning.collectives import Collective, sent, summed
from jlora.planning.compiled import Outcome, compiled
from jlora.planning.devices import Device
from jlora.planning.fabric import fabric_of
from jlora.planning.flops import flops, has
from jlora.planning.hlo import read
from jlora.planning.moved import moved
from jlora.planning.placing import Axes, Rule, automatic, bytes_of, fully_sharded, is_placed, laid, placed, places
from jlora.planning.report import Plan, size
from jlora.planning.roofline import Roofline, Work, roofline
from jlora.sharding import Layout
from jlora.state import TrainState
from jlora.train import train_step
from jlora.transform.explicit import names_of

PyTree = Any


def plan(
    loss_fn: Callable[..., Any],
    adapted: Adapted | TrainState,
    tx: optax.GradientTransformation,
    batch: PyTree,
    mesh: Axes | None = None,
    device: str = "v5e",
    *,
    rule: Rule | Layout | None = None,
    memory_kind: str | None = None,
    if_arguments_fit: bool = False,
    cache: str | Path | None = None,
    **options: Any,
) -> Plan:
    """The memory, FLOPs, traffic and least time of a training step, before anything is allocated.

    Does it fit, and what if not; what limits its speed, of computing, memory and links (`Plan.roofline`).

    The step of `jlora.train_step(loss_fn, tx, **options)` is compiled on shapes, for the device itself by its own
    compiler, wherever this runs. `print(plan)` is a table, `plan.as_dict()` JSON.

        peak <= arguments + temporaries + results,    arguments = weights + factors + optimizer state + batch

    Args:
      loss_fn: as `train_step` takes it.
      adapted: from `jlora.apply`, of arrays or of shapes (`jax.ShapeDtypeStruct`), its leaves plain or `tree.Stored`;
        or a `TrainState`, whose optimizer state lies where its own shardings say.
      tx: the optimizer.
      batch: arrays or shapes.
      mesh: axes of the devices, `{"fsdp": 16}`, or a `Mesh` or `AbstractMesh`, which is made anew of the device's own.
        A dict's axes are Explicit, as those of `jax.make_mesh`, or Auto for a model that does not say where its
        products lie (a note says so). None: one device, or of "v5e-16" {"fsdp": 16}.
      device: "v5e", "v4", "v5p", "v6e", "7x" (`pip install "jlora[plan]"`); "a100", "h100", "h200", "b200"
        (`"jlora[plan-gpu]"`); "cpu", whose compiler is always there. Others ("a6000", "rtx4090", "v100", ...) are
        compiled for the nearest of these, or for the CPU where its compiler is not installed, and judged by their own
        memory; the plan's notes say so. Several as "v5e-16" (Cloud's name), "v5e:4x4" (a topology) or "8xh100";
        "2xv5e-16" are two slices, over which the first axes of the mesh go: {"dcn": 2, "fsdp": 16}.
      rule: a layout, as of `train_step(layout=)`; or a function on a mesh, (path, shape) -> PartitionSpec or None
        (whole), paths as "base/h/attn/query/kernel", "factors/h/attn/query/kernel/A" and "batch/tokens". None: as the
        leaves' own shardings say, whole where there is none; if no leaf has one, each weight is split over all devices
        along its largest axis, and the batch's rows.
      memory_kind: where the optimizer's arrays wait between two steps, as in `TrainState.create`: "pinned_host" is the
        host's memory. None: on the device, or where those of a `TrainState` are.
      if_arguments_fit: compile nothing where the arguments alone are more than the device's memory: `Full` is raised.
      cache: folder in which compiled programs are kept (their texts and sizes), so that the same plan with the same
        versions compiles nothing again. None: nothing is kept.
      options: of `jlora.train_step`: `accumulate`, `has_aux`, `weighted`, `pass_key`, `nonfinite`, `donate`.

    Raises:
      ValueError: for an unknown device (with the nearest), a mesh of another size than the device's name says, or one
        that does not divide a leaf; for an unknown `memory_kind`, or one that this JAX cannot plan.
      ImportError: with what to install, if the device's compiler is not there.
      TypeError: if `adapted` is neither.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> params = {"kernel": jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)}
      >>> loss = lambda params, x: jnp.mean(x @ params["kernel"]).astype(jnp.float32)
      >>> batch = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)
      >>> found = jlora.plan(loss, jlora.apply(params, rank=4), optax.adam(1e-3), batch, device="cpu")
      >>> found.weights, found.factors, found.fits
      (131072, 8192, True)
    """
    if not isinstance(adapted, Adapted | TrainState):
        raise TypeError(
            f"plan takes an Adapted, jlora.apply(params, ...), or a TrainState of it, got {type(adapted).__name__}"
        )
    if options.get("parallel", "jit") != "jit":
        raise ValueError("a plan is made for parallel='jit': give it a mesh in place of 'pmap'")
    wanted = devices.find(device)
    used, notes = _compiled_for(wanted.device)
    place = places(wanted._replace(device=used), mesh)
    lying = _Lying(rule, memory_kind, if_arguments_fit, None if cache is None else Path(cache))
    make = lambda place: _planned(loss_fn, adapted, tx, batch, place, wanted.device, used, notes, lying, options)
    try:
        return make(place)
    except Exception as error:
        # JAX's own type of this error is private. A model that says nowhere how its products lie is no fault of a plan.
        if type(error).__name__ != "ShardingTypeError" or isinstance(mesh, Mesh | AbstractMesh):
            raise
        notes.append("the model does not say where its products lie, so that XLA decided it (axes of kind Auto)")
        return make(automatic(place))


class _Lying(NamedTuple):
    rule: Rule | Layout | None
    memory_kind: str | None
    if_arguments_fit: bool
    cache: Path | None


def _planned(
    loss_fn: Callable[..., Any],
    adapted: Adapted | TrainState,
    tx: optax.GradientTransformation,
    batch: PyTree,
    place: Mesh | SingleDeviceSharding,
    asked: Device,
    used: Device,
    notes: list[str],
    lying: _Lying,
    options: dict[str, Any],
) -> Plan:
    step = train_step(loss_fn, tx, **options)
    state, batch = _placed(adapted, batch, step.tx, place, lying.rule, lying.memory_kind)
    arguments = step.arguments(state, batch)
    if lying.if_arguments_fit:
        _check_arguments(arguments, asked, place.size if isinstance(place, Mesh) else 1)
    traced = step.compiled(arguments).trace(*arguments)
    began = time.monotonic()
    made = compiled(traced, used, place, lying.cache)
    seconds = time.monotonic() - began
    count = place.size if isinstance(place, Mesh) else 1
    found = _plan(asked, used, place, arguments, made, flops(traced.jaxpr) / count)
    if has(traced.jaxpr, "while"):
        notes.append("FLOPs count the body of a while loop once: how often it runs is not known")
    notes += _idle(place, (state, batch))
    rows = [x.shape[0] for x in jax.tree.leaves(batch) if getattr(x, "shape", ())]
    parts = int(options.get("accumulate", 1))
    named, _ = tree.leaves(state.adapted.base)
    trained = {
        path for path, arrays in state.adapted.factors.items() if "value" in arrays
    }  # whole: not to be held in codes
    dense = [x for path, x in named.items() if path not in trained and not tree.is_stored(x)]
    matrices = [x for x in dense if getattr(x, "ndim", 0) > 1 and _is_float(x)]
    facts = Facts(
        rows=rows[0] // parts if rows else 1,
        accumulate=parts,
        remat=has(traced.jaxpr, "checkpoint", "remat", "remat2"),
        dense=sum(bytes_of(x) // x.dtype.itemsize for x in matrices),
        dense_bytes=bytes_of(matrices),
    )
    notes = [*found.notes, *notes]
    return dataclasses.replace(found, advice=advice(found, facts), notes=tuple(notes), compiled_in=seconds)


class Full(Exception):
    """The arguments of a step alone do not fit."""


def _check_arguments(arguments: Arguments, device: Device, many: int) -> None:
    held = _held(arguments) - bytes_of(_waiting(arguments))
    limit = device.memory or _memory_here() // many
    if held > limit:
        raise Full(f"weights, factors and optimizer state alone are {size(held)}, and the memory is {size(limit)}")


def _held(arguments: Arguments) -> int:
    return bytes_of((arguments.carry, arguments.kept, arguments.key, arguments.batch, arguments.loss))


def _waiting(arguments: Arguments) -> list[Any]:
    """The arrays that lie on the host between two steps."""
    return [x for x in jax.tree.leaves(arguments.carry.opt_state) if host.waits(x)]


def _compiled_for(device: Device) -> tuple[Device, list[str]]:
    """The device that is compiled for, with the memory of the one that is asked for; and what to say of that."""
    if device.compiler == "cpu" or device.target == device.name:
        targets.check_compiler(device)
        return device, []
    if targets.has_compiler(device):
        return device, [
            f"compiled for {device.target}, whose compiler is nearest, and judged by {device.name}'s memory"
        ]
    note = (
        f"compiled for the CPU, whose temporaries are others, and judged by {device.name}'s memory: pip install "
        f'"jlora[plan-gpu]" for the compiler of {device.target}'
    )
    return devices.DEVICES["cpu"], [note]


def _placed(
    adapted: Adapted | TrainState,
    batch: PyTree,
    tx: Any,
    place: Mesh | SingleDeviceSharding,
    rule: Rule | Layout | None,
    memory_kind: str | None,
) -> tuple[TrainState, PyTree]:
    """The state and the batch as shapes on these devices. What the optimizer keeps for a factor lies as it does."""
    if isinstance(place, Mesh) and rule is None and not is_placed(adapted, batch):
        rule = fully_sharded(place)
    of = adapted.adapted if isinstance(adapted, TrainState) else adapted
    if isinstance(rule, Layout):
        rule = laid(rule, place, of) if isinstance(place, Mesh) else None
    base, factors = placed("base", of.base, place, rule), placed("factors", of.factors, place, rule)
    rest = {"buffers": placed("buffers", of.buffers, place, rule), "key": placed("key", of.key, place, None)}
    of = of.replace(base=base, factors=factors, **rest)
    if isinstance(adapted, TrainState):
        parts = {name: getattr(adapted, name) for name in ("opt_state", "step", "key", "loss", "skipped")}
        parts = {name: placed(name, part, place, None) for name, part in parts.items()}
        kind = memory_kind or host.kind_of(adapted.opt_state)
        state = TrainState(of, **{**parts, "opt_state": host.placed(parts["opt_state"], kind)})
    else:
        state = TrainState.create(of, tx, memory_kind=memory_kind)
        state = placed("", state, place, None)
    return state, placed("batch", batch, place, rule)


def _idle(place: Mesh | SingleDeviceSharding, leaves: Any) -> list[str]:
    """Notes on the axes of a mesh along which nothing is split: as many devices that all hold the same."""
    if not isinstance(place, Mesh):
        return []
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(leaves) if hasattr(getattr(leaf, "sharding", None), "spec")]
    used = {name for spec in specs for names in spec for name in names_of(names)}
    return [
        f"the mesh's axis {name!r} shards nothing: every leaf of state and batch lies whole on each of its {size} "
        "devices"
        for name, size in place.shape.items()
        if size > 1 and name not in used
    ]


def _is_float(x: Any) -> bool:
    return bool(jax.numpy.issubdtype(x.dtype, jax.numpy.floating)) and x.dtype.itemsize > 1


# -- the numbers -----------------------------------------------------------------------------------------------------


def _plan(
    device: Device,
    used: Device,
    place: Mesh | SingleDeviceSharding,
    arguments: Arguments,
    made: Outcome,
    counted: float,
) -> Plan:
    carry, kept = arguments.carry, arguments.kept
    waiting, whole = _waiting(arguments), _held(arguments)
    many = place.size if isinstance(place, Mesh) else 1
    taken, temporaries, peak, beside = whole, max(made.needed - whole, 0), made.needed, bytes_of(waiting)
    found: dict[str, Collective] = {}
    best: Roofline | None = None
    touched, notes = 0, []
    if made.memory is None:
        notes = ["the compiler refused the program: the peak is what it says is needed, the temporaries are the rest"]
    else:
        memory = made.memory
        taken, temporaries = memory.arguments, memory.temporaries
        most = taken + temporaries + memory.results - memory.aliased
        # XLA's figure leaves the temporaries out on the CPU, and counts what lies on the host on a GPU.
        peak = most if used.compiler == "cpu" else min(memory.peak, most)
        beside = memory.host
        if used.compiler == "cpu" and waiting:  # it has one memory, and counts what waits among the arguments
            beside = bytes_of(waiting)
            taken -= beside
            if device.compiler == "cpu":
                notes = ["a CPU's memory is the host's: what waits there is in the peak, too"]
            else:
                peak -= beside
        program = read(made.text)
        touched = moved(program)
        messages = sent(program, many) if many > 1 else []
        fabric = fabric_of(device, list(place.devices.flat)) if isinstance(place, Mesh) else None
        found = summed(messages, fabric)
        if device.speed is not None and used.compiler == device.compiler:
            best = roofline(Work(counted, touched, messages), device.speed, fabric)
    if any("Involuntary full rematerialization" in line for line in made.said):
        notes = [*notes, "XLA copies a whole array to every device, for want of a better way between two shardings"]
    unused = max(whole - taken - beside, 0)
    return Plan(
        device=device.name,
        devices=many,
        slices=targets.slices_of(place.devices.flat) if isinstance(place, Mesh) else 1,
        mesh=dict(place.shape) if isinstance(place, Mesh) else {},
        compiler=used.target,
        limit=device.memory or _memory_here() // many,
        weights=bytes_of(kept),
        factors=bytes_of(carry.factors),
        gradients=bytes_of(carry.factors),
        optimizer_state=bytes_of(carry.opt_state) - bytes_of(waiting),
        optimizer_state_on_host=bytes_of(waiting),
        batch=bytes_of(arguments.batch),
        arguments=taken,
        temporaries=temporaries,
        peak=peak,
        unused=unused if unused > 1024 else 0,  # else the key, or the last loss
        host=beside,
        flops=counted,
        collectives=found,
        moved=touched,
        roofline=best,
        notes=tuple(notes),
    )


def _memory_here() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
