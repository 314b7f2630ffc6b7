"""Files that nobody should believe, made from good ones: the same ones in every run.

`CORPUS` maps kinds of mutation to functions of a good file's bytes; each yields cases. A case that is `wrong` has to be
refused whoever reads the file; others may happen to be valid, and then have to be read as arrays that are not larger
than the file.
"""

import functools
import io
import json
import os
import pickle
import random
import signal
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.interop import unpickle

LONG = 20  # seconds for one file: a guard against hangs, they take milliseconds
MUCH = 100 * 2**20  # bytes beyond the file's own
BIG = 2**60


class Case(NamedTuple):
    """A spoilt file: its content, and whether it must be refused."""

    name: str
    content: bytes
    wrong: bool = True


class Loader(NamedTuple):
    """A function that reads what strangers made.

    Attributes:
      name: of its test.
      make: writes something good into a folder, and returns the file, or the folder, that `load` is given.
      load: raises, or returns what it read: arrays in any pytree, or a config.
    """

    name: str
    make: Callable[[Path], Path]
    load: Callable[[Path], Any]


def parts(made: Path) -> list[Path]:
    """The files of something good."""
    return sorted(path for path in made.iterdir() if path.is_file()) if made.is_dir() else [made]


def format_of(content: bytes) -> str:
    """What a good file is."""
    if content.startswith(b"PK"):
        return "torch"
    return "json" if content.lstrip().startswith(b"{") else "safetensors"


# -- judging -----------------------------------------------------------------------------------------------------------


@contextmanager
def guarded(seconds: int = LONG) -> Iterator[None]:
    """A hang is an error, so that the rest of the run is not lost."""

    def stop(*_):
        raise TimeoutError(f"no answer after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def little_memory(size: int) -> Iterator[None]:
    """NumPy's and Python's memory stays below the file's size and `MUCH` more."""
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak <= size + MUCH, f"{peak / 2**20:.0f} MiB for a file of {size / 2**20:.1f} MiB"
    finally:
        if not tracing:
            tracemalloc.stop()


def fault(loader: Loader, made: Path, file: Path, case: Case) -> str | None:
    """What is wrong about the way in which a case ends, or None."""
    try:
        with guarded():
            found = loader.load(made)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        if type(error) not in (ValueError, FileNotFoundError):
            return f"ends in a {type(error).__name__}: {error!s:.300}"
        if file.name not in message and made.name not in message:
            return f"does not name the file: {message:.300}"
        return f"has a message of {len(message)} characters: {message:.100}" if len(message) > 10_000 else None
    except Exception as error:
        return f"ends in a {type(error).__name__}: {error!s:.300}"
    if case.wrong:
        return "is read"
    return badly_formed(found, sum(part.stat().st_size for part in parts(made)))


def badly_formed(found: Any, size: int) -> str | None:
    """Why what was read of valid files of `size` bytes is not what it should be, or None."""
    arrays = [leaf for leaf in jax.tree.leaves(found) if isinstance(leaf, np.ndarray | jax.Array)]
    if sum(array.nbytes for array in arrays) > size + MUCH:
        return "takes more memory than the file"
    if isinstance(found, dict) and any(type(name) is not str for name in found):
        return "has a name that is no text"
    return None if arrays or isinstance(found, dict) else f"is read as {type(found).__name__}"


# -- all files ---------------------------------------------------------------------------------------------------------


def edited(content: bytes) -> Iterator[Case]:
    """Bytes that are changed, lost, added, or moved, here and there."""
    choose = random.Random(zlib.crc32(content))
    front = min(len(content), 2000)
    for number in range(10):
        at, bit = choose.randrange(front), 1 << choose.randrange(8)
        yield Case(f"bit {number}", content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :], False)
    for number in range(8):
        at = choose.randrange(len(content))
        yield Case(f"bytes {number}", content[:at] + choose.randbytes(4) + content[at + 4 :], False)
        yield Case(f"cut {number}", content[:at], False)
        yield Case(f"added {number}", content[:at] + choose.randbytes(3) + content[at:], False)
        yield Case(f"lost {number}", content[:at] + content[at + choose.randrange(1, 9) :], False)
    yield Case("empty", b"")
    yield Case("zeros", bytes(len(content)))
    yield Case("noise", choose.randbytes(len(content)))
    yield Case("text", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    yield Case("page", b"<!DOCTYPE html><html><body>404</body></html>")


# -- safetensors -------------------------------------------------------------------------------------------------------


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: dict[str, Any] | str | bytes, data: bytes) -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + data


