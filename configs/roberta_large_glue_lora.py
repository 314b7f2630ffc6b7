"""RoBERTa-large on a task of GLUE with LoRA on query and value: the LoRA paper's Table 2.

Command:   python -m experiments.train configs/roberta_large_glue_lora.py
           JLORA_GLUE_TASK=rte python -m experiments.train configs/roberta_large_glue_lora.py
Tasks:     mnli (if none is named), sst2, mrpc, cola, qqp, rte, stsb. No recipe for QNLI could be had.
Data:      the GLUE download's folders (MNLI/train.tsv, ...) in glue/ below JLORA_DATA, or nyu-mll/glue of the hub
Model:     FacebookAI/roberta-large
Hardware:  not run: needs a GPU and the hub. The paper's authors had 4 V100

Trained:   786,432 parameters of LoRA, 4 * 24 layers * 1024 * r, and the head: 1,839,107 with three classes (the
           published adapter for MNLI is a file of 7.1 MB: 7.02 MiB).
Recipe:    Hu et al., arXiv 2106.09685v2, Table 9, and microsoft/LoRA, examples/NLU/roberta_large_*.sh: r=8, alpha=16,
           A uniform, AdamW, 6 % of warm-up, a line to zero, weight decay 0.1, gradients clipped at 1 (the default of
           its trainer), the model's dropout 0.1. RECIPES has what differs by task; MNLI, MRPC, CoLA and RTE are from
           copies of the repository.
Of two:    the batch is what a script gives to each GPU; with the 8 that it starts a step has 8 times as many rows, with
           4 as the README says 4 times: train.batch=32 is such a step.
Otherwise: in the row LoRA, MRPC, RTE and STS-B start from the adapter for MNLI. Here, as in the row LoRA †, they start
           from the checkpoint; that row's setup, however, is more restricted than the scripts'.
Test:      the dev split, as in the paper: the test split's labels are not published. The best epoch is chosen on it
           too, as there, so these scores are a little too high; `results.json` has those of all epochs.

Published (median of 5 seeds, best epoch; * of earlier work; † in the setup of Houlsby et al.):

| RoBERTa-large | trained | MNLI | SST-2 | MRPC | CoLA | QNLI | QQP | RTE | STS-B | mean |
|---|---|---|---|---|---|---|---|---|---|---|
| full fine-tuning * | 355.0M | 90.2 | 96.4 | 90.9 | 68.0 | 94.7 | 92.2 | 86.6 | 92.4 | 88.9 |
| LoRA | 0.8M | 90.6±.2 | 96.2±.5 | 90.9±1.2 | 68.2±1.9 | 94.9±.3 | 91.6±.1 | 87.4±2.5 | 92.6±.2 | 89.0 |
| Adpt_P † | 3.0M | 90.2 | 96.1 | 90.2 | 68.3 | 94.8 | 91.9 | 83.8 | 92.1 | 88.4 |
| Adpt_P † | 0.8M | 90.5 | 96.6 | 89.7 | 67.8 | 94.8 | 91.7 | 80.1 | 91.9 | 87.9 |
| Adpt_H † | 6.0M | 89.9 | 96.2 | 88.7 | 66.5 | 94.7 | 92.1 | 83.4 | 91.0 | 87.8 |
| Adpt_H † | 0.8M | 90.3 | 96.3 | 87.7 | 66.3 | 94.7 | 91.5 | 72.9 | 91.5 | 86.4 |
| LoRA † | 0.8M | 90.6 | 96.2 | 90.2 | 68.2 | 94.8 | 91.6 | 85.2 | 92.3 | 88.6 |

Target:    the row LoRA † (MRPC 90.2, RTE 85.2, STS-B 92.3), which starts from the checkpoint as we do. VeRA (arXiv
           2310.11454, Table 2) has a mean of 87.8 for LoRA.
"""

import jlora
from experiments.config import Experiment
from experiments.recipes import glue, tiny
from experiments.recipes.glue import Recipe

RECIPES = {
    "mnli": Recipe(3e-4, batch=4, epochs=10, length=128),
    "sst2": Recipe(4e-4, batch=8, epochs=10, length=512),
    "mrpc": Recipe(3e-4, batch=4, epochs=20, length=512),
    "cola": Recipe(3e-4, batch=4, epochs=20, length=128),
    "qqp": Recipe(3e-4, batch=4, epochs=20, length=512),
    "rte": Recipe(4e-4, batch=8, epochs=20, length=512),
    "stsb": Recipe(3e-4, batch=4, epochs=10, length=128),
}


def config(task: str | None = None) -> Experiment:
    """The experiment on the task of the argument, or of JLORA_GLUE_TASK."""
    name = glue.chosen(task, RECIPES)
    method = jlora.lora(8, alpha=16, init="kaiming_uniform")
    return glue.experiment(
        "roberta_large_glue_lora", "RoBERTa-large", "FacebookAI/roberta-large", name, RECIPES[name], method
    )


def small(task: str | None = None) -> Experiment:
    """A few steps of a tiny RoBERTa."""
    return glue.small(config(task), glue.chosen(task, RECIPES), tiny.roberta)
