"""Rules of the primitives for a lazy weight: stay in the form, be multiplied, or (everything else) materialise.

A primitive that is not listed here, or a case that the form cannot express, materialises the weight before the
operation: slower, never wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from jlora import tree
from jlora.transform import view
from jlora.transform.convolution import conv_general_dilated
from jlora.transform.jaxprs import varying_axes
from jlora.transform.product import add, compute_dtype, is_linear, keeps
from jlora.transform.trace import Product, stored_axes
from jlora.transform.weight import NotSeparable, Weight, drop, restricted

# -- operations that stay in the form: (weight, other operands, params) -> weight or weights ---------------------------


def _split(weight: Weight, params: dict[str, Any]) -> list[Weight]:
    axis, parts, at = params["axis"], [], 0
    for size in params["sizes"]:
        start = [0] * weight.ndim
        limit = list(weight.shape)
        start[axis], limit[axis] = at, at + int(size)
        parts.append(weight.slice(start, limit, None))
        at += int(size)
    return parts


def _unstack(weight: Weight, params: dict[str, Any]) -> list[Weight]:
    axis, rows = params["axis"], []
    shape = [n for i, n in enumerate(weight.shape) if i != axis]
    for at in range(weight.shape[axis]):
        start, limit = [0] * weight.ndim, list(weight.shape)
        start[axis], limit[axis] = at, at + 1
        rows.append(weight.slice(start, limit, None).reshape(shape))
    return rows


def _tile(weight: Weight, params: dict[str, Any]) -> Weight:
    reps = params["reps"]

    def act(x: jax.Array, spanned: tuple[int, ...], extra: int) -> jax.Array:
        return jnp.tile(x, [n if i in spanned else 1 for i, n in enumerate(reps)] + [1] * extra)

    return weight.on_axes(act, [i for i, n in enumerate(reps) if n != 1])


def _convert(weight: Weight, params: dict[str, Any]) -> Weight:
    if not stays_in_form(weight.w.dtype, params["new_dtype"]):
        raise NotSeparable(f"cast to {params['new_dtype']}")
    return weight.astype(params["new_dtype"])


def stays_in_form(before: Any, after: Any) -> bool:
    """Whether a cast only says in which precision to compute: to fewer than 16 bits it quantises the sum."""
    if not jnp.issubdtype(after, jnp.floating):
        return False
    return jnp.finfo(after).bits >= min(16, jnp.finfo(before).bits)


def _reshape(weight: Weight, params: dict[str, Any]) -> Weight:
    if params.get("dimensions") is not None:
        weight = weight.transpose(params["dimensions"])
    return weight.reshape(params["new_sizes"], params.get("sharding"))


def _squeeze(weight: Weight, params: dict[str, Any]) -> Weight:
    gone = params["dimensions"]
    return weight.reshape([n for i, n in enumerate(weight.shape) if i not in gone])


def _constrain(weight: Weight, params: dict[str, Any]) -> Weight:
    # The factors are small: where the compiler puts them is left to it.
    place = params["sharding"]
    if tree.is_stored(weight.w) and isinstance(place, NamedSharding):
        return weight.replace(w=view.placed(weight.w, "constrain", place))
    return weight.replace(w=lax.with_sharding_constraint(tree.dense(weight.w), place))


UNARY: dict[str, Callable[[Weight, dict[str, Any]], Weight | list[Weight]]] = {
    "convert_element_type": _convert,
    "copy": lambda weight, params: weight,
    "copy_p": lambda weight, params: weight,
    "name": lambda weight, params: weight,
    "neg": lambda weight, params: weight.negate(),
    "reshape": _reshape,
    "rev": lambda weight, params: weight.rev(params["dimensions"]),
    "sharding_constraint": _constrain,
    "slice": lambda weight, params: weight.slice(params["start_indices"], params["limit_indices"], params["strides"]),
    "split": _split,
    "tile": _tile,
    "unstack": _unstack,
    "stop_gradient": lambda weight, params: weight.map(lambda x, extra: lax.stop_gradient(x), stored=lambda w: w),
    "squeeze": _squeeze,
    "transpose": lambda weight, params: weight.transpose(params["permutation"]),
}


def _reshard(weight: Weight, bind: Callable[..., Any], params: dict[str, Any]) -> Weight:
    """Another place on an explicit mesh, or another mesh: each part follows on the axes that it spans."""
    target = params["dst_sharding"]

    def part(x: jax.Array, extra: int) -> jax.Array:
        return bind(x, **{**params, "dst_sharding": restricted(target, x.shape, weight.shape)})

    return weight.map(part, stored=lambda w: view.placed(w, "reshard", target))


def _vary(weight: Weight, bind: Callable[..., Any], params: dict[str, Any]) -> Weight:
    """Inside `shard_map`: parts that vary over the mesh already, as a sharded base, stay as they are."""

    def part(x: jax.Array, extra: int) -> jax.Array:
        missing = tuple(axis for axis in params["axes"] if axis not in varying_axes(x))
        return bind(x, **{**params, "axes": missing}) if missing else x

    return weight.map(part, stored=lambda w: jax.tree.map(lambda x: part(x, 0), w))


PLACES: dict[str, Callable[[Weight, Callable[..., Any], dict[str, Any]], Weight]] = {
    "pvary": _vary,
    "reshard": _reshard,
}


def structural(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> list[Weight] | None:
    """The lazy result of an operation that stays in the form, or None if it is not such an operation.

    Raises:
      NotSeparable: if it is, but not for this weight.
    """
    first, name = values[0], primitive.name
    if name == "optimization_barrier":
        return list(values)
    if name in ("mul", "div") and len(values) == 2:
        return _scaled(name, *values)
    if not isinstance(first, Weight) or any(isinstance(v, Weight) for v in values[1:]):
        return None
    if name in PLACES and len(values) == 1:
        return [PLACES[name](first, primitive.bind, params)]
    if name in UNARY and len(values) == 1:
        out = UNARY[name](first, params)
        return out if isinstance(out, list) else [out]
    if name == "broadcast_in_dim" and len(values) == 1:
        return [first.broadcast_in_dim(params["shape"], params["broadcast_dimensions"], params.get("sharding"))]
    if name == "dynamic_slice":
        return [first.dynamic_slice(values[1:], params["slice_sizes"])]
    if name == "pad":
        return [first.pad(values[1], params["padding_config"])]
    return None


def _scaled(primitive: str, left: Any, right: Any) -> list[Weight] | None:
    weight, factor = (left, right) if isinstance(left, Weight) else (right, left)
    if isinstance(factor, Weight) or (primitive == "div" and weight is right):
        return None
    fits = factor.ndim == weight.ndim and all(n in (1, m) for n, m in zip(factor.shape, weight.shape, strict=True))
    if factor.ndim and not fits:
        raise NotSeparable("product with a larger array")
    return [weight.scale(factor, divide=primitive == "div")]


# -- products: (weight, values, params) -> result, low-rank FLOPs, stored axes in, out, stack ------------


def dot_general(weight: Weight, values: Sequence[Any], params: dict[str, Any]) -> Product:
    """`lax.dot_general` with the weight as either operand."""
    weight_first = values[0] is weight
    x = values[1] if weight_first else values[0]
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    contracted, batch = (left, left_batch) if weight_first else (right, right_batch)
    in_axes, stack_axes = stored_axes(weight, contracted), stored_axes(weight, batch) + weight.stack
    out_axes = stored_axes(weight, [i for i in range(weight.ndim) if i not in contracted and i not in batch])
    if weight.gathered and not (in_axes and out_axes):
        raise NotSeparable("rows of a table")
    value = weight.dot(
        x,
        params["dimension_numbers"],
        weight_first,
        params["precision"],
        params["preferred_element_type"],
        params.get("out_sharding"),
        params.get("met"),
    )
    flops = 2 * weight.rank * (x.size + value.size)
    return Product(value, in_axes, out_axes, stack_axes + weight.gathered, flops)


def ragged_dot_general(weight: Weight, values: Sequence[Any], params: dict[str, Any]) -> Product:
    """`lax.ragged_dot`: rows (m, k) of several groups with one (k, n) kernel per group."""
    x, kernel, sizes = values
    numbers = params["ragged_dot_dimension_numbers"]
    basic = tuple(map(tuple, numbers.dot_dimension_numbers[0])) == ((1,), (1,)) and not any(
        numbers.dot_dimension_numbers[1]
    )
    grouped = tuple(numbers.rhs_group_dimensions) == (0,) and tuple(numbers.lhs_ragged_dimensions) == (0,)
    if kernel is not weight or not (basic and grouped) or weight.gain is not None:
        raise NotSeparable("ragged product of another form")
    result = params["preferred_element_type"]
    if not is_linear(x, result):
        raise NotSeparable(f"product of {x.dtype} in {jnp.dtype(result)}")
    options = {"precision": params["precision"], "preferred_element_type": result}
    value = lax.ragged_dot(x, weight.w, sizes, **options)
    if weight.rank:
        u, v = _ragged_factors(weight)
        dtype = compute_dtype(x, weight.w)
        options["preferred_element_type"] = result if keeps(result, dtype) else None
        branch = x.astype(dtype) if weight.key is None else drop(x.astype(dtype), weight.key, weight.dropout)
        inner = lax.ragged_dot(branch, lax.squeeze(u, (2,)).astype(dtype), sizes, **options)  # (m, rank)
        out = lax.transpose(lax.squeeze(v, (1,)), (0, 2, 1)).astype(dtype)  # (group, rank, n)
        value = add(value, lax.ragged_dot(inner.astype(dtype), out, sizes, **options))
    flops = 2 * weight.rank * (x.size + value.size)
    return Product(
        value, stored_axes(weight, [1]), stored_axes(weight, [2]), stored_axes(weight, [0]) + weight.stack, flops
    )


def _ragged_factors(weight: Weight) -> tuple[jax.Array, jax.Array]:
    """The factor of the inputs (group, k, 1, rank) and that of the outputs (group, 1, n, rank), for every group."""
    a, b = weight.a, weight.b
    assert a is not None and b is not None
    for u, v in ((a, b), (b, a)):
        if 2 not in weight.varies(u) and 1 not in weight.varies(v):
            groups, k, n = weight.shape
            return jnp.broadcast_to(u, (groups, k, 1, weight.rank)), jnp.broadcast_to(v, (groups, 1, n, weight.rank))
    raise NotSeparable("ragged product of a weight whose factors each span inputs and outputs")


def gather(weight: Weight, values: Sequence[Any], params: dict[str, Any]) -> Product:
    """A look-up: rows of `a` are gathered and meet `b`. Where both factors have the gathered axis (one kernel per row,
    as an expert table) the result is a lazy weight again, and so it is where the weight is only followed.
    """
    table, indices = values
    if table is not weight:
        raise NotSeparable("weight as an index")
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if numbers.operand_batching_dims:
        raise NotSeparable("gather with batching dimensions")
    # Where no index points, the slice starts at 0.
    limit = [n if i in numbers.start_index_map else sizes[i] for i, n in enumerate(weight.shape)]
    weight = weight.slice((0,) * weight.ndim, limit, None)
    # An axis of size 1 is looked up as any other is.
    collapsed = numbers.collapsed_slice_dims
    looked_up = {i for i in numbers.start_index_map if i in collapsed or sizes[i] != weight.shape[i]}
    if indices.ndim == 1:
        looked_up = {i for i in looked_up if sizes[i] == 1}  # a longer window is a slice of its axis
    rows, stored = _gathered(weight, indices, params, looked_up), stored_axes(weight, looked_up)
    if indices.ndim == 1:
        return Product(rows.replace(stack=weight.stack + stored), (), (), (), 0)
    rows = rows.replace(gathered=weight.gathered + stored)
    if all(part is None or looked_up <= weight.spans(part) for part in (weight.a, weight.b)):
        return Product(rows, (), (), (), 0)
    return table_rows(rows)


def table_rows(rows: Weight) -> Product:
    """The rows that a gather has looked up, as an array: the base's rows plus `a[ids] b`."""
    out_axes = stored_axes(rows, range(rows.ndim))
    if rows.key is not None and rows.a is not None:  # the input is one-hot: dropout leaves a row's update out, or in
        looked_up = [1 if origin else n for n, origin in zip(rows.shape, rows.origin, strict=True)]
        kept = drop(jnp.ones((*looked_up, 1), rows.a.dtype), rows.key, rows.dropout)
        rows = rows.replace(a=rows.a * kept)
    value = rows.dense(precision=None)
    return Product(value, rows.gathered, out_axes, rows.stack, 2 * rows.rank * value.size)


