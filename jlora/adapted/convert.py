"""One adapter as another: scaled, as plain LoRA, with fewer ranks, without the network that made a prefix."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.adapted.adapted import Adapted, check_adapted, from_arrays, initial_extra
from jlora.adapted.compress import (
    Size,
    Update,
    check_concrete,
    compress,
    difference,
    is_product,
    plain_lora,
    update_of,
    value_on,
    weight_of,
)
from jlora.adapted.select import check_axes_known, known_sites
from jlora.methods import lora
from jlora.methods.acts import Arrays, Factors
from jlora.methods.checks import check_number, check_rank
from jlora.transform.sites import Site, Target


def to_lora(
    adapted: Adapted,
    rank: int | None = None,
    energy: float | None = None,
    *,
    sites: Iterable[Site | Target] | None = None,
) -> Adapted:
    """The same function as a plain LoRA, or, at a given rank or energy, the closest one to any method that merges.

    Without `rank` and `energy` it is exact: `W + A B` with the scale, and all that the method trains, folded into A and
    B. PiSSA, OLoRA, CorDA and LoRA-GA double their rank, on the base as it was (`[A, -A0]` and `[B, B0]`); AdaLoRA
    drops the triplets that did not survive; VeRA and LoHa are written out. Ranks whose column of A or row of B is zero
    are dropped, and weights without any left are no longer adapted.

    With one of them each weight's update is `A B = U_r S_r V_r^T`, S being the singular values of `merged - base`: of
    DoRA, (IA)^3 and OFT, too, and of the linear layers and convolutions that `full` or `top_layers` trains (their other
    leaves, and all `extras=` of `apply`, stay as they are). `jlora.compression_error(adapted, plain)` has the error.

    Args:
      adapted: with concrete factors.
      rank: the most that a weight gets; those whose update has a lower rank get that.
      energy: the share of each update's squared Frobenius norm that is kept at least, above 0 and at most 1: the error
        is at most `sqrt(1 - energy)`. With `rank=`, too, the smaller of both.
      sites: the axes of leaves that the method trains as they are, as in `apply`.

    Raises:
      ValueError: without rank and energy if a weight is not the base plus a low-rank product (DoRA's and (IA)^3's
        gains, OFT's rotation); for a method on activations, for a rank or an energy out of its range, and for factors
        that are not finite.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.apply({"kernel": jnp.eye(6)}, method=jlora.pissa(2))
      >>> jlora.to_lora(adapted).sites[0].rank
      4
      >>> adapted = jlora.apply({"kernel": jnp.eye(6)}, method=jlora.ia3())
      >>> trained = jlora.combine({"kernel": {"scale": jnp.array([[1.0, 3, 1, 0, 1, 1]])}}, adapted)
      >>> plain = jlora.to_lora(trained, rank=1)
      >>> {path: round(error, 4) for path, error in jlora.compression_error(trained, plain).items()}
      {'kernel': 0.4472}
    """
    check_adapted(adapted, "to_lora")
    for method, _ in adapted.method.parts:
        if method.acts.unmergeable:
            raise ValueError(f"to_lora: {method.name} acts on activations and is no product that is added to a weight")
    size = Size.parse(rank, energy, "to_lora")
    if size != Size():
        return _approximated(adapted, size, sites)
    if sites is not None:
        raise ValueError("to_lora: sites= are for rank= or energy=: without them it is exact, and leaves stay leaves")
    named, _ = tree.leaves(adapted.base)
    factors: Factors = {e.path: adapted.factors[e.path] for e in adapted.extras}
    chosen = []
    weights = adapted.method.acts.weights(named, adapted.sites, adapted.factors, adapted.buffers)
    for site in adapted.sites:
        w, weight = named[site.path], weights[site.path]
        if not is_product(weight, w):
            raise ValueError(
                f"to_lora: {adapted.method.of(site).name} is not W plus a low-rank product at {site.path!r}; with "
                "rank= or energy= it is approximated by one"
            )
        assert weight.a is not None and weight.b is not None
        axes = tuple(range(len(site.shape)))
        alive = np.asarray(jnp.any(weight.a != 0, axis=axes) & jnp.any(weight.b != 0, axis=axes))
        if not alive.any():
            continue
        factors[site.path] = {"A": weight.a[..., alive], "B": weight.b[..., alive]}
        left = int(alive.sum())
        chosen.append(dataclasses.replace(site, rank=left, alpha=float(left), part=0))
    method = lora(max((site.rank for site in chosen), default=1))
    return from_arrays(adapted.base, factors, method, tuple(chosen), adapted.extras)


def _approximated(adapted: Adapted, size: Size, sites: Iterable[Site | Target] | None) -> Adapted:
    """`to_lora` within `size`: of the adapted weights, and of the leaves that the method itself trains as they are."""
    check_concrete(adapted, "to_lora")
    named, _ = tree.leaves(adapted.base)
    known = known_sites(adapted.base, named, sites)
    own = adapted.method.acts.trained(named, known)
    whole = {extra.path: extra for extra in adapted.extras if own.get(extra.path, ()) == extra.rows}
    if sites is None:
        check_axes_known(known, whole, "to_lora")
    updates = {}
    for site in (site for site in known if site.path in whole and site.kind in ("linear", "conv")):
        value = value_on(named[site.path], whole[site.path], adapted.factors[site.path])
        target = Target(site, 0, 0.0)
        updates[site.path] = target, difference(tree.dense(named[site.path]), value, target)
    return _within(adapted, size, "to_lora", updates)


def _within(
    adapted: Adapted, size: Size, caller: str, leaves: Mapping[str, tuple[Target, Update]] | None = None
) -> Adapted:
    """A plain LoRA of the adapted weights, and of the updates of `leaves`; the other extras as they are."""
    named, _ = tree.leaves(adapted.base)
    updates = dict(leaves or {})
    extras = {extra.path: extra for extra in adapted.extras if extra.path not in updates}
    factors: dict[str, Arrays | None] = {path: adapted.factors[path] for path in extras}
    for site in adapted.sites:
        factors[site.path] = compress(update_of(adapted, named, site), site, size, caller)
    factors |= {path: compress(update, target, size, caller) for path, (target, update) in updates.items()}
    targets = {site.path: site for site in adapted.sites} | {path: target for path, (target, _) in updates.items()}
    return plain_lora(adapted.base, factors, targets, extras)


def reduce_rank(adapted: Adapted, rank: int | None = None, energy: float | None = None) -> Adapted:
    """The closest plain LoRA of a lower rank: `A B = U_r S_r V_r^T`, S being the singular values of the update.

    By a QR decomposition of A and of B^T and the SVD of the r x r product of their triangles: nothing of the weight's
    size is formed. The error is that of the best approximation, and `jlora.compression_error(adapted, reduced)` has it.
    The columns of a LoRA are in no order: to cut them off, as `truncate` does for DyLoRA, is not this.

    Args:
      adapted: of a method whose weight is the base plus a product: LoRA, rsLoRA, PiSSA, VeRA, ...
      rank: the most that a weight gets; those whose update has a lower rank get that.
      energy: the share of each update's squared Frobenius norm that is kept at least, above 0 and at most 1.

    Returns:
      A plain LoRA of scale 1. Extras stay as they are.

    Raises:
      ValueError: without a rank or an energy, or if one is out of its range; for a method whose weight is no such sum
        (`to_lora` with a rank takes it), and for factors that are not finite.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.apply({"kernel": jnp.zeros((9, 8))}, rank=6)
      >>> trained = adapted.replace(factors={"kernel": {"A": jnp.ones((9, 1, 6)), "B": jnp.ones((1, 8, 6))}})
      >>> reduced = jlora.reduce_rank(trained, energy=0.99)
      >>> reduced.sites[0].rank, jlora.compression_error(trained, reduced)["kernel"] < 1e-6
      (1, True)
    """
    check_adapted(adapted, "reduce_rank")
    size = Size.parse(rank, energy, "reduce_rank").required("reduce_rank")
    check_concrete(adapted, "reduce_rank")
    named, _ = tree.leaves(adapted.base)
    for site in adapted.sites:
        if not is_product(weight_of(adapted, named, site), named[site.path]):
            raise ValueError(
                f"reduce_rank: {adapted.method.of(site).name} is not W plus a low-rank product at {site.path!r}; "
                "jlora.to_lora(adapted, rank=, energy=) approximates the merged weight"
            )
    return _within(adapted, size, "reduce_rank")


def scale(adapted: Adapted, s: float | jax.Array) -> Adapted:
    """The adapter whose update of every weight is s times as large: `W0 + s (W - W0)`, W being the merged weight.

    `scale(adapted, 0)` merges to the base, `scale(adapted, 1)` is `adapted`. The factor that the update is linear in
    takes s: no alpha changes, so nothing is compiled anew for another s. PiSSA, OLoRA, CorDA and LoRA-GA, whose start
    is taken out of W, have their alpha multiplied. Extras go the same way from the base's values to the trained ones.

    Args:
      adapted: any whose update can be multiplied.
      s: dimensionless; a number, or a real array () that may be traced (not for the four that start from W).

    Raises:
      ValueError: for DoRA and OFT, whose weights are no base plus an update in that form, and for methods on
        activations; if s is no finite number, or negative for one of the four.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.apply({"kernel": jnp.ones((1, 1))}, rank=1)
      >>> trained = adapted.replace(factors={"kernel": {"A": jnp.ones((1, 1, 1)), "B": jnp.ones((1, 1, 1))}})
      >>> [float(jlora.merge(jlora.scale(trained, s))["kernel"][0, 0]) for s in (0, 0.5, 1)]
      [1.0, 1.5, 2.0]
    """
    check_adapted(adapted, "scale")
    method = adapted.method
    s = check_number(s, "scale: s") if not isinstance(s, jax.Array) else s.astype(jnp.float32)
    if jnp.ndim(s) != 0:
        raise ValueError(f"scale: s is one number for all weights, not an array of shape {jnp.shape(s)}")
    named, _ = tree.leaves(adapted.base)
    factors, sites = dict(adapted.factors), []
    for site in adapted.sites:
        buffers = adapted.buffers.get(site.path, {})
        changed, arrays = method.acts.rescaled(method, site, factors[site.path], buffers, s)
        sites.append(changed)
        factors[site.path] = arrays
    for extra in adapted.extras:
        start = initial_extra(named[extra.path], extra)
        factors[extra.path] = {name: x * s + start[name] * (1 - s) for name, x in factors[extra.path].items()}
    return adapted.replace(factors=factors, sites=tuple(sites))


def bake_prompt(adapted: Adapted) -> Adapted:
    """The same function without the network that makes a prefix or a prompt: what is kept after training.

    `prefix_tuning(hidden=)` becomes `prefix_tuning`, `p_tuning` becomes `prompt_tuning`.

    Raises:
      ValueError: if the method has no such network.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"wte": {"embedding": jnp.ones((9, 4))}}
      >>> plain = jlora.bake_prompt(jlora.apply(params, method=jlora.p_tuning(3, hidden=8)))
      >>> plain.method.name, plain.factors["wte/embedding"]["prompt"].shape
      ('prompt_tuning', (3, 4))
    """
    check_adapted(adapted, "bake_prompt")
    method, factors = adapted.method.acts.baked(adapted.method, adapted.sites, adapted.factors)
    if method == adapted.method:
        raise ValueError(f"bake_prompt: {method!r} has no network that makes its factors")
    factors |= {e.path: adapted.factors[e.path] for e in adapted.extras}
    return from_arrays(adapted.base, factors, method, adapted.sites, adapted.extras)


def truncate(adapted: Adapted, rank: int) -> Adapted:
    """The first ranks of a DyLoRA as a plain LoRA, `W + alpha / b * A[:, :b] B[:b]`.

    Args:
      adapted: trained with `jlora.dylora`.
      rank: b; weights of a smaller rank keep theirs.

    Raises:
      ValueError: if the method is another (the columns of a plain LoRA are in no order), or for a rank below 1.
    """
    check_adapted(adapted, "truncate")
    rank = check_rank(rank)
    if adapted.method.name != "dylora":
        raise ValueError(f"truncate: the first ranks are worth most with dylora alone, not with {adapted.method.name}")
    sites = tuple(dataclasses.replace(site, rank=min(rank, site.rank)) for site in adapted.sites)
    factors = adapted.factors | {site.path: _first(adapted.factors[site.path], site) for site in sites}
    return from_arrays(adapted.base, factors, lora(rank, adapted.method.alpha), sites, adapted.extras)


def _first(arrays: Arrays, site: Target) -> Arrays:
    return jax.tree.map(lambda x: x[..., : site.rank], arrays)
