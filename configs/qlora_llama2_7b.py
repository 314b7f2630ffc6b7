"""Llama 2 7B, held in NF4, learns the conversations of OASST1: QLoRA's recipe of Guanaco.

Command:   python -m experiments.train configs/qlora_llama2_7b.py
Data:      openassistant_best_replies_train.jsonl and _eval.jsonl in guanaco/ below JLORA_DATA, or
           timdettmers/openassistant-guanaco of the hub
Model:     meta-llama/Llama-2-7b-hf, whose licence has to be accepted on the hub
Hardware:  not run: needs a GPU of 24 GB and the hub
           (of 13B: base=meta-llama/Llama-2-13b-hf, all else the same)
Trained:   159,907,840 parameters, 32 layers * r * (11 * 4096 + 3 * 11008): inputs and outputs of seven layers, r times.
Recipe:    experiments/recipes/qlora.py, which says what is the paper's and what ours.

Published: QLoRA, arXiv 2305.14314, Table 4: MMLU, 5-shot, of LLaMA 7B after Alpaca, after FLAN v2: the base in
           bfloat16 38.4, 45.6; FP4 37.2, 44.0; NF4 with double quantisation 39.0, 44.5.

Target:    the validation loss of the same recipe on the base in bfloat16 (base.quantize=none). The table is of LLaMA 1
           and of other data; what Llama 2 has after OASST1 is in none of the sources at hand.
"""

from experiments.config import Experiment
from experiments.recipes import qlora


def config() -> Experiment:
    """The experiment."""
    return qlora.experiment("qlora_llama2_7b", "Llama 2 7B", "meta-llama/Llama-2-7b-hf", 2e-4, 0.1, accumulate=4)


def small() -> Experiment:
    """A few steps of a tiny Llama, in bfloat16 and 4 bits as the large one."""
    return qlora.small(config())
