"""Where the processes that write a checkpoint in the background meet, and how one that cannot write lets the others go.

Orbax's threads meet twice: when each has written its part, and when the first process has made all of it a checkpoint.
One whose part fails comes to neither, and the others wait for as long as a checkpoint may take.
"""

import itertools
import sys
import threading
from pathlib import Path

import orbax.checkpoint as ocp

from jlora.checkpoint import seal

_WRITTEN, _WHOLE = "async_write_complete", "async_commit_complete"  # in Orbax's names of the two


class Meeting:
    """Orbax's barrier, for `AsyncOptions`: the thread of a process whose part failed comes to the end of each save too.

    It goes where it is missed then. Before, it leaves a note in the folder, which keeps the first process from making
    a checkpoint of the parts that are there. Where no note can be written, the others wait until their time is up.

    Args:
      name: of the folder, the same in all processes.
      folder: of the checkpoints.
      process: the number of this one.
      processes: those that meet.
    """

    def __init__(self, name: str, folder: Path, process: int, processes: set[int]) -> None:
        self._meet = ocp.multihost.get_barrier_sync_fn(processes=processes)
        self.name, self.processes = name, processes
        self._folder, self._process = folder, process
        self._count = itertools.count()
        self.begin(-1)

    def begin(self, step: int) -> None:
        """Says that a save of `step` begins, from the thread that calls Orbax."""
        self._step, self._caller = step, threading.get_ident()
        save = next(self._count)
        self._missed = {part: f"{self.name}.{part}.{save}" for part in (_WRITTEN, _WHOLE)}

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits until all processes are at the barrier of this name."""
        part = next((part for part in self._missed if part in key), None)
        if part is not None:
            self._meet(key=self._missed.pop(part), timeout_ms=timeout_ms)
            return
        error = sys.exception()
        if error is not None and threading.get_ident() != self._caller and self._lets_go(error):
            for missed in self._missed.values():
                self._meet(key=missed, timeout_ms=timeout_ms)
            self._missed = {}
        self._meet(key=key, timeout_ms=timeout_ms)

    def _lets_go(self, error: BaseException) -> bool:
        """Whether the others may go on without this process: the first one makes no checkpoint then."""
        if _WRITTEN not in self._missed or self._process == 0:
            return True
        try:
            return seal.refuse(self._folder, self._step, f"process {self._process} could not write its part: {error}")
        except OSError:
            return False
