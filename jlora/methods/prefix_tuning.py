"""Prefix tuning: trained keys and values that every query sees."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.methods.acts import SHARED, Arrays, Factors, OnActivations
from jlora.methods.checks import check_number, check_rank
from jlora.methods.method import Config, Method
from jlora.transform.intercept import (
    Adapter,
    Interceptor,
    adapters_below,
    bound_arguments,
    check_cut,
    joined,
    of_calls,
    stacked,
)
from jlora.transform.marks import mark
from jlora.transform.sites import Target

KEY, VALUE = r"(^|/)(key|k|k_proj|key_proj|to_k|wk)/kernel$", r"(^|/)(value|v|v_proj|value_proj|to_v|wv)/kernel$"
NEEDS = (
    "the attention modules of Flax linen (MultiHeadDotProductAttention and its kin) and modules that take query, key "
    "and value and say `takes_prefix = True`"
)


def prefix_tuning(length: int, *, hidden: int | None = None, std: float = 0.02) -> Method:
    """Prefix tuning: `softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]` in every attention, P_k and P_v trained.

    The prefix is seen by every query and is not masked; positions stay what they are. It acts on the attention of Flax
    linen (`nn.MultiHeadDotProductAttention`, with or without a mask, not with `decode=True`) and on modules that take
    (query, key, value, mask) and say `takes_prefix = True`: that they are right with more keys than queries, those
    before the others being seen by all. jlora's own models have such a module. `merge` refuses: no weights give this
    function.

    Args:
      length: of the prefix, in tokens; 2 * length * width parameters a layer.
      hidden: h, the width of the network that the paper trains instead of P: `P = tanh(E C + c) D + d`, E (length,
        width), C (width, h) and c shared by all layers, D (h, width) and d of each key and value. None for P itself.
        `bake_prompt` drops the network after training.
      std: of the initial P, or of E.

    Raises:
      ValueError: for a length or hidden that is no integer of at least 1, or a negative std; in `apply` for a weight
        that neither makes keys nor values, or one without the other.

    Source: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190, section 4.

    Example:
      >>> import jlora
      >>> jlora.prefix_tuning(8)
      prefix_tuning(length=8, hidden=None, std=0.02)
    """
    length = check_rank(length, "length")
    hidden = None if hidden is None else check_rank(hidden, "hidden")
    std = check_number(std, "std")
    if std < 0:
        raise ValueError(f"std must be at least 0, not {std!r}")
    config: Config = (("name", "prefix_tuning"), ("length", length), ("hidden", hidden), ("std", std))

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        _role(target)
        features = [target.shape[i] for i in target.out_axes]
        if hidden is None:
            shape = stacked((target.rank, *features), target)
            return {"prefix": std * jax.random.normal(key, shape, jnp.float32)}
        bound = hidden**-0.5  # as torch.nn.Linear starts
        shapes = {"weight": stacked((hidden, *features), target), "bias": stacked(features, target)}
        keys = dict(zip(shapes, jax.random.split(key), strict=True))
        return {n: jax.random.uniform(keys[n], shape, jnp.float32, -bound, bound) for n, shape in shapes.items()}

    def shared(key: jax.Array, targets: Sequence[Target]) -> Arrays:
        assert hidden is not None
        inputs = {_inputs(target) for target in targets}
        lengths = {target.rank for target in targets}
        if len(inputs) != 1 or len(lengths) != 1:
            raise ValueError(
                "prefix_tuning(hidden=): one network makes all prefixes, so that the inputs and the lengths must be "
                f"equal; got widths {sorted(inputs)} and lengths {sorted(map(int, filter(None, lengths)))}"
            )
        width, length = inputs.pop(), lengths.pop() or 0
        bound = width**-0.5
        embedding, weight, bias = jax.random.split(key, 3)
        return {
            "embedding": std * jax.random.normal(embedding, (length, width), jnp.float32),
            "weight": jax.random.uniform(weight, (width, hidden), jnp.float32, -bound, bound),
            "bias": jax.random.uniform(bias, (hidden,), jnp.float32, -bound, bound),
        }

    def prepare(factors: Factors, targets: Sequence[Target]) -> Factors:
        _check_pairs(targets)
        if hidden is None:
            return {target.path: factors[target.path] for target in targets}
        network = factors[SHARED]
        h = jnp.tanh(network["embedding"] @ network["weight"] + network["bias"][None])  # (length, hidden)
        return {target.path: {"prefix": _prefix(h, factors[target.path], target)} for target in targets}

    plain = None if hidden is None else prefix_tuning(length, std=std)
    network = None if hidden is None else shared
    acts = OnActivations(init, _intercept, NEEDS, (KEY, VALUE), network=network, prepare=prepare, plain=plain)
    return Method(config, length, None, acts)


def _prefix(h: jax.Array, arrays: Arrays, target: Target) -> jax.Array:
    """`h D + d` of one target, (length, features) or stacked as the weight is."""
    one = lambda weight, bias: jnp.tensordot(h, weight, 1) + bias[None]  # (length, *features)
    make = one
    for axis in sorted(target.stack_axes):  # the last one is the outermost, and takes its axis away first
        make = jax.vmap(make, in_axes=axis, out_axes=axis)
    return make(arrays["weight"], arrays["bias"])


def _inputs(target: Target) -> int:
    return math.prod(target.shape[i] for i in target.in_axes)


def _role(target: Target) -> str:
    """Whether a weight makes keys or values."""
    roles = [role for role, pattern in (("key", KEY), ("value", VALUE)) if re.search(pattern, target.path)]
    if len(roles) != 1:
        raise ValueError(
            f"prefix_tuning: {target.path!r} does not say whether it makes keys or values (kernels of modules named "
            "key and value, k and v, k_proj and v_proj, to_k and to_v do); choose those with targets="
        )
    return roles[0]


def _check_pairs(targets: Sequence[Target]) -> None:
    """Keys and values of one attention have prefixes of one length."""
    pairs: dict[str, dict[str, int | None]] = {}
    for target in targets:
        module, role = target.path.rsplit("/", 2)[0] if target.path.count("/") > 1 else "", _role(target)
        if role in pairs.setdefault(module, {}):
            raise ValueError(f"prefix_tuning: {module!r} makes its {role}s twice; choose one of them with targets=")
        pairs[module][role] = target.rank
    for module, lengths in pairs.items():
        if len(lengths) != 2 or len(set(lengths.values())) != 1:
            found = ", ".join(f"{role}: {length}" for role, length in lengths.items())
            raise ValueError(
                f"prefix_tuning: keys and values of {module!r} need prefixes of one length, got {found}; choose both "
                "with targets="
            )


# -- where the prefix meets the keys -----------------------------------------------------------------------------------


def _intercept(method: Method) -> Interceptor:
    def intercept(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module, parent = context.module, context.module.parent
        if isinstance(module, nn.MultiHeadDotProductAttention):
            prefixes = _prefixes(module, method)
            return proceed(*args, **kwargs) if not prefixes else _with_mask(proceed, args, kwargs, context, prefixes)
        if isinstance(parent, nn.MultiHeadDotProductAttention):
            # With normalize_qk the keys are those that the norm returns.
            made = {"key": "key_ln" if parent.normalize_qk else "key", "value": "value"}
            role = next((role for role, name in made.items() if name == module.name), None)
            adapter = _prefixes(parent, method).get(role) if role else None
            out = proceed(*args, **kwargs)
            return out if adapter is None else _lengthened(adapter, out, parent)
        if getattr(module, "takes_prefix", False) and isinstance(parent, nn.Module):
            prefixes = _prefixes(parent, method)
            if prefixes:
                return _core(proceed, args, kwargs, context, prefixes)
        return proceed(*args, **kwargs)

    return of_calls(intercept)


def _prefixes(module: nn.Module, method: Method) -> dict[str, Adapter]:
    """The prefixes of an attention's keys and values, by role."""
    return {_role(adapter.site): adapter for adapter in adapters_below(module.variables, method).values()}


