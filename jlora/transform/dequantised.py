"""Arithmetic on the arrays of stored weights (`tree.Stored`), of which autodiff keeps the codes, not the arrays."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jlora import tree

_ARRAY = "dequantised weight"
_policy = jax.checkpoint_policies.save_anything_except_these_names(_ARRAY)


def on_arrays(fn: Callable[..., Any], stored: Any, *others: Any) -> Any:
    """`fn(stored, *others)` with the arrays of the stored leaves of a tree. The backward pass dequantises them anew,
    and computes nothing else again.

    For what has no derivative of its own, as `product.frozen_product` has. It is differentiable in both modes.
    """
    if not any(map(tree.is_stored, jax.tree.leaves(stored, is_leaf=tree.is_stored))):
        return fn(stored, *others)

    def array(leaf: Any) -> Any:
        return checkpoint_name(leaf.dequantise(), _ARRAY) if tree.is_stored(leaf) else leaf

    def run(stored: Any, *others: Any) -> Any:
        return fn(jax.tree.map(array, stored, is_leaf=tree.is_stored), *others)

    return jax.checkpoint(run, policy=_policy)(stored, *others)
