"""Between a tensor of torch's and a factor in broadcast form: which axis is where, as data, in both directions.

Torch keeps A as (r, in, *window) and B as (out, r, 1, ...); a factor has the parameter's axes, size 1 where it does not
span them, and the rank last. Between them lie the key table's order of axes, and a split of one axis into several
(attention kernels of three axes).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jlora.interop.layer import Layout
from jlora.models.tensors import Leaf
from jlora.transform.sites import Site

Shape = tuple[int, ...]


class Form(NamedTuple):
    """How one parameter lies in a checkpoint.

    Attributes:
      layout: of the torch tensor.
      order: the torch tensor's axes in the parameter's order.
      shape: of the torch tensor, or of the part of it that is the parameter.
      site: of the parameter without an axis of stacked layers.
    """

    layout: Layout
    order: tuple[int, ...]
    shape: Shape
    site: Site

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.shape[_OUT[self.layout]]

    @property
    def window(self) -> int:
        """Number of axes of a convolution's window."""
        return len(self.shape) - 2


_OUT = {"out_in": 0, "in_out": 1, "table": 1}  # the axis of the outputs in a torch tensor


def form_of(row: Leaf, shape: Shape, *, table: bool = False) -> Form:
    """How a parameter of this shape, without an axis of stacked layers, lies in the checkpoint.

    A matrix without an order of axes is GPT-2's Conv1D, (in, out), if it is a `kernel` as Flax names it, and else kept
    as torch keeps a Linear, (out, in).

    Args:
      row: of the table.
      shape: of the parameter.
      table: its rows are looked up; what is called `embedding` is a table in any case.

    Raises:
      ValueError: for a parameter that is no matrix, convolution or table.

    >>> from jlora.models.tensors import LINEAR, leaf
    >>> form_of(leaf("query/kernel", "q.weight", LINEAR), (8, 2, 4)).shape
    (8, 8)
    """
    name = row.path.rpartition("/")[2]
    layout: Layout = "out_in"
    if table or (name == "embedding" and not row.order):
        layout = "table"
    elif not row.order and name == "kernel" and len(shape) == 2:
        layout = "in_out"
    order = row.order or tuple(range(len(shape)))
    if len(order) == len(shape):
        lengths = [0] * len(shape)
        for axis, origin in enumerate(order):
            lengths[origin] = shape[axis]
        inputs: tuple[int, ...] = tuple(i for i, origin in enumerate(order) if origin != _OUT[layout])
    elif len(order) == 2 and len(shape) == 3:
        split = 2 if name_of_module(row.path) in ("out", "o_proj", "out_proj") else 1
        first, second = math.prod(shape[:split]), math.prod(shape[split:])  # inputs and outputs: kernels are (in, out)
        lengths = [second, first] if layout == "out_in" else [first, second]
        inputs = tuple(range(split))
    else:
        raise ValueError(f"{row.path!r} of shape {shape} is no matrix, no convolution and no table")
    outputs = tuple(i for i in range(len(shape)) if i not in inputs)
    kind = "embedding" if layout == "table" else "conv" if len(order) > 2 else "linear"
    return Form(layout, order, tuple(lengths), Site(row.path, shape, "float32", inputs, outputs, (), kind))


def experts_form(row: Leaf, shape: Shape, a_axis: int = 2) -> Form:
    """How a parameter of one matrix per expert lies in the checkpoint: (experts, outputs, inputs).

    Args:
      row: of the table.
      shape: of the parameter.
      a_axis: of the torch tensor, which A spans; 1 for (experts, inputs, outputs).

    Raises:
      ValueError: for a parameter of other axes.
    """
    order = row.order or (0, 1, 2)
    if len(shape) != 3 or len(order) != 3:
        raise ValueError(f"{row.path!r} of shape {shape} is no stack of experts' matrices")
    lengths = [0, 0, 0]
    for axis, origin in enumerate(order):
        lengths[origin] = shape[axis]
    stack, inputs, outputs = (order.index(i) for i in (0, a_axis, 3 - a_axis))
    site = Site(row.path, shape, "float32", (inputs,), (outputs,), (stack,), "linear")
    return Form("stack", order, tuple(lengths), site)


