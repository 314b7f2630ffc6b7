"""Runs a pipeline that jlora saved in diffusers: `python run_diffusers.py FOLDER INPUTS.npz RESULT.npz [ADAPTER ...]`.

INPUTS has `noise` (rows, 4, height, width) and `prompts`; RESULT gets `images` (rows, height, width, 3) of three steps, and for each
ADAPTER, a file of LoRA, `images/<its name>`. Warnings of the loader are errors. With SINGLE=a.safetensors in the environment, RESULT
gets `converted`: the greatest difference between that file's tensors, as diffusers converts them, and the folder's.
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import numpy as np
import torch
import transformers.integrations.peft
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

transformers.integrations.peft.MIN_PEFT_VERSION = "0.21.2"


class Said(diffusers.utils.logging.logging.Handler):
    """Warnings of diffusers' loggers, as errors."""

    def emit(self, record: object) -> None:
        raise RuntimeError(f"diffusers warns: {record.getMessage()}")


def main(folder: str, inputs: str, result: str, *adapters: str) -> None:
    given = np.load(inputs)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def images() -> np.ndarray:
        noise = torch.tensor(given["noise"])
        sides = {"height": 2 * noise.shape[2], "width": 2 * noise.shape[3]}
        return pipeline(
            list(map(str, given["prompts"])), latents=noise, num_inference_steps=3, output_type="np", **sides
        ).images

    found = {"images": images()}
    handler = Said(level="WARNING")
    for name in ("diffusers", "diffusers.loaders"):
        diffusers.utils.logging.get_logger(name).addHandler(handler)
    for adapter in adapters:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline.load_lora_weights(str(Path(adapter).parent), weight_name=Path(adapter).name)
        found[f"images/{Path(adapter).stem}"] = images()
        pipeline.unload_lora_weights()
    if "SINGLE" in os.environ:
        found["converted"] = np.asarray(apart(pipeline, load_file(os.environ["SINGLE"])))
    np.savez(result, **found)


def apart(pipeline: object, tensors: dict[str, torch.Tensor]) -> float:
    """The greatest difference of a single file from the pipeline; infinite where a tensor is missing."""
    unet, vae = ({**part.config} for part in (pipeline.unet, pipeline.vae))
    found = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), unet),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), vae),
    }
    for part, prefix in (
        ("text_encoder", "cond_stage_model.model."),
        ("text_encoder_2", "conditioner.embedders.1.model."),
    ):
        if any(key.startswith(prefix) for key in tensors):
            encoder = getattr(pipeline, part)
            found[part] = single_file_utils.convert_open_clip_checkpoint(encoder, dict(tensors), prefix=prefix)
    bare = lambda tensors: {
        key.removeprefix("text_model."): x for key, x in tensors.items()
    }  # spelt with it and without
    worst = 0.0
    for part, converted in found.items():
        own, converted = bare(getattr(pipeline, part).state_dict()), bare(converted)
        if set(converted) != set(own):
            return float("inf")
        worst = max(worst, *(float((own[key] - converted[key].reshape(own[key].shape)).abs().max()) for key in own))
    return worst


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*sys.argv[1:])
    print(json.dumps("done"))
