"""A LoRA from two checkpoints of one model: the base, and what full fine-tuning made of it."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from jlora import tree
from jlora.adapted.adapted import Adapted
from jlora.adapted.compress import Size, compress, difference, plain_lora
from jlora.adapted.differences import check_same_leaves, differ
from jlora.adapted.select import (
    Extra,
    Pattern,
    is_left_out,
    is_trainable,
    known_sites,
    listing,
    matching,
    select,
)
from jlora.methods.acts import Arrays
from jlora.transform.sites import Site, Target


def extract_lora(
    before: Any,
    after: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Pattern | None = None,
    sites: Iterable[Site | Target] | None = None,
    extras: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
) -> Adapted:
    """The LoRA on `before` that comes closest to `after`: `A B = U_r S_r V_r^T` of `after - before`, weight by weight.

    What changed and has no low-rank form, biases and norms, becomes an extra, exactly. A changed leaf of two axes or
    more that is no target, such as a table of embeddings, would be as large as the checkpoint's: it is an error until
    one says what becomes of it. So `merge` of the result is `after`, but for what `compression_error(after, extracted)`
    says and what `ignore` names. What did not change is not adapted.

    Args:
      before: the base, which the result holds as it is.
      after: the fine-tuned parameters: the same tree with the same shapes; dtypes may differ.
      rank: the most that a weight gets; those whose difference has a lower rank get that.
      energy: the share of each difference's squared Frobenius norm that is kept at least, above 0 and at most 1. With
        `rank=`, too, the smaller of both.
      targets: which of the changed weights get factors, as in `apply`; None for all linear layers and convolutions.
      sites: the parameters' axes, from `jlora.sites(fn, before, *args)`. Flax's naming conventions when None.
      extras: patterns of changed leaves that are kept whole; None for those that have no low-rank form.
      ignore: patterns of leaves whose change is left out.

    Returns:
      A plain LoRA of scale 1.

    Raises:
      ValueError: without a rank or an energy, or if one is out of its range; if the two trees differ in structure or
        shapes, or in no value; if a leaf changed that is neither target nor extra nor ignored; for a pattern that
        matches nothing, and for values that are not finite.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> before = {"kernel": jnp.eye(6), "bias": jnp.zeros(6)}
      >>> after = {"kernel": jnp.eye(6) + jnp.ones((6, 6)), "bias": jnp.ones(6)}
      >>> adapted = jlora.extract_lora(before, after, energy=0.99)
      >>> adapted.sites[0].rank, [extra.path for extra in adapted.extras]
      (1, ['bias'])
    """
    size = Size.parse(rank, energy, "extract_lora").required("extract_lora")
    before, after = tree.canonical(before), tree.canonical(after)
    if tree.is_abstract((before, after)):
        raise TypeError("extract_lora: a tree holds shapes (jax.ShapeDtypeStruct) and no arrays")
    given = check_same_leaves(before, after, "extract_lora", ("before", "after"))
    named, _ = tree.leaves(before)
    left_out = matching(named, ignore, "ignore")
    changed = {path for path, leaf in named.items() if path not in left_out and differ(leaf, given[path])}
    if not changed:
        raise ValueError("extract_lora: before and after have the same values: there is nothing to extract")
    by_path = {site.path: site for site in known_sites(before, named, sites)}
    kept = {path for path in matching(named, extras or (), "extras") & changed if is_trainable(named[path])}
    if targets is None:
        chosen = [site for site in by_path.values() if site.kind in ("linear", "conv")]
    else:
        known = tuple(by_path.values())
        chosen = select(known, targets, read_from_program=sites is not None, caller="extract_lora")
        _check_apart(chosen, kept)
    factored = {site.path: Target(site, 0, 0.0) for site in chosen if site.path in changed - kept}
    rest = [path for path in named if path in changed - kept - set(factored)]
    others = [by_path.get(path) or _unread(path, named[path]) for path in rest]
    if extras is None:
        kept |= {site.path for site in others if _is_small(site)}
    _check_none_is_lost([site for site in others if site.path not in kept])
    factors: dict[str, Arrays | None] = {
        path: {"value": jnp.asarray(tree.dense(given[path])).astype(jnp.float32)} for path in kept
    }
    for path, target in factored.items():
        update = difference(tree.dense(named[path]), tree.dense(given[path]), target)
        factors[path] = compress(update, target, size, "extract_lora")
    return plain_lora(before, factors, factored, {path: Extra(path) for path in kept})


def _unread(path: str, leaf: Any) -> Site:
    """The site of a leaf that `sites=` leave out."""
    return Site(path, tuple(jnp.shape(leaf)), str(getattr(leaf, "dtype", "object")), (), (), (), "other")


def _is_small(site: Site) -> bool:
    """Whether a leaf has no low-rank form and none is missed: a bias, a norm."""
    return site.kind == "other" and site.dtype.startswith(("float", "bfloat")) and not is_left_out(site, ())


def _check_apart(chosen: Sequence[Site], kept: Collection[str]) -> None:
    both = [site.path for site in chosen if site.path in kept]
    if both:
        raise ValueError(
            f"extract_lora: contradicting rules: {both[0]!r} is matched by targets= (factors) and by extras= (whole); "
            "keep one of them"
        )


def _check_none_is_lost(lost: Sequence[Site]) -> None:
    if lost:
        raise ValueError(
            f"extract_lora: {len(lost)} leaves changed and are neither targets nor extras: factor them with targets= "
            "(and sites=jlora.sites(fn, params, *args), if their names do not tell their axes), keep them whole with "
            f"extras=, or leave their change out with ignore=. Leaves: {listing(lost)}"
        )
