"""WebNLG and DART: texts from triples (subject, property, object).

Both become the sources that the LoRA paper trained on: `subject : property : object`, with ` | ` between triples.

Sources: Gardent et al., "Creating Training Corpora for NLG Micro-Planning", ACL 2017 (XML, and JSON from its own
converter); Nan et al., "DART: Open-Domain Structured Data Record to Text Generation", arXiv 2007.02871; the form of the
sources, what is left out and the seen categories: microsoft/LoRA, examples/NLG/src/format_converting_{webnlg,dart}.py.
"""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.data.examples import References, grouped
from experiments.data.files import DataError, collect, existing, filled

Triple = tuple[str, str, str]
SEEN = (
    "Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam", "University",
    "WrittenWork",
)  # fmt: skip
"""WebNLG 2017's categories that the training split has; the test split has five more."""


def linearised(triples: Iterable[Triple]) -> str:
    """Triples as one line.

    >>> linearised([("Aarhus", "leaderName", "Jacob_Bundsgaard"), ("Aarhus", "country", "Denmark")])
    'Aarhus : leaderName : Jacob_Bundsgaard | Aarhus : country : Denmark'
    """
    return " | ".join(" : ".join(triple) for triple in triples)


def read_webnlg(path: str | Path) -> list[References]:
    """References by triples, the group being the category.

    Texts that are not English, or that the annotators did not find good, are left out.

    Args:
      path: a `.xml` of the challenge's releases, a `.json` as it lies in the LoRA repository, or a folder, of which all
        `.xml` below it are read.

    Raises:
      DataError: with the file and the entry.
    """
    path = existing(path, "file or folder")
    paths = sorted(path.rglob("*.xml")) if path.is_dir() else [path]
    if not paths:
        raise DataError(f"'{path}' has no .xml files")
    read = {path: _json_entries(path) if path.suffix == ".json" else _xml_entries(path) for path in paths}
    return grouped(pair for path, entries in read.items() for found in _pairs(path, entries) for pair in found)


def read_dart(path: str | Path) -> list[References]:
    """References by triples, the properties in lower case, the group being where a text comes from.

    Args:
      path: a `.json` of DART: a list of `{"tripleset": [[s, p, o]], "annotations": [{"source", "text"}]}`.

    Raises:
      DataError: with the file and the entry.
    """
    path = existing(path)

    def read(entry: Any) -> list[tuple[str, str, str]]:
        try:
            triples = [(subject, relation.lower(), object_) for subject, relation, object_ in entry["tripleset"]]
            texts = [(note["text"], note.get("source", "")) for note in entry["annotations"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"no 'tripleset' of triples with 'annotations': {error!r}") from error
        source = linearised(triples)
        return [(filled(source, "tripleset"), filled(text), origin) for text, origin in texts]

    found = collect(path, enumerate(_json(path, list), 1), read, unit="entry")
    return grouped(pair for pairs in found for pair in pairs)


# -- WebNLG's entries: (triples, texts with their comments, category) --------------------------------------------------

Entry = tuple[list[Triple], list[tuple[str, str]], str]


def _pairs(path: Path, entries: Iterator[Entry]) -> list[list[tuple[str, str, str]]]:
    def read(entry: Entry) -> list[tuple[str, str, str]]:
        triples, texts, category = entry
        source = filled(linearised(triples), "tripleset")
        return [(source, filled(text), category) for text, comment in texts if comment in ("good", "")]

    return collect(path, enumerate(entries, 1), read, unit="entry")


def _xml_entries(path: Path) -> Iterator[Entry]:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{path}, line {error.position[0]}: not XML ({error})") from error
    entries = root.findall(".//entry")
    if not entries:
        raise DataError(f"{path}: no <entry> below <{root.tag}>, expected WebNLG's <benchmark><entries><entry>")
    for number, entry in enumerate(entries, 1):
        triples = [
            _split(f"{path}, entry {number}", found.text or "") for found in entry.findall("modifiedtripleset/mtriple")
        ]
        english = [found for found in entry.findall("lex") if found.get("lang", "") in ("", "en")]
        texts = [(found.findtext("text") or found.text or "", found.get("comment", "")) for found in english]
        yield triples, texts, entry.get("category", "")


def _split(where: str, text: str) -> Triple:
    fields = [field.strip() for field in text.split(" | ")]
    if len(fields) != 3:
        raise DataError(f"{where}: <mtriple> has {len(fields)} parts between ' | ', expected 3: {text!r}")
    return fields[0], fields[1], fields[2]


def _json_entries(path: Path) -> Iterator[Entry]:
    entries = _json(path, dict).get("entries")
    if not isinstance(entries, list):
        raise DataError(f"{path}: no list 'entries', expected WebNLG's {{'entries': [{{'1': ...}}]}}")
    for number, numbered in enumerate(entries, 1):
        try:
            (entry,) = numbered.values()  # each under its own number
            triples = [(t["subject"], t["property"], t["object"]) for t in entry["modifiedtripleset"]]
            yield triples, [(text["lex"], text["comment"]) for text in entry["lexicalisations"]], entry["category"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}, entry {number}: not an entry of WebNLG: {error!r}") from error


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, kind):
        raise DataError(f"{path}: a {type(content).__name__}, expected a {kind.__name__}")
    return content
