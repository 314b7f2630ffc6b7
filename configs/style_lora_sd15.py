"""Stable Diffusion 1.5 learns a style from pictures with captions: LoRA as diffusers' text-to-image script.

Command:   python -m experiments.train configs/style_lora_sd15.py task.images=pictures/
Data:      a folder of pictures, named by task.images, with a .txt beside each that says what is seen and names the
           style: "a horse in sks style"
Model:     stable-diffusion-v1-5/stable-diffusion-v1-5, or any folder of Stable Diffusion 1.x or 2.x: base=...
Hardware:  not run: needs a GPU and the hub; published for 15,000 steps of diffusers' script on an RTX 2080 Ti of 11 GB:
           about 5 hours

Trained:   797,184 parameters, as configs/dreambooth_lora_sd15.py.
Recipe:    examples/text_to_image/README.md of huggingface/diffusers: r=4, alpha=4, learning rate 1e-4, cosine without
           warm-up, 15,000 steps of 4 pictures (one at a time), gradients clipped at 1, weight decay 0.01, 512 pixels,
           cut at random places and flipped. Here 1,500 steps, for a style of tens of pictures in place of hundreds.
           Min-SNR with gamma 5 (Hang et al., arXiv 2303.09556, the script's --snr_gamma) and offset noise 0.05, as
           guides to kohya-ss/sd-scripts have them. Shapes are kept: pictures go to the nearest of several. Four views
           of each, flips beside them, are encoded once. An average of the factors, decay 0.99, is what is kept: ours.

Published: of styles no scores were found; the script's page shows samples alone.
Target:    samples: the sheets before, after, and at scales 0, 0.5 and 1.
"""

from experiments.config import Experiment, Measure, Run
from experiments.recipes import dreambooth, tiny
from experiments.tasks.diffusion import Diffusion, Drawing


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="style_lora_sd15",
        base="stable-diffusion-v1-5/stable-diffusion-v1-5",
        task=Diffusion(
            "a style of pictures with captions",
            size=512,
            crops=4,
            flips=True,
            buckets=True,
            min_snr=5.0,
            offset=0.05,
            drawing=Drawing(("a horse in sks style", "a town in sks style", "a horse")),
        ),
        runs=(Run("lora", "LoRA r=4", dreambooth.LORA, 1e-4, dreambooth.ATTENTION),),
        train=dreambooth.schedule(1500, batch=4, accumulate=4, decay="cosine", pictures_every=250, ema=0.99),
        options=dreambooth.OPTIONS,
        evaluate_batch=4,
        measure=Measure(rounds=0),
    )


def small() -> Experiment:
    """A few steps on a tiny pipeline."""
    return dreambooth.small(config(), tiny.stable_diffusion)
