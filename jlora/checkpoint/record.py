"""`adapter.json` as text and as an adapter's parts: every field is checked before anything is built from it."""

import contextlib
import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jlora.adapted.select import Extra, check_adaptable, check_axes, check_scale
from jlora.checkpoint.folder import NAME, TENSORS, open_file, read
from jlora.methods import Constructor, Method, from_json
from jlora.transform.sites import ADAPTABLE, Site, Target

FORMAT, VERSION = "jlora adapter", 1
LARGEST = 32 * 2**20  # bytes of JSON: some ten thousand sites
OF = f"an adapter's {NAME} has"
_DIGITS, _TEXT, _AXES = 20, 4096, 64  # of one number, in one path, of one weight

Check = Callable[[Any, str], Any]
Parts = tuple[Method, tuple[Target, ...], tuple[Extra, ...]]


def read_record(file: Path) -> dict[str, Any]:
    """The JSON of an adapter, its own fields checked: format, version, base and the name of the tensors' file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file, and the field if it is one.
    """
    with open_file(file) as opened:
        return check_record(read(opened, file, LARGEST, OF), file)


def check_record(content: bytes, file: Path | str) -> dict[str, Any]:
    """The JSON of an adapter, as `read_record` checks it."""
    record = parse(content, file)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"'{file}' is no adapter of jlora: its 'format' is not {FORMAT!r}")
    version = record.get("version")
    if version != VERSION or not isinstance(version, int) or isinstance(version, bool):
        raise ValueError(
            f"'{file}' has format version {shown(version)}, this jlora reads version {VERSION}: update jlora"
        )
    with naming(file):
        return _object(record, "", _RECORD, ("stored",))


def parse(content: bytes, file: Path | str) -> Any:
    """Content of a JSON text. Numbers of more than 20 digits are no numbers.

    Raises:
      ValueError: for other encodings than UTF-8, a key that is there twice in one object, or what is no JSON.
    """
    try:
        return json.loads(content.decode(), object_pairs_hook=_distinct, parse_int=_integer)
    except RecursionError as error:
        raise ValueError(f"'{file}' is no JSON: it is nested too deeply") from error
    except ValueError as error:  # also of the text's encoding
        raise ValueError(f"'{file}' is no JSON: {error!s:.300}") from error


def decode(record: Mapping[str, Any], methods: Iterable[Constructor] = ()) -> Parts:
    """The method, the sites and the extras that a JSON describes, checked like those that `apply` is given.

    Raises:
      ValueError: naming the field.
    """
    method = from_json(_object_of_any(record["method"], "method"), methods)
    sites = tuple(_site(value, f"sites[{i}]") for i, value in enumerate(_list(record["sites"], "sites")))
    extras = tuple(_extra(value, f"extras[{i}]") for i, value in enumerate(_list(record["extras"], "extras")))
    check_axes([target.site for target in sites], "sites")
    for i, site in enumerate(sites):
        check_adaptable(site.site)
        if site.part >= len(method.parts):
            raise ValueError(f"sites[{i}].part is {site.part}, and {method.name} has {len(method.parts)} parts")
        check_scale(site, method.of(site), f"sites[{i}]")
    paths = Counter([*(site.path for site in sites), *(extra.path for extra in extras)])
    twice = [path for path, n in paths.items() if n > 1]
    if twice:
        raise ValueError(f"extras: {twice[0]!r} is there twice, or among the sites too")
    if not method.acts.adapts and sites:
        raise ValueError(f"sites: {method.name} trains leaves as they are, and {sites[0].path!r} is to be adapted")
    return method, sites, extras


