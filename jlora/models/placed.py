"""Where arrays lie on a mesh of Explicit axes, as `jax.make_mesh` makes it: there each array's type says it.

What JAX leaves open is decided here, for all models: activations lie as the tokens do, batch and length where theirs
are and features whole, and a weight comes to them. A kernel that is split over an axis of the batch is gathered for the
product (fully sharded data parallelism), what is split over another axis stays so (tensor parallelism). Where no type
says anything, on Auto axes, on one device, inside `shard_map` and `pmap`, each function here is JAX's or Flax's own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

Spec = tuple[Any, ...]
"""For each axis of an array the mesh axes that it is split over: a name, a tuple of names, or None."""


def explicit_mesh(*arrays: Any) -> AbstractMesh | None:
    """The mesh with Explicit axes that the types of the arrays name; None if none does."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    return next((mesh for mesh in meshes if not mesh.empty and mesh.explicit_axes), None)


def split(*arrays: jax.Array) -> bool:
    """Whether a type says that one of the arrays is split over Explicit axes."""
    return any(part is not None for x in arrays for part in _spec(x))


def whole(x: jax.Array) -> jax.Array:
    """The array on every device."""
    return _placed(x, (None,) * x.ndim)


def whole_along(x: jax.Array, axis: int) -> jax.Array:
    """The array, whole along one of its axes."""
    return _placed(x, tuple(None if i == axis % x.ndim else part for i, part in enumerate(_spec(x))))


def on_one_mesh(tree: Any, others: Any) -> Any:
    """The arrays of a tree; those of no mesh whole on each device of the Explicit one that any array, or other, names.

    A scan needs it, whose carry has one type.
    """
    mesh = explicit_mesh(*jax.tree.leaves((tree, others)))
    if mesh is None:
        return tree
    everywhere = lambda x: jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(lambda x: everywhere(x) if jax.typeof(x).sharding.mesh.empty else x, tree)


def token(h: jax.Array, at: int) -> jax.Array:
    """One token of each row, wherever it lies: (batch, length, width) -> (batch, width)."""
    return whole_along(h, 1)[:, at]


def beside(x: jax.Array, other: jax.Array) -> jax.Array:
    """An array of as many axes, lying as the other does."""
    return _placed(x, _spec(other), other)


def joined(parts: Sequence[jax.Array], axis: int) -> jax.Array:
    """`jnp.concatenate` of arrays that lie as the last one does, which JAX wants them to."""
    return jnp.concatenate([beside(x, parts[-1]) for x in parts], axis=axis)


def clear(x: jax.Array, rows: jax.Array) -> jax.Array:
    """The array, whole along the mesh axes over which the leading axes of `rows` (..., features) are split."""
    if not split(x, rows):
        return x
    return _placed(x, tuple(_without(part, _spec(rows)[:-1]) for part in _spec(x)))


