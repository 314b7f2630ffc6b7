"""An adapter merged into a checkpoint's folder, for any architecture: from the tensors' names and shapes alone."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoint.lock import NAME as LOCK
from jlora.checkpoint.lock import Lock
from jlora.interop import blocks, fit, shards
from jlora.interop.layer import Layer, Layout, merged
from jlora.interop.shards import FLOATS, Checkpoint, Entry, Shard
from jlora.models import reading

STATE = "merging.json"  # in the temporary folder: what it is made of, and which of its files are whole
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.bpe", "LICENSE*", "NOTICE*")  # config, tokenizer, code
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ELEMENTS = 2**22  # of a tensor that are merged at a time, where its rows do not depend on one another
CHUNK = 2**18  # elements whose norms are taken at a time
VERSION = 1  # of the state


class Merged(NamedTuple):
    """A tensor that was changed.

    Attributes:
      key: in the checkpoint.
      kinds: of the layers, in the order in which they were applied.
      shape, dtype: of the tensor that was written.
      change: |exact - base| / |base|, Frobenius norms, exact being the merged tensor in float32.
      rounding: |written - exact| / |exact - base|: the share of the update that the cast to the dtype rounds away.
    """

    key: str
    kinds: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    change: float
    rounding: float


class Report(NamedTuple):
    """Account of a merge, or of a dry run.

    Attributes:
      out: the folder.
      merged: the tensors that changed; of a dry run without norms.
      kept: number of tensors that were copied as they are.
      added: keys of tensors that the base does not have: a new head.
      shards: number of files of tensors.
      resumed: how many of them an interrupted run had left.
      copied: other files of the base that were copied.
      size: bytes of all tensors.
      notes: what to know of it.
    """

    out: Path
    merged: tuple[Merged, ...]
    kept: int
    added: tuple[str, ...]
    shards: int
    resumed: int
    copied: tuple[str, ...]
    size: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON's types."""
        return self._asdict() | {"out": str(self.out), "merged": [row._asdict() for row in self.merged]}


Progress = Callable[[int, int, str], None]
"""(bytes that are written, bytes of all, the tensor that is next) -> nothing."""