def _gathered(weight: Weight, indices: Any, params: dict[str, Any], looked_up: set[int]) -> Weight:
    """Every part, gathered along those of the axes with an index that it spans."""
    numbers, sizes, mode = params["dimension_numbers"], params["slice_sizes"], params["mode"]
    mapped, batch_ndim = numbers.start_index_map, indices.ndim - 1
    kept = [i for i in range(weight.ndim) if i not in numbers.collapsed_slice_dims]
    out_ndim = batch_ndim + len(kept)
    fills = mode == lax.GatherScatterMode.FILL_OR_DROP
    # A window as long as its axis does not move, but may be out of bounds.
    moved = {i for i in mapped if fills or i in numbers.collapsed_slice_dims or sizes[i] != weight.shape[i]}
    fill_values = {"w": params["fill_value"], "a": 0, "b": 0, "gain": 1}

    def part(name: str, extra: int) -> jax.Array | None:
        x = getattr(weight, name)
        if x is None:
            return None
        gathered = [i for i in mapped if name == "w" or i in moved & weight.spans(x)]
        if not gathered and name != "w":
            shape = [1] * out_ndim
            for position, axis in zip(numbers.offset_dims, kept, strict=True):
                shape[position] = x.shape[axis]
            return lax.reshape(x, tuple(shape) + x.shape[x.ndim - extra :])
        whole = len(gathered) == len(mapped)
        return lax.gather(
            x,
            indices if whole else jnp.stack([indices[..., mapped.index(i)] for i in gathered], axis=-1),
            numbers._replace(
                offset_dims=(*numbers.offset_dims, *range(out_ndim, out_ndim + extra)), start_index_map=tuple(gathered)
            ),
            (*(sizes[i] if i in gathered else x.shape[i] for i in range(weight.ndim)), *x.shape[weight.ndim :]),
            unique_indices=whole and params["unique_indices"],
            indices_are_sorted=whole and params["indices_are_sorted"],
            mode=lax.GatherScatterMode.CLIP if name == "key" and fills else mode,
            fill_value=fill_values.get(name),
        )

    parts = {name: part(name, extra) for name, extra in (("w", 0), ("a", 1), ("b", 1), ("gain", 0), ("key", 0))}
    # The base has the value of what is out of bounds, and a part that is constant there must not change it.
    for name, spanning in (("a", (weight.a, weight.b)), ("gain", (weight.gain,))):
        spanned = set().union(*(weight.spans(x) for x in spanning if x is not None))
        x = parts[name]
        if fills and x is not None and not moved <= spanned:
            inside = _inside(weight, indices, params, out_ndim)
            inside = lax.reshape(inside, inside.shape + (1,) * (name == "a"))
            parts[name] = jnp.where(inside, x, jnp.asarray(fill_values[name], x.dtype))
    origin: list[tuple[int, ...]] = [()] * out_ndim
    for position, axis in zip(numbers.offset_dims, kept, strict=True):
        origin[position] = () if axis in looked_up else weight.origin[axis]
    return weight.replace(**parts, origin=tuple(origin))


def _inside(weight: Weight, indices: jax.Array, params: dict[str, Any], out_ndim: int) -> jax.Array:
    """Mask of the indices of a gather whose slice is inside the weight: its batch axes where the result has them."""
    numbers = params["dimension_numbers"]
    last = [weight.shape[i] - params["slice_sizes"][i] for i in numbers.start_index_map]
    bounds = jnp.asarray(np.minimum(last, jnp.iinfo(indices.dtype).max), indices.dtype)
    inside = jnp.all((indices >= 0) & (indices <= jnp.broadcast_to(bounds, indices.shape)), axis=-1)
    batch = iter(inside.shape)
    return lax.reshape(inside, [1 if i in numbers.offset_dims else next(batch) for i in range(out_ndim)])


PRODUCTS: dict[str, Callable[[Weight, Sequence[Any], dict[str, Any]], Product]] = {
    "conv_general_dilated": conv_general_dilated,
    "dot_general": dot_general,
    "gather": gather,
    "ragged_dot_general": ragged_dot_general,
}