def pieces(x: jax.Array, *axes: int) -> int:
    """Over how many devices these axes of an array are split, all together: 1 where no type says it."""
    mesh = explicit_mesh(x)
    return 1 if mesh is None else math.prod(mesh.shape[name] for axis in axes for name in _names(_spec(x)[axis]))


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`, (..., inputs) by (inputs, outputs)."""
    if not split(x, kernel):
        return x @ kernel
    x, kernel, _ = _together(x, kernel, None, dtype=None)
    return _product(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def in_heads(x: jax.Array, heads: int, groups: int | None = None) -> jax.Array:
    """(..., features) -> (..., heads, width); split features stay so if the heads can be dealt out, else are whole.

    Groups of heads are not parted: those of the queries that one key serves.
    """
    mesh, last = explicit_mesh(x), _spec(x)[-1]
    if mesh is not None and (groups or heads) % math.prod(mesh.shape[name] for name in _names(last)):
        x = _placed(x, (*_spec(x)[:-1], None))
    return x.reshape(*x.shape[:-1], heads, -1)


def added(h: jax.Array, y: jax.Array) -> jax.Array:
    """`h + y`, lying as h does: all along the residual stream, a scan's carry."""
    return h + beside(y, h)


def output(h: jax.Array) -> jax.Array:
    """Output of a model: float32, features whole, so that losses find each row's logits together."""
    return _placed(h, (*_spec(h)[:-1], None)).astype(jnp.float32)


def taken(x: jax.Array, indices: jax.Array, axis: int, mode: str | None = None) -> jax.Array:
    """`jnp.take_along_axis`, whose gradient JAX cannot place by itself."""

    def take(x: jax.Array, indices: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, indices, axis=axis, mode=mode)

    return on_auto_axes(take, _spec(x))(x, indices) if split(x) else take(x, indices)


def looked_up(table: jax.Array, indices: jax.Array, **options: Any) -> jax.Array:
    """`table.at[indices].get(...)`: rows of a table, lying as their indices do."""
    if split(table, indices):
        options["out_sharding"] = _sharding(_spec(indices), indices, table)
    return table.at[indices].get(**options)


def rows_of(x: jax.Array) -> Spec:
    """Spec of an array's rows, by its type."""
    return _spec(x)[:1]


def on_auto_axes(fn: Callable[..., Any], *specs: Spec) -> Callable[..., Any]:
    """The function with the compiler to decide where its arrays lie, but for the arguments and for what it returns.

    Args:
      fn: a function of trees of arrays that returns one array, or a tuple of them.
      specs: of each that it returns; axes that are left out are whole.
    """

    def on_mesh(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        mesh = explicit_mesh(*leaves)
        if mesh is None:
            return fn(*args)
        shardings = tuple(NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs)
        flat = lambda *leaves: fn(*jax.tree.unflatten(structure, leaves))
        return jax.sharding.auto_axes(
            flat, axes=mesh.explicit_axes, out_sharding=shardings[0] if len(specs) == 1 else shardings
        )(*leaves)

    return on_mesh


def lying_as(x: jax.Array, fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose result lies as x: for a kernel whose own type would say that it is whole everywhere."""
    return on_auto_axes(fn, _spec(x)) if split(x) else fn


# -- layers ------------------------------------------------------------------------------------------------------------


def _together(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, dtype: Any) -> Any:
    """Flax's `promote_dtype` of a linear layer, which also brings kernel and bias to the input."""
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=dtype)
    if split(x, kernel) or (bias is not None and split(bias)):
        features, (contracted, out) = _spec(x)[-1], _spec(clear(kernel, x))
        both = None not in (contracted, features) and contracted != features
        kernel = _placed(kernel, (features if both else contracted, out))
        if not split(x):  # JAX 0.12 forgets the mesh in the tangent of a whole array that a scan closes over
            x = jax.sharding.reshard(x, _sharding((None,) * x.ndim, *(y for y in (x, kernel, bias) if y is not None)))
        bias = None if bias is None else _placed(bias, (out,))
    return x, kernel, bias


def _product(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None, **options: Any) -> jax.Array:
    """`jax.lax.dot_general` of a linear layer: where both sides are split along the sum, the parts are added up."""
    if split(x) and split(kernel):
        *rows, features = _spec(x)
        contracted, out = _spec(kernel)
        if features is not None and contracted is not None:
            options["out_sharding"] = _sharding((*rows, _without(out, [features])), x)
    return jax.lax.dot_general(x, kernel, dimensions, precision=precision, **options)


class Dense(nn.Dense):
    """`nn.Dense`."""

    promote_dtype: Any = _together
    dot_general: Any = _product


class Embed(nn.Embed):
    """`nn.Embed`: vectors lie as their ids do."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        if not split(inputs, self.embedding):
            return super().__call__(inputs)
        table: Any
        (table,) = self.promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        if self.num_embeddings == 1:
            return jnp.broadcast_to(whole(table), (*inputs.shape, self.features))
        if sum(part is not None for part in _spec(inputs)) > 1:  # XLA brings features to rows, not to rows and tokens
            table = _placed(table, tuple(_without(part, _spec(inputs)) for part in _spec(table)))
        return looked_up(table, inputs, mode="fill")

    def attend(self, query: jax.Array) -> jax.Array:
        if not split(query, self.embedding):
            return super().attend(query)
        promoted: Any = self.promote_dtype(query, self.embedding, dtype=self.dtype)
        return matmul(promoted[0], promoted[1].T)


class Dropout(nn.Dropout):
    """`nn.Dropout`, the mask lying as the inputs do; the numbers are those of one device."""

    @nn.compact
    def __call__(self, inputs: jax.Array, deterministic: bool | None = None, rng: jax.Array | None = None) -> jax.Array:
        still = nn.merge_param("deterministic", self.deterministic, deterministic)
        if still or not 0 < self.rate < 1 or not split(inputs):
            return super().__call__(inputs, deterministic, rng)
        key = self.make_rng(self.rng_collection) if rng is None else rng
        shape = [1 if axis in self.broadcast_dims else size for axis, size in enumerate(inputs.shape)]
        kept = beside(jnp.broadcast_to(jax.random.bernoulli(key, 1 - self.rate, tuple(shape)), inputs.shape), inputs)
        return jax.lax.select(kept, inputs / (1 - self.rate), jnp.zeros_like(inputs))


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` of whole features."""

    @nn.nowrap
    def param(self, *args: Any, **kwargs: Any) -> Any:
        return whole(super().param(*args, **kwargs))


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` of whole features, with variance E (x - E x)^2: E x^2 - (E x)^2 loses it beside a large mean."""

    use_fast_variance: bool = False

    @nn.nowrap
    def param(self, *args: Any, **kwargs: Any) -> Any:
        return whole(super().param(*args, **kwargs))


class Conv(nn.Conv):
    """`nn.Conv` with a whole kernel."""

    @nn.nowrap
    def param(self, *args: Any, **kwargs: Any) -> Any:
        return whole(super().param(*args, **kwargs))


# -- specs -------------------------------------------------------------------------------------------------------------


def _spec(x: jax.Array) -> Spec:
    """Spec of an array by its type; all None without Explicit axes."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return (*spec, *(None for _ in range(x.ndim - len(spec))))


def _without(part: Any, others: Sequence[Any]) -> Any:
    """Mesh axes that one axis is split over, without those that others are split over."""
    names = _names(part)
    kept = tuple(name for name in names if all(name not in _names(other) for other in others))
    return part if kept == names else kept or None


def _names(part: Any) -> tuple[str, ...]:
    return () if part is None else part if isinstance(part, tuple) else (part,)


def _sharding(spec: Spec, *arrays: jax.Array) -> NamedSharding:
    """Sharding of a spec on the mesh of the arrays."""
    mesh = explicit_mesh(*arrays)
    assert mesh is not None
    return NamedSharding(mesh, PartitionSpec(*spec))


def _placed(x: jax.Array, spec: Spec, *others: jax.Array) -> jax.Array:
    return x if _spec(x) == tuple(spec) else jax.sharding.reshard(x, _sharding(spec, x, *others))
