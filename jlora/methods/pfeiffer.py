"""Pfeiffer's adapters: one bottleneck a layer, behind the MLP."""

import jax
import jax.numpy as jnp

from jlora.methods.bottleneck import in_series
from jlora.methods.houlsby import MLP_OUT
from jlora.methods.method import Method


def pfeiffer(rank: int, *, nonlinearity: str = "relu", layer_norm: bool = False, std: float = 2e-2) -> Method:
    """Pfeiffer's adapters: `h + f(N(h) D + d) U + u` on the output h of every MLP, half of `houlsby`'s.

    They stand where the LoRA paper has its "Adapter_P" and "Adapter_L": behind the MLP's last projection, before the
    residual connection. (AdapterFusion's own stand behind that connection and the model's LayerNorm.)

    Args:
      rank: r, the width of the bottleneck: D is (width, r), U (r, width).
      nonlinearity: f: "relu", "gelu", "silu", "tanh" or "identity".
      layer_norm: whether N is a LayerNorm of the adapter's own, trained too: "Adapter_L".
      std: of the initial D and U, which are normal.

    Raises:
      ValueError: for a rank that is no integer of at least 1, an unknown nonlinearity, or a negative std.

    Source: Pfeiffer et al., "AdapterFusion", arXiv 2005.00247; with `layer_norm` Lin et al., arXiv 2004.03829.
    Parameters: 2 * width * r + r + width an adapter, and 2 * width for its LayerNorm (arXiv 2106.09685, section 5.1).

    Example:
      >>> import jlora
      >>> jlora.pfeiffer(16).rank
      16
    """
    draw = lambda key, shape: jax.random.normal(key, shape, jnp.float32)
    return in_series("pfeiffer", rank, nonlinearity, layer_norm, std, draw, (MLP_OUT,))
