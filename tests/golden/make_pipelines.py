"""Makes `pipelines/`: tiny pipelines of Stable Diffusion 1.x, 2.x and SDXL, and the images that diffusers makes with them.

    pip install torch==2.13.0 transformers==5.24.0 diffusers==0.42.1 numpy && python tests/golden/make_pipelines.py

Each family is a folder of a pipeline without weights: model_index.json, scheduler/, unet/config.json and vae/config.json. The text
encoders and tokenizers are those of `prompts/` (make_prompts.py). The weights of UNet and VAE follow the rule of
make_diffusion_files.py, by the names "unet" and "vae", with two changes: of the VAE's logarithms of variances, the second half
of quant_conv, weights are 0 and biases -60, so that what it draws is the mean; and the UNet's conv_out is a tenth, so that
latents stay of size 1.

`golden.npz` has, for each case, `<case>/noise` (the unit normal latents at the start), `<case>/latents` before the decoder and
`<case>/images`, in torch's layout (rows, channels, height, width), float32; images are in [0, 1]. Inputs are `image` (of [0, 1]) and
`mask`. `cases.json` has the pipeline's arguments of each, and its scheduler's config where that is not the folder's. PNDM from an
image is left out: diffusers is one timestep of noise behind there.

Each case is made from noise that is given, also where diffusers draws it: `randn_tensor` is replaced.
"""

import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # noqa: F401

HERE = Path(__file__).with_name("pipelines")
PROMPTS = Path(__file__).with_name("prompts")
PIECES = Path(__file__).with_name("models") / "tokenizers" / "clip"

