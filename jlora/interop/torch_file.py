"""Tensors out of a file of `torch.save`, without torch, and without doing what a pickle says.

Such a file is a zip: a pickle, and beside it each storage as raw numbers. A pickle may call any function that it names.
This one may name those that make a dict and a tensor, which are replaced by what is here; every other name is refused.
"""

import collections
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


def read(file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a state dict, by name.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for what is no such file, is damaged, holds something else than a dict of tensors, or names a
        function.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            folder = name.removesuffix("data.pkl")
            storage = lambda key, dtype: np.frombuffer(archive.read(f"{folder}data/{key}"), dtype)
            with archive.open(name) as opened:
                found = _Unpickler(opened, storage).load()
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise ValueError(f"'{file}' is no file of tensors by torch.save, or is damaged: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, np.ndarray) for value in found.values()):
        raise ValueError(f"'{file}' holds something else than a dict of tensors")
    return dict(found)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], storage: Callable[[str, np.dtype], np.ndarray]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor needs")
        return known[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, _ = pid  # "storage", its type, its file, the device, the number of elements
        return self._storage(str(key), dtype)


def _tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> np.ndarray:
    """A copy of the elements; strides count elements. Nothing outside of the storage is read."""
    if min((offset, *shape, *strides)) < 0 or len(shape) != len(strides):
        raise ValueError(f"offset {offset}, shape {shape} and strides {strides} are no tensor's")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    if last >= storage.size:
        raise ValueError(f"a tensor ends at element {last} of a storage of {storage.size}")
    size = storage.dtype.itemsize
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, [size * stride for stride in strides]).copy()


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data
