"""The devices of a run: one of them, or a mesh of all, in one process or several.

`used(of(...))` makes a mesh that of all that is called within, as `jax.set_mesh` does for JAX; the loop, the tasks
and the reports put batches there and fetch results through `current()`, and need not know how many devices there are.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments import hosts
from experiments.configfile import ConfigError
from jlora import sharding
from jlora.checkpoint.processes import whole
from jlora.sharding import MODELS, Layout
from jlora.sharding.arrays import of_axes
from jlora.transform.explicit import names_of

Tree = TypeVar("Tree")
Batches = Callable[[int], Any]


@dataclass(frozen=True, eq=False)
class Devices:
    """Where arrays go.

    Attributes:
      mesh: None for one device, the default one.
      layout: of weights and rows.
    """

    mesh: Mesh | None = None
    layout: Layout = MODELS

    @property
    def rows(self) -> NamedSharding | None:
        """Where the rows of a batch lie; None on one device."""
        return None if self.mesh is None else self.layout.rows(self.mesh)

    @property
    def parts(self) -> int:
        """In how many parts the rows of a batch lie on the devices: a batch is a multiple of it."""
        rows = self.rows
        if rows is None or not rows.spec:
            return 1
        return math.prod(rows.mesh.shape[name] for name in names_of(rows.spec[0]))

    def fitting(self, batch: int) -> int:
        """The next larger batch that the devices divide."""
        return -(-batch // self.parts) * self.parts

    def own(self, batches: Batches, batch: int) -> Batches:
        """The same batches; in several processes the rows of them that this one's devices hold.

        Batches that can (`rows_of`) read no others.

        Args:
          batches: step -> all rows.
          batch: their number.
        """
        if self.rows is None or not hosts.several():
            return batches
        numbers = sharding.row_numbers(self.rows, batch)
        read: Any = getattr(batches, "rows_of", None)
        if read is not None:
            return lambda step: read(step, numbers)
        return lambda step: jax.tree.map(lambda x: x[numbers] if np.ndim(x) else x, batches(step))

    def put(self, batch: Any) -> Any:
        """Rows that every process has, on the devices: split over them where they can be, else whole on each."""
        rows = self.rows
        if rows is None:
            return jax.device_put(batch)

        def put(x: Any) -> Any:
            place = of_axes(rows, np.ndim(x))
            try:
                place.shard_shape(np.shape(x))
            except ValueError:
                place = self._whole
            return sharding.put_whole(np.asarray(x), place)

        return jax.tree.map(put, batch)

    def fetched(self, tree: Tree) -> Tree:
        """The arrays on the host, whole, in every process."""
        if self.mesh is None or not hosts.several():
            return jax.device_get(tree)
        return jax.tree.map(whole, tree)

    def gathered(self, tree: Tree) -> Tree | None:
        """The arrays on the host of the first process, whole; None in the others, which hold one array at a time."""
        if not hosts.several():
            return tree
        leaves, structure = jax.tree.flatten(tree)
        kept = [self._gathered(x) for x in leaves]
        return jax.tree.unflatten(structure, kept) if hosts.is_first() else None

    def _gathered(self, x: Any) -> np.ndarray | None:
        """An array on the host of the first process: of a stack of layers one layer after the other."""
        stacked = isinstance(x, jax.Array) and x.ndim > 2 and len(x) and not names_of((*_spec(x), None)[0])
        parts = []
        for part in (x[i : i + 1] for i in range(len(x))) if stacked else (x,):
            found = whole(part)
            if hosts.is_first():
                parts.append(found)
        if not hosts.is_first():
            return None
        return np.concatenate(parts) if stacked else parts[0]

    def placed(self, params: Tree) -> Tree:
        """Parameters on the devices, as the layout has them; what lies on the mesh already stays."""
        if self.mesh is None:
            return params
        return sharding.put(params, self.layout.shardings(params, self.mesh))

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `jlora.models.load`: each process reads the parts of its own devices, straight onto them."""
        return {} if self.mesh is None else {"sharding": self.layout.on(self.mesh)}

    def beside(self, tree: Tree) -> Tree:
        """The arrays of a tree that do not lie on the mesh, whole on each device, as the factors of an adapter."""
        if self.mesh is None:
            return tree
        mesh, whole = self.mesh, self._whole

        def put(x: Any) -> Any:
            there = isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
            return x if there or not hasattr(x, "dtype") else sharding.put_whole(x, whole)

        return jax.tree.map(put, tree)

    @property
    def _whole(self) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec())

    def __str__(self) -> str:
        if self.mesh is None:
            return "one device"
        axes = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        many = f"{jax.process_count()} processes, " if hosts.several() else ""
        return f"{many}{self.mesh.size} devices: {axes}"


