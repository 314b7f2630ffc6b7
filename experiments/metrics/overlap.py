"""ROUGE-L and CIDEr, as the COCO scorer computes them, which the E2E challenge uses.

Both come from pycocoevalcap, the port of that scorer to Python 3. rouge-score's ROUGE-L is another one: it has beta 1
and takes the reference with the best F, where this takes the best precision and the best recall of all references.

Sources: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", ACL 2004; Vedantam et al., "CIDEr:
Consensus-based Image Description Evaluation", arXiv 1411.5726; tylin/coco-caption.
"""

from collections.abc import Sequence

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from experiments.metrics.texts import checked
from experiments.metrics.tokens import Tokenize, penn

Keyed = dict[int, list[str]]


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: Tokenize = penn) -> float:
    """Mean ROUGE-L with beta = 1.2, from 0 to 100.

        F = (1 + beta^2) P R / (R + beta^2 P)    P, R: the longest common subsequence, over the words of each

    Args:
      hypotheses: one for each example.
      references: of each example.
      tokenize: `penn`, or `stanford` for the scorer's own words.

    Raises:
      ValueError: as `experiments.metrics.texts.checked`.
    """
    return 100 * float(Rouge().compute_score(*_keyed(hypotheses, references, tokenize))[0])


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: Tokenize = penn) -> float:
    """Mean CIDEr over 1- to 4-grams, from 0 to 10: cosines of tf-idf, the documents being the examples' references.

    With one example every idf is log 1, and CIDEr is 0.

    Args:
      hypotheses: one for each example.
      references: of each example.
      tokenize: `penn`, or `stanford` for the scorer's own words.

    Raises:
      ValueError: as `experiments.metrics.texts.checked`.
    """
    return float(Cider().compute_score(*_keyed(hypotheses, references, tokenize))[0])


def _keyed(hypotheses: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenize) -> tuple[Keyed, Keyed]:
    """References and hypotheses by number, as the COCO scorer takes them: words between blanks."""
    checked(hypotheses, references)
    candidates = [" ".join(words) for words in tokenize(hypotheses)]
    written = iter(" ".join(words) for words in tokenize([text for texts in references for text in texts]))
    return (
        {number: [next(written) for _ in texts] for number, texts in enumerate(references)},
        {number: [text] for number, text in enumerate(candidates)},
    )
