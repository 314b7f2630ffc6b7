"""Where a method acts: on weights, on activations, or on leaves that it trains as they are.

All three answer the same questions (`Acts`), so that no code elsewhere asks which of them a method is.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import jax

from jlora import tree
from jlora.methods.lazy import lazy_weight
from jlora.transform.explicit import on_auto_axes
from jlora.transform.intercept import Adapter, Interceptor, active, check_linen
from jlora.transform.sites import Site, Target
from jlora.transform.weight import Trained, Weight

Arrays = dict[str, jax.Array]
Factors = dict[str, Arrays]
Rows: TypeAlias = tuple[int, ...] | None
Start: TypeAlias = tuple[tuple[Target, ...], Factors]
Part: TypeAlias = tuple[Any, Any]  # a method, and the patterns of its targets or None
Adapters: TypeAlias = dict[tuple[str, ...], Adapter]
SHARED = "*"  # the path of factors that belong to all targets


class Acts:
    """The questions, with the answers of what acts nowhere.

    Attributes:
      adapts: whether it adapts weights, which have to be chosen.
      has_alpha: whether it has a scale.
      needs: what it acts on, for the error where a function has none of it.
      unmergeable: why no weights of the model give the same function; "" where some do.
      statistic: what it has to know of each weight to start; "" where it starts without data.
      frozen: names of initial arrays that are not trained: kept among the buffers, and in an adapter's file.
      targets: the patterns of `apply(targets=None)`, each of which has to match; () for all linear layers and
        convolutions.
    """

    adapts: ClassVar[bool] = True
    has_alpha: ClassVar[bool] = False
    needs: str = ""
    unmergeable: ClassVar[str] = ""
    frozen: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    @property
    def statistic(self) -> str:
        """Statistic of each weight that it starts from; "" where it starts without data."""
        return ""

    def replace(self, **changes: Any) -> Any:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def parts(self, owner: Any) -> tuple[Part, ...]:
        """The methods that it consists of, each with the patterns of its targets: itself, and none."""
        return ((owner, None),)

    def trained(self, named: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Rows]:
        """The leaves, or rows of them, that are trained as they are, by path."""
        return {}

    def arrays(self, target: Target) -> Arrays:
        """The initial arrays of a target as shapes."""
        return {}

    def start(
        self, key: jax.Array, named: Mapping[str, Any], targets: tuple[Target, ...], statistics: Mapping[str, jax.Array]
    ) -> Start:
        """The targets, with the ranks that they get, and their initial arrays."""
        return targets, {}

    def shared(self, key: jax.Array, targets: Sequence[Target]) -> Arrays:
        """The arrays that all targets share, trained too."""
        return {}

    def computed(self, named: Mapping[str, Any], targets: Sequence[Target]) -> Factors:
        """The buffers that the base determines, by path."""
        return {}

    def weights(
        self, named: Mapping[str, Any], targets: Sequence[Target], factors: Factors, buffers: Factors
    ) -> dict[str, Weight]:
        """The lazy weights that stand in place of the targets, by path."""
        return {}

    def adapters(self, owner: Any, targets: Sequence[Target], factors: Factors, number: int) -> Adapters:
        """The adapters of activations, by the path of the module whose calls each of them changes.

        Args:
          owner: the method.
          targets: what it adapts.
          factors: by path.
          number: which of the adapted trees of one call this is.
        """
        return {}

    def entered(self, owner: Any) -> contextlib.AbstractContextManager[Any]:
        """Context that is entered while a lifted function is traced."""
        return contextlib.nullcontext()

    def check(self, owner: Any, base: Any, targets: Sequence[Target], factors: Factors) -> None:
        """Raises an error where the method cannot act on this base."""

    def rescaled(self, owner: Any, target: Target, factors: Arrays, buffers: Arrays, s: Any) -> tuple[Target, Arrays]:
        """The target and the factors whose update of the weight is s times theirs.

        Raises:
          ValueError: where none have it.
        """
        raise ValueError(
            f"scale: the weight of {owner.name} is not the base plus an update that one of its factors multiplies; "
            "interpolate merged weights: jax.tree.map(lambda w0, w: w0 + s * (w - w0), base, jlora.merge(adapted))"
        )

    def without_start(self, owner: Any) -> Any:
        """The method whose weight on `W - s A0 B0` is the owner's on W, if it takes a start out; else the owner."""
        return owner

    def baked(self, owner: Any, targets: Sequence[Target], factors: Factors) -> tuple[Any, Factors]:
        """The method and the factors without the network that makes them; themselves where there is none."""
        return owner, factors


