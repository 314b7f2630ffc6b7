"""What a weight-space method is: data, as an optimizer is in Optax."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import optax
from jax.sharding import PartitionSpec

from jlora.transform.explicit import on_auto_axes, spec_of
from jlora.transform.intercept import Interceptor
from jlora.transform.sites import Site
from jlora.transform.weight import Weight

Arrays = dict[str, jax.Array]
Factors = dict[str, Arrays]
Config = tuple[tuple[str, Any], ...]
Rows: TypeAlias = tuple[int, ...] | None
SHARED = "*"  # the path of factors that belong to all sites
Transformation: TypeAlias = optax.GradientTransformation


def no_buffers(w: jax.Array, site: Site) -> Arrays:
    """The buffers of a method that needs none."""
    return {}


class Data(NamedTuple):
    """How a data-driven method starts.

    Attributes:
      statistic: what it needs of each weight: "covariance", the sum of x x^T over its inputs x, or "gradient", that of
        the loss with respect to the weight.
      fit: (key, weights by path, sites, statistics by path as (stack, inputs, inputs or outputs)) -> the sites, whose
        ranks it may change, and the initial arrays of each.
    """

    statistic: str
    fit: Callable[
        [jax.Array, Mapping[str, jax.Array], Sequence[Site], Mapping[str, jax.Array]], tuple[tuple[Site, ...], Factors]
    ]


class Activation(NamedTuple):
    """How a method acts on activations: on the calls of linen modules, each of which is found by a weight of its own.

    Attributes:
      intercept: method -> the interceptor, made anew for every call of a lifted function.
      needs: what the interceptor acts on, for the error where a function has none of it.
      holder: how many parts of its path a weight is below the module: 1 for the module's own weight.
      shared: (key, sites) -> arrays that all sites share, trained too, under the path `SHARED`.
      prepare: (factors, sites) -> the arrays of each site as the interceptor reads them.
      plain: the method that these prepared arrays are the factors of, where it is another one.
    """

    intercept: Callable[["Method"], Interceptor]
    needs: str
    holder: int = 1
    shared: Callable[[jax.Array, Sequence[Site]], Arrays] | None = None
    prepare: Callable[[Factors, Sequence[Site]], Factors] = lambda factors, sites: factors
    plain: "Method | None" = None


class Method(NamedTuple):
    """A way to adapt a model, as pure functions.

    Two methods are equal if their `config` is, so that a method made anew (by `load`, in another call) does not
    recompile a program.

    Attributes:
      config: hashable pairs from which the method can be built again, the first of them ("name", ...).
      rank: r where `apply(ranks=)` says nothing else; 0 for a method that has none.
      alpha: the numerator of the scale; the site's rank when None.
      init: (key, w, site) -> the initial arrays, float32: what is trained, and what is `frozen`.
      weight: (w, site, factors, buffers) -> the lazy weight; not called for a method on activations.
      buffers: (w, site) -> frozen arrays that `weight` needs and that can be computed from the base at any time.
      frozen: names of the arrays of `init` that are not trained: kept among the buffers, and in an adapter's file.
      extras: (leaves by path, sites) -> the leaves, or rows of them, to train as they are; None for a method that
        adapts weights.
      data: how a data-driven method starts instead of `init`.
      sample: (key, factors) -> the factors of one training step, for a method that draws at random.
      regulariser: (factors, sites) -> a scalar that `train_step` adds to the loss.
      wrap: (optimizer, sites) -> the optimizer that the method trains with.
      targets: the patterns of `apply(targets=None)`, each of which has to match; () for all linear layers and
        convolutions.
      activation: how it acts on activations, for a method that leaves the weights as they are.
      rescale: (site, factors, buffers, s) -> the site and the factors whose update of the weight is s times theirs;
        None where none have it.
    """

    config: Config
    rank: int
    alpha: float | None
    init: Callable[[jax.Array, jax.Array, Site], Arrays]
    weight: Callable[[jax.Array, Site, Arrays, Arrays], Weight]
    buffers: Callable[[jax.Array, Site], Arrays] = no_buffers
    frozen: tuple[str, ...] = ()
    extras: Callable[[Mapping[str, Any], Sequence[Site]], dict[str, Rows]] | None = None
    data: Data | None = None
    sample: Callable[[jax.Array, Factors], Factors] | None = None
    regulariser: Callable[[Factors, Sequence[Site]], jax.Array] | None = None
    wrap: Callable[[Transformation, Sequence[Site]], Transformation] | None = None
    targets: tuple[str, ...] = ()
    activation: Activation | None = None
    rescale: Callable[[Site, Arrays, Arrays, Any], tuple[Site, Arrays]] | None = None

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


def linear_in(name: str) -> Callable[[Site, Arrays, Arrays, Any], tuple[Site, Arrays]]:
    """`Method.rescale` of an update that is linear in one of the factors."""
    return lambda site, factors, buffers, s: (site, factors | {name: factors[name] * s})


def lazy_weight(method: Method, w: jax.Array, site: Site, factors: Arrays, buffers: Arrays) -> Weight:
    """The method's weight of a site, computed wherever the arrays lie; its `w` is `w` itself if that is not changed.

    On a mesh of explicit axes a changed `w` lies as `w` does. The other parts lie along a stack axis as `w` does, since
    a product asks for that of what it is batched over, and along the other axes as the factors that span these.
    """

    def make(w: jax.Array, factors: Arrays, buffers: Arrays) -> Weight:
        weight = method.weight(w, site, factors, buffers)
        return weight.replace(w=None) if weight.w is w else weight

    def place(weight: Weight) -> Weight:
        stack = PartitionSpec(*(axis if i in site.stack_axes else None for i, axis in enumerate(spec_of(w))))
        known = [(w.shape, stack), *((x.shape, spec_of(x)) for x in (*factors.values(), *buffers.values()))]
        beside = {name: _beside(getattr(weight, name), site, known) for name in ("a", "b", "gain")}
        return weight.replace(w=None if weight.w is None else spec_of(w), **beside)

    weight = on_auto_axes(make, w, factors, buffers, place=place)
    return weight.replace(w=w) if weight.w is None else weight


def _beside(
    part: jax.Array | None, site: Site, known: Sequence[tuple[tuple[int, ...], PartitionSpec]]
) -> PartitionSpec | None:
    """Where a part in broadcast form lies: along each axis as the first array in that form that spans it."""
    if part is None:
        return None
    axes: list[Any] = [None] * part.ndim
    used: set[str] = set()
    for shape, spec in known:
        if len(shape) >= len(site.shape) and all(n in (1, m) for n, m in zip(shape, site.shape, strict=False)):
            for i, axis in enumerate(spec[: len(site.shape)]):
                if axes[i] is None and part.shape[i] == shape[i] and not used & (names := _names(axis)):
                    axes[i] = axis
                    used |= names
    return PartitionSpec(*axes)


def _names(axis: Any) -> set[str]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return set() if axis is None else set(axis) if isinstance(axis, tuple) else {axis}
