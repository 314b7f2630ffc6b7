"""The papers' data sets in their real formats, rows of tokens, batches, and what is larger than memory."""

import itertools
import json
import os
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.data import batches as batching
from experiments.data.batches import Batches, Shard
from experiments.data.e2e import read_e2e
from experiments.data.examples import Classified, Prompted, References, prompted
from experiments.data.files import DataError, existing, lines
from experiments.data.glue import GLUE, read_glue
from experiments.data.hub import classified, from_hub
from experiments.data.hub import prompted as prompted_rows_of_hub
from experiments.data.images import image_files, read_image_folder
from experiments.data.instructions import INSTRUCTION_PROMPT, read_gsm8k, read_instructions
from experiments.data.labelled_text import read_cola, read_labelled, read_trec
from experiments.data.line_file import LineFile
from experiments.data.packing import first_fit
from experiments.data.pipeline import (
    Rows,
    classified_rows,
    packed_rows,
    prompted_rows,
    tokenise_classified,
    tokenise_prompted,
)
from experiments.data.token_file import TokenWindows, read_pieces, read_tokens, write_tokens
from experiments.data.triples import SEEN, read_dart, read_webnlg


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def fails(function, *arguments, **options):
    """The text of the error."""
    with pytest.raises(DataError) as error:
        function(*arguments, **options)
    return str(error.value)


def bert(text, pair=None):
    """Bytes between 1 ([CLS]) and 2 ([SEP])."""
    return [1, *text.encode(), 2, *([*pair.encode(), 2] if pair is not None else [])]


# -- generation --------------------------------------------------------------------------------------------------------

E2E_TEXT = """\
name : Blue Spice | Type : coffee shop||A coffee shop called Blue Spice .
name : Cotto | near : Café||Cotto is near Café .
name : Blue Spice | Type : coffee shop||Blue Spice is a coffee shop .
"""
E2E_CSV = """\
\ufeffmr,ref,fixed
"name[Blue Spice], eatType[pub]","A pub, ""Blue Spice"".",0
"name[Cotto]",Cotto.,1
"name[Blue Spice], eatType[pub]",Blue Spice is a pub.,0
"""


def test_e2e_in_both_forms(tmp_path):
    assert read_e2e(write(tmp_path, "test.txt", E2E_TEXT)) == [
        References(
            "name : Blue Spice | Type : coffee shop",
            ("A coffee shop called Blue Spice .", "Blue Spice is a coffee shop ."),
        ),
        References("name : Cotto | near : Café", ("Cotto is near Café .",)),
    ]
    found = read_e2e(write(tmp_path, "test.csv", E2E_CSV))
    assert found == [
        References("name[Blue Spice], eatType[pub]", ('A pub, "Blue Spice".', "Blue Spice is a pub.")),
        References("name[Cotto]", ("Cotto.",)),
    ]
    assert prompted(found)[1] == Prompted("name[Blue Spice], eatType[pub]", "Blue Spice is a pub.")


WEBNLG_XML = """\
<benchmark><entries>
  <entry category="Airport" eid="Id1" size="2">
    <originaltripleset><otriple>A | b | C</otriple></originaltripleset>
    <modifiedtripleset><mtriple>Aarhus | leaderName | Jacob_Bundsgaard</mtriple><mtriple>Aarhus | x | "2"</mtriple></modifiedtripleset>
    <lex comment="good" lid="Id1">The leader of Aarhus is Jacob Bundsgaard &amp; co.</lex>
    <lex comment="toFix" lid="Id2">Wrong.</lex>
    <lex comment="good" lid="Id3" lang="ru">Не то.</lex>
    <lex comment="good" lid="Id4" lang="en"><text>Aarhus is led by him.</text><template>PATIENT-1</template></lex>
  </entry>
</entries></benchmark>
"""


def webnlg_entry(number, triples, texts, category):
    return {number: {
        "category": category,
        "lexicalisations": [{"comment": comment, "lang": "", "lex": lex, "xml_id": "Id1"} for lex, comment in texts],
        "modifiedtripleset": [{"subject": s, "property": p, "object": o} for s, p, o in triples],
    }}  # fmt: skip


def test_webnlg_as_xml(tmp_path):
    expected = References(
        'Aarhus : leaderName : Jacob_Bundsgaard | Aarhus : x : "2"',
        ("The leader of Aarhus is Jacob Bundsgaard & co.", "Aarhus is led by him."),
        "Airport",
    )
    file = write(tmp_path, "1triples/airport.xml", WEBNLG_XML)
    assert read_webnlg(file) == [expected] and read_webnlg(tmp_path) == [expected]
    assert len(SEEN) == 10 and "Airport" in SEEN and "Athlete" not in SEEN


def test_webnlg_as_the_lora_repository_has_it(tmp_path):
    triples = [("Aarhus", "leaderName", "Jacob_Bundsgaard")]
    entries = [
        webnlg_entry("1", triples, [("The leader is Jacob.", "good"), ("Bad.", "bad")], "Airport"),
        webnlg_entry("2", triples, [("Jacob leads Aarhus.", "good")], "Airport"),
    ]
    file = write(tmp_path, "dev.json", json.dumps({"entries": entries}))
    source = "Aarhus : leaderName : Jacob_Bundsgaard"
    assert read_webnlg(file) == [References(source, ("The leader is Jacob.", "Jacob leads Aarhus."), "Airport")]