def experts_to_factors(a: np.ndarray, b: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """A (experts r, in) with the expert outside and B (out, r experts) with the expert inside, in broadcast form."""
    experts, (out,) = form.shape[0], form.site.out_axes
    whole_a = a.reshape(experts, -1, a.shape[-1]).swapaxes(1, 2)  # (experts, in, r)
    whole_b = b.reshape(len(b), -1, experts).transpose(2, 0, 1)  # (experts, out, r)
    a_axis = 3 - form.order[out]
    return _ordered(np.expand_dims(whole_a, 3 - a_axis), form), _ordered(np.expand_dims(whole_b, a_axis), form)


def experts_from_factors(a: np.ndarray, b: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `experts_to_factors`."""
    back, (out,) = [*(int(i) for i in np.argsort(form.order)), 3], form.site.out_axes
    a_axis = 3 - form.order[out]
    whole_a, whole_b = a.transpose(back).squeeze(3 - a_axis), b.transpose(back).squeeze(a_axis)
    experts, inputs, rank = whole_a.shape
    flat_a = whole_a.swapaxes(1, 2).reshape(experts * rank, inputs)
    return np.ascontiguousarray(flat_a), np.ascontiguousarray(whole_b.transpose(1, 2, 0).reshape(-1, rank * experts))


def name_of_module(path: str) -> str:
    """The module that holds a parameter.

    >>> name_of_module("h_0/attn/out/kernel")
    'out'
    """
    return path.split("/")[-2] if "/" in path else ""


# -- to the parameter's axes -------------------------------------------------------------------------------------------


def a_to_factor(a: np.ndarray, form: Form) -> np.ndarray:
    """A (r, in, *window) in broadcast form."""
    rank = a.shape[0]
    whole = np.moveaxis(a.reshape(rank, *_inputs(form)), 0, -1)  # (in, *window, r)
    placed = whole[None] if _OUT[form.layout] == 0 else whole[:, None]
    return _ordered(placed, form).reshape(form.site.factor_shapes(rank)[0])


def b_to_factor(b: np.ndarray, form: Form) -> np.ndarray:
    """B (out, r), or (out, r, 1, ...), in broadcast form."""
    outputs, rank = b.shape[:2]
    whole = b.reshape(outputs, rank)
    placed = whole.reshape(outputs, *[1] * (len(form.shape) - 1), rank) if _OUT[form.layout] == 0 else whole[None]
    return _ordered(placed, form).reshape(form.site.factor_shapes(rank)[1])


def _inputs(form: Form) -> Shape:
    out = _OUT[form.layout]
    return tuple(n for i, n in enumerate(form.shape) if i != out)


def _ordered(x: np.ndarray, form: Form) -> np.ndarray:
    return x.transpose(*form.order, x.ndim - 1)


# -- and back ----------------------------------------------------------------------------------------------------------


def a_from_factor(a: np.ndarray, form: Form) -> np.ndarray:
    """The inverse of `a_to_factor`: (r, in, *window)."""
    out = _OUT[form.layout]
    whole = _unordered(a, form, lambda axis, n: 1 if axis == out else n)
    return np.ascontiguousarray(np.moveaxis(np.take(whole, 0, axis=out), -1, 0))


def b_from_factor(b: np.ndarray, form: Form) -> np.ndarray:
    """The inverse of `b_to_factor`: (out, r), and (out, r, 1, ...) of a convolution."""
    out, rank = _OUT[form.layout], b.shape[-1]
    whole = _unordered(b, form, lambda axis, n: n if axis == out else 1)
    return np.ascontiguousarray(whole.reshape(form.outputs, rank, *[1] * form.window))


def _unordered(x: np.ndarray, form: Form, length: Callable[[int, int], int]) -> np.ndarray:
    dims = [length(origin, form.shape[origin]) for origin in form.order]
    back = [*(int(i) for i in np.argsort(form.order)), len(dims)]
    return x.reshape(*dims, x.shape[-1]).transpose(back)
