"""What a weight-space method is: data, as an optimizer is in Optax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jlora.sites import Site
from jlora.weight import Weight

Arrays = dict[str, jax.Array]
Config = tuple[tuple[str, Any], ...]


def no_buffers(w: jax.Array, site: Site) -> Arrays:
    """The buffers of a method that needs none."""
    return {}


class Method(NamedTuple):
    """A way to adapt one weight, as pure functions.

    Two methods are equal if their `config` is, so that a method made anew (by `load`, in another call) does not
    recompile a program.

    Attributes:
      config: hashable pairs from which the method can be built again, the first of them ("name", ...).
      rank: r where `apply(ranks=)` says nothing else.
      alpha: the numerator of the scale; the site's rank when None.
      init: (key, w, site) -> the trainable factors, float32.
      weight: (w, site, factors, buffers) -> the lazy weight.
      buffers: (w, site) -> frozen arrays that `weight` needs and that can be computed from the base at any time.
    """

    config: Config
    rank: int
    alpha: float | None
    init: Callable[[jax.Array, jax.Array, Site], Arrays]
    weight: Callable[[jax.Array, Site, Arrays, Arrays], Weight]
    buffers: Callable[[jax.Array, Site], Arrays] = no_buffers

    @property
    def name(self) -> str:
        """The method's name, as in `config`."""
        return dict(self.config)["name"]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Method) and self.config == other.config

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.config)

    def __repr__(self) -> str:
        name, *options = self.config
        return f"{name[1]}({', '.join(f'{key}={value!r}' for key, value in options)})"


def check_rank(rank: Any, where: str = "rank") -> int:
    """Returns a valid rank.

    Raises:
      ValueError: if it is not an integer of at least 1.
    """
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"{where} must be an integer of at least 1, not {rank!r}")
    if rank < 1:
        raise ValueError(f"{where} must be at least 1, not {rank}")
    return rank
