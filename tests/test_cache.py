"""A decoder that reads its tokens through a cache, in parts, computes what it computes of them all at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import cache as kv
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from tests.conformance import filled

pytestmark = pytest.mark.once

SHAPE = {"vocab_size": 32, "context": 16, "width": 16, "layers": 2, "heads": 4, "hidden": 24}
MODELS = {
    "gpt2": GPT2(GPT2Config(**SHAPE)),
    "llama": Llama(LlamaConfig(**SHAPE, key_heads=2, window=3)),
    "llama, one window": Llama(LlamaConfig(**SHAPE, key_heads=2, window=3, sliding=(False, True))),
}
PREFILL, LENGTH, SLOTS = 6, 9, 11
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (3, LENGTH)), jnp.int32)
MASK = jnp.ones((3, LENGTH), bool).at[1, :4].set(False).at[2, 4:6].set(False)  # padding before, and between


@functools.cache
def parameters(model):
    """Large enough for the attention to differ from place to place."""
    return filled(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"])


@pytest.mark.parametrize("scan", [False, True], ids=["", "scanned"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prefill_and_single_steps_equal_the_full_call(name, scan):
    model = type(MODELS[name])(dataclasses.replace(MODELS[name].config, scan=scan))
    params, positions = parameters(model), kv.positions_of(MASK)

    @jax.jit
    def whole(params):
        return model.apply({"params": params}, TOKENS, mask=MASK, positions=positions)

    @jax.jit
    def parts(params):
        def read(cache, tokens, mask, positions):
            out, cache = model.apply({"params": params}, tokens, mask=mask, positions=positions, cache=cache)
            return cache, out

        first = (x[:, :PREFILL] for x in (TOKENS, MASK, positions))
        cache, prompt = read(model.empty_cache(3, SLOTS), *first)
        rest = [jnp.moveaxis(x[:, PREFILL:], 1, 0)[..., None] for x in (TOKENS, MASK, positions)]  # (steps, batch, 1)
        cache, steps = jax.lax.scan(lambda cache, given: read(cache, *given), cache, rest)
        return jnp.concatenate([prompt, jnp.moveaxis(steps[:, :, 0], 0, 1)], axis=1), cache

    expected, (found, cache) = whole(params), parts(params)
    np.testing.assert_allclose(found[MASK], expected[MASK], rtol=1e-5, atol=1e-5)
    assert cache.used == LENGTH
    np.testing.assert_array_equal(cache.real, np.pad(MASK, [(0, 0), (0, SLOTS - LENGTH)]))
    kind = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.empty_cache(3, SLOTS))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache) == kind


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_needs_positions(name):
    model = MODELS[name]
    with pytest.raises(
        ValueError, match=r"a call with a cache needs positions=: those of its tokens, \(batch, length\)"
    ):
        jax.eval_shape(lambda: model.apply({"params": parameters(model)}, TOKENS, cache=model.empty_cache(3, SLOTS)))


def test_a_cache_that_is_too_small_is_said_to_be():
    model = GPT2(GPT2Config(vocab_size=16, context=16, width=8, layers=1, heads=2))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    tokens = jnp.asarray([[1, 2, 3]])

    def call(cache):
        return model.apply({"params": params}, tokens, positions=jnp.asarray([[0, 1, 2]]), cache=cache)

    out, cache = call(model.empty_cache(1, 4))
    assert jnp.isfinite(out).all()
    with pytest.raises(ValueError, match="the cache has 4 slots, 3 of them taken: no room for 3 tokens"):
        call(cache)
    assert jnp.isnan(jax.jit(call)(cache)[0]).all()


def test_the_last_output_alone_is_the_last():
    model = GPT2(GPT2Config(vocab_size=16, context=16, width=8, layers=1, heads=2))
    tokens = jnp.asarray([[1, 2, 3]])
    params = model.init(jax.random.key(0), tokens)["params"]
    whole, last = (model.apply({"params": params}, tokens, last=last) for last in (False, True))
    np.testing.assert_allclose(last, whole[:, -1:], rtol=1e-6)
    flops = lambda last: (
        jax.jit(lambda p: model.apply({"params": p}, tokens, last=last)).lower(params).cost_analysis()["flops"]
    )
    assert flops(True) < flops(False)
