"""Conversations as tokens, of which the assistant's count: by a checkpoint's chat template, or a plain one."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data.examples import Chat, Message
from experiments.data.files import DataError, shown
from experiments.data.table import json_of, named
from experiments.data.tokenised import Item, Tokenised, gather
from jlora.models import Tokenizer, reading

ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
"""Roles as data sets write them, ShareGPT's among them, and as templates know them."""
PLAIN = "System: ...\\nUser: ...\\nAssistant: ...<end>\\n"
_BEGIN, _END = "\ue0f0", "\ue0f1"  # around what counts, in a rendered text; private use: no font shows them


class Rendered(NamedTuple):
    """A conversation as a text, and the places of what counts: (begin, end) in characters."""

    text: str
    counted: tuple[tuple[int, int], ...]


Template = Callable[[Chat], Rendered]


# -- conversations -----------------------------------------------------------------------------------------------------


def read_chat(place: str, value: Any) -> Chat:
    """A list of `{"role": ..., "content": ...}` or of `{"from": ..., "value": ...}`, also as JSON in a text.

    Raises:
      DataError: beginning with the place: for what is no such list, and where the assistant says nothing.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{place}: the messages are text, and no JSON ({error}): {shown(value)}") from error
    if not isinstance(value, list) or not value:
        what = "an empty list" if isinstance(value, list) else named(value)
        raise DataError(f"{place}: {what}, expected a list of messages: {shown(json_of(value))}")
    messages = tuple(_message(f"{place}, message {i}", item) for i, item in enumerate(value, 1))
    if not any(message.role == "assistant" for message in messages):
        raise DataError(
            f"{place}: the assistant says nothing in it, so there is nothing to learn; its roles are "
            f"{', '.join(message.role for message in messages)}"
        )
    return Chat(messages)


def _message(place: str, item: Any) -> Message:
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(item, Mapping) and {role, content} <= set(item):
            if item[role] not in ROLES:
                raise DataError(f"{place}: the role is {json_of(item[role])}, expected one of {', '.join(ROLES)}")
            return Message(ROLES[item[role]], _content(place, item[content]))
    there = ", ".join(map(repr, item)) if isinstance(item, Mapping) else named(item)
    raise DataError(f"{place}: expected 'role' and 'content', or 'from' and 'value'; there is {there}")


def _content(place: str, content: Any) -> str:
    if isinstance(content, list):  # parts, as in OpenAI's format
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
        if any(kind != "text" for kind in kinds):
            raise DataError(f"{place}: parts of the types {', '.join(map(str, kinds))}; texts alone are read")
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{place}: the content is {named(content)}, expected text")
    if not content.strip():
        raise DataError(f"{place}: the content is empty: remove the message or fill it")
    return content


# -- templates ---------------------------------------------------------------------------------------------------------


def plain(tokenizer: Tokenizer) -> Template:
    """`System: ...`, `User: ...` and `Assistant: ...`, a line each; what the assistant says ends in the end token.

    Raises:
      DataError: if the tokenizer has no end token.
    """
    end, begin = tokenizer.specials.get("eos"), tokenizer.specials.get("bos", "")
    if end is None:
        raise DataError(f"the tokenizer of '{tokenizer.source}' has no end token: an answer would have no end")

    def render(chat: Chat) -> Rendered:
        text, counted = begin, []
        for role, content in chat.messages:
            text += f"{role.capitalize()}:"
            reply = f" {content.strip()}"
            if role == "assistant":
                reply += end
                counted.append((len(text), len(text) + len(reply)))
            text += f"{reply}\n"
        return Rendered(text, tuple(counted))

    return render


def template_of(folder: Path) -> str | None:
    """The chat template of a checkpoint's tokenizer: chat_template.jinja, or what tokenizer_config.json says.

    Raises:
      ValueError: if those files are damaged, or the template is no text.
    """
    if reading.has(folder / "chat_template.jinja"):
        return reading.read_text(folder / "chat_template.jinja")
    settings = folder / "tokenizer_config.json"
    found = reading.read_json(settings).get("chat_template") if reading.has(settings) else None
    if isinstance(found, list):  # several by name
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, Mapping)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise DataError(f"'{settings}' has a chat_template that is no text: {shown(json_of(found))}")
    return found


def jinja(source: str, specials: Mapping[str, str]) -> Template:
    """A checkpoint's own template, rendered in a sandbox with the names that transformers gives it.

    What counts is what stands within `{% generation %}` and `{% endgeneration %}`, as in transformers; in a template
    without them it is what the assistant's message adds to the text before it, end token and all. The time
    (`strftime_now`) is not defined: the same data is the same text tomorrow.

    Args:
      source: the template.
      specials: special tokens by role; `bos_token` and so on in the template.

    Raises:
      ImportError: if Jinja is not installed.
      DataError: if it is no template; and from the template, if it refuses a conversation, or where one's answers lie
        cannot be told because later messages change how earlier ones are written.
    """
    template = _compiled(source)
    known = {f"{role}_token": token for role, token in specials.items()}
    marked = "endgeneration" in source

    def written(messages: Sequence[Message], *, asked: bool) -> str:
        turns = [message._asdict() for message in messages]
        try:
            return str(
                template.render(messages=turns, add_generation_prompt=asked, tools=None, documents=None, **known)
            )
        except Exception as error:  # whatever a template does or raises by itself
            raise DataError(f"the chat template refuses it: {error}") from error

    def render(chat: Chat) -> Rendered:
        text = written(chat.messages, asked=False)
        if marked:
            return _between_marks(text)
        counted = []
        for i, message in enumerate(chat.messages):
            if message.role == "assistant":
                before = written(chat.messages[:i], asked=True)
                after = written(chat.messages[: i + 1], asked=False)
                if not (text.startswith(after) and after.startswith(before)):
                    raise DataError(
                        f"where message {i + 1} lies cannot be told: the chat template writes it otherwise when others "
                        "follow. Mark answers in it with {% generation %}, or write task.template=plain"
                    )
                counted.append((len(before), len(after)))
        return Rendered(text, tuple(counted))

    return render


def _compiled(source: str) -> Any:
    try:
        from jinja2 import TemplateSyntaxError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(
            "the checkpoint's chat template is written for Jinja, which is not installed: pip install 'jlora[chat]', "
            "or write task.template=plain"
        ) from error

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            around = [nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_BEGIN, _END)]
            return [around[0], *body, around[1]]

    def refuse(message: str) -> None:
        raise DataError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise DataError(f"the chat template is none for Jinja: line {error.lineno}: {error}") from error


def _between_marks(text: str) -> Rendered:
    pieces = text.split(_BEGIN)
    whole, counted = pieces[0], []
    for piece in pieces[1:]:
        inside, _, outside = piece.partition(_END)
        counted.append((len(whole), len(whole) + len(inside)))
        whole += inside + outside
    return Rendered(whole, tuple(counted))


# -- tokens ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """An example with where it stands, for errors."""

    place: str
    chat: Chat


def tokenise_chats(chats: Sequence[Placed], template: Template, tokenizer: Tokenizer) -> Tokenised:
    """Tokens of conversations, whole; those of the assistant count, and its end tokens with them.

    Args:
      chats: with their places.
      template: writes a conversation.
      tokenizer: of the model; special tokens stand in the template's text.

    Raises:
      DataError: if the template refuses a conversation, or leaves the answers out.
    """

    def items() -> Iterator[Item]:
        for place, chat in ((item.place, item.chat) for item in chats):
            tokens, counted = encoded(place, chat, template, tokenizer)
            yield Item(tokens, int(np.argmax(counted)), None, counted)

    return gather(items(), labels=None, cut=0, longest=0)


def encoded(place: str, chat: Chat, template: Template, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a conversation, (n,) int32, and which of them count, (n,) bool: at least one."""
    try:
        text, spans = template(chat)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    counted = np.zeros(len(begins), np.bool_)
    for begin, end in spans:
        counted |= (begins < end) & ((ends > begin) | (begins >= begin))
    if not counted.any():
        raise DataError(f"{place}: nothing in it counts: the template leaves out what the assistant says")
    return np.array(encoding.ids, np.int32), counted
