"""A weight of any number of axes as a stack of matrices (inputs, outputs), and factors of those in broadcast form."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jlora.transform.axes import inverse
from jlora.transform.sites import Site, Target


class HasAxes(Protocol):
    """A `Site`, or a `Target`."""

    @property
    def path(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def in_axes(self) -> tuple[int, ...]: ...
    @property
    def out_axes(self) -> tuple[int, ...]: ...
    @property
    def stack_axes(self) -> tuple[int, ...]: ...


def matrices(w: jax.Array, site: HasAxes) -> jax.Array:
    """`w` as (stack, inputs, outputs), each of them one axis; the stack is 1 where the site has none."""
    order = (*site.stack_axes, *site.in_axes, *site.out_axes)
    return jnp.transpose(w, order).reshape(sizes(site))


def sizes(site: HasAxes) -> tuple[int, int, int]:
    """Numbers of stacked matrices, of inputs and of outputs."""
    stack, inputs, outputs = (
        math.prod(site.shape[i] for i in axes) for axes in (site.stack_axes, site.in_axes, site.out_axes)
    )
    return stack, inputs, outputs


def restore(stacked: jax.Array, site: HasAxes) -> jax.Array:
    """The inverse of `matrices`."""
    order = (*site.stack_axes, *site.in_axes, *site.out_axes)
    return jnp.transpose(stacked.reshape([site.shape[i] for i in order]), inverse(order))


def a_form(a: jax.Array, site: HasAxes) -> jax.Array:
    """(stack, inputs, r) in broadcast form: W's axes plus the rank, size 1 on the outputs."""
    return _form(a, site, (*site.stack_axes, *site.in_axes))


def b_form(b: jax.Array, site: HasAxes) -> jax.Array:
    """(stack, r, outputs) in broadcast form: W's axes plus the rank, size 1 on the inputs."""
    return _form(jnp.swapaxes(b, -1, -2), site, (*site.stack_axes, *site.out_axes))


def a_matrix(a: jax.Array, site: HasAxes) -> jax.Array:
    """The inverse of `a_form`: (stack, inputs, r)."""
    return _matrix(a, site, site.in_axes)


def b_matrix(b: jax.Array, site: HasAxes) -> jax.Array:
    """The inverse of `b_form`: (stack, r, outputs)."""
    return jnp.swapaxes(_matrix(b, site, site.out_axes), -1, -2)


def without_stack(site: Site | Target) -> Site:
    """The site of one of its stacked weights, with the same number of axes."""
    found = site.site if isinstance(site, Target) else site
    return dataclasses.replace(found, shape=tuple(1 if i in site.stack_axes else n for i, n in enumerate(site.shape)))


@functools.partial(jax.jit, static_argnums=0)
def one_by_one(decompose: Callable[..., Any], *stacked: jax.Array) -> Any:
    """`decompose` of each of the stacked matrices, one after the other; compiled once per function and shape.

    Never batched: on the CPU a batched LAPACK call of jaxlib 0.10.2 puts its parts on the thread pool that it runs on
    itself and waits for them, so that as many of them as there are cores wait forever. Later releases were not tried.
    """
    return jax.lax.map(lambda row: decompose(*row), stacked)


def thin_svd(m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`U, S, V^T` of a matrix (n, k): (n, min), (min,), (min, k)."""
    u, s, vt = jnp.linalg.svd(m, full_matrices=False)
    return u, s, vt


def check_fits(rank: int, site: HasAxes, method: str) -> None:
    """A rank that the weight's own matrices have.

    Raises:
      ValueError: if it exceeds the number of inputs or of outputs.
    """
    _, inputs, outputs = sizes(site)
    if rank > min(inputs, outputs):
        raise ValueError(
            f"{method}: rank {rank} exceeds {min(inputs, outputs)}, the rank of {site.path!r} ({inputs} inputs, "
            f"{outputs} outputs); lower it with ranks={{{site.path!r}: r}}"
        )


def check_finite(w: jax.Array, site: HasAxes, method: str) -> None:
    """A weight whose decomposition exists (not checked under a transformation, where values are not known).

    Raises:
      ValueError: if a value is not finite.
    """
    if known(jnp.isfinite(w).all()) is False:
        raise ValueError(f"{method}: {site.path!r} has values that are not finite, so that its SVD does not exist")


def check_not_zero(stacked: jax.Array, site: HasAxes, method: str) -> None:
    """Matrices that have a singular vector to start from (not checked under a transformation).

    Raises:
      ValueError: if one of them is zero.
    """
    if known(jnp.any(stacked != 0, axis=(1, 2)).all()) is False:
        raise ValueError(
            f"{method}: {site.path!r}, or one of its stacked weights, is zero: what its SVD gives is zero, too, where "
            "factors have no gradient; leave it out with targets="
        )


def known(condition: jax.Array) -> bool | None:
    """Its value; None under a transformation, where values are not known."""
    try:
        return bool(condition)
    except jax.errors.ConcretizationTypeError:
        return None


def _form(part: jax.Array, site: HasAxes, kept: Sequence[int]) -> jax.Array:
    rank = part.shape[-1]
    spread = part.reshape([*(site.shape[i] for i in kept), rank])
    ordered = jnp.transpose(spread, (*inverse(tuple(_ranks(kept))), len(kept)))
    return ordered.reshape([n if i in kept else 1 for i, n in enumerate(site.shape)] + [rank])


def _matrix(part: jax.Array, site: HasAxes, axes: Sequence[int]) -> jax.Array:
    ones = tuple(i for i in range(len(site.shape)) if i not in (*site.stack_axes, *axes))
    order = (*site.stack_axes, *axes, len(site.shape), *ones)
    stack = math.prod(site.shape[i] for i in site.stack_axes)
    return jnp.transpose(part, order).reshape(stack, math.prod(site.shape[i] for i in axes), part.shape[-1])


def _ranks(values: Sequence[int]) -> list[int]:
    """For each value, its position in ascending order."""
    ascending = sorted(values)
    return [ascending.index(value) for value in values]
