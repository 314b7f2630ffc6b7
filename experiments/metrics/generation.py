"""All scores of a generation task at once, with the settings of the papers' tables."""

from collections.abc import Sequence

from experiments.metrics.meteor import meteor, meteor_nltk
from experiments.metrics.ngrams import bleu, nist
from experiments.metrics.overlap import cider, rouge_l
from experiments.metrics.tokens import penn, split_marks, stanford

EXACT_AND_STEM = "METEOR (NLTK, exact and stem)"


def e2e(hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, java: bool) -> dict[str, float]:
    """BLEU, NIST, METEOR, ROUGE-L and CIDEr of E2E, as the LoRA paper's Table 3 has them.

    Args:
      hypotheses: one for each meaning representation.
      references: of each, as `read_e2e` groups them.
      java: all five as the challenge's scorer computes them. Without Java, ROUGE-L and CIDEr may differ a little (see
        `experiments.metrics.tokens.penn`), and in place of METEOR 1.5 there is NLTK's, under a name of its own.

    Raises:
      RuntimeError: if `java` and there is none.
      ValueError: as `experiments.metrics.texts.checked`.

    Source: tuetschek/e2e-metrics, measure_scores.py with -p.
    """
    tokenize = stanford if java else penn
    scores = {"BLEU": bleu(hypotheses, references), "NIST": nist(hypotheses, references)}
    if java:
        scores["METEOR"] = meteor(hypotheses, references, tokenize=stanford)
    else:
        scores[EXACT_AND_STEM] = meteor_nltk(
            [" ".join(words) for words in penn(hypotheses)],
            [[" ".join(words) for words in penn(texts)] for texts in references],
            synonyms=False,
        )
    scores["ROUGE-L"] = rouge_l(hypotheses, references, tokenize=tokenize)
    scores["CIDEr"] = cider(hypotheses, references, tokenize=tokenize)
    return scores


def triples(hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, java: bool) -> dict[str, float]:
    """BLEU and METEOR of WebNLG and DART, as the LoRA paper's Tables 13 and 14 have them.

    Texts are split at every mark and in lower case first. The paper's scorer has NLTK's `word_tokenize` between that
    and METEOR, which leaves such texts as they are but for quotation marks; it is left out here.

    Args:
      hypotheses: one for each set of triples.
      references: of each, as `read_webnlg` and `read_dart` group them. The paper's files hold the first six.
      java: with METEOR 1.5; NLTK's without, under a name of its own.

    Raises:
      RuntimeError: if `java` and there is none.
      ValueError: as `experiments.metrics.texts.checked`.

    Source: microsoft/LoRA, examples/NLG: README.md, src/gpt2_decode.py, eval/eval.py (BLEU by multi-bleu-detok.perl).
    """
    candidates = [split_marks(text) for text in hypotheses]
    written = [[split_marks(text) for text in texts[:6]] for texts in references]
    scores = {"BLEU": bleu(candidates, written)}
    if java:
        return {**scores, "METEOR": meteor(candidates, written)}
    return {**scores, EXACT_AND_STEM: meteor_nltk(candidates, written, synonyms=False)}
