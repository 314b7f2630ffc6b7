"""The names that the authors' code has for a UNet's modules: of single-file checkpoints and of kohya's SDXL files.

Source: https://github.com/CompVis/latent-diffusion, ldm/modules/diffusionmodules/openaimodel.py.
"""

from collections.abc import Iterable, Sequence

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
STEM = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2",
}  # fmt: skip


def ldm_names(modules: Iterable[str]) -> dict[str, str]:
    """The names that the authors' code, and kohya's SDXL files, have for the modules of a UNet.

    >>> names = ldm_names(["down_blocks.0.resnets.1.conv1", "up_blocks.0.upsamplers.0.conv"])
    >>> list(names.values())
    ['input_blocks.2.0.in_layers.2', 'output_blocks.2.1.conv']
    """
    split = [module.split(".") for module in modules]
    attends = {parts[1] for parts in split if parts[0] == "up_blocks" and parts[2:3] == ["attentions"]}
    resnets = [int(parts[3]) for parts in split if parts[:3] == ["down_blocks", "0", "resnets"]]
    per_block = 2 + max(resnets, default=-1)
    found: dict[str, str] = {}
    for parts in split:
        name = _ldm_name(parts, per_block, attends)
        if name is not None:
            found[".".join(parts)] = name
    return found


def _ldm_name(parts: Sequence[str], n: int, attends: set[str]) -> str | None:
    """`n` blocks of the input, or of the output, are one of diffusers'."""
    match parts:
        case ["down_blocks", i, "resnets", j, layer] if layer in RESNET:
            return f"input_blocks.{n * int(i) + int(j) + 1}.0.{RESNET[layer]}"
        case ["down_blocks", i, "attentions", j, *rest]:
            return ".".join([f"input_blocks.{n * int(i) + int(j) + 1}.1", *rest])
        case ["down_blocks", i, "downsamplers", "0", "conv"]:
            return f"input_blocks.{n * (int(i) + 1)}.0.op"
        case ["mid_block", "resnets", j, layer] if layer in RESNET:
            return f"middle_block.{2 * int(j)}.{RESNET[layer]}"
        case ["mid_block", "attentions", "0", *rest]:
            return ".".join(["middle_block.1", *rest])
        case ["up_blocks", i, "resnets", j, layer] if layer in RESNET:
            return f"output_blocks.{n * int(i) + int(j)}.0.{RESNET[layer]}"
        case ["up_blocks", i, "attentions", j, *rest]:
            return ".".join([f"output_blocks.{n * int(i) + int(j)}.1", *rest])
        case ["up_blocks", i, "upsamplers", "0", "conv"]:
            return f"output_blocks.{n * int(i) + n - 1}.{2 if i in attends else 1}.conv"
    return STEM.get(".".join(parts))
