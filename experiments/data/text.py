"""Two texts without a download: the prose of Python's reference manual, and the standard library's source.

The split into train, validation and test is by file (for the manual: by topic), and texts that repeat others are left
out before it, so that no test file has a copy in the training split.
"""

import hashlib
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The manual itself, tests, other people's packages, tables of numbers made by a program, and what differs per machine.
_SKIPPED_FOLDERS = re.compile(
    r"pydoc_data|tests?|idle_test|site-packages|dist-packages|encodings|__pycache__|config-.*"
)
_SKIPPED_FILES = re.compile(r"_sysconfigdata.*|sitecustomize\.py|usercustomize\.py")
_LONGEST, _SHORTEST = 200_000, 200  # bytes of a file; a longer one would be a split of its own


@dataclass(frozen=True)
class Document:
    """A file, or a topic of the manual."""

    name: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents of one domain, in three splits that are disjoint by document."""

    label: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]

    def bytes(self, split: str) -> np.ndarray:
        """The documents of a split one after the other, a zero byte between them: (length,) uint8."""
        documents = getattr(self, split)
        return np.frombuffer(b"\0".join(document.text for document in documents), np.uint8)

    def digest(self) -> str:
        """A hash of all names and texts and of which split they are in."""
        hashed = hashlib.sha256()
        for split in ("train", "validation", "test"):
            for document in getattr(self, split):
                hashed.update(f"{split}\0{document.name}\0{len(document.text)}\0".encode() + document.text)
        return hashed.hexdigest()


def python_docs() -> Corpus:
    """English prose: the topics of the language reference that `help()` shows (`pydoc_data.topics`)."""
    topics = pydoc_data.topics.topics
    documents = [Document(name, text.encode()) for name, text in sorted(topics.items())]
    return _split("prose", _without_repeats(documents))


def python_source() -> Corpus:
    """Python code: the `.py` files of the standard library of the interpreter that runs this.

    Raises:
      FileNotFoundError: if this interpreter comes without the sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = list(_sources(root))
    if len(documents) < 20:
        raise FileNotFoundError(
            f"the standard library's sources are not at {root}: {len(documents)} usable .py files, expected hundreds; "
            "use an interpreter that has them (a build from python.org, a distribution's package, conda, pyenv, uv)"
        )
    return _split("Python", _without_repeats(documents))


def _sources(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        *folders, file = path.relative_to(root).parts
        if any(map(_SKIPPED_FOLDERS.fullmatch, folders)) or _SKIPPED_FILES.fullmatch(file):
            continue
        text = path.read_bytes().replace(b"\r\n", b"\n")
        if _SHORTEST <= len(text) <= _LONGEST and b"\0" not in text and _is_utf8(text):
            yield Document("/".join((*folders, file)), text)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _without_repeats(documents: Iterable[Document]) -> list[Document]:
    """Leaves out what stands, by half or more of its paragraphs' bytes, in the larger documents.

    The manual has many topics twice: "for", "if", "try" and "with" are sections of "compound".
    """
    kept: list[Document] = []
    seen: set[bytes] = set()
    for document in _by_size(documents):
        paragraphs = [b" ".join(part.split()) for part in document.text.split(b"\n\n")]
        repeated = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        if 2 * repeated < sum(map(len, paragraphs)):
            kept.append(document)
            seen.update(paragraphs)
    return kept


def _split(label: str, documents: Iterable[Document]) -> Corpus:
    """Splits documents: of every eight in order of size the fourth goes to validation and the seventh to test."""
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for i, document in enumerate(_by_size(documents)):
        splits[{3: "validation", 6: "test"}.get(i % 8, "train")].append(document)
    return Corpus(label, **{split: tuple(sorted(part, key=lambda d: d.name)) for split, part in splits.items()})


def _by_size(documents: Iterable[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: (-len(document.text), document.name))
