"""The arguments of a compiled training step, on the devices where they belong."""

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jlora import host, tree
from jlora.adapted.adapted import Adapted, partition
from jlora.sharding import Layout, axes_of_rows, beside, check_fits, of_axes, parts_here, put_rows, put_whole

PyTree = Any
Structure = Any  # jax.tree_util.PyTreeDef, which type checkers take for a variable
Kept = tuple[jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic | None, ...]

AXIS = "devices"  # of pmap


class State(Protocol):
    """`jlora.TrainState`."""

    @property
    def adapted(self) -> Adapted: ...
    @property
    def opt_state(self) -> PyTree: ...
    @property
    def step(self) -> jax.Array: ...
    @property
    def skipped(self) -> jax.Array: ...
    @property
    def key(self) -> jax.Array: ...
    @property
    def loss(self) -> jax.Array: ...


class Carry(NamedTuple):
    """Arrays that a step changes; these buffers are donated."""

    factors: PyTree
    opt_state: PyTree
    step: jax.Array
    skipped: jax.Array


@dataclass(frozen=True)
class Skeleton:
    """The static part of the frozen half of an Adapted: its structure, and the leaves that are no arrays."""

    structure: Structure
    leaves: tuple[Any, ...]

    def fill(self, arrays: Kept) -> Adapted:
        leaves = [leaf if array is None else array for array, leaf in zip(arrays, self.leaves, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)


class Arguments(NamedTuple):
    """The arguments of the compiled program. A leaf of the base that is no array (a module's function) is static.

    `loss` is that of the step before: what a state remembers through a step that is left out.
    """

    carry: Carry
    kept: Kept
    key: jax.Array
    batch: PyTree
    skeleton: Skeleton
    loss: jax.Array


def mesh_of(*trees: PyTree) -> contextlib.AbstractContextManager[Any]:
    """The context of the mesh with Explicit axes that the types of arrays name, as `jax.set_mesh` makes it.

    Without one JAX 0.12 forgets where tangents lie, at every jit and scan of a loss, so that their transposes raise.
    """
    shardings = (jax.typeof(x).sharding for x in jax.tree.leaves(trees))
    mesh = next((s.mesh for s in shardings if not s.mesh.empty and s.mesh.explicit_axes), None)
    if mesh is None or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def _split(state: State) -> tuple[Carry, Kept, Skeleton]:
    factors, frozen = partition(state.adapted)
    leaves, structure = jax.tree.flatten(frozen)
    arrays = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)  # a tuple is looked through faster than a union
    kept = tuple(leaf if isinstance(leaf, arrays) else None for leaf in leaves)
    rest = tuple(leaf if array is None else None for leaf, array in zip(leaves, kept, strict=True))
    return Carry(factors, state.opt_state, state.step, state.skipped), kept, Skeleton(structure, rest)


# -- under jit ---------------------------------------------------------------------------------------------------------


def jit_arguments(
    accumulate: int, state: State, batch: PyTree, *, laid: tuple[Mesh, Layout] | None = None
) -> Arguments:
    """The arguments under jit: the state beside the base, and an unplaced batch too. With `laid` both lie on its mesh.

    A base that lies nowhere in particular, on another device than the batch or than the one where programs run, is
    brought there by the first step; later ones find it in the state.
    """
    _check_numbers(batch)
    if laid is not None:
        state, batch = _laid(*laid, state, batch)
    if accumulate > 1:
        _check_batch(batch, accumulate, f"{accumulate} micro-batches (accumulate={accumulate})")
    carry, kept, skeleton = _split(state)
    home = _home([x for x in kept if x is not None], jax.tree.leaves((batch, carry)))
    key, loss = state.key, state.loss
    if home is not None:
        if not home.is_fully_addressable:
            _check_rows(batch)
        if any(_is_elsewhere(home, x) for x in jax.tree.leaves((carry.factors, carry.opt_state))):
            carry = _follow(home, carry, state.adapted, batch)
        carry, key, loss = jax.tree.map(functools.partial(_beside, home), (carry, key, loss))
        kept = jax.tree.map(functools.partial(_settled, home), kept)
    known = tree.abstract if tree.is_abstract(carry.step) else lambda x: x  # what is only lowered is sent nowhere
    batch = jax.tree.map(lambda x: known(x) if isinstance(x, jax.Array) else _settled(home, known(x)), batch)
    return Arguments(carry, kept, key, batch, skeleton, loss)


