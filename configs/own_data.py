"""Your own data: a checkpoint learns what lies in a file or a folder, with no line of Python.

Command:   python -m experiments.train configs/own_data.py base=openai-community/gpt2 task.data=mine.jsonl
Others:    ... base=out/ task.data=photos/ runs.lora.method="dora(16)"
           ... base=FacebookAI/roberta-base task.data=reviews.csv task.kind=classification task.columns=body,stars
           ... base=meta-llama/Llama-2-7b-hf task.data=chats.jsonl save.merged=out/
Data:      JSON lines, JSON, CSV, TSV; .txt files and folders of them; folders of images; names of the datasets library
           (pip install datasets). Columns: messages; conversations; prompt, completion; instruction, input, output;
           question, answer; text, label; sentence1, sentence2, label; text; image, label. Others by task.columns
Model:     a folder, or a repository of a family in jlora.models

The first lines say what was understood: examples and splits, lengths in tokens and how many are cut, the template, an
example with what the loss counts between » and «, and what is trained. Read them before you wait for the rest.

Saves:     runs/own_data/lora/seed_0/adapter; with save.merged=out/ a checkpoint of the base's own format, which
           jlora.models.load and transformers read
Defaults:  LoRA r=16 on all linear layers of the blocks (runs.lora.targets=None leaves them to the method), 3 epochs in
           batches of 8, a tenth of the examples held out. The learning rate is a usual one and not tuned:
           rates="(1e-4, 3e-4, 1e-3)" tries three.
"""

import dataclasses
import json
from pathlib import Path

import jlora
from experiments.config import Experiment, Measure, Run, Schedule
from experiments.recipes import tiny
from experiments.tasks.own import OwnData

LINEAR = r"(^|/)h(_\d+)?/(attn|mlp)/"  # all linear layers of the blocks


def config() -> Experiment:
    """The experiment that the command line names, with the defaults above."""
    return Experiment(
        name="own_data",
        base="",
        task=OwnData(),
        runs=(Run("lora", "adapted", jlora.lora(16), 3e-4, LINEAR),),
        train=Schedule("3 epochs", batch=8, decay="cosine", clip=1.0),
        measure=Measure(rounds=0),
        evaluate_batch=16,
    )


def small() -> Experiment:
    """A tiny Llama learns some made answers."""
    whole = config()
    return dataclasses.replace(
        whole,
        name="own_data_small",
        base=tiny.llama,
        task=OwnData(str(tiny.temporary(answers)), new_tokens=4),
        runs=(dataclasses.replace(whole.runs[0], learning_rate=1e-2),),
        train=Schedule(4, batch=4, evaluate_every=2),
        options={"scan": True},
    )


def answers(folder: Path) -> Path:
    """Sums and their answers as conversations."""
    rows = (
        [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"{i + 1}"}]
        for i in range(24)
    )
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return file
