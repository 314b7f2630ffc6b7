"""Rows of tokens, batches, and what is larger than memory."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest

from experiments.data.batches import Batches
from experiments.data.examples import Classified, Prompted
from experiments.data.files import DataError
from experiments.data.labelled_text import read_labelled
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

pytestmark = pytest.mark.once


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


def test_values_and_texts_without_labels():
    row = classified_rows(tokenise_classified([Classified("a", 2.5)], bert, length=4, classes=None), 4)[0]
    assert row["labels"] == 2.5 and row["labels"].dtype == np.float32
    row = classified_rows(tokenise_classified([Classified("a", None)], bert, length=4, classes=2), 4)[0]
    assert sorted(row) == ["mask", "tokens", "types"]


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
    items = tokenise_classified([Classified("wonderful news", 0)], bert, length=5, classes=2, truncate=True)
    assert bytes(items[0].tokens[1:-1].tolist()) == b"won"  # not even the first word fits: so many characters
    assert fails(tokenise_classified, [Classified("wonderful", 0)], bert, length=2, classes=2, truncate=True) == (
        "not even the first character fits in a context of 2 tokens: 'wonderful'"
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
    items = tokenise_prompted(PROMPTS, words, length=8, begin=40, separator=50, end=60)
    row = prompted_rows(items, 8, pad=99)[0]
    assert row["tokens"].tolist() == [40, 1, 2, 50, 3, 60, 99, 99]
    assert row["mask"].tolist() == [True] * 6 + [False] * 2
    assert row["loss_mask"].tolist() == [False, False, False, False, True, True, False, False]


def test_the_completion_begins_with_a_blank():
    items = tokenise_prompted([Prompted("a", "b")], lambda text: list(text.encode()), length=8)
    assert bytes(items[0].tokens.tolist()) == b"a b"
    items = tokenise_prompted([Prompted("a", "b")], lambda text: list(text.encode()), length=8, joiner="\n")
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
def test_rows_of_a_batch_are_those_of_the_whole_one(last):
    """In every epoch, by any numbers: the rows of one of several processes need not be neighbours."""
    batches = Batches(numbered(29), batch=6, last=last, seed=5 if last == "drop" else None)
    for step in range(10):
        whole = batches(step)
        for numbers in ([0, 1, 2], [5, 1], range(6)):
            found = batches.rows_of(step, numbers)
            assert found.keys() == whole.keys()
            for name in whole:
                np.testing.assert_array_equal(found[name], whole[name][list(numbers)])
                assert found[name].dtype == whole[name].dtype


def test_rows_that_are_not_asked_for_are_not_read():
    read = []

    class Rows:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            read.append(index)
            return {"x": np.int32(index)}

    batches = Batches(Rows(), batch=4, seed=1)
    assert len(batches.rows_of(2, [1, 3])["x"]) == len(read) == 2
    with pytest.raises(IndexError, match="^step 3 of 3$"):
        Batches(Rows(), batch=4, seed=1, epochs=1).rows_of(3, [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 8}, "5 rows do not fill a batch of 8: take a smaller batch, or last='pad'"),
        ({"batch": 0}, "a batch has at least 1 row, got 0"),
        ({"batch": 2, "seed": 0, "last": "pad"}, "last='pad' shows all rows in order: leave out the seed"),
    ],
)
def test_batches_that_cannot_be(options, message):
    assert fails(Batches, numbered(5), **options) == message

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
