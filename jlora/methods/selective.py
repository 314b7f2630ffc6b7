"""Methods that train leaves as they are: full fine-tuning, BitFit, norm tuning, the top layers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jlora.methods.acts import OnLeaves, Rows
from jlora.methods.checks import check_pattern, check_rank
from jlora.methods.method import Config, Method
from jlora.transform.sites import Site

BIAS = r"(^|[/.])(\w+_)?(bias|b)$"
NORM = r"(?i)(^|[/.])[^/.]*(norm|ln|scale_)[^/.]*[/.](scale|bias|weight|offset|gamma|beta)$"
LAYER = r"(?:^|[/.])(?:layers?|h|blocks?|encoderblock|resblocks?)[_/.]?(\d+)(?=[/.])"


def full() -> Method:
    """Full fine-tuning: every floating-point leaf is trained, in float32."""
    return _selective((("name", "full"),), lambda named, sites: dict.fromkeys(_trainable(named)))


def bitfit(pattern: str = BIAS) -> Method:
    """BitFit: the biases are trained, and nothing else.

    Args:
      pattern: searched in the path of every leaf: a last part `bias` or `b`, as in Flax, Equinox and Haiku.

    Raises (in `apply`):
      ValueError: if no leaf fits.

    Source: Ben Zaken et al., "BitFit", arXiv 2106.10199.
    """
    return _matching("bitfit", pattern)


def norms(pattern: str = NORM) -> Method:
    """Norm tuning: the scales and offsets of normalisation layers are trained, and nothing else.

    Args:
      pattern: searched in the path of every leaf: a scale, bias, weight, offset, gamma or beta in a module whose name
        has `norm` or `ln`.

    Raises (in `apply`):
      ValueError: if no leaf fits.

    Source: Zhao et al., "Tuning LayerNorm in Attention", arXiv 2312.11420.
    """
    return _matching("norms", pattern)


def top_layers(count: int, pattern: str = LAYER) -> Method:
    """The last layers are trained, wholly, and nothing else.

    Layers are told apart by the number in their paths (`h_11/`, `layers/3/`); where the program scans over layers, by
    the stack axis of `sites`, if that is the leaf's first.

    Args:
      count: how many.
      pattern: searched in the path of every leaf; its first group is the layer's number.

    Raises:
      ValueError: if `count` is no integer of at least 1; in `apply` if no layers are found, or fewer than `count`.

    Source: the "FT-Top2" baseline of Hu et al., arXiv 2106.09685, table 3.
    """
    count = check_rank(count, "count")
    pattern = check_pattern(pattern)
    if re.compile(pattern).groups < 1:
        raise ValueError(f"pattern={pattern!r} has no group for the layer's number")
    config: Config = (("name", "top_layers"), ("count", count), ("pattern", pattern))

    def leaves(named: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Rows]:
        numbers = {path: int(found[1]) for path in _trainable(named) if (found := re.search(pattern, path))}
        if numbers:
            layers = sorted(set(numbers.values()))
            _check_layers(count, len(layers))
            return {path: None for path, number in numbers.items() if number in layers[-count:]}
        stacked = {site.path: site.shape[0] for site in sites if 0 in site.stack_axes}
        if not stacked:
            raise ValueError(
                f"top_layers: no path has a layer's number ({pattern!r}) and no weight is stacked along its first "
                "axis; give a pattern, or sites=jlora.sites(fn, params, *args)"
            )
        depth = next(iter(stacked.values()))
        _check_layers(count, depth)
        # A bias or a norm of the same layers is stacked, too: it lies in the same subtree and has the same first axis.
        roots = {path.split("/")[0] for path in stacked}
        rows = tuple(range(depth - count, depth))
        mine = (p for p in _trainable(named) if p.split("/")[0] in roots and jnp.shape(named[p])[:1] == (depth,))
        return dict.fromkeys(mine, rows)

    return _selective(config, leaves)


def _check_layers(count: int, found: int) -> None:
    if count > found:
        raise ValueError(f"top_layers: {count} layers were asked for and {found} found")


def _matching(name: str, pattern: str) -> Method:
    pattern = check_pattern(pattern)

    def leaves(named: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Rows]:
        found = [path for path in _trainable(named) if re.search(pattern, path)]
        if not found:
            raise ValueError(
                f"{name}: no leaf fits {pattern!r}; the leaves are {', '.join(map(repr, list(named)[:12]))}"
            )
        return dict.fromkeys(found)

    return _selective((("name", name), ("pattern", pattern)), leaves)


def _selective(config: Config, leaves: Any) -> Method:
    return Method(config, None, None, OnLeaves(leaves))


def _trainable(named: Mapping[str, Any]) -> list[str]:
    """The paths of floating-point arrays."""
    return [p for p, x in named.items() if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)]
