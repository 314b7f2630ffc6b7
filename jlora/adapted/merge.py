"""The way back to plain parameters: `merge`, what it rounds away, and `unmerge`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.adapted.adapted import Adapted, check_adapted
from jlora.methods import Method
from jlora.methods.acts import Factors
from jlora.methods.matrix import known
from jlora.transform.weight import Trained, Weight


def merge(adapted: Adapted) -> Any:
    """The plain tree with `W0 + (alpha/r) B A` (or the method's weight) in place of every adapted weight.

    Pure. The sum is taken in float32 and cast once to the base's dtype. Extras take their trained values.

    Raises:
      ValueError: if the method acts on activations, so that no weights give the same function; or if a factor is not
        finite (not under `jit`, where values are not known).

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
    return jax.tree.map(
        _plain,
        adapted.replace(key=None).as_weights(),
        is_leaf=lambda leaf: isinstance(leaf, Weight | Trained) or tree.is_stored(leaf),
    )


def merge_error(adapted: Adapted) -> dict[str, float]:
    """Share of each weight's update that `merge` rounds away in the base's dtype.

    `|merged - exact| / |exact - W0|` in the Frobenius norm, exact being the sum in float32; 0 where nothing is updated.
    Around 1, most of what was learned is gone: serve the factors apart, or merge into a float32 copy of the base.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.apply({"kernel": jnp.ones((3, 2), jnp.bfloat16)}, rank=1)
      >>> jlora.merge_error(adapted)
      {'kernel': 0.0}
    """
    check_adapted(adapted, "merge_error")
    _check_mergeable(adapted.method)
    weights, _ = tree.leaves(adapted.replace(key=None).as_weights(), lambda leaf: isinstance(leaf, Weight | Trained))
    named, _ = tree.leaves(adapted.base)
    lost = {}
    for path in (site.path for site in adapted.sites):
        base = jnp.asarray(tree.dense(named[path]), jnp.float32)
        exact = weights[path].astype(jnp.float32).dense()
        update = jnp.linalg.norm(exact - base)
        error = jnp.linalg.norm(weights[path].dense().astype(jnp.float32) - exact)
        lost[path] = float(jnp.where(update > 0, error / jnp.where(update > 0, update, 1.0), 0.0))
    return lost


def unmerge(params: Any, adapted: Adapted) -> Adapted:
    """Takes the factors out of merged parameters again, bit for bit.

    W0 + BA - BA is not W0 in floating point, so the base comes from `adapted`, after a check that `params` is what
    `merge(adapted)` gives, up to a few roundings (compiled, the sum is rounded in another order). Leaves that no factor
    belongs to come from `params`.

    Raises:
      ValueError: if an adapted weight of `params` is not the merged one.
    """
    check_adapted(adapted, "unmerge")
    merged, structure = tree.leaves(merge(adapted))
    given, given_structure = tree.leaves(params)
    if structure != given_structure:
        raise ValueError("unmerge: the parameters have another tree structure than the adapter's base")
    base, _ = tree.leaves(adapted.base)
    for path in adapted.factors:
        if not _same(given[path], merged[path]):
            raise ValueError(f"unmerge: {path!r} is not the merged weight of this adapter")
        given[path] = base[path]
    return adapted.replace(base=jax.tree.unflatten(structure, given.values()))


def _plain(leaf: Any) -> Any:
    return leaf.dense() if isinstance(leaf, Weight) else leaf.value if isinstance(leaf, Trained) else tree.dense(leaf)


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
    if jnp.shape(x) != jnp.shape(y) or x.dtype != y.dtype:
        return False
    few = 4 * float(jnp.finfo(y.dtype).eps)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return bool(np.all(np.abs(x - y) <= few * np.max(np.abs(y), initial=0.0)))
