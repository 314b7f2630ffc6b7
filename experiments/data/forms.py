"""The purpose of a table, by the names of its columns."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from experiments.data.files import DataError

Kind = Literal["chat", "completion", "classification", "text", "images"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Form(NamedTuple):
    """Columns that go together.

    Attributes:
      kind: of task.
      columns: their names; the label last, the answer last.
      optional: one that may be there as well: what an instruction is about.
      template: a prompt's, with `{}` for the first column; for both where `optional` is filled.
    """

    kind: Kind
    columns: tuple[str, ...]
    optional: str = ""
    template: tuple[str, str] = ("{}", "{}\n{}")


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:",
)
_QUESTION = ("Question: {}\nAnswer:", "{}\n\nQuestion: {}\nAnswer:")
FORMS = (
    Form("chat", ("messages",)),
    Form("chat", ("conversations",)),
    Form("completion", ("prompt", "completion")),
    Form("completion", ("prompt", "response")),
    Form("completion", ("instruction", "output"), "input", _ALPACA),
    Form("completion", ("instruction", "response"), "context", _ALPACA),
    Form("completion", ("question", "answer"), "", _QUESTION),
    Form("completion", ("query", "response"), "", _QUESTION),
    Form("classification", ("sentence1", "sentence2", "label")),
    Form("classification", ("premise", "hypothesis", "label")),
    Form("classification", ("text", "label")),
    Form("classification", ("sentence", "label")),
    Form("images", ("image", "label")),
    Form("images", ("file_name", "label")),
    Form("text", ("text",)),
)
"""The columns that data sets have; Alpaca's two prompts are those of tatsu-lab/stanford_alpaca."""
_SIZES: dict[Kind, tuple[int, ...]] = {
    "chat": (1,), "completion": (2,), "classification": (2, 3), "text": (1,), "images": (2,),
}  # fmt: skip


def form_of(name: str, found: Sequence[str], kind: Kind | None = None, columns: Sequence[str] = ()) -> tuple[Form, str]:
    """The form of a table, and why it is that one, in words.

    Args:
      name: of the table, for errors.
      found: its columns.
      kind: of task, where it is given. "chat" may be made of prompts and completions: a question and its answer.
      columns: the ones to read, where they are given, the label or the answer last.

    Raises:
      DataError: if no form fits, or several do: with what was found, and what to write.
    """
    if kind is not None and kind not in KINDS:
        raise DataError(f"task.kind={kind!r}: expected one of {', '.join(KINDS)}")
    if {"tokens", "tags"} <= set(found) and kind is None and not columns:
        raise DataError(f"{_listed(name, found)}: a tag for each word is read by configs/bert_base_conll2003_lora.py")
    if columns:
        return _named(name, found, kind, tuple(columns))
    fitting = [form for form in FORMS if set(form.columns) <= set(found) and _makes(form.kind, kind)]
    best = [f for f in fitting if not any(set(f.columns) < set(other.columns) for other in fitting)]
    if not best:
        known = "; ".join(
            f"{each}: {' or '.join(', '.join(form.columns) for form in FORMS if form.kind == each)}"
            for each in (KINDS if kind is None else (kind,))
        )
        raise DataError(
            f"{_listed(name, found)}, and none of these are among them: {known}. Rename the columns, or write "
            f"task.kind={kind or '...'} task.columns=... with their names, the label or the answer last"
        )
    kinds = list(dict.fromkeys(form.kind for form in best))
    if len(kinds) > 1 and kind is None:
        ways = ", ".join(f"task.kind={form.kind} ({', '.join(form.columns)})" for form in best)
        raise DataError(f"{_listed(name, found)}: that can be {' and '.join(kinds)}. Write one of {ways}")
    own = [form for form in best if form.kind == kind] or best
    if len(own) > 1:
        ways = " or ".join(f'task.columns="{",".join(form.columns)}"' for form in own)
        raise DataError(f"{_listed(name, found)}: that is {own[0].kind} in several ways. Write {ways}")
    form = own[0]
    extra = [form.optional] if form.optional in found else []
    read = ", ".join([*form.columns, *extra])
    return form, f"{kind or form.kind}, {'as told' if kind else 'inferred'} from the columns {read}"


def _named(name: str, found: Sequence[str], kind: Kind | None, columns: tuple[str, ...]) -> tuple[Form, str]:
    missing = [column for column in columns if column not in found]
    if missing:
        raise DataError(f"{_listed(name, found)}: task.columns names {missing[0]!r}, which is not among them")
    known = [f for f in FORMS if f.columns == columns and _makes(f.kind, kind)]
    if known:
        return known[0], f"{kind or known[0].kind}, from the columns {', '.join(columns)}, as told"
    if kind is None:
        raise DataError(f"task.columns={','.join(columns)!r} says what to read, not what for: add task.kind=...")
    if kind == "chat" and len(columns) == 2:
        return Form("completion", columns), f"chat, from the columns {', '.join(columns)}, as told"
    if len(columns) not in _SIZES[kind]:
        sizes = " or ".join(map(str, _SIZES[kind]))
        raise DataError(f"task.columns has {len(columns)} names, and {kind} is read from {sizes}")
    return Form(kind, columns), f"{kind}, from the columns {', '.join(columns)}, as told"


def _makes(form: Kind, kind: Kind | None) -> bool:
    return kind in (None, form) or (kind == "chat" and form == "completion")


def _listed(name: str, found: Sequence[str]) -> str:
    return f"{name} has the columns {', '.join(map(repr, found))}"
