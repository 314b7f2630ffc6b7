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

from jlora.transform.interpret import trace_weights
from jlora.transform.product import OBSERVED, compute_dtype
from jlora.transform.trace import Trace
from jlora.transform.weight import Place, Weight, drop

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
            weight = Weight(w, place=Place("w", tuple((i,) for i in range(w.ndim)))).replace(**parts)
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

    assert cases
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


@pytest.mark.parametrize("w", ["float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("gain", [0, 1])
def test_gains_of_every_pair(wide, w, gain):
    kernel = small(3, 4, seed=1, dtype=w)
    cases = {(x, w): Case(matmul, small(2, 3, seed=6, dtype=x), kernel, (gain,)) for x in INPUTS}
    compare(cases)


PREFERRED = [
    # x, w, preferred_element_type, whether the adapter stays apart
    ("float8_e4m3fn", "float8_e4m3fn", "float32", True),
    ("float8_e4m3fn", "float8_e4m3fn", "float8_e5m2", True),
    ("float8_e5m2", "float8_e4m3fn", "bfloat16", True),
    ("float16", "bfloat16", "float32", True),
    ("bfloat16", "bfloat16", "float32", True),
    ("bfloat16", "bfloat16", "float8_e4m3fn", True),
    ("float32", "float32", "bfloat16", True),
    ("float32", "float32", "float64", True),
    ("float32", "bfloat16", "float8_e4m3fn", True),
    ("int8", "bfloat16", "float32", True),
    ("bool", "float32", "float64", True),
    ("complex64", "float32", "complex128", True),
    ("complex64", "float64", "complex64", True),
    ("complex128", "bfloat16", "complex128", True),
    ("float32", "float32", "int32", False),
    ("int8", "bfloat16", "int32", False),
    ("float32", "float32", "complex64", False),
]


@pytest.mark.parametrize("gain", [None, 0])
def test_results_of_every_kind(wide, gain):
    """Results that are rounded to integers, or lose their imaginary part, are not sums of two products: the weight is built."""
    cases = {}
    for x, w, preferred, factored in PREFERRED:
        fn = functools.partial(matmul, preferred=jnp.dtype(preferred))
        case = Case(fn, small(2, 3, seed=6, dtype=x), small(3, 4, seed=1, dtype=w), None if gain is None else (gain,))
        floats = jnp.issubdtype(jnp.dtype(preferred), jnp.floating) or preferred.startswith("complex")
        cases[x, w, preferred] = case._replace(factored=factored, differentiable=floats)
    compare(cases)


@pytest.mark.parametrize("x", ["complex64", "float8_e4m3fn", "int8"])
def test_other_products(wide, x):
    """Products in forward mode, with the weight as the left operand, of batches, and of ragged rows."""
    left = lambda x, w: lax.dot_general(w, x, (((0,), (1,)), ((), ())))
    batched = lambda x, w: lax.dot_general(x, w, (((2,), (1,)), ((0,), (0,))))
    ragged = lambda x, w: lax.ragged_dot(x, w, jnp.asarray([1, 0, 1], jnp.int32))
    rows, kernel = small(2, 3, seed=6, dtype=x), small(3, 4, seed=1, dtype="bfloat16")
    cases = {
        "left": Case(left, rows, kernel, (1,)),
        "batched": Case(batched, small(2, 5, 3, seed=6, dtype=x), small(2, 3, 4, seed=1), (2,)),
        # JAX itself warns of the imaginary part that it leaves out where it transposes one.
        "ragged": Case(ragged, rows, small(3, 3, 4, seed=1), differentiable=x != "complex64"),
    }
    compare(cases)
    compare({"plain": Case(matmul, rows, kernel, (0,))}, forward_mode=True)


def conv(x: jax.Array, w: jax.Array, preferred: Any = None) -> jax.Array:
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers, preferred_element_type=preferred)


def test_convolutions_of_every_dtype(wide):
    cases = {}
    for dtype, preferred in [
        *((dtype, None) for dtype in WEIGHTS),
        ("float8_e4m3fn", "float16"),
        ("float8_e4m3fn", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float64"),
    ]:
        for gain in (None, (1,), (2,)):
            x, w = small(1, 3, 2, seed=6, dtype=dtype), small(1, 2, 3, seed=1, dtype=dtype)
            fn = functools.partial(conv, preferred=None if preferred is None else jnp.dtype(preferred))
            # JAX itself does not transpose a convolution whose result has another dtype than its operands.
            cases[dtype, preferred, gain] = Case(fn, x, w, gain, differentiable=preferred is None)
    compare(cases)


def test_rows_of_every_dtype(wide):
    look_up = lambda x, w: jnp.take(w, jnp.asarray([0, 2, 9]), axis=0, mode="fill", fill_value=1) * x
    cases = {w: Case(look_up, jnp.ones((), w), small(3, 4, seed=1, dtype=w), (0,)) for w in WEIGHTS}
    compare(cases)


def test_integers_that_16_bits_do_not_hold():
    x = jnp.asarray([[257, 1, 0], [0, 513, 1]], jnp.int32)
    assert compute_dtype(x, jnp.ones((3, 4), jnp.bfloat16)) == jnp.float32
    fn = functools.partial(matmul, preferred=jnp.float32)
    weight = Weight(
        jnp.zeros((3, 4), jnp.bfloat16), small(3, 1, 1, seed=2), small(1, 4, 1, seed=3), place=Place("w", ((0,), (1,)))
    )
    got = trace_weights(lambda w: fn(x, w), [weight], Trace())
    np.testing.assert_array_equal(got, np.asarray(x, np.float32) @ np.sum(weight.a * weight.b, -1))


def test_adapters_of_complex_examples():
    """One adapter per example under `vmap`: value and gradient of each."""
    x, w = small(3, 2, 4, seed=6, dtype="complex64"), small(4, 5, seed=1)
    a, b = small(3, 4, 1, 2, seed=2), small(3, 1, 5, 2, seed=3)

    def lazy(x, a, b):
        weight = Weight(w, a, b, place=Place("w", ((0,), (1,))))
        return jnp.sum(jnp.abs(trace_weights(lambda w: matmul(x, w), [weight], Trace())) ** 2)

    def merged(x, a, b):
        return jnp.sum(jnp.abs(matmul(x, w + jnp.sum(a * b, -1))) ** 2)

    got, expected = (jax.jit(jax.vmap(jax.value_and_grad(of, (0, 1, 2))))(x, a, b) for of in (lazy, merged))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), got, expected)


