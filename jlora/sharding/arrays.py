"""Arrays onto the devices of a mesh: a tree, the rows of a batch, also where the devices are of several processes."""

import contextlib
import functools
import math
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jlora.transform.explicit import names_of

PyTree = Any
Tree = TypeVar("Tree")


def put(params: Tree, shardings: PyTree) -> Tree:
    """The tree on the devices of its shardings, `Layout.shardings(params, mesh)` or one for all.

    Over several processes each puts the parts of its own devices: every process gives the same whole arrays, and none
    sends anything. `jlora.models.load(sharding=layout.on(mesh))` does not even read the others' parts.
    """
    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda x: put_whole(x, shardings), params)
    return jax.tree.map(put_whole, params, shardings)


def put_whole(x: Any, place: Sharding | None) -> Any:
    """`jax.device_put`, also onto devices of several processes, each of which has the same array."""
    if not hasattr(x, "dtype"):
        return x
    if place is None or place.is_fully_addressable:
        return jax.device_put(x, place)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=place)(x)
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put_whole(jax.random.key_data(x), place)  # a key lies on every device, and so its numbers do
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    array = np.asarray(jax.device_get(x))
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    with _asked_for():
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def _asked_for() -> contextlib.AbstractContextManager[None]:
    """Within, what JAX sends to the devices is no transfer that `jax.transfer_guard` would find: it is asked for."""
    return jax.transfer_guard_host_to_device("allow")


def put_rows(batch: Tree, place: NamedSharding) -> Tree:
    """The arrays of a batch over all devices, from the rows that each process has read.

    In one process the rows are all there are. In several, each gives those that its own devices hold: in the order of
    `row_numbers(place, rows)`, which says which rows of a batch of this size they are; processes whose devices hold the
    same rows (of one "tp" group) give the same ones.

    Args:
      batch: arrays with the process's rows along their first axes, whole rows, also where the tokens of a row lie on
        devices of several processes.
      place: where the rows lie: `Layout.rows(mesh)`.

    Raises:
      ValueError: if the devices do not divide the rows, or the tokens of each.
    """
    check_fits(batch, place)

    def put(x: Any, place: NamedSharding) -> Any:
        if not np.ndim(x):
            return x
        place = of_axes(place, np.ndim(x))
        if isinstance(x, jax.Array) and (place.is_fully_addressable or not x.is_fully_addressable):
            return put_whole(x, place)
        if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x), place), impl=jax.random.key_impl(x))
        x = np.asarray(x)
        with _asked_for():
            return _own_columns(x, place) if len(place.spec) > 1 else jax.make_array_from_process_local_data(place, x)

    return jax.tree.map(lambda x: put(x, place), batch)


def check_fits(batch: PyTree, place: NamedSharding) -> None:
    """Raises ValueError where the devices do not divide the rows of a batch that a process has, or their tokens."""
    here, names = parts_here(place)
    devices = ("the" if here == _parts(place) else "this process's") + f" devices of {names}"
    split = names_of(place.spec[1]) if len(place.spec) > 1 else ()
    parts = math.prod(place.mesh.shape[name] for name in split)
    for path, leaf in jax.tree.leaves_with_path(batch):
        name, shape = f"batch{jax.tree_util.keystr(path)}", np.shape(leaf)
        if not shape or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            continue
        if shape[0] % here:
            raise ValueError(f"{name} has {_off(shape[0], here, devices)}")
        if len(shape) > 1 and shape[1] % parts:
            raise ValueError(
                f"{name} {shape} has {shape[1]} tokens a row, which {parts} devices of {' x '.join(split)} do not "
                f"divide: pad the rows to {-(-shape[1] // parts) * parts}"
            )


def _off(rows: int, parts: int, devices: str) -> str:
    """Words for rows that so many devices do not divide."""
    less = rows - rows % parts
    return f"{rows} rows, not a multiple of {parts}, {devices}: take {less or parts} or {less + parts}"


def of_axes(place: NamedSharding, count: int) -> NamedSharding:
    """The same of an array with so few axes: labels have rows, and no tokens."""
    if len(place.spec) <= count:
        return place
    return NamedSharding(place.mesh, PartitionSpec(*place.spec[:count]), memory_kind=place.memory_kind)


def _own_columns(x: np.ndarray, place: NamedSharding) -> jax.Array:
    """An array of which each process has whole rows, and its devices perhaps a part of each."""
    x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
    here, _ = parts_here(place)
    shape = (len(x) // here * _parts(place), *x.shape[1:])
    first = {int(row): own for own, row in enumerate(row_numbers(place, shape[0]))}

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        return x[(slice(first[start], first[start] + stop - start), *index[1:])]

    return jax.make_array_from_callback(shape, place, part)


def _parts(place: NamedSharding) -> int:
    """In how many parts the rows of a batch lie."""
    return math.prod(place.mesh.shape[name] for name in _names_of_rows(place))


def _names_of_rows(place: NamedSharding) -> tuple[str, ...]:
    return names_of(place.spec[0]) if place.spec else ()


@functools.lru_cache(maxsize=32)
def parts_here(place: NamedSharding) -> tuple[int, str]:
    """In how many parts the rows of a batch lie on the devices of this process, and the axes that part them."""
    return len(row_numbers(place, _parts(place))), " x ".join(_names_of_rows(place))


def row_numbers(place: NamedSharding, rows: int) -> np.ndarray:
    """Which rows of a batch of so many the devices of this process hold, ascending: (own rows,), int64.

    Raises:
      ValueError: if the devices do not divide the rows.
    """
    parts = _parts(place)
    if rows % parts:
        devices = f"the devices of {' x '.join(_names_of_rows(place))}"
        raise ValueError(f"a batch has {_off(rows, parts, devices)}")
    held = of_axes(place, 1).addressable_devices_indices_map((rows,)).values()
    numbers = np.arange(rows)
    return np.unique(np.concatenate([numbers[index] for index in held if index is not None]))