class _Plan(NamedTuple):
    base: Checkpoint
    out: Path
    placed: Mapping[str, list[Layer]]
    added: tuple[Layer, ...]
    layouts: Mapping[str, Layout]
    dtype: str | None
    default: str
    others: tuple[Path, ...]
    untied: bool = False  # whether config.json has to say that the head is no longer the embedding
    notes: tuple[str, ...] = ()

    @property
    def temporary(self) -> Path:
        return self.out.with_name(f".{self.out.name}.merging")

    def written(self, entry: Entry) -> str:
        """The dtype that a tensor is written in."""
        return self.dtype or entry.dtype if entry.dtype in FLOATS else entry.dtype

    def rows(self, shard: Shard) -> list[tuple[str, str, tuple[int, ...]]]:
        """Tensors of the file that is made of a shard: key, dtype, shape."""
        rows = [(entry.key, self.written(entry), entry.shape) for entry in shard.entries]
        if shard is self.base.shards[-1]:
            rows += [(layer.key, self.default, layer.tensors["value"].shape) for layer in self.added]
        return rows

    def size(self, shard: Shard) -> int:
        return sum(math.prod(shape) * shards.BITS[dtype] // 8 for _, dtype, shape in self.rows(shard))


def merge_folder(
    base: str | os.PathLike[str],
    layers: Sequence[Layer],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    fan_in_fan_out: bool | None = None,
    tied: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Writes the folder of a checkpoint with an adapter merged into it. The base is read, never written.

    Each tensor is read alone, changed in float32, cast once and written before the next is read; a large matrix some
    rows at a time, where the method allows it. So it takes less than the memory of one file, whatever the model's size.
    The files go to a folder beside `out` that is renamed to it at the end; a run that was interrupted goes on after the
    last whole file when it is called again with the same base, adapter and dtype.

    Args:
      base: a folder with one safetensors file, or with several and their index. Its config and tokenizer are copied.
      layers: of the adapter, in the order in which they are applied.
      out: the folder to write.
      dtype: "float32", "bfloat16" or "float16" of all tensors of floats; that of each tensor when None.
      fan_in_fan_out: what the adapter's config says of matrices whose shape does not tell their layout.
      tied: merge a layer of the head into the embedding, where the base has one tensor for both. Without it a whole
        head that differs from the embedding becomes a tensor of its own, and config.json says that they are no longer
        tied.
      force: replace a checkpoint that is at `out`.
      dry_run: check all and write nothing.
      progress: called before each tensor, and at the end.

    Raises:
      FileNotFoundError: if the base is no folder, or lacks files.
      FileExistsError: if there is something at `out`, and not `force`.
      ValueError: if the adapter does not fit the base; for a whole head that differs from the embedding, and `tied`;
        for a base that is quantised or damaged; values that are not finite, or not in the dtype's range; `out` that is
        the base, or in use by another process.
      OSError: if the disk is full: `out` is as it was, and the same call goes on from there.
    """
    plan = _planned(Path(base), layers, Path(out), dtype, fan_in_fan_out, tied)
    _check_out(plan, force)
    if dry_run:
        changed = [
            Merged(key, _kinds(own), entry.shape, plan.written(entry), float("nan"), float("nan"))
            for key, own, entry in ((key, own, plan.base.entries[key]) for key, own in plan.placed.items())
        ]
        return _report(plan, changed, 0)
    out, temporary = plan.out, plan.temporary
    out.parent.mkdir(parents=True, exist_ok=True)
    with Lock(temporary) if not temporary.is_symlink() else _no_link(temporary):
        done = _resumed(plan)
        resumed = len(done)
        try:
            _check_room(plan, done)
            _write_shards(plan, done, progress)
            _write_others(plan)
        except ValueError:
            done.clear()  # it would end in the same way again
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _full(plan, done, error) from error
        finally:
            if not done:
                shutil.rmtree(temporary, ignore_errors=True)
        _into_place(temporary, out)
    changed = [
        Merged(**row | {"kinds": tuple(row["kinds"]), "shape": tuple(row["shape"])})
        for s in done.values()
        for row in s["merged"]
    ]
    return _report(plan, changed, resumed)


def _kinds(layers: Sequence[Layer]) -> tuple[str, ...]:
    return tuple(layer.kind for layer in layers)


def _report(plan: _Plan, changed: Sequence[Merged], resumed: int) -> Report:
    kept = len(plan.base.entries) - len(changed)
    size = sum(map(plan.size, plan.base.shards))
    copied = tuple(path.name for path in plan.others)
    added = tuple(layer.key for layer in plan.added)
    table = fit.embedding_of({key: entry.shape for key, entry in plan.base.entries.items()})
    both = table in plan.placed and not plan.untied
    notes = (*((f"{table!r} is the head, too: both change",) if both else ()), *plan.notes)
    return Report(plan.out, tuple(changed), kept, added, len(plan.base.shards), resumed, copied, size, notes)


# -- before anything is written ----------------------------------------------------------------------------------------


def _planned(
    folder: Path, layers: Sequence[Layer], out: Path, dtype: str | None, fan_in_fan_out: bool | None, tied: bool
) -> _Plan:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    base = shards.open_checkpoint(folder)
    _check_quantised(folder)
    entries = base.entries
    shapes = {key: entry.shape for key, entry in entries.items()}
    placed, added = fit.fitted(layers, shapes, fit.aliases(folder, shapes), tied=tied)
    for key in placed:
        if entries[key].dtype not in FLOATS:
            raise ValueError(
                f"{key!r} is of {entries[key].dtype}, and an adapter is merged into {', '.join(FLOATS)}: merge into "
                "the model before it was quantised, and quantise again"
            )
    for layer in layers:
        wrong = [name for name, x in layer.tensors.items() if not np.isfinite(np.asarray(x, np.float32)).all()]
        if wrong:
            raise ValueError(f"{layer.key!r} of the adapter has values in {wrong[0]!r} that are not finite")
    layouts = fit.layouts(placed, shapes, fan_in_fan_out)
    floats = Counter(entry.dtype for entry in entries.values() if entry.dtype in FLOATS)
    default = DTYPES[dtype] if dtype else floats.most_common(1)[0][0]
    patterns = sorted({path for pattern in COPIED for path in folder.glob(pattern)})
    others = tuple(
        p for p in patterns if not p.name.endswith(shards.INDEX) and p.name not in NOT_COPIED and reading.has(p)
    )
    plan = _Plan(base, out, placed, tuple(added), layouts, DTYPES[dtype] if dtype else None, default, others)
    return _with_head(plan, tied)


def _with_head(plan: _Plan, tied: bool) -> _Plan:
    """The plan for a base whose head is its embedding: what to do with a head that the adapter has changed alone.

    transformers ties the two again when config.json says so, or says nothing, and then the head is lost.
    """
    table = fit.embedding_of({key: entry.shape for key, entry in plan.base.entries.items()})
    notes = []
    for layer in [layer for layer in plan.added if table and fit.is_head(layer.key)]:
        if _is_embedding(plan, layer, table):
            plan = plan._replace(added=tuple(own for own in plan.added if own is not layer))
            notes.append(f"{layer.key!r} of the adapter is the embedding {table!r}: they stay one tensor")
        elif tied:
            raise ValueError(
                f"{layer.key!r} of the adapter differs from the embedding {table!r}, and cannot be one tensor with it: "
                "leave --tied (tied=True) out, and the head becomes a tensor of its own"
            )
    heads = [key for key in (*plan.placed, *(layer.key for layer in plan.added)) if fit.is_head(key)]
    config = next((path for path in plan.others if path.name == fit.CONFIG), None)
    if heads and config is None:
        new = [key for key in heads if key not in plan.base.entries]
        notes += [f"{key!r} is added: there is no {fit.CONFIG} to say that it is not the embedding" for key in new]
    elif heads and config is not None:
        record = reading.read_json(config)
        if _untied(record) != record:
            notes.append(f"{heads[0]!r} is a tensor of its own: {fit.CONFIG} gets {TIE}=false")
            plan = plan._replace(untied=True)
    return plan._replace(notes=tuple(notes))


TIE = "tie_word_embeddings"


def _untied(record: Mapping[str, Any]) -> dict[str, Any]:
    """A config that ties no head to an embedding, nor does that of the text model in one of images and text."""
    inner = record.get("text_config")
    more = {"text_config": dict(inner) | {TIE: False}} if isinstance(inner, Mapping) and TIE in inner else {}
    return dict(record) | {TIE: False} | more


def _is_embedding(plan: _Plan, head: Layer, table: str) -> bool:
    """Whether a head holds what is written of the embedding, or what that was before factors were added to it.

    The latter is what PEFT writes beside an adapted embedding (save_embedding_layers), and no head that was trained.
    """
    value, entry, own = head.tensors["value"], plan.base.entries[table], plan.placed.get(table, [])
    if tuple(value.shape) != entry.shape:
        return False
    dtype, whole = plan.written(entry), [layer for layer in own if layer.kind == "full"]
    layout = plan.layouts.get(table, "out_in")
    length = (
        max(ELEMENTS // max(entry.shape[1], 1), 1) if blocks.divisible(own, entry.shape, layout) else entry.shape[0]
    )
    same = {"merged": True, "before": True}
    shard = next(shard for shard in plan.base.shards if entry in shard.entries)
    with shard.file.open("rb") as opened:
        for start in range(0, entry.shape[0], length):
            stop = min(start + length, entry.shape[0])
            base = shards.read(opened, entry, start, stop)
            mine = _cast(head.key, np.asarray(value[start:stop], np.float32), dtype)
            for name, layers in (("merged", own), ("before", whole)):
                exact = base
                for layer in layers if length == entry.shape[0] else blocks.part(layers, start, stop) or ():
                    exact = merged(layer, exact, layout)
                same[name] &= np.array_equal(mine, _cast(table, exact, dtype))
            if not any(same.values()):
                return False
    return True


NOT_COPIED = ("adapter_config.json", "adapter.json")


def _check_quantised(folder: Path) -> None:
    file = folder / "config.json"
    if reading.has(file):
        method = reading.read_json(file).get("quantization_config")
        if method:
            name = method.get("quant_method", "") if isinstance(method, Mapping) else ""
            raise ValueError(
                f"'{folder}' is quantised ({name or 'quantization_config in config.json'}): merge into the model "
                "before it was quantised, and quantise again"
            )


def _check_out(plan: _Plan, force: bool) -> None:
    out, base = plan.out, plan.base.folder
    if out.resolve() == base.resolve() or base.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"'{out}' is the base, or holds it: name another folder, the base stays as it is")
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise FileExistsError(f"'{out}' is there and is no folder: name another one")
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return
    if not force:
        raise FileExistsError(f"'{out}' is there: name another folder, or pass --force (force=True) to replace it")
    if not any(name.endswith(".safetensors") for name in names) or any(path.is_dir() for path in out.iterdir()):
        raise FileExistsError(f"'{out}' is no checkpoint that could be replaced: it holds {', '.join(names[:3])}")


def _no_link(temporary: Path) -> Any:
    raise FileExistsError(f"'{temporary}' is a link: delete it")


# -- what an interrupted run left --------------------------------------------------------------------------------------


def _identity(plan: _Plan) -> str:
    """A hash of all that decides what is written: the base's headers, sizes and times, the layers, the dtype."""
    found = hashlib.sha256(repr((VERSION, plan.dtype, sorted(plan.layouts.items()))).encode())
    for shard in plan.base.shards:
        status = shard.file.stat()
        found.update(repr((shard.file.name, status.st_size, status.st_mtime_ns, shard.entries)).encode())
    for layer in [layer for own in plan.placed.values() for layer in own] + list(plan.added):
        found.update(repr((layer.key, layer.kind, layer.scale)).encode())
        for name, x in sorted(layer.tensors.items()):
            x = np.ascontiguousarray(x)
            found.update(repr((name, x.shape, str(x.dtype))).encode())
            found.update(x.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


Done = dict[str, dict[str, Any]]


def _resumed(plan: _Plan) -> Done:
    """The files that are whole already, with their part of the report; all else in the temporary folder is deleted."""
    file = plan.temporary / STATE
    found: Done = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        state = reading.read_json(file, 2**28)
        if state.get("made_of") == _identity(plan):
            for name, row in state["done"].items():
                path = plan.temporary / name
                if path.is_file() and shards.digest(path) == (row["size"], row["sha256"]):
                    found[name] = row
    for path in plan.temporary.iterdir():
        if path.name not in (*found, LOCK):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if found:
        _note(plan, found)
    return found


def _note(plan: _Plan, done: Done) -> None:
    file = plan.temporary / STATE
    temporary = file.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps({"made_of": _identity(plan), "done": done}), encoding="utf-8")
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_room(plan: _Plan, done: Done) -> None:
    needed = sum(plan.size(shard) for shard in plan.base.shards if shard.file.name not in done)
    free = shutil.disk_usage(plan.temporary).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are to be written, and {free:,} are free")


def _full(plan: _Plan, done: Done, error: OSError) -> OSError:
    count = len(plan.base.shards)
    kept = f"{len(done)} of {count} files are done and kept in '{plan.temporary}'" if done else "nothing was written"
    return OSError(
        error.errno, f"the disk is full ({error.strerror}); {kept}: make room and run it again", str(plan.out)
    )


# -- writing -----------------------------------------------------------------------------------------------------------


def _write_shards(plan: _Plan, done: Done, progress: Progress | None) -> None:
    whole = sum(map(plan.size, plan.base.shards))
    place = 0
    for shard in plan.base.shards:
        if shard.file.name in done:
            place += plan.size(shard)
            continue
        rows: list[Merged] = []
        hashed = hashlib.sha256()
        target = plan.temporary / shard.file.name
        with shards.writing(target) as write, shard.file.open("rb") as opened:

            def put(content: Any, write: Callable[[Any], None] = write, hashed: Any = hashed) -> None:
                write(content)
                hashed.update(content)

            put(shards.header(plan.rows(shard), shard.metadata or {"format": "pt"}))
            for entry in shard.entries:
                if progress:
                    progress(place, whole, entry.key)
                _write_tensor(plan, entry, opened, put, rows)
                place += entry.size * shards.BITS[plan.written(entry)] // shards.BITS[entry.dtype]
            if shard is plan.base.shards[-1]:
                for layer in plan.added:
                    put(_bytes(_cast(layer.key, np.asarray(layer.tensors["value"], np.float32), plan.default)))
        done[shard.file.name] = {
            "size": target.stat().st_size, "sha256": hashed.hexdigest(), "merged": [row._asdict() for row in rows],
        }  # fmt: skip
        try:
            _note(plan, done)
        except BaseException:
            del done[shard.file.name]
            raise
    if progress:
        progress(whole, whole, "")


def _write_tensor(
    plan: _Plan, entry: Entry, opened: BufferedReader, put: Callable[[Any], None], rows: list[Merged]
) -> None:
    dtype = plan.written(entry)
    if entry.key in plan.placed:
        rows.append(_write_merged(entry, plan.placed[entry.key], plan.layouts[entry.key], dtype, opened, put))
    elif dtype == entry.dtype:
        for content in shards.chunks(opened, entry):
            put(content)
    else:
        for content in shards.chunks(opened, entry):
            put(_bytes(_cast(entry.key, np.frombuffer(content, FLOATS[entry.dtype]).astype(np.float32), dtype)))


def _write_merged(
    entry: Entry,
    layers: Sequence[Layer],
    layout: Layout,
    dtype: str,
    opened: BufferedReader,
    put: Callable[[Any], None],
) -> Merged:
    """Some rows at a time, where that is the same."""
    sums = np.zeros(3)
    length = max(ELEMENTS // max(math.prod(entry.shape[1:]), 1), 1)
    if not blocks.divisible(layers, entry.shape, layout) or length >= entry.shape[0]:
        sums += _put_merged(entry, layers, layout, dtype, shards.read(opened, entry), put)
    else:
        for start in range(0, entry.shape[0], length):
            stop = min(start + length, entry.shape[0])
            own = blocks.part(layers, start, stop)
            assert own is not None
            sums += _put_merged(entry, own, layout, dtype, shards.read(opened, entry, start, stop), put)
    before, update, lost = (float(x) for x in np.sqrt(sums))
    ratio = lambda a, b: a / b if b else 0.0
    return Merged(entry.key, _kinds(layers), entry.shape, dtype, ratio(update, before), ratio(lost, update))


def _put_merged(
    entry: Entry,
    layers: Sequence[Layer],
    layout: Layout,
    dtype: str,
    base: np.ndarray,
    put: Callable[[Any], None],
) -> np.ndarray:
    exact = base
    for layer in layers:
        exact = merged(layer, exact, layout)
    value = _cast(entry.key, exact, dtype)
    put(_bytes(value))
    return _squares(base, exact, value)


def _cast(key: str, exact: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = exact.astype(FLOATS[dtype])
    if dtype == "F16" and not np.isfinite(value).all() and np.isfinite(exact).all():
        raise ValueError(f"{key!r} reaches {np.abs(exact).max():.3g}, beyond float16: pass dtype bfloat16 or float32")
    return value


def _squares(base: np.ndarray, exact: np.ndarray, value: np.ndarray) -> np.ndarray:
    """|base|^2, |exact - base|^2 and |value - exact|^2, in double precision and some elements at a time."""
    sums = np.zeros(3)
    flat = [x.reshape(-1) for x in (base, exact, value)]
    for start in range(0, base.size, CHUNK):
        w, v, r = (x[start : start + CHUNK].astype(np.float32) for x in flat)
        sums += [np.sum(np.square(x), dtype=np.float64) for x in (w, v - w, r - v)]
    return sums


def _bytes(value: np.ndarray) -> memoryview:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _write_others(plan: _Plan) -> None:
    temporary = plan.temporary
    for path in plan.others:
        shutil.copyfile(reading.regular(path), temporary / path.name)
    config = temporary / fit.CONFIG
    if (plan.dtype or plan.untied) and config.exists():
        record = reading.read_json(config)
        name = next((name for name, short in DTYPES.items() if short == plan.dtype), None)
        record |= {field: name for field in ("dtype", "torch_dtype") if field in record and name}
        record = _untied(record) if plan.untied else record
        config.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if plan.base.index_file is not None:
        record = reading.read_json(plan.base.index_file, shards.LARGEST_INDEX)
        size = sum(map(plan.size, plan.base.shards))
        last = plan.base.shards[-1].file.name
        record["metadata"] = (record.get("metadata") or {}) | {"total_size": size}
        record["weight_map"] |= {layer.key: last for layer in plan.added}
        (temporary / plan.base.index_file.name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _into_place(temporary: Path, out: Path) -> None:
    """Gives the temporary folder its name; what was there is moved aside first, and back if that fails."""
    for name in (STATE, LOCK):
        (temporary / name).unlink(missing_ok=True)
    aside = out.with_name(f".{out.name}.replaced")
    there = out.exists() and any(out.iterdir())
    if there:
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
    try:
        temporary.rename(out)
    except BaseException:
        if there:
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
