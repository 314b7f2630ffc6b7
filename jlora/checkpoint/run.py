"""The state of a training run on disk, kept by Orbax, or in an object store: asynchronous, atomic, without the base."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, Literal, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora import host, tree
from jlora.adapted.adapted import Adapted, to_arrays, with_arrays
from jlora.checkpoint import agreement
from jlora.checkpoint.adapter import describe, held_otherwise
from jlora.checkpoint.in_store import InStore
from jlora.checkpoint.kept import Kept
from jlora.checkpoint.on_disk import OnDisk
from jlora.checkpoint.place import folder_of
from jlora.checkpoint.processes import are_several, of_first, together
from jlora.checkpoint.resume import Plan, key_like, key_of, kind_of
from jlora.checkpoint.store import Store, is_stored
from jlora.methods.checks import check_rank
from jlora.sharding import put_whole
from jlora.state import TrainState

Position = Any


class Checkpoints:
    """Checkpoints of a training run in a folder: factors, optimizer state, step, key and the position in the data.

    The base is not written; its fingerprint is, with what the adapter is made of. A state is any registered dataclass
    with the fields of `jlora.TrainState`. A context manager: at its end, writing is waited for.

    A list of every file's checksum is written with each checkpoint, and compared before one is read. The folder belongs
    to one `Checkpoints` at a time, until `close` or the end of its process.

    Several processes that train together each make one of the same folder, which all of them see, and call the same
    methods in the same order. Each writes the parts that lie on its devices; process 0 decides for all, and what one of
    them raises all raise: at once, and within ten minutes where it happens in the middle of Orbax's work. A checkpoint
    is restored onto any number of devices and processes and any layout, with the same numbers. Arrays that every
    process has for itself, as those of a state that made no step, are the same in all of them.

    Args:
      folder: a local one, or its `file://` URL; made if absent; nothing else may lie in it. Or an address in an object
        store (`gs://`, `s3://`; `pip install "jlora[remote]"`), where the state is gathered and written by process 0
        without Orbax, and nothing keeps two runs from the same folder.
      keep: how many of the newest are kept, at least 1; None for all. With one, there is none before it to go back to
        when it is damaged.

    Raises:
      ValueError: for another `keep`; if the folder is in use by another `Checkpoints`, of this process or another one.

    Example:
      >>> import jax.numpy as jnp, jlora, optax, tempfile
      >>> step = jlora.train_step(lambda params, x: jnp.mean(x @ params["kernel"]), optax.adam(0.1))
      >>> state = jlora.TrainState.create(jlora.apply({"kernel": jnp.ones((3, 2))}, rank=1), step.tx)
      >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
      ...     checkpoints.save(state, {"row": 7})
      ...     state, position = checkpoints.restore(state)
      >>> position
      {'row': 7}
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int | None = 2) -> None:
        kept = None if keep is None else check_rank(keep, "keep")
        self._kept: Kept = (
            InStore(Store(folder), kept) if is_stored(folder) else OnDisk(folder_of(folder).absolute(), kept)
        )
        self._fingerprint: tuple[list[Any], str] | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self.close()
        else:  # of several processes perhaps this one alone is here: the others may be waiting for it elsewhere
            self._close(self._kept.wait)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        return max(self._kept.steps(), default=None)

    def save(self, state: Any, position: Position = None) -> None:
        """Copies the state on its devices and writes the copy in the background: the next step may donate the state.

        A checkpoint that is damaged and not older is deleted before, as is one that `restore` found damaged. What jlora
        did not write is never deleted.

        Args:
          state: the state after `state.step` steps.
          position: where the data stands, as JSON (numbers, strings, lists, dicts); given back by `restore`.

        Raises:
          FloatingPointError: if the state's last loss was not finite: it would never train again.
          ValueError: if there is a checkpoint of this step or a later one already, or `position` is no JSON;
            if something that is no checkpoint of jlora stands in its place, or would be taken for a later one; if
            several processes do not save the same; after `close`.
        """
        self._check_usable(state)
        state.check()
        if are_several():
            self.wait()
        step = int(state.step)
        with together():
            try:
                json.dumps(position)
            except TypeError as error:
                raise ValueError(f"position is JSON (numbers, strings, lists, dicts) to be written: {error}") from error
            record = {
                "adapter": self._describe(state.adapted),
                "position": position,
                "optimizer": agreement.as_json(agreement.nodes(state.opt_state)),
                "key": kind_of(state.key),
                "skipped": int(getattr(state, "skipped", 0)),
                "sealed": True,
            }
        mine = step, hashlib.sha256(json.dumps(record["adapter"]).encode()).hexdigest()
        first, old = of_first(lambda: (mine, self._kept.replaced_by(step)))
        with together():
            _check_agreed(mine, first)
            self._kept.delete(old)
        self._kept.damaged.clear()
        with together():
            self._kept.write(step, _arrays(state), record)

    def restore(
        self,
        state: Any,
        step: int | None = None,
        *,
        optimizer: Literal["all", "matching", "none"] = "all",
        hyperparams: Literal["state", "checkpoint"] = "state",
    ) -> tuple[Any, Position]:
        """The newest checkpoint, or that of `step`, onto the base of `state`, and the position in the data.

        The optimizer may have another schedule, clipping or weight decay than that of the checkpoint: whatever
        accumulates (moments, averages) is taken, a schedule that is new is read at the checkpoint's number of updates,
        and a warning names what differs. The run's key is the checkpoint's; a warning says where it is of another kind.

        Args:
          state: a state of the same adapter and base, as `TrainState.create` makes it; its arrays' shardings are kept,
            their values are not used unless an argument says so.
          step: of the checkpoint, the newest if None.
          optimizer: what is taken of the optimizer's state. "all": what accumulates has to be the same on both sides.
            "matching": what is the same is taken, the rest begins anew as in `state`, and a warning names it. "none":
            all of it begins anew; factors, step, key and position are taken alone.
          hyperparams: whose constants count where `optax.inject_hyperparams` keeps them in the optimizer's state and
            both sides have other ones. "state": those that the new optimizer was given, with a warning that names both.
            "checkpoint": those of the checkpoint, for a loop that sets them itself as it goes (a plateau's rate).

        Raises:
          FileNotFoundError: if there is none.
          DamagedCheckpoint: a ValueError, if a file of it is missing or is not what was written. It names the step
            before it that is whole.
          ValueError: if it belongs to another base, another adapter or another optimizer; it names the first
            difference.
        """
        self._check_usable(state)
        _check_choice("optimizer", optimizer, ("all", "matching", "none"))
        _check_choice("hyperparams", hyperparams, ("state", "checkpoint"))
        self.wait()
        step, record = of_first(lambda: self._kept.found(step))
        what = f"the checkpoint of step {step} in '{self._kept.name}'"
        with together():
            self._check_adapter(record["adapter"], state.adapted)
            plan = Plan.of(what, record["optimizer"], state.opt_state, optimizer)
            like = _like(state, plan, record)
        with together():
            arrays = self._kept.read(step, like)
        opt_state = host.known(plan.filled(state.opt_state, arrays["opt_state"], arrays["step"], hyperparams))
        key = key_of(what, arrays["key"], record.get("key"), state.key)
        rest = {name: value for name, value in arrays.items() if name not in ("factors", "opt_state", "key")}
        if hasattr(state, "skipped"):  # not among the arrays: checkpoints of before it was counted have none
            rest["skipped"] = put_whole(np.int32(record.get("skipped", 0)), state.skipped.sharding)
        adapted = with_arrays(state.adapted, arrays["factors"])
        return dataclasses.replace(state, adapted=adapted, opt_state=opt_state, key=key, **rest), record["position"]

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
          OSError: if it could not be written; of what Orbax, TensorStore or the system says, in all processes.
        """
        try:
            with together():
                self._kept.wait()
        except Exception:
            if are_several():
                self._kept.forget()
            raise

    def close(self) -> None:
        """Waits, and lets go of the folder: nothing is saved or restored any more."""
        self._close(self.wait)

    def _close(self, wait: Callable[[], None]) -> None:
        self._closed = True
        try:
            wait()
        finally:
            self._kept.close()

    def _check_usable(self, state: Any) -> None:
        """Refuses all but a state, and one after `close`, which Orbax takes and writes nothing of."""
        if not isinstance(state, TrainState):
            raise TypeError(
                f"a checkpoint holds a TrainState, got {type(state).__name__}; jlora.save writes an Adapted alone"
            )
        if self._closed:
            raise ValueError(f"these Checkpoints of '{self._kept.name}' are closed: make others for the folder")

    def _describe(self, adapted: Adapted) -> dict[str, Any]:
        """`describe`, with the base read once as long as its leaves stay the same objects and the extras the same."""
        read = [*jax.tree.leaves(adapted.base), adapted.extras]
        if self._fingerprint is None or not _same_objects(self._fingerprint[0], read):
            self._fingerprint = (read, describe(adapted)["base"])
        return describe(adapted, base=self._fingerprint[1])

    def _check_adapter(self, there: dict[str, Any], adapted: Adapted) -> None:
        here = _as_json(self._describe(adapted))
        if there["base"] != here["base"]:
            raise ValueError(
                f"the checkpoint in '{self._kept.name}' belongs to another base: its fingerprint is {there['base']}, "
                f"that of the state {here['base']}{held_otherwise(there, tree.leaves(adapted.base)[0])}"
            )
        # The fingerprint is that of the values: a base that is held otherwise, with the same values, is the same.
        different = [name for name in here if name != "stored" and there.get(name) != here[name]]
        if different:
            raise ValueError(
                f"the checkpoint in '{self._kept.name}' belongs to another adapter: {', '.join(different)} differ "
                f"({_json_difference(there, here)})"
            )


def _arrays(state: Any) -> dict[str, Any]:
    """State as it is written: all but the base and the method's buffers. A key as its data."""
    own = {
        "factors": to_arrays(state.adapted),
        "opt_state": jax.tree.leaves(state.opt_state),
        "key": jax.random.key_data(state.key),
    }
    names = [field.name for field in dataclasses.fields(state) if field.init and field.name != "adapted"]
    return {name: getattr(state, name) for name in names} | own