def lengths(content: bytes) -> Iterator[Case]:
    """What the first eight bytes say of the header's length."""
    size, length = len(content), int.from_bytes(content[:8], "little")
    claims = (0, 1, length - 1, length + 1, size - 8, size - 7, size, 2**24, 2**24 + 1, 2**31, 2**32, 10 * 2**40, 2**63)
    for claim in (*claims, 2**64 - 1):
        yield Case(f"length {claim - length:+d}", struct.pack("<Q", claim) + content[8:])
    yield Case("length alone", content[:8])
    yield Case("seven bytes", content[:7])


def texts(content: bytes) -> Iterator[Case]:
    """Headers that are no JSON, or none that may be read."""
    header, data = header_of(content)
    text = json.dumps(header)
    name, entry = next((name, entry) for name, entry in header.items() if name != "__metadata__")
    of = lambda value: with_header(json.dumps({**header, name: {**entry, "shape": "@"}}).replace('"@"', value), data)
    yield Case("key twice", with_header(text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}" + "}", data))
    yield Case("dtype twice", with_header(text.replace('"dtype"', '"dtype": "F32", "dtype"', 1), data))
    for value in ("NaN", "[NaN]", "[Infinity]", "[1e400]", "[1e3]", "[2.0]", "[true]", "[null]", '["2"]', "2", "{}"):
        yield Case(f"shape {value}", of(value))
    yield Case("shape of many digits", of(f"[{'9' * 5000}]"))
    yield Case("shape in a shape", of("[" * 50 + "2" + "]" * 50))
    yield Case("deep shape", of("[" * 100_000 + "]" * 100_000))
    yield Case("deep and open", with_header("{" + '"a":{' * 100_000, data))
    yield Case("list", with_header(f"[{text}]", data))
    yield Case("text after it", with_header(text + "x", data))
    yield Case("space before it", with_header(" " + text, data))
    yield Case("byte-order mark", with_header(b"\xef\xbb\xbf" + text.encode(), data))
    yield Case("UTF-16", with_header(text.encode("utf-16"), data))
    yield Case("no UTF-8", with_header(text.encode().replace(b"a", b"\xff", 1), data))
    yield Case("half of a character", with_header(text.replace(name[:1], "\\ud800", 1), data))
    yield Case("single quotes", with_header(text.replace('"', "'"), data))
    yield Case("comment", with_header("/**/" + text, data))
    yield Case("NUL", with_header(text[:-1] + "\0}", data))
    yield Case("nothing in it", with_header({}, data))
    for metadata in (None, [], "pt", {"format": 1}, {"format": None}, {"format": ["pt"]}, {"format": {"a": "pt"}}):
        yield Case(f"metadata {metadata}", with_header({**header, "__metadata__": metadata}, data))
    yield Case("metadata twice", with_header('{"__metadata__": {}, "__metadata__": {}, ' + text[1:], data))


def entries(content: bytes) -> Iterator[Case]:
    """Entries of the header that are at odds with the file, with each other, or with any tensor."""
    header, data = header_of(content)
    names = [name for name in header if name != "__metadata__" and header[name]["data_offsets"][1]]
    first, second = sorted(names, key=lambda name: header[name]["data_offsets"])[:2]
    entry, shape, (start, stop) = header[first], header[first]["shape"], header[first]["data_offsets"]
    last = max(names, key=lambda name: header[name]["data_offsets"])
    changed = lambda **fields: with_header({**header, first: {**entry, **fields}}, data)
    for offsets in (
        [-8, 0], [-1, stop], [stop, start], [start, len(data) + 1], [start, BIG], [BIG, BIG + stop - start], [start],
        [start, stop, stop], "0", None, [start, float(stop)], [str(start), str(stop)], [True, stop], {}, [start + 1, stop],
        [start, stop - 1], [start + 4, stop + 4], [start, 10 * 2**40], [-(2**63), 2**63 - 1], [2**64, 2**64 + stop],
    ):  # fmt: skip
        yield Case(f"data_offsets {offsets}", changed(data_offsets=offsets))
    for other in (
        [-n for n in shape] + [-1], [*shape, 2], [*shape, 0], [0, BIG], [2**32, 2**32], [2**31, 2**33], [*shape, *[1] * 40],
        [1] * 1000, [BIG], [2**63 - 1], [2**64], [2**62, 4], [-1, -1], [], [0], [10**19], [1, 2, 3, 4, 5],
    ):  # fmt: skip
        if other != shape:
            yield Case(f"shape {str(other)[:40]}", changed(shape=other))
    for dtype in (
        "F64",
        "I8",
        "BOOL",
        "f32",
        "float32",
        "O",
        "V8",
        "C64",
        "F4",
        "",
        "F32 ",
        None,
        4,
        ["F32"],
        "U" * 10**5,
    ):
        yield Case(f"dtype {str(dtype)[:20]}", changed(dtype=dtype))
    for field in ("dtype", "shape", "data_offsets"):
        left = {key: value for key, value in entry.items() if key != field}
        yield Case(f"no {field}", with_header({**header, first: left}, data))
    for other in (None, [], 3, "F32", {}, [entry]):
        yield Case(f"entry {other}"[:40], with_header({**header, first: other}, data))
    yield Case("another field", changed(code="import os"))
    yield Case("same bytes", with_header({**header, second: entry}, data))
    yield Case("one more on the same bytes", with_header({**header, "more": entry}, data))
    yield Case("a tensor left out", with_header({k: v for k, v in header.items() if k != first}, data))
    yield Case("bytes behind the last", content + b"\0")
    yield Case("bytes before the first", with_header(header, b"\0" * 8 + data))
    yield Case("bytes missing", content[:-1])
    yield Case("no bytes", with_header(header, b""))
    claimed = {**header[last], "data_offsets": [header[last]["data_offsets"][0], 10 * 2**40]}
    yield Case("ten terabytes", with_header({**header, last: claimed}, data))
    whole = {**claimed, "dtype": "U8", "shape": [10 * 2**40 - header[last]["data_offsets"][0]]}
    yield Case("ten terabytes in a shape", with_header({**header, last: whole}, data))
    for shape in ([0, 2**62], [0, 2**30], [2**20, 0, 2**20]):
        empty = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data)]}
        yield Case(f"nothing, of shape {shape}", with_header({**header, "more": empty}, data))
    empty = {"dtype": "F32", "shape": [0, 4], "data_offsets": [1, 1]}
    yield Case("nothing inside of another", with_header({**header, "more": empty}, data))


