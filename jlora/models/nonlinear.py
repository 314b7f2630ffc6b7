"""The nonlinearities that configs name."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

_tanh_gelu = partial(jax.nn.gelu, approximate=True)
NONLINEARITIES: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def check_nonlinearity(name: str) -> None:
    """Raises a ValueError for a name that is not in `NONLINEARITIES`."""
    if name not in NONLINEARITIES:
        raise ValueError(f"nonlinearity={name!r} is not one of {', '.join(NONLINEARITIES)}")
