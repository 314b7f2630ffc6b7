"""The bottleneck of adapters: a small network on the activations of a module, in series or in parallel."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.methods.acts import Arrays, OnActivations
from jlora.methods.checks import check_number, check_rank
from jlora.methods.method import Config, Method
from jlora.transform.intercept import Adapter, Interceptor, adapter_of, check_cut, of_calls, stacked
from jlora.transform.marks import mark
from jlora.transform.sites import Target

NONLINEARITIES: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
    "identity": lambda x: x,
}
EPSILON = 1e-5  # of the LayerNorm
Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def in_series(
    name: str, rank: int, nonlinearity: str, layer_norm: bool, std: float, draw: Draw, targets: tuple[str, ...]
) -> Method:
    """The method `h + f(N(h) D + d) U + u` on the outputs h of the modules that hold the weights.

    Args:
      name: of the method.
      rank, nonlinearity, layer_norm, std: as `houlsby` has them.
      draw: (key, shape) -> the initial D and U, over std.
      targets: the patterns that the method goes by.
    """
    rank, std = check_rank(rank), check_number(std, "std")
    check_nonlinearity(nonlinearity)
    if not isinstance(layer_norm, bool):
        raise ValueError(f"layer_norm must be True or False, not {layer_norm!r:.200}")
    if std < 0:
        raise ValueError(f"std must be at least 0, not {std!r}")
    config: Config = (
        ("name", name), ("rank", rank), ("nonlinearity", nonlinearity), ("layer_norm", layer_norm), ("std", std),
    )  # fmt: skip

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        width = out_width(target)
        down, up = jax.random.split(key)
        drawn = lambda key, *shape: std * draw(key, stacked(shape, target))
        zeros = lambda n: jnp.zeros(stacked((n,), target), jnp.float32)
        arrays = {
            "down": drawn(down, width, target.rank),
            "down_bias": zeros(target.rank),
            "up": drawn(up, target.rank, width),
            "up_bias": zeros(width),
        }
        return arrays | ({"scale": zeros(width) + 1.0, "offset": zeros(width)} if layer_norm else {})

    def act(adapter: Adapter, h: jax.Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.Array:
        return h + bottleneck(adapter, h, NONLINEARITIES[nonlinearity])

    def features(target: Target) -> tuple[int, ...]:
        return tuple(target.shape[i] for i in target.out_axes)

    needs = "the output of the Flax linen module that holds each weight, in its __call__"
    return Method(config, rank, None, OnActivations(init, on_outputs(name, features, act), needs, targets))


def bottleneck(adapter: Adapter, x: jax.Array, nonlinearity: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`f(N(x) D + d) U + u`: (..., width) -> (..., width), in x's dtype; N is a LayerNorm or nothing."""
    matrix = lambda name: check_cut(adapter, name, 2).astype(x.dtype)
    row = lambda name: check_cut(adapter, name, 1).astype(x.dtype).reshape(*[1] * (x.ndim - 1), -1)
    z = x
    if "scale" in adapter.arrays:
        z = normalised(x) * row("scale") + row("offset")
    z = nonlinearity(z @ matrix("down") + row("down_bias"))  # (..., rank)
    return z @ matrix("up") + row("up_bias")  # (..., width)


def normalised(x: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + EPSILON)).astype(x.dtype)


def on_outputs(
    name: str,
    features: Callable[[Target], tuple[int, ...]],
    act: Callable[[Adapter, jax.Array, tuple[Any, ...], dict[str, Any]], jax.Array],
) -> Callable[[Method], Interceptor]:
    """Puts `act(adapter, h, args, kwargs)` in place of what a module returns.

    h is (..., width): the axes of `features(target)`, several for an `nn.DenseGeneral`, are one.
    """

    def make(method: Method) -> Interceptor:
        def intercept(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
            adapter = adapter_of(context.module, method)
            out = proceed(*args, **kwargs)
            if adapter is None:
                return out
            last, shape = features(adapter.site), tuple(getattr(out, "shape", ()))
            width, apart = math.prod(last), shape[-len(last) :] == last
            rows = shape[: -len(last)] if apart else shape[:-1]
            if not (apart or shape[-1:] == (width,)):
                got = f"an array of shape {shape}" if shape else type(out).__name__
                raise ValueError(
                    f"{name}: the adapter of {adapter.site.path!r} is {width} wide, and its module "
                    f"{type(context.module).__name__} returns {got}; choose another weight with targets="
                )
            rank = adapter.arrays["down"].shape[-1]
            flops = 4 * math.prod(rows) * width * rank
            with mark(adapter.site.path, name, rank, flops, type(context.module).__name__, adapter.tree):
                return act(adapter, out.reshape(*rows, width), args, kwargs).reshape(shape)

        return of_calls(intercept)

    return make


def out_width(target: Target) -> int:
    """The number of outputs of a weight."""
    return math.prod(target.shape[i] for i in target.out_axes)


def check_nonlinearity(name: str) -> None:
    """Raises ValueError for an unknown nonlinearity."""
    if not isinstance(name, str) or name not in NONLINEARITIES:
        raise ValueError(f"nonlinearity must be one of {', '.join(map(repr, NONLINEARITIES))}, not {name!r:.200}")