def test_dart(tmp_path):
    entry = {
        "tripleset": [["Mars Hill College", "JOINED", "1973"], ["Mars Hill College", "LOCATION", "Mars Hill"]],
        "subtree_was_extended": True,
        "annotations": [{"source": "WikiTableQuestions", "text": "A school from Mars Hill joined in 1973."}],
    }
    assert read_dart(write(tmp_path, "dart.json", json.dumps([entry]))) == [
        References(
            "Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill",
            ("A school from Mars Hill joined in 1973.",),
            "WikiTableQuestions",
        )
    ]


def test_gsm8k_and_instructions(tmp_path):
    row = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
    file = write(tmp_path, "train.jsonl", json.dumps(row) + "\n")
    assert read_gsm8k(file) == [Prompted("Question: What is 2 + 3?\nAnswer:", row["answer"])]
    assert read_gsm8k(file, INSTRUCTION_PROMPT)[0].prompt.endswith("### Instruction:\nWhat is 2 + 3?\n\n### Response:")
    file = write(tmp_path, "alpaca.jsonl", '{"instruction": "Say {} twice.", "output": "{} {}"}\n')
    assert read_instructions(file, "instruction", "output", "> {}\n") == [Prompted("> Say {} twice.\n", "{} {}")]


# -- classification ----------------------------------------------------------------------------------------------------

GLUE_FILES = {  # as in the GLUE download: task -> (split, header, line, example)
    "cola": ("dev", None, "gj04\t0\t*\tThe sailors.", Classified("The sailors.", 0)),
    "sst2": ("train", "sentence\tlabel", "a fine film \t1", Classified("a fine film", 1)),
    "mrpc": (
        "train", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tHe said "so.\tSo he said.',
        Classified('He said "so.', 1, "So he said."),
    ),
    "qqp": (
        "dev", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWhy?\tWhy so?\t0", Classified("Why?", 0, "Why so?")
    ),
    "stsb": (
        "train", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t4.750", Classified("A plane.", 4.75, "An air plane."),
    ),
    "mnli": (
        "dev_matched",
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
        "sentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label",
        "0\t1\t1e\tslate\t( )\t( )\t(ROOT)\t(ROOT)\tOne.\tTwo.\tneutral\te\te\te\te\tcontradiction", Classified("One.", 2, "Two."),
    ),
    "qnli": (
        "train", "index\tquestion\tsentence\tlabel", "0\tWhen?\tIn 1990.\tentailment", Classified("When?", 0, "In 1990.")
    ),
    "rte": (
        "dev", "index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tnot_entailment", Classified("A.", 1, "B.")
    ),
    "wnli": ("dev", "index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t1", Classified("A.", 1, "B.")),
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_glue(name, tmp_path):
    split, header, line, example = GLUE_FILES[name]
    text = "".join(f"{part}\n" for part in (header, line) if part)
    file = write(tmp_path, f"{GLUE[name].folder}/{split}.tsv", text)
    for path in (tmp_path, file.parent, file):
        assert read_glue(name, path, split) == [example]
    classes = GLUE[name].classes
    tokens = tokenise_classified([example], bert, length=64, classes=classes)
    assert classified_rows(tokens, 64)[0]["labels"].dtype == (np.int32 if classes else np.float32)


def test_glue_has_these_tasks():
    assert {name: (task.classes, task.pair is not None) for name, task in GLUE.items()} == {
        "cola": (2, False), "sst2": (2, False), "mrpc": (2, True), "qqp": (2, True), "stsb": (None, True),
        "mnli": (3, True), "qnli": (2, True), "rte": (2, True), "wnli": (2, True),
    }  # fmt: skip


def test_glue_tests_have_no_labels(tmp_path):
    write(tmp_path, "CoLA/test.tsv", "index\tsentence\n0\tBill sang.\n")
    write(tmp_path, "QQP/test.tsv", "id\tquestion1\tquestion2\n0\tWhy?\tHow?\n")
    assert read_glue("cola", tmp_path, "test") == [Classified("Bill sang.", None)]
    assert read_glue("qqp", tmp_path, "test") == [Classified("Why?", None, "How?")]
    rows = classified_rows(tokenise_classified(read_glue("qqp", tmp_path, "test"), bert, length=16, classes=2), 16)
    assert sorted(rows[0]) == ["mask", "tokens", "types"]


def test_labels_in_another_order(tmp_path):
    split, header, line, _ = GLUE_FILES["mnli"]
    write(tmp_path, f"MNLI/{split}.tsv", f"{header}\n{line}\n")
    order = ["contradiction", "neutral", "entailment"]
    assert read_glue("mnli", tmp_path, split, labels=order)[0].label == 0
    assert fails(read_glue, "mnli", tmp_path, split, labels=order[:2]) == (
        "labels=['contradiction', 'neutral'] is no order of mnli's labels ['entailment', 'neutral', 'contradiction']"
    )


def test_malformed_lines_are_skipped_and_counted_when_asked(tmp_path):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    file = write(tmp_path, "QQP/train.tsv", f"{header}\n1\t2\t3\tWhy?\n1\t2\t3\tWhy?\tHow?\t0\n1\t2\t3\tWhy?\t\t0\n")
    with pytest.warns(UserWarning, match="malformed") as seen:
        assert read_glue("qqp", tmp_path, malformed="skip") == [Classified("Why?", 0, "How?")]
    said = f"{file}, line 2: 4 columns, expected 6 (id, qid1, qid2, question1, question2, is_duplicate): '1\\t2\\t3\\tWhy?'"
    assert str(seen[0].message) == f"2 malformed lines were left out; the first: {said}"
    assert fails(read_glue, "qqp", tmp_path) == said


def test_one_file_forms(tmp_path):
    assert read_labelled(write(tmp_path, "sst", "1 a fine film .\r\n0 no\u2028good\n\n"), 2) == [
        Classified("a fine film .", 1),
        Classified("no\u2028good", 0),  # Unicode's line separator ends no line
    ]
    (tmp_path / "trec").write_bytes(b"5 How far is sister\xf0city ?\n")
    assert read_trec(tmp_path / "trec") == [Classified("How far is sister city ?", 5)]
    assert read_cola(write(tmp_path, "cola", "gj04\t1\t\tThe sailors.\n")) == [Classified("The sailors.", 1)]


# -- the hub -----------------------------------------------------------------------------------------------------------


def test_without_datasets_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError) as error:
        from_hub("nyu-mll/glue", "sst2", split="train")
    assert str(error.value) == (
        "'nyu-mll/glue' comes through the datasets library, which is not installed: pip install datasets, or read local "
        "files with the other modules of experiments.data"
    )


