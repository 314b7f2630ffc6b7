"""From logits to the next token: what is made less likely, what is ruled out, and the draw."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token, in this order: repeated n-grams, temperature, top-k, top-p, the draw.

    Attributes:
      temperature: the logits are divided by it; 0 for the likeliest token (greedy).
      top_k: draw from the k likeliest tokens, and those as likely as the last of them; None for all.
      top_p: draw from the likeliest tokens that together have at least this probability, in (0, 1].
      no_repeat_ngram: n: no n tokens in a row occur twice in a sequence, its prompt among it; 0 for no such rule.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a probability in (0, 1], got {self.top_p}")
        if not self.temperature and (self.top_k is not None or self.top_p < 1):
            raise ValueError("top_k and top_p say what is drawn from: give a temperature above 0, such as 1.0")
        check_ngram(self.no_repeat_ngram)


def check_ngram(n: int) -> None:
    """Raises a ValueError for a negative length of n-grams."""
    if n < 0:
        raise ValueError(f"no_repeat_ngram must be at least 0, got {n}")


def chosen(logits: jax.Array, settings: Sampling, key: jax.Array) -> jax.Array:
    """The next tokens, (batch,) int32, from logits (batch, vocab_size), repeated n-grams ruled out before."""
    if settings.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / settings.temperature
    if settings.top_k is not None:
        logits = top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = top_p(logits, settings.top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """(batch, vocab_size): -inf at what is less likely than the k-th likeliest.

    Source: Fan et al., "Hierarchical Neural Story Generation", arXiv 1805.04833, section 5.3.
    """
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def top_p(logits: jax.Array, p: float) -> jax.Array:
    """(batch, vocab_size): -inf outside the nucleus, the smallest set of likeliest tokens of probability at least p.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751, section 3.1.
    """
    order = jnp.argsort(logits, axis=-1)  # the least likely first
    sorted_logits = jnp.take_along_axis(logits, order, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(sorted_logits), axis=-1) <= 1 - p
    below = below.at[:, -1].set(False)
    return jnp.where(jnp.take_along_axis(below, jnp.argsort(order, axis=-1), axis=-1), -jnp.inf, logits)


def without_repeats(logits: jax.Array, tokens: jax.Array, used: jax.Array, n: int) -> jax.Array:
    """(batch, vocab_size): -inf at the tokens that would end an n-gram that is there already.

    Args:
      logits: (batch, vocab_size).
      tokens: (batch, slots); those from `used` on are not there yet.
      used: (), int32.
      n: of the n-grams; 0 for no such rule.

    Source: Paulus et al., "A Deep Reinforced Model for Abstractive Summarization", arXiv 1705.04304, section 2.5.
    """
    if not n:
        return logits
    batch, slots = tokens.shape
    if slots < n:
        return logits
    last = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(used - (n - 1), 0), n - 1, axis=1)  # (batch, n - 1)
    ends = jnp.arange(n - 1, slots)  # where an n-gram ends
    repeated = jnp.broadcast_to((ends < used)[None], (batch, len(ends))) & (used >= n - 1)
    for k in range(n - 1):
        repeated &= tokens[:, k : slots - n + 1 + k] == last[:, k : k + 1]
    rows = jnp.broadcast_to(jnp.arange(batch)[:, None], repeated.shape)
    banned = jnp.zeros(logits.shape, bool).at[rows, tokens[:, n - 1 :]].max(repeated)
    return jnp.where(banned, -jnp.inf, logits)
