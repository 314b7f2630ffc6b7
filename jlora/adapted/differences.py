"""How far two adapters of one base, or an adapter and a checkpoint, are apart."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.adapted.adapted import Adapted, check_adapted
from jlora.adapted.compress import Update, check_concrete, dense_of, is_whole, product, subtract, update_of
from jlora.methods.matrix import known, one_by_one
from jlora.transform.explicit import on_auto_axes
from jlora.transform.weight import Trained, Weight


def compression_error(exact: Any, compressed: Adapted) -> dict[str, float]:
    """Relative error of each weight's update: `|exact - compressed|_F / |exact - W0|_F`.

    0 is exact, 1 as far off as no adapter at all. It is measured on the two results, whatever made them: after a
    truncation to rank r it is `sqrt(sum of s_i^2 beyond r / sum of all s_i^2)`, s being the singular values of the
    exact update (Eckart and Young). Of two low-rank updates nothing of the weight's size is formed.

    Args:
      exact: an `Adapted` of the same base, such as what was compressed, or a tree of parameters, such as the fine-tuned
        checkpoint that a LoRA was extracted from.
      compressed: the adapter whose error is asked for.

    Returns:
      The error by path, for every leaf that either of the two changes; 0 where both change nothing, infinity where
      `compressed` changes what `exact` does not.

    Raises:
      ValueError: if the two are of different trees, or one of them acts on activations.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> before, after = {"kernel": jnp.zeros((2, 2))}, {"kernel": jnp.diag(jnp.array([4.0, 3.0]))}
      >>> small = jlora.extract_lora(before, after, rank=1)
      >>> {path: round(error, 6) for path, error in jlora.compression_error(after, small).items()}
      {'kernel': 0.6}
    """
    check_adapted(compressed, "compression_error, after the exact one,")
    check_concrete(compressed, "compression_error")
    base, _ = tree.leaves(compressed.base)
    if not isinstance(exact, Adapted):
        given = check_same_leaves(compressed.base, tree.canonical(exact), "compression_error")
        theirs = _merged(compressed, base)
        changed = [path for path, leaf in base.items() if path in theirs or differ(leaf, given[path])]
        return {path: _relative(given[path], theirs.get(path, base[path]), base[path]) for path in changed}
    check_concrete(exact, "compression_error")
    check_same_leaves(compressed.base, exact.base, "compression_error")
    mine, yours = ({site.path: site for site in x.sites} for x in (exact, compressed))
    extras = {extra.path for x in (exact, compressed) for extra in x.extras}
    dense = [_merged(x, base, extras) if extras else {} for x in (exact, compressed)]
    errors = {}
    for path, leaf in base.items():
        if path in extras:
            errors[path] = _relative(dense[0].get(path, leaf), dense[1].get(path, leaf), leaf)
        elif path in mine or path in yours:
            want = update_of(exact, tree.leaves(exact.base)[0], mine[path]) if path in mine else None
            got = update_of(compressed, base, yours[path]) if path in yours else None
            errors[path] = _ratio(_norm(want, got), _norm(want, None))
    return errors


def check_same_leaves(
    base: Any, other: Any, caller: str, names: tuple[str, str] = ("the first", "the second")
) -> dict[str, Any]:
    """The leaves of another tree by path, whose structure and shapes are those of the base.

    Raises:
      ValueError: that says what differs.
    """
    (mine, structure), (theirs, other_structure) = tree.leaves(base), tree.leaves(other)
    odd = [path for path in (*mine, *theirs) if (path in mine) != (path in theirs)]
    if odd:
        here, there = names if odd[0] in mine else names[::-1]
        raise ValueError(
            f"{caller}: two trees that differ in {len(odd)} leaves: {here} has {odd[0]!r}, {there} has not"
        )
    for path, leaf in mine.items():
        shapes = np.shape(tree.dense(leaf)), np.shape(tree.dense(theirs[path]))
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{caller}: two trees that differ: {path!r} has shape {shapes[0]} in {names[0]}, {shapes[1]} in "
                f"{names[1]}"
            )
    if structure != other_structure:
        raise ValueError(f"{caller}: two trees of the same leaves in other containers: {structure}, {other_structure}")
    return theirs


def differ(x: Any, y: Any) -> bool:
    """Whether two leaves, or what they are stored as, have other values. What is no array is not compared."""
    if x is y:
        return False
    if tree.is_stored(x) != tree.is_stored(y):
        x, y = tree.dense(x), tree.dense(y)
    pairs = list(zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=False))
    arrays = [(p, q) for p, q in pairs if _is_number(p) and _is_number(q)]
    return any(p is not q and known(on_auto_axes(_equal, jnp.asarray(p), jnp.asarray(q))) is False for p, q in arrays)


def _is_number(x: Any) -> bool:
    return hasattr(x, "dtype") and not jnp.issubdtype(x.dtype, jax.dtypes.extended)


@jax.jit
def _equal(x: jax.Array, y: jax.Array) -> jax.Array:
    if x.shape != y.shape:
        return jnp.asarray(False)
    if x.dtype != y.dtype:
        return jnp.all(subtract(x, y) == 0)
    return jnp.all((x == y) | ((x != x) & (y != y)))


def _merged(adapted: Adapted, base: Mapping[str, Any], paths: Collection[str] | None = None) -> dict[str, Any]:
    """The leaves that the adapter changes, as it changes them, before a rounding to the base's dtype."""
    full = adapted.replace(key=None)
    leaves, _ = tree.leaves(full.as_weights(), lambda leaf: isinstance(leaf, Weight | Trained))
    found = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Weight | Trained)}
    return {
        path: dense_of(leaf) if isinstance(leaf, Weight) else leaf.value
        for path, leaf in found.items()
        if paths is None or path in paths
    }


def _relative(exact: Any, compressed: Any, base: Any) -> float:
    return _ratio(*on_auto_axes(_norms, *(jnp.asarray(tree.dense(x)) for x in (exact, compressed, base))))


@jax.jit
def _norms(exact: jax.Array, compressed: jax.Array, base: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.linalg.norm(subtract(exact, compressed).ravel()), jnp.linalg.norm(subtract(exact, base).ravel())


def _ratio(error: Any, update: Any) -> float:
    error, update = float(error), float(update)
    return error / update if update > 0 else 0.0 if error == 0 else float("inf")


def _norm(exact: Update | None, compressed: Update | None) -> jax.Array:
    """`|exact - compressed|_F` over all stacked matrices: QR of the factors side by side, as in `ProductSVD`."""
    some = [(sign, update) for sign, update in ((1.0, exact), (-1.0, compressed)) if update is not None]
    return on_auto_axes(_side_by_side, some) if some else jnp.zeros(())


@jax.jit
def _side_by_side(updates: Sequence[tuple[float, Update]]) -> jax.Array:
    a = jnp.concatenate([update.a * sign for sign, update in updates], axis=2)
    b = jnp.concatenate([update.b for _, update in updates], axis=1)
    return jnp.linalg.norm(one_by_one(product_norm, a, b))


def product_norm(a: jax.Array, b: jax.Array) -> jax.Array:
    """`|a b|_F`. Not by Gram matrices: their difference has half the digits where two products nearly cancel."""
    if is_whole(a, b):
        return jnp.linalg.norm(product(a, b))
    return jnp.linalg.norm(product(jnp.linalg.qr(a, mode="r"), jnp.linalg.qr(b.T, mode="r").T))
