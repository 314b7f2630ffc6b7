"""Checkpoints in an object store, `gs://` or `s3://`: the state gathered by process 0, in two objects for each step.

Orbax's folders, their locks and their seals want a file system. What LoRA trains is small, so that it is gathered and
written by one process: the arrays' bytes first, under a name that no object has, and last `<step>.json`, which names
them with their checksum. An object is put whole or not at all, and so is a checkpoint.
"""

import contextlib
import hashlib
import json
import re
import secrets
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.checkpoint.kept import Kept
from jlora.checkpoint.processes import of_first, whole
from jlora.checkpoint.store import Store
from jlora.sharding import put_whole

_RECORD = re.compile(r"(0|[1-9][0-9]{0,17})\.json")
_LARGEST = 1 << 26  # bytes of a record


class InStore(Kept):
    """Checkpoints in a folder of an object store. Nothing keeps a second run from the same one: there are no locks.

    Args:
      store: the folder.
      keep: how many of the newest are kept; None for all.
    """

    def __init__(self, store: Store, keep: int | None) -> None:
        super().__init__(store.address)
        self._store, self._keep = store, keep
        self._there = set(of_first(self._listed))
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._content: tuple[int, bytes] | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints."""
        return sorted(self._there)

    def damage(self, step: int) -> str | None:
        """Fault of a checkpoint's two objects; both are read."""
        try:
            record = self._record(step)
            self._content = step, self._bytes(record)
        except ValueError as error:
            return str(error)
        return None

    def record(self, step: int) -> dict[str, Any]:
        """The record of a checkpoint that is whole."""
        return self._record(step)

    def delete(self, steps: list[int]) -> None:
        """Deletes checkpoints."""
        self._there -= set(steps)
        if jax.process_index() == 0:
            self._delete(steps)

    def write(self, step: int, arrays: Any, record: dict[str, Any]) -> None:
        """Gathers the arrays on the hosts; the first process puts them in the background."""
        self.wait()
        named = {name: _plain(x) for name, x in _named(arrays).items()}
        if jax.process_index() == 0:
            self._thread = threading.Thread(target=self._put, args=(step, named, record), name=f"checkpoint {step}")
            self._thread.start()
        self._there.add(step)

    def read(self, step: int, like: Any) -> Any:
        """The arrays of a checkpoint, each where `like` says. Every process reads them."""
        record = self._record(step)
        content = self._content[1] if self._content and self._content[0] == step else self._bytes(record)
        self._content = None
        arrays, end = {}, 0
        for name, shape, dtype in record["arrays"]:
            of = jnp.dtype(dtype)
            begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * of.itemsize
            arrays[name] = np.frombuffer(content[begin:end], of).reshape(shape).copy()  # a step may donate it
        wanted = _named(like)
        for name, x in wanted.items():
            there = arrays.get(name)
            if there is None or there.shape != _shape(x) or there.dtype != _dtype(x):
                raise ValueError(f"the checkpoint of step {step} in '{self.name}' cannot be read: {name} is another")
        placed = [_placed(arrays[name], x) for name, x in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), placed)

    def wait(self) -> None:
        """Waits for the thread that writes."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            with contextlib.suppress(OSError):
                self._there = set(self._listed())
            raise error

    def forget(self) -> None:
        """Looks anew at what there is."""
        self._there = set(of_first(self._listed))

    def close(self) -> None:
        """Does nothing: there is no lock."""

    def _put(self, step: int, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
        try:
            content = b"".join(x.tobytes() for x in arrays.values())
            file = f"state-{secrets.token_hex(8)}.bin"
            described = [[name, list(x.shape), str(x.dtype)] for name, x in arrays.items()]
            state = {"file": file, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            text = json.dumps(record | {"arrays": described, "state": state})
            self._store.put(file, content)
            self._store.put(f"{step}.json", text.encode())
            before = [s for s in self.steps() if s < step]
            self._delete(before[: max(0, len(before) + 1 - self._keep)] if self._keep is not None else [])
        except Exception as error:  # raised where it is waited for
            self._error = error

    def _delete(self, steps: list[int]) -> None:
        """Deletes the records first: an array without one is no checkpoint."""
        for step in steps:
            file = None
            with contextlib.suppress(ValueError, OSError):
                file = self._record(step)["state"]["file"]
            self._store.delete(f"{step}.json")
            if file is not None:
                self._store.delete(file)
            self._there.discard(step)

    def _listed(self) -> list[int]:
        return sorted(int(found[1]) for name in self._store.names() if (found := _RECORD.fullmatch(name)))

    def _record(self, step: int) -> dict[str, Any]:
        name = f"{step}.json"
        try:
            record: dict[str, Any] = json.loads(self._store.read(name, _LARGEST, "a record has"))
            state = record["state"]
            fine = re.fullmatch(r"state-[0-9a-f]{16}\.bin", state["file"]) and isinstance(state["size"], int)
            fine = fine and {"adapter", "position", "optimizer", "arrays"} <= set(record)
        except FileNotFoundError as error:
            raise ValueError(f"'{name}' is missing") from error
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"'{name}' is not what was written") from error
        if not fine:
            raise ValueError(f"'{name}' is not what was written")
        return record

    def _bytes(self, record: dict[str, Any]) -> bytes:
        state = record["state"]
        try:
            content = self._store.read(state["file"], state["size"], "its record says")
        except FileNotFoundError as error:
            raise ValueError(f"'{state['file']}' is missing") from error
        if len(content) != state["size"]:
            raise ValueError(f"'{state['file']}' has {len(content)} of {state['size']} bytes")
        if hashlib.sha256(content).hexdigest() != state["sha256"]:
            raise ValueError(f"'{state['file']}' has other bytes than were written (sha256)")
        return content


def _named(arrays: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(keys): x for keys, x in jax.tree.leaves_with_path(arrays)}


def _is_key(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def _plain(x: Any) -> np.ndarray:
    return whole(jax.random.key_data(x) if _is_key(x) else x)


def _shape(x: Any) -> tuple[int, ...]:
    return _data(x).shape if _is_key(x) else tuple(x.shape)


def _dtype(x: Any) -> Any:
    return _data(x).dtype if _is_key(x) else jnp.dtype(x.dtype)


def _data(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of a key's data."""
    shape: jax.ShapeDtypeStruct = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return shape


def _placed(x: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return x
    place = getattr(like, "sharding", None)
    if not _is_key(like):
        return put_whole(x, place)
    return jax.random.wrap_key_data(put_whole(x, place), impl=jax.random.key_impl(like))
