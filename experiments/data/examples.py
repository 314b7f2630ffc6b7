"""Records of files: texts to classify, prompts to complete, conversations, sources with references."""

from collections.abc import Iterable
from typing import NamedTuple


class Classified(NamedTuple):
    """A text, or a pair of texts, and its class (int) or value (float).

    `label` is None in test splits whose labels are not published.
    """

    text: str
    label: int | float | None
    pair: str | None = None


class Prompted(NamedTuple):
    """A prompt and what has to follow it. The loss counts the completion alone."""

    prompt: str
    completion: str


class Message(NamedTuple):
    """Message of one side of a conversation; the role is "system", "user", "assistant" or "tool"."""

    role: str
    content: str


class Chat(NamedTuple):
    """A conversation. The loss counts what the assistant says."""

    messages: tuple[Message, ...]


class References(NamedTuple):
    """A source, all texts that people wrote for it, and a group that scores may be split by (WebNLG's category)."""

    source: str
    texts: tuple[str, ...]
    group: str = ""


def grouped(pairs: Iterable[tuple[str, str, str]]) -> list[References]:
    """References by source, in the order in which the sources first appear, from (source, text, group).

    The published scorers group in this way, wherever in the file a source appears again.
    """
    texts: dict[str, list[str]] = {}
    groups: dict[str, str] = {}
    for source, text, group in pairs:
        texts.setdefault(source, []).append(text)
        groups.setdefault(source, group)
    return [References(source, tuple(found), groups[source]) for source, found in texts.items()]


def prompted(items: Iterable[References]) -> list[Prompted]:
    """One training example for each reference."""
    return [Prompted(item.source, text) for item in items for text in item.texts]