UNET = {
    "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
}  # fmt: skip
SDXL = {
    "attention_head_dim": [2, 4], "use_linear_projection": True, "cross_attention_dim": 20,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2], "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 34,
}  # fmt: skip
UNETS = {
    "sd1": UNET,
    "sd2": UNET | {"attention_head_dim": [2, 4], "use_linear_projection": True, "cross_attention_dim": 12},
    "sdxl": UNET | SDXL,
    "paint": UNET | {"in_channels": 9},
}
VAE = {
    "sample_size": 16, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
NOISE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False,
}  # fmt: skip
SCHEDULERS = {
    "sd1": ("PNDMScheduler", NOISE),
    "sd2": ("DDIMScheduler", NOISE | {"prediction_type": "v_prediction"}),
    "sdxl": ("EulerDiscreteScheduler", NOISE | {"timestep_spacing": "leading"}),
    "paint": ("DDIMScheduler", NOISE),
}
TEXT = ["The cat sat on the mat!!", "a low-rank cat"]
AGAINST = ["a dog", "the mat"]
CASES = {
    "sd1": {
        "plain": {"num_inference_steps": 4},
        "negative": {"num_inference_steps": 3, "negative_prompt": AGAINST, "guidance_scale": 4.0},
        "alone": {"num_inference_steps": 3, "guidance_scale": 1.0, "scheduler": ["DPMSolverMultistepScheduler", {}]},
        "from_image": {"num_inference_steps": 6, "strength": 0.5, "image": True, "scheduler": ["DDIMScheduler", {}]},
        "from_image_euler": {"num_inference_steps": 4, "strength": 0.6, "image": True, "scheduler": ["EulerDiscreteScheduler", {}]},
        "masked": {"num_inference_steps": 3, "strength": 1.0, "image": True, "mask": True},
        "masked_weakly": {"num_inference_steps": 4, "strength": 0.5, "image": True, "mask": True, "scheduler": ["DDIMScheduler", {}]},
    },
    "sd2": {
        "plain": {"num_inference_steps": 4},
        "rescaled": {"num_inference_steps": 3, "guidance_rescale": 0.7, "scheduler": [
            "DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}]},
    },
    "sdxl": {
        "plain": {"num_inference_steps": 4},
        "negative": {"num_inference_steps": 3, "negative_prompt": AGAINST},
        "sizes": {"num_inference_steps": 3, "original_size": [40, 24], "crops_coords_top_left": [3, 5], "target_size": [16, 24],
            "scheduler": ["EulerDiscreteScheduler", {"use_karras_sigmas": True}]},
    },
    "paint": {"masked": {"num_inference_steps": 3, "strength": 1.0, "image": True, "mask": True}},
}  # fmt: skip
HEIGHT, WIDTH = 16, 24


def drawn(component: str, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = 0.2 * np.random.RandomState(zlib.crc32(f"{component}.{key}".encode())).standard_normal(shape)
    values += len(shape) == 1 and key.endswith(".weight")
    if component == "vae" and key.startswith("quant_conv"):
        values[shape[0] // 2 :] = -60.0 if len(shape) == 1 else 0.0
    if component == "unet" and key.startswith("conv_out"):
        values *= 0.1
    return torch.tensor(values.astype(np.float32))


def filled(component: str, model: torch.nn.Module) -> torch.nn.Module:
    model.load_state_dict({key: drawn(component, key, tuple(x.shape)) for key, x in model.state_dict().items()})
    return model.eval()


def tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    with tempfile.TemporaryDirectory() as whole:
        for file in (*folder.glob("*.json"), PIECES / "vocab.json", PIECES / "merges.txt"):
            shutil.copy(file, whole)
        return transformers.CLIPTokenizer.from_pretrained(whole)


def parts(family: str) -> dict[str, object]:
    texts = PROMPTS / ("sd1" if family == "paint" else family)
    found: dict[str, object] = {
        "unet": filled("unet", diffusers.UNet2DConditionModel(**UNETS[family])),
        "vae": filled("vae", diffusers.AutoencoderKL(**VAE, scaling_factor=0.13025 if family == "sdxl" else 0.18215)),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(texts / "text_encoder").float(),
        "tokenizer": tokenizer(texts / "tokenizer"),
    }
    if family == "sdxl":
        found["text_encoder_2"] = transformers.CLIPTextModelWithProjection.from_pretrained(
            texts / "text_encoder_2"
        ).float()
        found["tokenizer_2"] = tokenizer(texts / "tokenizer_2")
        return found | {"force_zeros_for_empty_prompt": True}
    return found | {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def pipeline_of(family: str, case: dict, own: dict[str, object]) -> diffusers.DiffusionPipeline:
    kind = "InpaintPipeline" if "mask" in case else "Img2ImgPipeline" if "image" in case else "Pipeline"
    name, changes = case.get("scheduler", [SCHEDULERS[family][0], {}])
    scheduler = getattr(diffusers, name).from_config(SCHEDULERS[family][1] | changes)
    pipeline = getattr(diffusers, f"StableDiffusion{'XL' if family == 'sdxl' else ''}{kind}")(
        **own, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_noise(pipeline: diffusers.DiffusionPipeline, noise: torch.Tensor) -> None:
    """Has the pipeline's module draw this noise, and no other."""
    import sys

    def given(shape: tuple[int, ...], *_: object, **__: object) -> torch.Tensor:
        assert tuple(shape) == tuple(noise.shape), shape
        return noise.clone()

    sys.modules[type(pipeline).__module__].randn_tensor = given


@torch.no_grad()
def make(family: str) -> None:
    folder, own = HERE / family, parts(family)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as whole:
        pipeline_of(family, {}, own).save_pretrained(whole)
        for name in ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            record = json.loads((Path(whole) / name).read_text())
            (folder / name).write_text(json.dumps(record, indent=1) + "\n")
    rng = np.random.RandomState(0)
    image = rng.uniform(size=(2, 3, HEIGHT, WIDTH)).astype(np.float32)
    mask = np.zeros((2, 1, HEIGHT, WIDTH), np.float32)
    mask[0, :, 2:11, 5:20], mask[1, :, :, 12:] = 1, 1
    arrays = {"image": image, "mask": mask} if any("image" in case for case in CASES[family].values()) else {}
    for name, case in CASES[family].items():
        pipeline = pipeline_of(family, case, own)
        noise = torch.tensor(rng.normal(size=(2, 4, HEIGHT // 2, WIDTH // 2)).astype(np.float32))
        with_noise(pipeline, noise)
        given = {key: value for key, value in case.items() if key not in ("scheduler", "image", "mask")}
        given |= {"image": torch.tensor(image)} if "image" in case else {"height": HEIGHT, "width": WIDTH}
        given |= {"mask_image": torch.tensor(mask), "height": HEIGHT, "width": WIDTH} if "mask" in case else {}
        for key in ("original_size", "crops_coords_top_left", "target_size"):
            given |= {key: tuple(given[key])} if key in given else {}
        latents = pipeline(TEXT, output_type="latent", **given).images
        images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        print(family, name, "latents", float(latents.std()), "images", float(images.std()))
        arrays |= {f"{name}/noise": noise.numpy(), f"{name}/latents": latents.numpy()}
        arrays[f"{name}/images"] = (images / 2 + 0.5).clamp(0, 1).numpy()
    np.savez_compressed(folder / "golden.npz", **arrays)
    written = {}
    for name, case in CASES[family].items():
        kind, changes = case.get("scheduler", (None, {}))
        own = {} if kind is None else {"scheduler": {"_class_name": kind} | SCHEDULERS[family][1] | changes}
        written[name] = case | own
    content = {"prompts": TEXT, "cases": written, "diffusers": diffusers.__version__}
    (folder / "cases.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    for name in UNETS:
        make(name)
