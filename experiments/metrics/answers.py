"""GSM8K: whether the number at the end of a solution is right."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+")


def marked_answer(text: str) -> str | None:
    r"""Text after the first `#### `, without commas; None without one.

    >>> marked_answer("6 * 2 = 12 eggs.\n#### 1,200"), marked_answer("It is 12.")
    ('1200', None)

    Source: openai/grade-school-math, grade_school_math/dataset.py (`extract_answer`).
    """
    found = _MARKED.search(text)
    return found[1].replace(",", "") if found else None


def last_number(text: str) -> str | None:
    """The last number of a text, without commas; None without one.

    >>> last_number("So she earns $18.50 a day, or 1,295.00 in ten weeks.")
    '1295.00'
    """
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def exact_match(answers: Sequence[str], solutions: Sequence[str], *, flexible: bool = False) -> float:
    """Share of right answers, in percent.

    Args:
      answers: texts that a model wrote.
      solutions: GSM8K's own, with `#### `.
      flexible: compare the last number of the answer, as a number (18.00 is 18). Otherwise what follows `#### `, to the
        letter, as the data set's authors do: a model that does not write `#### ` scores 0.

    Raises:
      ValueError: if there are not as many answers as solutions, or a solution has no `#### `.

    Source: Cobbe et al., arXiv 2110.14168; openai/grade-school-math (`is_correct`); `flexible` is after the filter
    "flexible-extract" of EleutherAI's lm-evaluation-harness.
    """
    if len(answers) != len(solutions) or not answers:
        raise ValueError(f"{len(answers)} answers to {len(solutions)} solutions: expected one for each, at least one")
    right = 0
    for number, (answer, solution) in enumerate(zip(answers, solutions, strict=True)):
        expected = marked_answer(solution)
        if expected is None:
            raise ValueError(f"solution {number} has no '#### ' with a number: {solution[-60:]!r}")
        if flexible:
            number_found = _value(last_number(answer))
            right += number_found is not None and number_found == _value(expected)
        else:
            right += marked_answer(answer) == expected
    return 100 * right / len(answers)


def _value(text: str | None) -> Decimal | None:
    try:
        return None if text is None else Decimal(text.rstrip("."))
    except InvalidOperation:
        return None
