"""Prompt tuning: trained embeddings before those of the tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.methods.acts import Arrays, Factors, OnActivations
from jlora.methods.checks import check_integers, check_rank
from jlora.methods.method import Config, Method
from jlora.transform.intercept import (
    Adapter,
    Interceptor,
    adapter_of,
    adapters_within,
    bound_arguments,
    check_cut,
    joined,
)
from jlora.transform.marks import mark
from jlora.transform.sites import Target

TOKEN_TABLE = (
    r"(?i)(^|/)(wte|word_embeddings|embed_tokens|tok_embeddings|token_embedding|token_embed|embed|embedder|shared)"
    r"/(embedding|input_embedding)$"
)
TOKENS = ("tokens", "input_ids", "ids", "inputs")
MASKS = ("attention_mask", "mask")  # of integers or booleans: 1 where a token is seen
POSITIONS = ("position_ids", "positions")
TYPES = ("token_type_ids", "segment_ids")
NEEDS = "a Flax linen model that is called with tokens (batch, length) and looks them up once in the adapted table"


def prompt_tuning(length: int, *, tokens: Sequence[int] | None = None) -> Method:
    """Prompt tuning: the embeddings `[P; E(tokens)]` in place of `E(tokens)`, P trained.

    The model is called with `length` tokens more, whose embeddings are P; what it returns for them is cut off again, so
    that a loss written for the tokens alone stays as it is. Masks (batch, length), positions and types of tokens that
    the model takes beside its tokens are lengthened, too. With a decoder's cache (`jlora.models`) the first call,
    whose cache is empty, writes the prompt into slots that it adds; later ones go on behind it. `merge` refuses: there
    are no weights of this function.

    Args:
      length: of the prompt, in tokens; length * width parameters.
      tokens: as many tokens, whose embeddings P starts as; random rows of the table when None.

    Raises:
      ValueError: for a length that is no integer of at least 1, tokens that are no integers or another number of them;
        in `apply` unless exactly one embedding table is adapted; when the lifted function is traced, for a model that
        is not called so.

    Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691, section 2.

    Example:
      >>> import jlora
      >>> jlora.prompt_tuning(20)
      prompt_tuning(length=20, tokens=None)
    """
    length = check_rank(length, "length")
    start = None if tokens is None else check_integers(tokens, "tokens")
    if start is not None and len(start) != length:
        raise ValueError(f"tokens must be as many as length={length}, not {len(start)}")
    config: Config = (("name", "prompt_tuning"), ("length", length), ("tokens", start))

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        vocabulary, _ = check_table(target, "prompt_tuning")
        rows = None if start is None else jnp.asarray(start)
        if rows is None:
            rows = jax.random.randint(key, (target.rank,), 0, vocabulary)
        elif target.rank != length or not all(0 <= token < vocabulary for token in start or ()):
            raise ValueError(
                f"prompt_tuning: tokens must be {target.rank}, as long as the prompt is, within the {vocabulary} rows "
                f"of {target.path!r}"
            )
        return {"prompt": w[rows].astype(jnp.float32)}

    return Method(config, length, None, OnActivations(init, intercept, NEEDS, (TOKEN_TABLE,), prepare=only_one))


def check_table(target: Target, method: str) -> tuple[int, int]:
    """(vocabulary, width) of a table of embeddings.

    Raises:
      ValueError: if the target is something else.
    """
    if target.kind != "embedding" or len(target.shape) != 2 or target.stack_axes or target.in_axes != (0,):
        raise ValueError(
            f"{method} belongs to a table of embeddings (vocabulary, width); {target.path!r} of shape {target.shape} "
            f"is {target.kind}: choose the tokens' table with targets="
        )
    return target.shape[0], target.shape[1]


def only_one(factors: Factors, targets: Sequence[Target]) -> Factors:
    """The prompt's factors, after a check that there is one table."""
    if len(targets) != 1:
        raise ValueError(
            f"a prompt belongs to one table of embeddings, and {len(targets)} are adapted: "
            f"{', '.join(repr(target.path) for target in targets)}; choose the tokens' with targets="
        )
    return {targets[0].path: factors[targets[0].path]}


# -- where the prompt meets the tokens ---------------------------------------------------------------------------------


