"""Every pair of dtypes that a product takes is that of the merged weight by value and gradient, or is materialised.

The numbers are -1, 0 and 1, so that every sum is exact in 8 bits too and every comparison is of bits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jlora.interpret import trace_weights
from jlora.product import compute_dtype
from jlora.trace import Trace
from jlora.weight import Weight, drop

WEIGHTS = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")
INPUTS = (*WEIGHTS, "complex64", "complex128", "int8", "uint8", "int32", "bool")


def small(*shape: int, seed: int, dtype: Any = "float32") -> jax.Array:
    """-1, 0 and 1, and i times those."""
    rng = np.random.default_rng((seed, *shape))
    values = rng.integers(0 if dtype in ("uint8", "bool") else -1, 2, shape)
    if jnp.issubdtype(jnp.dtype(dtype), jnp.complexfloating):
        values = values + 1j * rng.integers(-1, 2, shape)
    return jnp.asarray(values).astype(dtype)


class Case(NamedTuple):
    """A product `fn(x, w)`; the gain's axes; whether the adapter stays apart in it; whether JAX differentiates it."""

    fn: Any
    x: jax.Array
    w: jax.Array
    gain: tuple[int, ...] | None = None
    factored: bool = True
    differentiable: bool = True


def compare(cases: dict[Any, Case], forward_mode: bool = False) -> None:
    """Value and gradients of the input and of every part against the merged weight's. All cases are one program."""

    def sides(name: Any) -> Any:
        fn, x, w, gain, factored, differentiable = cases[name]
        parts = {
            "a": small(*w.shape[:-1], 1, 1, seed=2),
            "b": small(*(1 if i == w.ndim - 2 else n for i, n in enumerate(w.shape)), 1, seed=3),
        }
        if gain is not None:
            parts["gain"] = jnp.full([n if i in gain else 1 for i, n in enumerate(w.shape)], 2.0)

        def lazy(x: jax.Array, parts: Any) -> jax.Array:
            trace = Trace(forward_mode=forward_mode)
            weight = Weight(w, path="w", origin=tuple((i,) for i in range(w.ndim)), **parts)
            value = trace_weights(lambda w: fn(x, w), [weight], trace)
            assert [use.factored for use in trace.uses] == [factored], (name, trace.uses)
            return value

        def merged(x: jax.Array, parts: Any) -> jax.Array:
            value = w.astype(jnp.float32) + jnp.sum(parts["a"] * parts["b"], -1)
            return fn(x, (value * parts["gain"] if "gain" in parts else value).astype(w.dtype))

        def loss(of: Any, parts: Any, x: jax.Array) -> jax.Array:
            y = of(x, parts)
            y = y.astype(jnp.complex64 if jnp.iscomplexobj(y) else jnp.float32)
            return jnp.sum(jnp.real(small(*y.shape, seed=5, dtype=y.dtype.name) * y))

        values = [of(x, parts) for of in (lazy, merged)]
        assert values[0].dtype == values[1].dtype and values[0].shape == values[1].shape, name
        if not differentiable:
            return [(value,) for value in values]
        argnums = (1, 2) if jnp.issubdtype(x.dtype, jnp.inexact) else (1,)
        return [
            (value, jax.grad(loss, argnums)(of, parts, x)) for value, of in zip(values, (lazy, merged), strict=True)
        ]

    every = jax.jit(lambda: [sides(name) for name in cases])()
    as_wide = lambda x: np.asarray(x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 16 else x)
    for name, both in zip(cases, every, strict=True):
        for got, expected in zip(*map(jax.tree.leaves, both), strict=True):
            assert got.dtype == expected.dtype, name
            if jnp.issubdtype(got.dtype, jnp.inexact):
                got, expected = as_wide(got), as_wide(expected)
            np.testing.assert_array_equal(got, expected, err_msg=str(name))


@pytest.fixture
def wide():
    """64 bits are there."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def matmul(x: jax.Array, w: jax.Array, preferred: Any = None) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=preferred)


@pytest.mark.parametrize("w", WEIGHTS)
def test_dot_general_of_every_pair(wide, w):
    kernel = small(3, 4, seed=1, dtype=w)
    compare({(x, w): Case(matmul, small(2, 3, seed=6, dtype=x), kernel) for x in INPUTS})


@pytest.mark.parametrize("w", ["float8_e4m3fn", "bfloat16", "float64"])
@pytest.mark.parametrize("gain", [0, 1])
def test_gains_of_every_pair(wide, w, gain):
    kernel = small(3, 4, seed=1, dtype=w)
    cases = {(x, w): Case(matmul, small(2, 3, seed=6, dtype=x), kernel, (gain,)) for x in INPUTS}
    compare(cases)
