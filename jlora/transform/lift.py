"""`lift`: the transform that makes a function of parameters accept adapted ones."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from flax.errors import TraceContextError

from jlora import tree
from jlora.transform.interpret import trace_weights
from jlora.transform.reach import reached
from jlora.transform.trace import UNTOUCHED, Trace
from jlora.transform.weight import Trained, Weight

# The second is what JAX says of the same in `shard_map` that is not compiled.
_NO_FORWARD_MODE = ("can't apply forward-mode autodiff (jvp) to a custom_vjp function", "unhashable type: 'Unhashable'")


@runtime_checkable
class Lazy(Protocol):
    """Anything that stands for a parameter tree with lazy weights in it: `jlora.Adapted`."""

    def as_weights(self, tree: int = 0) -> Any:
        """The parameter tree, with a `Weight` where a leaf is adapted, of the adapted tree with this number."""
        ...

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """Context that is entered while the function is traced."""
        ...

    @property
    def needs(self) -> str:
        """Parts that a function has to have for the weights to be read, beyond the weights."""
        ...


def lift(fn: Callable[..., Any], *, strict: bool = False, forward_mode: bool = False) -> Callable[..., Any]:
    """Makes a function of parameters accept adapted parameters: `lift(fn)(adapted, x) = fn(merge(adapted), x)`.

    The merged weights are never built: where the function multiplies by a weight, the input meets W0, A and B one by
    one. `fn` is traced, so what holds for `jax.jit` holds for it: no Python control flow on the values of the adapted
    weights. Everything else that it takes passes through as it is.

    Args:
      fn: any function of JAX arrays in trees: a Flax `apply`, a loss, a sampler.
      strict: raise where a weight would be materialised, instead of doing so.
      forward_mode: allow `jax.jvp` and `jax.jacfwd`; slower in reverse mode.

    Returns:
      A function with the signature of `fn` in which any tree of parameters may be an `Adapted`. Called without one,
      it is `fn`.

    Raises:
      MaterialisedError: under `strict`, naming the weight, the operation and the line.
      ValueError: if the function never reads an adapted weight.
      TypeError: under `jax.jvp` or `jax.jacfwd` without `forward_mode`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> adapted = jlora.apply(params, rank=1)
      >>> jlora.lift(lambda params, x: x @ params["kernel"])(adapted, jnp.ones((1, 3)))
      Array([[3., 3.]], dtype=float32)
    """

    @functools.wraps(fn)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(fn, args, kwargs, Trace(strict, forward_mode))
        except TypeError as error:
            if forward_mode or not any(text in str(error) for text in _NO_FORWARD_MODE):
                raise
            raise TypeError(
                "jax.jvp and jax.jacfwd of a lifted function need jlora.lift(fn, forward_mode=True): without it the "
                f"products with adapted weights have a backward pass by hand, and no forward mode ({error})"
            ) from error

    return lifted


def run(fn: Callable[..., Any], args: Any, kwargs: Any, trace: Trace) -> Any:
    """`fn(*args, **kwargs)` with the weights of every `Lazy` among the arguments; notes their uses in `trace`."""
    is_lazy = lambda x: isinstance(x, Lazy)
    lazy = list({id(x): x for x in jax.tree.leaves((args, kwargs), is_leaf=is_lazy) if isinstance(x, Lazy)}.values())
    numbers = {id(x): number for number, x in enumerate(lazy)}
    open_tree = lambda x: x.as_weights(numbers[id(x)]) if isinstance(x, Lazy) else x
    opened = jax.tree.map(open_tree, (args, kwargs), is_leaf=is_lazy)
    leaves, structure = jax.tree.flatten(opened, is_leaf=_is_lazy_leaf)
    at = [i for i, leaf in enumerate(leaves) if _is_lazy_leaf(leaf)]
    if not at:
        args, kwargs = opened
        return fn(*args, **kwargs)

    def of_weights(*arrays: jax.Array) -> Any:
        full = list(leaves)
        for i, array in zip(at, arrays, strict=True):
            full[i] = array
        args, kwargs = jax.tree.unflatten(structure, full)
        with contextlib.ExitStack() as stack:
            for x in lazy:
                stack.enter_context(x.around())
            return fn(*args, **kwargs)

    weights = [leaves[i] for i in at]
    try:
        result = trace_weights(of_weights, weights, trace)
    except TraceContextError as error:  # Flax NNX: a variable of the model's own is updated inside the trace
        raise TraceContextError(
            f"{str(error).split(' (http')[0]}; merge the model with copy=True inside the function: "
            "nnx.merge(graph, params, rest, copy=True)"
        ) from error
    needs = " and ".join(dict.fromkeys(x.needs for x in lazy if x.needs))
    _check_read(fn, [x for x in weights if not tree.is_stored(x)], trace, needs)
    return result


def _is_lazy_leaf(x: Any) -> bool:
    return isinstance(x, Weight | Trained) or tree.is_stored(x)


def _check_read(fn: Callable[..., Any], weights: Sequence[Weight | Trained], trace: Trace, needs: str) -> None:
    """An adapted weight that is never read is an error; an extra is not, as it is none in full fine-tuning.

    Raises:
      ValueError: if there is one, or if not even one of the extras is read where there is nothing else.
    """
    read = {(use.tree, use.path) for use in trace.uses if use.reason != UNTOUCHED}
    every = list(dict.fromkeys((weight.tree, weight.path) for weight in weights))
    optional = {(weight.tree, weight.path) for weight in weights if isinstance(weight, Trained) and weight.optional}
    if not read and not any(trace.extras.values()):  # one that is not read among others is as in full fine-tuning
        optional = set()
    unread = [of for of in every if of not in read | optional]
    if unread:
        raise ValueError(
            f"{len(unread)} of {len(every)} adapted weights are never read by {getattr(fn, '__name__', fn)!r}: "
            f"{names(unread, every)}. They would not be trained: "
            "leave them out with targets=, or lift the function that reads them"
            + (f". The method acts on {needs}" if needs else "")
        )


def check_reached(fn: Callable[..., Any], trace: Trace) -> None:
    """A weight of the first adapted tree that the first result's gradient cannot reach would be trained in name only.

    Raises:
      ValueError: if there is one.
    """
    if trace.program is None:  # nothing was adapted
        return
    jaxpr, weights = trace.program
    loss, *_ = reached(jaxpr, [frozenset((i,)) for i in range(len(weights))])
    reach = [weights[i] for i in loss]
    found = {(x.tree, x.path) for x in reach if isinstance(x, Weight | Trained)}
    every = [(0, path) for path in dict.fromkeys(use.path for use in trace.uses if use.tree == 0)]
    cut = [of for of in every if of not in found]
    if cut:
        raise ValueError(
            f"no gradient of {getattr(fn, '__name__', fn)!r} reaches {len(cut)} of {len(every)} adapted weights: "
            f"{names(cut, every)}. They are behind a stop_gradient, a rounding or an integer, or feed another result, "
            "and would not be trained: leave them out with targets="
        )


def names(some: Sequence[tuple[int, str]], every: Sequence[tuple[int, str]], limit: int = 5) -> str:
    """Weights for an error, and in which of several adapted trees each is."""
    several = len({tree for tree, _ in every}) > 1
    shown = [f"{path!r} of adapted tree {tree + 1}" if several else repr(path) for tree, path in some[:limit]]
    return ", ".join(shown) + (", ..." if len(some) > limit else "")