def intercept(method: Method) -> Interceptor:
    """Lengthens the tokens of the model's call, puts the prompt in their place, and cuts the results."""
    inside: list[int] = []  # the lengths of the prompted sequences: not empty while the model runs
    looked_up: list[str] = []
    tables: list[int] = []  # whose calls are running

    def act(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if module.scope is None or context.method_name == "setup":
            return proceed(*args, **kwargs)
        if inside:
            adapter = adapter_of(module, method) if context.method_name == "__call__" else None
            if adapter is None or not inside[-1] or tables[-1:] == [id(module)]:  # the last: by super() in its own call
                return proceed(*args, **kwargs)
            tables.append(id(module))
            try:
                out = proceed(*args, **kwargs)
            finally:
                tables.pop()
            return _prompted(adapter, out, inside[-1], looked_up)
        adapters = [] if module.path else adapters_within(module.variables.get("params", {}), method)
        if not adapters:
            return proceed(*args, **kwargs)
        length = check_cut(adapters[0], "prompt", 2).shape[0]
        if module.variables.get("cache"):
            raise ValueError(
                f"{method.name}: {type(module).__name__} keeps what it has read in a collection of variables, 'cache', "
                "which has no place for a prompt; call it with whole sequences"
            )
        bound = bound_arguments(context, args, kwargs)
        cache = _cache(bound)
        if cache is not None and not _is_empty(cache):
            inside.append(0)
            try:
                return _continued(adapters[0], bound, cache, length, proceed)
            finally:
                inside.pop()
        bound, tokens = _lengthened(method.name, bound, length)
        inside.append(0)  # the same interceptor sees the call that only tells shapes, and leaves it alone
        try:
            plain = _plain_shapes(context, args, kwargs)
            inside[-1] = tokens + length
            out = proceed(*bound.args, **bound.kwargs)
        finally:
            inside.pop()
        if not looked_up:
            table = adapters[0].site.path
            raise ValueError(f"{method.name}: {type(module).__name__} does not look its tokens up in {table!r}")
        looked_up.clear()
        return jax.tree.map(lambda x, shape: _cut(method.name, x, shape, length), out, plain, is_leaf=_is_cache)

    return act


def _is_cache(x: Any) -> bool:
    """Whether it is a decoder's cache of what it has read: it has `used`, `virtual` and `with_prompt(length)`."""
    return hasattr(x, "with_prompt")


def _cache(bound: Any) -> Any:
    """The cache among the arguments, or None."""
    return next(filter(_is_cache, _flat(bound).values()), None)


def _is_empty(cache: Any) -> bool:
    """Whether a call is the first with its cache: the prompt is written then, and stays in it.

    Under jit an empty cache is known to be one where it was made in the same program. What is not known is checked by
    `_continued`.
    """
    try:
        return int(cache.used) == 0
    except jax.errors.ConcretizationTypeError:
        return False


def _continued(adapter: Adapter, bound: Any, cache: Any, length: int, proceed: Callable[..., Any]) -> Any:
    """A call that goes on with a cache that has the prompt: positions count it, and nothing is lengthened.

    Raises:
      ValueError: if it does not have the prompt. Under jit the results are NaN instead.
    """
    name = adapter.owner.name
    try:
        prompted = int(cache.virtual) == length  # a number first: within a trace every operation is traced
    except jax.errors.ConcretizationTypeError:
        prompted = True
    if not prompted:
        raise ValueError(
            f"{name}: the cache has tokens, {int(cache.used)}, and not the prompt of {length} before them: begin with "
            "an empty cache"
        )
    positions = [n for n, x in _flat(bound).items() if n in POSITIONS and hasattr(x, "dtype")]
    if not positions:
        raise ValueError(f"{name}: a call with a cache needs the positions of its tokens: {' or '.join(POSITIONS)}")
    with mark(adapter.site.path, name, length, 0, "Embed", adapter.tree):
        _replace(bound, {n: _flat(bound)[n] + jnp.asarray(length, _flat(bound)[n].dtype) for n in positions})
    has_prompt = lambda x: jnp.where(cache.virtual == length, x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.inexact) else x
    out = proceed(*bound.args, **bound.kwargs)
    return jax.tree.map(
        lambda x: x if _is_cache(x) or not hasattr(x, "dtype") else has_prompt(x), out, is_leaf=_is_cache
    )


def _plain_shapes(context: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Results of the model without a prompt, arrays as shapes."""
    module, variables = context.module, context.module.variables
    rngs = {stream: jax.random.key(0) for stream in module.scope.rngs}
    fills: list[Any] = []

    def plain() -> Any:
        unbound = module.clone(parent=None)
        out, _ = unbound.apply(variables, *args, rngs=rngs, mutable=True, method=context.method_name, **kwargs)
        arrays, fill = tree.split(out)
        fills.append(fill)
        return arrays

    shapes = jax.eval_shape(plain)
    return fills[-1](shapes)


def _prompted(adapter: Adapter, out: jax.Array, whole: int, looked_up: list[str]) -> jax.Array:
    """Embeddings (batch, length + tokens, width) with the prompt in the first places."""
    prompt, name = adapter.arrays["prompt"].astype(out.dtype), adapter.owner.name
    if looked_up or out.ndim != 3 or out.shape[1] != whole:
        raise ValueError(
            f"{name}: the table {adapter.site.path!r} is looked up "
            f"{'twice' if looked_up else f'for an array of shape {out.shape[:-1]}'} in one call of the model, and not "
            "once for its tokens (batch, length): which of them the prompt belongs to is not known"
        )
    looked_up.append(adapter.site.path)
    with mark(adapter.site.path, name, prompt.shape[0], 0, "Embed", adapter.tree):
        wide = jnp.broadcast_to(prompt, (out.shape[0], *prompt.shape))
        return joined(wide, out[:, prompt.shape[0] :], axis=1)


def _lengthened(name: str, bound: Any, length: int) -> tuple[Any, int]:
    """The model's arguments with `length` tokens more, and the number of tokens before."""
    bound.apply_defaults()
    arrays = {n: x for n, x in _flat(bound).items() if hasattr(x, "shape") and hasattr(x, "dtype")}
    is_integer = lambda x: jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool
    whole = [n for n, x in arrays.items() if x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.integer)]
    tokens = next((n for n in TOKENS if n in whole), whole[0] if whole else None)
    if tokens is None:
        shapes = ", ".join(f"{n} {tuple(x.shape)} {x.dtype}" for n, x in arrays.items()) or "no arrays"
        raise ValueError(f"{name}: the model is called without tokens, integers (batch, length); it takes {shapes}")
    batch, size = arrays[tokens].shape
    longer = {}
    for n, x in arrays.items():
        if size not in x.shape[1:] and (x.shape[:1] != (size,) or size == batch):
            continue  # nothing that is as long as the tokens; a number per example
        if x.shape != (batch, size) or not is_integer(x) or n not in (tokens, *MASKS, *POSITIONS, *TYPES):
            raise ValueError(
                f"{name}: how the argument {n!r}, {x.dtype} of shape {tuple(x.shape)}, is lengthened is not known"
            )
        start = jnp.full((batch, length), 1 if n in MASKS else 0, x.dtype)
        if n in POSITIONS:
            start = jnp.broadcast_to(jnp.arange(length, dtype=x.dtype)[None], (batch, length))
            x = x + jnp.asarray(length, x.dtype)
        longer[n] = joined(start, x, axis=1)
    longer |= {n: x.with_prompt(length) for n, x in _flat(bound).items() if _is_cache(x)}
    _replace(bound, longer)
    return bound, size


def _replace(bound: Any, new: dict[str, Any]) -> None:
    """Puts other values in the place of arguments, those under **kwargs too."""
    for n, value in bound.arguments.items():
        if isinstance(value, Mapping):  # a copy: the caller's batch stays as it is
            copy: Any = type(value)
            bound.arguments[n] = copy({**value, **{k: x for k, x in new.items() if k in value}})
        elif n in new:
            bound.arguments[n] = new[n]


def _flat(bound: Any) -> dict[str, Any]:
    """The arguments by name, those under **kwargs too."""
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        found |= value if isinstance(value, Mapping) else {name: value}
    return found


def _cut(name: str, x: Any, plain: Any, length: int) -> Any:
    """A result without what was returned for the prompt: along every axis that is longer by its length."""
    if _is_cache(x):
        return x
    if not hasattr(x, "shape"):
        return plain
    if x.ndim != plain.ndim or any(m not in (p, p + length) for m, p in zip(x.shape, plain.shape, strict=False)):
        raise ValueError(
            f"{name}: the model returns an array of shape {tuple(x.shape)} with a prompt of {length} tokens, and "
            f"{tuple(plain.shape)} without: which part of it belongs to the prompt is not known"
        )
    for axis, (mine, size) in enumerate(zip(x.shape, plain.shape, strict=True)):
        if mine != size:
            x = jax.lax.slice_in_dim(x, length, mine, axis=axis)
    return x
