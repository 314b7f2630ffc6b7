"""Texts of adapted decoders: what the cached program writes is what full calls of the same function give."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jlora
from jlora import models
from jlora.models.cache import positions_of
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig

pytestmark = pytest.mark.once

SIZES = {"vocab_size": 32, "context": 16, "width": 16, "layers": 2, "heads": 2}
MODELS = {
    "gpt2": GPT2(GPT2Config(**SIZES)),
    "llama": Llama(LlamaConfig(**SIZES, hidden=24, key_heads=1, scan=True)),
}
METHODS = {
    "lora": jlora.lora(2),
    "prefix_tuning": jlora.prefix_tuning(3),
    "prompt_tuning": jlora.prompt_tuning(3),
    "p_tuning": jlora.p_tuning(3, hidden=4),
}
TOKENS = jnp.asarray([[5, 6, 7, 8], [0, 0, 9, 10]])
MASK = jnp.asarray([[True] * 4, [False, False, True, True]])
LENGTH, NEW = 4, 5


def exactly(message: str) -> str:
    """A pattern of the whole message but for what JAX adds to an error while it traces."""
    return f"^{re.escape(message)}(\n|$)"


def adapt(name: str, method: str):
    """An adapter that is far from its start."""
    model, rng = MODELS[name], np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), shapes)
    sites = jlora.sites(lambda p: model.apply({"params": p}, TOKENS), params) if name == "llama" else None
    factors, rest = jlora.partition(jlora.apply(params, method=METHODS[method], sites=sites))
    noise = lambda x: x + 0.5 * jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return model, jlora.combine(jax.tree.map(noise, factors), rest), jlora.lift(model.apply)


def whole(lifted, adapted, texts):
    """The logits of a full call, (batch, length + NEW, vocab_size)."""
    mask = jnp.pad(MASK, ((0, 0), (0, NEW)), constant_values=True)
    mask = jnp.repeat(mask, len(texts) // len(MASK), axis=0)
    return jax.jit(lambda a, t: lifted({"params": a}, t, mask=mask, positions=positions_of(mask)))(adapted, texts)


BEAMS = "test_scores_of_beams_are_those_of_a_full_call"
ROWS = [*(("gpt2", method) for method in METHODS), ("llama", "prompt_tuning")]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(*row, marks=pytest.mark.thorough(BEAMS) if row in [("gpt2", "p_tuning"), ROWS[-1]] else ())
        for row in ROWS
    ],
)
def test_each_token_is_the_likeliest_of_a_full_call(name, method):
    model, adapted, lifted = adapt(name, method)
    texts = models.generate(model, adapted, TOKENS, new_tokens=NEW, mask=MASK, apply=lifted)
    likeliest = jnp.argmax(whole(lifted, adapted, texts), axis=-1)
    np.testing.assert_array_equal(texts[:, LENGTH:], likeliest[:, LENGTH - 1 : -1])
    np.testing.assert_array_equal(texts[:, :LENGTH], TOKENS)


@pytest.mark.parametrize(("name", "method"), [("gpt2", "p_tuning"), ("llama", "prompt_tuning")])
def test_scores_of_beams_are_those_of_a_full_call(name, method):
    model, adapted, lifted = adapt(name, method)
    found = models.beam_search(
        model, adapted, TOKENS, new_tokens=NEW, mask=MASK, beams=3, returned=2, length_penalty=0.0, apply=lifted
    )
    texts = found.tokens.reshape(-1, LENGTH + NEW)
    log_probs = jax.nn.log_softmax(whole(lifted, adapted, texts))[:, LENGTH - 1 : -1]
    each = jnp.take_along_axis(log_probs, texts[:, LENGTH:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.scores.reshape(-1), each.sum(axis=1), rtol=1e-4)
    assert (found.tokens[:, 0] != found.tokens[:, 1]).any(axis=1).all()


def test_trained_tokens_count_in_the_context():
    model, adapted, lifted = adapt("gpt2", "prompt_tuning")
    message = "3 trained tokens, 4 tokens of the prompt and 10 new ones are more than the model's context, 16"
    with pytest.raises(ValueError, match=exactly(message)):
        models.generate(model, adapted, TOKENS, new_tokens=10, apply=lifted)
    with pytest.raises(ValueError, match=exactly(message)):
        models.beam_search(model, adapted, TOKENS, new_tokens=10, beams=2, apply=lifted)


# -- a loop of one's own -----------------------------------------------------------------------------------------------


def test_a_loop_of_ones_own_reads_the_prompt_once():
    """A loop of one's own starts with an empty cache that has no room for the prompt; the first call lengthens it."""
    model, adapted, lifted = adapt("gpt2", "prompt_tuning")
    tokens = TOKENS[:1]

    def loop(adapted):
        cache, outs = model.empty_cache(1, 4), []
        for start, stop in ((0, 2), (2, 3), (3, 4)):
            positions = jnp.arange(start, stop)[None]
            out, cache = lifted({"params": adapted}, tokens[:, start:stop], positions=positions, cache=cache)
            outs.append(out)
        return jnp.concatenate(outs, axis=1), cache, lifted({"params": adapted}, tokens)

    found, cache, whole = jax.jit(loop)(adapted)
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)
    assert (int(cache.used), int(cache.virtual), cache.real.shape) == (7, 3, (1, 7))


