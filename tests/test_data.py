"""The texts of the quickstart and their batches, and the papers' data sets in their real formats."""

import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.data import Windows, python_docs, python_source, spread
from experiments.data.batches import Batches
from experiments.data.e2e import read_e2e
from experiments.data.examples import Classified, Prompted, References, prompted
from experiments.data.files import DataError, existing, lines
from experiments.data.glue import GLUE, read_glue
from experiments.data.hub import classified, from_hub
from experiments.data.hub import prompted as prompted_of_hub
from experiments.data.images import image_files, read_image_folder
from experiments.data.instructions import INSTRUCTION_PROMPT, read_gsm8k, read_instructions
from experiments.data.labelled_text import read_cola, read_labelled, read_trec
from experiments.data.line_file import LineFile
from experiments.data.triples import SEEN, read_dart, read_webnlg

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module", params=[python_docs, python_source], ids=["prose", "Python"])
def corpus(request):
    return request.param()


def paragraphs(documents):
    return {part.strip() for document in documents for part in document.text.split(b"\n\n") if len(part) > 200}


def test_splits_are_disjoint_by_file(corpus):
    names = [document.name for split in SPLITS for document in getattr(corpus, split)]
    texts = [document.text for split in SPLITS for document in getattr(corpus, split)]
    assert len(set(names)) == len(names) and len(set(texts)) == len(texts)
    sizes = {split: len(corpus.bytes(split)) for split in SPLITS}
    assert sizes["train"] > 3 * sizes["validation"] > 0 and sizes["test"] > sizes["train"] / 20


def test_hardly_a_paragraph_of_the_test_split_is_in_the_training_split(corpus):
    test = paragraphs(corpus.test)
    assert len(test & paragraphs(corpus.train)) <= 0.02 * len(test)


def test_the_same_texts_every_time(corpus):
    again = {"prose": python_docs, "Python": python_source}[corpus.label]()
    assert again.digest() == corpus.digest()


def test_the_domains_are_what_they_say():
    prose, code = python_docs(), python_source()
    assert len(prose.bytes("train")) > 200_000 and len(code.bytes("train")) > 5_000_000
    assert all(document.name.endswith(".py") for document in code.train)
    often = lambda word, corpus: bytes(corpus.bytes("test")).count(word) / len(corpus.bytes("test"))
    assert often(b" the ", prose) > 2 * often(b" the ", code)
    assert often(b"self.", code) > 10 * often(b"self.", prose)


def test_an_epoch_shows_every_window_once():
    text = np.arange(81, dtype=np.uint8)
    windows = Windows(text, length=8, batch=3, seed=0)
    assert windows.examples == 9
    rows = np.concatenate([windows(step) for step in range(3)])
    assert rows.shape == (9, 9) and len(np.unique(rows[:, 0])) == 9
    assert (np.diff(rows, axis=1) == 1).all()  # windows of the text as it stands
    starts = np.sort(rows[:, 0])
    assert (np.diff(starts) == 8).all() and starts[0] < 8
    assert (windows(1) == Windows(text, 8, 3, 0)(1)).all()
    assert not (np.sort(windows(3)[:, 0]) == np.sort(windows(0)[:, 0])).all()


def test_a_batch_crosses_the_end_of_an_epoch():
    windows = Windows(np.arange(41, dtype=np.uint8), length=8, batch=3, seed=1)
    assert windows.examples == 4 and windows(1).shape == (3, 9)


def test_spread_windows_are_disjoint_and_even():
    rows = spread(np.arange(101, dtype=np.uint8), length=10, count=5)
    assert rows[:, 0].tolist() == [0, 20, 40, 60, 90] and rows.shape == (5, 11)
    assert spread(np.arange(25, dtype=np.uint8), length=10, count=9).shape == (2, 11)


@pytest.mark.parametrize("make", [lambda text: Windows(text, 10, 1, 0), lambda text: spread(text, 10, 1)])
def test_too_short_a_text_is_an_error(make):
    with pytest.raises(ValueError, match="the text has 9 bytes: too few for"):
        make(np.zeros(9, np.uint8))


# -- the papers' data sets ---------------------------------------------------------------------------------------------


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
    text = f"{file}, line 2: 4 columns, expected 6 (id, qid1, qid2, question1, question2, is_duplicate): '1\\t2\\t3\\tWhy?'"
    assert str(seen[0].message) == f"2 malformed lines were left out; the first: {text}"
    assert fails(read_glue, "qqp", tmp_path) == text


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
    rows = [{"question1": "Why?", "question2": other, "label": 0} for other in ("", "How?")]
    with pytest.warns(UserWarning, match="1 malformed rows were left out; the first: qqp, row 1: empty question2"):
        assert classified("qqp", rows, malformed="skip") == [Classified("Why?", 0, "How?")]
    assert fails(classified, "mnli", [row, {**row, "label": 3}]) == (
        "mnli, row 2: label 3, expected 0 to 2, or -1 for none"
    )
    assert fails(classified, "sst2", [row]) == (
        "sst2, row 1: no column 'sentence'; there are 'premise', 'hypothesis', 'label'"
    )
    assert prompted_of_hub([{"question": "2?", "answer": "#### 2"}], template="Q: {}") == [Prompted("Q: 2?", "#### 2")]


def test_the_datasets_library_reads_local_files(tmp_path):
    pytest.importorskip("datasets", reason="datasets is optional")
    file = write(tmp_path, "rows.jsonl", '{"question": "2?", "answer": "#### 2"}\n')
    rows = from_hub("json", split="train", data_files=str(file), cache_dir=str(tmp_path / "cache"))
    assert prompted_of_hub(rows) == [Prompted("2?", "#### 2")]


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
