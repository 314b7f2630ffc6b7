"""The way back to plain parameters: `merge`, what it rounds away, and `unmerge`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.adapted.adapted import Adapted, check_adapted
from jlora.adapted.quantize import quantize_again
from jlora.methods import Method
from jlora.methods.acts import Factors
from jlora.methods.matrix import known
from jlora.quant.quantised import Quantised
from jlora.transform.weight import Trained, Weight


def merge(adapted: Adapted, *, requantize: bool = False) -> Any:
    """The plain tree with `W0 + (alpha/r) B A` (or the method's weight) in place of every adapted weight.

    Pure. The sum is taken in float32 and cast once to the base's dtype. Extras take their trained values. A quantised
    base is dequantised first, and what comes out are plain arrays.

    Args:
      adapted: from `apply` or `load`.
      requantize: what was quantised in the base is quantised again, in the same format and blocks: adapted weights
        after the sum, which costs what `merge_error(adapted, requantize=True)` says; the others keep their codes.

    Raises:
      ValueError: if the method acts on activations, so that no weights give the same function; or if a factor is not
        finite (not under `jit`, where values are not known); with `requantize` if nothing in the base is quantised.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> merged = jlora.merge(jlora.apply(params, rank=1))
      >>> bool((merged["kernel"] == params["kernel"]).all())
      True
    """
    check_adapted(adapted, "merge")
    _check_mergeable(adapted.method)
    if tree.is_abstract(adapted):
        raise TypeError(
            "merge: this adapter holds shapes (jax.ShapeDtypeStruct) and no arrays; the shapes of the merged tree are "
            "those of jax.eval_shape(jlora.merge, adapted)"
        )
    _check_finite(adapted.factors)
    weights, structure = tree.leaves(adapted.replace(key=None).as_weights(), _is_lazy)
    if requantize:
        base = _stored_base(adapted)
        merged = [_requantised(leaf, base.get(path), path) for path, leaf in weights.items()]
    else:
        merged = [_plain(leaf) for leaf in weights.values()]
    return jax.tree.unflatten(structure, merged)


def merge_error(adapted: Adapted, *, requantize: bool = False) -> dict[str, float]:
    """Share of each weight's update that `merge` rounds away in the base's dtype.

    `|merged - exact| / |exact - W0|` in the Frobenius norm, exact being the sum in float32; 0 where nothing is updated.
    Around 1, most of what was learned is gone: serve the factors apart, or merge into a float32 copy of the base.

    Args:
      adapted: from `apply` or `load`.
      requantize: what `merge(adapted, requantize=True)` loses. In 4 bits that is often more than was learned.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.apply({"kernel": jnp.ones((3, 2), jnp.bfloat16)}, rank=1)
      >>> jlora.merge_error(adapted)
      {'kernel': 0.0}
    """
    check_adapted(adapted, "merge_error")
    _check_mergeable(adapted.method)
    weights, _ = tree.leaves(adapted.replace(key=None).as_weights(), _is_lazy)
    named, _ = tree.leaves(adapted.base)
    like = _stored_base(adapted) if requantize else {}
    lost = {}
    for path in (site.path for site in adapted.sites):
        base = jnp.asarray(tree.dense(named[path]), jnp.float32)
        exact = weights[path].astype(jnp.float32).dense()
        update = jnp.linalg.norm(exact - base)
        merged = tree.dense(_requantised(weights[path], like.get(path), path))
        error = jnp.linalg.norm(merged.astype(jnp.float32) - exact)
        lost[path] = float(jnp.where(update > 0, error / jnp.where(update > 0, update, 1.0), 0.0))
    return lost


def unmerge(params: Any, adapted: Adapted, *, requantized: bool = False) -> Adapted:
    """Takes the factors out of merged parameters again, bit for bit.

    W0 + BA - BA is not W0 in floating point, so the base comes from `adapted`, after a check that `params` is what
    `merge(adapted)` gives, up to a few roundings (compiled, the sum is rounded in another order). Leaves that no factor
    belongs to come from `params`; of a quantised base they are its own codes, where `params` has what these stand for.

    Args:
      params: what `merge` gave.
      adapted: what it was given.
      requantized: that `merge` quantised again: compared with `merge(adapted, requantize=True)`.

    Raises:
      ValueError: if an adapted weight of `params` is not the merged one, or is quantised without `requantized`.
    """
    check_adapted(adapted, "unmerge")
    merged, structure = tree.leaves(merge(adapted, requantize=requantized))
    given, given_structure = tree.leaves(params)
    if structure != given_structure:
        raise ValueError("unmerge: the parameters have another tree structure than the adapter's base")
    base, _ = tree.leaves(adapted.base)
    quantised = [path for path in adapted.factors if path in given and tree.is_stored(given[path])]
    if quantised and not requantized:
        raise ValueError(
            f"unmerge: {quantised[0]!r} is quantised ({tree.stored_as(given[quantised[0]])}), and merge gives plain "
            "arrays: say requantized=True if it comes from merge(adapted, requantize=True), or dequantise it first"
        )
    for path in base:
        if path in adapted.factors and not _same(given[path], merged[path]):
            raise ValueError(f"unmerge: {path!r} is not the merged weight of this adapter")
        if path in adapted.factors or (tree.is_stored(base[path]) and _same(given[path], base[path])):
            given[path] = base[path]
    return adapted.replace(base=jax.tree.unflatten(structure, given.values()))


def _plain(leaf: Any) -> Any:
    return leaf.dense() if isinstance(leaf, Weight) else leaf.value if isinstance(leaf, Trained) else tree.dense(leaf)


def _is_lazy(leaf: Any) -> bool:
    return isinstance(leaf, Weight | Trained)


def _stored_base(adapted: Adapted) -> dict[str, Quantised]:
    """The quantised leaves of the base by path."""
    named, _ = tree.leaves(adapted.base)
    found = {path: leaf for path, leaf in named.items() if isinstance(leaf, Quantised)}
    if not found:
        raise ValueError("merge: requantize=True, and nothing in the base is quantised: leave it out")
    return found


def _requantised(leaf: Any, like: Quantised | None, path: str) -> Any:
    """A leaf as it is merged, in the form of the base's own; a leaf that nothing is done to is that of the base."""
    if like is None or tree.is_stored(leaf):
        return leaf if tree.is_stored(leaf) else _plain(leaf)
    wide = leaf.astype(jnp.float32).dense() if isinstance(leaf, Weight) else _plain(leaf)
    return dataclasses.replace(quantize_again(wide, like, path), dtype=like.dtype)


def _check_mergeable(method: Method) -> None:
    for part, _ in method.parts:
        if part.acts.unmergeable:
            raise ValueError(f"merge: {part.name} {part.acts.unmergeable}; run it as it is, with jlora.lift")


def _check_finite(factors: Factors) -> None:
    for path, arrays in factors.items():
        for name, value in arrays.items():
            if known(jnp.isfinite(value).all()) is False:
                raise ValueError(f"merge: factor {name!r} of {path!r} is not finite; the base is left as it is")


def _same(x: Any, y: Any) -> bool:
    """Whether two leaves agree up to a few roundings; of codes, which a rounding may turn to the next, nearly all."""
    share = 1e-3 if tree.is_stored(x) and tree.is_stored(y) else 0.0
    x, y = tree.dense(x), tree.dense(y)
    if jnp.shape(x) != jnp.shape(y) or x.dtype != y.dtype:
        return False
    few = 4 * float(jnp.finfo(y.dtype).eps)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return bool(np.sum(np.abs(x - y) > few * np.max(np.abs(y), initial=0.0)) <= share * y.size)
