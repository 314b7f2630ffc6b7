"""PEFT's ways to name modules: suffixes, regular expressions, patterns of ranks, numbers of layers.

A config may come from a stranger. An expression that could be slow on some name is refused: Python's has no time limit.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jlora.interop.names import Module

LONGEST = 2000  # characters of an expression
REPEATS = 6  # repetitions
BRANCHES = 100_000  # ways through its alternatives
QUICK = 10**8  # steps, about a second
LONG = 10**10  # steps at the worst of a target_modules on a model that is not a stranger's
HEADS = ("score", "classifier", "classification_head", "qa_outputs", "cls_score")


def check_expression(text: Any, where: str) -> str:
    """Returns a regular expression that is quick on every name.

    Raises:
      ValueError: if it is none, too long, repeats what is repeated, or refers to a group.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ValueError(f"{where}: expected a regular expression of at most {LONGEST} characters, not {text!r:.100}")
    found = effort(text)
    if found is None or found.repeats > REPEATS or found.branches > BRANCHES:
        raise ValueError(
            f"{where}: {text!r:.200} repeats or branches so often that it could take forever on some names"
        )
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: {text!r:.200} is no regular expression: {error}") from error
    return text


class Effort(NamedTuple):
    """How hard an expression can be to match, at the worst.

    Attributes:
      repeats: repetitions without a bound, in all branches together.
      branches: product of the numbers of alternatives, 2 for what may be there or not.
    """

    repeats: int
    branches: int

    def steps(self, length: int) -> int:
        """An estimate of the steps that a text of this length can take."""
        return self.branches * max(length, 1) ** self.repeats // math.factorial(self.repeats) + length


def effort(text: str) -> Effort | None:
    """The effort of an expression; None where a group that is repeated repeats or branches, or refers to another."""
    groups = [(False, 1)]  # of the open groups: whether they repeat or branch, and their alternatives
    repeats, branches, i, closed = 0, 1, 0, False
    while i < len(text):
        c, after = text[i], False
        if c == "\\":
            if text[i + 1 : i + 2].isdigit() and text[i + 1] != "0":
                return None
            i += 2
            closed = False
            continue
        if c == "[":
            i = _end_of_set(text, i)
        elif c == "(":
            groups.append((False, 1))
        elif c == ")" and len(groups) > 1:
            inner, alternatives = groups.pop()
            branches *= alternatives
            groups[-1] = (groups[-1][0] or inner, groups[-1][1])
            after, closed = True, inner
        elif c == "|":
            groups[-1] = (True, groups[-1][1] + 1)
        elif c in "*+" or (c == "{" and re.match(r"\{\d*,?\d*\}", text[i:])):
            if closed:
                return None
            groups[-1] = (True, groups[-1][1])
            repeats += 1
        elif c == "?" and text[i - 1 : i] not in ("(", "*", "+", "}", "?"):
            groups[-1] = (True, groups[-1][1])
            branches *= 2
        if not after:
            closed = False
        i += 1
    return Effort(repeats, branches * groups[0][1])


def check_effort(expressions: Iterable[str], texts: Sequence[str], most: int, where: str) -> None:
    """Raises ValueError if matching all the texts with all the expressions could take more than `most` steps."""
    total = 0
    for text in expressions:
        found = effort(text)
        if found is None:
            raise ValueError(f"{where}: {text!r:.200} repeats what is repeated, and could take forever on some names")
        total += sum(found.steps(len(name)) for name in texts)
        if total > most:
            raise ValueError(f"{where}: {text!r:.200} and the others could take forever on these names")


def _end_of_set(text: str, i: int) -> int:
    j = i + 2 if text[i + 1 : i + 2] == "^" else i + 1
    j += text[j : j + 1] == "]"
    while j < len(text) and text[j] != "]":
        j += 2 if text[j] == "\\" else 1
    return j


def value_for(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name or its end: PEFT's `rank_pattern` and `alpha_pattern`.

    >>> value_for({"^q": 1, "layers.1.q": 2, "q": 3}, "layers.1.q", 4)
    2
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def ends_with(module: str, suffixes: Iterable[str]) -> bool:
    """Whether a module's name is one of the suffixes, or ends with it after a dot."""
    return any(module == suffix or module.endswith(f".{suffix}") for suffix in suffixes)


def targeted(config: Mapping[str, Any], modules: Mapping[str, Module]) -> list[str]:
    """The modules that a config names, as PEFT finds them: by suffix, by a whole match, or all linear ones.

    Args:
      config: with target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, task_type.
      modules: of the model.

    Raises:
      ValueError: for a name that no module has, an exclusion that excludes none, or a config that names nothing: where
        PEFT is silent.
    """
    targets = config.get("target_modules")
    if targets is None:
        return []
    if isinstance(targets, str) and targets.lower() == "all-linear":
        own = [name for name, module in modules.items() if module.kind in ("linear", "conv1d")]
        chosen = [name for name in own if not _is_head(name, config)]
    elif isinstance(targets, str):
        expression = check_expression(targets, "target_modules")
        check_effort([expression], list(modules), LONG, "target_modules")
        chosen = [name for name in modules if re.fullmatch(expression, name)]
    else:
        absent = [target for target in targets if not any(ends_with(name, [target]) for name in modules)]
        if absent:
            raise ValueError(
                f"target_modules: no module is called {absent[0]!r}; the model has {', '.join(sorted(_last(modules)))}"
            )
        chosen = [name for name in modules if name in targets or (ends_with(name, targets) and _of_layer(name, config))]
    kept = [name for name in chosen if not _is_excluded(name, config) and not _saved(name, config)]
    if config.get("exclude_modules") and not any(_is_excluded(name, config) for name in chosen):
        raise ValueError(f"exclude_modules={config['exclude_modules']!r} excludes none of the {len(chosen)} targets")
    if not kept:
        raise ValueError(f"target_modules={targets!r:.200} names none of the {len(modules)} modules")
    return kept


def _last(modules: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in modules}


def _is_head(name: str, config: Mapping[str, Any]) -> bool:
    """The output embedding of a language model, or a classifier: what PEFT leaves out of "all-linear"."""
    if config.get("task_type") == "SEQ_CLS":
        return name.split(".")[0] in HEADS
    return name == "lm_head" or (name == "cls.predictions.decoder")


def _is_excluded(name: str, config: Mapping[str, Any]) -> bool:
    excluded = config.get("exclude_modules") or ()
    if isinstance(excluded, str):
        return re.fullmatch(check_expression(excluded, "exclude_modules"), name) is not None
    return ends_with(name, excluded)


def _saved(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a module, or one that holds it, is trained whole."""
    saved: Sequence[str] = config.get("modules_to_save") or ()
    parts = name.split(".")
    return any(ends_with(".".join(parts[: i + 1]), saved) for i in range(len(parts)))


def _of_layer(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the first number in a name is one of `layers_to_transform`."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    else:
        tried = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name) for pattern in patterns)
        found = next((match for match in tried if match), None)
    if found is None:
        return False
    return int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)