@contextlib.contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """Puts the file before what is said of its content."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"'{file}' is nested too deeply") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{file}': {error!s:.1000}") from error


def shown(value: Any) -> str:
    """A value in an error, of any size."""
    try:
        return f"{value!r:.200}"
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"


# -- values ------------------------------------------------------------------------------------------------------------


class _Huge:
    """A number of so many digits that no field holds it."""

    def __init__(self, text: str) -> None:
        self.digits = len(text.lstrip("-"))

    def __repr__(self) -> str:
        return f"a number of {self.digits} digits"


def _integer(text: str) -> Any:
    return int(text) if len(text) <= _DIGITS else _Huge(text)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def _refused(where: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"'{where}' must be {expected}, not {shown(value)}")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _refused(where, "a list", value)
    return value


def _object_of_any(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refused(where, "an object", value)
    return value


def _object(value: Any, where: str, fields: Mapping[str, Check], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """An object with these fields and no others."""
    value = _object_of_any(value, where)
    unknown = [name for name in value if name not in fields]
    if unknown:
        raise ValueError(f"{f'{where!r} has ' if where else ''}the unknown field {shown(unknown[0])}")
    absent = [name for name in fields if name not in value and name not in optional]
    if absent:
        raise ValueError(f"{f'{where!r} ' if where else 'it '}lacks {', '.join(map(repr, absent))}")
    inside = f"{where}." if where else ""
    return {name: fields[name](inner, f"{inside}{name}") for name, inner in value.items()}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > _TEXT:
        raise _refused(where, f"a text of at most {_TEXT} characters", value)
    return value


def _of_pattern(pattern: str, expected: str) -> Check:
    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise _refused(where, expected, value)
        return value

    return check


def _tensors_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not TENSORS.fullmatch(value):
        expected = "factors-<16 hexadecimal digits>.safetensors"
        raise ValueError(f"its file of tensors is missing: '{where}' is {shown(value)} and not {expected}")
    return value


def _dtype(value: Any, where: str) -> str:
    """The name of a floating-point type, as NumPy and JAX write it."""
    try:
        dtype = jnp.dtype(_text(value, where))
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or str(dtype) != value or not jnp.issubdtype(dtype, jnp.floating):
        raise _refused(where, "a floating-point type", value)
    return str(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _naturals(most: int) -> Check:
    def check(value: Any, where: str) -> tuple[int, ...]:
        value = _list(value, where)
        if len(value) > most:
            raise ValueError(f"'{where}' has {len(value)} entries, and there can be {most}")
        wrong = [x for x in value if not (_is_integer(x) and 0 <= x < 2**31)]
        if wrong:
            raise _refused(where, "integers from 0", wrong[0])
        return tuple(value)

    return check


def _texts(value: Any, where: str) -> tuple[str, ...]:
    return tuple(_text(inner, f"{where}[{i}]") for i, inner in enumerate(_list(value, where)))


def _number(value: Any, where: str) -> Any:
    """A number or null: which is right is the method's to say."""
    if value is not None and not _is_integer(value) and not (isinstance(value, float) and math.isfinite(value)):
        raise _refused(where, "a finite number", value)
    return value


def _whole(value: Any, where: str) -> Any:
    if value is not None and not _is_integer(value):
        raise _refused(where, "an integer", value)
    return value


def _part(value: Any, where: str) -> int:
    if not _is_integer(value) or value < 0:
        raise _refused(where, "an integer of at least 0", value)
    return int(value)


def _rows(value: Any, where: str) -> tuple[int, ...] | None:
    return None if value is None else _naturals(LARGEST)(value, where)


def _scale(value: Any, where: str) -> float | None:
    return None if value is None else float(_number(value, where))


def _kind(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in ADAPTABLE:
        raise _refused(where, f"one of {', '.join(ADAPTABLE)}", value)
    return value


def _any(value: Any, where: str) -> Any:
    return value


_AXIS = _naturals(_AXES)
SITE: dict[str, Check] = {
    "path": _text, "shape": _AXIS, "dtype": _dtype, "in_axes": _AXIS, "out_axes": _AXIS, "stack_axes": _AXIS,
    "kind": _kind, "uses": _texts, "rank": _whole, "alpha": _number, "part": _part,
    "materialised": _text,
}  # fmt: skip
EXTRA: dict[str, Check] = {"path": _text, "rows": _rows, "added": _scale}
_TENSORS: dict[str, Check] = {
    "file": _tensors_name, "sha256": _of_pattern(r"[0-9a-f]{64}", "64 hexadecimal digits"),
}  # fmt: skip
_RECORD: dict[str, Check] = {
    "format": _any, "version": _any, "base": _of_pattern(r"[0-9a-f]{32}", "a fingerprint of 32 hexadecimal digits"),
    "method": _any, "sites": _any, "extras": _any, "stored": lambda value, where: _words(value, where),
    "tensors": lambda value, where: _object(value, where, _TENSORS),
}  # fmt: skip


def _words(value: Any, where: str) -> dict[str, str]:
    named = _object_of_any(value, where)
    return {_text(path, where): _text(words, f"{where}[{path!r:.100}]") for path, words in named.items()}


def _site(value: Any, where: str) -> Target:
    return Target.from_json(_object(value, where, SITE, (*_defaults(Site), "rank", "alpha", "part")))


def _extra(value: Any, where: str) -> Extra:
    return Extra(**_object(value, where, EXTRA, _defaults(Extra)))


def _defaults(of: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(of) if field.default is not dataclasses.MISSING)
