"""A byte-level GPT learns English prose, then Python: full fine-tuning, LoRA r=4 and LoRA r=16 side by side.

Command:   python -m experiments.train configs/quickstart.py
Hardware:  2 CPU cores; 4:16 minutes
Score:     bits per byte of Python, test: base 3.603, full 2.928, LoRA r=4 3.116, r=16 3.042
"""

import dataclasses

from experiments.config import Data, Evaluate, Experiment, Pretrain, Run, Train
from experiments.data import python_docs, python_source
from jlora.models.gpt2 import GPT2Config


def config() -> Experiment:
    """The main job."""
    return Experiment(
        name="quickstart",
        model=GPT2Config(vocab_size=256, context=128, width=256, layers=3, heads=4),
        data=Data(old=python_docs, new=python_source),
        pretrain=Pretrain(steps=900, batch=8, evaluate_every=100, weight_decay=0.1, learning_rate=3e-3),
        train=Train(steps=250, batch=8, evaluate_every=25),
        # The learning rates are the best of configs/quickstart_sweep.py, by bits per byte of Python (validation).
        runs=(
            Run("full", "full fine-tuning", learning_rate=3e-3),
            Run("lora_r4", "LoRA r=4", learning_rate=1e-2, rank=4),
            Run("lora_r16", "LoRA r=16", learning_rate=1e-2, rank=16),
        ),
        evaluate=Evaluate(validation=64, test=512),
    )


def small() -> Experiment:
    """The same in a few seconds, to see that it runs."""
    full = config()
    return dataclasses.replace(
        full,
        name="quickstart_small",
        model=GPT2Config(vocab_size=256, context=32, width=32, layers=1, heads=2),
        pretrain=dataclasses.replace(full.pretrain, steps=20, batch=4, evaluate_every=10),
        train=dataclasses.replace(full.train, steps=8, batch=4, evaluate_every=4),
        evaluate=Evaluate(validation=4, test=8, batch=4, rounds=3),
    )
