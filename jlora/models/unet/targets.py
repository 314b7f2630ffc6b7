"""Sets of a UNet's weights to adapt: patterns for `targets=` of `jlora.apply`, and names for `jlora count --targets`.

They fit the paths of the parameters with `scan` and without, alone or within a tree of several models. In brackets the
number of weights in Stable Diffusion 1.x and 2.x, and in SDXL.
"""

_BLOCKS = r"(^|/)(down_blocks_\d+|mid_block|up_blocks_\d+)/"

CROSS_ATTENTION = r"attn2/to_(q|k|v|out)/kernel$"
"""Attention of the pixels to the text (64; 280)."""
ATTENTION = r"attn[12]/to_(q|k|v|out)/kernel$"
"""All attention: of diffusers' training scripts (128; 560)."""
TRANSFORMERS = _BLOCKS + r"attentions_\d+/.*kernel$"
"""Attention, MLPs, and the layers around the transformer blocks: kohya's default (192; 722)."""
LOCON = _BLOCKS + r".*kernel$"
"""All linear layers and convolutions of the blocks: also those of the residual blocks, of the time's projection and
between resolutions. LyCORIS's LoCon, and LCM-LoRA (278; 788)."""
ALL = r"kernel$"
"""And the first and the last convolution, and the embeddings of time and sizes (282; 794)."""

TARGETS = {
    "attention": ATTENTION, "cross_attention": CROSS_ATTENTION, "transformers": TRANSFORMERS, "locon": LOCON,
    "all": ALL,
}  # fmt: skip
"""The sets by name; the usual one is first."""
