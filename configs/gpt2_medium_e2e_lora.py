"""GPT-2 medium writes restaurant descriptions (E2E) with LoRA on query and value: the LoRA paper's Table 3.

Command:   python -m experiments.train configs/gpt2_medium_e2e_lora.py
Data:      train.txt, valid.txt and test.txt of microsoft/LoRA, examples/NLG/data/e2e, in e2e/ below JLORA_DATA
Model:     openai-community/gpt2-medium; the five scores take a Java runtime
Hardware:  not run: needs a GPU and the hub. The paper's own command runs on one GPU

Trained:   393,216 parameters, 4 * 24 layers * 1024 * r. The paper prints 0.35M; its file of 1.5 MB holds 393,216.
Recipe:    Hu et al., arXiv 2106.09685v2, Table 11, and microsoft/LoRA, examples/NLG/README.md: r=4 on query and value,
           alpha=32, dropout 0.1 of the factors' input and none of the model's; AdamW 2e-4, 500 steps of warm-up, a
           line to zero, weight decay 0.01, no clipping; 5 epochs of 8 rows of 512 tokens, label smoothing 0.1; 10
           beams, at most 64 new tokens, no four of them twice.
Of two:    the length penalty is 0.9 in the paper and 0.8 in the README, which is taken here.
Otherwise: the best epoch is that of the lowest loss on the validation split. The paper's beams end at token 628, two
           line breaks, too. The rule on repeated tokens is of the new ones alone, as in the paper's code: 4,333 of
           the test split's 4,693 references repeat four tokens of the prompt (" Raja Indian Cu").

Published (mean of 3 seeds, best epoch; * of earlier work):

| GPT-2 medium | trained | BLEU | NIST | METEOR | ROUGE-L | CIDEr |
|---|---|---|---|---|---|---|
| full fine-tuning * | 354.92M | 68.2 | 8.62 | 46.2 | 71.0 | 2.47 |
| Adapter_L * | 0.37M | 66.3 | 8.41 | 45.0 | 69.8 | 2.40 |
| Adapter_L * | 11.09M | 68.9 | 8.71 | 46.1 | 71.3 | 2.47 |
| Adapter_H | 11.09M | 67.3±.6 | 8.50±.07 | 46.0±.2 | 70.7±.2 | 2.44±.01 |
| FT_Top2 * | 25.19M | 68.1 | 8.59 | 46.0 | 70.8 | 2.41 |
| PreLayer * | 0.35M | 69.7 | 8.81 | 46.1 | 71.4 | 2.49 |
| LoRA | 0.35M | 70.4±.1 | 8.85±.02 | 46.8±.2 | 71.8±.1 | 2.53±.02 |

Target:    BLEU 68.9 to 70.4. Others who ran LoRA got less, at the last epoch: VeRA's Table 3 (arXiv 2310.11454) has
           68.9 / 8.69 / 46.4 / 71.3 / 2.51.
"""

from experiments.config import Experiment
from experiments.recipes import e2e


def config() -> Experiment:
    """The experiment, with three seeds."""
    return e2e.experiment("gpt2_medium_e2e_lora", "GPT-2 medium", "openai-community/gpt2-medium")


def small() -> Experiment:
    """A few steps of a tiny GPT-2."""
    return e2e.small(config())
