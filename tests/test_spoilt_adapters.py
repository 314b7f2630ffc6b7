"""Spoilt adapter folders: whatever is wrong, `load` ends in an error that names the folder's file, soon and in little memory."""

import dataclasses
import hashlib
import json
import math
import os
import random
import signal
import socket
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save

import jlora
from jlora.adapted.select import Extra
from jlora.checkpoint import record as records
from jlora.checkpoint.folder import NAME
from jlora.methods import METHODS, from_json, to_json
from jlora.transform.sites import Site

PARAMS = {
    "k": {"kernel": np.ones((6, 4), np.float32)},
    "q": {"kernel": np.ones((6, 4), np.float32)},
    "tok": np.ones((5, 3), np.float32),
}
HUGE = "9" * 5000
SECONDS, BYTES = 20, 400 * 2**20


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The JSON and the tensors of a good adapter, and the name of their file."""
    folder = tmp_path_factory.mktemp("good")
    jlora.save(folder, jlora.apply(PARAMS, rank=2, targets="kernel", extras={"tok": [0, 3]}))
    record = json.loads((folder / NAME).read_text())
    return record, load_file(folder / record["tensors"]["file"])


class Folder:
    """A copy of the good adapter that can be spoilt."""

    def __init__(self, path, good):
        self.path, self.record, self.tensors = path, json.loads(json.dumps(good[0])), dict(good[1])
        self.file = path / NAME
        path.mkdir(exist_ok=True)
        self.put_tensors()

    @property
    def tensors_file(self):
        return self.path / self.record["tensors"]["file"]

    def put_tensors(self, content=None, checked=True):
        content = save(self.tensors) if content is None else content
        self.tensors_file.write_bytes(content)
        if checked:
            self.record["tensors"]["sha256"] = hashlib.sha256(content).hexdigest()
        self.put()

    def put(self, text=None):
        self.file.write_bytes((json.dumps(self.record) if text is None else text).encode("utf-8", "surrogatepass"))

    def at(self, *way):
        """The container of a value, and its key there."""
        inside = self.record
        for key in way[:-1]:
            inside = inside[key]
        return inside, way[-1]


def outcome(function):
    """What a function returns, or None and what its ValueError says."""
    try:
        return function(), ""
    except ValueError as error:
        return None, str(error)


def refused(folder, says=(), error=ValueError):
    """Loading ends in an error of this kind that names the folder and each of what it has to say."""

    def stuck(*_):
        raise AssertionError(f"load of '{folder.path}' hangs")

    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(SECONDS)
    try:
        with pytest.raises(error) as caught:
            jlora.load(folder.path, PARAMS)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    text = str(caught.value)
    assert str(folder.path) in text and len(text) < 5000, text[:500]
    for part in says:
        assert part in text, (part, text[:500])


# -- the JSON's values -------------------------------------------------------------------------------------------------

FIELDS = [
    ("format",), ("version",), ("base",), ("method",), ("sites",), ("extras",), ("tensors",),
    ("tensors", "file"), ("tensors", "sha256"), ("method", "name"), ("method", "rank"), ("method", "alpha"), ("method", "init"),
    ("method", "dropout"), ("sites", 0), *(("sites", 1, field.name) for field in dataclasses.fields(Site)), ("extras", 0),
    ("extras", 0, "path"), ("extras", 0, "rows"),
]  # fmt: skip
WRONG = {
    "null": None, "true": True, "minus one": -1, "a half": 0.5, "text": "nonsense", "empty text": "", "list": [[]], "object": {"x": 1},
    "NaN": math.nan, "infinity": math.inf, "10^18": 10**18, "negative list": [-1], "floats": [0.5], "texts": ["0"], "twice": [0, 0],
    "far": [99], "long text": "x" * 10000, "NUL": "k\0", "surrogate": "\ud800",
}  # fmt: skip
# What the format allows at that place.
ALLOWED = {
    ("method", "alpha", "null"), ("method", "alpha", "minus one"), ("method", "alpha", "a half"), ("method", "alpha", "10^18"),
    ("method", "dropout", "a half"), ("alpha", "minus one"), ("alpha", "a half"), ("alpha", "10^18"), ("materialised", "text"),
    ("materialised", "empty text"), ("materialised", "NUL"), ("materialised", "surrogate"), ("uses", "texts"),
}  # fmt: skip


def values():
    for way in FIELDS:
        for name, value in WRONG.items():
            if not any((*map(str, way), name)[-len(allowed) :] == allowed for allowed in ALLOWED):
                yield pytest.param(way, value, id=f"{'.'.join(map(str, way))}: {name}")


VALUES = list(values())


def test_there_are_enough():
    assert len(VALUES) >= 300


@pytest.mark.parametrize(("way", "value"), VALUES)
def test_a_wrong_value_is_refused(way, value, good, tmp_path):
    folder = Folder(tmp_path, good)
    container, key = folder.at(*way)
    container[key] = value
    folder.put()
    field = next(part for part in reversed(way) if isinstance(part, str))
    known = {"in_axes": "axes", "out_axes": "axes", "stack_axes": "axes"}
    says = [] if field in ("path", "name", "shape") or (field, value) == ("rows", None) else [known.get(field, field)]
    refused(folder, says)


# -- the JSON as a whole -----------------------------------------------------------------------------------------------


def as_text(change):
    return lambda folder: folder.put(change(json.dumps(folder.record)))


def changed(change):
    def spoil(folder):
        change(folder.record)
        folder.put()

    return spoil


def as_bytes(change):
    return lambda folder: folder.file.write_bytes(change(folder.file.read_bytes()))


def with_method(**method):
    return changed(lambda record: record.update(method=method))


def inner(levels):
    method = {"name": "lora", "rank": 2}
    for _ in range(levels):
        method = {"name": "dora", "inner": method}
    return method


WHOLE = {
    "deep list": (as_text(lambda t: f'{t[:-1]}, "x": {"[" * 100_000}{"]" * 100_000}}}'), ["nested too deeply"]),
    "deep objects": (as_text(lambda t: f"""{t[:-1]}, "x": {'{"a":' * 100_000}1{"}" * 100_000}}}"""), ["nested too deeply"]),
    "5000 digits": (as_text(lambda t: f'{t[:-1]}, "x": {HUGE}}}'), ["unknown field 'x'"]),
    "rank of 5000 digits": (as_text(lambda t: t.replace('"rank": 2', f'"rank": {HUGE}', 1)), ["rank", "a number of 5000 digits"]),
    "alpha of 5000 digits": (as_text(lambda t: t.replace('"alpha": 2.0', f'"alpha": {HUGE}', 1)), ["alpha", "5000 digits"]),
    "version of 5000 digits": (as_text(lambda t: t.replace('"version": 1', f'"version": -{HUGE}', 1)), ["version", "5000 digits"]),
    "alpha 1e999": (as_text(lambda t: t.replace('"alpha": 2.0', '"alpha": 1e999', 1)), ["sites[0].alpha", "finite"]),
    "alpha beyond float32": (changed(lambda r: r["sites"][0].update(alpha=1e300)), ["sites[0].alpha", "finite"]),
    "alpha below float32": (changed(lambda r: r["sites"][0].update(alpha=1e-300)), ["sites[0].alpha", "must not be 0"]),
    "version 1.0": (changed(lambda r: r.update(version=1.0)), ["version 1.0"]),
    "a key twice": (as_text(lambda t: t.replace('"version": 1', '"version": 1, "version": 1')), ["'version' is there twice"]),
    "a key of a site twice": (as_text(lambda t: t.replace('"uses"', '"rank": 2, "uses"')), ["'rank' is there twice"]),
    "unknown field": (changed(lambda r: r.update(note="x")), ["unknown field 'note'"]),
    "unknown field of tensors": (changed(lambda r: r["tensors"].update(url="x")), ["tensors", "unknown field 'url'"]),
    "unknown field of an extra": (changed(lambda r: r["extras"][0].update(scale=2)), ["extras[0]", "unknown field 'scale'"]),
    "site without a path": (changed(lambda r: r["sites"][0].pop("path")), ["sites[0]", "lacks 'path'"]),
    "site twice": (changed(lambda r: r["sites"].append(r["sites"][0])), ["sites", "there twice"]),
    "extra twice": (changed(lambda r: r["extras"].append(r["extras"][0])), ["extras", "there twice"]),
    "site and extra": (changed(lambda r: r["extras"].append({"path": "k/kernel", "rows": None})), ["extras", "among the sites"]),
    "a million sites": (changed(lambda r: r.update(sites=r["sites"][:1] * 50_000)), ["sites", "there twice"]),
    "sites of other paths": (
        changed(lambda r: r.update(sites=[r["sites"][0] | {"path": f"k{i}"} for i in range(20_000)])), ["not among", "19994 more"],
    ),
    "rank of one axis": (changed(lambda r: r["sites"][0].update(rank=2**31 - 1)), ["k/kernel/A"]),
    "full with sites": (with_method(name="full"), ["full has no rank"]),
    "method of many levels": (with_method(**inner(300)), []),
    "dora of a dora": (with_method(**inner(2)), ["dora"]),
    "broken pattern": (with_method(name="ia3", feedforward="(["), ["ia3", "no regular expression"]),
    "pattern too large": (with_method(name="ia3", feedforward="a{99999999999}"), ["ia3"]),
    "pissa forever": (with_method(name="pissa", rank=2, iterations=2**30), ["iterations must be at most 100"]),
    "empty": (as_bytes(lambda c: b""), ["no JSON"]),
    "spaces": (as_bytes(lambda c: b" " * 10_000), ["no JSON"]),
    "zeros": (as_bytes(lambda c: bytes(len(c))), ["no JSON"]),
    "UTF-16": (as_bytes(lambda c: c.decode().encode("utf-16")), ["no JSON"]),
    "byte order mark": (as_bytes(lambda c: b"\xef\xbb\xbf" + c), ["no JSON"]),
    "Latin-1": (as_bytes(lambda c: c.replace(b"lora", b"l\xf6ra")), ["no JSON"]),
    "half": (as_bytes(lambda c: c[: len(c) // 2]), ["no JSON"]),
    "twice": (as_bytes(lambda c: c + c), ["no JSON"]),
    "a list": (as_bytes(lambda c: b"[" + c + b"]"), ["'format'"]),
    "a number": (as_bytes(lambda c: b"1"), ["'format'"]),
    "null": (as_bytes(lambda c: b"null"), ["'format'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_spoilt_json_is_refused(name, good, tmp_path):
    spoil, says = WHOLE[name]
    folder = Folder(tmp_path, good)
    spoil(folder)
    refused(folder, [NAME, *says] if name != "rank of one axis" else says)


# -- the tensors -------------------------------------------------------------------------------------------------------


def header(folder, change, data=None):
    content = save(folder.tensors)
    length = struct.unpack("<Q", content[:8])[0]
    text = change(json.loads(content[8 : 8 + length]))
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    folder.put_tensors(struct.pack("<Q", len(text)) + text + (content[8 + length :] if data is None else data))


def entry(**fields):
    return lambda folder: header(folder, lambda h: h | {"k/kernel/A": h["k/kernel/A"] | fields})


def tensors(**changes):
    def spoil(folder):
        folder.tensors |= {name.replace("__", "/"): value for name, value in changes.items()}
        folder.put_tensors()

    return spoil


def content(change, checked=True):
    return lambda folder: folder.put_tensors(change(save(folder.tensors)), checked)


TENSORS = {
    "dtype unknown": (entry(dtype="XX"), ["'k/kernel/A' is XX"]),
    "dtype BF16": (entry(dtype="BF16"), ["'k/kernel/A' is bfloat16"]),
    "dtype of another size": (entry(dtype="F64"), ["'k/kernel/A' is float64"]),
    "dtype a list": (entry(dtype=["F32"]), ["k/kernel/A"]),
    "shape vast": (entry(shape=[2**40, 2**40]), ["k/kernel/A"]),
    "shape negative": (entry(shape=[-6, 1, 2]), ["k/kernel/A"]),
    "shape a text": (entry(shape="612"), ["k/kernel/A"]),
    "shape of a hundred axes": (entry(shape=[1] * 100), ["k/kernel/A"]),
    "offsets outside": (entry(data_offsets=[0, 2**40]), ["no safetensors file"]),
    "offsets reversed": (entry(data_offsets=[48, 0]), ["no safetensors file"]),
    "offsets shared": (lambda f: header(f, lambda h: h | {"k/kernel/A": h["q/kernel/A"]}), ["no safetensors file"]),
    "offsets missing": (lambda f: header(f, lambda h: h | {"k/kernel/A": {"dtype": "F32", "shape": [6, 1, 2]}}), ["no safetensors file"]),
    "an entry null": (lambda f: header(f, lambda h: h | {"k/kernel/A": None}), ["k/kernel/A"]),
    "header a list": (lambda f: header(f, lambda h: [h]), ["header"]),
    "header deep": (lambda f: header(f, lambda h: b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}"), ["deeply"]),
    "header with a name twice": (
        lambda f: header(f, lambda h: b'{"k/kernel/A": 1, "k/kernel/A": 2}'), ["'k/kernel/A' is there twice"],
    ),
    "header no text": (lambda f: header(f, lambda h: b"\xff\xfe{}"), ["no JSON"]),
    "header longer than the file": (content(lambda c: struct.pack("<Q", 2**60) + c[8:]), ["header"]),
    "header of nothing": (content(lambda c: bytes(8) + c[8:]), ["header"]),
    "empty": (content(lambda c: b""), ["header"]),
    "seven bytes": (content(lambda c: c[:7]), ["header"]),
    "cut": (content(lambda c: c[:-4]), ["no safetensors file"]),
    "a byte more": (content(lambda c: c + b"x"), ["no safetensors file"]),
    "ten million bytes more": (content(lambda c: c + bytes(10_000_000)), ["bytes, and the tensors of this adapter take at most"]),
    "unchecked": (content(lambda c: c[:-1] + b"x", checked=False), ["damaged", "sha256"]),
    "NaN": (tensors(k__kernel__A=np.full((6, 1, 2), np.nan, np.float32)), ["'k/kernel/A' has values that are not finite"]),
    "infinity": (tensors(tok__rows=np.full((2, 3), np.inf, np.float32)), ["'tok/rows' has values that are not finite"]),
    "int32": (tensors(k__kernel__A=np.ones((6, 1, 2), np.int32)), ["'k/kernel/A' is int32"]),
    "transposed": (tensors(k__kernel__A=np.ones((1, 6, 2), np.float32)), ["'k/kernel/A' is float32 of shape (1, 6, 2)"]),
    "one more": (tensors(x=np.ones(3, np.float32)), ["'x' is unexpected"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_spoilt_tensors_are_refused(name, good, tmp_path):
    spoil, says = TENSORS[name]
    folder = Folder(tmp_path, good)
    spoil(folder)
    refused(folder, [folder.record["tensors"]["file"], *says])


@pytest.mark.parametrize("seed", range(100))
def test_random_damage_is_refused(seed, good, tmp_path):
    """Random bytes are changed, cut out or put in: damaged tensors are always refused, damaged JSON is refused or harmless."""
    rng = random.Random(seed)
    folder = Folder(tmp_path, good)
    file = folder.file if seed % 2 else folder.tensors_file
    damaged = bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(damaged))
        damaged[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(1, 3))
    file.write_bytes(bytes(damaged))
    loaded, message = outcome(lambda: jlora.load(tmp_path, PARAMS))
    if loaded is None:
        assert str(tmp_path) in message and len(message) < 5000
    else:
        assert seed % 2 and all(np.isfinite(x).all() for x in jax.tree.leaves(jlora.merge(loaded)))


# -- what lies in the folder -------------------------------------------------------------------------------------------


def instead(make, of="tensors"):
    def spoil(folder):
        file = folder.file if of == "json" else folder.tensors_file
        content = file.read_bytes()
        file.unlink()
        make(file, content)

    return spoil


def outside(file, content):
    (file.parent.parent / f"{file.parent.name}-{file.name}").write_bytes(content)
    file.symlink_to(file.parent.parent / f"{file.parent.name}-{file.name}")


def socket_at(file, content):
    here = os.getcwd()
    os.chdir(file.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
    finally:
        os.chdir(here)


def sparse(file, content):
    with file.open("wb") as out:
        out.truncate(2**40)


THINGS = {
    "pipe": lambda file, content: os.mkfifo(file),
    "folder": lambda file, content: file.mkdir(),
    "socket": socket_at,
    "link to a device": lambda file, content: file.symlink_to("/dev/zero"),
    "link out of the folder": outside,
    "a terabyte": sparse,
}


@pytest.mark.parametrize("of", ["json", "tensors"])
@pytest.mark.parametrize("name", THINGS)
def test_only_regular_files_of_the_folder_are_opened(name, of, good, tmp_path):
    folder = Folder(tmp_path, good)
    instead(THINGS[name], of)(folder)
    tracemalloc.start()
    try:
        refused(folder, [folder.file.name if of == "json" else folder.tensors_file.name])
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../x.safetensors", "factors-0123456789abcdef.safetensors/../x", "adapter.json", ".", ""]
)
def test_the_name_of_the_tensors_is_of_one_kind(name, good, tmp_path):
    folder = Folder(tmp_path, good)
    folder.record["tensors"]["file"] = name
    folder.put()
    refused(folder, [NAME, "'tensors.file'", "factors-<16 hexadecimal digits>.safetensors"])


def test_a_link_inside_the_folder_is_followed(good, tmp_path):
    folder = Folder(tmp_path, good)
    folder.tensors_file.rename(tmp_path / "blob")
    folder.tensors_file.symlink_to("blob")
    assert len(jlora.load(tmp_path, PARAMS).sites) == 2


@pytest.mark.parametrize("inner", ["", "epoch_3"])  # an adapter may lie deeper in its repository
def test_a_snapshot_of_the_hub_has_links_to_its_own_blobs(inner, good, tmp_path):
    repository, folder = tmp_path / "models--someone--adapter", Folder(tmp_path / "plain", good)
    blobs, plain = repository / "blobs", folder.path
    folder.path = repository / "snapshots" / "abc" / inner
    folder.path.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (folder.path / file.name).symlink_to(f"{'../' * (3 if inner else 2)}blobs/{number:040x}")
    assert len(jlora.load(folder.path, PARAMS).sites) == 2
    (tmp_path / "by_another_name").symlink_to(folder.path)
    assert len(jlora.load(tmp_path / "by_another_name", PARAMS).sites) == 2
    blobs.rename(tmp_path / "blobs")  # of another repository
    blobs.symlink_to(tmp_path / "blobs")  # which would make any folder of the machine one of blobs
    refused(folder, [NAME, "is a link that leads out of its folder"])


def test_links_in_a_circle(good, tmp_path):
    folder = Folder(tmp_path, good)
    folder.tensors_file.unlink()
    folder.tensors_file.symlink_to(folder.tensors_file.name)
    refused(folder, [folder.tensors_file.name])


def test_saving_onto_a_spoilt_folder(good, tmp_path):
    """A pipe where the JSON should be is replaced, not waited for."""
    folder = Folder(tmp_path, good)
    instead(THINGS["pipe"], "json")(folder)
    jlora.save(tmp_path, jlora.apply(PARAMS, rank=1, targets="kernel", extras="tok"))
    assert jlora.load(tmp_path, PARAMS).sites[0].rank == 1


# -- what is checked in common with apply ------------------------------------------------------------------------------


def test_every_field_has_a_check():
    chosen = {field.name for field in dataclasses.fields(jlora.Target)} - {"site"}
    assert set(records.SITE) == {field.name for field in dataclasses.fields(Site)} | chosen
    assert set(records.EXTRA) == {field.name for field in dataclasses.fields(Extra)}


OPTIONS = {
    "adalora": {"total_steps": 9}, "dora": {"inner": {"name": "lora", "rank": 2}}, "top_layers": {"count": 1}, "oft": {"block_size": 2},
    "together": {"*methods": [{"name": "oft", "block_size": 2}, [{"name": "ia3"}, ["mlp", "out"]]]},
    "tied": {"inner": {"name": "lora", "rank": 2}, "groups": [["q", "k"]]},
    "ia3": {}, "full": {}, "bitfit": {}, "norms": {}, "p_tuning": {"length": 2}, "prefix_tuning": {"length": 2}, "prompt_tuning": {"length": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_every_method_is_checked(name):
    """Any JSON value of an option is a ValueError, or gives a hashable method that is written as it was read."""
    options = {"name": name} | OPTIONS.get(name, {"rank": 2})
    config = to_json(from_json(options))
    for option in config:
        for value in (*WRONG.values(), records.parse(HUGE.encode(), "x"), "([", 2**40, -(2**40), 1e308, [1, 2], [True]):
            method, message = outcome(lambda option=option, value=value: from_json(config | {option: value}))
            if method is None:
                assert 0 < len(message) < 12000
                continue
            hash(method)
            assert from_json(json.loads(json.dumps(to_json(method), allow_nan=False))) == method
            assert "inner" in config or to_json(method)[option] in (
                value,
                tuple(value) if isinstance(value, list) else value,
            )


def test_rows_that_a_smaller_table_does_not_have(tmp_path):
    big = {"emb": {"embedding": jnp.ones((10, 4))}, "out": {"kernel": jnp.ones((4, 3))}}
    small = big | {"emb": {"embedding": jnp.ones((8, 4))}}
    adapted = jlora.apply(big, rank=2, targets="out", extras={"emb": [3, 9]})
    jlora.save(tmp_path, adapted)
    message = r"extras: rows \[3, 9\] of 'emb/embedding' must be distinct and within \(8, 4\)$"
    with pytest.raises(ValueError, match=message):
        jlora.load(tmp_path, small, any_base=True)
    with pytest.raises(ValueError, match=message):
        jlora.merge(adapted.replace(base=small))
    larger = big | {"emb": {"embedding": jnp.zeros((12, 4))}}
    assert jlora.load(tmp_path, larger, any_base=True).extras == adapted.extras


@pytest.mark.parametrize("rows", [[0.5], "01", [True], [jnp.float32(1)], [None]])
def test_rows_are_integers(rows):
    with pytest.raises(ValueError, match=r"^extras\['tok'\] must be integers, not "):
        jlora.apply(PARAMS, rank=1, targets="kernel", extras={"tok": rows})


def test_a_cast_base_and_its_adapter_are_saved_together(tmp_path):
    """The sites say the dtypes of the base that is there."""
    adapted = jlora.apply(PARAMS, rank=1, targets="kernel", extras="tok")
    jlora.save(tmp_path, adapted)
    cast = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    loaded = jlora.load(tmp_path, cast, any_base=True)
    assert {site.dtype for site in loaded.sites} == {"bfloat16"}
    jlora.save(tmp_path, loaded)
    assert jlora.load(tmp_path, cast).sites == loaded.sites
