"""A method: data, as an optimizer is in Optax."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

from jlora.methods.acts import Acts, Factors
from jlora.transform.explicit import on_auto_axes
from jlora.transform.sites import Target

Config = tuple[tuple[str, Any], ...]
Transformation: TypeAlias = optax.GradientTransformation


class Training(NamedTuple):
    """Behaviour of a method in training beside its factors' gradient.

    Attributes:
      sample: (key, factors, targets) -> the factors of one training step, for a method that draws at random.
      regulariser: (factors, targets) -> a scalar that `train_step` adds to the loss.
      wrap: (optimizer, targets) -> the optimizer that the method trains with.
    """

    sample: Callable[[jax.Array, Factors, Sequence[Target]], Factors] | None = None
    regulariser: Callable[[Factors, Sequence[Target]], jax.Array] | None = None
    wrap: Callable[[Transformation, Sequence[Target]], Transformation] | None = None


class Method(NamedTuple):
    """A way to adapt a model, as pure functions.

    Two methods are equal if their `config` is, so that a method made anew (by `load`, in another call) does not
    recompile a program.

    Attributes:
      config: hashable pairs from which the method can be built again: ("name", its name), and each argument of its
        constructor. A method of your own has the constructor itself there, ("name", mine), by which it is pickled and
        loaded. An argument whose name begins with a star holds those by position.
      rank: r where `apply(ranks=)` says nothing else; None for a method that has none.
      alpha: the numerator of the scale; the target's rank when None.
      acts: where it acts, and how: `OnWeights`, `OnActivations` or `OnLeaves`.
      training: what it adds to training.
    """

    config: Config
    rank: int | None
    alpha: float | None
    acts: Acts
    training: Training = Training()

    @property
    def name(self) -> str:
        """The method's name: that of its constructor."""
        name = dict(self.config)["name"]
        return name if isinstance(name, str) else str(name.__name__)

    @property
    def has_rank(self) -> bool:
        """Whether its targets have a rank, or a length."""
        return self.rank is not None

    @property
    def has_optimizer(self) -> bool:
        """Whether it trains with more than the optimizer that it is given: LoRA+'s rates, AdaLoRA's budget."""
        return self.training.wrap is not None

    @property
    def parts(self) -> tuple[tuple["Method", Any], ...]:
        """The methods that it consists of, each with its patterns or None: `together` of several, else itself."""
        return self.acts.parts(self)

    def of(self, target: Target) -> "Method":
        """The one of its parts that adapts a target."""
        return self.parts[target.part][0]

    def sampled(self, key: jax.Array, factors: Factors, targets: Sequence[Target]) -> Factors:
        """The factors of one training step."""
        return factors if self.training.sample is None else self.training.sample(key, factors, targets)

    def regularisers(self, factors: Factors, targets: Sequence[Target]) -> dict[str, jax.Array]:
        """Terms that are added to the loss, by name: none for most methods."""
        of_factors = self.training.regulariser
        if of_factors is None:
            return {}
        return {"regulariser": on_auto_axes(lambda factors: of_factors(factors, targets), factors)}

    def wrapped(
        self, tx: Transformation, targets: Sequence[Target], prepare: Callable[[Transformation], Transformation]
    ) -> Transformation:
        """The optimizer that the method trains with: `tx` itself for most, else what it makes of `prepare(tx)`."""
        return tx if self.training.wrap is None else self.training.wrap(prepare(tx), targets)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Method) and self.config == other.config

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.config)

    def __repr__(self) -> str:
        options = self.config[1:]
        shown = (", ".join(map(repr, value)) if key.startswith("*") else f"{key}={value!r}" for key, value in options)
        return f"{self.name}({', '.join(shown)})"


@functools.lru_cache(maxsize=4096)
def factor_shapes(method: Method, target: Target) -> dict[str, tuple[int, ...]]:
    """The shapes of a target's trained arrays."""
    acts = method.of(target).acts
    return {name: array.shape for name, array in acts.arrays(target).items() if name not in acts.frozen}


@functools.lru_cache(maxsize=256)
def shared_shapes(method: Method, targets: tuple[Target, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays that all targets share; empty for most methods."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    arrays = jax.eval_shape(lambda key: method.acts.shared(key, targets), key)
    return {name: array.shape for name, array in arrays.items()}