def test_a_hub_that_is_out_of_reach(monkeypatch):
    def load_dataset(name, configuration, *, split, revision):
        if name == "nyu-mll/glue":
            return [{"sentence": "fine", "label": 1, "idx": 0}]
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub.")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert classified("sst2", from_hub("nyu-mll/glue", "sst2", split="train")) == [Classified("fine", 1)]
    assert fails(from_hub, "openai/gsm8k", "main", split="test") == (
        "split 'test' of 'openai/gsm8k' (main) could not be loaded: Couldn't reach 'openai/gsm8k' on the Hub. Without a "
        "connection, set HF_HUB_OFFLINE=1 to use what is in the cache, or read local files"
    )


def test_rows_of_the_hub():
    row = {"premise": "One.", "hypothesis": "Two.", "label": 2}
    assert classified("mnli", [row, {**row, "label": -1}]) == [
        Classified("One.", 2, "Two."),
        Classified("One.", None, "Two."),
    ]
    assert classified("stsb", [{"sentence1": "A", "sentence2": "B", "label": 2.5}]) == [Classified("A", 2.5, "B")]
    assert fails(classified, "mnli", [row, {**row, "label": 3}]) == (
        "mnli, row 2: label 3, expected 0 to 2, or -1 for none"
    )
    assert fails(classified, "sst2", [row]) == (
        "sst2, row 1: no column 'sentence'; there are 'premise', 'hypothesis', 'label'"
    )
    assert prompted_rows_of_hub([{"question": "2?", "answer": "#### 2"}], template="Q: {}") == [
        Prompted("Q: 2?", "#### 2")
    ]


