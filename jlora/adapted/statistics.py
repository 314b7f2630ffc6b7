"""Statistics for the data-driven methods: sums over batches of a weight's inputs, or of the loss's gradient."""

import functools
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.adapted.select import Pattern, known_sites, select
from jlora.methods.matrix import a_form, a_matrix, matrices, sizes, without_stack
from jlora.transform.explicit import on_auto_axes
from jlora.transform.lift import run
from jlora.transform.product import OBSERVED, probe
from jlora.transform.sites import Site
from jlora.transform.trace import Trace
from jlora.transform.weight import Place, Weight

Mask = Callable[[Any], jax.Array]
STATISTICS = ("covariance", "gradient")


def measure(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    sites: Iterable[Site] | None,
    statistic: str,
    *,
    targets: Pattern | None = None,
    mask: Mask | None = None,
) -> dict[str, jax.Array]:
    """Means over batches of what a program shows of its weights: what eva, corda (covariance) and lora_ga start from.

    Covariances count the inputs x that matter to the result of `fn`: those for which what the weight makes of x has a
    cotangent that is not zero. Padding that the loss leaves out, and that no attention sees, is not counted. A weight
    all of whose inputs have no effect on the result of the first batch (behind weights that start at zero) counts every
    one of them; with `mask` it is an error, since which of its inputs belong to the positions that matter is not known.
    Progress is shown on a terminal.

    Args:
      fn: (params, batch) -> a scalar loss for gradients, anything for covariances.
      params: the tree.
      batches: at least one.
      sites: as in `apply`.
      statistic: "covariance", the sum of x x^T over the inputs x of each weight: (stack, inputs, inputs); or
        "gradient", that of the loss with respect to it: (stack, inputs, outputs). Both float32.
        `method.acts.statistic` says which of them a method needs, "" for neither.
      targets: as in `apply`; for covariances each of them is used in products of rows with a matrix ("linear").
      mask: of covariances, where `fn` returns logits or hidden states: batch -> which of their positions are real,
        (batch, length) or any other leading axes. An input of a weight is counted if a real position depends on it. A
        loss leaves padding out by itself.

    Returns:
      {path: matrices} for `apply(statistics=)`. Of `together`, each method's targets are measured for it: `a | b`.

    Raises:
      ValueError: if there is no batch, if `fn` does not take one, if the loss is no scalar, if a weight is no linear
        layer or is not reached, if the mask is none of `fn`'s result or nothing of a weight that it keeps matters, or
        if a sum is not finite.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params, method = {"kernel": jnp.ones((3, 2))}, jlora.eva(1)
      >>> fn, batches = lambda params, x: x @ params["kernel"], [jnp.array([[1.0, 0.0, 2.0]])]
      >>> sites = jlora.sites(fn, params, batches[0])
      >>> statistics = jlora.measure(fn, params, batches, sites, method.acts.statistic)
      >>> statistics["kernel"].tolist()
      [[[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 4.0]]]
      >>> jlora.apply(params, method=method, sites=sites, statistics=statistics).sites[0].rank
      1
    """
    if statistic not in STATISTICS:
        raise ValueError(f"measure: statistic is one of {', '.join(map(repr, STATISTICS))}, not {statistic!r}")
    if hasattr(batches, "shape") or isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        one_of = (
            "an array" if hasattr(batches, "shape") else "a dict" if isinstance(batches, Mapping) else repr(batches)
        )
        raise ValueError(f"measure: batches= is a sequence of batches, not {one_of}: [batch] for one")
    if tree.is_abstract(params):
        raise TypeError("measure: the parameters hold shapes (jax.ShapeDtypeStruct), of which nothing can be computed")
    params = tree.canonical(params)
    known = known_sites(params, tree.leaves(params)[0], sites)
    chosen = select(known, targets, read_from_program=sites is not None, caller="measure")
    if statistic == "covariance":
        _check_linear(chosen)
    elif mask is not None:
        raise ValueError("measure: the gradient is that of a loss, which masks by itself: leave mask= out")
    return _means(statistic, fn, params, batches, chosen, mask)


def shape_of(statistic: str, site: Site) -> tuple[int, int, int]:
    """The shape of a weight's statistic."""
    stack, inputs, outputs = sizes(site)
    return stack, inputs, inputs if statistic == "covariance" else outputs


def _check_linear(sites: Sequence[Site]) -> None:
    odd = [site.path for site in sites if site.kind != "linear"]
    if odd:
        raise ValueError(f"measure: {odd[0]!r} is no linear layer; leave it out with targets=")
    built = next((site for site in sites if site.materialised), None)
    if built is not None:
        raise ValueError(
            f"measure: {built.path!r} is materialised by `{built.materialised}` before it meets its inputs, which "
            "are seen where factors meet them; leave it out with targets="
        )


