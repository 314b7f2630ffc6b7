"""Beam search: the texts that a decoder finds likeliest, several kept side by side."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models.cache import Cache, taken
from jlora.models.generate import NO_TOKEN, Apply, Decoder, Prompt, check_numbers, checked, ends, is_end, read
from jlora.models.placed import on_auto_axes, rows_of
from jlora.models.sampling import check_ngram, without_repeats

NEVER = -1e9  # a score that no text has


class Beams(NamedTuple):
    """The best texts of each prompt, best first.

    Attributes:
      tokens: (batch, returned, length + new_tokens), int32, the prompt among them.
      scores: (batch, returned), float32: log-probability in nats over (number of new tokens)^length_penalty.
    """

    tokens: jax.Array
    scores: jax.Array


class Search(NamedTuple):
    """Settings of one search; see `beam_search`."""

    beams: int
    returned: int
    new_tokens: int
    length_penalty: float
    no_repeat_ngram: int
    of_prompt: bool
    early_stopping: bool | Literal["never"]
    eos: tuple[int, ...]
    pad: int


def beam_search(
    model: nn.Module,
    params: Any,
    tokens: jax.Array,
    *,
    beams: int,
    new_tokens: int,
    mask: jax.Array | None = None,
    returned: int = 1,
    length_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    of_prompt: bool = True,
    early_stopping: bool | Literal["never"] = False,
    eos: int | tuple[int, ...] | None = None,
    pad: int = 0,
    apply: Apply | None = None,
) -> Beams:
    """The likeliest continuations: `argmax log p(new | prompt) / |new|^length_penalty` over what the beams reach.

    Args:
      model, params, tokens, new_tokens, mask, eos, pad, apply: as in `generate`.
      beams: continuations that are kept at each step.
      returned: how many of them come back, at most `beams`.
      length_penalty: 0 prefers short texts, larger values longer ones. The LoRA paper has 0.9 (its code 0.8) on E2E.
      no_repeat_ngram: as in `Sampling`.
      of_prompt: the prompt's n-grams count among the repeated ones, as in Hugging Face's `generate`; False for those of
        the new tokens alone, as in the LoRA paper's code.
      early_stopping: True ends a search when `beams` texts have ended; False also when what goes on could not be
        better at its present length; "never" at no length up to `new_tokens`.

    Raises:
      FloatingPointError: as `generate`. Under jit such texts have -1 in place of new tokens, and scores of NaN.
      ValueError: as `generate`; or for fewer than one beam, or more texts returned than there are beams.

    Source: the order of events is that of Hugging Face's `generate`, so that scores can be compared: of the 2 * beams
    best continuations the first `beams` may end, and the best `beams` of those that do not end go on.
    """
    if beams < 1 or not 1 <= returned <= beams:
        raise ValueError(f"beams must be at least 1 and returned between 1 and beams, got {beams} and {returned}")
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise ValueError(f"early_stopping is True, False or 'never', got {early_stopping!r}")
    check_ngram(no_repeat_ngram)
    prompt = checked(model, tokens, mask, new_tokens)
    options = Search(
        beams, returned, new_tokens, length_penalty, no_repeat_ngram, of_prompt, early_stopping, ends(eos), pad
    )
    found, broken = search(Decoder(model, model.apply if apply is None else apply), options, params, prompt)
    check_numbers(broken, prompt, new_tokens)
    return found


class _State(NamedTuple):
    step: jax.Array  # new tokens so far
    running: jax.Array  # (batch, beams, slots): texts that go on
    running_scores: jax.Array  # (batch, beams): their log-probabilities
    ended: jax.Array  # (batch, beams, slots): the best texts that have ended
    ended_scores: jax.Array  # (batch, beams)
    has_ended: jax.Array  # (batch, beams): whether there is such a text
    improvable: jax.Array  # (batch, 1): what goes on may become better than what has ended
    stuck: jax.Array  # (): all continuations have ended
    broken: jax.Array  # (batch,), int32: the first new token whose logits are NaN; new_tokens for none
    log_probs: jax.Array  # (batch * beams, vocab_size): of the next token
    cache: Cache


@partial(jax.jit, static_argnums=(0, 1))
def search(decoder: Decoder, options: Search, params: Any, prompt: Prompt) -> tuple[Beams, jax.Array]:
    """The program of `beam_search`: the texts, and of each prompt the first new token whose logits are NaN."""
    rows = rows_of(prompt.tokens)
    tokens, scores, broken = on_auto_axes(partial(_search, decoder, options), rows, rows, ())(params, prompt)
    return Beams(tokens, scores), broken


def _search(decoder: Decoder, options: Search, params: Any, prompt: Prompt) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch, length = prompt.tokens.shape
    beams, slots = options.beams, length + options.new_tokens
    stacked: bool = decoder.model.config.scan
    real = jnp.repeat(jnp.sum(prompt.mask, axis=1, dtype=jnp.int32), beams)  # (batch * beams,)
    logits, cache = read(decoder, params, prompt, options.new_tokens)
    cache = taken(cache, jnp.repeat(jnp.arange(batch), beams), stacked=stacked)
    texts = jnp.pad(prompt.tokens, ((0, 0), (0, options.new_tokens)), constant_values=options.pad)
    texts = jnp.repeat(texts[:, None], beams, axis=1)  # (batch, beams, slots)
    nothing = jnp.full((batch, beams), NEVER)

    def going(state: _State) -> jax.Array:
        full = jnp.all(state.has_ended) if options.early_stopping is True else jnp.zeros((), bool)
        return (state.step < options.new_tokens) & jnp.any(state.improvable) & ~full & ~state.stuck

    def advance(state: _State) -> _State:
        used = length + state.step
        nan = jnp.any(jnp.isnan(state.log_probs).reshape(batch, -1), axis=1) & state.improvable[:, 0]  # (batch,)
        flat = state.running.reshape(batch * beams, slots)
        seen, count = (flat, used) if options.of_prompt else (flat[:, length:], state.step)
        log_probs = without_repeats(state.log_probs, seen, count, options.no_repeat_ngram)
        scores, parents, new = _continuations(log_probs, state.running_scores, options)
        candidates = jnp.take_along_axis(state.running, parents[:, :, None], axis=1)  # (batch, kept, slots)
        candidates = jax.lax.dynamic_update_slice_in_dim(candidates, new[:, :, None], used, axis=2)
        end = is_end(new, options.eos) | (state.step + 1 == options.new_tokens)  # (batch, kept)
        ended, ended_scores, has_ended = _ended(state, candidates, scores, end, options)
        running_scores, best = jax.lax.top_k(scores + end.astype(jnp.float32) * NEVER, beams)
        running = jnp.take_along_axis(candidates, best[:, :, None], axis=1)
        rows = jnp.take_along_axis(parents, best, axis=1) + beams * jnp.arange(batch)[:, None]  # (batch, beams)
        token = jnp.take_along_axis(new, best, axis=1).reshape(-1, 1)
        logits, cache = decoder(
            params,
            token,
            jnp.ones(token.shape, bool),
            (real + state.step)[:, None],
            taken(state.cache, rows.reshape(-1), stacked=stacked),
        )
        improvable = state.improvable & ~nan[:, None]
        improvable &= _improvable(running_scores, ended_scores, has_ended, state.step + 1, options)
        return _State(
            state.step + 1, running, running_scores, ended, ended_scores, has_ended, improvable, jnp.all(end),
            jnp.where(nan, state.step, state.broken), jax.nn.log_softmax(logits), cache,
        )  # fmt: skip

    first = jax.nn.log_softmax(jnp.repeat(logits, beams, axis=0))
    start = _State(
        step=jnp.zeros((), jnp.int32),
        running=texts,
        running_scores=nothing.at[:, 0].set(0.0),  # the beams are alike: the first one speaks for all
        ended=texts,
        ended_scores=nothing,
        has_ended=jnp.zeros((batch, beams), bool),
        improvable=jnp.ones((batch, 1), bool),
        stuck=jnp.zeros((), bool),
        broken=jnp.full((batch,), options.new_tokens, jnp.int32),
        log_probs=first,
        cache=cache,
    )
    last = jax.lax.while_loop(going, advance, start)
    broken = (last.broken < options.new_tokens)[:, None]  # (batch, 1)
    tokens = jnp.where(broken[:, :, None] & (jnp.arange(slots) >= length)[None, None], NO_TOKEN, last.ended)
    scores = jnp.where(broken, jnp.nan, last.ended_scores)
    return tokens[:, : options.returned], scores[:, : options.returned], last.broken


def _continuations(
    log_probs: jax.Array, running_scores: jax.Array, options: Search
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best continuations, so many that `beams` of them do not end: scores, beams and tokens, (batch, kept) each."""
    batch, vocab_size = len(running_scores), log_probs.shape[-1]
    whole = log_probs.reshape(batch, options.beams, vocab_size) + running_scores[:, :, None]
    kept = max(2, 1 + len(options.eos)) * options.beams
    scores, places = jax.lax.top_k(whole.reshape(batch, -1), min(kept, options.beams * vocab_size))
    return scores, places // vocab_size, (places % vocab_size).astype(jnp.int32)


