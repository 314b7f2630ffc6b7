"""The processes of a run together: one writes and decides, all agree, and none waits for one that has failed.

In one process all of it is plain: the process is the first, and nothing is sent.
"""

import hashlib
import itertools
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.configfile import ConfigError
from experiments.launch.exits import has_come
from jlora.checkpoint.processes import are_several, of_first, together
from jlora.checkpoint.processes import collective_failed as collective_failed

Read = TypeVar("Read")
_PACKAGES = ("jlora", "experiments", "configs")


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks to people."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether there is more than one process."""
    return are_several()


def said_by_first(value: Read) -> Read:
    """The first process's value, in all of them. All have to call it, at the same place."""
    return of_first(lambda: value)


def by_first(call: Callable[[], Read]) -> Read:
    """Result of the first process's call, or its error, in all of them; the others do not call it."""
    return of_first(call)


def by_first_alone(call: Callable[[], Read]) -> Read | None:
    """The same for what cannot be sent, a lock or a file: the first process has it, the others None."""
    with together():
        return call() if is_first() else None


_ASKED = itertools.count(1)


def is_told_to_stop() -> bool:
    """Whether this run is to end now: SIGTERM has come to it, or to any of its processes.

    Of several processes all have to ask, after every step: JAX's preemption service then gives them the same answer at
    the same time. It says yes to one number alone, the largest that was asked when the signal came plus 1, so that the
    numbers are counted through all trainings of a process, and nobody else asks (`jlora.checkpoint` keeps Orbax from
    it): a signal that comes while nothing is trained is heard after the next step.
    """
    if not several():
        return has_come()
    return bool(multihost_utils.reached_preemption_sync_point(next(_ASKED)))


def wait_for_all(where: str) -> None:
    """Waits until all processes are at the same place, which has this name."""
    if several():
        multihost_utils.sync_global_devices(where)


def check_same(**parts: Any) -> None:
    """Finds processes that are about to run something else than the first one.

    Args:
      **parts: JSON values by what they are: config=..., data=...

    Raises:
      ConfigError: in all processes, naming the parts and the processes that differ.
    """
    if not several():
        return
    own = [hashlib.sha256(json.dumps(part, sort_keys=True).encode()).digest()[:8] for part in parts.values()]
    mine = np.frombuffer(b"".join(own), np.uint8).reshape(len(parts), 8)
    everywhere = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(parts), 8)
    odd = (everywhere != everywhere[0]).any(axis=2)  # (processes, parts)
    if odd.any():
        said = [
            f"{name} of process {', '.join(map(str, np.flatnonzero(odd[:, i])))}"
            for i, name in enumerate(parts)
            if odd[:, i].any()
        ]
        raise ConfigError(
            f"the processes of this run are not the same: the {'; the '.join(said)} differs from that of process 0. "
            "Start all of them with the same command, from the same commit, on the same data and versions"
        )


def code() -> dict[str, str]:
    """The code that runs: a hash of our own files, and the versions of the libraries that programs are made by."""
    root = Path(__file__).resolve().parent.parent
    files = sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"files": digest.hexdigest()[:16], **versions}
