"""A user's own data: files, folders and names of the `datasets` library, read by what they hold.

    own = read_own("mine.jsonl")
    own.how, own.splits["train"][0].value

`forms` has the columns that are known, `held_out` how examples are held out where no split is given.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data.chat import read_chat
from experiments.data.examples import Chat, Message, Prompted
from experiments.data.files import DataError, existing, lines
from experiments.data.forms import Form, Kind, form_of
from experiments.data.held_out import Split, held_out
from experiments.data.hub import from_hub
from experiments.data.images import SUFFIXES as IMAGES
from experiments.data.images import check_image
from experiments.data.labels import Labels, labels_of
from experiments.data.table import SUFFIXES as TABLES
from experiments.data.table import Record, Table, read_table, table

NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",),
}  # fmt: skip
"""Names of the files and folders of a split."""
METADATA = ("metadata.jsonl", "metadata.csv")
FEW = 20  # documents: of fewer, each is cut in three


class Labelled(NamedTuple):
    """A text, a pair of texts or the path of an image, and its label as it is written."""

    inputs: tuple[str, ...]
    label: Any


class Row(NamedTuple):
    """An example: where it stands, what tells it apart (the question, not its answer), and itself."""

    place: str
    key: str
    value: Labelled | Prompted | Chat | str


@dataclass(frozen=True)
class Own:
    """Data as it was understood.

    Attributes:
      kind: what it is for.
      source: where it was read.
      how: the kind and why it is that, in words.
      splits: examples of "train", "validation" and "test"; the last two may be the same.
      held: how the splits came about, in words.
      labels: the classes, or that there are values; None for kinds without labels.
      notes: what may be a mistake, in words.
    """

    kind: Kind
    source: str
    how: str
    splits: dict[Split, Sequence[Row]]
    held: str
    labels: Labels | None
    notes: tuple[str, ...]


def read_own(
    data: str,
    *,
    kind: Kind | None = None,
    columns: Sequence[str] = (),
    validation: str | None = None,
    test: str | None = None,
    share: float = 0.1,
) -> Own:
    """Reads data and says what it is.

    Args:
      data: a `.jsonl`, `.json`, `.csv`, `.tsv` or `.txt` file; a folder of texts or images, or with a file or a folder
        for each split (train, validation or valid or val or dev, test); or the name of a data set, "imdb" or
        "nyu-mll/glue:sst2", for the `datasets` library.
      kind: of task; inferred from the columns or the files when None.
      columns: the ones to read, the label or the answer last; the usual names when empty.
      validation, test: files or folders of those splits.
      share: of the examples that is held out where there are no such splits.

    Raises:
      DataError: in words, with the file and the line.
      ImportError: for a data set's name without the `datasets` library.
    """
    parts: dict[Split, Any] = {name: part for name, part in _parts(data).items() if part is not None}
    given: dict[Split, str | None] = {"validation": validation, "test": test}
    parts |= {name: existing(path, "file or folder") for name, path in given.items() if path}
    rows: dict[Split, list[Row]] = {}
    how = ""
    for name, part in parts.items():
        kind, understood, rows[name] = _read(part, kind, columns)
        how = how or understood
        if not rows[name]:
            raise DataError(f"{part}: no examples")
    assert kind is not None
    labels = None
    if kind in ("classification", "images"):
        labels = labels_of({split: [(row.place, _label(row)) for row in part] for split, part in rows.items()})
    splits, held = _completed(rows, kind, share, labels if labels and labels.classes else None)
    return Own(kind, data, how, splits, held, labels, (*_shared(rows), *(labels.notes if labels else ())))


# -- where it lies -----------------------------------------------------------------------------------------------------


class _Hub(NamedTuple):
    name: str
    configuration: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.name} ({self.split})"


def _parts(data: str) -> dict[Split, Any]:
    """The file, folder or part of the hub that each split is read from."""
    path = Path(data)
    if not path.exists():
        if path.suffix in (*TABLES, ".txt") or data.startswith((".", "/", "~")) or data.count("/") > 1:
            existing(path, "file or folder")
        try:
            return _of_hub(data)
        except (DataError, ImportError) as error:
            raise type(error)(f"there is no file or folder {data!r}; as the name of a data set: {error}") from error
    if path.is_dir():
        found: dict[Split, Any] = {split: _named(path, names) for split, names in NAMES.items()}
        if found["train"] is not None:
            return found
        if any(part is not None for part in found.values()):
            raise DataError(f"'{path}' has {_listed(path)}, and nothing named train: name the rows to learn train.*")
    return {"train": path}


def _named(folder: Path, names: Sequence[str]) -> Path | None:
    found = sorted(
        entry
        for entry in folder.iterdir()
        if (entry.name in names if entry.is_dir() else entry.stem in names and entry.suffix in (*TABLES, ".txt"))
    )
    if len(found) > 1:
        raise DataError(f"'{folder}' has {' and '.join(entry.name for entry in found)}: keep one for a split")
    return found[0] if found else None


def _of_hub(data: str) -> dict[Split, Any]:
    """The splits that a data set has, by their names in `datasets`."""
    name, _, configuration = data.partition(":")
    parts: dict[Split, Any] = {"train": _Hub(name, configuration or None, "train")}
    others: tuple[Split, ...] = ("validation", "test")
    for split in others:
        there = (other for other in NAMES[split] if _there(name, configuration, other))
        parts[split] = next((_Hub(name, configuration or None, other) for other in there), None)
    return parts


def _there(name: str, configuration: str, split: str) -> bool:
    try:
        from_hub(name, configuration or None, split=split)
    except DataError as error:
        if isinstance(error.__cause__, ValueError):  # "Unknown split"; the data set itself is asked for with train
            return False
        raise
    return True


def _listed(folder: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing in it"


# -- what it holds -----------------------------------------------------------------------------------------------------


def _read(part: Any, kind: Kind | None, columns: Sequence[str]) -> tuple[Kind, str, list[Row]]:
    if isinstance(part, _Hub):
        rows = from_hub(part.name, part.configuration, split=part.split)
        records = (Record(f"{part}, row {i}", row) for i, row in enumerate(rows, 1))
        return _of_table(table(str(part), records), kind, columns, Path())
    if part.is_dir():
        return _of_folder(part, kind, columns)
    if part.suffix.lower() == ".txt":
        if kind not in (None, "text"):
            raise DataError(f"'{part}' is a text, and task.kind={kind}: give rows in {', '.join(TABLES)}")
        return "text", "text, as the file is .txt" if kind is None else "text, as told", [_document(part)]
    return _of_table(read_table(part), kind, columns, part.parent)


def _of_folder(folder: Path, kind: Kind | None, columns: Sequence[str]) -> tuple[Kind, str, list[Row]]:
    for name in METADATA:
        if (folder / name).exists():
            return _of_table(read_table(folder / name), kind or "images", columns, folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    images = [path for path in files if path.suffix.lower() in IMAGES]
    texts = [path for path in files if path.suffix.lower() == ".txt"]
    if images and texts and kind is None:
        raise DataError(
            f"'{folder}' has {len(images)} images and {len(texts)} texts: write task.kind=images or task.kind=text"
        )
    reason = "as told" if kind else "as the folder holds {}"
    if images and kind in (None, "images"):
        loose = [path for path in images if path.parent == folder]
        if loose:
            raise DataError(
                f"'{loose[0]}' lies in no folder of a class: one folder for each class, or a {' or '.join(METADATA)} "
                "with file_name and label"
            )
        return "images", f"images, {reason.format('images')}, a class each", [_image(p, folder) for p in images]
    if texts and kind in (None, "text"):
        return "text", f"text, {reason.format('.txt files')}", [_document(path) for path in texts]
    raise DataError(
        f"'{folder}' has {_listed(folder)}"
        + (f", and task.kind={kind}" if kind else "")
        + ": expected .txt files, a folder of images for each class, or train and validation in "
        + ", ".join(TABLES)
    )


def _document(path: Path) -> Row:
    text = "\n".join(line for _, line in lines(path))
    if not text.strip():
        raise DataError(f"{path}: an empty text: remove the file or fill it")
    return Row(str(path), text, text)


def _image(path: Path, folder: Path) -> Row:
    check_image(path)
    place = path.relative_to(folder)
    return Row(str(path), place.as_posix(), Labelled((str(path),), place.parts[0]))


def _of_table(found: Table, kind: Kind | None, columns: Sequence[str], folder: Path) -> tuple[Kind, str, list[Row]]:
    form, how = form_of(found.name, found.columns, kind, columns)
    return kind or form.kind, how, [_row(record, form, kind or form.kind, folder) for record in found.records]


def _row(record: Record, form: Form, kind: Kind, folder: Path) -> Row:
    *inputs, last = form.columns
    if form.kind == "completion":
        prompt, completion = _prompt(record, form), record.text(last)
        if kind == "chat":
            prompt = "\n\n".join([record.text(inputs[0]), *_extra(record, form)])
            return Row(record.place, prompt, Chat((Message("user", prompt), Message("assistant", completion))))
        return Row(record.place, prompt, Prompted(prompt, completion))
    if form.kind == "chat":
        chat = read_chat(record.place, record.value(last))
        first = next(i for i, message in enumerate(chat.messages) if message.role == "assistant")
        return Row(record.place, json.dumps(chat.messages[:first]), chat)
    if form.kind == "classification":
        texts = tuple(record.text(column) for column in inputs)
        return Row(record.place, "\0".join(texts), Labelled(texts, record.value(last)))
    if form.kind == "images":
        name = record.text(inputs[0])
        try:
            check_image(folder / name)
        except DataError as error:
            raise DataError(f"{record.place}: {error}") from error
        return Row(record.place, name, Labelled((str(folder / name),), record.value(last)))
    text = record.text(last)
    return Row(record.place, text, text)


def _prompt(record: Record, form: Form) -> str:
    first = record.text(form.columns[0])
    extra = _extra(record, form)
    before, *between = form.template[bool(extra)].split("{}")
    return before + "".join(part + after for part, after in zip([first, *extra], between, strict=True))


def _extra(record: Record, form: Form) -> list[str]:
    """Input of an instruction, where it is filled."""
    if not form.optional or record.cells.get(form.optional) in (None, ""):
        return []
    return [record.text(form.optional)]


# -- splits ------------------------------------------------------------------------------------------------------------


def _label(row: Row) -> Any:
    assert isinstance(row.value, Labelled)
    return row.value.label


def _completed(
    rows: dict[Split, list[Row]], kind: Kind, share: float, labels: Labels | None
) -> tuple[dict[Split, Sequence[Row]], str]:
    """All three splits, and where those came from that were not given."""
    if "validation" in rows:
        return ({**rows}, "as given") if "test" in rows else (
            {**rows, "test": rows["validation"]}, "as given; there is no test split, validation stands for it"
        )  # fmt: skip
    whole, test = rows["train"], "test" not in rows
    note = f"{50 * share:g} %{' for each of validation and test' if test else ' for validation'} held out"
    rest: dict[Split, Sequence[Row]] = {name: part for name, part in rows.items() if name != "train"}
    if isinstance(whole[0].value, str) and len({row.key for row in whole}) < FEW:
        return {**_cut(whole, share, test=test), **rest}, f"{note}: the end of each text"
    strata = [labels.number(row.place, _label(row)) for row in whole] if labels else ()
    names = held_out([row.key for row in whole], share, strata=strata, test=test)
    found: dict[Split, Sequence[Row]] = {
        split: [row for row, name in zip(whole, names, strict=True) if name == split] for split in NAMES
    }
    what = {"classification": "text", "text": "text", "images": "file's name"}.get(kind, "question")
    return {**found, **rest}, f"{note} by the hash of the {what}{', of each class alike' if labels else ''}"


def _cut(rows: Sequence[Row], share: float, *, test: bool) -> dict[Split, Sequence[Row]]:
    """Each text cut in two or three at ends of lines, or else of words."""
    if not 0 < share <= 0.5:
        raise DataError(f"held_out={share:g} of the texts: expected more than 0 and at most 0.5")
    found: dict[Split, list[Row]] = {"train": [], "validation": [], **({"test": []} if test else {})}
    for place, _, text in rows:
        assert isinstance(text, str)
        ends = [_end(text, round(len(text) * (1 - share))), _end(text, round(len(text) * (1 - share / 2))), len(text)]
        if not test:
            ends = ends[1:]
        for (name, part), begin, end in zip(found.items(), [0, *ends], ends, strict=False):
            if not text[begin:end].strip():
                raise DataError(f"{place}: {len(text)} characters are too few to hold a part of them out: give more")
            part.append(Row(place, f"{name}\0{text}", text[begin:end]))
    return {**found}


def _end(text: str, near: int) -> int:
    """End of the line, or else of the word, that a place lies in."""
    for stop in ("\n", " "):
        if 0 <= (found := text.find(stop, near)) < near + max(80, len(text) // 50):
            return found + 1
    return near


def _shared(rows: dict[Split, list[Row]]) -> list[str]:
    """Note on held-out examples that are learned, too."""
    learned = {row.key for row in rows["train"]}
    notes = []
    for name, part in rows.items():
        both = [row.place for row in part if row.key in learned]
        if name != "train" and both:
            count = f"{len(both):,} of the {len(part):,} {name} examples"
            notes.append(f"{count} are in the training split, the first: {both[0]}")
    return notes
