"""An adapter on disk: the factors as safetensors, and one JSON that says what they are."""

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

from jlora import tree
from jlora.adapt import Adapted, extra_shapes, rebuild, shared_shapes, stored
from jlora.checkpoint.fingerprint import fingerprint
from jlora.checkpoint.place import folder_of
from jlora.methods import Method, from_json, to_json
from jlora.methods.method import SHARED
from jlora.select import Extra
from jlora.sites import Site

FORMAT, VERSION = "jlora adapter", 1
NAME = "adapter.json"
Tensors = dict[str, np.ndarray]


def save(folder: str | os.PathLike[str], adapted: Adapted) -> None:
    """Writes what was trained: `adapter.json` and `factors-<hash>.safetensors`, which holds the factors bit for bit.

    An adapter that is there is replaced in one step: the tensors go to a file of their own name first, and the JSON,
    which names that file, is renamed into place last. Interrupted at any moment, or on a full disk, the folder holds
    the old adapter or the new one.

    Args:
      folder: a local one, or its `file://` URL; made if absent.
      adapted: from `apply`. Its base is not written; its `fingerprint` is.

    Raises:
      OSError: if the disk is full or the folder cannot be written; what was there stays.
      ValueError: if the factors are not those of this adapter, not float32, not finite, or spread over several
        processes; what was there stays.

    Example:
      >>> import jax.numpy as jnp, jlora, tempfile
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> folder = tempfile.mkdtemp()
      >>> jlora.save(folder, jlora.apply(params, rank=1))
      >>> jlora.load(folder, params).sites[0].rank
      1
    """
    if not isinstance(adapted, Adapted):
        raise TypeError(f"save takes a folder and an Adapted (state.adapted of a state), got {type(adapted).__name__}")
    folder = folder_of(folder)
    named, _ = tree.leaves(adapted.base)
    tensors = _host(stored(adapted))
    _check_tensors(folder, tensors, _expected(named, adapted.method, adapted.sites, adapted.extras))
    content = serialise(tensors)
    digest = hashlib.sha256(content).hexdigest()
    file = f"factors-{digest[:16]}.safetensors"
    replaced = _tensor_file(folder)
    text = json.dumps(describe(adapted) | {"tensors": {"file": file, "sha256": digest}}, indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / file, content)
        _write(folder / NAME, text.encode())
    except OSError as error:
        kept = "the adapter that was there is unchanged" if (folder / NAME).exists() else "no adapter was written"
        raise OSError(error.errno, f"saving the adapter: {error.strerror}; {kept}", str(folder)) from error
    if replaced not in (None, file):
        (folder / replaced).unlink(missing_ok=True)


