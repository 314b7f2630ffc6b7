"""Blocks one after another: unrolled or scanned, each computed again in the backward pass where that is asked for."""

from typing import Any, Protocol

import jax
from flax import linen as nn


class Config(Protocol):
    """Fields of a model's config about its blocks."""

    @property
    def layers(self) -> int:
        """Number of layers."""

    @property
    def scan(self) -> bool:
        """One block scanned over parameters stacked on axis 0, "h/...", in place of `layers` blocks "h_0/...", ..."""

    @property
    def remat(self) -> bool | str:
        """Compute activations again in the backward pass: False, True, or the name of a policy; see `check_remat`."""


def stack(
    block: type[nn.Module],
    config: Config,
    h: jax.Array,
    each: Any,
    *shared: Any,
    deterministic: bool,
    last: type[nn.Module] | None = None,
) -> tuple[jax.Array, Any]:
    """Sends `h` through `config.layers` blocks, called within a compact method.

    Args:
      block: `block(config, deterministic)(h, of its layer, *shared)` returns h, and what is new of its layer.
      config: says how.
      h: (batch, length, width).
      each: what each layer has of its own, such as a cache: a tuple, or stacked on axis 0 when scanned; or None.
      shared: what all layers share, such as a mask.
      deterministic: no dropout.
      last: the last block, where it need not answer for every token. A scan has `block` there, too: it has one program.

    Returns:
      h, and what is new of all layers, in the form of `each`; None where that is.
    """
    last = last or block
    if config.remat:
        policy = None if config.remat is True else getattr(jax.checkpoint_policies, config.remat)
        block, last = (nn.remat(kind, prevent_cse=not config.scan, policy=policy) for kind in (block, last))
    if config.scan:
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=config.layers,
            in_axes=(0, *(nn.broadcast for _ in shared)),
        )
        return layers(config, deterministic, name="h")(h, each, *shared)
    new = []
    for i in range(config.layers):
        kind = last if i + 1 == config.layers else block
        h, mine = kind(config, deterministic, name=f"h_{i}")(h, None if each is None else each[i], *shared)
        new.append(mine)
    return h, None if each is None else tuple(new)


def check_remat(remat: bool | str) -> None:
    """Raises a ValueError for what is neither a bool nor the name of a policy in `jax.checkpoint_policies`."""
    policies = ("dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable", "nothing_saveable")
    if not isinstance(remat, bool) and remat not in policies:
        raise ValueError(f"remat={remat!r} is not False, True or one of {', '.join(policies)}")
