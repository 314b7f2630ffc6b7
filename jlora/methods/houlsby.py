"""Houlsby's adapters: a bottleneck on the output of every sub-layer."""

import jax
import jax.numpy as jnp

from jlora.methods.bottleneck import in_series
from jlora.methods.method import Method

# The last kernels of attentions and of MLPs, by the names that models in linen give them.
ATTENTION_OUT = r"(?i:(^|/)\w*(attn|attention)(_?\d+)?/(out|o|wo|c_proj|o_proj|out_proj|proj|output/dense)/kernel$)"
MLP_OUT = (
    r"(?i:(^|[/_])(mlp|mlp_?block|ffn|ff|feed_?forward|densereludense)(_?\d+)?"
    r"/(proj|wo|fc2|fc_2|fc_out|lin2|linear2|down|down_proj|c_proj|dense_1|output)/kernel$)"
    r"|(^|/)layers?[/_]\d+/(fc2|output/dense)/kernel$"
)


def houlsby(rank: int, *, nonlinearity: str = "gelu", layer_norm: bool = False, std: float = 1e-2) -> Method:
    """Houlsby's adapters: `h + f(N(h) D + d) U + u` on the output h of every attention and every MLP.

    Each stands behind the last projection of its sub-layer, before the residual connection (and before the sub-layer's
    dropout, if it has one). D and U are drawn from N(0, std^2), cut off at two standard deviations, so that the start
    is near the base, not at it. They act on activations: the model stays slower for it, and `merge` refuses.

    With weights of other names than Flax's models have, `targets=` of `apply` says which kernels end a sub-layer. The
    model's own LayerNorms, which the paper trains, too, are `extras=` of `apply`.

    Args:
      rank: r, the width of the bottleneck: D is (width, r), U (r, width).
      nonlinearity: f: "gelu" (the paper's code), "relu", "silu", "tanh" or "identity".
      layer_norm: whether N is a LayerNorm of the adapter's own, trained too (2 * width parameters more), or nothing.
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
    draw = lambda key, shape: jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    return in_series("houlsby", rank, nonlinearity, layer_norm, std, draw, (ATTENTION_OUT, MLP_OUT))
