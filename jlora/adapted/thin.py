"""Rules that thin updates out, entry by entry, before they are added: TIES, DARE, magnitude pruning."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jlora.adapted.compress import Decomposed, Update, first, product
from jlora.methods.checks import check_number
from jlora.methods.matrix import thin_svd

How: TypeAlias = Literal["sum", "cat", "svd", "ties", "dare", "dare_ties", "magnitude"]
Majority: TypeAlias = Literal["total", "frequency"]
SUMS, THINNED, MAJORITIES = ("sum", "cat", "svd"), ("ties", "dare", "dare_ties", "magnitude"), ("total", "frequency")


class Rule(NamedTuple):
    """Fate of the entries of the updates, as `combine_adapters` says it."""

    how: How
    density: float
    majority: Majority

    def entries(
        self, deltas: Sequence[jax.Array], weights: jax.Array, counts: Sequence[int], keys: jax.Array
    ) -> jax.Array:
        """The combined update, (size,).

        Args:
          deltas: of each adapter, (size,).
          weights: (adapters,).
          counts: how many entries of each update "ties" and "magnitude" keep.
          keys: (adapters,), of "dare" and "dare_ties".
        """
        if self.how in ("ties", "magnitude"):
            thinned = [largest(delta, count) for delta, count in zip(deltas, counts, strict=True)]
        else:
            draw = lambda key, delta: jax.random.bernoulli(key, self.density, delta.shape)
            thinned = [jnp.where(draw(keys[i], x), x / self.density, jnp.zeros_like(x)) for i, x in enumerate(deltas)]
        weighted = jnp.stack(thinned) * weights[:, None]  # (adapters, size)
        if self.how in ("dare", "magnitude"):
            return weighted.sum(0)
        signs = jnp.sign(weighted)
        votes = (weighted if self.majority == "total" else signs).sum(0, keepdims=True)
        agrees = signs == jnp.where(votes >= 0, 1.0, -1.0)  # zeros have no sign, and no part in the mean
        return jnp.sum(weighted * agrees.astype(weighted.dtype), 0) / jnp.maximum(agrees.sum(0), 1).astype(
            weighted.dtype
        )


def largest(delta: jax.Array, count: int) -> jax.Array:
    """The `count` entries of a vector that are largest by absolute value, the others zero. Of equal ones the first."""
    if count >= delta.size:
        return delta
    _, at = jax.lax.top_k(jnp.abs(delta), count)
    return jnp.zeros_like(delta).at[at].set(delta[at])


@dataclasses.dataclass(frozen=True)
class ThinnedSVD:
    """Singular triplets of what a rule makes of the products `a_i b_i`, for `one_by_one`: equal ones are compiled once.

    Attributes:
      rule: of the entries.
      kept: how many triplets.
    """

    rule: Rule
    kept: int

    def __call__(self, updates: Sequence[Update], weights: jax.Array, keys: jax.Array) -> Decomposed:
        deltas = [product(a, b) for a, b in updates]  # (inputs, outputs) each
        counts = [int(self.rule.density * delta.size) for delta in deltas]
        mixed = self.rule.entries([delta.ravel() for delta in deltas], weights, counts, keys).reshape(deltas[0].shape)
        return first(*thin_svd(mixed), jnp.linalg.norm(mixed), self.kept)


def check_rule(how: Any, density: Any, majority: Any, caller: str) -> Rule:
    """The rule of these arguments.

    Raises:
      ValueError: if one of them is unknown, out of its range, missing, or not read by `how`.
    """
    if how not in (*SUMS, *THINNED):
        raise ValueError(f"{caller}: how must be one of {', '.join(map(repr, (*SUMS, *THINNED)))}, not {how!r}")
    if majority not in MAJORITIES:
        raise ValueError(f"{caller}: majority must be 'total' or 'frequency', not {majority!r}")
    if majority != "total" and how not in ("ties", "dare_ties"):
        raise ValueError(f"{caller}: {how!r} elects no sign: leave majority= out")
    if how in SUMS:
        if density is not None:
            raise ValueError(f"{caller}: {how!r} keeps all entries: leave density= out")
        return Rule(how, 1.0, majority)
    if density is None:
        raise ValueError(f"{caller}: {how!r} thins the updates out: give density=, above 0 and at most 1")
    density = check_number(density, f"{caller}: density")
    if not 0 < density <= 1:
        raise ValueError(f"{caller}: density must be above 0 and at most 1, not {density!r}")
    return Rule(how, float(density), majority)
