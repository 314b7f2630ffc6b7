"""METEOR: the papers' own version 1.5, and NLTK's older one.

The two are different scores with different weights: numbers of one are not to be compared with numbers of the other.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.metrics.java import run
from experiments.metrics.texts import checked, rectangular
from experiments.metrics.tokens import Tokenize


def meteor(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: Tokenize | None = None,
    paraphrases: bool = True,
) -> float:
    """METEOR 1.5 for English over the corpus, from 0 to 100: exact words, stems, synonyms and paraphrases.

    By the program that the E2E, WebNLG and DART scorers run (`-l en -norm`). It needs Java and about half a minute for
    600 texts; its tables of synonyms and paraphrases are in pycocoevalcap.

    Args:
      hypotheses: one for each example.
      references: of each example.
      tokenize: applied before; the E2E scorer has `stanford`.
      paraphrases: the papers' scores have them. Their table alone takes 10 seconds to read.

    Raises:
      RuntimeError: if there is no Java.
      ValueError: as `experiments.metrics.texts.checked`.

    Source: Denkowski and Lavie, "Meteor Universal: Language Specific Translation Evaluation for Any Target Language",
    WMT 2014.
    """
    checked(hypotheses, references)
    padded = rectangular(references)
    count = len(padded[0])
    candidates, written = list(hypotheses), [text for texts in padded for text in texts]
    if tokenize is not None:
        words = [" ".join(found) for found in tokenize([*candidates, *written])]
        candidates, written = words[: len(candidates)], words[len(candidates) :]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("candidates", "written")]
        for file, texts in zip(files, (candidates, written), strict=True):
            file.write_text("".join(" ".join(text.split()) + "\n" for text in texts), "utf-8")
        options = ["-l", "en", "-norm", "-r", str(count)]
        if not paraphrases:
            options += ["-m", "exact stem synonym"]
        output = run("meteor/meteor-1.5.jar", ["-jar", "{jar}", *map(str, files), *options])
    found = re.search(r"^Final score:\s+([\d.E-]+)", output, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"meteor-1.5.jar gave no score: {output[-500:]}")
    return 100 * float(found[1])


def meteor_nltk(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, synonyms: bool, lowercase: bool = True
) -> float:
    """The mean of NLTK's METEOR, from 0 to 100, for machines without Java. Not what the papers report.

    It has the weights of the first METEOR (alpha 0.9, beta 3, gamma 0.5) where 1.5 has others, no paraphrases and no
    discount for function words.

    Args:
      hypotheses: one for each example, with blanks between words.
      references: of each example, likewise.
      synonyms: match synonyms too, which needs WordNet's files; exact words and Porter stems alone when False. NLTK
        looks for the synonyms of stems ("automobil"), and so finds few.
      lowercase: ignore case.

    Raises:
      RuntimeError: if `synonyms` and WordNet is not there.
      ValueError: as `experiments.metrics.texts.checked`.

    Source: Banerjee and Lavie, "METEOR: An Automatic Metric for MT Evaluation with Improved Correlation with Human
    Judgments", ACL 2005; the parameters of Lavie and Agarwal, WMT 2007.
    """
    from nltk.corpus import wordnet  # a second to import: only who asks for it waits
    from nltk.translate.meteor_score import meteor_score

    checked(hypotheses, references)
    if synonyms:
        try:
            wordnet.ensure_loaded()
        except LookupError as error:
            raise RuntimeError(
                "synonyms=True needs WordNet, which NLTK does not find: nltk.download('wordnet') where there is a "
                "connection, or a copy below a folder named in NLTK_DATA; or pass synonyms=False"
            ) from error
    words: Any = str.lower if lowercase else str
    scores = [
        meteor_score(
            [words(text).split() for text in texts],
            words(candidate).split(),
            preprocess=str,
            wordnet=wordnet if synonyms else _NoSynonyms(),
        )
        for candidate, texts in zip(hypotheses, references, strict=True)
    ]
    return 100 * sum(scores) / len(scores)


class _NoSynonyms:
    """A WordNet in which no word has a synonym."""

    def synsets(self, word: str) -> list[Any]:
        return []