# -- on weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Start of a data-driven method.

    Attributes:
      statistic: what it needs of each weight: "covariance", the sum of x x^T over its inputs x, or "gradient", that of
        the loss with respect to the weight.
      fit: (key, weights by path, targets, statistics by path as (stack, inputs, inputs or outputs)) -> the targets,
        whose ranks it may change, and the initial arrays of each.
    """

    statistic: str
    fit: Callable[[jax.Array, Mapping[str, jax.Array], Sequence[Target], Mapping[str, jax.Array]], Start]


def no_buffers(w: jax.Array, target: Target) -> Arrays:
    """The buffers of a method that needs none."""
    return {}


def linear_in(name: str) -> Callable[[Target, Arrays, Arrays, Any], tuple[Target, Arrays]]:
    """`OnWeights.rescale` of an update that is linear in one of the factors."""
    return lambda target, factors, buffers, s: (target, factors | {name: factors[name] * s})


@dataclass(frozen=True)
class OnWeights(Acts):
    """Puts another weight in place of each target.

    Attributes:
      init: (key, w, target) -> the initial arrays, float32: what is trained, and what is `frozen`.
      weight: (w, target, factors, buffers) -> the lazy weight.
      buffers: (w, target) -> frozen arrays that `weight` needs and that can be computed from the base at any time.
      frozen: names of the arrays of `init` that are not trained.
      data: how a data-driven method starts instead of `init`.
      rescale: (target, factors, buffers, s) -> the target and the factors whose update of the weight is s times theirs;
        None where none have it.
      residual: () -> the method of the same weight on the base without what it takes out of it (`A0` and `B0`, frozen);
        None where it takes nothing out.
      stored: whether `init`, `weight` and `buffers` take a weight that is no array (`tree.Stored`) as it is, to
        dequantise it layer by layer; others get the array.
    """

    init: Callable[[jax.Array, Any, Target], Arrays]
    weight: Callable[[Any, Target, Arrays, Arrays], Weight]
    buffers: Callable[[Any, Target], Arrays] = no_buffers
    frozen: tuple[str, ...] = ()
    data: Data | None = None
    rescale: Callable[[Target, Arrays, Arrays, Any], tuple[Target, Arrays]] | None = None
    residual: Callable[[], Any] | None = None
    stored: bool = False

    has_alpha: ClassVar[bool] = True

    @property
    def statistic(self) -> str:
        return "" if self.data is None else self.data.statistic

    def arrays(self, target: Target) -> Arrays:
        return _shapes(self.init, target)

    def start(
        self, key: jax.Array, named: Mapping[str, Any], targets: tuple[Target, ...], statistics: Mapping[str, jax.Array]
    ) -> Start:
        if self.data is None:
            return targets, _initial(self.init, key, named, targets, self.stored)
        fit, chosen = self.data.fit, targets

        def fitted(key: jax.Array, named: Mapping[str, Any], statistics: Mapping[str, jax.Array]) -> Factors:
            nonlocal chosen
            chosen, arrays = fit(key, named, targets, statistics)
            return arrays

        arrays = on_auto_axes(
            fitted, key, {target.path: tree.dense(named[target.path], target.path) for target in targets}, statistics
        )
        return chosen, arrays

    def computed(self, named: Mapping[str, Any], targets: Sequence[Target]) -> Factors:
        def one(w: Any, target: Target) -> Arrays:
            make = lambda w: on_auto_axes(lambda w: self.buffers(w, target), w)
            return jax.eval_shape(make, w) if tree.is_abstract(w) else make(w)

        if self.buffers is no_buffers:
            return {target.path: {} for target in targets}
        given = lambda path: named[path] if self.stored else tree.dense(named[path], path)
        return {target.path: one(given(target.path), target) for target in targets}

    def weights(
        self, named: Mapping[str, Any], targets: Sequence[Target], factors: Factors, buffers: Factors
    ) -> dict[str, Weight]:
        of = lambda path: (factors[path], buffers.get(path, {}))
        return {t.path: lazy_weight(self.weight, named[t.path], t, *of(t.path), self.stored) for t in targets}

    def rescaled(self, owner: Any, target: Target, factors: Arrays, buffers: Arrays, s: Any) -> tuple[Target, Arrays]:
        if self.rescale is None:
            return super().rescaled(owner, target, factors, buffers, s)
        return self.rescale(target, factors, buffers, s)

    def without_start(self, owner: Any) -> Any:
        return owner if self.residual is None else self.residual()


# -- on activations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnActivations(Acts):
    """Changes the calls of linen modules, each of which is found by a weight of its own.

    Attributes:
      init: (key, w, target) -> the initial arrays, float32.
      intercept: method -> the interceptor, made anew for every call of a lifted function.
      needs: what the interceptor acts on.
      targets: the patterns that it goes by.
      holder: how many parts of its path a weight is below the module: 1 for the module's own weight.
      network: (key, targets) -> arrays that all targets share, trained too, under the path `SHARED`.
      prepare: (factors, targets) -> the arrays of each target as the interceptor reads them.
      plain: the method that these prepared arrays are the factors of, where it is another one.
    """

    init: Callable[[jax.Array, Any, Target], Arrays]
    intercept: Callable[[Any], Interceptor]
    needs: str
    targets: tuple[str, ...] = ()
    holder: int = 1
    network: Callable[[jax.Array, Sequence[Target]], Arrays] | None = None
    prepare: Callable[[Factors, Sequence[Target]], Factors] = lambda factors, targets: factors
    plain: Any = None

    unmergeable: ClassVar[str] = "acts on activations, and no weights of the model give the same function"

    def arrays(self, target: Target) -> Arrays:
        return _shapes(self.init, target)

    def start(
        self, key: jax.Array, named: Mapping[str, Any], targets: tuple[Target, ...], statistics: Mapping[str, jax.Array]
    ) -> Start:
        shared = self.shared(tree.fold_path(key, SHARED), targets)
        return targets, _initial(self.init, key, named, targets) | ({SHARED: shared} if shared else {})

    def shared(self, key: jax.Array, targets: Sequence[Target]) -> Arrays:
        return {} if self.network is None else self.network(key, targets)

    def adapters(self, owner: Any, targets: Sequence[Target], factors: Factors, number: int) -> Adapters:
        found: Adapters = {}
        prepared = self.prepare(factors, targets)
        for target in targets:
            path, arrays = target.path, prepared[target.path]
            holder = holder_of(path, self.holder, owner.name)
            if holder in found:
                raise ValueError(
                    f"{owner.name}: {path!r} and {found[holder].site.path!r} belong to one module, "
                    f"{'/'.join(holder)!r}, which has one adapter; choose one of them with targets="
                )
            weights = {n: Trained(array, path, number) for n, array in arrays.items()}
            found[holder] = Adapter(weights, target, owner, number)  # type: ignore[arg-type]
        return found

    def entered(self, owner: Any) -> contextlib.AbstractContextManager[Any]:
        return active(owner, self.intercept)

    def check(self, owner: Any, base: Any, targets: Sequence[Target], factors: Factors) -> None:
        check_linen(base, owner.name)
        jax.eval_shape(lambda factors: self.adapters(owner, targets, factors, 0), factors)

    def rescaled(self, owner: Any, target: Target, factors: Arrays, buffers: Arrays, s: Any) -> tuple[Target, Arrays]:
        raise ValueError(f"scale: {owner.name} acts on activations and adds no update to a weight")

    def baked(self, owner: Any, targets: Sequence[Target], factors: Factors) -> tuple[Any, Factors]:
        if self.plain is None:
            return super().baked(owner, targets, factors)
        return self.plain, self.prepare(factors, targets)


def holder_of(path: str, levels: int, method: str) -> tuple[str, ...]:
    """The path of the module that a weight is `levels` parts below.

    Raises:
      ValueError: if there is none.
    """
    parts = tuple(path.split("/"))
    if len(parts) < levels:
        raise ValueError(f"{method}: no module holds that of {path!r}; choose a weight further down with targets=")
    return parts[:-levels]


# -- on leaves ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnLeaves(Acts):
    """Trains leaves as they are, and adapts no weight.

    Attributes:
      leaves: (leaves by path, sites) -> the leaves, or rows of them.
    """

    leaves: Callable[[Mapping[str, Any], Sequence[Site]], dict[str, Rows]]

    adapts: ClassVar[bool] = False

    def trained(self, named: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Rows]:
        return self.leaves(named, sites)


# -- parts -------------------------------------------------------------------------------------------------------------


def _initial(
    init: Any, key: jax.Array, named: Mapping[str, Any], targets: Sequence[Target], stored: bool = False
) -> Factors:
    def one(w: Any, target: Target) -> Arrays:
        make = lambda key, w: on_auto_axes(lambda key, w: start_of(init, key, w, target, stored), key, w)
        mine = tree.fold_path(key, target.path)
        return jax.eval_shape(make, mine, w) if tree.is_abstract(w) else make(mine, w)

    return {target.path: one(named[target.path], target) for target in targets}


def start_of(init: Any, key: jax.Array, w: Any, target: Target, stored: bool = False) -> Arrays:
    """`init(key, w, target)`; a stored w is dequantised if the start is read off its values, as LoRA's is not."""
    if not tree.is_stored(w) or stored:
        return init(key, w, target)
    shape = jax.ShapeDtypeStruct(w.shape, w.dtype)
    traced = jax.make_jaxpr(lambda w, key: init(key, w, target))(shape, key).jaxpr
    read = {v for equation in traced.eqns for v in equation.invars if isinstance(v, type(traced.invars[0]))}
    is_read = traced.invars[0] in read or traced.invars[0] in traced.outvars
    return init(key, tree.dense(w, target.path) if is_read else shape, target)


def _shapes(init: Any, target: Target) -> Arrays:
    key, w = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct(target.shape, target.dtype)
    return jax.eval_shape(lambda key, w: init(key, w, target), key, w)
