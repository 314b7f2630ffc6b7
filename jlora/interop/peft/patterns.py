"""PEFT's ways to name modules: suffixes, regular expressions, patterns of ranks, numbers of layers.

A config may come from a stranger. An expression that could be slow on some name is refused: Python's has no time limit.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jlora.interop.names import Module

LONGEST = 2000  # characters of an expression
REPEATS = 6  # unbounded repetitions in one of its alternatives
HEADS = ("score", "classifier", "classification_head", "qa_outputs", "cls_score")


def check_expression(text: Any, where: str) -> str:
    """Returns a regular expression that is quick on every name.

    Raises:
      ValueError: if it is none, too long, repeats what is repeated, or refers to a group.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ValueError(f"{where}: expected a regular expression of at most {LONGEST} characters, not {text!r:.100}")
    if _is_slow(text):
        raise ValueError(f"{where}: {text!r:.200} repeats what is repeated, and could take forever on some names")
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: {text!r:.200} is no regular expression: {error}") from error
    return text


def _is_slow(text: str) -> bool:
    """Whether a group that is repeated holds a repetition or alternatives, or one branch has many repetitions."""
    groups = [False]  # of the open groups: whether they hold a repetition or an alternative
    repeats, i, closed = 0, 0, False
    while i < len(text):
        c, after = text[i], False
        if c == "\\":
            if text[i + 1 : i + 2].isdigit() and text[i + 1] != "0":
                return True
            i += 2
            closed = False
            continue
        if c == "[":
            i = _end_of_set(text, i)
        elif c == "(":
            groups.append(False)
        elif c == ")" and len(groups) > 1:
            inner = groups.pop()
            groups[-1] |= inner
            after, closed = True, inner
        elif c == "|":
            groups[-1], repeats = True, 0 if len(groups) == 1 else repeats
        elif c in "*+" or (c == "{" and re.match(r"\{\d*,?\d*\}", text[i:])):
            if closed:
                return True
            groups[-1], repeats = True, repeats + 1
            if repeats > REPEATS:
                return True
        if not after:
            closed = False
        i += 1
    return False


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
