"""Data sets by name, through the `datasets` library, where it is installed and a hub or its cache can be reached.

Rows come memory-mapped from disk: what is larger than memory is read as it is asked for.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.data.examples import Classified, Prompted
from experiments.data.files import DataError, Malformed, collect, filled
from experiments.data.glue import task

# Where the hub's columns are named otherwise than in the GLUE download.
_COLUMNS = {"mnli": ("premise", "hypothesis"), "mrpc": ("sentence1", "sentence2")}


def from_hub(
    name: str, configuration: str | None = None, *, split: str, revision: str | None = None, **options: Any
) -> Sequence[Mapping[str, Any]]:
    """The rows of a data set's split.

    Args:
      name: "nyu-mll/glue", "openai/gsm8k"; or "json", "csv", "parquet", "text", "imagefolder" with `data_files=`.
      configuration: "mnli", "main".
      split: "train", "validation", "train[:1%]".
      revision: a commit, to get the same data every time.
      options: of `datasets.load_dataset`.

    Raises:
      ImportError: if `datasets` is not installed.
      DataError: if the data set, its configuration or the split is not there, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name!r} comes through the datasets library, which is not installed: pip install datasets, or read local "
            "files with the other modules of experiments.data"
        ) from error
    try:
        rows: Sequence[Mapping[str, Any]] = datasets.load_dataset(
            name, configuration, split=split, revision=revision, **options
        )
    except (OSError, ValueError) as error:  # ConnectionError and DatasetNotFoundError are among them
        what = f"{name!r}" if configuration is None else f"{name!r} ({configuration})"
        cause = str(error).rstrip(".")
        raise DataError(
            f"split {split!r} of {what} could not be loaded: {cause}. Without a connection, set HF_HUB_OFFLINE=1 to "
            "use what is in the cache, or read local files"
        ) from error
    return rows


def classified(name: str, rows: Iterable[Mapping[str, Any]], *, malformed: Malformed = "raise") -> list[Classified]:
    """Rows of "nyu-mll/glue" as examples of the GLUE task `name`. A label of -1 (test splits) becomes None.

    `malformed` is as in `read_glue`.
    """
    found = task(name)
    text, pair = _COLUMNS.get(name, (found.text, found.pair))

    def read(row: Mapping[str, Any]) -> Classified:
        if missing := [column for column in (text, pair, "label") if column is not None and column not in row]:
            raise DataError(f"no column {missing[0]!r}; there are {', '.join(map(repr, row))}")
        label = row["label"]
        if found.labels and not -1 <= label < len(found.labels):
            raise DataError(f"label {label}, expected 0 to {len(found.labels) - 1}, or -1 for none")
        second = None if pair is None else filled(row[pair], pair)
        return Classified(filled(row[text], text), None if label == -1 else label, second)

    return collect(name, enumerate(rows, 1), read, unit="row", malformed=malformed)


def prompted(
    rows: Iterable[Mapping[str, Any]], prompt: str = "question", completion: str = "answer", template: str = "{}"
) -> list[Prompted]:
    """Rows with a prompt and a completion, those of "openai/gsm8k" unless other columns are named."""
    return [Prompted(template.replace("{}", row[prompt], 1), row[completion]) for row in rows]
