"""Every method on a base in 4 bits: it is that on the dequantised base held as plain arrays; and the way back."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import tree
from tests.conformance import close, randomised
from tests.test_methods import IDS, METHODS, adapt, model, of_weights
from tests.tiers import thorough

WHOLE = ("full", "top_layers")  # they train the weights themselves


@functools.cache
def bases(name: str) -> tuple:
    """The parameters of a row in 4 bits, and what these stand for as plain arrays."""
    fn, base = model(name)
    quantised = jlora.quantize(
        base,
        "nf4",
        block=32,
        sites=jlora.sites(fn, base, IDS),
        targets=lambda site: site.kind in ("linear", "conv", "embedding"),
    )
    return quantised, jlora.dequantize(quantised)


ONE = "test_function_gradient_and_merged_weights_are_those_of_the_dequantised_base"
DEFAULT = ("lora", "dora", "adalora", "pissa", "eva", "vera", "ia3", "oft", "together", "bitfit", "houlsby")


@pytest.mark.parametrize("name", thorough([name for name in METHODS if name not in WHOLE], ONE, DEFAULT))
def test_function_gradient_and_merged_weights_are_those_of_the_dequantised_base(name):
    row, (fn, _) = METHODS[name], model(name)
    start, plain = (adapt(name, base) for base in bases(name))
    assert any(tree.is_stored(leaf) for leaf in tree.leaves(start.base)[0].values())
    close(start.factors, plain.factors, 1e-3 if row.make().acts.statistic else 2e-5)  # inverses of covariances
    start = start.replace(buffers=plain.buffers)  # a decomposition's signs are free
    trained, of_plain = randomised(start, 0.2), randomised(plain, 0.2)
    factors, frozen = jlora.partition(trained)
    still = jlora.partition(of_plain)[1]

    def loss(factors, frozen):
        out = jlora.lift(fn)(jlora.combine(factors, frozen), IDS)
        return jnp.mean(out**2), out

    lifted = jax.jit(jax.value_and_grad(loss, has_aux=True))
    found = lifted(factors, frozen)
    if row.linen:
        close(found, lifted(factors, still), 2e-5)
        return
    weights, back = jax.vjp(jax.jit(lambda factors: jlora.merge(jlora.combine(factors, still))), factors)
    merged, of_merged = of_weights(fn)(weights, IDS)
    close(found, (merged, *back(of_merged)), 2e-5)
    close(jlora.merge(trained), weights, 1e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_a_quantised_leaf_is_not_trained_as_it_is(name):
    with pytest.raises(
        ValueError, match=r"quantised leaves are to be trained as they are, first '.*' \(nf4, 32, twice\)"
    ):
        adapt(name, bases(name)[0])
