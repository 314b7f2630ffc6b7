"""DeBERTa-v2-XXL (1.5 billion parameters) on a task of GLUE with LoRA on query and value: the LoRA paper's Table 2.

Command:   python -m experiments.train configs/deberta_xxl_glue_lora.py
           JLORA_GLUE_TASK=rte python -m experiments.train configs/deberta_xxl_glue_lora.py
Tasks:     mnli (if none is named), sst2, mrpc, cola, qnli, qqp, rte, stsb
Data:      the GLUE download's folders (MNLI/train.tsv, ...) in glue/ below JLORA_DATA, or nyu-mll/glue of the hub
Model:     microsoft/deberta-v2-xxlarge. If the repository has neither safetensors nor a tokenizer.json, transformers
           writes both (AutoModel and AutoTokenizer, save_pretrained), and base=FOLDER names them.
Hardware:  not run: needs a GPU and the hub. The paper's authors had 4 V100

Trained:   4,718,592 parameters of LoRA, 4 * 48 layers * 1536 * r with r=16, and the head: 7,084,035 with three classes
           (the published adapter for MNLI is a file of 27.1 MB: 27.02 MiB).
Recipe:    microsoft/LoRA, examples/NLU/deberta_v2_xxlarge_*.sh: r=16, alpha=32, A uniform, AdamW, a line to zero,
           gradients clipped at 1 (the default of its trainer), the model's dropout 0.1, bfloat16 here where it has
           fp16. RECIPES has what differs by task; those of SST-2, MRPC and RTE are from copies of the repository.
Of two:    the paper's Table 10 has r=8 and alpha=8, which would be 2.36M parameters and not the 4.7M of Table 2. The
           batch is what a script gives to each GPU; with the 8 that it starts a step has 8 times as many rows, and
           there are as many fewer steps, of which the warm-up and the evaluations are counted.
Otherwise: in the paper MRPC, RTE and STS-B start from the adapter for MNLI, here from the checkpoint.
Test:      the dev split, as in the paper: the test split's labels are not published. The best evaluation is chosen on
           it too, as there, so these scores are a little too high; `results.json` has all of them.

Published (median of 5 seeds, best epoch; * of earlier work):

| DeBERTa-XXL | trained | MNLI | SST-2 | MRPC | CoLA | QNLI | QQP | RTE | STS-B | mean |
|---|---|---|---|---|---|---|---|---|---|---|
| full fine-tuning * | 1500.0M | 91.8 | 97.2 | 92.0 | 72.0 | 96.0 | 92.7 | 93.9 | 92.9 | 91.1 |
| LoRA | 4.7M | 91.9±.2 | 96.9±.2 | 92.6±.6 | 72.4±1.1 | 96.0±.1 | 92.9±.1 | 94.9±.4 | 93.0±.2 | 91.3 |

Target:    the LoRA row within its deviations, MRPC, RTE and STS-B aside.
"""

import jlora
from experiments.config import Experiment
from experiments.recipes import glue, tiny
from experiments.recipes.glue import Recipe

RECIPES = {
    "mnli": Recipe(1e-4, 8, 5, length=256, warmup=1000, weight_decay=0.0, evaluate_every=500, head_dropout=0.15),
    "sst2": Recipe(6e-5, 8, 16, length=128, warmup=1000, weight_decay=0.01, evaluate_every=100, head_dropout=0.0),
    "mrpc": Recipe(2e-4, 32, 30, length=128, warmup=0.1, weight_decay=0.01, evaluate_every=10, head_dropout=0.0),
    "cola": Recipe(1.3e-4, 4, 10, length=64, warmup=100, weight_decay=0.0, evaluate_every=20, head_dropout=0.1),
    "qnli": Recipe(1e-4, 6, 8, length=512, warmup=500, weight_decay=0.01, evaluate_every=500, head_dropout=0.1),
    "qqp": Recipe(1e-4, 8, 11, length=320, warmup=10000, weight_decay=0.01, evaluate_every=500, head_dropout=0.2),
    "rte": Recipe(2.6e-4, 4, 11, length=320, warmup=50, weight_decay=0.01, evaluate_every=20, head_dropout=0.2),
    "stsb": Recipe(2e-4, 4, 10, length=128, warmup=100, weight_decay=0.1, evaluate_every=50, head_dropout=0.2),
}


def config(task: str | None = None) -> Experiment:
    """The experiment on the task of the argument, or of JLORA_GLUE_TASK."""
    name = glue.chosen(task, RECIPES)
    return glue.experiment(
        "deberta_xxl_glue_lora", "DeBERTa-v2-XXL", "microsoft/deberta-v2-xxlarge", name, RECIPES[name],
        jlora.lora(16, alpha=32, init="kaiming_uniform"), dtype="bfloat16", head_dropout=RECIPES[name].head_dropout,
    )  # fmt: skip


def small(task: str | None = None) -> Experiment:
    """A few steps of a tiny DeBERTa."""
    return glue.small(config(task), glue.chosen(task, RECIPES), tiny.deberta)
