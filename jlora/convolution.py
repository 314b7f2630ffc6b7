"""A convolution with a lazy kernel: a thin convolution to rank channels and a 1x1 map."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import axes as ax
from jlora.trace import Product, stored_axes
from jlora.weight import RANK, NotSeparable, Weight, amplify, drop

_CONV_OPTIONS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "precision",
    "preferred_element_type",
)


def conv_general_dilated(weight: Weight, values: Sequence[Any], params: dict[str, Any], forward_mode: bool) -> Product:
    """A thin convolution to rank channels and a 1x1 map; or, for a transposed kernel, the map first."""
    x, kernel = values
    if kernel is not weight or params["batch_group_count"] != 1:
        raise NotSeparable("convolution with the weight as its input, or with batch groups")
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out_axis, in_axis, *spatial = numbers.rhs_spec
    options = {k: v for k, v in params.items() if k in _CONV_OPTIONS}
    channel_in, channel_out = numbers.lhs_spec[1], numbers.out_spec[1]
    x_gain, y_gain = _conv_gains(weight, in_axis, out_axis, groups)
    if x_gain is not None:
        x = amplify(x, _on_axis(x_gain, x.ndim, channel_in), x.dtype)
    value = lax.conv_general_dilated(x, weight.w, feature_group_count=groups, **options)
    flops = 0
    if weight.rank:
        branch = x if weight.key is None else drop(x, weight.key, weight.dropout)
        delta, flops = _conv_delta(weight, branch, numbers, groups, options)
        value = value + delta.astype(value.dtype)
    if y_gain is not None:
        value = amplify(value, _on_axis(y_gain, value.ndim, channel_out), value.dtype)
    inputs = stored_axes(weight, sorted((*spatial, in_axis)))
    return Product(value, inputs, stored_axes(weight, [out_axis]), weight.stack, flops)


def _conv_delta(weight: Weight, x: jax.Array, numbers: Any, groups: int, options: dict[str, Any]) -> Any:
    out_axis, in_axis, *spatial = numbers.rhs_spec
    window = [in_axis, *spatial]
    a, b = weight.a, weight.b
    assert a is not None and b is not None
    spans = {id(p): {i for i in range(weight.ndim) if p.shape[i] > 1} for p in (a, b)}
    if not spans[id(b)] & set(window) and out_axis not in spans[id(a)]:
        thin, point = a, b
    elif not spans[id(a)] & set(window) and out_axis not in spans[id(b)]:
        thin, point = b, a
    elif groups == 1:
        return _transposed_conv_delta(weight, x, numbers, options, spans)
    else:
        raise NotSeparable("grouped convolution with a transposed kernel")
    order = [i for i in range(weight.ndim) if i != out_axis]
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
    merged = value.shape[:channel] + (-1,) + value.shape[channel + 2 :]
    flops = 2 * inner.size * (math.prod(weight.shape[i] for i in order) + point.shape[1])
    return value.reshape(merged), flops


def _transposed_conv_delta(weight: Weight, x: jax.Array, numbers: Any, options: dict[str, Any], spans: Any) -> Any:
    """The kernel of a gradient convolution: its input channels are the low-rank map, its window the thin part."""
    out_axis, in_axis, *_ = numbers.rhs_spec
    a, b = weight.a, weight.b
    assert a is not None and b is not None
    thin, point = (a, b) if spans[id(b)] <= {in_axis} else (b, a)
    if not spans[id(point)] <= {in_axis} or in_axis in spans[id(thin)]:
        raise NotSeparable("convolution whose window is split between the factors")
    channel = numbers.lhs_spec[1]
    labels: list[int | str] = list(range(x.ndim))
    inner_labels = (*labels[:channel], RANK, *labels[channel + 1 :])
    flat = lax.reshape(point.astype(x.dtype), (point.shape[in_axis], weight.rank))
    inner = ax.contract(x, tuple(labels), flat, (channel, RANK), inner_labels, options["precision"])
    value = lax.conv_general_dilated(inner, _rank_to(thin.astype(x.dtype), in_axis), **options)
    return value, 2 * (inner.size * point.shape[in_axis] + value.size * thin.size // max(thin.shape[out_axis], 1))


def _rank_to(part: jax.Array, axis: int) -> jax.Array:
    """Puts the rank, the last axis, where `part` has an axis of size 1."""
    order = list(range(part.ndim - 1))
    order[axis] = part.ndim - 1
    return lax.squeeze(lax.transpose(part, (*order, axis)), (part.ndim - 1,))


def _conv_gains(weight: Weight, in_axis: int, out_axis: int, groups: int) -> Any:
    gain = weight.gain
    if gain is None:
        return None, None
    spanned = {i for i in range(weight.ndim) if gain.shape[i] > 1}
    if spanned <= {out_axis}:
        return None, gain.reshape(-1)
    if spanned <= {in_axis} and groups == 1:
        return gain.reshape(-1), None
    raise NotSeparable("convolution of a kernel whose gain spans its window")


def _on_axis(vector: jax.Array, ndim: int, axis: int) -> jax.Array:
    return lax.reshape(vector, tuple(vector.size if i == axis else 1 for i in range(ndim)))
