"""Hypotheses and their references, as every score takes them."""

from collections.abc import Sequence


def checked(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Checks that there is one hypothesis for each list of references, and no reference is missing.

    An empty hypothesis is let through: a model may say nothing, and scores 0 for it.

    Raises:
      ValueError: if not.
    """
    if isinstance(hypotheses, str) or any(isinstance(texts, str) for texts in references):
        raise ValueError("hypotheses are a list of texts, references a list of lists of texts; got a text for a list")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} lists of references: give one for each")
    if not hypotheses:
        raise ValueError("no hypotheses")
    for number, texts in enumerate(references):
        if not texts or not all(text.strip() for text in texts):
            raise ValueError(f"example {number} has no references, or an empty one: {list(texts)}")


def rectangular(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """The references, each list as long as the longest, filled with copies of its first.

    BLEU and METEOR are not changed by copies, since they take the best of the references. NIST and CIDEr would be.
    """
    most = max(map(len, references))
    return [[*texts, *[texts[0]] * (most - len(texts))] for texts in references]
