"""The two texts of the quickstart and their batches."""

import numpy as np
import pytest

from experiments.data import Windows, python_docs, python_source, spread

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