def _home(kept: list[Any], others: list[Any]) -> Sharding | None:
    """Sharding of the state: all over the mesh of the first sharded array, else with the first committed one.

    Else None, the default device, unless most of what is kept lies on another one.
    """
    # Of every leaf at every step: read without a call for each, and each sharding looked at once.
    put = [x.sharding for x in (*kept, *others) if getattr(x, "committed", False)]
    put += [x.sharding for x in (*kept, *others) if type(x) is jax.ShapeDtypeStruct and x.sharding is not None]
    shardings = list(dict.fromkeys(put))
    for sharding in shardings:
        if isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1:
            return NamedSharding(sharding.mesh, PartitionSpec())
    for sharding in shardings:
        if len(sharding.device_set) == 1:
            return SingleDeviceSharding(*sharding.device_set)
    arrays = [x for x in kept if isinstance(x, jax.Array)]
    default = {_default_device()}
    if all(sharding.device_set == default for sharding in {id(s): s for s in (x.sharding for x in arrays)}.values()):
        return None
    held: dict[jax.Device, int] = {}
    for x in arrays:
        for device in x.sharding.device_set:
            held[device] = held.get(device, 0) + x.nbytes
    most = max(held, key=lambda device: held[device])
    return None if {most} == default else SingleDeviceSharding(most)


def _default_device() -> jax.Device:
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen or jax.local_devices()[0]


def _laid(mesh: Mesh, layout: Layout, state: State, batch: PyTree) -> tuple[State, PyTree]:
    """The base and the batch on the mesh, where the layout says; what lies there already stays."""
    base = state.adapted.base
    leaves, structure = jax.tree.flatten(base)
    if any(hasattr(x, "dtype") and not _is_on(mesh, x) for x in leaves):
        places = jax.tree.leaves(layout.shardings(base, mesh))
        put = [x if _is_on(mesh, x) else _put(x, place) for x, place in zip(leaves, places, strict=True)]
        adapted = state.adapted.replace(base=jax.tree.unflatten(structure, put))
        state = dataclasses.replace(state, adapted=adapted)  # type: ignore[type-var]
    rows = layout.rows(mesh)
    new = [x for x in jax.tree.leaves(batch) if np.ndim(x) and not _is_on(mesh, x)]
    if new:
        parts, names = parts_here(rows)
        rows_alone = jax.tree.map(lambda x: x if np.ndim(x) else None, batch)
        _check_batch(rows_alone, parts, f"{parts} devices of {names}" if names else "the mesh")
        check_fits(jax.tree.map(lambda x: None if _is_on(mesh, x) else x, rows_alone), rows)
    return state, jax.tree.map(lambda x: x if _is_on(mesh, x) else _row(x, rows), batch)


def _row(x: Any, rows: NamedSharding) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(sharding=of_axes(rows, x.ndim)) if x.ndim else x
    return put_rows(x, rows)


def _is_on(mesh: Mesh, x: Any) -> bool:
    place = tree.placement(x)
    return isinstance(place, NamedSharding) and place.mesh == mesh


def _is_elsewhere(home: Sharding, x: Any) -> bool:
    place = tree.placement(x)
    if place is None or place.device_set != home.device_set:
        return True
    return isinstance(home, NamedSharding) and isinstance(place, NamedSharding) and place.mesh != home.mesh


def _follow(home: Sharding, carry: Carry, adapted: Adapted, batch: PyTree) -> Carry:
    """The factors along the axes of their weights; what the optimizer keeps for each of them (moments) beside it."""
    structure: Structure = jax.tree.structure(carry.factors)
    stacks = {site.path: site.stack_axes for site in adapted.sites}
    places = structure.flatten_up_to(beside(carry.factors, adapted.base, axes_of_rows(batch), stacks))
    factors = [
        x if place is None or not _is_elsewhere(home, x) else _put(x, place)
        for x, place in zip(jax.tree.leaves(carry.factors), places, strict=True)
    ]

    def along(x: Any, factor: Any) -> Any:
        place = tree.placement(factor)
        if place is None or x.shape != factor.shape or not _is_elsewhere(home, x):
            return x
        return _put(x, place.with_memory_kind("pinned_host") if host.waits(x) else place)

    def part(x: Any) -> Any:
        if not is_like_factors(x):
            return x
        return jax.tree.unflatten(structure, [*map(along, jax.tree.leaves(x), factors)])

    is_like_factors = lambda x: jax.tree.structure(x) == structure
    opt_state = jax.tree.map(part, carry.opt_state, is_leaf=is_like_factors)
    return carry._replace(factors=jax.tree.unflatten(structure, factors), opt_state=opt_state)


def _beside(home: Sharding, x: jax.Array) -> jax.Array:
    if not _is_elsewhere(home, x):
        return x
    place = tree.placement(x)
    kind = place.memory_kind if place is not None and host.waits(x) else None
    return _put(x, home if kind is None else home.with_memory_kind(kind))


