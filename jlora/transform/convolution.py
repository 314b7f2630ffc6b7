"""A convolution with a lazy kernel: a thin convolution to rank channels and a 1x1 map."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.transform import axes as ax
from jlora.transform.product import add, compute_dtype, keeps
from jlora.transform.trace import Product, stored_axes
from jlora.transform.weight import RANK, NotSeparable, Weight, amplify, drop

_CONV_OPTIONS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "precision",
    "preferred_element_type",
)


def conv_general_dilated(weight: Weight, values: Sequence[Any], params: dict[str, Any]) -> Product:
    """A thin convolution to rank channels and a 1x1 map; or, for a transposed kernel, the map first."""
    x, kernel = values
    if kernel is not weight or params["batch_group_count"] != 1:
        raise NotSeparable("convolution with the weight as its input, or with batch groups")
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out_axis, in_axis, *spatial = numbers.rhs_spec
    options = {k: v for k, v in params.items() if k in _CONV_OPTIONS}
    channel_in, channel_out = numbers.lhs_spec[1], numbers.out_spec[1]
    x_gain, y_gain = _conv_gains(weight, in_axis, out_axis, groups)
    dtype, preferred = compute_dtype(x, weight.w), options["preferred_element_type"]
    wide = {**options, "preferred_element_type": preferred if keeps(preferred, dtype) else None}
    if x_gain is None:
        value = lax.conv_general_dilated(x, weight.w, feature_group_count=groups, **options)
    else:
        result = x.dtype if preferred is None else preferred
        x = amplify(x, _on_axis(x_gain, x.ndim, channel_in), dtype)
        value = lax.conv_general_dilated(x, weight.w.astype(dtype), feature_group_count=groups, **wide).astype(result)
    flops = 0
    if weight.rank:
        branch = x.astype(dtype)
        if weight.key is not None:
            branch = drop(branch, weight.key, weight.dropout)
        delta, flops = _conv_delta(weight, branch, numbers, groups, wide)
        value = add(value, delta)
    if y_gain is not None:
        value = amplify(value, _on_axis(y_gain, value.ndim, channel_out), value.dtype)
    inputs = stored_axes(weight, sorted((*spatial, in_axis)))
    return Product(value, inputs, stored_axes(weight, [out_axis]), weight.stack, flops)


def _conv_delta(weight: Weight, x: jax.Array, numbers: Any, groups: int, options: dict[str, Any]) -> Any:
    out_axis, in_axis, *spatial = numbers.rhs_spec
    a, b = weight.a, weight.b
    assert a is not None and b is not None
    if weight.varies(b) <= {out_axis} and out_axis not in weight.varies(a):
        thin, point = a, b
    elif weight.varies(a) <= {out_axis} and out_axis not in weight.varies(b):
        thin, point = b, a
    elif groups == 1:
        return _transposed_conv_delta(weight, x, numbers, options)
    else:
        raise NotSeparable("grouped convolution with a transposed kernel")
    window = [in_axis, *spatial]
    # A kernel that was broadcast along an axis has one value for all of it.
    thin, point = _filled(weight, thin, window), _filled(weight, point, [out_axis])
    kernel = _rank_to(thin.astype(x.dtype), out_axis)  # (*window, rank at the output axis)
    if groups > 1:
        kernel = jnp.concatenate([kernel] * groups, axis=out_axis)
    inner = lax.conv_general_dilated(x, kernel, feature_group_count=groups, **options)
    channel = numbers.out_spec[1]
    point = lax.reshape(point.astype(x.dtype), (groups, point.shape[out_axis] // groups, weight.rank))
    split = inner.shape[:channel] + (groups, weight.rank) + inner.shape[channel + 1 :]
    labels: list[int | str] = list(range(inner.ndim))
    inner_labels = (*labels[:channel], "group", RANK, *labels[channel + 1 :])
    out_labels = (*labels[:channel], "group", "out", *labels[channel + 1 :])
    value = ax.contract(
        lax.reshape(inner, split), inner_labels, point, ("group", "out", RANK), out_labels, options["precision"]
    )
    merged = value.shape[:channel] + (groups * point.shape[1],) + value.shape[channel + 2 :]
    flops = 2 * inner.size * (math.prod(weight.shape[i] for i in window) + point.shape[1])
    return value.reshape(merged), flops


def _transposed_conv_delta(weight: Weight, x: jax.Array, numbers: Any, options: dict[str, Any]) -> Any:
    """The kernel of a gradient convolution: its input channels are the low-rank map, its window the thin part."""
    out_axis, in_axis, *spatial = numbers.rhs_spec
    a, b = weight.a, weight.b
    assert a is not None and b is not None
    thin, point = (a, b) if weight.varies(b) <= {in_axis} else (b, a)
    if not weight.varies(point) <= {in_axis} or in_axis in weight.varies(thin):
        raise NotSeparable("convolution whose window is split between the factors")
    thin, point = _filled(weight, thin, [out_axis, *spatial]), _filled(weight, point, [in_axis])
    channel = numbers.lhs_spec[1]
    labels: list[int | str] = list(range(x.ndim))
    inner_labels = (*labels[:channel], RANK, *labels[channel + 1 :])
    flat = lax.reshape(point.astype(x.dtype), (point.shape[in_axis], weight.rank))
    inner = ax.contract(x, tuple(labels), flat, (channel, RANK), inner_labels, options["precision"])
    value = lax.conv_general_dilated(inner, _rank_to(thin.astype(x.dtype), in_axis), **options)
    return value, 2 * (inner.size * point.shape[in_axis] + value.size * thin.size // max(thin.shape[out_axis], 1))


def _filled(weight: Weight, part: jax.Array, axes: Sequence[int]) -> jax.Array:
    """`part` with the whole size of these axes."""
    sizes = tuple(weight.shape[i] if i in axes else n for i, n in enumerate(part.shape))
    return part if sizes == part.shape else jnp.broadcast_to(part, sizes)


def _rank_to(part: jax.Array, axis: int) -> jax.Array:
    """Puts the rank, the last axis, where `part` has an axis of size 1."""
    order = list(range(part.ndim - 1))
    order[axis] = part.ndim - 1
    return lax.squeeze(lax.transpose(part, (*order, axis)), (part.ndim - 1,))


def _conv_gains(weight: Weight, in_axis: int, out_axis: int, groups: int) -> Any:
    gain = weight.gain
    if gain is None:
        return None, None
    if weight.varies(gain) <= {out_axis}:
        return None, gain.reshape(-1)
    if weight.varies(gain) <= {in_axis} and groups == 1:
        return gain.reshape(-1), None
    raise NotSeparable("convolution of a kernel whose gain spans its window")


def _on_axis(vector: jax.Array, ndim: int, axis: int) -> jax.Array:
    return lax.reshape(vector, tuple(vector.size if i == axis else 1 for i in range(ndim)))
