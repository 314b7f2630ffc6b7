"""What `lift` costs before anything runs: the time to trace and lower, and the size of the program."""

import time

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora.models.gpt2 import GPT2, GPT2Config

LAYERS = 12


@pytest.fixture(scope="module")
def gpt2():
    """A GPT-2 of 12 layers, not scanned, and its abstract parameters, adapted."""
    model = GPT2(GPT2Config(vocab_size=64, context=16, width=32, layers=LAYERS, heads=4))
    tokens = jnp.zeros((1, 16), jnp.int32)
    params = model.init(jax.random.key(0), tokens)["params"]

    def loss(params, tokens):
        return model.apply({"params": params}, tokens).mean()

    return loss, params, jlora.apply(params, rank=4), tokens


def seconds(make) -> float:
    """The least of three: a busy machine only ever adds."""
    times = []
    for _ in range(3):
        jax.clear_caches()
        start = time.perf_counter()
        make()
        times.append(time.perf_counter() - start)
    return min(times)


def test_lowering_takes_at_most_two_and_a_half_times_as_long(gpt2):
    loss, params, adapted, tokens = gpt2
    plain = seconds(lambda: jax.jit(loss).lower(params, tokens))
    lifted = seconds(lambda: jax.jit(jlora.lift(loss)).lower(adapted, tokens))
    assert lifted < 2.5 * plain, f"{lifted:.2f} s against {plain:.2f} s"


def test_the_program_grows_by_a_few_operations_per_weight(gpt2):
    loss, params, adapted, tokens = gpt2
    plain = jax.make_jaxpr(loss)(params, tokens)
    lifted = jax.make_jaxpr(jlora.lift(loss))(adapted, tokens)

    def count(jaxpr):
        inner = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(eqn.params) if hasattr(p, "eqns")]
        return len(jaxpr.eqns) + sum(map(count, inner))

    weights = 6 * LAYERS
    assert len(adapted.sites) == weights
    assert count(lifted.jaxpr) - count(plain.jaxpr) < 12 * weights


def test_the_base_is_an_argument_of_the_program(gpt2):
    loss, _, adapted, tokens = gpt2
    closed = jax.make_jaxpr(jlora.lift(loss))(adapted, tokens)
    assert sum(const.size for const in closed.consts if hasattr(const, "size")) < 1000