def _means(
    kind: str, fn: Callable[..., Any], params: Any, batches: Iterable[Any], sites: Sequence[Site], mask: Mask | None
) -> dict[str, jax.Array]:
    of_rows = lambda hidden: _compiled(_covariances(fn, sites, mask, hidden), params)
    of_batch = of_rows(frozenset()) if kind == "covariance" else _compiled(_gradients(fn, sites), params)
    total: dict[str, jax.Array] | None = None
    count = 0
    for batch in _shown(batches):
        try:
            part = of_batch(batch)
            if count == 0 and kind == "covariance" and mask is None and (hidden := _zero(part)):
                of_batch = of_rows(hidden)
                part = of_batch(batch)
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise ValueError(f"measure: fn(params, batch) fails on batch {count}: {error}") from error
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        count += 1
    if total is None:
        raise ValueError("measure: batches= is empty")
    for path, value in total.items():
        if not bool(jnp.isfinite(value).all()):
            raise ValueError(f"measure: the {kind} of {path!r} is not finite")
    for path in sorted(_zero(total)):
        if mask is not None:
            raise ValueError(
                f"measure: no input of {path!r} matters to what mask= keeps of fn's result: it keeps nothing in any "
                "batch, or weights that are zero stand between the two; return the hidden states before these weights, "
                "or cut padding off the batches and leave mask= out"
            )
        raise ValueError(f"measure: no {kind} reaches {path!r}: fn's result does not depend on it")
    return {path: value / count for path, value in total.items()}


def _compiled(fn: Callable[[Any, Any], Any], params: Any) -> Callable[[Any], Any]:
    """`fn(params, batch)`, compiled, as a function of the batch. Leaves that are no arrays (functions) are static."""
    arrays, fill = tree.split(params)
    return functools.partial(jax.jit(lambda arrays, batch: fn(fill(arrays), batch)), arrays)


def _zero(sums: dict[str, jax.Array]) -> frozenset[str]:
    return frozenset(path for path, value in sums.items() if not bool(jnp.any(value != 0)))


def _covariances(
    fn: Callable[..., Any], sites: Sequence[Site], mask: Mask | None, hidden: Collection[str]
) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """The sums of one batch, over every input of the `hidden` weights, and over those of the others that matter."""

    def of_totals(totals: dict[str, jax.Array], params: Any, batch: Any) -> jax.Array:
        named, structure = tree.leaves(params)
        weights = {
            site.path: _observed(named[site.path], site, totals[site.path], site.path in hidden) for site in sites
        }
        result = run(fn, (jax.tree.unflatten(structure, (named | weights).values()), batch), {}, Trace())
        leaves = jax.tree.leaves(result)
        floating = [x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
        if not floating:
            kinds = ", ".join(sorted({str(jnp.result_type(x)) for x in leaves})) or "nothing"
            raise ValueError(f"fn returns {kinds}, no floating-point array that depends on the weights")
        kept = None if mask is None else jnp.asarray(mask(batch))
        return sum((_probed(x, kept) for x in floating), jnp.float32(0))

    def covariances(params: Any, batch: Any) -> dict[str, jax.Array]:
        zeros = {}
        for site in sites:
            stack, inputs, _ = sizes(site)
            zeros[site.path] = a_form(jnp.zeros((stack, inputs, inputs), jnp.float32), site)
        totals = jax.grad(of_totals)(zeros, params, batch)
        return {site.path: a_matrix(totals[site.path], site) for site in sites}

    return covariances


def _probed(x: jax.Array, kept: jax.Array | None) -> jax.Array:
    """A number that depends on every element of `fn`'s result that matters.

    Not their plain sum: the outputs of a softmax or of a layer norm add up to a constant.
    """
    x = x.astype(jnp.float32) * probe(x.shape)
    if kept is None:
        return jnp.sum(x)
    if not kept.ndim or kept.shape != x.shape[: kept.ndim]:
        raise ValueError(
            f"mask= gives an array of shape {kept.shape}, which are no leading axes of fn's result of shape {x.shape}: "
            "return logits or hidden states; a loss leaves padding out by itself"
        )
    return jnp.sum(jnp.where(kept.astype(bool).reshape(kept.shape + (1,) * (x.ndim - kept.ndim)), x, 0))


def _observed(w: Any, site: Site, total: jax.Array, every_row: bool) -> Weight:
    one = a_form(jnp.eye(sizes(site)[1], dtype=jnp.float32)[None], without_stack(site))
    place = Place(site.path, tuple((i,) for i in range(len(site.shape))))
    return Weight(w, total, one, place=place, multiply=OBSERVED[every_row])


def _gradients(fn: Callable[..., Any], sites: Sequence[Site]) -> Callable[[Any, Any], dict[str, jax.Array]]:
    def gradients(params: Any, batch: Any) -> dict[str, jax.Array]:
        named, structure = tree.leaves(params)

        def loss(weights: dict[str, jax.Array]) -> jax.Array:
            filled = jax.tree.unflatten(structure, (named | weights).values())
            value = jnp.asarray(run(fn, (filled, batch), {}, Trace()))  # stored leaves that are no targets stay stored
            if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
                raise ValueError(f"fn is a loss and returns a real scalar, got {value.dtype} of shape {value.shape}")
            return value

        found = jax.grad(loss)({site.path: tree.dense(named[site.path]) for site in sites})
        as_matrices = lambda g, site: on_auto_axes(lambda g: matrices(g.astype(jnp.float32), site), g)
        return {site.path: as_matrices(found[site.path], site) for site in sites}

    return gradients


def _shown(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, with a line of progress where a person is watching."""
    started = time.monotonic()
    known = f" of {len(batches)}" if isinstance(batches, Sized) else ""
    watched = sys.stderr.isatty()
    done = 0
    for done, batch in enumerate(batches, 1):
        if watched:
            print(f"\rmeasure: batch {done}{known}, {time.monotonic() - started:.0f} s", end="", file=sys.stderr)
        yield batch
    if watched and done:
        print(file=sys.stderr)