def _settled(home: Sharding | None, x: Any) -> Any:
    """Kept arrays where they were put; those that were put nowhere go home."""
    return x if tree.placement(x) is not None else _put(x, home)


def _put(x: Any, place: Sharding | None) -> Any:
    """`jax.device_put`; of a shape, the shape of an array that lies there."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x if place is None else x.update(sharding=place)
    return put_whole(x, place)


def _check_rows(batch: PyTree) -> None:
    """In several processes each has other rows: which ones an array is that lies nowhere, nobody knows."""
    for path, leaf in jax.tree.leaves_with_path(batch):
        if np.ndim(leaf) and tree.placement(leaf) is None:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} does not say where its rows lie, and the base lies over "
                f"{jax.process_count()} processes: jlora.sharding.put_rows(batch, layout.rows(mesh)) makes a batch of "
                "the rows that each process has"
            )


# -- under pmap --------------------------------------------------------------------------------------------------------


def pmap_arguments(accumulate: int, state: State, batch: PyTree) -> Arguments:
    """The arguments under pmap: the state replicated (nothing moves if it is), the batch as (devices, rows, ...)."""
    if jax.process_count() > 1:
        raise ValueError(
            "parallel='pmap' is for one process: with several, use 'jit' and a batch sharded over the mesh"
        )
    devices = jax.local_devices()
    parts = len(devices) * accumulate
    what = f"{len(devices)} devices" + (f" times {accumulate} micro-batches = {parts} parts" if accumulate > 1 else "")
    _check_numbers(batch)
    _check_batch(batch, parts, what)
    mesh = Mesh(np.array(devices), (AXIS,))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    carry, kept, skeleton = _split(state)
    if any(map(host.waits, jax.tree.leaves(carry.opt_state))):
        raise ValueError(
            "this state's optimizer waits in the host's memory (memory_kind=), which parallel='pmap' does not know: "
            "use parallel='jit'"
        )
    moved = jax.tree.map(functools.partial(_replicated, everywhere), (carry, kept, state.key, state.loss))
    carry, kept, key, loss = moved
    if tree.is_abstract(carry.step):
        batch = jax.tree.map(tree.abstract, batch)
    batch = jax.tree.map(lambda x: _put(_divided(x, len(devices)), split), batch)
    return Arguments(carry, kept, key, batch, skeleton, loss)


def _divided(x: Any, devices: int) -> Any:
    """(rows, ...) as (devices, rows of each, ...)."""
    shape = (devices, x.shape[0] // devices, *x.shape[1:])
    return x.update(shape=shape, sharding=None) if isinstance(x, jax.ShapeDtypeStruct) else x.reshape(shape)


def _replicated(everywhere: NamedSharding, x: jax.Array) -> jax.Array:
    sharding = x.sharding if isinstance(x, jax.Array) else tree.placement(x)
    if sharding == everywhere:
        return x
    if sharding is not None and not sharding.is_fully_replicated:
        raise ValueError(
            f"an array of shape {x.shape} is sharded as {sharding}: parallel='pmap' keeps a whole copy on every "
            "device; use parallel='jit', which keeps shardings"
        )
    return _put(x, everywhere)


# -- the batch ---------------------------------------------------------------------------------------------------------


def _check_numbers(batch: PyTree) -> None:
    """A program takes numbers: no column of texts, dates or objects, as tables have beside what is trained on."""
    for path, leaf in jax.tree.leaves_with_path(batch):
        kind = getattr(getattr(leaf, "dtype", None), "kind", "")
        if isinstance(leaf, str | bytes) or kind in ("U", "S", "O", "T", "M", "m"):
            what = f"an array of {leaf.dtype}" if kind else f"the text {leaf!r:.40}"
            raise TypeError(
                f"batch{jax.tree_util.keystr(path)} is {what}, and a step takes numbers: leave this column out of the "
                "batch, or turn it into numbers (token ids)"
            )


def _check_batch(batch: PyTree, parts: int, what: str) -> None:
    """Every leaf of the batch has the same leading axis, and `parts` divides it."""
    leaves = jax.tree.leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"the batch has no arrays to divide over {what}")
    sizes = {f"batch{jax.tree_util.keystr(path)}": np.shape(leaf) for path, leaf in leaves}
    for name, shape in sizes.items():
        if not shape:
            raise ValueError(f"{name} has no leading axis to divide over {what}")
    first, *others = sizes
    for name in others:
        if sizes[name][0] != sizes[first][0]:
            raise ValueError(
                f"the leaves of the batch have different leading axes: {first} {sizes[first]}, {name} {sizes[name]}; "
                f"all are divided over {what}"
            )
    size = sizes[first][0]
    if size % parts:
        raise ValueError(f"the batch has {size} examples ({first} {sizes[first]}), which {what} do not divide")
