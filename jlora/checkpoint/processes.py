"""Several processes that act as one: one decides and all hear of it, and what one of them raises all raise.

A process that raised alone would leave the others waiting for it, in their next collective and for ever.
"""

import contextlib
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.sharding import put_whole

T = TypeVar("T")


def are_several() -> bool:
    """Whether there is another process to agree with."""
    return jax.process_count() > 1


_COLLECTIVE = re.compile(r"[A-Z_]+: (.*\b)?(Gloo|NCCL|MPI)\b")


def collective_failed(error: BaseException | None) -> bool:
    """Whether a collective failed, as all do after another process has died, and no check of what was given.

    On the CPU it is a ValueError, "UNKNOWN: Gloo AllGather failed: ... Connection closed by peer" (JAX 0.12.0.1).
    Whoever takes ValueErrors for damaged files or wrong configs asks here first.
    """
    return error is not None and (bool(_COLLECTIVE.match(str(error))) or collective_failed(error.__cause__))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that every process runs. At its end they meet: what one of them raised in it, all raise.

    A process with an error of its own raises that one; the others raise that of the first process that has one. No
    block lies within another: one that left both would miss the second meeting.
    """
    if not are_several():
        yield
        return
    try:
        yield
    except Exception as error:
        _heard(_packed(error))
        raise
    _, content = _heard(b"")
    if content:
        raise pickle.loads(content)


def of_first(act: Callable[[], T]) -> T:
    """In every process the value that `act` has in process 0, or the error: it is called there alone."""
    if not are_several():
        return act()
    if jax.process_index() > 0:
        failed, content = _heard(b"")
    else:
        try:
            content = pickle.dumps(act())
        except Exception as error:
            _heard(_packed(error))
            raise
        failed, content = _heard(content, failed=False)
    found = pickle.loads(content)
    if failed:
        raise found
    return found


def whole(x: Any) -> np.ndarray:
    """An array on the host, also one that is spread over several processes, all of which call this."""
    spread = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True) if spread else jax.device_get(x), order="C")


def everywhere() -> NamedSharding:
    """A place on all devices of all processes, whole on each."""
    return NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec())


def is_alone(x: Any) -> bool:
    """Whether each of several processes has an array for itself, or its place: the same one, as at a run's start."""
    place = getattr(x, "sharding", None)
    return are_several() and place is not None and place.is_fully_addressable


def as_one(x: Any) -> Any:
    """One array of all processes, or its shape, of those that each has for itself: Orbax takes no others."""
    if not is_alone(x):
        return x
    return x.update(sharding=everywhere()) if isinstance(x, jax.ShapeDtypeStruct) else put_whole(x, everywhere())


def alone(x: Any, like: Any) -> Any:
    """An array of all processes as each has it for itself, where `like` is one of those."""
    return jax.device_put(x.addressable_data(0), like.sharding) if is_alone(like) and not is_alone(x) else x


def _packed(error: Exception) -> bytes:
    """An error as bytes. One that does not come back from them is sent as its words."""
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return content


def _heard(content: bytes, failed: bool = True) -> tuple[bool, bytes]:
    """Whether a process has failed, and the bytes of the first one that has, or else of the first that says some."""
    sizes = multihost_utils.process_allgather(np.int32(len(content) if failed else -len(content)))
    speakers = [*np.flatnonzero(sizes > 0), *np.flatnonzero(sizes < 0)]
    if not speakers:
        return False, b""
    speaker, size = int(speakers[0]), int(sizes[speakers[0]])
    room = np.zeros(1 << (abs(size) - 1).bit_length(), np.uint8)  # few sizes: each is a program of its own
    if jax.process_index() == speaker:
        room[: len(content)] = np.frombuffer(content, np.uint8)
    said = multihost_utils.broadcast_one_to_all(room, is_source=jax.process_index() == speaker)
    return size > 0, np.asarray(said, np.uint8)[: abs(size)].tobytes()
