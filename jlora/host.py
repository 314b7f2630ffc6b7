"""Arrays that wait in the host's memory between two steps, as of a paged optimizer."""

import difflib
from typing import Any

import jax
from jax.sharding import Sharding, SingleDeviceSharding

PyTree = Any
KINDS = ("device", "pinned_host")


def placed(state: PyTree, memory_kind: str | None) -> PyTree:
    """The tree with its arrays in a memory of that kind, on the devices where they are; None leaves them.

    Scalars stay: an update reads a count at once. A shape (`jax.ShapeDtypeStruct`) says where its array will lie.

    Raises:
      ValueError: if there is no such memory, or if this JAX does not tell a program where the array of a shape lies.
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
        place = (x.sharding or SingleDeviceSharding(jax.local_devices()[0])).with_memory_kind(memory_kind)
        return _shape(x, place, memory_kind) if isinstance(x, jax.ShapeDtypeStruct) else jax.device_put(x, place)

    return jax.tree.map(put, state)


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


def fetched(state: PyTree) -> PyTree:
    """The tree with all of it on the device; within a program."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if waits(x) else x, state)


def put_back(state: PyTree, like: PyTree) -> PyTree:
    """The tree with those of its arrays in the host's memory that are there in `like`; within a program."""
    return jax.tree.map(lambda x, y: jax.device_put(x, jax.memory.Space.Host) if waits(y) else x, state, like)
