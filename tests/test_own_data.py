"""A user's own data: what is read of it, what is inferred and said, what is wrong with it. Nothing is compiled here."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from experiments.data import hub
from experiments.data.chat import Placed, encoded, jinja, plain, read_chat, template_of, tokenise_chats
from experiments.data.examples import Chat, Message, Prompted
from experiments.data.files import DataError
from experiments.data.forms import form_of
from experiments.data.held_out import held_out
from experiments.data.own import Labelled, read_own
from experiments.data.pipeline import packed_rows, prompted_rows
from experiments.data.table import read_table
from experiments.data.tokenised import cut_to
from experiments.recipes import tiny
from jlora.models import Tokenizer


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(folder, name, rows):
    return write(folder, name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def fails(call, *arguments, **options):
    with pytest.raises(DataError) as error:
        call(*arguments, **options)
    return str(error.value)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_the_same_rows_from_each_format(tmp_path):
    rows = [{"text": 'a "b", c', "label": "x"}, {"text": "é\u2028f", "label": "y"}]
    files = [
        jsonl(tmp_path, "a.jsonl", rows),
        write(tmp_path, "a.json", json.dumps(rows)),
        write(tmp_path, "a.csv", '\ufefftext,label\r\n"a ""b"", c",x\r\n\r\né\u2028f,y\r\n'),
        write(tmp_path, "a.tsv", '\ufefftext\tlabel\na "b", c\tx\né\u2028f\ty'),
    ]
    for file in files:
        found = read_table(file)
        assert found.columns == ("text", "label") and [dict(r.cells) for r in found.records] == rows, file
    places = [[record.place.removeprefix(f"{file}, ") for record in read_table(file).records] for file in files]
    assert places == [["line 1", "line 2"], ["item 1", "item 2"], ["line 2", "line 4"], ["line 2", "line 3"]]


def test_a_cell_of_csv_may_have_line_breaks(tmp_path):
    found = read_table(write(tmp_path, "a.csv", 'text,label\n"one\ntwo",x\nb,y\n'))
    assert [(r.cells["text"], r.place[-6:]) for r in found.records] == [("one\ntwo", "line 2"), ("b", "line 4")]


SPOILT = {
    "empty.jsonl": ("", ": no rows in this file"),
    "blank.csv": ("\n \n", ": no rows in this file"),
    "head.csv": ("text,label\n", ": no rows in this file"),
    "bad.jsonl": ('{"text": "a"}\n{"text": }\n', ", line 2: not JSON (Expecting value: line 1 column 10 (char 9)): '{\"text\": }'"),
    "list.jsonl": ('["a"]\n', ", line 1: a list, expected an object with the columns: '[\"a\"]'; a file that is one list is named .json"),
    "number.jsonl": ("{}\n3\n", ", line 2: a number, expected an object with the columns: '3'"),
    "twice.jsonl": ('{"a": 1, "b": 2, "a": 3}\n', ", line 1: the key 'a' occurs twice"),
    "object.json": ('{"a": []}', ": it holds an object, expected a list of objects; name JSON lines .jsonl"),
    "deep.json": ("[" * 100_000, ": lists or objects too deep within one another"),
    "encoding.csv": (b"text,label\ncaf\xe9,x\n", ", line 2: not utf-8 (invalid continuation byte at byte 3 of the line)"),
    "twice.csv": ("text,label,text\na,b,c\n", ", line 1: the column 'text' occurs twice in the header: 'text, label, text'"),
    "nameless.csv": ("text,\na,b\n", ", line 1: a column without a name in the header: 'text, '"),
    "short.csv": ("text,label\na,b\nc\n", ", line 3: 1 cells, and the header has 2 (text, label): 'c'"),
    "long.tsv": ("text\tlabel\na\tb\tc\n", ", line 2: 3 cells, and the header has 2 (text, label): 'a'"),
    "open.csv": ('text,label\na,b\n"c,d\ne,f\n', ", line 3: a double quote opens a cell and none closes it: write the quotes within a cell twice (the row begins here and was read up to line 4)"),
    "behind.csv": ('text,label\n"a" b,c\n', ", line 2: text stands behind a cell's closing double quote: write the quotes within a cell twice (the row begins here and was read up to line 2)"),
    "swallowed.csv": ('text,label\n"a,b\nc,d",e,f\n', ", line 2: 3 cells, and the header has 2 (text, label); a quote that does not end takes the lines below with it: 'a,b\\nc,d'"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_wrong_with_a_table_is_said_with_its_line(tmp_path, name):
    content, message = SPOILT[name]
    file = write(tmp_path, name, content)
    assert fails(read_table, file) == f"{file}{message}"


def test_other_files_are_no_tables(tmp_path):
    file = write(tmp_path, "a.xlsx", "")
    assert fails(read_table, file) == f"'{file}' is no file of rows: its name has to end in .jsonl, .json, .csv, .tsv"


# -- forms -------------------------------------------------------------------------------------------------------------

INFERRED = {
    "messages": "chat", "conversations": "chat", "prompt completion": "completion", "prompt response": "completion",
    "instruction output": "completion", "instruction input output": "completion", "question answer": "completion",
    "instruction context response": "completion", "query response": "completion", "text": "text",
    "text label": "classification", "sentence label idx": "classification", "image label": "images",
    "sentence1 sentence2 label": "classification", "premise hypothesis label": "classification",
    "file_name label": "images",
}  # fmt: skip


@pytest.mark.parametrize("columns", INFERRED)
def test_the_kind_is_inferred_from_the_columns(columns):
    form, how = form_of("f", columns.split())
    assert form.kind == INFERRED[columns] and how.startswith(f"{form.kind}, inferred from the columns ")
    read = how.removeprefix(f"{form.kind}, inferred from the columns ").split(", ")
    assert set(read) == set(columns.split()) - {"idx"}


@pytest.mark.parametrize(
    ("found", "options", "message"),
    [
        ("messages prompt completion", {}, "f has the columns 'messages', 'prompt', 'completion': that can be chat and completion. Write one of task.kind=chat (messages), task.kind=completion (prompt, completion)"),
        ("question answer prompt completion", {}, "f has the columns 'question', 'answer', 'prompt', 'completion': that is completion in several ways. Write task.columns=\"prompt,completion\" or task.columns=\"question,answer\""),
        ("body class", {"kind": "classification"}, "f has the columns 'body', 'class', and none of these are among them: classification: sentence1, sentence2, label or premise, hypothesis, label or text, label or sentence, label. Rename the columns, or write task.kind=classification task.columns=... with their names, the label or the answer last"),
        ("text", {"kind": "texts"}, "task.kind='texts': expected one of chat, completion, classification, text, images"),
        ("body class", {"columns": ["body", "class"]}, "task.columns='body,class' says what to read, not what for: add task.kind=..."),
        ("body class", {"columns": ["body", "klass"], "kind": "classification"}, "f has the columns 'body', 'class': task.columns names 'klass', which is not among them"),
        ("a b c", {"columns": ["a", "b", "c"], "kind": "completion"}, "task.columns has 3 names, and completion is read from 2"),
        ("tokens tags", {}, "f has the columns 'tokens', 'tags': a tag for each word is read by configs/bert_base_conll2003_lora.py"),
    ],
)  # fmt: skip
def test_what_cannot_be_inferred_is_asked(found, options, message):
    assert fails(form_of, "f", found.split(), **options) == message


def test_no_form_lists_all_of_them():
    message = fails(form_of, "f", ["a", "b"])
    assert message.startswith("f has the columns 'a', 'b', and none of these are among them: chat: messages or ")
    assert "; completion: prompt, completion or " in message and message.endswith("the label or the answer last")


def test_a_kind_and_columns_that_are_told(tmp_path):
    rows = [{"q": f"q{i}", "a": f"a{i}", "text": "t", "label": "l"} for i in range(10)]
    file = str(jsonl(tmp_path, "a.jsonl", rows))
    own = read_own(file, kind="completion", columns=["q", "a"])
    assert own.how == "completion, from the columns q, a, as told"
    assert Prompted("q3", "a3") in [row.value for part in own.splits.values() for row in part]
    chat = read_own(file, kind="chat", columns=["q", "a"]).splits["train"][0].value
    assert [message.role for message in chat.messages] == ["user", "assistant"]
    assert (
        read_own(
            str(jsonl(tmp_path, "b.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(30)])), kind="text"
        ).kind
        == "text"
    )


# -- examples ----------------------------------------------------------------------------------------------------------


def test_prompts_are_written_as_the_field_writes_them(tmp_path):
    rows = [{"instruction": f"Add {i}.", "input": "1 2" if i % 2 else "", "output": "3"} for i in range(8)]
    own = read_own(str(jsonl(tmp_path, "a.jsonl", rows)))
    found = {row.place[-1]: row.value for part in own.splits.values() for row in part}
    assert found["1"].prompt.endswith("completes the request.\n\n### Instruction:\nAdd 0.\n\n### Response:")
    assert found["2"].prompt.endswith("### Instruction:\nAdd 1.\n\n### Input:\n1 2\n\n### Response:")
    own = read_own(str(jsonl(tmp_path, "b.jsonl", [{"question": f"{i} {{}}?", "answer": "3"} for i in range(8)])))
    assert Prompted("Question: 2 {}?\nAnswer:", "3") in [row.value for row in own.splits["train"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": 3}, "'completion' is a number, expected text: '3'"),
        ({"prompt": "a", "completion": None}, "'completion' is nothing (null), expected text: 'null'"),
        ({"prompt": "a", "completion": " "}, "'completion' is empty: remove the row or fill it"),
        ({"prompt": ["a"], "completion": "b"}, "'prompt' is a list, expected text: '[\"a\"]'"),
        ({"prompt": "a"}, "no 'completion'; there is 'prompt'"),
    ],
)
def test_a_bad_row_is_said_with_its_line(tmp_path, row, message):
    file = jsonl(tmp_path, "a.jsonl", [{"prompt": "a", "completion": "b"}, row])
    assert fails(read_own, str(file)) == f"{file}, line 2: {message}"


def test_conversations_in_both_ways_of_writing(tmp_path):
    one = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ]
    }
    other = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "u"},
            {"from": "gpt", "value": "a"},
        ]
    }
    expected = Chat((Message("system", "s"), Message("user", "u"), Message("assistant", "a")))
    assert [read_chat("f", next(iter(rows.values()))) for rows in (one, other)] == [expected] * 2
    assert read_chat("f", json.dumps(one["messages"])) == expected  # a cell of CSV


def test_a_question_with_two_answers_is_in_one_split(tmp_path):
    conversation = lambda i, answer: [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}]
    rows = [{"messages": conversation(i, answer)} for answer in ("yes", "no") for i in range(20)]
    own = read_own(str(jsonl(tmp_path, "a.jsonl", rows)))
    asked = {name: {row.value.messages[0].content for row in part} for name, part in own.splits.items()}
    assert [len(own.splits[name]) for name in asked] == [36, 2, 2]
    assert len(set().union(*asked.values())) == sum(map(len, asked.values())) == 20


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "f: an empty list, expected a list of messages: '[]'"),
        ({}, "f: an object, expected a list of messages: '{}'"),
        ("hello", "f: the messages are text, and no JSON (Expecting value: line 1 column 1 (char 0)): 'hello'"),
        ([{"role": "user", "content": "u"}], "f: the assistant says nothing in it, so there is nothing to learn; its roles are user"),
        ([{"role": "user"}], "f, message 1: expected 'role' and 'content', or 'from' and 'value'; there is 'role'"),
        (["u"], "f, message 1: expected 'role' and 'content', or 'from' and 'value'; there is text"),
        ([{"role": "boss", "content": "u"}], 'f, message 1: the role is "boss", expected one of system, user, assistant, tool, human, gpt, bot, model'),
        ([{"role": "user", "content": None}], "f, message 1: the content is nothing (null), expected text"),
        ([{"role": "user", "content": " "}], "f, message 1: the content is empty: remove the message or fill it"),
        ([{"role": "user", "content": [{"type": "image"}]}], "f, message 1: parts of the types image; texts alone are read"),
    ],
)  # fmt: skip
def test_what_is_no_conversation(value, message):
    assert fails(read_chat, "f", value) == message


# -- labels ------------------------------------------------------------------------------------------------------------


def labelled(folder, labels, name="a.jsonl"):
    return str(jsonl(folder, name, [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a"], ("a", "b")),
        ([10, 9], ("9", "10")),
        (["10", "9"], ("9", "10")),
        ([1.0, 0.0], ("0", "1")),
        ([True, False], ("false", "true")),
        ([0.5, 1.0], None),
        (["0.5", "1"], None),
    ],
)
def test_classes_and_values(tmp_path, labels, classes):
    own = read_own(labelled(tmp_path, labels * 10))
    assert own.labels.classes == classes and own.notes == ()
    number = own.labels.number("f", labels[0])
    assert number == (classes.index(classes[1]) if classes else float(labels[0]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["a", 1],
            "line 2: the label is a number ('1'), and in {file}, line 1 it is text ('\"a\"'): write all of them in one way",
        ),
        (
            [1, True],
            "line 2: the label is true or false ('true'), and in {file}, line 1 it is a number ('1'): write all of them in one way",
        ),
        (["a", None], "line 2: the label is empty: remove the row or fill it"),
        (["a", ["b"]], "line 2: the label is a list, expected a name or a number"),
        (["a", "a"], "line 1: all 2 labels are 'a': there is nothing to tell apart"),
    ],
)
def test_labels_that_do_not_go_together(tmp_path, labels, message):
    file = labelled(tmp_path, labels)
    assert fails(read_own, file) == f"{file}, {message.format(file=file)}"


def test_classes_of_one_split_alone(tmp_path):
    train, other = labelled(tmp_path, ["a", "b", "c"]), labelled(tmp_path, ["a", "d"], "v.jsonl")
    assert fails(read_own, train, validation=other) == (
        f"{other}, line 2: the class 'd' of the validation split is not in the training split, which has 'a', 'b', 'c'"
    )
    own = read_own(train, validation=labelled(tmp_path, ["a", "b"], "w.jsonl"))
    assert own.notes[1] == "the validation split lacks the classes 'c'"
    assert own.notes[0].startswith("2 of the 2 validation examples are in the training split, the first: ")
    assert own.notes[0].endswith("w.jsonl, line 1")
    assert "are these classes?" in read_own(labelled(tmp_path, [f"{i}" for i in range(50)], "x.jsonl")).notes[-1]


# -- splits ------------------------------------------------------------------------------------------------------------


def test_what_is_held_out_does_not_depend_on_the_order():
    keys = [f"{i % 40}" for i in range(100)]
    names = held_out(keys, 0.2)
    by_key = dict(zip(keys, names, strict=True))
    assert [by_key[key] for key in keys] == names  # the same question is in one split
    assert [list(by_key.values()).count(name) for name in ("train", "validation", "test")] == [32, 4, 4]
    assert dict(zip(keys[::-1], held_out(keys[::-1], 0.2), strict=True)) == by_key
    assert [held_out(keys, 0.2, test=False).count(name) > 0 for name in ("validation", "test")] == [True, False]
    assert {k for k, name in by_key.items() if name == "test"} == {"4", "10", "13", "17"}  # in every run


def test_of_each_class_the_same_share_is_held_out():
    strata = [0] * 80 + [1] * 20 + [2]
    names = held_out([f"{i}" for i in range(101)], 0.2, strata=strata)
    counts = [[names[i] for i in range(101) if strata[i] == s].count("train") for s in range(3)]
    assert counts[2] == 1 and counts[0] == pytest.approx(64, abs=1) and counts[1] == pytest.approx(16, abs=1)


def test_too_little_to_hold_out():
    assert fails(held_out, ["a", "a", "b"], 0.1) == (
        "2 different examples are too few to hold some of them out: give a file of their own for validation and test"
    )
    assert fails(held_out, ["a"], 0.0) == "held_out=0 of the examples: expected more than 0 and at most 0.5"


def test_splits_that_are_given_and_those_that_are_made(tmp_path):
    rows = lambda first, count: [{"prompt": f"p{i}", "completion": "c"} for i in range(first, first + count)]
    jsonl(tmp_path, "train.jsonl", rows(0, 40))
    sizes = lambda own: [len(own.splits[name]) for name in ("train", "validation", "test")]
    own = read_own(str(tmp_path / "train.jsonl"))
    assert (
        sizes(own) == [36, 2, 2]
        and own.held == "5 % for each of validation and test held out by the hash of the question"
    )
    assert sizes(read_own(str(tmp_path / "train.jsonl"), share=0.5)) == [20, 10, 10]
    jsonl(tmp_path, "test.jsonl", rows(40, 3))
    own = read_own(str(tmp_path))
    assert sizes(own) == [38, 2, 3] and own.held == "5 % for validation held out by the hash of the question"
    jsonl(tmp_path, "dev.jsonl", rows(50, 5))
    assert sizes(read_own(str(tmp_path))) == [40, 5, 3] and read_own(str(tmp_path)).held == "as given"
    (tmp_path / "test.jsonl").unlink()
    own = read_own(str(tmp_path))
    assert own.splits["test"] is own.splits["validation"]
    assert own.held == "as given; there is no test split, validation stands for it"
    write(tmp_path, "dev.csv", "prompt,completion\na,b\n")
    assert fails(read_own, str(tmp_path)) == f"'{tmp_path}' has dev.csv and dev.jsonl: keep one for a split"
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "dev.csv").unlink()
    assert fails(read_own, str(tmp_path)) == (
        f"'{tmp_path}' has dev.jsonl, and nothing named train: name the rows to learn train.*"
    )


# -- texts and images --------------------------------------------------------------------------------------------------


def test_one_text_is_cut_at_ends_of_lines(tmp_path):
    text = "".join(f"line {i}\n" for i in range(200))
    own = read_own(str(write(tmp_path, "a.txt", text.replace("\n", "\r\n"))))
    parts = [own.splits[name][0].value for name in ("train", "validation", "test")]
    assert "".join(parts) == text.removesuffix("\n") and all(part.startswith("line ") for part in parts)
    assert own.kind == "text" and own.how == "text, as the file is .txt"
    assert own.held == "5 % for each of validation and test held out: the end of each text" and len(
        parts[1]
    ) == pytest.approx(90, abs=12)
    assert (
        fails(read_own, str(write(tmp_path, "b.txt", " \n")))
        == f"{tmp_path / 'b.txt'}: an empty text: remove the file or fill it"
    )
    assert "too few to hold a part of them out" in fails(read_own, str(write(tmp_path, "c.txt", "abc")))


def test_a_folder_of_texts_is_split_by_text(tmp_path):
    for i in range(40):
        write(tmp_path, f"{i % 3}/{i}.txt", f"text {i}\n")
    own = read_own(str(tmp_path))
    assert [len(own.splits[name]) for name in ("train", "validation", "test")] == [36, 2, 2]
    assert (
        own.how == "text, as the folder holds .txt files"
        and own.held == "5 % for each of validation and test held out by the hash of the text"
    )


@pytest.fixture
def photos(tmp_path):
    for i in range(24):
        path = tmp_path / "photos" / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (10 * i, 0, 0)).save(path)
    return tmp_path / "photos"


def test_a_folder_of_images(photos):
    own = read_own(str(photos))
    assert own.kind == "images" and own.labels.classes == ("cat", "dog")
    assert own.how == "images, as the folder holds images, a class each"
    assert [len(own.splits[name]) for name in ("train", "validation", "test")] == [22, 1, 1]
    assert (
        own.held == "5 % for each of validation and test held out by the hash of the file's name, of each class alike"
    )
    assert own.splits["train"][0].value == Labelled((str(photos / "cat" / "1.png"),), "cat")


def test_images_by_a_table(photos):
    rows = [{"file_name": f"{'cat' if i % 2 else 'dog'}/{i}.png", "label": i % 2} for i in range(24)]
    jsonl(photos, "metadata.jsonl", rows)
    own = read_own(str(photos))
    assert own.labels.classes == ("0", "1") and len(own.splits["train"]) == 22
    write(photos, "dog/2.png", b"no image")
    message = fails(read_own, str(photos))
    assert message.startswith(
        f"{photos / 'metadata.jsonl'}, line 3: '{photos / 'dog' / '2.png'}' is no image that can be read: "
    )
    (photos / "dog" / "2.png").unlink()
    assert fails(read_own, str(photos)).startswith(
        f"{photos / 'metadata.jsonl'}, line 3: file '{photos / 'dog' / '2.png'}' does not exist"
    )


def test_folders_that_are_unclear(photos):
    image = (photos / "dog" / "0.png").read_bytes()
    write(photos, "loose.png", image)
    assert fails(read_own, str(photos)) == (
        f"'{photos / 'loose.png'}' lies in no folder of a class: one folder for each class, or a metadata.jsonl or "
        "metadata.csv with file_name and label"
    )
    write(photos, "notes.txt", "a")
    assert fails(read_own, str(photos)) == (
        f"'{photos}' has 25 images and 1 texts: write task.kind=images or task.kind=text"
    )
    (photos / "loose.png").write_bytes(b"")
    assert fails(read_own, str(photos), kind="chat").startswith(
        f"'{photos}' has cat/, dog/, loose.png, notes.txt, and task.kind=chat: expected"
    )
    (photos / "empty").mkdir()
    assert fails(read_own, str(photos / "empty")).startswith(
        f"'{photos / 'empty'}' has nothing in it: expected .txt files, "
    )


# -- the datasets library ----------------------------------------------------------------------------------------------


def test_a_name_is_looked_for_in_the_datasets_library(tmp_path, monkeypatch):
    def load_dataset(name, configuration, *, split, revision):
        if split not in ("train", "validation"):
            raise ValueError(f'Unknown split "{split}".')
        return [{"sentence": f"{split} {i}", "label": i % 2, "idx": i} for i in range(10)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    own = read_own("nyu-mll/glue:sst2")
    assert own.kind == "classification" and own.splits["validation"][0].value == Labelled(("validation 0",), 0)
    assert own.splits["train"][0].place == "nyu-mll/glue (train), row 1" and len(own.splits["train"]) == 10
    monkeypatch.setattr(hub, "from_hub", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError,
        match="there is no file or folder 'imdb'; as the name of a data set: 'imdb' comes through the datasets library, which is not installed",
    ):
        read_own("imdb")
    assert fails(read_own, str(tmp_path / "mine.jsonl")).startswith(
        f"file or folder '{tmp_path / 'mine.jsonl'}' does not exist"
    )


# -- templates ---------------------------------------------------------------------------------------------------------

CHAT = Chat(
    (
        Message("system", "Be brief."),
        Message("user", "Hi."),
        Message("assistant", "Hello."),
        Message("user", "Bye."),
        Message("assistant", "See you."),
    )
)
CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)
SPECIALS = {"bos": "<s>", "eos": "</s>"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(tiny.llama(tmp_path_factory.mktemp("llama")))


def pieces(rendered):
    return [rendered.text[begin:end] for begin, end in rendered.counted]


def test_the_plain_template(tokenizer):
    found = plain(tokenizer)(CHAT)
    assert found.text == "<s>System: Be brief.\nUser: Hi.\nAssistant: Hello.</s>\nUser: Bye.\nAssistant: See you.</s>\n"
    assert pieces(found) == [" Hello.</s>", " See you.</s>"]
    tokens, counted = encoded("f", CHAT, plain(tokenizer), tokenizer)
    assert tokenizer.decode(tokens[counted], skip_special=False) == " Hello.</s> See you.</s>"
    assert (
        tokenizer.decode(tokens[~counted], skip_special=False)
        == "<s>System: Be brief.\nUser: Hi.\nAssistant:\nUser: Bye.\nAssistant:\n"
    )


def test_a_checkpoints_template_and_what_counts_in_it(tokenizer):
    pytest.importorskip("jinja2", reason="the extra `chat` is not installed")
    found = jinja(CHATML, SPECIALS)(CHAT)
    assert found.text.startswith("<s><|system|>\nBe brief.</s>\n<|user|>\nHi.</s>\n<|assistant|>\nHello.</s>\n<|user|>")
    assert pieces(found) == ["Hello.</s>\n", "See you.</s>\n"]
    marked = jinja(MARKED, SPECIALS)(CHAT)
    assert marked.text == "system: Be brief.\nuser: Hi.\nassistant: Hello.</s>\nuser: Bye.\nassistant: See you.</s>\n"
    assert pieces(marked) == ["Hello.</s>", "See you.</s>"]
    tokens, counted = encoded("f", CHAT, jinja(CHATML, SPECIALS), tokenizer)
    assert tokenizer.decode(tokens[counted], skip_special=False) == "Hello.</s>\nSee you.</s>\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system role') }}", "the chat template refuses it: no system role"),
        ("{% for m in messages %}", "the chat template is none for Jinja: line 1: "),
        ("{{ messages.__class__.__mro__ }}", "the chat template refuses it: "),  # the sandbox
        ("{{ messages.append(1) }}", "the chat template refuses it: "),  # nothing is changed by it
        (
            "{{ messages[-1].content }}",
            "where message 3 lies cannot be told: the chat template writes it otherwise when others follow",
        ),
    ],
)
def test_templates_that_cannot_be_used(source, message):
    pytest.importorskip("jinja2", reason="the extra `chat` is not installed")
    assert fails(lambda: jinja(source, SPECIALS)(CHAT)).startswith(message)


def test_a_template_needs_jinja(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        ImportError, match=r"which is not installed: pip install 'jlora\[chat\]', or write task.template=plain"
    ):
        jinja(CHATML, SPECIALS)


def test_where_a_checkpoints_template_is_found(tmp_path):
    assert template_of(tmp_path) is None
    write(tmp_path, "tokenizer_config.json", json.dumps({"chat_template": "one"}))
    assert template_of(tmp_path) == "one"
    write(
        tmp_path,
        "tokenizer_config.json",
        json.dumps({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two"}]}),
    )
    assert template_of(tmp_path) == "two"
    write(tmp_path, "chat_template.jinja", "three")
    assert template_of(tmp_path) == "three"


def test_rows_of_conversations_count_the_answers_alone(tokenizer):
    whole, counted = encoded("f", CHAT, plain(tokenizer), tokenizer)
    items = tokenise_chats([Placed("f", CHAT)] * 2, plain(tokenizer), tokenizer)
    assert items[1].tokens.tolist() == whole.tolist() and items[1].mark == np.argmax(counted)
    cut = cut_to(items, len(whole) - 3, ["f, line 1", "f, line 2"])
    assert (cut.cut, cut.longest, len(cut)) == (2, len(whole), 2) and cut_to(items, 999, ["f"] * 2).cut == 0
    row = prompted_rows(cut, len(whole))[1]
    assert row["tokens"][row["loss_mask"]].tolist() == whole[:-3][counted[:-3]].tolist()
    assert row["loss_mask"].sum() < row["mask"].sum() == len(whole) - 3
    packed = packed_rows(cut, 2 * len(whole))[0]
    assert packed["loss_mask"].sum() == 2 * counted[:-3].sum() and packed["segments"].max() == 2
    assert (packed["tokens"][packed["loss_mask"]] == np.tile(whole[:-3][counted[:-3]], 2)).all()
    assert fails(cut_to, items, 10, ["f, line 1", "f, line 2"]) == (
        f"f, line 1: what is to be learned begins after {int(np.argmax(counted))} tokens, and a row has 10; so it is with "
        "2 examples of 2. Remove them, or write a larger task.length"
    )
