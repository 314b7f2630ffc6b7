"""Where the arrays of a plan lie: shapes on the devices, or the mesh, that it is made for."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jlora import tree
from jlora.adapted.adapted import Adapted
from jlora.planning import targets
from jlora.planning.devices import Wanted
from jlora.quant.place import shardings_of
from jlora.quant.quantised import Quantised
from jlora.sharding import Layout, beside, indivisible
from jlora.transform.explicit import names_of

PyTree = Any
Axes = Mesh | AbstractMesh | Mapping[str, int] | tuple[tuple[str, int], ...]
Rule = Callable[[str, Any], PartitionSpec | None]


def places(wanted: Wanted, mesh: Axes | None) -> Mesh | SingleDeviceSharding:
    """The mesh over the devices of a plan, or its one device.

    Raises:
      ValueError: if the mesh has another number of devices than the name says, or "dcn" is not what goes over slices.
    """
    count = wanted.total
    if mesh is None and (count or 1) == 1:
        return SingleDeviceSharding(targets.devices_of(wanted, 1)[0])
    names, sizes, kinds = _axes({"fsdp": count} if mesh is None else mesh)
    whole = math.prod(sizes)
    if count is not None and count != whole:
        mine = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
        raise ValueError(f"the device's name says {count} devices, and mesh {mine} has {whole}")
    if wanted.slices > 1 and "dcn" in names and (names[0], sizes[0]) != ("dcn", wanted.slices):
        raise ValueError(
            f"the mesh's axis 'dcn' goes over the {wanted.slices} slices: it comes first and has their number, "
            f"{{'dcn': {wanted.slices}, 'fsdp': {whole // wanted.slices}}}"
        )
    found = targets.devices_of(wanted, whole)
    return Mesh(targets.arranged(sizes, found), names, axis_types=kinds)


def automatic(place: Mesh | SingleDeviceSharding) -> Mesh | SingleDeviceSharding:
    """The same mesh with axes of kind Auto."""
    if isinstance(place, SingleDeviceSharding):
        return place
    return Mesh(place.devices, place.axis_names, axis_types=(AxisType.Auto,) * len(place.axis_names))


def _axes(mesh: Any) -> tuple[tuple[str, ...], tuple[int, ...], tuple[AxisType, ...]]:
    if isinstance(mesh, Mesh | AbstractMesh):
        return mesh.axis_names, tuple(mesh.shape[name] for name in mesh.axis_names), mesh.axis_types
    try:
        sizes = {str(name): int(size) for name, size in dict(mesh).items()}
    except (TypeError, ValueError):
        sizes = {}
    if not sizes or min(sizes.values()) < 1:
        raise TypeError(f"mesh is a jax.sharding.Mesh, an AbstractMesh or a dict such as {{'fsdp': 16}}, got {mesh!r}")
    return tuple(sizes), tuple(sizes.values()), (AxisType.Explicit,) * len(sizes)


def placed(name: str, of: PyTree, place: Mesh | SingleDeviceSharding, rule: Rule | None) -> PyTree:
    """The tree's shapes, lying where the rule says, else as they did on their own mesh, else whole.

    Raises:
      ValueError: for a spec that names no axis of the mesh, or whose axes do not divide the leaf's.
    """

    def one(keys: tuple[Any, ...], leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf) if isinstance(leaf, bool | int | float) and name == "batch" else leaf
        x = tree.abstract(leaf)
        if not isinstance(x, jax.ShapeDtypeStruct):
            return leaf
        kind = getattr(x.sharding, "memory_kind", None)
        kind = kind if kind == "pinned_host" else None  # another one is the default of the device where it lies
        if isinstance(place, SingleDeviceSharding):
            (device,) = place.device_set
            return x.update(sharding=SingleDeviceSharding(device, memory_kind=kind))
        path = "/".join(filter(None, (name, tree.name(keys))))
        spec = rule(path, x) if rule is not None else _spec(x.sharding)
        spec = PartitionSpec() if spec is None else PartitionSpec(*spec)
        _check(path, x, spec, place)
        return x.update(sharding=NamedSharding(place, spec, memory_kind=kind))

    def whole(keys: tuple[Any, ...], leaf: Any) -> Any:
        if rule is None or not isinstance(leaf, Quantised) or not isinstance(place, Mesh):
            return jax.tree_util.tree_map_with_path(lambda inner, x: one((*keys, *inner), x), leaf)
        # Codes and scales lie along the axes of the weight, of which the rule speaks.
        path = "/".join(filter(None, (name, tree.name(keys))))
        spec = PartitionSpec(*(rule(path, leaf) or ()))
        _check(path, leaf, spec, place)
        places = shardings_of(leaf, NamedSharding(place, spec), path)
        return jax.tree.map(lambda x, sharding: tree.abstract(x).update(sharding=sharding), leaf, places)

    return jax.tree_util.tree_map_with_path(whole, of, is_leaf=tree.is_stored)


def is_placed(*trees: PyTree) -> bool:
    """Whether an array says that it is split over a mesh."""
    return any(_spec(tree.placement(leaf)) for leaf in jax.tree.leaves(trees))


def fully_sharded(mesh: Mesh | AbstractMesh) -> Rule:
    """The rule where nothing says anything: each weight split over the whole mesh, along its largest axis that can be.

    The first of several axes of a stack (scanned layers) stays whole, and so does a block of codes. The batch's rows
    are split, the factors whole.
    """
    names, size = tuple(mesh.axis_names), mesh.size

    def rule(path: str, x: Any) -> PartitionSpec | None:
        if path.startswith("batch"):
            return PartitionSpec(names) if x.shape and x.shape[0] % size == 0 else None
        if not path.startswith("base"):
            return None
        able = [axis for axis in range(x.ndim > 2, x.ndim) if x.shape[axis] % size == 0 and x.shape[axis]]
        for most in sorted(able, key=lambda axis: -x.shape[axis]):
            spec = PartitionSpec(*(names if axis == most else None for axis in range(x.ndim)))
            if not isinstance(x, Quantised) or _keeps_blocks(x, NamedSharding(mesh, spec), path):
                return spec
        return None

    return rule


def laid(layout: Layout, mesh: Mesh, adapted: Adapted) -> Rule:
    """The rule of a layout: weights and rows as it says, factors along the axes of their weights."""
    base = jax.tree.map(tree.abstract, adapted.base)
    on, rows = layout.on(mesh), layout.rows(mesh).spec
    lying = placed("base", base, mesh, lambda path, x: on(path.removeprefix("base/"), x).spec)
    stacks = {site.path: site.stack_axes for site in adapted.sites}
    found = beside(adapted.factors, lying, [name for part in rows for name in names_of(part)], stacks)
    factors = {f"{path}/{part}": place for path, own in found.items() for part, place in own.items()}

    def rule(path: str, x: Any) -> PartitionSpec | None:
        kind, _, rest = path.partition("/")
        if kind == "base":
            return on(rest, x).spec
        if kind == "batch":
            return PartitionSpec(*rows[: len(x.shape)]) if x.shape else None
        place = factors.get(rest) if kind == "factors" else None
        return None if place is None else place.spec

    return rule


def _keeps_blocks(x: Quantised, sharding: NamedSharding, path: str) -> bool:
    try:
        shardings_of(x, sharding, path)
    except ValueError:
        return False
    return True


def _spec(sharding: Sharding | None) -> Any:
    return sharding.spec if isinstance(sharding, NamedSharding) else None


def _check(path: str, x: Any, spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > x.ndim:
        raise ValueError(f"{path} has shape {x.shape}, and its spec {spec} has more axes")
    for axis, names in enumerate(spec):
        names = names_of(names)
        for name in names:
            if name not in mesh.shape:
                raise ValueError(f"{path}: {spec} names {name!r}, and the mesh has {', '.join(map(repr, mesh.shape))}")
        parts = math.prod(mesh.shape[name] for name in names)
        if x.shape[axis] % parts:
            raise ValueError(indivisible(path, x.shape, axis, names, mesh))


def bytes_of(trees: PyTree) -> int:
    """Bytes of a tree's arrays on one device: the shapes of their shards, times the size of an element."""
    return sum(map(_bytes, jax.tree.leaves(trees)))


def _bytes(x: Any) -> int:
    if not hasattr(x, "dtype"):
        return 0
    sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct | jax.Array) else None
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return -(-math.prod(shape) * _bits(x.dtype) // 8)


def _bits(dtype: Any) -> int:
    if jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        return 8 * int(np.prod(jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype)).shape)) * 4
    return int(jax.numpy.iinfo(dtype).bits) if "int" in str(dtype) else int(np.dtype(dtype).itemsize) * 8
