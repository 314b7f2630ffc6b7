"""GPT-2 large writes restaurant descriptions (E2E) with LoRA on query and value: the LoRA paper's Table 3.

Command:   python -m experiments.train configs/gpt2_large_e2e_lora.py
Data:      train.txt, valid.txt and test.txt of microsoft/LoRA, examples/NLG/data/e2e, in e2e/ below JLORA_DATA
Model:     openai-community/gpt2-large; the five scores take a Java runtime
Hardware:  not run: needs a GPU and the hub

Trained:   737,280 parameters, 4 * 36 layers * 1280 * r. The paper prints 0.77M; the adapter of 2.3 MB in its README
           does not fit that (737,280 floats are 2.81 MiB) and is not explained.
Recipe:    that of gpt2_medium_e2e_lora.py, where the differences between the paper and its code are.

Published (mean of 3 seeds, best epoch; * of earlier work):

| GPT-2 large | trained | BLEU | NIST | METEOR | ROUGE-L | CIDEr |
|---|---|---|---|---|---|---|
| full fine-tuning * | 774.03M | 68.5 | 8.78 | 46.0 | 69.9 | 2.45 |
| Adapter_L | 0.88M | 69.1±.1 | 8.68±.03 | 46.3±.0 | 71.4±.2 | 2.49±.0 |
| Adapter_L | 23.00M | 68.9±.3 | 8.70±.04 | 46.1±.1 | 71.3±.2 | 2.45±.02 |
| PreLayer * | 0.77M | 70.3 | 8.85 | 46.2 | 71.7 | 2.47 |
| LoRA | 0.77M | 70.4±.1 | 8.89±.02 | 46.8±.2 | 72.0±.2 | 2.47±.02 |

Target:    BLEU 68.9 to 70.4. VeRA's Table 3 (arXiv 2310.11454) has 70.1 / 8.80 / 46.7 / 71.9 / 2.52 for LoRA, at the
           last epoch.
"""

from experiments.config import Experiment
from experiments.recipes import e2e


def config() -> Experiment:
    """The experiment, with three seeds."""
    return e2e.experiment("gpt2_large_e2e_lora", "GPT-2 large", "openai-community/gpt2-large")


def small() -> Experiment:
    """A few steps of a tiny GPT-2."""
    return e2e.small(config())