def test_a_cache_without_the_prompt_is_refused():
    model, adapted, lifted = adapt("gpt2", "prompt_tuning")
    call = lambda params, apply, cache: apply(
        {"params": params}, TOKENS, positions=jnp.arange(4)[None] + jnp.zeros((2, 1), int), cache=cache
    )
    _, cache = jax.jit(lambda p: call(p, model.apply, model.empty_cache(2, 12)))(adapted.base)
    message = "prompt_tuning: the cache has tokens, 4, and not the prompt of 3 before them: begin with an empty cache"
    with pytest.raises(ValueError, match=exactly(message)):
        call(adapted, lifted, cache)
    program = jax.jit(lambda cache: call(adapted, lifted, cache))  # not known while it is traced
    for _ in range(2):  # nor afterwards
        out, cache = program(cache)
        assert jnp.isnan(out).all()


def test_a_model_whose_cache_is_a_collection_is_refused():
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            h = nn.Embed(8, 4, name="wte")(tokens)
            return nn.MultiHeadDotProductAttention(2, decode=True)(h)

    model, tokens = Decoder(), jnp.ones((1, 3), int)
    variables = model.init(jax.random.key(0), tokens)
    adapted = jlora.apply(variables["params"], method=jlora.prompt_tuning(2))
    lifted = jlora.lift(lambda p: model.apply({**variables, "params": p}, tokens[:, :1], mutable=["cache"]))
    message = (
        "prompt_tuning: Decoder keeps what it has read in a collection of variables, 'cache', which has no place for a "
        "prompt; call it with whole sequences"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        lifted(adapted)


def test_a_table_that_calls_its_own_class_is_looked_up_once():
    class Table(nn.Embed):
        def __call__(self, ids):
            return super().__call__(ids)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(2)(Table(8, 4, name="wte")(tokens))

    tokens = jnp.asarray([[1, 2, 3]])
    params = Model().init(jax.random.key(0), tokens)["params"]
    adapted = jlora.apply(params, method=jlora.prompt_tuning(2))
    found = jlora.lift(lambda p: Model().apply({"params": p}, tokens))(adapted)
    np.testing.assert_allclose(found, Model().apply({"params": params}, tokens), rtol=1e-6)


# -- logits that are no numbers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken():
    """A GPT-2 that is no number at position 6: the logits of the new token behind it are NaN."""
    model, adapted, _ = adapt("gpt2", "lora")
    params = dict(adapted.base)
    table = params["wpe"]["embedding"]
    return model, {**params, "wpe": {"embedding": table.at[6].set(jnp.nan)}}


MESSAGE = (
    "text 0: the logits of its new token 3, at position 7, are NaN, so that no token can be chosen; the parameters or "
    "the model's dtype made them"
)


def test_nan_is_no_token(broken):
    with pytest.raises(FloatingPointError, match=exactly(MESSAGE)):
        models.generate(*broken, TOKENS, mask=MASK, new_tokens=NEW)
    model, params = broken
    marked = jax.jit(lambda p: models.generate(model, p, TOKENS, mask=MASK, new_tokens=NEW))(params)
    assert (marked[0, : LENGTH + 3] >= 0).all() and (marked[0, LENGTH + 3 :] == -1).all()
    assert (marked[1] >= 0).all()  # two tokens shorter: it does not get so far
    np.testing.assert_array_equal(models.generate(*broken, TOKENS, mask=MASK, new_tokens=3), marked[:, : LENGTH + 3])


@pytest.mark.thorough("test_nan_is_no_token")
def test_nan_is_no_token_of_a_beam_either(broken):
    plan = {"mask": MASK, "new_tokens": NEW, "beams": 2}
    with pytest.raises(FloatingPointError, match=exactly(MESSAGE)):
        models.beam_search(*broken, TOKENS, **plan)
    model, params = broken
    found = jax.jit(lambda p: models.beam_search(model, p, TOKENS, **plan))(params)
    assert jnp.isnan(found.scores[0]).all() and (found.tokens[0, :, LENGTH:] == -1).all()
    assert jnp.isfinite(found.scores[1]).all() and (found.tokens[1] >= 0).all()


def test_two_prompts_go_on_with_a_cache_each():
    """Two adapted trees in one function, as a text and its contrast: each use is told of the tree that it is in."""
    model, one, _ = adapt("gpt2", "prompt_tuning")
    two = one.replace(factors=jax.tree.map(jnp.negative, one.factors))

    def call(params, cache, start, stop):
        positions = jnp.arange(start, stop)[None]
        return model.apply({"params": params}, TOKENS[:1, start:stop], positions=positions, cache=cache)

    first = jax.jit(jlora.lift(lambda p: call(p, model.empty_cache(1, 4), 0, 2)[1]))
    last = lambda p, q, caches: call(p, caches[0], 2, 4)[0] - call(q, caches[1], 2, 4)[0]
    caches = (first(one), first(two))
    apart = jlora.lift(lambda p, cache: call(p, cache, 2, 4)[0])
    expected = apart(one, caches[0]) - apart(two, caches[1])
    np.testing.assert_allclose(jlora.lift(last)(one, two, caches), expected, rtol=1e-4, atol=1e-5)
