"""What the data-driven methods start from: sums over batches of a weight's inputs, or of the loss's gradient."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.lift import run
from jlora.methods.matrix import a_form, a_matrix, matrices, sizes, without_stack
from jlora.sites import Site
from jlora.trace import Trace
from jlora.weight import Weight


def statistics(
    kind: str,
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    sites: Sequence[Site],
    method: str,
) -> dict[str, jax.Array]:
    """Sums over the batches, by path, as matrices.

    Args:
      kind: "covariance", the sum of x x^T over the inputs x of each weight: (stack, inputs, inputs); or "gradient", the
        mean gradient of the loss with respect to it: (stack, inputs, outputs). Both float32.
      fn: (params, batch) -> a scalar loss for gradients, anything for covariances.
      params: the tree.
      batches: at least one.
      sites: the weights, each of them used in products of rows with a matrix ("linear") for covariances.
      method: the name, for messages.

    Raises:
      ValueError: if there is no batch, if `fn` does not take one, if the loss is no scalar, if a weight is no linear
        layer or is not reached, or if a sum is not finite.
    """
    if hasattr(batches, "shape") or not isinstance(batches, Iterable):
        kind_of = "an array" if hasattr(batches, "shape") else repr(batches)
        raise ValueError(f"{method}: batches= is a sequence of batches, not {kind_of}: [batch] for one")
    if kind == "covariance":
        odd = [site.path for site in sites if site.kind != "linear"]
        if odd:
            raise ValueError(f"{method}: {odd[0]!r} is no linear layer; leave it out with targets=")
    measure = jax.jit(_covariances(fn, sites) if kind == "covariance" else _gradients(fn, sites))
    total: dict[str, jax.Array] | None = None
    count = 0
    for batch in _shown(batches, method):
        try:
            part = measure(params, batch)
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{method}: fn(params, batch) fails on batch {count}: {error}") from error
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        count += 1
    if total is None:
        raise ValueError(f"{method}: batches= is empty")
    for path, value in total.items():
        if not bool(jnp.isfinite(value).all()):
            raise ValueError(f"{method}: the {kind} of {path!r} is not finite")
        if not bool(jnp.any(value != 0)):
            raise ValueError(f"{method}: no {kind} reaches {path!r}: fn's result does not depend on it")
    return {path: value / count for path, value in total.items()}


def _covariances(fn: Callable[..., Any], sites: Sequence[Site]) -> Callable[[Any, Any], dict[str, jax.Array]]:
    def of_totals(totals: dict[str, jax.Array], params: Any, batch: Any) -> jax.Array:
        named, structure = tree.leaves(params)
        weights = {site.path: _observed(named[site.path], site, totals[site.path]) for site in sites}
        result = run(fn, (jax.tree.unflatten(structure, (named | weights).values()), batch), {}, Trace())
        leaves = jax.tree.leaves(result)
        floating = [x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
        if not floating:
            kinds = ", ".join(sorted({str(jnp.result_type(x)) for x in leaves})) or "nothing"
            raise ValueError(f"fn returns {kinds}, no floating-point array that depends on the weights")
        return sum((jnp.sum(x, dtype=jnp.float32) for x in floating), jnp.float32(0))

    def covariances(params: Any, batch: Any) -> dict[str, jax.Array]:
        zeros = {}
        for site in sites:
            stack, inputs, _ = sizes(site)
            zeros[site.path] = a_form(jnp.zeros((stack, inputs, inputs), jnp.float32), site)
        totals = jax.grad(of_totals)(zeros, params, batch)
        return {site.path: a_matrix(totals[site.path], site) for site in sites}

    return covariances


def _observed(w: jax.Array, site: Site, total: jax.Array) -> Weight:
    one = a_form(jnp.eye(sizes(site)[1], dtype=jnp.float32)[None], without_stack(site))
    return Weight(w, total, one, path=site.path, origin=tuple((i,) for i in range(w.ndim)), observed=True)


def _gradients(fn: Callable[..., Any], sites: Sequence[Site]) -> Callable[[Any, Any], dict[str, jax.Array]]:
    def gradients(params: Any, batch: Any) -> dict[str, jax.Array]:
        named, structure = tree.leaves(params)

        def loss(weights: dict[str, jax.Array]) -> jax.Array:
            value = jnp.asarray(fn(jax.tree.unflatten(structure, (named | weights).values()), batch))
            if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
                raise ValueError(f"fn is a loss and returns a real scalar, got {value.dtype} of shape {value.shape}")
            return value

        found = jax.grad(loss)({site.path: named[site.path] for site in sites})
        return {site.path: matrices(found[site.path].astype(jnp.float32), site) for site in sites}

    return gradients


def _shown(batches: Iterable[Any], method: str) -> Iterator[Any]:
    """The batches, with a line of progress where a person is watching."""
    started = time.monotonic()
    known = f" of {len(batches)}" if isinstance(batches, Sized) else ""
    watched = sys.stderr.isatty()
    done = 0
    for done, batch in enumerate(batches, 1):
        if watched:
            print(f"\r{method}: batch {done}{known}, {time.monotonic() - started:.0f} s", end="", file=sys.stderr)
        yield batch
    if watched and done:
        print(file=sys.stderr)
