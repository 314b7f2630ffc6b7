"""Meshes of explicit axes, where the type of an array says how it is sharded: jlora's own arithmetic on such arrays.

There every product, reshape and decomposition has to say where its result lies (JAX raises ShardingTypeError
otherwise). A model says it for its own operations; `on_auto_axes` says it for a whole computation of jlora's.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, reshard, use_abstract_mesh

Place = Callable[[Any], Any]


def replicated(result: Any) -> Any:
    """No axis of a result is split."""
    return jax.tree.map(lambda _: PartitionSpec(), result)


def on_auto_axes(fn: Callable[..., Any], *args: Any, place: Place = replicated) -> Any:
    """`fn(*args)`, computed where XLA sees fit, whatever the types of the arguments say about where these lie.

    Beside `jax.sharding.auto_axes` it finds the mesh in the arguments, so that it needs no `jax.set_mesh`, and the
    places of the results may depend on the results. Without an array on explicit axes it is `fn(*args)`, and inside
    `shard_map`, too, where JAX 0.10 to 0.12 cannot differentiate a change of axes ("closing over inputs to shard_map").

    Args:
      fn: any function of arrays in trees.
      args: its arguments.
      place: result -> the tree of `PartitionSpec` by which it lies on the mesh.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return fn(*args)
    abstract = mesh.abstract_mesh
    kinds = zip(abstract.axis_names, abstract.axis_types, strict=True)
    free = abstract.update_axis_types({name: AxisType.Auto for name, kind in kinds if kind == AxisType.Explicit})
    with use_abstract_mesh(free):
        result = fn(*jax.tree.map(lambda x: reshard(x, PartitionSpec()) if _has_explicit_axes(x) else x, args))
    return jax.tree.map(lambda x, spec: reshard(x, NamedSharding(mesh, spec)), result, place(result))


def explicit_mesh(arrays: Any) -> Mesh | AbstractMesh | None:
    """The mesh that the types of some arrays in a tree name, with its devices if one of them is known; None if none."""
    found: Mesh | AbstractMesh | None = None
    for x in filter(_has_explicit_axes, jax.tree.leaves(arrays)):
        mesh = getattr(getattr(x, "sharding", None), "mesh", None)  # that of a traced array has no devices
        if isinstance(mesh, Mesh):
            return mesh
        found = jax.typeof(x).sharding.mesh
    return found


def spec_of(x: Any) -> PartitionSpec:
    """Spec of an array by its type: no axis where the type says nothing."""
    return jax.typeof(x).sharding.spec if _has_explicit_axes(x) else PartitionSpec(*[None] * x.ndim)


def names_of(part: Any) -> tuple[str, ...]:
    """The axes of a mesh in one entry of a `PartitionSpec`: a name, several of them, or None."""
    return () if part is None else part if isinstance(part, tuple) else (part,)


def _has_explicit_axes(x: Any) -> bool:
    if not isinstance(x, jax.Array):
        return False
    kinds = jax.typeof(x).sharding.mesh.axis_types
    return AxisType.Explicit in kinds and AxisType.Manual not in kinds
