"""Prompt tuning: trained embeddings before those of the tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.intercept import Adapter, Interceptor, Note, adapter_of, adapters_within, bound_arguments, check_cut
from jlora.methods.houlsby import as_it_is
from jlora.methods.method import Activation, Arrays, Config, Factors, Method, check_rank
from jlora.sites import Site

TOKEN_TABLE = (
    r"(?i)(^|/)(wte|word_embeddings|embed_tokens|tok_embeddings|token_embedding|token_embed|embed|embedder|shared)"
    r"/(embedding|input_embedding)$"
)
TOKENS = ("tokens", "input_ids", "ids", "inputs")
MASKS = ("attention_mask", "mask", "padding_mask")
POSITIONS = ("position_ids", "positions")
TYPES = ("token_type_ids", "segment_ids")
NEEDS = "a Flax linen model that is called with tokens (batch, length) and looks them up once in the adapted table"


def prompt_tuning(length: int, *, tokens: Sequence[int] | None = None) -> Method:
    """Prompt tuning: the embeddings `[P; E(tokens)]` in place of `E(tokens)`, P trained.

    The model is called with `length` tokens more, whose embeddings are P; what it returns for them is cut off again, so
    that a loss written for the tokens alone stays as it is. Masks (batch, length), positions and types of tokens that
    the model takes beside its tokens are lengthened along. `merge` refuses: there are no weights of this function.

    Args:
      length: of the prompt, in tokens; length * width parameters.
      tokens: as many tokens, whose embeddings P starts as; random rows of the table when None.

    Raises:
      ValueError: for a length that is no integer of at least 1, or another number of tokens; in `apply` unless exactly
        one embedding table is adapted; when the lifted function is traced, for a model that is not called so.

    Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691, section 2.

    Example:
      >>> import jlora
      >>> jlora.prompt_tuning(20)
      prompt_tuning(length=20, tokens=None)
    """
    check_rank(length, "length")
    start = None if tokens is None else tuple(int(token) for token in tokens)
    if start is not None and len(start) != length:
        raise ValueError(f"tokens must be as many as length={length}, not {len(start)}")
    config: Config = (("name", "prompt_tuning"), ("length", length), ("tokens", start))

    def init(key: jax.Array, w: jax.Array, site: Site) -> Arrays:
        vocabulary, _ = check_table(site, "prompt_tuning")
        if start is not None and not all(0 <= token < vocabulary for token in start):
            raise ValueError(f"prompt_tuning: tokens must be within the {vocabulary} rows of {site.path!r}")
        rows = jax.random.randint(key, (length,), 0, vocabulary) if start is None else jnp.asarray(start)
        return {"prompt": w[rows].astype(jnp.float32)}

    return Method(
        config, length, None, init, as_it_is, targets=TOKEN_TABLE,
        activation=Activation(intercept, NEEDS, prepare=only_one),
    )  # fmt: skip


def check_table(site: Site, method: str) -> tuple[int, int]:
    """(vocabulary, width) of a table of embeddings.

    Raises:
      ValueError: if the site is something else.
    """
    if site.kind != "embedding" or len(site.shape) != 2 or site.stack_axes or site.in_axes != (0,):
        raise ValueError(
            f"{method} belongs to a table of embeddings (vocabulary, width); {site.path!r} of shape {site.shape} is "
            f"{site.kind}: choose the tokens' table with targets="
        )
    return site.shape[0], site.shape[1]


def only_one(factors: Factors, sites: Sequence[Site]) -> Factors:
    """The prompt's factors, after a check that there is one table."""
    if len(sites) != 1:
        raise ValueError(
            f"a prompt belongs to one table of embeddings, and {len(sites)} are adapted: "
            f"{', '.join(repr(site.path) for site in sites)}; choose the tokens' with targets="
        )
    return {sites[0].path: factors[sites[0].path]}


# -- where the prompt meets the tokens ---------------------------------------------------------------------------------