def _like(state: Any, plan: Plan, record: dict[str, Any]) -> dict[str, Any]:
    """Shapes and places of what is read."""
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(state))
    return like | {"opt_state": plan.like(like["opt_state"]), "key": key_like(state.key, record.get("key"))}


def _json_difference(there: Any, here: Any, path: str = "") -> str | None:
    """The first place where two JSON values differ, in words."""
    if isinstance(there, list) and isinstance(here, list):
        there, here = (
            {str(item.get("path", i)) if isinstance(item, dict) else str(i): item for i, item in enumerate(side)}
            for side in (there, here)
        )
    if isinstance(there, dict) and isinstance(here, dict):
        for name in {**there, **here}:
            inner = f"{path}.{name}" if path else name
            if name not in here or name not in there:
                return f"{inner} is in the {'state' if name in here else 'checkpoint'} alone"
            if difference := _json_difference(there[name], here[name], inner):
                return difference
        return None
    return None if there == here else f"{path} is {there!r:.80} in the checkpoint and {here!r:.80} in the state"


def _check_agreed(mine: tuple[int, str], first: tuple[int, str]) -> None:
    """Raises ValueError in a process that saves another step or adapter than process 0."""
    me = f"process {jax.process_index()}"
    if mine[0] != first[0]:
        raise ValueError(
            f"{me} saves the state of step {mine[0]}, and process 0 that of step {first[0]}: all save the same one"
        )
    if mine[1] != first[1]:
        raise ValueError(
            f"{me} trains another adapter than process 0, or another base: it was started with another config, or "
            "another version of the code"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose {', '.join(map(repr, choices))}")


def _same_objects(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(x is y for x, y in zip(some, others, strict=True))


def _as_json(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, dict):
        return {name: _as_json(inner) for name, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, list | tuple) else value
