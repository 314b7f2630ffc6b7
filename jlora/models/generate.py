"""Texts from a decoder: a prompt is read once, then each token costs one position, all in one compiled program."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jlora.models.cache import Cache, positions_of
from jlora.models.placed import on_auto_axes, rows_of
from jlora.models.sampling import Sampling, chosen, without_repeats

Apply = Callable[..., Any]
GREEDY = Sampling()
NO_TOKEN = -1  # in a text whose logits are NaN


class Prompt(NamedTuple):
    """Prompts of different lengths: padding before the tokens, (batch, length) both, int32 and bool."""

    tokens: jax.Array
    mask: jax.Array


class Decoder(NamedTuple):
    """A causal language model and how it is called: `model.apply`, or that lifted for adapted parameters."""

    model: nn.Module
    apply: Apply

    def __call__(
        self, params: Any, tokens: jax.Array, mask: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """The logits that follow the last token, (batch, vocab_size), and the cache with the tokens in it."""
        logits, cache = self.apply({"params": params}, tokens, mask=mask, positions=positions, cache=cache, last=True)
        return logits[:, 0], cache


def generate(
    model: nn.Module,
    params: Any,
    tokens: jax.Array,
    *,
    new_tokens: int,
    mask: jax.Array | None = None,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    eos: int | tuple[int, ...] | None = None,
    pad: int = 0,
    apply: Apply | None = None,
) -> jax.Array:
    """Continues prompts, token by token, with a cache of keys and values; one program for each shape and setting.

    Args:
      model: a decoder of jlora with `head="causal_lm"`.
      params: its parameters; or an `Adapted`, with `apply=jlora.lift(model.apply)`.
      tokens: the prompts, (batch, length), int32, padded on the left.
      new_tokens: how many to make at most.
      mask: (batch, length), bool, False at padding; None for none.
      sampling: how a token is chosen; the likeliest one by default.
      key: for what is drawn: needed with a temperature.
      eos: the token, or tokens, that end a text.
      pad: what follows the end.
      apply: how the model is called. Keep the lifted function: a new one compiles anew.

    Returns:
      (batch, length + new_tokens), int32: the prompts and what follows them. On a mesh of Explicit axes the texts
      lie as the prompts do, and the compiler decides about the rest.

    Raises:
      ValueError: if prompt and new tokens, with the trained ones of prompt tuning, are longer than the model's context,
        a prompt is empty or padded on the right, the head makes no tokens, or a temperature is given without a key.
      FloatingPointError: if logits are NaN, with the text and the position. Where `generate` is itself under jit, the
        text has -1, which is no token, from there on.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jlora.models import generate
      >>> from jlora.models.gpt2 import GPT2, GPT2Config
      >>> model = GPT2(GPT2Config(vocab_size=64, context=16, width=8, layers=1, heads=2))
      >>> tokens = jnp.ones((2, 3), jnp.int32)
      >>> params = model.init(jax.random.key(0), tokens)["params"]
      >>> generate(model, params, tokens, new_tokens=5).shape
      (2, 8)
    """
    if sampling.temperature and key is None:
        raise ValueError(f"a temperature of {sampling.temperature} draws tokens: pass key=jax.random.key(...)")
    if key is not None and not sampling.temperature:
        raise ValueError("nothing is drawn at a temperature of 0: leave key= out, or give sampling= a temperature")
    prompt = checked(model, tokens, mask, new_tokens)
    key = jax.random.key(0) if key is None else key
    decoder = Decoder(model, model.apply if apply is None else apply)
    texts, broken = sample(decoder, new_tokens, sampling, ends(eos), pad, params, prompt, key)
    check_numbers(broken, prompt, new_tokens)
    return texts


def check_numbers(broken: jax.Array, prompt: Prompt, new_tokens: int) -> None:
    """Raises a FloatingPointError if the logits of a text were NaN: broken (batch,), the first such new token."""
    try:
        steps = np.asarray(jax.device_get(broken))
    except jax.errors.TracerArrayConversionError:  # under jit the texts say it
        return
    if (steps < new_tokens).any():
        text = int((steps < new_tokens).argmax())
        step, length = int(steps[text]), prompt.tokens.shape[1]
        raise FloatingPointError(
            f"text {text}: the logits of its new token {step}, at position {length + step}, are NaN, so that no token "
            "can be chosen; the parameters or the model's dtype made them"
        )


def checked(model: nn.Module, tokens: jax.Array, mask: jax.Array | None, new_tokens: int) -> Prompt:
    """The prompts, with a mask. Raises a ValueError for those that cannot be continued."""
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "empty_cache") or config.head != "causal_lm":
        head = "" if config is None else f" with head={config.head!r}"
        raise ValueError(f"{type(model).__name__}{head} makes no tokens: a decoder with head='causal_lm' does")
    length = tokens.shape[1]
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")
    longest = longest_of(model)
    if length + new_tokens > longest:
        raise ValueError(
            f"{length} tokens of the prompt and {new_tokens} new ones are more than the model's context, {longest}"
        )
    if mask is None:
        if not length:
            raise ValueError("the prompts are empty: give each of them at least one token, such as the one that starts")
        return Prompt(tokens.astype(jnp.int32), jnp.ones(tokens.shape, bool))
    if mask.shape != tokens.shape:
        raise ValueError(f"the mask is {mask.shape}, the tokens are {tokens.shape} (batch, length)")
    try:
        ready = bool(length) and bool(jnp.all(mask[:, -1]))
    except jax.errors.TracerBoolConversionError:  # under jit the caller answers for it
        ready = True
    if not ready:
        raise ValueError("a prompt is empty or padded on the right: pad on the left, so that each ends in a token")
    return Prompt(tokens.astype(jnp.int32), mask.astype(bool))


def longest_of(model: nn.Module) -> int:
    """The longest sequence, in tokens, that a decoder takes."""
    config: Any = getattr(model, "config", None)
    longest: int = getattr(config, "longest", config.context)
    return longest


def ends(eos: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The tokens that end a text."""
    return () if eos is None else tuple(map(int, eos)) if isinstance(eos, tuple | list) else (int(eos),)


