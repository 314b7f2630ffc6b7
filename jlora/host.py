"""Arrays that wait in the host's memory between two steps, as of a paged optimizer."""

import difflib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

PyTree = Any
KINDS = ("device", "pinned_host")


def placed(state: PyTree, memory_kind: str | None) -> PyTree:
    """The tree with its arrays in a memory of that kind, on the devices where they are; None leaves them.

    Scalars stay: an update reads a count at once. A shape (`jax.ShapeDtypeStruct`) says where its array will lie.

    Raises:
      ValueError: if there is no such memory, on an array's device or at all, or if this JAX does not tell a program
        where the array of a shape lies.
    """
    if memory_kind is None:
        return state
    if memory_kind not in KINDS:
        nearest = difflib.get_close_matches(memory_kind, KINDS, 1)
        meant = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"memory_kind={memory_kind!r} is not None or one of {', '.join(KINDS)}{meant}")

    def put(x: Any) -> Any:
        if x.ndim == 0:
            return x
        place = x.sharding or SingleDeviceSharding(jax.local_devices()[0])
        if isinstance(x, jax.ShapeDtypeStruct):
            return _shape(x, place.with_memory_kind(memory_kind), memory_kind)
        _check_there(memory_kind, next(iter(place.device_set)))
        return jax.device_put(x, place.with_memory_kind(memory_kind))

    return jax.tree.map(put, state)


def _check_there(memory_kind: str, device: jax.Device) -> None:
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if memory_kind not in kinds:
        raise ValueError(
            f"memory_kind={memory_kind!r} is no memory of {device}, which has {', '.join(kinds)}: leave memory_kind "
            "out, and the state lies on the device"
        )


def check_programs(memory_kind: str | None) -> None:
    """Raises ValueError where no program of the first device can return an array to that memory: a small one is run."""
    if memory_kind in (None, "device"):
        return
    x = placed(jnp.zeros(1), memory_kind)
    try:
        jax.jit(lambda x: put_back(fetched(x) + 1, x), out_shardings=x.sharding)(x)
    except jax.errors.JaxRuntimeError as error:
        words = str(error).splitlines()[0]
        raise ValueError(
            f"memory_kind={memory_kind!r}: JAX {jax.__version__} has no programs for {jax.default_backend()} that "
            f"return arrays to this memory ({words}): take JAX 0.11 or later, or leave the state on the device"
        ) from error


def _shape(x: jax.ShapeDtypeStruct, place: Sharding, memory_kind: str) -> jax.ShapeDtypeStruct:
    """The shape of an array that lies there: its sharding alone does not say it to a program.

    Nor does it always know the kind itself: that of a device which is only compiled for is None.
    """
    space = jax.memory.Space.Host if memory_kind == "pinned_host" else jax.memory.Space.Device
    plain = jax.ShapeDtypeStruct(x.shape, x.dtype)
    made = jax.eval_shape(lambda x: jax.device_put(x, space), plain).update(sharding=place)
    if waits(made) != (memory_kind == "pinned_host"):
        raise ValueError(
            f"JAX {jax.__version__} does not tell a program that the array of a shape lies in {memory_kind!r}: "
            "make the state of arrays, or take JAX 0.12"
        )
    return made


def waits(x: Any) -> bool:
    """Whether an array, a shape or a traced value lies in the host's memory."""
    space: Any = jax.typeof(x).memory_space
    return bool(space == jax.memory.Space.Host)


def known(state: PyTree) -> PyTree:
    """The tree, whose arrays' types say so where they lie on the host; those that Orbax reads have the device's type.

    A program for such a type takes the array for one of the device, and XLA ends the process over what it returns.
    """

    def one(x: Any) -> Any:
        place = getattr(x, "sharding", None)
        if place is None or place.memory_kind != "pinned_host" or waits(x):
            return x
        return jax.device_put(jax.device_put(x, place.with_memory_kind("device")), place)

    return jax.tree.map(one, state)


def kind_of(state: PyTree) -> str | None:
    """The `memory_kind` that a tree was placed with; None where nothing of it waits."""
    return "pinned_host" if any(map(waits, jax.tree.leaves(state))) else None


def fetched(state: PyTree) -> PyTree:
    """The tree with all of it on the device; within a program."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if waits(x) else x, state)


def put_back(state: PyTree, like: PyTree) -> PyTree:
    """The tree with those of its arrays in the host's memory that are there in `like`; within a program."""
    return jax.tree.map(lambda x, y: jax.device_put(x, jax.memory.Space.Host) if waits(y) else x, state, like)
