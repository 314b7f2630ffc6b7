"""The loss as a training step has it: lifted, checked, and averaged with its gradient over the parts of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapted.adapted import Adapted, combine, with_dropout
from jlora.transform.lift import check_reached, run
from jlora.transform.trace import Trace

_NOTHING = 1e-30  # a weight that changes no sum
PyTree = Any
Metrics = dict[str, PyTree]


class Shape(NamedTuple):
    """Arguments and results of a loss function.

    Attributes:
      has_aux, pass_key, weighted: as in `train_step`.
      averaged: whether there are parts whose results are averaged.
    """

    has_aux: bool
    pass_key: bool
    weighted: bool
    averaged: bool

    @property
    def metrics(self) -> set[str]:
        """The names that the step gives metrics itself."""
        return {"loss", "grad_norm", "regulariser"} | ({"weight"} if self.weighted else set())


class Loss(NamedTuple):
    """Loss of one part of a batch, its weight among the parts (None: all weigh the same), and further metrics."""

    loss: jax.Array
    weight: jax.Array | None
    aux: Metrics


class Parts(NamedTuple):
    """Division of a batch: into micro-batches, one after the other, and over the devices of a mapped axis."""

    micro_batches: int
    axis: str | None


def objective(loss_fn: Callable[..., Any], shape: Shape, *, forward_mode: bool = False) -> Callable[..., Loss]:
    """(factors, frozen, batch, key) -> `Loss`, checked while it is traced.

    Raises (where it is called):
      ValueError: for a loss that is no scalar, or whose gradient does not reach an adapted weight.
      TypeError: for a result that is no loss.
    """

    def of_part(factors: PyTree, frozen: Adapted, batch: PyTree, key: jax.Array) -> Loss:
        dropout, user = jax.random.split(key)
        params = with_dropout(combine(factors, frozen), dropout)
        trace = Trace(forward_mode=forward_mode, counted=shape.averaged and not shape.weighted)
        arguments = (params, batch, user) if shape.pass_key else (params, batch)
        loss, weight, aux = _parsed(run(loss_fn, arguments, {}, trace), shape)
        check_reached(loss_fn, trace)
        if trace.count is not None:
            count, at_least_1 = trace.count
            # A part without a token, of a mean that is 0 there, takes no part beside others; alone it is that 0.
            weight = jnp.maximum(_weight(count), _NOTHING) if at_least_1 else _weight(count)
        regularisers = frozen.method.regularisers(factors, frozen.sites)
        loss, aux = sum(regularisers.values(), loss), {**aux, **regularisers}
        if shape.averaged:
            _check_scalars(aux)
        return Loss(loss, weight, aux)

    return of_part


def value_and_gradient(
    of_part: Callable[..., Loss], factors: PyTree, batch: PyTree, key: jax.Array, parts: Parts
) -> tuple[Loss, PyTree]:
    """Loss and gradient of `of_part(factors, batch, key)`, averaged over the parts."""

    def value(factors: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, Loss]:
        loss = of_part(factors, batch, key)
        return loss.loss, loss

    def part(batch: PyTree, key: jax.Array) -> tuple[Loss, PyTree]:
        (_, loss), gradient = jax.value_and_grad(value, has_aux=True)(factors, batch, key)
        return loss, gradient

    return _average(part, factors, batch, key, parts)


def value(of_part: Callable[..., Loss], factors: PyTree, batch: PyTree, key: jax.Array, parts: Parts) -> jax.Array:
    """The loss alone."""
    loss, _ = _average(lambda batch, key: (of_part(factors, batch, key), ()), (), batch, key, parts)
    return loss.loss


# -- averages ----------------------------------------------------------------------------------------------------------


def _average(
    part: Callable[[PyTree, jax.Array], tuple[Loss, PyTree]], like: PyTree, batch: PyTree, key: jax.Array, parts: Parts
) -> tuple[Loss, PyTree]:
    """The weighted means over all parts of `part(batch, key) -> (loss, arrays)`; `like` has the arrays' shapes.

    Where parts have weights, means are sums of weight times value over the sum of weights, and what a part without
    weight holds (0 / 0, for no token) takes no part.
    """
    count, axis = parts
    if count == 1:
        loss, arrays = part(batch, jax.random.fold_in(key, 0))
        if axis is None:
            return loss, arrays
        if loss.weight is None:
            return jax.lax.pmean((loss, arrays), axis)
        losses, total = jax.tree.map(lambda x: x[None], loss), _weighted(arrays, loss.weight)
    else:

        def micro_step(total: PyTree, inputs: tuple[jax.Array, PyTree]) -> tuple[PyTree, Loss]:
            index, micro_batch = inputs
            loss, arrays = part(micro_batch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, _weighted(arrays, loss.weight)), loss

        # Row i goes to micro-batch i % count. Consecutive rows would be gathered from all devices of a sharded batch.
        micro_batches = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0),  # (count, rows, ...)
            batch,
        )
        zeros = jax.tree.map(jnp.zeros_like, like)
        total, losses = jax.lax.scan(micro_step, zeros, (jnp.arange(count), micro_batches))

    if losses.weight is None:
        means = jax.tree.map(lambda x: jnp.mean(x, axis=0), losses), jax.tree.map(lambda x: x / count, total)
        return means if axis is None else jax.lax.pmean(means, axis)
    weights = losses.weight  # (count,)
    values = losses._replace(weight=None)
    wide = jax.tree.map(lambda x: _weighted(x.astype(jnp.float32), weights).sum(), values)
    weight = weights.sum()
    if axis is not None:
        wide, total, weight = jax.lax.psum((wide, total, weight), axis)
    mean = jax.tree.map(lambda x, like: (x / weight).astype(like.dtype), wide, values)
    return mean._replace(weight=weight), jax.tree.map(lambda x: x / weight, total)


def _weighted(arrays: PyTree, weight: jax.Array | None) -> PyTree:
    if weight is None:
        return arrays
    return jax.tree.map(lambda x: jnp.where(weight != 0, weight * x, jnp.zeros((), x.dtype)), arrays)


# -- what a loss function returns --------------------------------------------------------------------------------------


def _parsed(out: Any, shape: Shape) -> Loss:
    fields = ("loss", *(["weight"] if shape.weighted else []), *(["dict of metrics"] if shape.has_aux else []))
    if len(fields) > 1:
        options = " and ".join(f"{n}=True" for n in ("weighted", "has_aux") if getattr(shape, n))
        if not (
            isinstance(out, tuple) and len(out) == len(fields) and (not shape.has_aux or isinstance(out[-1], dict))
        ):
            raise TypeError(f"{options}: loss_fn returns ({', '.join(fields)}), got {_kind(out)}")
    elif isinstance(out, tuple):
        hint = "pass has_aux=True for a pair of loss and metrics"
        raise TypeError(f"loss_fn returns a real scalar, got {_kind(out)}; {hint}")
    found = dict(zip(fields, out if len(fields) > 1 else (out,), strict=True))
    aux = found.get("dict of metrics", {})
    taken = sorted(shape.metrics & set(aux))
    if taken:
        raise ValueError(f"the aux of loss_fn has {taken}, which the metrics hold already: rename them")
    return Loss(_scalar(found["loss"]), _weight(found["weight"]) if shape.weighted else None, aux)


def _scalar(loss: Any) -> jax.Array:
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | float):
        raise TypeError(f"loss_fn returns a real scalar, got {_kind(loss)}")
    loss = jnp.asarray(loss)
    if loss.shape != ():
        raise ValueError(f"loss_fn returns a scalar, got an array of shape {loss.shape}: take its mean")
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(f"loss_fn returns a real scalar, got one of type {loss.dtype}")
    return loss.astype(jnp.float32)


def _weight(weight: Any) -> jax.Array:
    number = isinstance(weight, jax.Array | np.ndarray | np.generic | float | int)
    kind = jnp.asarray(weight).dtype if number else None
    if kind is None or jnp.shape(weight) != () or jnp.issubdtype(kind, jnp.complexfloating):
        got = f"an array of shape {jnp.shape(weight)} and type {kind}" if number else _kind(weight)
        raise TypeError(f"weighted=True: the weight is a real scalar, the number of tokens or examples, got {got}")
    return jax.lax.stop_gradient(jnp.asarray(weight).astype(jnp.float32))


def _kind(x: Any) -> str:
    return f"a tuple of {len(x)}" if isinstance(x, tuple) else type(x).__name__


def _check_scalars(aux: Metrics) -> None:
    for path, leaf in jax.tree.leaves_with_path(aux):
        leaf = jnp.asarray(leaf)
        if leaf.shape != () or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"aux {jax.tree_util.keystr(path)} has shape {leaf.shape} and type {leaf.dtype}: over micro-batches "
                "and devices only means can be averaged, so return real scalars"
            )
