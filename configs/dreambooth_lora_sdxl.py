"""SDXL learns a subject from three to ten photos: DreamBooth by LoRA, as diffusers' script.

Command:   python -m experiments.train configs/dreambooth_lora_sdxl.py
               task.images=photos/ task.prompt="a photo of sks dog" task.drawing.prompts="a sks dog in a bucket"
Data:      a folder of photos, .jpg or .png, named by task.images; a .txt beside one is its own caption
Model:     stabilityai/stable-diffusion-xl-base-1.0, or any folder of SDXL's kind: base=...
Hardware:  not run: needs a GPU and the hub

Trained:   5,806,080 parameters, r * 1,451,520 with r=4: the inputs and outputs of 560 layers, to_q, to_k, to_v and
           to_out of the UNet's 140 attentions.
Recipe:    examples/dreambooth/README_sdxl.md of huggingface/diffusers: r=4, alpha=4, learning rate 1e-4, 500 steps of
           one photo, 4 of them accumulated, constant, AdamW with weight decay 1e-4, gradients clipped at 1, 1024
           pixels. A step here is the four. Text encoders, with task.text_encoder=True and their targets, have 5e-6
           there: runs.lora.slower={"text_encoder":0.05}. The autoencoder is computed in float32, its float16 overflows.

Published: DreamBench++ (judged by GPT-4o: preservation of the subject, following the prompt, their product):

| | subject | prompt | product |
|---|---|---|---|
| DreamBooth, full, Stable Diffusion 1.5 | .494 | .721 | .356 |
| DreamBooth LoRA, SDXL | .598 | .865 | .517 |

Target:    the second row, which is not measured here; CLIP-I and CLIP-T by
           task.drawing.judge=openai/clip-vit-base-patch32.
"""

from experiments.config import Experiment, Measure, Run
from experiments.recipes import dreambooth, tiny
from experiments.tasks.diffusion import Diffusion, Drawing


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="dreambooth_lora_sdxl",
        base="stabilityai/stable-diffusion-xl-base-1.0",
        task=Diffusion(
            "a subject of a few photos",
            prompt="a photo of sks dog",
            size=1024,
            drawing=Drawing(
                ("a photo of sks dog in a bucket", "a photo of sks dog on the beach", "a photo of dog"), each=2, batch=1
            ),
        ),
        runs=(Run("lora", "LoRA r=4", dreambooth.LORA, 1e-4, dreambooth.ATTENTION),),
        train=dreambooth.schedule(500, batch=4, accumulate=4, weight_decay=1e-4, pictures_every=100),
        options=dreambooth.OPTIONS,
        evaluate_batch=2,
        measure=Measure(rounds=0),
    )


def small() -> Experiment:
    """A few steps on a tiny pipeline."""
    return dreambooth.small(config(), tiny.stable_diffusion_xl)