def test_the_datasets_library_reads_local_files(tmp_path):
    pytest.importorskip("datasets", reason="datasets is optional")
    file = write(tmp_path, "rows.jsonl", '{"question": "2?", "answer": "#### 2"}\n')
    rows = from_hub("json", split="train", data_files=str(file), cache_dir=str(tmp_path / "cache"))
    assert prompted_rows_of_hub(rows) == [Prompted("2?", "#### 2")]


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    for name, colour, size in (
        ("dog/1.png", (255, 0, 0), (8, 4)),
        ("cat/b.jpg", (0, 0, 255), (6, 6)),
        ("cat/a.JPEG", 0, (5, 9)),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L" if colour == 0 else "RGB", size, colour).save(tmp_path / name)
    write(tmp_path, "dog/notes.txt", "no image")
    return tmp_path


def test_an_image_folder(photos):
    found = read_image_folder(photos, 4)
    assert found.classes == ("cat", "dog") and found.labels == [0, 0, 1] and len(found) == 3
    assert [path.name for path in found.paths] == ["a.JPEG", "b.jpg", "1.png"]
    assert found[2]["images"].shape == (4, 4, 3) and found[2]["images"].dtype == np.float32
    assert found[2]["images"][0, 0].tolist() == [1, -1, -1] and found[2]["labels"] == 1
    assert (found[0]["images"] == -1).all()  # a grey image becomes RGB
    raw = read_image_folder(photos, 4, mean=(0, 0, 0), deviation=(1, 0.5, 1), classes=["dog", "cat"])
    assert raw[0]["images"][0, 0].tolist() == [1, 0, 0] and raw.labels == [0, 1, 1]
    batch = Batches(found, batch=3)(0)
    assert batch["images"].shape == (3, 4, 4, 3) and batch["labels"].tolist() == [0, 0, 1]


def test_the_centre_is_cut_out(tmp_path):
    image = Image.new("RGB", (12, 4), (0, 0, 0))
    image.paste((255, 255, 255), (4, 0, 8, 4))
    image.save(write(tmp_path, "a/wide.png", ""))
    assert (read_image_folder(tmp_path, 4)[0]["images"] == 1).all()


def test_images_that_are_none(photos):
    (photos / "cat" / "b.jpg").write_bytes(b"\xff\xd8\xff no jpeg")
    assert fails(read_image_folder(photos, 4).__getitem__, 1).startswith(
        f"'{photos / 'cat' / 'b.jpg'}' is no image that can be read: cannot identify image file"
    )
    assert fails(read_image_folder, photos, 4, classes=["cat"]) == (
        f"'{photos}' has folders that are no classes: dog; expected cat"
    )
    assert fails(read_image_folder, photos / "cat", 4) == (
        f"'{photos / 'cat'}' has no folders, expected one for each class with .jpg or .png images in it"
    )
    (photos / "dog" / "1.png").unlink()
    assert fails(image_files, photos / "dog") == f"'{photos / 'dog'}' has no images (.jpg, .jpeg, .png)"


# -- what is wrong with a file is said with its line -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_e2e, "a||b\nname : X|text\n", ", line 2: no '||' between meaning representation and text: 'name : X|text'"),
        (read_e2e, "a||  \n", ", line 1: empty text: remove the line or fill it"),
        (read_e2e, " ||b\n", ", line 1: empty meaning representation: remove the line or fill it"),
        (read_e2e, "\n\n", ": no examples in this file"),
        (lambda path: read_labelled(path, 6), "0 a\n6 b\n", ", line 2: label 6, expected a number from 0 to 5 (6 classes)"),
        (lambda path: read_labelled(path, 2), "0 a\nfine\n", ", line 2: no label before the text: 'fine'; expected a number from 0 to 1"),
        (lambda path: read_labelled(path, 2), "-1 a\n", ", line 1: no label before the text: '-1 a'; expected a number from 0 to 1"),
        (lambda path: read_labelled(path, 2), "1\n", ", line 1: empty text: remove the line or fill it"),
        (read_cola, "gj04\t2\t\tThe.\n", ", line 1: label '2', expected one of '0', '1'"),
        (read_cola, "gj04\t1\tThe.\n", ", line 1: 3 columns, expected 4 (source, label, mark, sentence): 'gj04\\t1\\tThe.'"),
        (read_cola, "gj04\t1\t\t\n", ", line 1: empty sentence: remove the line or fill it"),
        (read_gsm8k, '{"question": "2?", "answer": "It is 2."}\n', ", line 1: no '#### ' and number at the end of the answer: 'It is 2.'"),
        (read_gsm8k, '{"question": "2?"}\n', ", line 1: expected an object with texts 'question' and 'answer', got 'question'"),
        (read_gsm8k, "[]\n", ", line 1: expected an object with texts 'question' and 'answer', got a list"),
        (read_dart, "{}", ": a dict, expected a list"),
        (read_dart, "[{}]", ", entry 1: no 'tripleset' of triples with 'annotations': KeyError('tripleset')"),
        (read_dart, '[{"tripleset": [["a", "b", "c"]], "annotations": [{"text": " "}]}]', ", entry 1: empty text: remove the line or fill it"),
    ],
)  # fmt: skip
def test_malformed_files(read, text, message, tmp_path):
    file = write(tmp_path, "data.txt", text)
    assert fails(read, file) == f"{file}{message}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", ": not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("a.json", "{}", ": no list 'entries', expected WebNLG's {'entries': [{'1': ...}]}"),
        ("a.json", '{"entries": [{"1": {}}]}', ", entry 1: not an entry of WebNLG: KeyError('modifiedtripleset')"),
        ("a.xml", "<benchmark>", ", line 1: not XML (no element found: line 1, column 11)"),
        ("a.xml", "<html/>", ": no <entry> below <html>, expected WebNLG's <benchmark><entries><entry>"),
        ("a.xml", WEBNLG_XML.replace(" | leaderName", ""), ", entry 1: <mtriple> has 2 parts between ' | ', expected 3: 'Aarhus | Jacob_Bundsgaard'"),
    ],
)  # fmt: skip
def test_malformed_webnlg(name, text, message, tmp_path):
    file = write(tmp_path, name, text)
    assert fails(read_webnlg, file) == f"{file}{message}"


def test_malformed_tables(tmp_path):
    file = write(tmp_path, "a.csv", "mr;ref\n")
    assert fails(read_e2e, file) == f"{file}, line 1: no column 'mr'; there are 'mr;ref'"
    file = write(tmp_path, "b.csv", "mr,ref\na,b\na,b,c\n")
    assert fails(read_e2e, file) == f"{file}, line 3: 3 columns, expected 2 (mr, ref)"
    file = write(tmp_path, "SST-2/train.tsv", "text\tlabel\n")
    assert fails(read_glue, "sst2", tmp_path) == f"{file}, line 1: no column 'sentence'; there are 'text', 'label'"
    file = write(tmp_path, "STS-B/dev.tsv", "sentence1\tsentence2\tscore\nA\tB\t5.1\n")
    assert fails(read_glue, "stsb", file, "dev") == f"{file}, line 2: score '5.1', expected a number from 0 to 5"
    assert fails(read_glue, "mnli", tmp_path, "dev") == (
        "mnli has no split 'dev'; there are train, dev_matched, dev_mismatched, test_matched, test_mismatched"
    )
    (tmp_path / "latin.txt").write_bytes(b"1 caf\xe9\n")
    assert fails(list, lines(tmp_path / "latin.txt")) == (
        f"{tmp_path / 'latin.txt'}, line 1: not utf-8 (invalid continuation byte at byte 5 of the line)"
    )


