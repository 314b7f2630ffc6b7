"""A byte-level GPT learns English prose, then Python: full fine-tuning, LoRA r=4 and LoRA r=16 side by side.

Command:   python -m experiments.train configs/quickstart.py
Hardware:  2 CPU cores; 4:16 minutes
Score:     bits per byte of Python, test: base 3.603, full 2.928, LoRA r=4 3.116, r=16 3.042
"""

import dataclasses

import jlora
from experiments.config import Experiment, Measure, Pretrain, Run, Schedule
from experiments.data import python_docs, python_source
from experiments.tasks.bytes import Bytes
from jlora.models.gpt2 import GPT2Config


def config() -> Experiment:
    """The experiment."""
    train = Schedule(250, batch=8, evaluate_every=25, warmup=0.05, decay="cosine", b2=0.98, clip=1.0, keep="last")
    return Experiment(
        name="quickstart",
        base=Pretrain(
            GPT2Config(vocab_size=256, context=128, width=256, layers=3, heads=4),
            dataclasses.replace(train, steps=900, evaluate_every=100, weight_decay=0.1),
            learning_rate=3e-3,
        ),
        task=Bytes("prose, then Python", old=python_docs, new=python_source, validation=64, test=512),
        # The learning rates are the best of configs/quickstart_sweep.py, by bits per byte of Python (validation).
        runs=(
            Run("full", "full fine-tuning", jlora.full(), 3e-3),
            Run("lora_r4", "LoRA r=4", jlora.lora(4), 1e-2),
            Run("lora_r16", "LoRA r=16", jlora.lora(16), 1e-2),
        ),
        train=train,
        evaluate_batch=32,
        measure=Measure(rounds=12),
    )


def small() -> Experiment:
    """The same in a few seconds, to see that it runs."""
    whole = config()
    assert isinstance(whole.base, Pretrain) and isinstance(whole.task, Bytes)
    few = dataclasses.replace(whole.train, steps=8, batch=4, evaluate_every=4, warmup=1)
    return dataclasses.replace(
        whole,
        name="quickstart_small",
        base=Pretrain(
            GPT2Config(vocab_size=256, context=32, width=32, layers=1, heads=2),
            dataclasses.replace(few, steps=20, evaluate_every=10, weight_decay=0.1),
            whole.base.learning_rate,
        ),
        task=dataclasses.replace(whole.task, validation=4, test=8),
        train=few,
        evaluate_batch=4,
        measure=Measure(rounds=3),
    )
