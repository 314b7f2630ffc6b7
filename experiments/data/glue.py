"""GLUE's nine tasks, from the TSV files of the GLUE download, with their columns, labels and metrics.

Classes are numbered as the `datasets` library numbers them, which is what adapters trained with transformers expect.
Some checkpoints count otherwise (fairseq's RoBERTa for MNLI: contradiction, neutral, entailment): pass `labels`.

Source: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", arXiv
1804.07461; columns as the download of gluebenchmark.com has them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.data.examples import Classified
from experiments.data.files import DataError, Malformed, columns, existing, filled, lines, read_lines


class Task(NamedTuple):
    """A task of GLUE.

    Attributes:
      folder: in the download.
      text, pair: the columns of the sentences, `pair` None where there is one.
      label: the column of the label.
      labels: as written in the files, in the order of the classes; empty for regression (STS-B, 0 to 5).
      metrics: names in `experiments.metrics.glue`, the first being what the LoRA paper's Table 2 reports.
      names: columns of train and dev, where the files have no header.
    """

    folder: str
    text: str
    pair: str | None
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    names: tuple[str, ...] = ()

    @property
    def classes(self) -> int | None:
        """The number of classes, None for regression."""
        return len(self.labels) or None


_ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    "cola": Task("CoLA", "sentence", None, "label", ("0", "1"), ("matthews",), ("source", "label", "mark", "sentence")),
    "sst2": Task("SST-2", "sentence", None, "label", ("0", "1"), ("accuracy",)),
    "mrpc": Task("MRPC", "#1 String", "#2 String", "Quality", ("0", "1"), ("accuracy", "f1")),
    "qqp": Task("QQP", "question1", "question2", "is_duplicate", ("0", "1"), ("accuracy", "f1")),
    "stsb": Task("STS-B", "sentence1", "sentence2", "score", (), ("pearson", "spearman")),
    "mnli": Task(
        "MNLI", "sentence1", "sentence2", "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",)
    ),
    "qnli": Task("QNLI", "question", "sentence", "label", _ENTAILMENT, ("accuracy",)),
    "rte": Task("RTE", "sentence1", "sentence2", "label", _ENTAILMENT, ("accuracy",)),
    "wnli": Task("WNLI", "sentence1", "sentence2", "label", ("0", "1"), ("accuracy",)),
}
SPLITS = ("train", "dev", "test")
_MNLI_SPLITS = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
_STSB_RANGE = (0.0, 5.0)


def task(name: str) -> Task:
    """A task by its name in `GLUE`.

    Raises:
      DataError: listing the tasks.
    """
    if name not in GLUE:
        raise DataError(f"GLUE has no task {name!r}; there are {', '.join(GLUE)}")
    return GLUE[name]


def read_glue(
    name: str, path: str | Path, split: str = "train", *, labels: Sequence[str] = (), malformed: Malformed = "raise"
) -> list[Classified]:
    """A split of a task.

    Args:
      name: of the task, one of `GLUE`.
      path: the folder of the download, the task's folder in it, or a `.tsv`.
      split: "train", "dev" or "test"; for MNLI "train", "dev_matched", "dev_mismatched", "test_matched" or
        "test_mismatched". Test splits have no labels.
      labels: the labels in the order of the classes, where it is not the task's own.
      malformed: "skip" leaves lines out that are not as they should be, and warns. QQP's training split needs it: some
        of its lines lack columns, and some questions are empty.

    Raises:
      DataError: with the file and the line.
    """
    found = task(name)
    order = tuple(labels) or found.labels
    if sorted(order) != sorted(found.labels):
        raise DataError(f"labels={list(labels)} is no order of {name}'s labels {list(found.labels)}")
    splits = _MNLI_SPLITS if name == "mnli" else SPLITS
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; there are {', '.join(splits)}")
    file = _file(Path(path), found, split)
    tested = split.startswith("test")
    bare = bool(found.names) and not tested  # CoLA's train and dev have no header
    names = found.names if bare else _header(file, found, tested=tested)

    def read(line: str) -> Classified:
        row = columns(line, names)
        label = None if tested else label_of(row[found.label], order)
        pair = None if found.pair is None else filled(row[found.pair], found.pair)
        return Classified(filled(row[found.text], found.text), label, pair)

    return read_lines(file, read, skip_header=not bare, malformed=malformed)


def label_of(text: str, labels: Sequence[str]) -> int | float:
    """The class of a label as it is written, or the value from 0 to 5 where there are no classes.

    Raises:
      DataError: if it is none of them.
    """
    if labels:
        if text not in labels:
            raise DataError(f"label {text!r}, expected one of {', '.join(map(repr, labels))}")
        return labels.index(text)
    low, high = _STSB_RANGE
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise DataError(f"score {text!r}, expected a number from {low:g} to {high:g}")
    return value


def _file(path: Path, found: Task, split: str) -> Path:
    if path.suffix == ".tsv":
        return existing(path)
    folder = existing(path, "folder")
    nested = folder / found.folder
    return existing((nested if nested.is_dir() else folder) / f"{split}.tsv")


def _header(file: Path, found: Task, *, tested: bool) -> tuple[str, ...]:
    names = tuple(next(lines(file), (1, ""))[1].split("\t"))
    texts = (found.text,) if found.pair is None else (found.text, found.pair)
    for name in texts if tested else (*texts, found.label):
        if name not in names:
            raise DataError(f"{file}, line 1: no column {name!r}; there are {', '.join(map(repr, names))}")
    return names