def _core(
    proceed: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Any,
    prefixes: dict[str, Adapter],
) -> Any:
    """A module that takes (query, key, value, mask): the prefix goes before its keys and values."""
    module, bound = context.module, bound_arguments(context, args, kwargs)
    if not {"query", "key", "value"} <= set(bound.arguments):
        raise ValueError(
            f"prefix_tuning: {type(module).__name__} says `takes_prefix = True`, and is not called with query, key, "
            f"value (and mask) but with {', '.join(bound.arguments)}"
        )
    keys, length = bound.arguments["key"].shape[1], _length(prefixes)
    for role, adapter in prefixes.items():
        bound.arguments[role] = _lengthened(adapter, bound.arguments[role], module)
    if bound.arguments.get("mask") is not None:
        bound.arguments["mask"] = _widened(bound.arguments["mask"], keys, length)
    return proceed(*bound.args, **bound.kwargs)


def _with_mask(
    proceed: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Any,
    prefixes: dict[str, Adapter],
) -> Any:
    """Flax's attention: the mask is widened here; keys and values get the prefix where they are made."""
    module, attend = context.module, context.module.attention_fn
    if module.decode:
        raise ValueError(
            f"prefix_tuning: {type(module).__name__} with decode=True keeps keys in a cache of a fixed length, in "
            "which a prefix has no place"
        )
    if attend is not nn.dot_product_attention and not getattr(attend, "takes_prefix", False):
        raise ValueError(
            f"prefix_tuning: {type(module).__name__} attends by a function of its own, {attend!r}, which may count "
            "positions from the first key; if it does not, give it an attribute takes_prefix = True"
        )
    bound = bound_arguments(context, args, kwargs)
    if bound.arguments.get("mask") is not None:
        inputs = next(bound.arguments[n] for n in ("inputs_k", "inputs_kv", "inputs_q") if _given(bound, n))
        bound.arguments["mask"] = _widened(bound.arguments["mask"], inputs.shape[-2], _length(prefixes))
    return proceed(*bound.args, **bound.kwargs)