def _ended(
    state: _State, candidates: jax.Array, scores: jax.Array, end: jax.Array, options: Search
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best texts that have ended, those of this step among them."""
    end = end & (jnp.arange(end.shape[1]) < options.beams)[None]
    scores = scores / (state.step + 1).astype(jnp.float32) ** options.length_penalty
    closed = ~state.improvable
    if options.early_stopping is True:
        closed |= jnp.all(state.has_ended, axis=1, keepdims=True)
    scores = scores + closed.astype(jnp.float32) * NEVER + (~end).astype(jnp.float32) * NEVER
    best_scores, best = jax.lax.top_k(jnp.concatenate([state.ended_scores, scores], axis=1), options.beams)
    texts = jnp.concatenate([state.ended, candidates], axis=1)
    has_ended = jnp.concatenate([state.has_ended, end], axis=1)
    return (
        jnp.take_along_axis(texts, best[:, :, None], axis=1),
        best_scores,
        jnp.take_along_axis(has_ended, best, axis=1),
    )


def _improvable(
    running_scores: jax.Array, ended_scores: jax.Array, has_ended: jax.Array, step: jax.Array, options: Search
) -> jax.Array:
    """Whether the best text that goes on may still beat the worst that has ended, (batch, 1)."""
    longest = options.early_stopping == "never" and options.length_penalty > 0
    length = jnp.asarray(options.new_tokens if longest else step, jnp.float32)
    best = running_scores[:, :1] / length**options.length_penalty
    worst = jnp.where(has_ended, jnp.min(ended_scores, axis=1, keepdims=True), NEVER)
    return jnp.any(best > worst, axis=1, keepdims=True)
