"""Adapters of one base added up: weighted sums, negation, interpolation, TIES, DARE."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.adapted.adapted import Adapted, check_adapted, initial_extra
from jlora.adapted.compress import (
    Axes,
    Size,
    Update,
    as_factors,
    check_concrete,
    compress,
    plain_lora,
    product,
    triplets,
    truncated,
    update_of,
    value_on,
)
from jlora.adapted.differences import check_same_leaves, differ
from jlora.adapted.select import Extra
from jlora.adapted.thin import SUMS, THINNED, How, Majority, Rule, ThinnedSVD, check_rule
from jlora.methods.acts import Arrays
from jlora.methods.checks import check_number
from jlora.methods.matrix import one_by_one, restore
from jlora.transform.explicit import on_auto_axes, spec_of
from jlora.transform.sites import Target


def combine_adapters(
    adapteds: Sequence[Adapted],
    weights: Sequence[float],
    how: How = "sum",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority: Majority = "total",
    seed: int | jax.Array = 0,
) -> Adapted:
    """One plain LoRA of several adapters of one base: `W0 + sum_i w_i D_i`, D_i being the update `W_i - W0` of each.

    Task arithmetic: weights (1, 1) add two skills, (1, -1) take the second out of the first, (1 - t, t) interpolate.
    The D_i are the true updates, with each adapter's own scale, rank and alpha; adapters may have other ranks, other
    targets and other methods (DoRA, (IA)^3: merged minus base). A weight that one of them does not adapt has D_i = 0
    there.

    how:
      "sum": exact, by concatenation, `[w_1 A_1, w_2 A_2] [B_1; B_2]`, then QR of both and the SVD of the small product:
        the lowest rank without loss, at most the sum of theirs; within `rank` or `energy`, the best approximation.
      "cat": the concatenation as it is: the rank is the sum of theirs, and nothing is rounded but w_i A_i.
      "svd": "sum" with a `rank` of the largest that the adapters have at a weight, if nothing is given.
      "magnitude": of each D_i the `int(density * size)` largest entries by absolute value, then the sum.
      "ties": the same entries, of which those of w_i D_i whose sign was elected: that of `sum_i w_i D_i` (majority
        "total"; positive at 0) or of `sum_i sign(w_i D_i)` ("frequency"). They are added, and divided by their number.
      "dare": every entry of D_i is kept with probability `density` and divided by it, then the sum.
      "dare_ties": entries drawn as in "dare", elected and averaged as in "ties".

    The last four act on D_i itself, entry by entry, each of stacked weights by itself. The result has no low rank, so
    they need `rank` or `energy`, and give its best approximation, at the cost of an SVD of every weight.
    `jlora.compression_error(exact, combined)` tells how good that is, `exact` being the same call with "cat", or with
    `energy=1`.

    Hugging Face PEFT 0.21.2 computes something else: its "linear", "ties", "dare_linear" and "magnitude_prune" treat
    the A's and the B's apart and multiply the results, which adds the cross terms A_i B_j. On random factors its
    "linear" is 74 % off the true weighted sum. rsLoRA adapters come out too large by sqrt(r), 2.0 for r = 4. Here no
    factor is added to another, and the scale of each adapter, alpha / sqrt(r) too, is in D_i; that of the result is 1.
    In PEFT's "ties" the weights have no vote; here they have: a negated adapter votes for the negated sign.

    Args:
      adapteds: one or more, each on the same base: the same leaves with the same values.
      weights: w_i, dimensionless, one for each; any finite number.
      how: as above.
      rank: the most that a weight gets; those whose sum has a lower rank get that.
      energy: the share of each sum's squared Frobenius norm that is kept at least, above 0 and at most 1. With `rank=`,
        too, the smaller of both.
      density: share of the entries that the last four keep, above 0 and at most 1.
      majority: whose sign the two TIES take: "total" or "frequency".
      seed: seed or key of "dare". What is drawn depends on it, on the weight's path and on the adapter's place in
        `adapteds`, and not on what else is adapted.

    Returns:
      A plain LoRA with alpha = rank at every weight. Weights whose sum is zero, but for rounding, are not adapted.
      Extras are combined likewise, without a bound on their rank: `v0 + sum_i w_i (v_i - v0)`, rows as the union of
      theirs. A weight that one adapter has factors of and another trains as it is, is trained as it is.

    Raises:
      ValueError: for adapters of other bases or with other axes of one weight (which leaf differs is said), methods on
        activations, factors that are not finite, numbers out of range, and arguments that `how` does not take.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089, section 2; Yadav et al.,
    "TIES-Merging", arXiv 2306.01708, section 4; Yu et al. (DARE), "Language Models are Super Mario", arXiv 2311.03099,
    section 3. PEFT's numbers were measured on release 0.21.2.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> fill = lambda a, b: {"kernel": {"A": jnp.full((4, 1, 1), a), "B": jnp.full((1, 3, 1), b)}}
      >>> adapted = jlora.apply({"kernel": jnp.zeros((4, 3))}, rank=1, alpha=2)
      >>> one, two = (jlora.combine(fill(a, b), adapted) for a, b in ((1.0, 2.0), (3.0, 1.0)))
      >>> mixed = jlora.combine_adapters([one, two], [0.5, -0.5])     # 0.5 * 4 - 0.5 * 6
      >>> round(float(jlora.merge(mixed)["kernel"][0, 0]), 4), mixed.sites[0].rank
      (-1.0, 1)
    """
    weights = _check_adapters(adapteds, weights)
    rule = check_rule(how, density, majority, "combine_adapters")
    size = Size.parse(rank, energy, "combine_adapters")
    if how in THINNED:
        size = size.required("combine_adapters", f"{how!r} gives no low rank: ")
    elif how == "cat" and size != Size():
        raise ValueError("combine_adapters: 'cat' keeps all ranks: leave rank= and energy= out, or take how='sum'")
    key = tree.as_key(seed)
    leaves = [tree.leaves(adapted.base)[0] for adapted in adapteds]
    targets = _targets(adapteds)
    whole = {extra.path for adapted in adapteds for extra in adapted.extras}
    extras: dict[str, Extra] = {}
    factors: dict[str, Arrays | None] = {}
    for path in (path for path in leaves[0] if path in whole or path in targets):
        each = enumerate(zip(weights, adapteds, leaves, strict=True))
        mine = [held for i, (w, adapted, named) in each if (held := _held(i, w, adapted, named, path)) is not None]
        own = tree.fold_path(key, path)
        if path in whole:
            extras[path], factors[path] = _combined_extra(leaves[0][path], path, mine, rule, own)
        elif active := [held for held in mine if held.w != 0]:
            factors[path] = _combined(active, targets[path], rule, size, own)
    return plain_lora(adapteds[0].base, factors, targets, extras)


# -- parts -------------------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """One adapter's part in a leaf: the update of a target, or the values of an extra.

    Attributes:
      place: of the adapter, from 0.
      w: its weight.
      of: the target, or the extra.
      update: of a target.
      arrays: of an extra.
    """

    place: int
    w: float
    of: Target | Extra
    update: Update | None
    arrays: Arrays


def _held(place: int, w: float, adapted: Adapted, named: Mapping[str, Any], path: str) -> Held | None:
    for site in adapted.sites:
        if site.path == path:
            return Held(place, w, site, update_of(adapted, named, site), {})
    for extra in adapted.extras:
        if extra.path == path:
            return Held(place, w, extra, None, adapted.factors[path])
    return None


def _combined(holders: Sequence[Held], site: Target, rule: Rule, size: Size, key: jax.Array) -> Arrays | None:
    """A and B of one weight."""
    updates = [held.update for held in holders if held.update is not None]
    if rule.how in THINNED:
        stack, inputs, _ = updates[0].a.shape
        decompose = ThinnedSVD(rule, triplets(min(inputs, updates[0].b.shape[2]), size))
        weights = jnp.broadcast_to(_weights(holders)[None], (stack, len(holders)))
        keys = jnp.stack([jax.random.split(jax.random.fold_in(key, held.place), stack) for held in holders], axis=1)
        found = on_auto_axes(lambda *stacked: one_by_one(decompose, *stacked), updates, weights, keys)
        return truncated(found, site, size, "combine_adapters")

    both = on_auto_axes(_concatenated, updates, _weights(holders))
    if rule.how == "cat":
        return on_auto_axes(lambda a, b: as_factors(Axes.of(site), a, b), *both)
    if rule.how == "svd" and size == Size():
        size = Size(max(held.of.rank for held in holders if isinstance(held.of, Target)) or None)
        size.required("combine_adapters", f"'svd': none of the adapters has a rank at {site.path!r}: ")
    return compress(both, site, size, "combine_adapters")


@jax.jit
def _concatenated(updates: Sequence[Update], weights: jax.Array) -> Update:
    a = [update.a * weights[i] for i, update in enumerate(updates)]
    return Update(jnp.concatenate(a, axis=2), jnp.concatenate([update.b for update in updates], axis=1))


def _combined_extra(leaf: Any, path: str, holders: Sequence[Held], rule: Rule, key: jax.Array) -> tuple[Extra, Arrays]:
    """A leaf that is trained as it is: whole if one of the adapters has all of it, else the union of their rows."""
    of_each = [held.of.rows if isinstance(held.of, Extra) else None for held in holders]
    rows = None if None in of_each else tuple(sorted({row for some in of_each for row in some or ()}))
    extra = Extra(path, rows)
    ((name, start),) = initial_extra(leaf, extra).items()
    own = [next(iter(held.arrays.values()), start).size for held in holders]  # what an adapter trains of it
    counts = tuple(int(rule.density * size) for size in own)
    keys = jnp.stack([jax.random.fold_in(key, held.place) for held in holders])
    values = [_value(held, leaf, rows, start) for held in holders]
    mixed = lambda *arrays: _mixed(rule, counts, *arrays)
    return extra, {name: on_auto_axes(mixed, start, values, _weights(holders), keys, place=lambda _: spec_of(start))}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mixed(
    rule: Rule,
    counts: tuple[int, ...],
    start: jax.Array,
    values: Sequence[jax.Array],
    weights: jax.Array,
    keys: jax.Array,
) -> jax.Array:
    if rule.how in SUMS:  # not start + sum of w (v - start), which is rounded where one adapter has weight 1
        return sum((value * weights[i] for i, value in enumerate(values)), start * (1 - weights.sum()))
    deltas = [(value - start).ravel() for value in values]
    return start + rule.entries(deltas, weights, counts, keys).reshape(start.shape)


def _value(held: Held, leaf: Any, rows: tuple[int, ...] | None, start: jax.Array) -> jax.Array:
    """Value that an adapter gives a leaf, float32."""
    if isinstance(held.of, Extra):
        return value_on(leaf, held.of, held.arrays, rows)
    site, update = held.of, held.update
    assert update is not None
    add = lambda start, update: start + restore(product(update.a, update.b), site)
    return on_auto_axes(add, start, update, place=lambda _: spec_of(start))


def _weights(holders: Sequence[Held]) -> jax.Array:
    return jnp.asarray([held.w for held in holders], jnp.float32)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_adapters(adapteds: Any, weights: Any) -> list[float]:
    """The weights, after a check that there is one for each adapter, and that all adapters have one base."""
    if isinstance(adapteds, Adapted) or not isinstance(adapteds, Sequence):
        raise TypeError(f"combine_adapters takes a list of Adapteds, got {type(adapteds).__name__}")
    if not adapteds:
        raise ValueError("combine_adapters: there is no adapter")
    for adapted in adapteds:
        check_adapted(adapted, "combine_adapters")
        check_concrete(adapted, "combine_adapters")
    given = [check_number(w, f"combine_adapters: weights[{i}]") for i, w in enumerate(weights)]
    if len(given) != len(adapteds):
        raise ValueError(f"combine_adapters: {len(adapteds)} adapters and {len(given)} weights: give one for each")
    base, _ = tree.leaves(adapteds[0].base)
    for i, adapted in enumerate(adapteds[1:], 1):
        names = ("adapter 0", f"adapter {i}")
        other = check_same_leaves(adapteds[0].base, adapted.base, "combine_adapters", names)
        for path, leaf in base.items():
            if differ(leaf, other[path]):
                raise ValueError(
                    f"combine_adapters: adapters 0 and {i} have other bases: the values of {path!r} differ, and an "
                    "update is one of its own base; load both onto one, jlora.load(folder, params)"
                )
    return given


def _targets(adapteds: Sequence[Adapted]) -> dict[str, Target]:
    """The targets by path: of each weight that of the first adapter that has it."""
    found: dict[str, tuple[int, Target]] = {}
    for i, adapted in enumerate(adapteds):
        for site in adapted.sites:
            j, first = found.setdefault(site.path, (i, site))
            if _axes(site) != _axes(first):
                raise ValueError(
                    f"combine_adapters: {site.path!r} has axes {_axes(first)} in adapter {j} and {_axes(site)} in "
                    f"adapter {i}: apply both with the same sites="
                )
    return {path: site for path, (_, site) in found.items()}


def _axes(site: Target) -> str:
    stack = f", stack {list(site.stack_axes)}" if site.stack_axes else ""
    return f"{list(site.in_axes)} -> {list(site.out_axes)}{stack}"
