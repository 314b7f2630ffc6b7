"""Scores against the published scorers.

The numbers of EXAMPLES were computed once with the programs that the papers used: BLEU and NIST with the E2E challenge's
pymteval.py, METEOR, ROUGE-L and CIDEr with the COCO scorer's own classes behind Stanford's tokenizer. They come from
other code than the one that is tested here, but for ROUGE-L and CIDEr, where the words are what can differ.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import metrics
from experiments.metrics import answers, generation, java, tokens
from experiments.metrics.texts import rectangular

pytestmark = pytest.mark.once

EXAMPLES = [
    ("The Eagle is a kid-friendly pub near Burger King, with prices of £20-25.", [
        "The Eagle is a kid friendly pub. It is near Burger King and costs £20-25.",
        "Near Burger King there's The Eagle, a child-friendly pub (£20-25).",
        "A pub near Burger King, The Eagle, is kid-friendly.",
    ]),
    ("Blue Spice is a coffee shop in the city centre.", [
        "A coffee shop in the city centre area called Blue Spice.",
        "Blue Spice is a coffee shop in city centre.",
    ]),
    ("It doesn't serve Italian food, and the customer rating is 3 out of 5 ...", [
        "The Rice Boat, rated 3 out of 5 by customers, does not serve Italian food.",
    ]),
    ("Giraffe has an average rating & cheap prices; families are welcome!", [
        "With an average rating and cheap prices, Giraffe welcomes families.",
        "Giraffe -- cheap, with an average rating -- is family-friendly!",
        "Families can eat cheaply at Giraffe. Its rating is average.",
    ]),
    ("Cotto costs less than £20 and is located by the riverside.", [
        "Cotto is by the riverside. It costs less than £20.",
        "By the riverside is Cotto, which is cheap.",
    ]),
]  # fmt: skip
TEXTS = [text for text, _ in EXAMPLES]
WRITTEN = [written for _, written in EXAMPLES]
FIRST = [written[:1] for _, written in EXAMPLES]


def fails(function, *arguments, kind=ValueError):
    """The text of the error."""
    with pytest.raises(kind) as error:
        function(*arguments)
    return str(error.value)


NEEDS_JAVA = pytest.mark.skipif(shutil.which("java") is None, reason="no Java")


@pytest.mark.parametrize(
    ("references", "bleu", "nist", "rouge_l", "cider"),
    [
        (WRITTEN, 44.10049655001383, 4.883686986397421, 61.01533296604196, 3.756204605546339),
        (FIRST, 33.667710890508545, 4.011991470965898, 55.10622734690085, 4.264610588168806),
    ],
)
def test_against_the_e2e_scorer(references, bleu, nist, rouge_l, cider):
    found = [score(TEXTS, references) for score in (metrics.bleu, metrics.nist, metrics.rouge_l, metrics.cider)]
    np.testing.assert_allclose(found, [bleu, nist, rouge_l, cider], rtol=1e-12)


@NEEDS_JAVA
def test_stanfords_words_are_penns_and_meteor_is_the_coco_scorers():
    assert tokens.stanford(TEXTS) == tokens.penn(TEXTS)
    # The table of paraphrases takes 10 seconds to read and finds none here: the COCO scorer, which reads it, gives the same.
    meteor = metrics.meteor(TEXTS, WRITTEN, tokenize=tokens.stanford, paraphrases=False)
    assert meteor == pytest.approx(41.64457750220984, rel=1e-12)


@NEEDS_JAVA
@pytest.mark.skipif("JLORA_METEOR" not in os.environ, reason="takes a minute: set JLORA_METEOR")
def test_all_of_e2e_with_java():
    scores = metrics.e2e(TEXTS, WRITTEN, java=True)
    expected = [44.10049655001383, 4.883686986397421, 41.64457750220984, 61.01533296604196, 3.756204605546339]
    assert list(scores) == ["BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"]
    np.testing.assert_allclose(list(scores.values()), expected, rtol=1e-12)
    assert metrics.meteor(TEXTS, FIRST, tokenize=tokens.stanford) == pytest.approx(40.208071954281074, rel=1e-12)
    assert metrics.triples(TEXTS, WRITTEN, java=True)["METEOR"] == pytest.approx(39.38129649662099, rel=1e-12)


def test_the_scores_of_e2e_without_java_say_that_meteor_is_another():
    scores = metrics.e2e(TEXTS, WRITTEN, java=False)
    assert list(scores) == ["BLEU", "NIST", generation.EXACT_AND_STEM, "ROUGE-L", "CIDEr"]
    assert scores["CIDEr"] == pytest.approx(3.756204605546339, rel=1e-12)


def test_webnlg_splits_at_every_mark_and_reads_six_references():
    seven = [[*written, *["another text"] * (6 - len(written)), text] for text, written in EXAMPLES]
    scores = metrics.triples(TEXTS, seven, java=False)
    assert scores["BLEU"] == pytest.approx(47.00272241046365, rel=1e-12)  # pymteval on the split texts
    assert "METEOR" not in scores


def test_without_java_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert fails(metrics.meteor, TEXTS, WRITTEN, kind=RuntimeError) == (
        "meteor/meteor-1.5.jar is a Java program of pycocoevalcap, and no java is on the PATH: install a Java runtime and "
        "pycocoevalcap, or use the scores that need none (java=False)"
    )


@NEEDS_JAVA
def test_a_program_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match=r"^no\.jar ended with status 1: .*no\.jar"):
        java.run("no.jar", ["-jar", "{jar}"])


# -- BLEU and NIST by hand ---------------------------------------------------------------------------------------------


def test_nist_by_hand():
    # Words of the references: a a b; counts: a 2, b 1; "a a" 1, "a b" 1. Hypothesis "a b": info(a) = log2(3/2),
    # info(b) = log2(3/1), info("a b") = log2(2/1). Lengths 2 and 3.
    penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(2 / 3) ** 2)
    expected = ((math.log2(3 / 2) + math.log2(3)) / 2 + math.log2(2) / 1) * penalty
    assert metrics.nist(["a b"], [["a a b"]]) == pytest.approx(expected, rel=1e-12)
    assert penalty == pytest.approx(0.5)


def test_a_word_matches_as_often_as_in_the_one_reference_that_has_it_most():
    # 4 words in the references, 2 of them "pub": info 1. One of two matches, though both references have it.
    assert metrics.nist(["pub pub"], [["pub a", "pub b"]]) == pytest.approx(1 / 2, rel=1e-12)


def test_bleu_is_not_smoothed():
    assert metrics.bleu(["the pub is not cheap"], [["a cafe is not far"]]) == 0


def test_nltk_agrees_on_nist_of_one_reference():
    from nltk.translate.nist_score import corpus_nist

    words = (
        [text.lower().replace(".", " .").split() for text in TEXTS[4:]],
        [[FIRST[4][0].lower().replace(".", " .").split()]],
    )
    assert metrics.nist(TEXTS[4:], FIRST[4:]) == pytest.approx(corpus_nist(words[1], words[0]), rel=1e-12)


def test_case_counts_if_it_is_asked_for():
    assert metrics.bleu(["THE PUB IS CHEAP"], [["the pub is cheap"]]) == pytest.approx(100)
    assert metrics.bleu(["THE PUB IS CHEAP"], [["the pub is cheap"]], lowercase=False) == 0
    assert metrics.nist(["THE PUB"], [["the pub"]], lowercase=False) == 0


def test_nothing_said_scores_nothing():
    for score in (metrics.bleu, metrics.nist, metrics.rouge_l, metrics.cider):
        assert score(["", ""], [["a pub"], ["a cafe"]]) == 0


def test_a_text_that_is_its_own_reference_is_perfect():
    assert metrics.bleu(TEXTS, [[text] for text in TEXTS]) == pytest.approx(100)
    assert metrics.rouge_l(TEXTS, [[text] for text in TEXTS]) == pytest.approx(100)
    assert metrics.cider(TEXTS, [[text] for text in TEXTS]) == pytest.approx(10)


def test_rouge_l_takes_the_best_precision_and_the_best_recall_of_all_references():
    # P = 2/2 from the first, R = 1/1 from the second: F = 1, though neither reference gives it alone.
    assert metrics.rouge_l(["a pub"], [["a pub near here", "pub"]]) == pytest.approx(100)
    precision, recall, beta = 2 / 2, 2 / 4, 1.2
    f = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert metrics.rouge_l(["a pub"], [["a pub near here"]]) == pytest.approx(100 * f)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The customers' rating isn't 1,000.5% -- it's £20-25!", "the customers rating is n't 1,000.5 % it 's # 20-25"),
        ("I can't, we cannot and they're gonna", "i ca n't we can not and they 're gon na"),
        ("Mr. Smith & Co., open at 9:30 p.m. (U.S.)", "mr. smith & co. open at 9:30 p.m. -lrb- u.s. -rrb-"),
        ("“Curly” ‘quotes’, a – dash… €5 a/b", "curly quotes a dash $ 5 a/b"),
    ],
)
def test_penns_words(text, words):
    assert tokens.penn([text]) == [words.split()]
    if shutil.which("java"):
        assert tokens.stanford([text]) == [words.split()]


# -- METEOR of NLTK ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "written", "score"),  # from NLTK's own documentation; none needs a synonym
    [
        ("on the mat sat the cat", "The cat sat on the mat", 0.5),
        ("The cat was sat on the mat", "The cat sat on the mat", 0.9654),
        (
            "It is a guide to action which ensures that the military always obeys the commands of the party",
            "It is a guide to action that ensures that the military will forever heed Party commands",
            0.6944,
        ),
    ],
)
def test_nltks_meteor(text, written, score):
    assert metrics.meteor_nltk([text], [[written]], synonyms=False) / 100 == pytest.approx(score, abs=5e-5)
    assert metrics.meteor_nltk([text, "x"], [[written, "y"], ["z"]], synonyms=False) / 100 == pytest.approx(
        score / 2, abs=5e-5
    )


def test_synonyms_need_wordnet(monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(
        "nltk.corpus.wordnet", nltk.corpus.util.LazyCorpusLoader("wordnet", nltk.corpus.WordNetCorpusReader)
    )
    with pytest.raises(RuntimeError, match=r"^synonyms=True needs WordNet, which NLTK does not find: "):
        metrics.meteor_nltk(["a car"], [["an automobile"]], synonyms=True)


# -- input that does not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "written", "message"),
    [
        (["a"], [], "1 hypotheses for 0 lists of references: give one for each"),
        ([], [], "no hypotheses"),
        (["a"], [[]], "example 0 has no references, or an empty one: []"),
        (["a", "b"], [["c"], ["d", " "]], "example 1 has no references, or an empty one: ['d', ' ']"),
        (["a"], ["c"], "hypotheses are a list of texts, references a list of lists of texts; got a text for a list"),
    ],
)
def test_texts_that_do_not_fit(texts, written, message):
    for score in (metrics.bleu, metrics.nist, metrics.rouge_l, metrics.cider):
        assert fails(score, texts, written) == message


def test_references_are_filled_with_their_first():
    assert rectangular([["a"], ["b", "c", "d"]]) == [["a", "a", "a"], ["b", "c", "d"]]


# -- classes and values ------------------------------------------------------------------------------------------------


def test_classes_by_hand():
    predictions, labels = [1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0]  # 2 of each right, one of each wrong
    assert metrics.accuracy(predictions, labels) == pytest.approx(100 * 4 / 6)
    assert metrics.f1([1, 1, 1, 0], [1, 0, 0, 0]) == pytest.approx(100 * 2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert metrics.matthews(predictions, labels) == pytest.approx(100 * (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))
    assert metrics.matthews([+1, +1, +1, 0], [+1, 0, +1, +1]) == pytest.approx(-100 / 3)  # scikit-learn's example
    assert metrics.matthews([1, 1], [0, 1]) == metrics.f1([0, 0], [0, 0]) == 0


def test_correlations():
    assert metrics.pearson([1, 2, 3, 5], [2, 4, 6, 10]) == pytest.approx(100)
    assert metrics.pearson([1.0, 2, 3, 4, 5, 6, 7], [10, 9, 2.5, 6, 4, 3, 2]) == pytest.approx(
        -82.85038835884279
    )  # SciPy's
    assert metrics.spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(82.07826816681234)  # SciPy's example
    assert math.isnan(metrics.pearson([1, 1, 1], [1, 2, 3])) and math.isnan(metrics.spearman([1, 2, 3], [1, 1, 1]))


def test_glue_scores_each_task_as_the_papers_do():
    predictions, labels = [0, 1, 1, 0], [0, 1, 0, 0]
    scored = {
        task: list(metrics.glue(task, predictions, labels)) for task in ("cola", "sst2", "mnli", "mrpc", "qqp", "stsb")
    }
    assert scored == {
        "cola": ["matthews"], "sst2": ["accuracy"], "mnli": ["accuracy"], "mrpc": ["accuracy", "f1"],
        "qqp": ["accuracy", "f1"], "stsb": ["pearson", "spearman"],
    }  # fmt: skip
    assert metrics.glue("mrpc", predictions, labels) == {"accuracy": 75.0, "f1": pytest.approx(200 / 3)}
    assert (
        fails(metrics.glue, "sst", predictions, labels)
        == "GLUE has no task 'sst'; there are cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli"
    )
    assert fails(metrics.accuracy, [1, 2], [1]) == "predictions (2,) and labels (1,): expected two rows of one length"


# -- GSM8K -------------------------------------------------------------------------------------------------------------


def test_answers_as_the_authors_of_gsm8k_compare_them():
    solutions = ["2 + 3 = 5\n#### 5", "#### 1,200", "#### -3", "#### 18"]
    texts = ["5 apples.\n#### 5", "#### 1200", "The answer is -3", "#### 18.00"]
    assert metrics.exact_match(texts, solutions) == 50  # to the letter: no mark is wrong, and so is 18.00
    assert metrics.exact_match(texts, solutions, flexible=True) == 100
    assert metrics.exact_match(["I do not know"] * 4, solutions, flexible=True) == 0


def test_numbers_are_found():
    assert answers.marked_answer("#### $5") is None and answers.marked_answer("a #### 1,234.5 b #### 6") == "1234.5"
    assert answers.last_number("from 1,000 to -2.50.") == "-2.50" and answers.last_number("none") is None


def test_answers_that_do_not_fit():
    assert (
        fails(metrics.exact_match, ["1"], ["the answer is 1"])
        == "solution 0 has no '#### ' with a number: 'the answer is 1'"
    )
    with pytest.raises(ValueError, match="^1 answers to 0 solutions: expected one for each, at least one$"):
        metrics.exact_match(["1"], [])


# -- the real files ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif("JLORA_DATA" not in os.environ, reason="JLORA_DATA does not name the folder with the real data")
def test_on_the_real_data():
    from experiments.data.e2e import read_e2e

    folder = Path(os.environ["JLORA_DATA"])
    found = [item for item in read_e2e(folder / "e2e" / "lora_repo_test.txt") if len(item.texts) > 1]
    texts, written = [item.texts[0] for item in found], [item.texts[1:] for item in found]
    assert metrics.bleu(texts, written) == pytest.approx(61.17665260031045, rel=1e-12)  # pymteval
    assert metrics.nist(texts, written) == pytest.approx(8.929005262528653, rel=1e-12)  # pymteval
    assert metrics.rouge_l(texts, written) == pytest.approx(63.92250041899340, rel=1e-12)  # COCO with Stanford's words
    assert metrics.cider(texts, written) == pytest.approx(1.8944722307690935, rel=1e-12)
    solutions = [json.loads(line)["answer"] for line in (folder / "gsm8k" / "test.jsonl").read_text().splitlines()]
    assert metrics.exact_match(solutions, solutions) == metrics.exact_match(solutions, solutions, flexible=True) == 100
    assert "tensorflow" not in sys.modules
