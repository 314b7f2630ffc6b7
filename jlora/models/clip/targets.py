"""Sets of a text encoder's weights to adapt: patterns as in `jlora.models.unet.targets`.

They fit the towers of `CLIP`, too: "^text/.*" + ATTENTION is that of texts alone.
"""

ATTENTION = r"attn/(query|key|value|out)/kernel$"
"""All attention: of diffusers' training scripts."""
ALL = r"(attn/(query|key|value|out)|mlp/(fc|proj))/kernel$"
"""All linear layers of the blocks: kohya's default."""

TARGETS = {"attention": ATTENTION, "all": ALL}
"""The sets by name; the usual one is first."""