def test_missing_files_are_said_with_what_is_near(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "notes.md"):
        write(tmp_path, name, "")
    assert fails(existing, tmp_path / "trian.jsonl") == (
        f"file '{tmp_path}/trian.jsonl' does not exist; near it are 'train.jsonl', 'test.jsonl'"
    )
    assert (
        fails(existing, tmp_path / "sub" / "a")
        == f"file '{tmp_path}/sub/a' does not exist, nor does the folder '{tmp_path}/sub'"
    )
    assert fails(existing, tmp_path) == f"'{tmp_path}' is a folder, expected a file"
    assert fails(existing, tmp_path / "notes.md", "folder") == f"'{tmp_path}/notes.md' is a file, expected a folder"
    (tmp_path / "empty").mkdir()
    assert fails(existing, tmp_path / "empty" / "x") == (
        f"file '{tmp_path}/empty/x' does not exist: the folder '{tmp_path}/empty' is empty"
    )


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_a_row_to_classify_by_hand():
    items = tokenise_classified([Classified("ab", 1, "c"), Classified("d", 0)], bert, length=6, classes=2)
    rows = classified_rows(items, 6, pad=9)
    assert {key: value.tolist() for key, value in rows[0].items()} == {
        "tokens": [1, 97, 98, 2, 99, 2],
        "mask": [True] * 6,
        "types": [0, 0, 0, 0, 1, 1],
        "labels": 1,
    }
    assert {key: value.tolist() for key, value in rows[1].items()} == {
        "tokens": [1, 100, 2, 9, 9, 9],
        "mask": [True, True, True, False, False, False],
        "types": [0] * 6,
        "labels": 0,
    }
    assert {key: value.dtype.name for key, value in rows[0].items()} == {
        "tokens": "int32", "mask": "bool", "types": "int32", "labels": "int32"
    }  # fmt: skip
    assert items.summary() == "2 examples, 9 tokens, 4.5 on average"


def test_types_where_special_tokens_do_not_stand_between_the_texts():
    both = lambda text, pair="": [*text.encode(), *pair.encode(), 3]  # one special token, at the end
    rows = classified_rows(tokenise_classified([Classified("ab", 0, "cd")], both, length=8, classes=2), 8)
    assert rows[0]["types"].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


def test_what_is_longer_than_the_context_is_an_error_or_cut_and_counted():
    examples = [Classified("one", 0), Classified("one two three four", 1), Classified("a b c d e f g h", 0, "i j")]
    assert fails(tokenise_classified, examples, bert, length=12, classes=2) == (
        "2 of 3 examples are longer than the context of 12 tokens; the longest, example 2, has 21. Pass truncate=True to "
        "cut them, or a longer context"
    )
    items = tokenise_classified(examples, bert, length=12, classes=2, truncate=True)
    assert items.summary() == "3 examples, 25 tokens, 8.3 on average; 2 were cut, the longest had 21"
    assert bytes(items[1].tokens[1:-1].tolist()) == b"one two"  # whole words; [CLS] and [SEP] stay
    assert items[2].tokens.tolist() == bert("a b c", "i j") and items[2].mark == 7  # the longer text alone is cut
    assert fails(tokenise_classified, [Classified("wonderful", 0)], bert, length=5, classes=2, truncate=True) == (
        "not even the first word fits in a context of 5 tokens: 'wonderful'"
    )


@pytest.mark.parametrize(
    ("examples", "classes", "message"),
    [
        ([Classified("a", 0), Classified("b", 2)], 2, "example 1 has the label 2, expected 0 to 1 (2 classes)"),
        ([Classified("a", -1)], 2, "example 0 has the label -1, expected 0 to 1 (2 classes)"),
        ([Classified("a", 0.5)], 2, "example 0 has the label 0.5, expected 0 to 1 (2 classes)"),
        ([Classified("a", float("nan"))], None, "example 0 has the value nan, expected a finite number"),
        ([Classified("a", 0), Classified("b", None)], 2, "1 of 2 examples have no label, the first is example 1"),
        ([Classified("a", 0), Classified(" \n", 0)], 2, "example 1 has an empty text: remove it or fill it"),
        ([Classified("a", 0, "")], 2, "example 0 has an empty text: remove it or fill it"),
        ([], 2, "no examples"),
    ],
)
def test_examples_that_do_not_fit(examples, classes, message):
    assert fails(tokenise_classified, examples, bert, length=8, classes=classes) == message


def test_a_tokenizer_that_says_nothing():
    assert fails(tokenise_classified, [Classified("é", 0)], lambda text: [], length=8, classes=2) == (
        "example 0 has no tokens: 'é'"
    )


def words(text):
    """Letters as small numbers: "a" is 1."""
    return [ord(letter) - 96 for letter in text if letter != " "]


PROMPTS = [Prompted("ab", "c"), Prompted("d", "ef"), Prompted("ghi", "j")]


def test_a_prompt_and_its_completion_by_hand():
    items = tokenise_prompted(PROMPTS, words, length=8, separator=50, end=60)
    row = prompted_rows(items, 8, pad=99)[0]
    assert row["tokens"].tolist() == [1, 2, 50, 3, 60, 99, 99, 99]
    assert row["mask"].tolist() == [True] * 5 + [False] * 3
    assert row["loss_mask"].tolist() == [False, False, False, True, True, False, False, False]