def unused() -> str:
    """Words on accelerators that a run on one device leaves idle; none where there are none."""
    count = jax.local_device_count()
    if current().mesh is not None or count == 1 or jax.default_backend() == "cpu":  # whose devices are fake
        return ""
    return f"1 of {count}: mesh=fsdp=-1 uses all of them"


def _spec(x: jax.Array) -> tuple[Any, ...]:
    return tuple(x.sharding.spec) if isinstance(x.sharding, NamedSharding) else ()


_CURRENT: ContextVar[Devices] = ContextVar("devices", default=Devices())  # noqa: B039


def current() -> Devices:
    """The devices of `used`; one device outside of it."""
    return _CURRENT.get()


@contextlib.contextmanager
def used(devices: Devices) -> Iterator[Devices]:
    """Makes these devices the current ones."""
    token = _CURRENT.set(devices)
    try:
        yield devices
    finally:
        _CURRENT.reset(token)


def of(mesh: Mapping[str, int] | str | None) -> Devices:
    """The devices of a config's `mesh`.

    Args:
      mesh: name -> devices along the axis, -1 for all that are left; or the same as a text, "fsdp=8,tp=2". None: one
        device, or "fsdp" over all of them where there are several processes.

    Raises:
      ConfigError: if it is no such mapping, has an axis that the layout does not know, or another number of devices
        than there are.
    """
    count = jax.device_count()
    if mesh is None:
        if not hosts.several():
            return Devices()
        mesh = {"fsdp": count}
    known, sizes = MODELS.axes, _sizes(mesh)
    for name, size in sizes.items():
        if name not in known:
            raise ConfigError(f"mesh: there is no axis {name!r}; the axes are {', '.join(known)}")
        if type(size) is not int or size == 0 or size < -1:
            raise ConfigError(f"mesh.{name} is a number of devices, or -1 for all that are left; got {size!r}")
    left = [name for name, size in sizes.items() if size == -1]
    taken = math.prod(size for size in sizes.values() if size != -1)
    if len(left) > 1:
        raise ConfigError(f"mesh: {' and '.join(left)} cannot both have all devices that are left")
    if left:
        sizes[left[0]] = max(count // taken, 1)
    size = math.prod(sizes.values())
    if size > count or (hosts.several() and size != count):
        raise ConfigError(
            f"mesh={mesh} has {size} devices{' at least' if left else ''}, and there are {count}"
            + (f" of {jax.process_count()} processes, which are all needed" if hosts.several() else "")
        )
    names = tuple(sizes)
    kinds = (AxisType.Explicit,) * len(names)
    return Devices(jax.make_mesh(tuple(sizes.values()), names, axis_types=kinds, devices=jax.devices()[:size]))


def _sizes(mesh: Mapping[str, int] | str) -> dict[str, Any]:
    if not isinstance(mesh, str):
        return dict(mesh)
    pairs = [part.partition("=") for part in mesh.split(",")]
    if not all(name.strip() and re.fullmatch(r"\s*-?\d+\s*", size) for name, _, size in pairs):
        raise ConfigError(f"mesh is name=size, several with commas: mesh=fsdp=8,tp=2; got {mesh!r}")
    return {name.strip(): int(size) for name, _, size in pairs}
