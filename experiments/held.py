"""The base as a run holds it: as it is, or with its linear weights in 4, 8 or 16 bits."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from experiments.config import Held
from experiments.tasks.task import Params
from jlora import tree
from jlora.quant.choice import is_head


def chosen(sites: Sequence[jlora.Site], kept: str = "") -> frozenset[str]:
    """Paths of the linear weights, but for heads, tables that are heads too, and leaves that fit the pattern `kept`."""
    linear = [site for site in sites if site.kind == "linear" and "gather" not in site.uses]
    return frozenset(
        site.path for site in linear if not is_head(site.path) and not (kept and re.search(kept, site.path))
    )


def while_loading(held: Held, kept: str = "") -> dict[str, Any]:
    """Arguments of `jlora.models.load` that hold a checkpoint so from the file on: its 16 bits are never in memory."""
    wanted = lambda path, like: None if is_head(path) or (kept and re.search(kept, path)) else held.quantize
    return {"quantize": wanted, "block": held.block, "double": held.double}


def hold(params: Params, held: Held, sites: Sequence[jlora.Site], kept: str = "") -> Params:
    """The parameters with their linear weights in few bits.

    Args:
      params: the base, arrays or shapes.
      held: how.
      sites: of the task's loss.
      kept: pattern of leaves that stay as they are.

    Raises:
      ValueError: if nothing is linear, or a block or a format do not fit.
    """
    if held.plain:
        return params
    paths = chosen(sites, kept)
    if not paths:
        raise ValueError(f"base.quantize={held.quantize}: there is no linear weight but heads")
    if held.quantize != "bf16":
        return jlora.quantize(
            params, str(held.quantize), block=held.block, double=held.double,
            targets=lambda site: site.path in paths, sites=sites,
        )  # fmt: skip
    named, structure = tree.leaves(params)
    leaves = [_cast(leaf) if path in paths else leaf for path, leaf in named.items()]
    return jax.tree.unflatten(structure, leaves)


def hold_adapted(adapted: jlora.Adapted, held: Held, sites: Sequence[jlora.Site], kept: str = "") -> jlora.Adapted:
    """The same of a base with factors whose start is less what they start from: LoftQ, QPiSSA."""
    paths = chosen(sites, kept)
    targets = lambda site: site.path in paths
    how: Any = {"block": held.block, "double": held.double, "targets": targets, "sites": sites}
    if held.loftq is not None:
        return jlora.loftq(adapted, str(held.quantize), iterations=held.loftq, **how)
    return jlora.quantize(adapted, str(held.quantize), **how)


def _cast(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    return leaf.astype(jnp.bfloat16)


def in_bits(params: Params, sites: Sequence[jlora.Site], kept: str = "") -> tuple[int, float]:
    """Parameters that are held in few bits, and bits of each, scales and all."""
    named = tree.leaves(params)[0]
    leaves = [named[path] for path in chosen(sites, kept)]
    number = sum(leaf.size for leaf in leaves)
    return number, 8 * sum(leaf.nbytes for leaf in leaves) / number
