"""Pfeiffer's adapters: one bottleneck a layer, behind the MLP."""

from jlora.methods.houlsby import MLP_OUT, in_series
from jlora.methods.method import Method


def pfeiffer(rank: int, *, nonlinearity: str = "relu", layer_norm: bool = False, std: float = 2e-2) -> Method:
    """Pfeiffer's adapters: `h + f(h D + d) U + u` on the output h of every MLP, half of `houlsby`'s.

    Args:
      rank: r, the width of the bottleneck: D is (width, r), U (r, width).
      nonlinearity: f: "relu", "gelu", "silu", "tanh" or "identity".
      layer_norm: a LayerNorm of the adapter's own before D, trained too: the "Adapter_L" of the LoRA paper.
      std: of the initial D and U.

    Raises:
      ValueError: for a rank that is no integer of at least 1, an unknown nonlinearity, or a negative std.

    Source: Pfeiffer et al., "AdapterFusion", arXiv 2005.00247; with `layer_norm` Lin et al., arXiv 2004.03829.
    Parameters: 2 * width * r + r + width an adapter, and 2 * width for its LayerNorm (arXiv 2106.09685, section 5.1).

    Example:
      >>> import jlora
      >>> jlora.pfeiffer(16).rank
      16
    """
    return in_series("pfeiffer", rank, nonlinearity, layer_norm, std, MLP_OUT)
