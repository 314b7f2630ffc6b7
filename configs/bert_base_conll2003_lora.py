"""BERT-base finds names of people, places and organisations (CoNLL-2003) with LoRA on query and value.

Command:   python -m experiments.train configs/bert_base_conll2003_lora.py
Data:      eng.train, eng.testa and eng.testb of CoNLL-2003 in conll2003/ below JLORA_DATA; the task's licence is NIST's
Model:     google-bert/bert-base-cased
Hardware:  not run: needs a GPU and the hub

Trained:   294,912 parameters of LoRA, 4 * 12 layers * 768 * r with r=8, and the head: 301,833 with nine tags.
Recipe:    batch, epochs and the decay are BERT's own range (Devlin et al., arXiv 1810.04805, appendix A.3); rank and
           learning rate are ours and not tried.

Published (F1 of entities in percent, arXiv 1810.04805, Table 7; the mean of 5 runs, each word with the context of its
whole document, which is not read here):

| BERT | dev | test |
|---|---|---|
| base, fine-tuned | 96.4 | 92.4 |
| large, fine-tuned | 96.6 | 92.8 |

Target:    the first row, to a point or so: sentences stand alone here. Tune runs.lora.learning_rate on the dev split.
"""

import dataclasses
import tempfile
from pathlib import Path

import jlora
from experiments.config import Experiment, Run, Schedule
from experiments.data import sources
from experiments.recipes import tiny
from experiments.tasks.token_classification import Splits, TokenClassification, read_sentences

QV = r"attn/(query|value)"


def config() -> Experiment:
    """The experiment, with three seeds."""
    return Experiment(
        name="bert_base_conll2003_lora",
        base="google-bert/bert-base-cased",
        task=TokenClassification("BERT-base on CoNLL-2003", conll2003, length=192),
        runs=(Run("lora", "LoRA q,v r=8", jlora.lora(8), 1e-3, QV),),
        train=Schedule("4 epochs", batch=32, weight_decay=0.01, clip=1.0),
        seeds=(0, 1, 2),
        options={"dropout": 0.1, "scan": True},
    )


def small() -> Experiment:
    """A few steps of a tiny BERT on made sentences."""
    whole = config()
    return dataclasses.replace(
        whole,
        name="bert_base_conll2003_lora_small",
        base=tiny.bert,
        task=TokenClassification(whole.task.label, few, length=24),
        train=dataclasses.replace(whole.train, steps=4, batch=6, evaluate_every=2),
        seeds=(0,),
        options={"scan": True},
        evaluate_batch=12,
        measure=dataclasses.replace(whole.measure, rounds=0),
    )


def conll2003() -> Splits:
    """The shared task's three files."""
    folder = sources.folder("conll2003", "eng.train, eng.testa and eng.testb of CoNLL-2003")
    return Splits(*(read_sentences(folder / f"eng.{name}") for name in ("train", "testa", "testb")))


def few() -> Splits:
    """Tiny splits of sentences that name a restaurant or a fruit."""
    with tempfile.TemporaryDirectory() as folder:
        return Splits(*(read_sentences(_written(Path(folder), *part)) for part in ((0, 48), (48, 12), (60, 12))))


def _written(folder: Path, first: int, count: int) -> Path:
    places, fruits = ("the mill", "place", "restaurant italian"), ("apples", "citizens good", "year")
    file = folder / f"{first}.txt"
    with file.open("w") as out:
        for i in range(first, first + count):
            rows = [("name", OUTSIDE), (":", OUTSIDE)] + _named(places[i % 3], "LOC")
            rows += [("has", OUTSIDE)] + _named(fruits[i // 3 % 3], "MISC") + [(str(i % 7), OUTSIDE), (".", OUTSIDE)]
            out.write("\n".join(f"{word} NN {tag}" for word, tag in rows) + "\n\n")
    return file


OUTSIDE = "O"


def _named(words: str, kind: str) -> list[tuple[str, str]]:
    return [(word, f"{'I' if i else 'B'}-{kind}") for i, word in enumerate(words.split())]
