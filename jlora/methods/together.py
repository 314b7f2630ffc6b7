"""Several methods at once, each on weights of its own: LoRA with (IA)^3, a prefix with parallel adapters (MAM)."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from jlora.methods.acts import SHARED, Acts, Adapters, Arrays, Factors, Part, Rows, Start
from jlora.methods.checks import check_pattern
from jlora.methods.method import Config, Method, Training, Transformation
from jlora.transform.sites import Site, Target
from jlora.transform.weight import Weight

Patterns: TypeAlias = str | Sequence[str]


def together(*methods: Method | tuple[Method, Patterns]) -> Method:
    """Several methods in one `Adapted`: each adapts weights of its own, and they are entered one after the other.

    A weight belongs to one of them. A method without targets takes those that it goes by itself: all linear layers and
    convolutions but those that another one names or trains as they are; prefix tuning the keys and values, ... The
    merged weights, optimizers, regularisers and draws at random are those of each method for what it adapts.

    Args:
      *methods: two or more, each a method, or a method and its targets: a regular expression, or several. `apply` gets
        no `targets=`; its `ranks=` and `alphas=` hold for the weights of those that have a rank.

    Raises:
      ValueError: for fewer than two, one of which is `together` itself, or targets that are no regular expressions; in
        `apply` if two of them name one weight.

    Source: He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv 2110.04366, section 4.6:
    MAM is `together(prefix_tuning(30), parallel_adapter(512, scale=4.0))`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"attn": {"kernel": jnp.ones((4, 4))}, "mlp": {"kernel": jnp.ones((4, 8))}}
      >>> adapted = jlora.apply(params, method=jlora.together(jlora.lora(2), (jlora.ia3(), "mlp")))
      >>> {path: sorted(arrays) for path, arrays in adapted.factors.items()}
      {'attn/kernel': ['A', 'B'], 'mlp/kernel': ['scale']}
    """
    parts = tuple(_part(entry, i) for i, entry in enumerate(methods))
    if len(parts) < 2:
        raise ValueError(f"together takes two methods or more, not {len(parts)}")
    config: Config = (
        ("name", "together"),
        ("*methods", tuple(m if given is None else (m, given) for m, given in parts)),
    )
    return Method(config, None, None, Together(parts), _training(parts))


def _part(entry: Any, i: int) -> Part:
    method, targets = (
        entry
        if isinstance(entry, tuple | list) and not isinstance(entry, Method) and len(entry) == 2
        else (entry, None)
    )
    if not isinstance(method, Method):
        raise ValueError(f"together: number {i + 1} must be a method, or (method, targets), not {entry!r:.200}")
    if isinstance(method.acts, Together):
        raise ValueError("together: one of the methods is together(...) itself: give its methods one by one")
    if targets is None:
        return method, None
    if not method.acts.adapts:
        raise ValueError(f"together: {method.name} trains leaves as they are and adapts none: leave its targets out")
    if isinstance(targets, str | re.Pattern):
        return method, check_pattern(targets, f"together: targets of {method.name}")
    if isinstance(targets, list | tuple) and targets:
        return method, tuple(check_pattern(pattern, f"together: targets of {method.name}") for pattern in targets)
    raise ValueError(f"together: targets of {method.name} must be regular expressions, not {targets!r:.200}")


@dataclasses.dataclass(frozen=True)
class Together(Acts):
    """The answers of several methods, each asked about its own targets (`Target.part`)."""

    methods: tuple[Part, ...]

    @property
    def adapts(self) -> bool:  # type: ignore[override]
        return any(method.acts.adapts for method, _ in self.methods)

    @property
    def needs(self) -> str:  # type: ignore[override]
        return " and ".join(dict.fromkeys(filter(None, (method.acts.needs for method, _ in self.methods))))

    @property
    def unmergeable(self) -> str:  # type: ignore[override]
        return next(filter(None, (method.acts.unmergeable for method, _ in self.methods)), "")

    @property
    def statistic(self) -> str:
        return next(filter(None, (method.acts.statistic for method, _ in self.methods)), "")

    def parts(self, owner: Any) -> tuple[Part, ...]:
        return self.methods

    def trained(self, named: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Rows]:
        found: dict[str, Rows] = {}
        for method, _ in self.methods:
            for path, rows in method.acts.trained(named, sites).items():
                if found.setdefault(path, rows) != rows:
                    raise ValueError(f"together: two of the methods train other rows of {path!r}; keep one of them")
        return found

    def arrays(self, target: Target) -> Arrays:
        return self.methods[target.part][0].acts.arrays(target)

    def start(
        self, key: jax.Array, named: Mapping[str, Any], targets: tuple[Target, ...], statistics: Mapping[str, jax.Array]
    ) -> Start:
        chosen: dict[str, Target] = {}
        arrays: Factors = {}
        for i, (method, _) in enumerate(self.methods):
            own = jax.random.fold_in(key, i) if i else key  # the first one starts as it does alone
            some, its = method.acts.start(own, named, _of(i, targets), statistics)
            chosen |= {target.path: target for target in some}
            _put(arrays, i, its)
        return tuple(chosen[target.path] for target in targets if target.path in chosen), arrays

    def shared(self, key: jax.Array, targets: Sequence[Target]) -> Arrays:
        found: Factors = {}
        for i, (method, _) in enumerate(self.methods):
            own = jax.random.fold_in(key, i) if i else key
            _put(found, i, {SHARED: method.acts.shared(own, some) if (some := _of(i, targets)) else {}})
        return found.get(SHARED, {})

    def computed(self, named: Mapping[str, Any], targets: Sequence[Target]) -> Factors:
        return _union(method.acts.computed(named, _of(i, targets)) for i, (method, _) in enumerate(self.methods))

    def weights(
        self, named: Mapping[str, Any], targets: Sequence[Target], factors: Factors, buffers: Factors
    ) -> dict[str, Weight]:
        return _union(
            method.acts.weights(named, own, _own(i, own, factors), buffers)
            for i, (method, _) in enumerate(self.methods)
            for own in (_of(i, targets),)
        )

    def adapters(self, owner: Any, targets: Sequence[Target], factors: Factors, number: int) -> Adapters:
        found: Adapters = {}
        for i, (method, _) in enumerate(self.methods):
            own = _of(i, targets)
            for holder, adapter in method.acts.adapters(method, own, _own(i, own, factors), number).items():
                if holder in found:
                    raise ValueError(
                        f"together: {found[holder].owner.name} at {found[holder].site.path!r} and {method.name} at "
                        f"{adapter.site.path!r} act on one module, {'/'.join(holder)!r}, which has one adapter; choose "
                        "other targets for one of them"
                    )
                found[holder] = adapter
        return found

    @contextlib.contextmanager
    def _entered(self) -> Any:
        with contextlib.ExitStack() as stack:
            for method, _ in self.methods:
                stack.enter_context(method.acts.entered(method))
            yield

    def entered(self, owner: Any) -> contextlib.AbstractContextManager[Any]:
        return self._entered()

    def check(self, owner: Any, base: Any, targets: Sequence[Target], factors: Factors) -> None:
        for i, (method, _) in enumerate(self.methods):
            own = _of(i, targets)
            if own:
                method.acts.check(method, base, own, _own(i, own, factors))
        jax.eval_shape(lambda factors: self.adapters(owner, targets, factors, 0), factors)

    def rescaled(self, owner: Any, target: Target, factors: Arrays, buffers: Arrays, s: Any) -> tuple[Target, Arrays]:
        method, _ = self.methods[target.part]
        return method.acts.rescaled(method, target, factors, buffers, s)

    def without_start(self, owner: Any) -> Any:
        parts = [(method.acts.without_start(method), patterns) for method, patterns in self.methods]
        return together(*(method if patterns is None else (method, patterns) for method, patterns in parts))

    def baked(self, owner: Any, targets: Sequence[Target], factors: Factors) -> tuple[Any, Factors]:
        methods: list[Any] = []
        arrays: Factors = {}
        for i, (method, given) in enumerate(self.methods):
            own = _of(i, targets)
            plain, its = method.acts.baked(method, own, _own(i, own, factors))
            methods.append(plain if given is None else (plain, given))
            _put(arrays, i, its)
        return together(*methods), arrays


def _of(i: int, targets: Sequence[Target]) -> tuple[Target, ...]:
    """The targets of one of the methods."""
    return tuple(target for target in targets if target.part == i)


def _own(i: int, targets: Sequence[Target], factors: Factors) -> Factors:
    """The factors of one of the methods, as it knows them."""
    own = {target.path: factors[target.path] for target in targets}
    prefix = f"{i}."
    shared = {n.removeprefix(prefix): x for n, x in factors.get(SHARED, {}).items() if n.startswith(prefix)}
    return own | ({SHARED: shared} if shared else {})


def _put(factors: Factors, i: int, own: Factors) -> None:
    """Adds the factors of one of the methods; what its targets share has its number before each name."""
    shared = {f"{i}.{name}": x for name, x in own.get(SHARED, {}).items()}
    factors |= {path: arrays for path, arrays in own.items() if path != SHARED}
    if shared:
        factors[SHARED] = factors.get(SHARED, {}) | shared


def _union(dicts: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in dicts:
        found |= one
    return found


def _training(parts: Sequence[Part]) -> Training:
    """Behaviour of each method in training, for its own targets; None where none has any."""

    def each(name: str) -> list[tuple[int, Callable[..., Any]]]:
        found = ((i, getattr(method.training, name)) for i, (method, _) in enumerate(parts))
        return [(i, fn) for i, fn in found if fn is not None]

    samples, regularisers, wraps = each("sample"), each("regulariser"), each("wrap")

    def sample(key: jax.Array, factors: Factors, targets: Sequence[Target]) -> Factors:
        drawn = dict(factors)
        for i, fn in samples:
            own = _of(i, targets)
            _put(drawn, i, fn(jax.random.fold_in(key, i) if i else key, _own(i, own, factors), own))
        return drawn

    def regulariser(factors: Factors, targets: Sequence[Target]) -> jax.Array:
        owned = ((i, fn, _of(i, targets)) for i, fn in regularisers)
        return sum(fn(_own(i, own, factors), own) for i, fn, own in owned)

    def wrap(tx: Transformation, targets: Sequence[Target]) -> Transformation:
        for i, fn in wraps:
            tx = fn(tx, _of(i, targets))
        return tx

    return Training(sample if samples else None, regulariser if regularisers else None, wrap if wraps else None)
