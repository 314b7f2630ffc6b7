"""LLaMA 65B, held in NF4, learns the conversations of OASST1: QLoRA's recipe of Guanaco.

Command:   python -m experiments.train configs/qlora_llama_65b.py
Data:      openassistant_best_replies_train.jsonl and _eval.jsonl in guanaco/ below JLORA_DATA, or
           timdettmers/openassistant-guanaco of the hub
Model:     huggyllama/llama-65b, or a folder with the converted weights
Hardware:  not run: needs a GPU of 48 GB and the hub: by the compiler of an A100 (jlora plan configs/qlora_llama_65b.py
           --device a6000), 46.1 GB (42.9 GiB) with the optimizer's state on the host, 6.4 GB there
           (of 33B: base=huggyllama/llama-30b, all else the same)
Trained:   799,539,200 parameters, 80 layers * r * (11 * 8192 + 3 * 22016): inputs and outputs of seven layers, r times.
Recipe:    experiments/recipes/qlora.py, which says what is the paper's and what ours.

Published: QLoRA, arXiv 2305.14314, Table 4: MMLU, 5-shot, of LLaMA 65B after Alpaca, after FLAN v2: the base in
           bfloat16 61.8, 62.5; FP4 61.3, 63.3; NF4 with double quantisation 61.8, 63.9.

Target:    under 48 GB (reached, see above), and the validation loss of the base in bfloat16. Guanaco 65B has
           99.3 % of ChatGPT's score on the Vicuna questions by GPT-4's judgement, which is not measured here.
"""

from experiments.config import Experiment
from experiments.recipes import qlora


def config() -> Experiment:
    """The experiment."""
    base = "huggyllama/llama-65b"
    return qlora.experiment(
        "qlora_llama_65b", "LLaMA 65B", base, 1e-4, 0.05, accumulate=16, optimizer_memory="pinned_host"
    )


def small() -> Experiment:
    """A few steps of a tiny Llama, in bfloat16 and 4 bits as the large one."""
    return qlora.small(config())