def test_dropout_of_a_complex_input_drops_both_parts():
    x = jnp.full((1000,), 3.0 + 4.0j, jnp.complex64)
    dropped = np.asarray(drop(x, jax.random.key(1), 0.25))
    assert dropped.dtype == np.complex64 and len(set(dropped.tolist())) == 2
    np.testing.assert_allclose(sorted(set(dropped.tolist()), key=abs), [0.0, 4.0 + 16.0j / 3.0], rtol=1e-6)
    empty = jax.random.split(jax.random.key(0), (0, 1, 1))
    assert drop(x[:0], empty, 0.25).shape == (0,)  # of no stacked weight


def test_the_covariance_of_complex_inputs_is_that_of_both_parts():
    """A real weight meets the two parts of a complex input apart: sum of Re(x x^H)."""
    x = small(5, 3, seed=6, dtype="complex64")

    def loss(total):
        one = jnp.eye(3)[:, None]  # (inputs, 1, inputs)
        weight = Weight(small(3, 4, seed=1), total, one, place=Place("w", ((0,), (1,))), multiply=OBSERVED[False])
        return jnp.sum(jnp.abs(trace_weights(lambda w: matmul(x, w), [weight], Trace())))

    got = jax.grad(loss)(jnp.zeros((3, 1, 3)))[:, 0]
    np.testing.assert_array_equal(got, np.real(np.asarray(x).T @ np.conj(np.asarray(x))))
