"""Acting on the activations of linen modules: adapters that travel inside the parameters.

The arrays of an adapter are put into the parameter tree, under a name of their own beside the weights of the module
whose calls they change. Whatever threads parameters through a model (`nn.scan`, `nn.remat`, `nn.vmap`, `nn.jit`)
threads them along and cuts them as it cuts the weights: a scanned model has an adapter per layer. An interceptor, one
of the public `nn.intercept_methods`, reads them where the module is called. What maps all parameters of a module
(`nn.map_variables`) maps the adapters, too.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from flax.core.meta import AxisMetadata

from jlora import tree
from jlora.transform.sites import Target

NAME = "jlora_adapter"  # beside a module's own parameters
Interceptor: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], Any]
_ACTIVE: ContextVar[frozenset[Any]] = ContextVar("active", default=frozenset())  # beside Flax's own interceptor stack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """Arrays that one target adds to the calls of a module.

    Attributes:
      arrays: by name; under a scan those of one layer.
      site: the adapted weight that it belongs to.
      owner: the method, hashable. An interceptor acts on the adapters of its own method alone.
      tree: which of the adapted trees of one call it is in, from 0.
    """

    arrays: dict[str, jax.Array]
    site: Target = field(metadata={"static": True})
    owner: Any = field(metadata={"static": True})
    tree: int = field(default=0, metadata={"static": True})


@contextlib.contextmanager
def active(owner: Any, make: Callable[[Any], Interceptor]) -> Iterator[None]:
    """Intercepts the calls of modules for the adapters of `owner`, once, however many lifted functions are nested."""
    if owner in _ACTIVE.get():
        yield
        return
    token = _ACTIVE.set(_ACTIVE.get() | {owner})
    try:
        with nn.intercept_methods(make(owner)):
            yield
    finally:
        _ACTIVE.reset(token)


def of_calls(act: Interceptor) -> Interceptor:
    """The interceptor `act` for every `__call__` of a module with parameters, a call of `super()` inside it left out.

    Raises (where it intercepts):
      ValueError: if another module of the same scope (`nn.share_scope`) is called within one that has an adapter: which
        of the two it belongs to is not known.
    """
    inside: dict[int, nn.Module] = {}

    def intercept(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return proceed(*args, **kwargs)
        scope = id(module.scope)
        outer = inside.get(scope)
        if outer is not None:
            if outer is not module and module.has_variable("params", NAME):
                raise ValueError(
                    f"{type(outer).__name__} and {type(module).__name__} share one scope (nn.share_scope), and an "
                    "adapter belongs to one module: leave that weight out with targets="
                )
            return proceed(*args, **kwargs)
        inside[scope] = module
        try:
            return act(proceed, args, kwargs, context)
        finally:
            del inside[scope]

    return intercept


def insert(params: Any, adapters: Mapping[tuple[str, ...], Adapter]) -> Any:
    """The parameters with each adapter in the dict that the path leads to."""
    if not adapters:
        return params
    inner: dict[str, dict[tuple[str, ...], Adapter]] = {}
    for path, adapter in adapters.items():
        if path:
            inner.setdefault(path[0], {})[path[1:]] = adapter
    filled = {key: insert(value, inner.get(str(key), {})) for key, value in params.items()}
    if () in adapters:
        filled[NAME] = adapters[()]
    return FrozenDict(filled) if isinstance(params, FrozenDict) else filled


def check_linen(params: Any, method: str) -> None:
    """Parameters of a linen module are dicts of dicts.

    Raises:
      TypeError: if these are another library's.
    """
    odd = [type(x).__name__ for x in _inner_nodes(params) if not isinstance(x, dict | FrozenDict)]
    if odd:
        raise TypeError(
            f"{method} acts on the activations of Flax linen modules, whose parameters are dicts of dicts; these hold "
            f"a {odd[0]}. For other libraries there are the methods on weights, such as jlora.lora"
        )


def _inner_nodes(params: Any) -> Sequence[Any]:
    """The root and the containers below it, without the boxes of leaves (`nn.Partitioned`)."""
    if not isinstance(params, dict | FrozenDict):
        leaf = isinstance(params, AxisMetadata) or tree.is_stored(params) or jax.tree_util.all_leaves([params])
        return [] if leaf else [params]
    return [params, *(node for x in params.values() if x is not None for node in _inner_nodes(x))]


def adapter_of(module: nn.Module, owner: Any) -> Adapter | None:
    """The adapter of this module, if it has one that `owner` made."""
    if module.scope is None or not module.has_variable("params", NAME):
        return None
    return _owned(module.get_variable("params", NAME), owner)


def adapters_below(variables: Mapping[str, Any], owner: Any) -> dict[str, Adapter]:
    """The adapters of a module's children, by the child's name."""
    params = variables.get("params", {})
    found = {name: _owned(child.get(NAME), owner) for name, child in params.items() if isinstance(child, Mapping)}
    return {name: adapter for name, adapter in found.items() if adapter is not None}


def adapters_within(tree: Any, owner: Any) -> list[Adapter]:
    """All adapters in a tree of parameters that `owner` made."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Adapter))
    return [leaf for leaf in leaves if isinstance(leaf, Adapter) and leaf.owner == owner]


def _owned(adapter: Any, owner: Any) -> Adapter | None:
    return adapter if isinstance(adapter, Adapter) and adapter.owner == owner else None


def bound_arguments(context: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The arguments of an intercepted call by name."""
    return inspect.signature(context.orig_method).bind(*args, **kwargs)


def joined(first: jax.Array, second: jax.Array, axis: int) -> jax.Array:
    """`jnp.concatenate` of two arrays, the first of which comes to where the second's type says that it lies."""
    mine, theirs = (jax.typeof(x).sharding for x in (first, second))
    if mine.spec != theirs.spec:  # on a mesh of Explicit axes alone; elsewhere no type says anything
        first = jax.sharding.reshard(first, theirs)
    return jnp.concatenate([first, second], axis=axis)


def stacked(shape: Sequence[int], site: Target) -> tuple[int, ...]:
    """The shape of an array that a scan cuts into `shape`: the stack's axes stand where they stand in the weight."""
    whole = list(shape)
    for axis in sorted(site.stack_axes):
        if axis > len(whole):
            raise ValueError(
                f"{site.path!r} is stacked along axis {axis}: an array of {len(shape)} axes has no place for it there"
            )
        whole.insert(axis, site.shape[axis])
    return tuple(whole)


def check_cut(adapter: Adapter, name: str, ndim: int) -> jax.Array:
    """An array of the adapter, after a check that the model cut it into layers as it cuts the weight.

    Raises:
      ValueError: if it did not: the weight is stacked, but the module is called with all of it at once.
    """
    array = adapter.arrays[name]
    if array.ndim != ndim:
        raise ValueError(
            f"{adapter.site.path!r} is stacked along axes {list(adapter.site.stack_axes)}, and no scan runs over them: "
            "its module is called with all of them at once, which a method on activations cannot adapt; leave it out "
            "with targets="
        )
    return array
