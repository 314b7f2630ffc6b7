"""The state of a training run on disk, kept by Orbax: asynchronous, atomic, and without the base."""

import json
import os
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jlora.adapt import Adapted, rebuilt, stored
from jlora.checkpoint.adapter import describe

Position = Any


class Checkpoints:
    """Checkpoints of a training run in a folder: factors, optimizer state, step, key and the position in the data.

    The base is not written; its fingerprint is, with what the adapter is made of. A state is any registered dataclass
    with the fields of `jlora.TrainState`. A context manager: at its end, writing is waited for.

    Args:
      folder: made if absent; nothing else may lie in it.
      keep: how many of the newest are kept.

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

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._fingerprint: tuple[list[Any], str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: Any, position: Position = None) -> None:
        """Copies the state on its devices and writes the copy in the background: the next step may donate the state.

        Args:
          state: the state after `state.step` steps.
          position: where the data stands, as JSON (numbers, strings, lists, dicts); given back by `restore`.

        Raises:
          FloatingPointError: if the state's last loss was not finite: it would never train again.
          ValueError: if there is a checkpoint of this step already, or `position` is no JSON.
        """
        state.check()
        step = int(state.step)
        try:
            json.dumps(position)
        except TypeError as error:
            raise ValueError(f"position is JSON (numbers, strings, lists, dicts) to be written: {error}") from error
        optimizer = str(jax.tree.structure(state.opt_state))
        record = {"adapter": self._describe(state.adapted), "position": position, "optimizer": optimizer}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(jnp.copy, _arrays(state))), record=ocp.args.JsonSave(record)
        )
        if step in self._manager.all_steps():
            raise ValueError(f"'{self._folder}' holds a checkpoint of step {step} already")
        self._manager.save(step, args=items, force=True)

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, Position]:
        """The newest checkpoint, or that of `step`, onto the base of `state`, and the position in the data.

        Args:
          state: a state of the same adapter, optimizer and base, as `TrainState.create` makes it; its arrays' shardings
            are kept, their values are not used.

        Raises:
          FileNotFoundError: if there is none.
          ValueError: if it belongs to another base, another adapter or another optimizer.
        """
        self.wait()
        step = self.latest if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise FileNotFoundError(f"no checkpoint{'' if step is None else f' of step {step}'} in '{self._folder}'")
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        self._check(record["adapter"], self._describe(state.adapted))
        expected = str(jax.tree.structure(state.opt_state))
        if record["optimizer"] != expected:
            raise ValueError(
                f"the checkpoint of step {step} in '{self._folder}' was written with another optimizer: its state is "
                f"{record['optimizer']:.300}, that of this one {expected:.300}"
            )
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        try:
            arrays = self._manager.restore(step, args=args)["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint of step {step} in '{self._folder}' was written with another optimizer: {error}"
            ) from error
        return _filled(state, arrays), record["position"]

    def wait(self) -> None:
        """Waits until what was saved is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _describe(self, adapted: Adapted) -> dict[str, Any]:
        """`describe`, with the base read once as long as its leaves stay the same objects and the extras the same."""
        read = [*jax.tree.leaves(adapted.base), adapted.extras]
        if self._fingerprint is None or not _same_objects(self._fingerprint[0], read):
            self._fingerprint = (read, describe(adapted)["base"])
        return describe(adapted, base=self._fingerprint[1])

    def _check(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        here = _as_json(here)
        if there["base"] != here["base"]:
            raise ValueError(
                f"the checkpoint in '{self._folder}' belongs to another base: its fingerprint is {there['base']}, that "
                f"of the state {here['base']}"
            )
        different = [name for name in here if there.get(name) != here[name]]
        if different:
            raise ValueError(
                f"the checkpoint in '{self._folder}' belongs to another adapter: {', '.join(different)} differ "
                f"({', '.join(f'{there.get(n)!r:.80} there, {here[n]!r:.80} here' for n in different[:1])})"
            )


def _arrays(state: Any) -> dict[str, Any]:
    """What is written: all but the base and the method's buffers. A key as its data."""
    return {
        "factors": stored(state.adapted),
        "opt_state": jax.tree.leaves(state.opt_state),
        "step": state.step,
        "key": jax.random.key_data(state.key),
        "loss": state.loss,
    }


def _filled(state: Any, arrays: dict[str, Any]) -> Any:
    opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), arrays["opt_state"])
    return type(state)(
        adapted=rebuilt(state.adapted, arrays["factors"]),
        opt_state=opt_state,
        step=arrays["step"],
        key=jax.random.wrap_key_data(arrays["key"], impl=jax.random.key_impl(state.key)),
        loss=arrays["loss"],
    )


def _same_objects(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(x is y for x, y in zip(some, others, strict=True))


def _as_json(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, dict):
        return {name: _as_json(inner) for name, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, list | tuple) else value