def test_the_completion_begins_with_a_blank():
    items = tokenise_prompted([Prompted("a", "b")], lambda text: list(text.encode()), length=8)
    assert bytes(items[0].tokens.tolist()) == b"a b"
    items = tokenise_prompted([Prompted("a", "b")], lambda text: list(text.encode()), length=8, glue="\n")
    assert bytes(items[0].tokens.tolist()) == b"a\nb"


def test_a_packed_row_by_hand():
    items = tokenise_prompted(PROMPTS, words, length=8, end=60)  # 1 2 3 60 | 4 5 6 60 | 7 8 9 10 60
    rows = packed_rows(items, 9)
    assert len(rows) == 2
    assert {key: value.tolist() for key, value in rows[0].items()} == {
        "tokens": [1, 2, 3, 60, 4, 5, 6, 60, 0],
        "mask": [True] * 8 + [False],
        "loss_mask": [False, False, True, True, False, True, True, True, False],
        "segments": [1, 1, 1, 1, 2, 2, 2, 2, 0],
        "positions": [0, 1, 2, 3, 0, 1, 2, 3, 0],
    }
    assert rows[1]["tokens"].tolist() == [7, 8, 9, 10, 60, 0, 0, 0, 0]
    assert {key: value.dtype.name for key, value in rows[0].items()} == {
        "tokens": "int32", "mask": "bool", "loss_mask": "bool", "segments": "int32", "positions": "int32"
    }  # fmt: skip


def test_packing_keeps_every_token_and_every_target():
    rng = np.random.default_rng(0)
    examples = [Prompted("a" * int(rng.integers(1, 9)), "b" * int(rng.integers(1, 9))) for _ in range(200)]
    items = tokenise_prompted(examples, words, length=20, end=60)
    packed, padded = packed_rows(items, 20), prompted_rows(items, 20)
    sums = [
        {key: sum(int(rows[i][key].sum()) for i in range(len(rows))) for key in ("tokens", "mask", "loss_mask")}
        for rows in (packed, padded)
    ]
    assert sums[0] == sums[1] and sums[0]["mask"] == len(items.flat)
    assert len(packed) < 0.6 * len(padded) and sums[0]["mask"] > 0.85 * 20 * len(packed)


def test_the_first_token_of_a_packed_example_never_counts():
    items = tokenise_prompted([Prompted("a", "b")] * 2, words, length=8)
    bare = type(items)(**{**vars(items), "marks": np.zeros(2, np.int32)})  # no prompts: all would count
    assert packed_rows(bare, 8)[0]["loss_mask"].tolist() == [False, True, False, True, False, False, False, False]


def test_prompts_that_are_too_long():
    long = [Prompted("abcdef", "ghi"), Prompted("a", "b")]
    assert fails(tokenise_prompted, long, words, length=8) == (
        "1 of 2 examples are longer than the context of 8 tokens; the longest, example 0, has 9. Pass truncate=True to cut "
        "them, or a longer context"
    )
    items = tokenise_prompted(long, words, length=8, truncate=True)
    assert items[0].tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and items.cut == 1 and items.longest == 9
    assert fails(tokenise_prompted, long, words, length=6, truncate=True) == (
        "the prompt of example 0 alone has 6 tokens: nothing of its completion is left in a context of 6. Remove the "
        "example or shorten its prompt"
    )
    assert fails(tokenise_prompted, [Prompted("a", " ")], words, length=6) == (
        "example 0 has an empty text: remove it or fill it"
    )
    assert fails(packed_rows, items, 7) == "an example has 8 tokens, a row 7: tokenise with this length"


def test_first_fit():
    assert first_fit([3, 3, 2, 1, 4], 5) == [[0, 2], [1, 3], [4]]
    assert first_fit([5, 5], 5) == [[0], [1]] and first_fit([], 5) == []
    assert first_fit([3, 4, 3, 1, 1], 5, open_rows=2) == [[0, 3, 4], [1], [2]]  # when 2 came, the row with 4 was closed
    with pytest.raises(ValueError, match="^item 1 has length 6: more than a row of 5$"):
        first_fit([1, 6], 5)


# -- batches -----------------------------------------------------------------------------------------------------------


def numbered(count):
    return Rows(count, lambda index: {"x": np.int32(index)})


def seen(batches, steps):
    return [batches(step)["x"].tolist() for step in steps]


def flat(parts):
    return list(itertools.chain.from_iterable(parts))


