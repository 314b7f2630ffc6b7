"""Checkpoints in a folder, written by Orbax: each process writes the parts that lie on its devices."""

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jlora.checkpoint import steps
from jlora.checkpoint.kept import Kept
from jlora.checkpoint.lock import Lock
from jlora.checkpoint.meeting import Meeting
from jlora.checkpoint.processes import alone, are_several, as_one, collective_failed, of_first, together
from jlora.checkpoint.seal import SealedPath

PATIENCE = 60.0  # seconds until what one host wrote is seen by all: network file systems keep old listings for a while
LIMIT = 600  # seconds that the processes wait for each other's part of a checkpoint


class OnDisk(Kept):
    """Checkpoints in a folder, which is locked until `close`.

    Raises:
      ValueError: if the folder is in use, or not the same one in all processes.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        super().__init__(str(folder))
        self._folder = folder
        self._lock: Lock | None = None
        with together():  # of several processes the first one deletes and renames: the folder is theirs when it is its
            self._lock = Lock(folder) if jax.process_index() == 0 else None
        try:
            self._check_seen()
            self._meeting = _meeting(folder)
            with together(), _without_log(str(folder)):
                self._manager = _Manager(folder, options=_options(keep, self._meeting))
        except BaseException:
            self._unlock()
            raise

    def steps(self) -> list[int]:
        """Steps of the checkpoints, of those too that are being written or that Orbax no longer takes for one."""
        return sorted({*self._manager.all_steps(), *steps.found(self._folder)})

    def damage(self, step: int) -> str | None:
        """Fault of a checkpoint's files, found without Orbax."""
        return steps.damage(self._folder / str(step))

    def record(self, step: int) -> dict[str, Any]:
        """The record of a checkpoint that is whole."""
        found: dict[str, Any] = steps.record(self._folder / str(step))
        return found

    def replaced_by(self, step: int) -> list[int]:
        """As of `Kept`. A folder that is no checkpoint of jlora, and would be taken for a later one, is an error."""
        old = super().replaced_by(step)
        for taken in (self._folder / str(s) for s in sorted({step, *(s for s in self.steps() if s >= step)})):
            if os.path.lexists(taken) and not steps.is_own(taken):
                raise ValueError(
                    f"'{taken}' is no checkpoint of jlora, and has the name of one that is not older than this one of "
                    f"step {step}: move it to another place, or keep this run in another folder"
                )
        known = self._manager.all_steps()
        return [s for s in old if s in known or steps.is_own(self._folder / str(s))]

    def delete(self, old: list[int]) -> None:
        """Deletes checkpoints."""
        for step in old:
            if step in self._manager.all_steps():
                self._manager.delete(step)
            elif jax.process_index() == 0:
                shutil.rmtree(self._folder / str(step))

    def write(self, step: int, arrays: Any, record: dict[str, Any]) -> None:
        """Begins to write a checkpoint, of a copy of the arrays on their devices."""
        copies = jax.tree.map(lambda x: jax.numpy.copy(as_one(x)), arrays)
        items = ocp.args.Composite(state=ocp.args.StandardSave(copies), record=ocp.args.JsonSave(record))
        if self._meeting is not None:
            self._meeting.begin(step)
        self._manager.save(step, args=items, force=True)

    def read(self, step: int, like: Any) -> Any:
        """The arrays of a checkpoint. What has no seal may be damaged where `steps.damage` does not look."""
        asked = ocp.args.StandardRestore(jax.tree.map(as_one, like))
        try:
            arrays = self._manager.restore(step, args=ocp.args.Composite(state=asked))["state"]
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
            if collective_failed(error):
                raise
            line = next(iter(str(error).splitlines()), "") or type(error).__name__
            if not steps.is_sealed(self._folder / str(step)):
                raise self.damaged_one(step, f"its state cannot be read: {line}") from error
            raise ValueError(f"the checkpoint of step {step} in '{self.name}' cannot be read: {line}") from error
        return jax.tree.map(alone, arrays, like)

    def wait(self) -> None:
        """Waits for Orbax's threads."""
        self._manager.wait_until_finished()

    def forget(self) -> None:
        """Looks anew at what there is: a process that did not fail takes the checkpoint for written."""
        self._manager.reload()

    def close(self) -> None:
        """Lets go of the folder."""
        try:
            self._manager.close()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _check_seen(self) -> None:
        """Raises ValueError where several processes do not see one and the same folder."""
        if not are_several():
            return
        name, expected = of_first(self._marked)
        mark, end = self._folder / name, time.monotonic() + PATIENCE
        try:
            with together():
                while not (mark.exists() and steps.found(self._folder) == expected):
                    if time.monotonic() > end:
                        raise ValueError(
                            f"'{self._folder}' is another folder in process {jax.process_index()} than in process 0: "
                            "several processes keep their checkpoints in one that all of them see, such as a network's"
                        )
                    time.sleep(0.2)
        finally:
            if jax.process_index() == 0:
                mark.unlink(missing_ok=True)

    def _marked(self) -> tuple[str, list[int]]:
        """The name of a new file in the folder, and the checkpoints there."""
        name = f".seen-{secrets.token_hex(8)}"
        (self._folder / name).touch()
        return name, steps.found(self._folder)


class _Manager(ocp.CheckpointManager):
    """Orbax's, which does not ask JAX's preemption service by the numbers of the steps that it saves.

    The service answers one number, after the largest that it was asked: a loop that asks by numbers of its own would
    wait for one that never comes.
    """

    def reached_preemption(self, step: int) -> bool:
        """Never: a save of jlora is one in any case."""
        return False


def _meeting(folder: Path) -> Meeting | None:
    if not are_several():
        return None
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return Meeting(name, folder, jax.process_index(), set(range(jax.process_count())))


def _options(keep: int | None, meeting: Meeting | None) -> ocp.CheckpointManagerOptions:
    """Orbax's options. Several processes meet through the coordinator, which knows time limits.

    Their devices' collectives, which Orbax would take, know none.
    """
    several: dict[str, Any] = {}
    if meeting is not None:
        several["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes=meeting.processes, barrier_sync_key_prefix=meeting.name
        )
    return ocp.CheckpointManagerOptions(
        create=False,  # it is there: its lock is
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        temporary_path_class=SealedPath,
        step_name_format=steps.Steps(),
        async_options=ocp.options.AsyncOptions(timeout_secs=LIMIT, barrier_sync_fn=meeting),
        **several,
    )


@contextlib.contextmanager
def _without_log(folder: str) -> Iterator[None]:
    """Orbax opens a folder with complaints about what is damaged in it, which `restore` says in one line."""
    log, elsewhere = logging.getLogger("absl"), lambda record: folder not in record.getMessage()
    log.addFilter(elsewhere)
    try:
        yield
    finally:
        log.removeFilter(elsewhere)
