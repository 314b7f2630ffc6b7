"""Blocks one after another: unrolled or scanned, each computed again in the backward pass where that is asked for."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name


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
        """Compute activations again in the backward pass: False, True, or the name of a policy; see `POLICIES`."""


def stack(
    block: type[nn.Module],
    config: Config,
    h: jax.Array,
    each: Any,
    *shared: Any,
    deterministic: bool,
    last: type[nn.Module] | None = None,
    layers: int | None = None,
    name: str = "h",
    options: Mapping[str, Any] | None = None,
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
      layers: number of blocks; `config.layers` when None.
      name: of the scanned blocks, and of others before their numbers.
      options: further fields of the blocks.

    Returns:
      h, and what is new of all layers: a tuple, or stacked on axis 0 when scanned; None where they return None.
    """
    block, last = (computed_again(kind, config.remat, scanned=config.scan) for kind in (block, last or block))
    count, options = config.layers if layers is None else layers, options or {}
    if config.scan:
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=count,
            in_axes=(0, *(nn.broadcast for _ in shared)),
        )
        return scanned(config, deterministic, **options, name=name)(h, each, *shared)
    new = []
    for i in range(count):
        kind = last if i + 1 == count else block
        h, mine = kind(config, deterministic, **options, name=f"{name}_{i}")(
            h, None if each is None else each[i], *shared
        )
        new.append(mine)
    return h, None if each is None and all(mine is None for mine in new) else tuple(new)


def computed_again(block: type[nn.Module], remat: bool | str, *, scanned: bool = False) -> type[nn.Module]:
    """A block whose activations are computed again in the backward pass, if `remat` says so; it is called with arrays.

    Args:
      block: the block.
      remat: as in a config.
      scanned: the block is the body of a scan, where XLA cannot find out that it computes things twice.
    """
    if not remat:
        return block
    policy = POLICIES[remat] if isinstance(remat, str) else None
    again: type[nn.Module] = nn.remat(
        _named(block) if remat == "offload" else block, prevent_cse=not scanned, policy=policy
    )
    return again


_INPUT = "block input"
_DEVICE, _HOST = "device", "pinned_host"
POLICIES: dict[str, Callable[..., Any]] = {
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[_INPUT], offload_src=_DEVICE, offload_dst=_HOST
    ),
    "offload_dots": jax.checkpoint_policies.offload_dot_with_no_batch_dims(_DEVICE, _HOST),
}
"""What of a block is there in the backward pass; all else is computed again. By name, in `remat=` of a config:

Those of `jax.checkpoint_policies` keep what their names say on the device. "offload" keeps nothing there but the input
of the block at hand: each block's waits in the host's memory. "offload_dots" has the results of the linear layers wait
there too, so that no product with a weight is done twice, for ten times the traffic. Both are meant for `scan=True`: of
blocks that follow one another XLA fetches several at a time, which costs what is to be saved.
"""


def _named(block: type[nn.Module]) -> type[nn.Module]:
    """The block, whose input a policy knows by its name: it is kept as that, not as an argument, which always stays."""

    class Named(block):  # type: ignore[misc, valid-type]
        def __call__(self, h: jax.Array, *rest: Any) -> Any:
            return super().__call__(checkpoint_name(h, _INPUT), *rest)

    return Named


def check_remat(remat: bool | str) -> None:
    """Raises a ValueError for what is neither a bool nor a name in `POLICIES`."""
    if not isinstance(remat, bool) and remat not in POLICIES:
        nearest = difflib.get_close_matches(str(remat), POLICIES, 1)
        meant = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"remat={remat!r} is not False, True or one of {', '.join(POLICIES)}{meant}")