def intercept(method: Method, note: Note) -> Interceptor:
    """Lengthens the tokens of the model's call, puts the prompt in their place, and cuts the results."""
    inside: list[int] = []  # the lengths of the prompted sequences: not empty while the model runs
    looked_up: list[str] = []

    def act(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if module.scope is None:
            return proceed(*args, **kwargs)
        if inside:
            adapter = adapter_of(module, method) if context.method_name == "__call__" else None
            out = proceed(*args, **kwargs)
            return out if adapter is None else _prompted(adapter, out, inside[-1], looked_up)
        adapters = adapters_within(module.variables.get("params", {}), method)
        if module.path or not adapters:
            return proceed(*args, **kwargs)
        name, length = method.name, check_cut(adapters[0], "prompt", 2).shape[0]
        before = _shapes(context, args, kwargs)
        bound, tokens = _lengthened(name, bound_arguments(context, args, kwargs), length)
        note(adapters[0].site, name, 0, type(module).__name__)
        inside.append(tokens + length)
        try:
            out = proceed(*bound.args, **bound.kwargs)
        finally:
            inside.pop()
        if not looked_up:
            raise ValueError(
                f"{name}: {type(module).__name__} does not look its tokens up in {adapters[0].site.path!r}"
            )
        looked_up.clear()
        return jax.tree.map(lambda x, shape: _cut(x, shape, length), out, before)

    def _shapes(context: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns without a prompt, as shapes."""
        module, variables = context.module, context.module.variables
        rngs = {stream: jax.random.key(0) for stream in module.scope.rngs}

        def plain() -> Any:
            unbound = module.clone(parent=None)
            return unbound.apply(variables, *args, rngs=rngs, mutable=True, method=context.method_name, **kwargs)[0]

        inside.append(0)  # the same interceptor sees this call, and leaves it alone
        try:
            return jax.eval_shape(plain)
        finally:
            inside.pop()

    return act


def _prompted(adapter: Adapter, out: jax.Array, whole: int, looked_up: list[str]) -> jax.Array:
    """Embeddings (batch, length + tokens, width) with the prompt in the first places."""
    prompt = adapter.arrays["prompt"].astype(out.dtype)
    if not whole:  # the call that only tells shapes
        return out
    if looked_up or out.ndim != 3 or out.shape[1] != whole:
        raise ValueError(
            f"{adapter.owner.name}: the table {adapter.site.path!r} is looked up "
            f"{'twice' if looked_up else f'for an array of shape {out.shape[:-1]}'} in one call of the model, and not "
            "once for its tokens (batch, length): which of them the prompt belongs to is not known"
        )
    looked_up.append(adapter.site.path)
    wide = jnp.broadcast_to(prompt, (out.shape[0], *prompt.shape))
    return jnp.concatenate([wide, out[:, prompt.shape[0] :]], axis=1)


def _lengthened(name: str, bound: Any, length: int) -> tuple[Any, int]:
    """The model's arguments with `length` tokens more, and the number of tokens before."""
    bound.apply_defaults()
    arrays = {n: x for n, x in _flat(bound).items() if hasattr(x, "shape") and hasattr(x, "dtype")}
    whole = [n for n, x in arrays.items() if x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.integer)]
    tokens = next((n for n in TOKENS if n in whole), whole[0] if whole else None)
    if tokens is None:
        shapes = ", ".join(f"{n} {tuple(x.shape)} {x.dtype}" for n, x in arrays.items())
        raise ValueError(f"{name}: the model is called without tokens, integers (batch, length); it takes {shapes}")
    batch, size = arrays[tokens].shape
    for n, x in arrays.items():
        if size not in x.shape[1:] and x.shape[:1] != (size,):
            continue
        first = lambda fill, x=x: jnp.concatenate([jnp.full((batch, length), fill, x.dtype), x], axis=1)
        if x.shape != (batch, size) or n not in (tokens, *MASKS, *POSITIONS, *TYPES):
            if x.shape[:1] == (size,) and size == batch and size not in x.shape[1:]:
                continue  # one number per example
            raise ValueError(f"{name}: how the argument {n!r} of shape {tuple(x.shape)} is lengthened is not known")
        if n in POSITIONS:
            places = jnp.broadcast_to(jnp.arange(length, dtype=x.dtype)[None], (batch, length))
            longer = jnp.concatenate([places, x + jnp.asarray(length, x.dtype)], axis=1)
        else:
            longer = first(1 if n in MASKS else 0)
        _set(bound, n, longer)
    return bound, size


def _flat(bound: Any) -> dict[str, Any]:
    """The arguments by name, those under **kwargs too."""
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        found |= value if isinstance(value, Mapping) else {name: value}
    return found


def _set(bound: Any, name: str, value: Any) -> None:
    if name in bound.arguments:
        bound.arguments[name] = value
        return
    for inner in bound.arguments.values():
        if isinstance(inner, dict) and name in inner:
            inner[name] = value


def _cut(x: Any, shape: Any, length: int) -> Any:
    """An array without what was returned for the prompt: along every axis that is longer than without it."""
    if not hasattr(x, "shape") or x.shape == shape.shape:
        return x
    for axis, (mine, plain) in enumerate(zip(x.shape, shape.shape, strict=True)):
        if mine == plain + length:
            x = jax.lax.slice_in_dim(x, length, mine, axis=axis)
    return x
