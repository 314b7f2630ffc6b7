"""Tags of words: the files, the counts of conlleval, which token has a word's tag, and a tiny model that learns them."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import jlora
from experiments.config import Schedule
from experiments.data.files import DataError
from experiments.recipes import tiny
from experiments.tasks.task import Files
from experiments.tasks.token_classification import (
    Sentence,
    Splits,
    TokenClassification,
    align,
    as_bio,
    entities,
    predicted,
    read_sentences,
    scores,
    tags_of,
)
from jlora.models import Tokenizer

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "bert_base_conll2003_lora.py"


def fails(call, *arguments, **options):
    with pytest.raises(DataError) as error:
        call(*arguments, **options)
    return str(error.value)


def written(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture(scope="module", params=["bert", "roberta"])
def checkpoint(request, tmp_path_factory):
    return getattr(tiny, request.param)(tmp_path_factory.mktemp(request.param))


# -- files -------------------------------------------------------------------------------------------------------------

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP I-ORG
rejects VBZ B-VP O

\ufeffPeter NNP B-NP I-PER
Blackburn NNP I-NP I-PER
Anna NNP I-NP B-PER
"""


def test_both_formats_give_the_same_sentences(tmp_path):
    expected = [
        Sentence(("EU", "rejects"), ("B-ORG", "O")),
        Sentence(("Peter", "Blackburn", "Anna"), ("B-PER", "I-PER", "B-PER")),
    ]
    assert read_sentences(written(tmp_path, "a.txt", CONLL)) == expected
    assert (
        read_sentences(written(tmp_path, "b.tsv", CONLL.replace("-DOCSTART- -X- -X- O\n\n", "").replace(" ", "\t")))
        == expected
    )
    lines = '{"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}\n{"tokens": ["Peter", "Blackburn", "Anna"], "tags": ["B-PER", "I-PER", "B-PER"]}\n'
    assert read_sentences(written(tmp_path, "c.jsonl", lines)) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "EU B-ORG\nrejects\n", ", line 2: one column, expected a word and its tag: 'rejects'"),
        ("a.txt", "EU S-ORG\n", ", line 1: the tag 'S-ORG', expected O, B-... or I-..."),
        ("a.txt", "\n\n", ": no sentences in this file"),
        ("a.jsonl", '{"tokens": ["a"], "tags": []}\n', ", line 1: 'tags' is no list of texts, or an empty one: '[]'"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [3]}\n', ", line 1: 'tags' is no list of texts, or an empty one: '[3]'"),
        ("a.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}\n', ", line 1: 1 tokens and 2 tags, expected one for each"),
        ("a.jsonl", '{"tokens": ["a"]}\n', ", line 1: no 'tags'; there is 'tokens'"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, name, text, message):
    file = written(tmp_path, name, text)
    assert fails(read_sentences, file) == f"{file}{message}"


# -- conlleval ---------------------------------------------------------------------------------------------------------

# true, predicted, right, true entities, predicted ones by conlleval, and by strict IOB2
TABLE = [
    ("B-PER I-PER O", "B-PER I-PER O", 1, 1, 1, 1),
    ("B-PER I-PER O", "B-PER O O", 0, 1, 1, 1),  # one end differs
    ("B-PER I-PER O", "B-LOC I-LOC O", 0, 1, 1, 1),  # the type differs
    ("B-PER I-PER O", "B-PER B-PER O", 0, 1, 2, 2),
    ("B-PER I-PER O", "I-PER I-PER O", 1, 1, 1, 0),  # I- at the beginning
    ("B-PER B-PER O", "B-PER I-PER O", 0, 2, 1, 1),
    ("B-PER I-LOC O", "B-PER I-LOC O", 2, 2, 2, 1),  # another type begins another entity
    ("O O O", "O B-PER O", 0, 0, 1, 1),
    ("B-LOC O B-LOC", "B-LOC O O", 1, 2, 1, 1),
]


@pytest.mark.parametrize(("true", "guessed", "right", "there", "found", "strictly"), TABLE)
def test_entities_are_counted_as_conlleval_counts_them(true, guessed, right, there, found, strictly):
    true, guessed = true.split(), guessed.split()
    assert len(entities(true)) == there and len(entities(guessed)) == found
    assert len(entities(guessed, strict=True)) == strictly
    assert len(set(entities(true)) & set(entities(guessed))) == right


def test_f1_of_the_whole_table():
    true, guessed = ([row[i].split() for row in TABLE] for i in (0, 1))
    right, there, found = (sum(row[i] for row in TABLE) for i in (2, 3, 4))  # 5 of 11 and of 11
    assert (right, there, found) == (5, 11, 11)
    expected = {"precision": 100 * 5 / 11, "recall": 100 * 5 / 11, "f1": 100 * 5 / 11}
    assert scores(true, guessed) == pytest.approx(expected)
    strict = scores(true, guessed, strict=True)
    assert strict == pytest.approx({"precision": 100 * 3 / 9, "recall": 100 * 3 / 11, "f1": 100 * 6 / 20})
    assert scores([["O"]], [["O"]]) == {"f1": 0, "precision": 0, "recall": 0}


def test_tags_in_order():
    assert as_bio(["I-PER", "B-PER", "I-LOC", "I-LOC", "O", "I-LOC"]) == (
        "B-PER",
        "B-PER",
        "B-LOC",
        "I-LOC",
        "O",
        "B-LOC",
    )
    assert tags_of([Sentence(("a", "b"), ("B-PER", "B-LOC"))]) == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert fails(tags_of, [Sentence(("a",), ("O",))]) == "no sentence to train on names anything: all tags are O"


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_the_first_token_of_a_word_has_its_tag(checkpoint):
    tokenizer, words = Tokenizer.load(checkpoint), ("restaurant", "xylo-q", "\u200b", "the", "film")
    tokens, firsts = align(words, tokenizer, 64)
    assert tokens.tolist() == tokenizer.encode(" ".join(words))
    places = np.flatnonzero(firsts >= 0)
    assert firsts[places].tolist() in ([0, 1, 3, 4], [0, 1, 2, 3, 4])  # BERT's normaliser leaves the third out
    texts = [tokenizer.decode([tokens[place]]).strip() for place in places[:2]]
    assert "restaurant".startswith(texts[0]) and "xylo-q".startswith(texts[1]) and all(texts)
    assert firsts[0] == firsts[-1] == -1 and (firsts == -1).sum() > 3  # special tokens, and other tokens of xylo-q
    cut, short = align(words, tokenizer, 6)
    assert len(cut) == 6 and cut[-1] == tokens[-1] and short[:5].tolist() == firsts[:5].tolist() and short[-1] == -1


def test_words_without_a_token_are_outside():
    numbers, firsts = np.array([[9, 1, 2, 2, 0]]), np.array([[-1, 0, -1, 2, -1]])
    sentence = Sentence(("a", "b", "c", "d"), ("O",) * 4)
    assert predicted(numbers, firsts, [sentence], ("O", "B-PER", "I-PER")) == [["B-PER", "O", "I-PER", "O"]]


def test_a_tag_that_the_training_split_lacks(tmp_path):
    folder = tiny.bert(tmp_path)
    known, other = [Sentence(("a",), ("B-PER",))], [Sentence(("a",), ("B-LOC",))]
    task = TokenClassification("tags", lambda: Splits(known, known, other), length=8)
    assert fails(task.open, Files(folder, {}), Schedule(4, 1), 1) == (
        "the test split, sentence 1: no sentence to train on has the tag 'B-LOC'; there are 'O', 'B-PER', 'I-PER'"
    )


@pytest.mark.loose_promotion  # Optax's schedules divide an int by an int
def test_a_tiny_model_learns_tags(tmp_path):
    spec = importlib.util.spec_from_file_location("conll", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = module.small()
    opened = small.task.open(Files(tiny.bert(tmp_path), small.options), small.train, small.evaluate_batch)
    params, (run,) = opened.params(0), small.runs
    batches = opened.new.batches(12, 0)
    batch = batches(0)
    counted = batch["labels"] >= 0
    assert batch["share"].sum() == pytest.approx(counted.sum()) and (batch["words"] >= 0).tolist() == counted.tolist()
    sites = jlora.sites(opened.loss, params, batch, jax.random.key(0))
    adapted = jlora.apply(params, method=run.method, targets=run.targets, sites=sites, extras=opened.head)
    evaluate = opened.evaluator(jlora.lift(opened.model.apply))
    before = evaluate(adapted, "validation", "new")
    step = jlora.train_step(opened.loss, optax.adam(3e-2), pass_key=True)
    state = jlora.TrainState.create(adapted, step.tx, key=0)
    for i in range(24):
        state, _ = step(state, batches(i))
    after = evaluate(state.adapted, "validation", "new")
    assert after["f1"] > max(60, before["f1"]) and after["loss"] < before["loss"] / 2
    half = {name: np.asarray(value[:5]) for name, value in batch.items()}  # parts of unlike sizes, as with accumulate
    rest = {name: np.asarray(value[5:]) for name, value in batch.items()}
    parts = [float(opened.loss(params, part, jax.random.key(0))) * len(part["share"]) / 12 for part in (half, rest)]
    assert sum(parts) == pytest.approx(float(opened.loss(params, batch, jax.random.key(0))), rel=1e-5)