def load(folder: str | os.PathLike[str], params: Any, *, any_base: bool = False) -> Adapted:
    """Reads an adapter onto the parameters that it was trained on. All is checked before anything is built.

    Args:
      folder: where `save` wrote.
      params: the base.
      any_base: also accept a base of another fingerprint, such as a cast or a further trained copy. Shapes must agree.

    Raises:
      FileNotFoundError: if there is no adapter in the folder.
      ValueError: for a file that is no adapter, of another version or damaged; an unknown method; another base;
        missing, unexpected or misshaped tensors; values that are not finite. It names the file, and each tensor.
    """
    folder = folder_of(folder)
    file = folder / NAME
    if not file.exists():
        near = sorted(path.parent.name for path in folder.glob(f"*/{NAME}")) if folder.is_dir() else []
        hint = f"; its folders {', '.join(map(repr, near[:5]))} hold one" if near else ""
        raise FileNotFoundError(f"no adapter in '{folder}': there is no {NAME}{hint}")
    record = _record(file)
    try:
        method, sites, extras = from_json(record["method"]), _sites(record["sites"]), _extras(record["extras"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"'{file}': {_reason(error)}") from error
    params = tree.canonical(params)
    named, _ = tree.leaves(params)
    _check_base(file, named, sites, extras)
    tensors = _tensors(folder, record)
    _check_tensors(folder / record["tensors"]["file"], tensors, _expected(named, method, sites, extras))
    here = None if any_base else fingerprint(params, _replaced(extras))
    if here is not None and record["base"] != here:
        raise ValueError(
            f"'{file}': the adapter was trained on another base: its fingerprint is {record['base']}, that of these "
            f"parameters {here}. Load it onto its own base; any_base=True takes a cast or changed copy"
        )
    factors: dict[str, dict[str, jax.Array]] = {}
    for name, value in tensors.items():
        path, part = name.rsplit("/", 1)
        factors.setdefault(path, {})[part] = jax.device_put(value)
    return rebuild(params, factors, method, sites, extras)


def describe(adapted: Adapted, base: str | None = None) -> dict[str, Any]:
    """What an adapter is, as JSON: all but its tensors. `base` is the base's fingerprint, where it is known."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "base": fingerprint(adapted.base, _replaced(adapted.extras)) if base is None else base,
        "method": to_json(adapted.method),
        "sites": [dataclasses.asdict(site) for site in adapted.sites],
        "extras": [dataclasses.asdict(extra) for extra in adapted.extras],
    }


def _replaced(extras: tuple[Extra, ...]) -> set[str]:
    """The leaves of which nothing of the base is left: a new head may have any initial values."""
    return {extra.path for extra in extras if extra.rows is None}


# -- reading -----------------------------------------------------------------------------------------------------------


def _record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' is no JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"'{file}' is no adapter of jlora: its 'format' is not {FORMAT!r}")
    if record.get("version") != VERSION:
        raise ValueError(
            f"'{file}' has format version {record.get('version')!r}, this jlora reads version {VERSION}: update jlora"
        )
    absent = [name for name in ("base", "method", "sites", "extras", "tensors") if name not in record]
    if absent:
        raise ValueError(f"'{file}' lacks {', '.join(map(repr, absent))}")
    return record


def _sites(records: list[dict[str, Any]]) -> tuple[Site, ...]:
    return tuple(Site(**{name: _frozen(value) for name, value in record.items()}) for record in records)


def _extras(records: list[dict[str, Any]]) -> tuple[Extra, ...]:
    return tuple(Extra(**{name: _frozen(value) for name, value in record.items()}) for record in records)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _tensors(folder: Path, record: Mapping[str, Any]) -> Tensors:
    file = folder / str(record["tensors"]["file"])
    if not file.exists():
        raise ValueError(f"'{file}' is missing: '{folder / NAME}' names it")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != record["tensors"]["sha256"]:
        raise ValueError(f"'{file}' is damaged: it is not the file that '{folder / NAME}' was written with (sha256)")
    try:
        return parse(content)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"'{file}' is no safetensors file: {error}") from error


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_base(file: Path, named: Mapping[str, Any], sites: tuple[Site, ...], extras: tuple[Extra, ...]) -> None:
    wrong = []
    for path, shape in {**{s.path: s.shape for s in sites}, **{e.path: None for e in extras}}.items():
        if path not in named:
            near = difflib.get_close_matches(path, named, n=1, cutoff=0.0)
            wrong.append(f"{path!r} is not among the parameters{f' (the closest is {near[0]!r})' if near else ''}")
        elif shape is not None and tuple(np.shape(named[path])) != shape:
            wrong.append(
                f"{path!r} has shape {tuple(np.shape(named[path]))} in the parameters and {shape} in the adapter"
            )
    if wrong:
        raise ValueError(f"'{file}': the adapter was trained on another base: {_some(wrong)}")


def _expected(
    named: Mapping[str, Any], method: Method, sites: tuple[Site, ...], extras: tuple[Extra, ...]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor that the adapter has to hold."""
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    key = jax.eval_shape(lambda: jax.random.key(0))
    for site in sites:
        w = jax.ShapeDtypeStruct(site.shape, named[site.path].dtype)
        arrays = jax.eval_shape(lambda key, w, site=site: method.init(key, w, site), key, w)
        expected |= {f"{site.path}/{name}": (a.shape, str(a.dtype)) for name, a in arrays.items()}
    expected |= {f"{SHARED}/{name}": (shape, "float32") for name, shape in shared_shapes(method, sites).items()}
    for extra in extras:
        shapes = extra_shapes(extra, named[extra.path])
        expected |= {f"{extra.path}/{name}": (shape, "float32") for name, shape in shapes.items()}
    return expected


def _check_tensors(file: Path, tensors: Tensors, expected: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    wrong = [f"{name!r} is missing" for name in expected if name not in tensors]
    wrong += [f"{name!r} is unexpected" for name in tensors if name not in expected]
    for name, value in tensors.items():
        if name in expected and (value.shape, str(value.dtype)) != expected[name]:
            shape, dtype = expected[name]
            wrong.append(f"{name!r} is {value.dtype} of shape {value.shape}, expected {dtype} of shape {shape}")
        elif not np.isfinite(value).all():
            wrong.append(f"{name!r} has values that are not finite")
    if wrong:
        raise ValueError(f"'{file}': {_some(wrong)}")


def _some(wrong: list[str], limit: int = 6) -> str:
    return "; ".join(wrong[:limit]) + (f"; and {len(wrong) - limit} more" if len(wrong) > limit else "")


def _tensor_file(folder: Path) -> Any:
    """The name of the tensors' file of the adapter that is in the folder, None if there is none."""
    try:
        name = json.loads((folder / NAME).read_text())["tensors"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and re.fullmatch(r"factors-[0-9a-f]{16}\.safetensors", name) else None


# -- writing -----------------------------------------------------------------------------------------------------------


def _host(factors: Mapping[str, Mapping[str, jax.Array]]) -> Tensors:
    flat = {f"{path}/{name}": value for path, arrays in factors.items() for name, value in arrays.items()}
    for name, value in flat.items():
        if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
            raise ValueError(f"{name!r} is spread over several processes: replicate the factors before saving")
    return {name: np.ascontiguousarray(value) for name, value in jax.device_get(flat).items()}


def _write(file: Path, content: bytes) -> None:
    """Writes a file: afterwards it is there, whole and on the disk, or as it was before."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
        if os.name == "posix":  # the name is on the disk when its folder is
            descriptor = os.open(file.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    finally:
        temporary.unlink(missing_ok=True)
