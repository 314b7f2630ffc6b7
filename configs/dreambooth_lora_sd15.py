"""Stable Diffusion 1.5 learns a subject from three to ten photos: DreamBooth by LoRA, as diffusers' script.

Command:   python -m experiments.train configs/dreambooth_lora_sd15.py
               task.images=photos/ task.prompt="a photo of sks dog" task.drawing.prompts="a sks dog in a bucket"
Data:      a folder of photos, .jpg or .png, named by task.images; a .txt beside one is its own caption
Model:     stable-diffusion-v1-5/stable-diffusion-v1-5, or any folder of Stable Diffusion 1.x or 2.x: base=...
Hardware:  not run: needs a GPU and the hub

Trained:   797,184 parameters, r * 199,296 with r=4: the inputs and outputs of 128 layers, to_q, to_k, to_v and to_out
           of the UNet's 32 attentions.
Recipe:    examples/dreambooth/README.md of huggingface/diffusers: r=4, alpha=4, learning rate 1e-4, 500 steps of one
           photo, constant, AdamW with weight decay 0.01, gradients clipped at 1, 512 pixels, frozen text encoder. The
           script's own default is 5e-4. Where the class shall be kept: task.prior.prompt="a photo of dog" (100
           pictures, weight 1, 800 steps). bfloat16 in place of float16; photos' centres, as there.

Published: Ruiz et al., "DreamBooth", arXiv 2208.12242: 30 subjects, 25 prompts, 4 pictures each, full fine-tuning:

| | DINO | CLIP-I | CLIP-T |
|---|---|---|---|
| real photos | .774 | .885 | |
| DreamBooth, Imagen | .696 | .812 | .306 |
| DreamBooth, Stable Diffusion | .668 | .803 | .305 |
| textual inversion, Stable Diffusion | .569 | .780 | .255 |

Target:    CLIP-I .80 and CLIP-T .30 over those subjects and prompts (task.drawing.judge=openai/clip-vit-base-patch32);
           of LoRA with this recipe no such figures were found.
"""

from experiments.config import Experiment, Measure, Run
from experiments.recipes import dreambooth, tiny
from experiments.tasks.diffusion import Diffusion, Drawing


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="dreambooth_lora_sd15",
        base="stable-diffusion-v1-5/stable-diffusion-v1-5",
        task=Diffusion(
            "a subject of a few photos",
            prompt="a photo of sks dog",
            size=512,
            drawing=Drawing(("a photo of sks dog in a bucket", "a photo of sks dog on the beach", "a photo of dog")),
        ),
        runs=(Run("lora", "LoRA r=4", dreambooth.LORA, 1e-4, dreambooth.ATTENTION),),
        train=dreambooth.schedule(500, pictures_every=100),
        options=dreambooth.OPTIONS,
        evaluate_batch=4,
        measure=Measure(rounds=0),
    )


def small() -> Experiment:
    """A few steps on a tiny pipeline, with the class preserved."""
    whole = dreambooth.small(config(), tiny.stable_diffusion)
    return dreambooth.preserved(whole, "a photo of thing")
