"""Description of the data as they were understood, in the lines that a run begins with."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from experiments.data.examples import Chat
from experiments.data.own import Labelled, Own

WIDTH = 100  # characters of an example that are shown


def described(own: Own) -> list[str]:
    """Lines on the data: place, kind, splits, labels, and what may be a mistake."""
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in own.splits.items())
    lines = [f"data      {own.source}: {own.how}", f"splits    {sizes}; {own.held}"]
    if own.labels is not None:
        found = [row.value.label for row in own.splits["train"] if isinstance(row.value, Labelled)]
        lines.append(f"labels    {_labels(own, found)}")
    if own.kind == "chat":
        chats = [row.value for row in own.splits["train"] if isinstance(row.value, Chat)]
        answers = sum(message.role == "assistant" for chat in chats for message in chat.messages)
        lines.append(f"turns     {answers:,} answers in {len(chats):,} conversations; the loss counts them alone")
    return lines + [f"note      {note}" for note in own.notes]


def _labels(own: Own, found: Sequence[object]) -> str:
    assert own.labels is not None
    numbers = [own.labels.number("", label) for label in found]
    if own.labels.classes is None:
        return f"values from {min(numbers):g} to {max(numbers):g}, by the squared error"
    counts = Counter(numbers)
    named = [f"{name} {counts[number]:,}" for number, name in enumerate(own.labels.classes)]
    rest = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return f"{len(named)} classes: {', '.join(named[:8])}{rest}"


def lengths_line(lengths: np.ndarray, length: int) -> str:
    """A line on the lengths of examples in tokens, and how many are cut.

    >>> lengths_line(np.array([3, 4, 5, 90]), 32)
    'lengths   median 4, 95 % up to 77, longest 90 tokens; rows of 32: 1 of 4 (25 %) is cut'
    """
    median, most = (int(np.percentile(lengths, part)) for part in (50, 95))
    over = int((lengths > length).sum())
    share = f" ({100 * over / len(lengths):.3g} %)" if over else ""
    cut = f"{over:,} of {len(lengths):,}{share} {'is' if over == 1 else 'are'} cut" if over else "none is cut"
    return (
        f"lengths   median {median:,}, 95 % up to {most:,}, longest {lengths.max():,} tokens; rows of {length}: {cut}"
    )


def length_of(lengths: np.ndarray, context: int, asked: int | None) -> int:
    """Tokens of a row: as asked, or those of the longest example in eights, at most 1,024 and the model's context.

    >>> [length_of(np.array([longest]), context, None) for longest, context in ((9, 512), (5000, 2048), (9, 8))]
    [16, 1024, 8]
    """
    return min(-(-int(lengths.max()) // 8) * 8, 1024, context) if asked is None else asked


def example_line(text: str, counted: Sequence[tuple[int, int]]) -> str:
    """The beginning of an example, what counts in it between » and «.

    >>> example_line("User: 1 + 1? Assistant: 2", [(23, 25)])
    'example   User: 1 + 1? Assistant:» 2«'
    """
    pieces, last = [], 0
    for begin, end in counted:
        pieces += [text[last:begin], "»", _short(text[begin:end]), "«"]
        last = end
    shown = "".join(_short(piece) for piece in [*pieces, text[last:]])
    return "example   " + shown.replace("\n", "\\n")


def _short(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[: WIDTH // 2]} ... {text[-WIDTH // 2 :]}"
