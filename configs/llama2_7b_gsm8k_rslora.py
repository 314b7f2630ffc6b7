"""Llama 2 7B with rsLoRA on all linear layers learns MetaMathQA and answers GSM8K: LoRA-GA's comparison (Table 2).

Command:   python -m experiments.train configs/llama2_7b_gsm8k_rslora.py
Data:      MetaMathQA-395K.json in metamathqa/ and GSM8K's test.jsonl in gsm8k/ below JLORA_DATA, or
           meta-math/MetaMathQA and openai/gsm8k of the hub
Model:     meta-llama/Llama-2-7b-hf, whose licence has to be accepted on the hub
Hardware:  not run: needs a GPU of 80 GB and the hub

Trained:   19,988,480 parameters, as LoRA: only the scale is another, alpha / sqrt(r) = 5.66 for 2.
Recipe:    experiments/recipes/gsm8k.py, which says what is the papers' and what ours.

Published (LoRA-GA, arXiv 2407.05000, Table 2, as reprinted in LoRA-MGPO):

| Llama 2 7B, r=8 | GSM8K | MT-Bench | HumanEval |
|---|---|---|---|
| full fine-tuning, as printed by LoRA-MGPO | 59.36±.85 | 5.30±.11 | 35.31±2.13 |
| LoRA | 42.08±.04 | 5.61±.10 | 14.76±.17 |
| rsLoRA | 45.62±.10 | 5.25±.03 | 16.01±.79 |
| LoRA+ | 52.11±.62 | 5.71±.08 | 18.17±.52 |
| PiSSA | 44.54±.27 | 5.30±.02 | 16.02±.78 |
| DoRA | 53.07±.75 | 5.97±.02 | 19.75±.41 |

The first row is disputed: LoRA-GA's own full fine-tuning is said to have 54.20 on GSM8K.

Target:    45.62±.10 under this recipe. The paper itself (arXiv 2312.03732) shows figures and no table.
"""

import jlora
from experiments.config import Experiment, Run
from experiments.recipes import gsm8k


def config() -> Experiment:
    """The experiment, with three seeds."""
    return gsm8k.experiment(Run("rslora", "rsLoRA r=8", jlora.rslora(8, alpha=16, init="kaiming_uniform"), 2e-5))


def small() -> Experiment:
    """A few steps of a tiny Llama."""
    return gsm8k.small(config())