def is_end(tokens: jax.Array, eos: tuple[int, ...]) -> jax.Array:
    """Mask of the tokens, of any shape, that end a text."""
    return jnp.isin(tokens, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros(tokens.shape, bool)


def read(decoder: Decoder, params: Any, prompt: Prompt, new_tokens: int) -> tuple[jax.Array, Cache]:
    """The logits that follow the prompts, (batch, vocab_size), and a cache of them with slots for the new tokens.

    Raises:
      ValueError: if these, and the trained tokens that the adapter puts before them, are more than the model's context.
    """
    batch, length = prompt.tokens.shape
    model: Any = decoder.model
    empty: Cache = model.empty_cache(batch, length + new_tokens)
    logits, cache = decoder(params, prompt.tokens, prompt.mask, positions_of(prompt.mask), empty)
    slots, longest = cache.real.shape[1], longest_of(model)
    if slots > longest:
        raise ValueError(
            f"{slots - length - new_tokens} trained tokens, {length} tokens of the prompt and {new_tokens} new ones "
            f"are more than the model's context, {longest}"
        )
    return logits, cache


class _State(NamedTuple):
    step: jax.Array  # new tokens so far
    tokens: jax.Array  # (batch, slots)
    logits: jax.Array  # (batch, vocab_size): of the next one
    done: jax.Array  # (batch,)
    broken: jax.Array  # (batch,), int32: the first new token whose logits are NaN; new_tokens for none
    cache: Cache


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def sample(
    decoder: Decoder,
    new_tokens: int,
    sampling: Sampling,
    eos: tuple[int, ...],
    pad: int,
    params: Any,
    prompt: Prompt,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The program of `generate`: the texts, and for each its first new token whose logits are NaN, or new_tokens."""
    program = partial(_sample, decoder, new_tokens, sampling, eos, pad)
    return on_auto_axes(program, rows_of(prompt.tokens), ())(params, prompt, key)


def _sample(
    decoder: Decoder,
    new_tokens: int,
    sampling: Sampling,
    eos: tuple[int, ...],
    pad: int,
    params: Any,
    prompt: Prompt,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    batch, length = prompt.tokens.shape
    real = jnp.sum(prompt.mask, axis=1, dtype=jnp.int32)  # (batch,)
    logits, cache = read(decoder, params, prompt, new_tokens)
    slots = jnp.pad(prompt.tokens, ((0, 0), (0, new_tokens)), constant_values=pad)

    def going(state: _State) -> jax.Array:
        return (state.step < new_tokens) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        used = length + state.step
        logits = without_repeats(state.logits, state.tokens, used, sampling.no_repeat_ngram)
        new = chosen(logits, sampling, jax.random.fold_in(key, state.step))
        nan = jnp.any(jnp.isnan(state.logits), axis=1) & ~state.done  # (batch,)
        broken = jnp.where(nan, state.step, state.broken)
        new = jnp.where(broken < new_tokens, NO_TOKEN, jnp.where(state.done, pad, new))
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, new[:, None], used, axis=1)
        positions = (real + state.step)[:, None]
        logits, cache = decoder(params, new[:, None], jnp.ones((batch, 1), bool), positions, state.cache)
        done = state.done | nan | is_end(new, eos)
        return _State(state.step + 1, tokens, logits, done, broken, cache)

    done, broken = jnp.zeros((batch,), bool), jnp.full((batch,), new_tokens, jnp.int32)
    start = _State(jnp.zeros((), jnp.int32), slots, logits, done, broken, cache)
    last = jax.lax.while_loop(going, advance, start)
    behind = (last.broken < new_tokens)[:, None] & (jnp.arange(length + new_tokens) >= length + last.step)[None]
    return jnp.where(behind, NO_TOKEN, last.tokens), last.broken
