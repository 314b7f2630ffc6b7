"""Arithmetic on the arrays of stored weights (`tree.Stored`), of which autodiff keeps the codes, not the arrays."""

from collections.abc import Callable
from typing import Any

import jax

from jlora import tree


def on_arrays(fn: Callable[..., Any], stored: Any, *others: Any) -> Any:
    """`fn(stored, *others)` with the arrays of the stored leaves of a tree. The backward pass dequantises them anew.

    For what has no derivative of its own, as `product.frozen_product` has. It is differentiable in both modes. What of
    `fn` the backward pass reads is computed again, too: of a product nothing, of a function of the model's own with a
    derivative of its own (a loss that takes the head) its forward pass. (A policy that saves all but the arrays saves
    what they were made of one operation earlier.)
    """
    if not any(map(tree.is_stored, jax.tree.leaves(stored, is_leaf=tree.is_stored))):
        return fn(stored, *others)

    def run(stored: Any, *others: Any) -> Any:
        # No sooner than its input is there: XLA would dequantise all weights of an unrolled model at the beginning.
        stored, others = jax.lax.optimization_barrier((stored, others))
        return fn(jax.tree.map(tree.dense, stored, is_leaf=tree.is_stored), *others)

    return jax.checkpoint(run)(stored, *others)