def test_an_epoch_shows_every_row_once_in_another_order():
    batches = Batches(numbered(24), batch=4, seed=0)
    assert batches.examples == 24 and batches.steps_per_epoch == 6
    first, second = (flat(seen(batches, range(6 * epoch, 6 * epoch + 6))) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second and first != list(range(24))
    assert seen(Batches(numbered(24), batch=4, seed=0), range(6)) == seen(batches, range(6))
    assert seen(Batches(numbered(24), batch=4), range(2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_seeds_are_not_shifted_epochs():
    orders = {
        (seed, epoch): seen(Batches(numbered(40), batch=40, seed=seed), [epoch])[0]
        for seed in range(4)
        for epoch in range(4)
    }
    assert len({tuple(order) for order in orders.values()}) == 16


def test_rows_left_over_are_other_ones_in_each_epoch():
    batches = Batches(numbered(26), batch=4, seed=0, epochs=8)
    left = [set(range(26)) - set(flat(seen(batches, range(6 * epoch, 6 * epoch + 6)))) for epoch in range(8)]
    assert all(len(rows) == 2 for rows in left) and len(set().union(*left)) > 8
    assert len(batches) == 48 and len(list(batches)) == 48


def test_evaluation_shows_every_row_and_says_which_are_copies():
    batches = list(Batches(numbered(10), batch=4, epochs=1, last="pad"))
    assert [batch["x"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert [batch["valid"].tolist() for batch in batches] == [[True] * 4, [True] * 4, [True, True, False, False]]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_resumed_stream_goes_on_with_the_same_batches(threads):
    batches = Batches(numbered(26), batch=4, seed=3)
    stream = batches.stream(threads=threads)
    before = [next(stream)["x"].tolist() for _ in range(8)]
    state = json.dumps(stream.state())
    after = [next(stream)["x"].tolist() for _ in range(8)]
    assert before + after == seen(batches, range(16))
    again = Batches(numbered(26), batch=4, seed=3).stream(json.loads(state), threads=threads)
    assert [next(again)["x"].tolist() for _ in range(8)] == after
    assert json.dumps(batches.stream(json.loads(state)).state()) == state


def test_a_position_in_other_batches_is_refused():
    state = Batches(numbered(26), batch=4, seed=3).stream().state()
    assert fails(Batches(numbered(26), batch=2, seed=3).stream, state) == (
        "the saved position is of the batches {'examples': 26, 'batch': 4, 'seed': 3, 'last': 'drop'}, these are "
        "{'examples': 26, 'batch': 2, 'seed': 3, 'last': 'drop'}: the data has changed"
    )


@pytest.mark.parametrize("last", ["drop", "pad"])
def test_processes_share_each_batch(last):
    options = {"batch": 6, "last": last, "seed": 5 if last == "drop" else None}
    whole = seen(Batches(numbered(29), **options), range(10))
    parts = [seen(Batches(numbered(29), shard=Shard(index, 3), **options), range(10)) for index in range(3)]
    assert [flat(step) for step in zip(*parts, strict=True)] == whole  # disjoint, complete, in order
    assert all(len(part) == 2 for shard in parts for part in shard)


def test_a_run_is_resumed_with_another_number_of_processes():
    two = Batches(numbered(24), batch=4, seed=1, shard=Shard(1, 2)).stream()
    for _ in range(3):
        next(two)
    one = Batches(numbered(24), batch=4, seed=1).stream(two.state())
    assert next(one)["x"].tolist()[2:] == next(two)["x"].tolist()


def test_this_process():
    assert batching.this_process() == Shard(0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 8}, "5 rows do not fill a batch of 8: take a smaller batch, or last='pad'"),
        ({"batch": 3, "shard": Shard(0, 2)}, "a batch of 3 rows is not divisible among 2 processes"),
        ({"batch": 0}, "a batch of 0 rows is not divisible among 1 processes"),
        ({"batch": 2, "seed": 0, "last": "pad"}, "last='pad' shows all rows in order: leave out the seed"),
    ],
)
def test_batches_that_cannot_be(options, message):
    assert fails(Batches, numbered(5), **options) == message


def test_shards_that_cannot_be():
    assert fails(Shard, 2, 2) == "shard 2 of 2: the index is from 0 to 1"
    with pytest.raises(IndexError, match="^step 6 of 6$"):
        Batches(numbered(24), batch=4, epochs=1)(6)


def test_from_a_file_to_batches(tmp_path):
    file = write(tmp_path, "train.txt", "".join(f"{i % 2} sentence {i}\n" for i in range(10)))
    items = tokenise_classified(read_labelled(file, 2), bert, length=16, classes=2)
    batch = next(iter(Batches(classified_rows(items, 16), batch=4, seed=0)))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((4, 16), "int32"), "mask": ((4, 16), "bool"), "types": ((4, 16), "int32"), "labels": ((4,), "int32"),
    }  # fmt: skip
    numbers = [int(bytes(row[10:11].tolist())) for row in batch["tokens"]]
    assert [number % 2 for number in numbers] == batch["labels"].tolist()


# -- larger than memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 3, 64])
@pytest.mark.parametrize("text", ["one\n", "one", "\n", "a\n\nb\r\nc", "x\n" * 200, "\ufeffé\nü"])
def test_lines_by_number(text, stride, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(text.encode())
    expected = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").removesuffix("\n").split("\n")]
    assert list(LineFile(path, stride)) == expected and LineFile(path, stride)[-1] == expected[-1]


def test_lines_that_cannot_be_read(tmp_path):
    assert fails(LineFile, write(tmp_path, "empty", "")) == f"{tmp_path}/empty: no lines in this file"
    (tmp_path / "latin").write_bytes(b"a\ncaf\xe9\n")
    found = LineFile(tmp_path / "latin")
    assert fails(found.__getitem__, 1) == f"{tmp_path}/latin, line 2: not UTF-8 (unexpected end of data at byte 3)"
    with pytest.raises(IndexError, match="^line 2 of 2$"):
        found[2]


def traced(function):
    """What a function returns, and the most memory that it held."""
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_file_is_read_in_little_memory(tmp_path):
    line = json.dumps({"text": "x" * 1000}) + "\n"
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        file.writelines(itertools.repeat(line, 20_000))
    size = path.stat().st_size
    assert size > 20_000_000

    def first_batches():
        rows = LineFile(path)
        batches = Batches(Rows(len(rows), lambda index: {"size": np.int32(len(rows[index]))}), batch=16, seed=0)
        return [batches(step)["size"].sum() for step in range(20)]

    sizes, peak = traced(first_batches)
    assert sizes == [16 * (len(line) - 1)] * 20
    assert peak < size / 4


def test_a_large_text_becomes_tokens_in_little_memory(tmp_path):
    path = tmp_path / "large.txt"
    with path.open("w") as file:
        file.writelines(itertools.repeat("To be, or not to be, that is the question.\n", 200_000))
    size = path.stat().st_size
    encode = lambda text: np.frombuffer(text.encode(), np.uint8)

    def work():
        tokens = write_tokens(tmp_path / "large.npy", read_pieces(path), encode, vocabulary=256)
        batches = Batches(TokenWindows(tokens, 64), batch=8, seed=0)
        return tokens, [batches(step) for step in range(20)]

    (tokens, shown), peak = traced(work)
    assert len(tokens) == size > 8_000_000 and isinstance(tokens, np.memmap)
    assert bytes(tokens[:43].tolist()) == b"To be, or not to be, that is the question.\n"
    assert shown[0]["tokens"].shape == (8, 64) and peak < size / 4


def test_a_text_folder_becomes_windows(tmp_path):
    write(tmp_path, "b.txt", "cd")
    write(tmp_path, "a.txt", "ab\r\nc")
    write(tmp_path, "c.md", "not read")
    tokens = write_tokens(
        tmp_path / "t.npy", read_pieces(tmp_path), lambda text: list(text.encode()), vocabulary=300, end=257
    )
    assert tokens.tolist() == [*b"ab\r\nc", 257, *b"cd", 257] and tokens.dtype == np.uint16
    windows = TokenWindows(tokens, 4)
    assert [windows[i]["tokens"].tolist() for i in range(len(windows))] == [[97, 98, 13, 10], [10, 99, 257, 99]]
    assert windows[0]["loss_mask"].tolist() == [False, True, True, True] and windows[0]["mask"].all()
    assert read_tokens(tmp_path / "t.npy").tolist() == tokens.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "c.md", "t.npy"]


def test_a_long_text_comes_in_pieces_of_whole_lines(tmp_path):
    text = "".join(f"line {i}\n" for i in range(60_000))
    pieces = list(read_pieces(write(tmp_path, "long.txt", text)))
    assert len(pieces) > 1 and "".join(piece for piece, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.endswith("\n") and len(piece) < 300_000 for piece, _ in pieces)


def test_each_token_is_a_target_once():
    windows = TokenWindows(np.arange(1, 32, dtype=np.uint16), 7)
    targets = [windows[i]["tokens"][windows[i]["loss_mask"]] for i in range(len(windows))]
    assert np.concatenate(targets).tolist() == list(range(2, 32))


def test_a_large_vocabulary_has_larger_tokens(tmp_path):
    tokens = write_tokens(tmp_path / "t.npy", [("x", True)], lambda text: [70_000], vocabulary=128_000)
    assert tokens.dtype == np.uint32 and tokens.tolist() == [70_000]


def test_tokens_that_do_not_fit(tmp_path):
    path = tmp_path / "t.npy"
    assert fails(write_tokens, path, [("x", True)], lambda text: [300], vocabulary=256) == (
        "token 300 is outside the vocabulary of 256: another tokenizer's?"
    )
    assert list(tmp_path.iterdir()) == []  # nothing half written
    np.save(path, np.zeros((2, 2)))
    assert fails(read_tokens, path) == f"{path}: float64 of shape (2, 2), expected one row of unsigned tokens"
    write_tokens(path, [("x" * 100, True)], lambda text: list(text.encode()), vocabulary=256)
    path.write_bytes(path.read_bytes()[:-50])
    assert fails(read_tokens, path).startswith(f"{path}: not a file of tokens, or cut short (")
    assert fails(TokenWindows, np.arange(5), 8) == "5 tokens are too few for windows of 8, or a window has one"
    assert fails(list, read_pieces(tmp_path)) == f"'{tmp_path}' has no files *.txt"
    file = write(tmp_path, "blank.txt", " \n\n")
    assert fails(list, read_pieces(file)) == f"{file}: empty text: remove the file or fill it"


# -- the real files ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif("JLORA_DATA" not in os.environ, reason="JLORA_DATA does not name the folder with the real data")
def test_the_real_data():
    folder = Path(os.environ["JLORA_DATA"])
    references = read_e2e(folder / "e2e" / "lora_repo_test.txt")
    assert (len(references), sum(len(item.texts) for item in references)) == (630, 4693)
    assert sum(len(item.texts) for item in read_e2e(folder / "e2e" / "e2e-cleaning_test-fixed.csv")) == 4693
    counted = {
        "sst2": len(read_labelled(folder / "sst2" / "stsa.binary.train", 2)),
        "trec": len(read_trec(folder / "trec" / "TREC.train.all")),
        "cola": len(read_cola(folder / "cola" / "in_domain_train.tsv")),
        "gsm8k": len(read_gsm8k(folder / "gsm8k" / "train.jsonl")),
    }
    assert counted == {"sst2": 6920, "trec": 5452, "cola": 8551, "gsm8k": 7473}
    assert read_image_folder(folder / "dreambooth", 32)[0]["images"].shape == (32, 32, 3)
    assert len(LineFile(folder / "tinyshakespeare" / "input.txt")) == 40_000