def names(content: bytes) -> Iterator[Case]:
    """Names that are paths, cannot be seen, or are very long."""
    header, data = header_of(content)
    first = next(name for name in header if name != "__metadata__")
    for name in (
        "..", "../x", "a/../../x", "a/..", "..\\x", "/etc/passwd", "\\\\host\\share", "C:/x", "C:\\x", "a\0b", "\0", "a\nb",
        "a\x1b[31mb", "a\x7fb", "", "x" * 1025, "x" * 10**6, "a\u202eb", "a\u2028b", "\ufeffa",
    ):  # fmt: skip
        yield Case(
            f"name {name[:20]!r} of {len(name)}",
            with_header({name if k == first else k: v for k, v in header.items()}, data),
        )
    for name in (
        "x",
        "x.lora_A.weight",
        "__proto__",
        "__class__.__init__",
        "lora_A",
        first + ".weight",
        "ä.日本",
        "%s%n{0}",
    ):
        other = {name if k == first else k: v for k, v in header.items()}
        yield Case(f"name {name!r}", with_header(other, data), False)


def values(content: bytes) -> Iterator[Case]:
    """Headers that are true, with numbers and ranks that no adapter has."""
    header, data = header_of(content)
    names = [name for name in header if name != "__metadata__"]
    for kind, number in (("NaN", np.nan), ("infinity", np.inf), ("largest", np.finfo(np.float32).max)):
        yield Case(
            f"all {kind}",
            with_header(header, np.full(len(data) // 4, number, np.float32).tobytes() + data[len(data) // 4 * 4 :]),
            False,
        )
    yield Case("all bits", with_header(header, b"\xff" * len(data)), False)
    for name in names[:3]:
        shape = header[name]["shape"]
        for other in ([int(np.prod(shape))], [1, *shape], shape[::-1], [*shape, 1, 1]):
            if other != shape:
                changed = {**header, name: {**header[name], "shape": other}}
                yield Case(f"{name[-40:]} {other}", with_header(changed, data), False)
    for dtype in ("I32", "U32"):
        changed = {
            name: {**entry, "dtype": dtype} if entry.get("dtype") == "F32" else entry for name, entry in header.items()
        }
        yield Case(f"numbers as {dtype}", with_header(changed, data), False)
    several = {**header, "__metadata__": {"format": "pt", "lora_adapter_metadata": "{" * 10**5, "x" * 10**4: "\0\x1b"}}
    yield Case("metadata that is odd", with_header(several, data), False)
    yield Case(
        "metadata of ranks",
        with_header({**header, "__metadata__": {"ss_network_dim": "9" * 5000, "ss_network_alpha": "nan"}}, data),
        False,
    )


def large_headers(content: bytes) -> Iterator[Case]:
    """Headers of megabytes, whose JSON would take a hundred times as much."""
    header, data = header_of(content)
    fill = 2**24 - 2**16
    yield Case("a million lists", with_header('{"a":[' + "[]," * (fill // 3) + "[]]}", data))
    yield Case("lists below the limit", with_header('{"a":[' + "[]," * 249_000 + "[]]}", data))
    yield Case("a million keys", with_header("{" + ",".join(f'"{i:x}":0' for i in range(2**20)) + "}", data))
    yield Case("keys below the limit", with_header("{" + ",".join(f'"{i:x}":1000' for i in range(419_000)) + "}", data))
    yield Case("numbers below the limit", with_header('{"a":[' + "1000," * 999_000 + "1]}", data))
    small = '{"dtype":"U8","shape":[],"data_offsets":[0,0]}'
    yield Case("a million tensors", with_header("{" + ",".join(f'"{i:x}":{small}' for i in range(2**18)) + "}", data))
    yield Case(
        "tensors below the limit", with_header("{" + ",".join(f'"{i:x}":{small}' for i in range(90_000)) + "}", data)
    )
    yield Case("wide characters", with_header('{"__metadata__":{"a":"' + "x" * fill + '\U0001f600"}}', data))
    yield Case(
        "some wide characters", with_header('{"__metadata__":{"a":"' + "x" * (2**22 - 100) + '\U0001f600"}}', data)
    )
    yield Case("a wide escape", with_header('{"__metadata__":{"a":"' + "x" * fill + '\\ud83d\\ude00"}}', data))
    yield Case("a long name", with_header('{"' + "x" * fill + '":0}', data))
    yield Case("a long number", with_header('{"a":' + "9" * fill + "}", data))
    yield Case("spaces", with_header("{" + " " * fill + "]", data))
    yield Case("deep", with_header('{"a":' + "[" * fill, data))
    yield Case("deep below the limit", with_header('{"a":' + "[" * 249_000 + "]" * 249_000 + "}", data))
    yield Case("escapes", with_header('{"' + "\\u0041" * (fill // 6) + '":0}', data))
    yield Case("long and good", with_header({**header, "__metadata__": {"a": "x" * fill}}, data), False)


# -- files of torch ----------------------------------------------------------------------------------------------------


@functools.lru_cache(4)
def unzipped(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_of(parts: dict[str, bytes] | list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in parts.items() if isinstance(parts, dict) else parts:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return out.getvalue()


def with_pickle(content: bytes, pickled: bytes) -> bytes:
    return zip_of({name: pickled if name.endswith("/data.pkl") else part for name, part in unzipped(content).items()})


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def several(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def named(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


ORDERED = named("collections", "OrderedDict") + b")R"


def storage(kind: str = "FloatStorage", key: str = "0", length: int = 4) -> bytes:
    return several(text("storage"), named("torch", kind), text(key), text("cpu"), whole(length)) + b"Q"


def tensor(
    storage: bytes, offset: int = 0, shape: tuple[int, ...] = (4,), strides: tuple[int, ...] | None = None
) -> bytes:
    if strides is None:
        strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    view = (whole(offset), several(*map(whole, shape)), several(*map(whole, strides)))
    return named("torch._utils", "_rebuild_tensor_v2") + several(storage, *view, b"\x89", ORDERED) + b"R"


def state(items: dict[str, bytes]) -> bytes:
    return b"\x80\2}(" + b"".join(text(name) + value for name, value in items.items()) + b"u."


STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def torch_file(tensors: dict[str, np.ndarray]) -> bytes:
    """What `torch.save` writes of a dict of tensors."""
    parts, items = {"archive/data.pkl": b"", "archive/byteorder": b"little"}, {}
    for number, (name, value) in enumerate(tensors.items()):
        key = str(number)
        items[name] = tensor(storage(STORAGES[value.dtype.name], key, value.size), 0, value.shape)
        parts[f"archive/data/{key}"] = value.tobytes()
    return zip_of({**parts, "archive/data.pkl": state(items), "archive/version": b"3\n"})


def functions(content: bytes) -> Iterator[Case]:
    """Pickles that name functions, in every way in which a pickle can."""
    for module, name in (
        ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"),
        ("builtins", "dict"), ("subprocess", "Popen"), ("torch.storage", "_load_from_bytes"), ("torch", "load"),
        ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v3"), ("torch", "UntypedStorage"),
        ("torch._utils", "_rebuild_sparse_tensor"), ("torch._utils", "_rebuild_qtensor"), ("torch.serialization", "_get_layout"),
        ("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
        ("collections", "defaultdict"), ("collections", "Counter"), ("copyreg", "_reconstructor"), ("operator", "attrgetter"),
        ("jlora.interop.unpickle", "load"), ("collections", "OrderedDict.fromkeys"), ("torch", "__builtins__"), ("", ""),
    ):  # fmt: skip
        yield Case(f"{module}.{name}", with_pickle(content, b"\x80\2" + named(module, name) + text("x") + b"\x85R."))
        yield Case(
            f"{module}.{name} on a stack",
            with_pickle(content, b"\x80\4" + text(module) + text(name) + b"\x93" + text("x") + b"\x85R."),
        )
    for step in (b"iposix\nsystem\n", b"\x82\1", b"\x83\1\0", b"\x84\1\0\0\0"):
        yield Case(f"step {step[:1]!r}", with_pickle(content, b"\x80\2(" + text("x") + step + b"."))
    for protocol in range(6):
        for harm in (
            Call(os.mkdir, "harm"),
            Call(eval, "open('harm', 'w')"),
            Call(exec, "import os; os.mkdir('harm')"),
        ):
            made = with_pickle(content, pickle.dumps({"x": harm}, protocol))
            yield Case(f"{harm.function.__name__}, protocol {protocol}", made)


class Call:
    """Pickled, it is a call."""

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


def steps(content: bytes) -> Iterator[Case]:
    """Pickles that take memory or time, end nowhere, or make something else than tensors."""
    good = tensor(storage(length=1), shape=(1,))
    pickles = {
        "nothing": b"", "end alone": b".", "no end": b"\x80\2}", "two values": b"\x80\2}}.", "a mark is left": b"\x80\2(}.",
        "bytes behind the end": b"\x80\2}.}", "a list": b"\x80\2].", "None": b"\x80\2N.", "a text": b"\x80\2" + text("x") + b".",
        "a tensor": b"\x80\2" + good + b".", "a number": state({"x": whole(1)}), "a dict in it": state({"x": b"}"}),
        "a storage": state({"x": storage()}), "a name in it": state({"x": named("torch", "FloatStorage")}),
        "a long text claimed": b"\x80\4\x8d" + struct.pack("<Q", BIG) + b"x.", "long bytes claimed": b"\x80\4\x8e" + struct.pack("<Q", BIG) + b"x.",
        "a long array claimed": b"\x80\5\x96" + struct.pack("<Q", BIG) + b"x.", "a long frame": b"\x80\4\x95" + struct.pack("<Q", BIG) + b"}",
        "text of 4 GB": b"\x80\2X\xff\xff\xff\xff.", "long number": b"\x80\2\x8b\xff\xff\xff\x7f.", "negative long": b"\x80\2\x8b\xff\xff\xff\xff.",
        "many digits": b"\x80\2L" + b"9" * 10**5 + b"L\n.", "digits": b"\x80\2I" + b"9" * 10**5 + b"\n.",
        "large memory": b"\x80\2}r\xff\xff\xff\x7f.", "memory that is not there": b"\x80\2h\5.", "large recall": b"\x80\2}j\xff\xff\xff\xff.",
        "memory of nothing": b"\x80\2q\0.", "popped too far": b"\x80\x02\x86.", "no mark": b"\x80\2}u.", "tuple without a mark": b"\x80\2t.",
        "nested": b"\x80\2" + b")" + b"\x85" * 100_000 + b".", "nested key": b"\x80\2})" + b"\x85" * 1000 + b"Ns.",
        "doubled": b"\x80\2)" + b"2\x86" * 200 + b".", "doubled by memory": b"\x80\4)\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(200)) + b".",
        "doubled for a key": b"\x80\4})\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(200)) + b"Ns.",
        "in itself": b"\x80\2}q\0" + text("x") + b"h\0s.", "key that is a number": b"\x80\2}K\1" + good + b"s.", "key None": b"\x80\2}N" + good + b"s.",
        "key twice": state({"x": good})[:-2] + text("x") + good + b"u.", "odd items": b"\x80\2}(" + text("x") + b"u.",
        "items of a tensor": b"\x80\2" + good + text("x") + good + b"s.", "state of a tensor": state({"x": good + b"}b"}),
        "state of a dtype": state({"x": named("torch", "FloatStorage") + several(whole(3), text("|")) + b"b"}),
        "state that is a tuple": b"\x80\2" + ORDERED + b")b.", "persistent text": b"\x80\2P0\n.", "persistent number": b"\x80\2K\1Q.",
        "persistent tuple": b"\x80\2" + several(text("module"), text("x")) + b"Q.", "appended": b"\x80\2](K\1e.", "a set": b"\x80\4\x8f.",
        "arguments of a dict": state({"x": named("collections", "OrderedDict") + several(text("x")) + b"R"}),
        "a call of a tuple": b"\x80\2))R.", "a call of a storage": b"\x80\2" + named("torch", "FloatStorage") + b")R.",
        "a parameter of None": b"\x80\2" + named("torch._utils", "_rebuild_parameter") + several(b"N") + b"R.",
        "protocol 9": b"\x80\x09}.", "a float": b"\x80\2G" + bytes(8) + b".", "newobj": b"\x80\2" + named("collections", "OrderedDict") + b")\x81.",
        "a buffer": b"\x80\5\x97.", "names without end": b"\x80\2cos", "no text": b"\x80\2X\1\0\0\0\xff.",
        "a name with '..'": state({"../x": good}), "an empty name": state({"": good}), "a name with NUL": state({"a\0": good}), "a long name": state({"x" * 5000: good}),
    }  # fmt: skip
    for name, pickled in pickles.items():
        yield Case(name, with_pickle(content, pickled))


def views(content: bytes) -> Iterator[Case]:
    """Tensors that are not in their storage, or more than it."""
    parts = {"archive/data.pkl": b"", "archive/data/0": bytes(16), "archive/version": b"3\n"}
    of = lambda pickled, **others: zip_of({**parts, "archive/data.pkl": pickled, **others})
    for offset, shape, strides in (
        (0, (5,), (1,)), (1, (4,), (1,)), (-1, (1,), (1,)), (4, (1,), (1,)), (BIG, (1,), (1,)), (0, (-4,), (1,)), (3, (2,), (-1,)),
        (0, (2**40,), (0,)), (0, (2**20, 2**20), (0, 0)), (0, (2**62, 4), (0, 0)), (0, (5,), (0,)), (0, (2**63,), (0,)), (0, (2,), (BIG,)),
        (0, (2, 2), (2,)), (0, (), (1,)), (0, (4,), ()), (0, (1,) * 5000, ()), (0, (1,) * 33, (0,) * 33), (0, (1,) * 5000, (0,) * 5000), (0, (0, 2**62), (1, 1)),
        (0, (3, 2), (2, 1)), (-(2**63), (4,), (1,)),
    ):  # fmt: skip
        pickled = state({"x": tensor(storage(), offset, shape, strides)})
        yield Case(f"offset {offset}, shape {str(shape)[:30]}, strides {str(strides)[:30]}", of(pickled))
    for kind, key, length in (
        ("FloatStorage", "1", 4), ("FloatStorage", "../data.pkl", 4), ("FloatStorage", "", 4), ("FloatStorage", "0", 5), ("FloatStorage", "0", 3),
        ("FloatStorage", "0", -4), ("FloatStorage", "0", BIG), ("DoubleStorage", "0", 4), ("HalfStorage", "0", 4), ("ComplexFloatStorage", "0", 2),
        ("QInt8Storage", "0", 16), ("StringStorage", "0", 4),
    ):  # fmt: skip
        yield Case(f"{kind} {key!r} of {length}", of(state({"x": tensor(storage(kind, key, length), shape=(1,))})))
    yield Case(
        "key that is a number",
        of(
            state(
                {
                    "x": tensor(
                        several(text("storage"), named("torch", "FloatStorage"), whole(0), text("cpu"), whole(4)) + b"Q"
                    )
                }
            )
        ),
    )
    for arguments in (
        (b"N", b"N", b"N", b"N"),
        (storage(),),
        (),
        (storage(), whole(0), whole(4), whole(1)),
        (storage(), whole(0), several(b"N"), several(b"N")),
    ):
        pickled = state({"x": named("torch._utils", "_rebuild_tensor_v2") + several(*arguments) + b"R"})
        yield Case(f"{len(arguments)} arguments of {len(pickled)} bytes", of(pickled))
    bools = of(state({"x": tensor(storage("BoolStorage", "0", 16), shape=(16,))}), **{"archive/data/0": b"\2" * 16})
    yield Case("bools of 2", bools)
    yield Case("big-endian", of(state({"x": tensor(storage())}), **{"archive/byteorder": b"big"}))
    shared = {f"x{i}": tensor(storage(length=2**18), shape=(2**18,)) for i in range(300)}
    yield Case("300 megabytes of views", of(state(shared), **{"archive/data/0": bytes(2**20)}))
    apart = {f"x{i}": tensor(storage(length=2**18), shape=(2,), strides=(2**18 - 1,)) for i in range(300)}
    yield Case("300 megabytes between two numbers", of(state(apart), **{"archive/data/0": bytes(2**20)}))


def zips(content: bytes) -> Iterator[Case]:
    """Zips that are damaged, compressed, or lie about their entries."""
    parts = unzipped(content)
    pickled = next(name for name in parts if name.endswith("/data.pkl"))
    stored = next(name for name in parts if "/data/" in name)
    yield Case("compressed", zip_of(parts, zipfile.ZIP_DEFLATED))
    yield Case("bzip2", zip_of(parts, zipfile.ZIP_BZIP2))
    yield Case("lzma", zip_of(parts, zipfile.ZIP_LZMA))
    yield Case("zip bomb", zip_of({**parts, stored: bytes(2**24)}, zipfile.ZIP_DEFLATED))
    yield Case("zip bomb in the pickle", zip_of({**parts, pickled: b"\x80\2" + b"N" * 2**24}, zipfile.ZIP_DEFLATED))
    yield Case("no pickle", zip_of({name: part for name, part in parts.items() if name != pickled}))
    yield Case("two pickles", zip_of({**parts, "other/data.pkl": parts[pickled]}))
    yield Case("pickle at the top", zip_of({name.rpartition("/")[2]: part for name, part in parts.items()}))
    yield Case("no storages", zip_of({name: part for name, part in parts.items() if "/data/" not in name}))
    yield Case("a short storage", zip_of({**parts, stored: parts[stored][:-1]}))
    yield Case("a long storage", zip_of({**parts, stored: parts[stored] + b"\0"}))
    good = zip_of(parts)
    twice = good.replace(b"/version", b"/data/0")
    yield Case("no entries", zip_of({}))
    yield Case("something before it", b"#!/bin/sh\n" + good)
    yield Case("something behind it", good + b"x")
    yield Case("an entry twice", twice if twice != good else good[:-1])
    end = good.rindex(b"PK\5\6")
    for at, form, number in ((4, "<H", 1), (6, "<H", 1), (8, "<H", 0), (10, "<H", 0xFFFF), (10, "<H", 1), (12, "<L", 0), (12, "<L", 2**31), (12, "<L", 0xFFFFFFFF),
                             (16, "<L", 0), (16, "<L", 2**31), (16, "<L", 0xFFFFFFFF), (20, "<H", 7), (20, "<H", 0xFFFF)):  # fmt: skip
        raw = struct.pack(form, number)
        yield Case(f"end {at}: {number}", good[: end + at] + raw + good[end + at + len(raw) :])
    first = good.index(b"PK\1\2")
    for at, form, number in ((8, "<H", 1), (10, "<H", 8), (10, "<H", 99), (20, "<L", 0), (20, "<L", 2**31), (24, "<L", 2**31), (24, "<L", 0xFFFFFFFF), (28, "<H", 0xFFFF),
                             (28, "<H", 0), (30, "<H", 0xFFFF), (32, "<H", 0xFFFF), (42, "<L", 5), (42, "<L", 2**31), (42, "<L", 0xFFFFFFFF), (16, "<L", 1)):  # fmt: skip
        raw = struct.pack(form, number)
        yield Case(f"entry {at}: {number}", good[: first + at] + raw + good[first + at + len(raw) :])
    yield Case("names differ", good.replace(b"data.pkl", b"data.pkx", 1))
    for name, number, length in (("many entries", 2**16 - 1, 2**31), ("a list of gigabytes", 3, 2**32 - 2)):
        yield Case(name, good[:end] + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, number, number, length, 0, 0))
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, BIG, BIG, BIG, 0) + struct.pack(
        "<4sLQL", b"PK\6\7", 0, end, 1
    )
    yield Case("wide end", good[:end] + wide + good[end:])
    yield Case("wide end elsewhere", good[:end] + struct.pack("<4sLQL", b"PK\6\7", 0, BIG, 1) + good[end:])
    yield Case("overlapping entries", overlapping(good))
    yield Case("before torch 1.6", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.")
    yield Case("a plain pickle", pickle.dumps({"x": [1, 2]}))


def overlapping(good: bytes) -> bytes:
    """A zip whose first entry reaches over its second."""
    first = good.index(b"PK\1\2")
    size = struct.unpack_from("<L", good, first + 20)[0] + 60
    local = good.index(b"PK\3\4")
    for at in (first + 20, first + 24, local + 18, local + 22):
        good = good[:at] + struct.pack("<L", size) + good[at + 4 :]
    return good


def large_pickles(content: bytes) -> Iterator[Case]:
    """Pickles of megabytes whose steps make objects, and zips of many entries."""
    of = lambda pickled: zip_of({"archive/data.pkl": pickled, "archive/data/0": bytes(16)})
    below = unpickle.MOST_STEPS - 10
    for name, step, count in (
        ("dicts", b"}", below),
        ("marks", b"(", below),
        ("nested tuples", b"\x85", below),
        ("dicts, more than are read", b"}", 2**23 - 3),
    ):
        yield Case(name, of(b"\x80\4" + (b")" + step * (count - 1) if step == b"\x85" else step * count) + b"."))
    filled = b"\x80\4" + (b"}" + text("x") + b"Ns") * (below // 4) + b"."
    yield Case("filled dicts", of(filled))
    yield Case("keys", of(b"\x80\4}(" + b"".join(b"\x8c\5%05xN" % i for i in range(below // 2)) + b"u."))
    yield Case("numbers", of(b"\x80\4(" + b"J\0\0\0\x70" * below + b"t."))
    yield Case("nested dicts", of(b"\x80\4" + (b"}" + text("x")) * (below // 3) + b"N" + b"s" * (below // 3) + b"."))
    yield Case("a text of wide characters", of(b"\x80\4" + text("x" * (2**23 - 100) + "\U0001f600") + b"."))
    yield Case("longer than is read", of(b"\x80\2" + b"N" * 2**23 + b"."))
    yield Case("many entries", zip_of([(f"archive/{i}", b"") for i in range(20_000)]))


# -- JSON --------------------------------------------------------------------------------------------------------------


def configs(content: bytes) -> Iterator[Case]:
    """Configs that are no JSON, or none that may be read."""
    config = json.loads(content)
    written = json.dumps(config)
    key = next(iter(config))
    first = json.dumps(key)
    of = lambda value: (written[:-1] + f', "more": {value}' + "}").encode()
    for value in ("NaN", "Infinity", "-Infinity", "[NaN]", '{"a": [NaN]}', "1e400", "-1e999", "9" * 21, "9" * 5000, "01", "+1", ".5", "0x1", "'a'", "undefined",
                  '"\\ud800"', '"\\x41"', '"\n"', '"open', "[1,]", "{1: 2}", '{"a": 1, "a": 2}', "[" * 100 + "]" * 100, "[" * 10**5 + "]" * 10**5, '{"a":' * 10**5,
                  '{"a":' * 65 + "1" + "}" * 65):  # fmt: skip
        yield Case(f"value {value[:30]}", of(value))
    yield Case("key twice", (written[:-1] + f", {first}: 1" + "}").encode())
    for name, made in {
        "a list": f"[{written}]", "a number": "3", "a text": '"a"', "null": "null", "two objects": written + written, "a comment": written + " // x",
        "spaces alone": "  ", "half": written[: len(written) // 2], "a comma": written[:-1] + ",}", "NUL": written + "\0", "XML": "<a/>", "python": "dict(a=1)",
    }.items():  # fmt: skip
        yield Case(name, made.encode())
    yield Case("UTF-16", written.encode("utf-16"))
    yield Case("byte-order mark", b"\xef\xbb\xbf" + written.encode())
    yield Case("no UTF-8", written.encode() + b"\xff")
    yield Case("Latin-1", (written[:-1] + ', "ä": 1}').encode("latin-1"))
    yield Case("larger than is read", (written[:-1] + ', "more": "' + "x" * 2**21 + '"}').encode())


def large_configs(content: bytes) -> Iterator[Case]:
    """Configs of a megabyte that are JSON, and take twenty in memory."""
    written = json.dumps(json.loads(content))
    yield Case("lists", (written[:-1] + ', "more": [' + "[]," * 300_000 + "[]]}").encode(), False)
    yield Case("keys", (written[:-1] + "," + ",".join(f'"{i:x}":0' for i in range(90_000)) + "}").encode(), False)
    yield Case("numbers", (written[:-1] + ', "more": [' + "1000," * 200_000 + "1]}").encode(), False)


ODD: tuple[Any, ...] = (None, True, -1, 0, 10**15, 1.5, 1e308, "x", "../../etc", "", [], [None], [[]], {}, {"a": {}}, {"../x": -1}, "a" * 10**4)  # fmt: skip


def fields(content: bytes) -> Iterator[Case]:
    """Configs whose fields hold, each in turn, what they should not; some of it may be right."""
    config = json.loads(content)
    choose = random.Random(len(config))
    for key in config:
        for value in choose.sample(ODD, 3):
            yield Case(f"{key} {str(value)[:20]!r}", json.dumps({**config, key: value}).encode(), False)
        yield Case(f"no {key}", json.dumps({k: v for k, v in config.items() if k != key}).encode(), False)


CORPUS: dict[str, dict[str, Callable[[bytes], Iterator[Case]]]] = {
    "safetensors": {
        "edited": edited, "lengths": lengths, "texts": texts, "entries": entries, "names": names, "values": values,
    },
    "torch": {"edited": edited, "functions": functions, "steps": steps, "views": views, "zips": zips},
    "json": {"edited": edited, "configs": configs, "fields": fields},
}  # fmt: skip


def spoil(file: Path, cases: Iterator[Case]) -> Iterator[Case]:
    """The cases, each written in the place of a good file, which is there again at the end."""
    good = file.read_bytes()
    try:
        for case in cases:
            file.write_bytes(case.content)
            yield case
    finally:
        file.write_bytes(good)


def faults(loader: Loader, made: Path, file: Path, kind: Callable[[bytes], Iterator[Case]]) -> tuple[int, list[str]]:
    """How many cases of a kind there are, and which of them end otherwise than they should."""
    count, found = 0, []
    for case in spoil(file, kind(file.read_bytes())):
        count += 1
        began = time.process_time()
        with little_memory(len(case.content)):
            wrong = fault(loader, made, file, case)
        if wrong:
            found.append(f"{file.name}, {case.name}: {wrong}")
        if time.process_time() - began > LONG / 2:
            found.append(f"{file.name}, {case.name}: takes {time.process_time() - began:.0f} seconds of computing")
    return count, found