def _given(bound: Any, name: str) -> bool:
    return bound.arguments.get(name) is not None


def _length(prefixes: dict[str, Adapter]) -> int:
    return next(iter(prefixes.values())).site.rank


def _lengthened(adapter: Adapter, made: jax.Array, module: nn.Module) -> jax.Array:
    """Keys or values (batch..., tokens, heads, width) with the prefix before them."""
    target = adapter.site
    prefix = check_cut(adapter, "prefix", 1 + len(target.out_axes)).astype(made.dtype)
    if made.ndim < 3 or prefix[0].size != math.prod(made.shape[-2:]):
        raise ValueError(
            f"prefix_tuning: the prefix of {target.path!r} has {prefix[0].size} features, and {type(module).__name__} "
            f"is given an array of shape {made.shape}, not (batch, tokens, heads, width): heads that are repeated on "
            "the way have no place for a prefix"
        )
    # Every query meets `length` more keys, or values: as many multiply-adds as the tokens' own features times that.
    flops = 2 * made.size * prefix.shape[0]
    with mark(target.path, "prefix_tuning", prefix.shape[0], flops, type(module).__name__, adapter.tree):
        prefix = prefix.reshape(prefix.shape[0], *made.shape[-2:])  # (length, heads, width)
        wide = jnp.broadcast_to(prefix, (*made.shape[:-3], *prefix.shape))
        return joined(wide, made, axis=-3)


def _widened(mask: jax.Array, keys: int, length: int) -> jax.Array:
    """A mask (..., queries, keys) with the prefix's columns, all seen; one for all keys alike stays as it is."""
    if mask.shape[-1] != keys:
        return mask
    seen = jnp.ones((*mask.shape[:-1], length), mask.dtype)
    return joined(seen, mask, axis=-1)
