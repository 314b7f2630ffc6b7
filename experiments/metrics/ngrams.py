"""BLEU and NIST, as the scorers of the E2E and WebNLG challenges compute them."""

import math
from collections import Counter
from collections.abc import Sequence

import sacrebleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from experiments.metrics.texts import checked, rectangular

Ngram = tuple[str, ...]


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = True) -> float:
    """Corpus BLEU-4 with any number of references for each text, from 0 to 100.

    By sacrebleu, with mteval-v13a's words, the reference nearest in length and no smoothing. On E2E it agrees with the
    challenge's own scorer to 12 digits; that scorer differs where a text has fewer than 3 words, of which it counts a
    negative number of 4-grams, and gives a little above 0 for no match.

    Args:
      hypotheses: one for each example.
      references: of each example.
      lowercase: E2E's scorer ignores case.

    Raises:
      ValueError: as `experiments.metrics.texts.checked`.

    Source: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", ACL 2002; Post, "A Call
    for Clarity in Reporting BLEU Scores", arXiv 1804.08771; tuetschek/e2e-metrics, metrics/pymteval.py.
    """
    checked(hypotheses, references)
    streams = [list(stream) for stream in zip(*rectangular(references), strict=True)]
    return sacrebleu.corpus_bleu(
        list(hypotheses), streams, lowercase=lowercase, tokenize="13a", smooth_method="none", force=True
    ).score


def nist(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, order: int = 5, lowercase: bool = True
) -> float:
    """Corpus NIST: BLEU's matches weighted by what they tell, summed over n = 1 to `order`.

        info(w1..wn) = log2(count(w1..w(n-1)) / count(w1..wn))      counted over all references
        NIST = sum over n of (sum of info over matches) / (n-grams of the hypotheses)
               * exp(-beta log(min(1, L_sys / L_ref))^2),  beta = -log(0.5) / log(1.5)^2

    where L_ref adds up each example's mean length of a reference. Written here because no kept library has it: NLTK's
    agrees for one reference, but takes the best of several where mteval clips by all of them (7.89 for 8.93 on E2E).

    Args:
      hypotheses: one for each example.
      references: of each example.
      order: the longest n-gram.
      lowercase: E2E's scorer ignores case.

    Raises:
      ValueError: as `experiments.metrics.texts.checked`.

    Source: Doddington, "Automatic Evaluation of Machine Translation Quality Using N-gram Co-Occurrence Statistics", HLT
    2002; beta and the treatment of several references as in tuetschek/e2e-metrics, metrics/pymteval.py.
    """
    checked(hypotheses, references)
    split = Tokenizer13a()
    words = lambda text: split(text.lower() if lowercase else text).split()
    spoken = [words(text) for text in hypotheses]
    written = [[words(text) for text in texts] for texts in references]

    seen: Counter[Ngram] = Counter()  # over all references, with the empty n-gram once for each word
    for text in (text for texts in written for text in texts):
        seen.update(ngram for n in range(1, order + 1) for ngram in _ngrams(text, n))
        seen[()] += len(text)

    total = 0.0
    for n in range(1, order + 1):
        information = 0.0
        for text, texts in zip(spoken, written, strict=True):
            most: Counter[Ngram] = Counter()
            for reference in texts:
                most |= Counter(_ngrams(reference, n))
            matches = Counter(_ngrams(text, n)) & most
            information += sum(times * math.log2(seen[ngram[:-1]] / seen[ngram]) for ngram, times in matches.items())
        total += information / max(sum(max(len(text) - n + 1, 0) for text in spoken), 1)

    spoken_length = sum(map(len, spoken))
    written_length = sum(sum(map(len, texts)) / len(texts) for texts in written)
    return total * _penalty(spoken_length / written_length)


def _ngrams(words: Sequence[str], n: int) -> list[Ngram]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _penalty(ratio: float) -> float:
    beta = -math.log(0.5) / math.log(1.5) ** 2  # a text of two thirds of the length keeps half of its score
    return math.exp(-beta * math.log(min(ratio, 1)) ** 2) if ratio > 0 else 0.0
