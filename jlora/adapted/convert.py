"""One adapter as another: scaled, as plain LoRA, with fewer ranks, without the network that made a prefix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.adapted.adapted import Adapted, check_adapted, from_arrays, initial_extra
from jlora.methods import lora
from jlora.methods.acts import Arrays, Factors
from jlora.methods.checks import check_number, check_rank
from jlora.transform.sites import Target


def to_lora(adapted: Adapted) -> Adapted:
    """The same function as a plain LoRA: `W + A B` with the scale, and all that the method trains, folded into A and B.

    PiSSA, OLoRA, CorDA and LoRA-GA double their rank, on the base as it was (`[A, -A0]` and `[B, B0]`); AdaLoRA drops
    the triplets that did not survive; VeRA and LoHa are written out. Ranks whose column of A or row of B is zero are
    dropped, and weights without any left are no longer adapted.

    Args:
      adapted: with concrete factors.

    Raises:
      ValueError: if a weight is not the base plus a low-rank product (DoRA's and (IA)^3's gains, OFT's rotation).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.apply({"kernel": jnp.eye(6)}, method=jlora.pissa(2))
      >>> jlora.to_lora(adapted).sites[0].rank
      4
    """
    check_adapted(adapted, "to_lora")
    for method, _ in adapted.method.parts:
        if method.acts.unmergeable:
            raise ValueError(f"to_lora: {method.name} acts on activations and is no product that is added to a weight")
    named, _ = tree.leaves(adapted.base)
    factors: Factors = {e.path: adapted.factors[e.path] for e in adapted.extras}
    chosen = []
    weights = adapted.method.acts.weights(named, adapted.sites, adapted.factors, adapted.buffers)
    for site in adapted.sites:
        w, weight = named[site.path], weights[site.path]
        if weight.gain is not None or weight.w is not w:
            raise ValueError(
                f"to_lora: {adapted.method.of(site).name} is not W plus a low-rank product at {site.path!r}"
            )
        assert weight.a is not None and weight.b is not None
        axes = tuple(range(len(site.shape)))
        alive = np.asarray(jnp.any(weight.a != 0, axis=axes) & jnp.any(weight.b != 0, axis=axes))
        if not alive.any():
            continue
        factors[site.path] = {"A": weight.a[..., alive], "B": weight.b[..., alive]}
        rank = int(alive.sum())
        chosen.append(dataclasses.replace(site, rank=rank, alpha=float(rank), part=0))
    method = lora(max((site.rank for site in chosen), default=1))
    return from_arrays(adapted.base, factors, method, tuple(chosen), adapted.extras)


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
