"""Bottleneck adapters in series: a small network on the output of every sub-layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.intercept import Adapter, Interceptor, Note, adapter_of, check_cut, layers, stacked
from jlora.methods.lora import low_rank
from jlora.methods.method import Activation, Arrays, Config, Method, check_number, check_rank
from jlora.sites import Site
from jlora.weight import Weight

ATTENTION_OUT = r"(?i:(attn|attention)[^/]*/(out|o|c_proj|o_proj|out_proj|proj|output/dense)/kernel$)"
MLP_OUT = (
    r"(?i:(mlp|ffn|ff|feed_?forward)[^/]*/(proj|wo|fc2|fc_2|down|down_proj|c_proj|dense_1|linear2)/kernel$)"
    r"|(^|/)layer/\d+/output/dense/kernel$"
)
NONLINEARITIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
    "identity": lambda x: x,
}
EPSILON = 1e-5  # of the LayerNorm


def houlsby(rank: int, *, nonlinearity: str = "gelu", layer_norm: bool = False, std: float = 1e-2) -> Method:
    """Houlsby's adapters: `h + f(h D + d) U + u` on the output h of every attention and every MLP.

    Each stands behind the last projection of its sub-layer, before the residual connection (and before the sub-layer's
    dropout, if it has one). D and U are drawn from N(0, std^2), so that the start is near the base, not at it. They act
    on activations: the model stays slower for it, and `merge` refuses.

    With weights of other names than Flax's models have, `targets=` of `apply` says which kernels end a sub-layer. The
    model's own LayerNorms, which the paper trains along, are `extras=` of `apply`.

    Args:
      rank: r, the width of the bottleneck: D is (width, r), U (r, width).
      nonlinearity: f: "gelu" (the paper's code), "relu", "silu", "tanh" or "identity".
      layer_norm: a LayerNorm of the adapter's own before D, trained too: 2 * width parameters more.
      std: of the initial D and U.

    Raises:
      ValueError: for a rank that is no integer of at least 1, an unknown nonlinearity, or a negative std.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, section 2.1 and 3.6; with
    `layer_norm` Lin et al., arXiv 2004.03829. Parameters: 2 * width * r + r + width an adapter (arXiv 2106.09685, 5.1).

    Example:
      >>> import jlora
      >>> jlora.houlsby(8)
      houlsby(rank=8, nonlinearity='gelu', layer_norm=False, std=0.01)
    """
    return in_series("houlsby", rank, nonlinearity, layer_norm, std, f"{ATTENTION_OUT}|{MLP_OUT}")


def in_series(name: str, rank: int, nonlinearity: str, layer_norm: bool, std: float, targets: str) -> Method:
    """The method that puts bottlenecks on the outputs of the modules that hold the weights."""
    rank, std = check_rank(rank), check_number(std, "std")
    check_nonlinearity(nonlinearity)
    if std < 0:
        raise ValueError(f"std must be at least 0, not {std!r}")
    config: Config = (
        ("name", name), ("rank", rank), ("nonlinearity", nonlinearity), ("layer_norm", bool(layer_norm)), ("std", std),
    )  # fmt: skip

    def init(key: jax.Array, w: jax.Array, site: Site) -> Arrays:
        assert site.rank is not None
        width = out_width(site)
        down, up = jax.random.split(key)
        normal = lambda key, *shape: std * jax.random.normal(key, stacked(shape, site), jnp.float32)
        zeros = lambda n: jnp.zeros(stacked((n,), site), jnp.float32)
        arrays = {
            "down": normal(down, width, site.rank),
            "down_bias": zeros(site.rank),
            "up": normal(up, site.rank, width),
            "up_bias": zeros(width),
        }
        return arrays | ({"scale": zeros(width) + 1.0, "offset": zeros(width)} if layer_norm else {})

    def act(adapter: Adapter, h: jax.Array, _: Any) -> jax.Array:
        return h + bottleneck(adapter, h, NONLINEARITIES[nonlinearity])

    needs = "the output of the Flax linen module that holds each weight, in its __call__"
    return Method(
        config, rank, None, init, as_it_is, targets=targets, activation=Activation(on_outputs(name, act), needs)
    )


def bottleneck(adapter: Adapter, x: jax.Array, nonlinearity: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`f(x D + d) U + u`: (..., width) -> (..., width), in x's dtype."""
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
    name: str, act: Callable[[Adapter, jax.Array, tuple[Any, ...]], jax.Array]
) -> Callable[[Method, Note], Interceptor]:
    """The interceptor that puts `act(adapter, h, args)` in place of the output h (..., width) of a module."""

    def make(method: Method, note: Note) -> Interceptor:
        def intercept(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
            out = proceed(*args, **kwargs)
            adapter = adapter_of(context.module, method) if context.method_name == "__call__" else None
            if adapter is None:
                return out
            width, kept = adapter.arrays["up"].shape[-1], 1
            shape = tuple(getattr(out, "shape", ()))
            while kept < len(shape) and _size(shape[-kept:]) < width:
                kept += 1  # several axes of features, as nn.DenseGeneral has them
            if not shape or _size(shape[-kept:]) != width:
                got = f"an array of shape {shape}" if shape else type(out).__name__
                raise ValueError(
                    f"{name}: the adapter of {adapter.site.path!r} is {width} wide, and its module "
                    f"{type(context.module).__name__} returns {got}; choose another weight with targets="
                )
            flat = out.reshape(*shape[:-kept], width)
            rows, rank = _size(flat.shape[:-1]), adapter.arrays["down"].shape[-1]
            note(adapter.site, name, 4 * rows * width * rank * layers(adapter.site), type(context.module).__name__)
            return act(adapter, flat, args).reshape(shape)

        return intercept

    return make


def out_width(site: Site) -> int:
    """The number of outputs of a weight."""
    return _size([site.shape[i] for i in site.out_axes])


def as_it_is(w: jax.Array, site: Site, factors: Arrays, buffers: Arrays) -> Weight:
    """The weight of a method that leaves weights alone."""
    return low_rank(w, site)


def check_nonlinearity(name: str) -> None:
    """Raises ValueError for an unknown one."""
    if name not in NONLINEARITIES:
        raise ValueError(f"nonlinearity must be one of {', '.join(map(repr, NONLINEARITIES))}, not {name!r}")


def _size(shape: Any) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
