"""An adapter on disk: the factors as safetensors, and one JSON that says what they are."""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from safetensors.numpy import save as serialise

from jlora import tree
from jlora.adapted.adapted import Adapted, check_activations, from_arrays, to_arrays
from jlora.adapted.select import Extra, check_rows, is_trainable
from jlora.checkpoint.fingerprint import fingerprint
from jlora.checkpoint.folder import NAME, open_file, open_tensors, read, replace
from jlora.checkpoint.place import folder_of
from jlora.checkpoint.processes import of_first, together, whole
from jlora.checkpoint.record import FORMAT, LARGEST, OF, VERSION, check_record, decode, naming, parse, read_record
from jlora.checkpoint.store import Store, is_stored
from jlora.checkpoint.tensors import (
    Read,
    Tensors,
    check_described,
    check_finite,
    expected_tensors,
    read_tensors,
    some,
)
from jlora.methods import Constructor, constructors, named_constructors, to_json
from jlora.transform.sites import Target

_ATTEMPTS = 100  # to read an adapter that is replaced again and again
_LOOKS = 10  # for the file that process 0 has found, by all processes


def save(folder: str | os.PathLike[str], adapted: Adapted) -> None:
    """Writes what was trained: `adapter.json` and `factors-<hash>.safetensors`, which holds the factors bit for bit.

    An adapter that is there is replaced in one step: the tensors go to a file of their own name first, and the JSON,
    which names that file, is renamed into place last. Interrupted at any moment, or on a full disk, the folder holds
    the old adapter or the new one. Several processes may save at once: the last one's adapter stays. What a killed
    process left is deleted by the next `save`.

    Args:
      folder: a local one, or its `file://` URL; made if absent.
      adapted: from `apply`. Its base is not written; its `fingerprint` is.

    Raises:
      OSError: if the disk is full or the folder cannot be written; what was there stays.
      ValueError: if the factors are not those of this adapter, not float32 or not finite, or it could not be loaded for
        another reason; what was there stays.

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
    if tree.is_abstract(adapted):
        raise TypeError("save: this adapter holds shapes (jax.ShapeDtypeStruct) and no arrays")
    store = Store(folder) if is_stored(folder) else None
    at = folder_of(folder) if store is None else store.address
    file = f"{at}/{NAME}" if isinstance(at, str) else at / NAME
    with together():
        named, _ = tree.leaves(adapted.base)
        tensors = _host(to_arrays(adapted))
        expected = expected_tensors(named, adapted.method, adapted.sites, adapted.extras)
        check_described(at, {name: (x.shape, str(x.dtype)) for name, x in tensors.items()}, expected)
        check_finite(at, tensors)
        content = serialise(tensors)
        digest = hashlib.sha256(content).hexdigest()
        record = describe(adapted)
        _check_loadable(file, record, named, constructors(adapted.method))

    def text(tensors: str) -> bytes:
        return (json.dumps(record | {"tensors": {"file": tensors, "sha256": digest}}, indent=1) + "\n").encode()

    with together():
        if jax.process_index() > 0:
            pass
        elif store is not None:
            store.replace(content, text, lambda: _named_in(store))
        else:
            _replace(Path(at), digest, content, text)


def load(
    folder: str | os.PathLike[str], params: Any, *, any_base: bool = False, methods: Iterable[Constructor] = ()
) -> Adapted:
    """Reads an adapter onto the parameters that it was trained on. All is checked before anything is built.

    What is read need not be trusted: only regular files in the folder are opened (the links of a hub's snapshot to its
    own blobs are followed), their sizes are bounded before they
    are read, and what they say goes through the checks of `apply`. A writer beside it may replace the adapter: the old
    one or the new one is read.

    Processes that train together all call this, and each reads the folder: all get the same adapter. Its factors are
    whole in every process, and `train_step` puts them where they belong.

    Args:
      folder: where `save` wrote.
      params: the base.
      any_base: also accept a base of another fingerprint, such as a cast or a further trained copy. Shapes must agree,
        and rows that were trained be there.
      methods: constructors of methods of your own, which a file names by their `__name__`. Nothing is imported because
        a file names it.

    Raises:
      FileNotFoundError: if there is no adapter in the folder, or one of several processes does not see it.
      ImportError, OSError: if it lies in an object store for which a package is missing, or that does not give it.
      ValueError: for a file that is no adapter, of another version or damaged; an unknown method; another base;
        missing, unexpected or misshaped tensors; values that are not finite. It names the file, and each tensor. For
        `methods` that are no constructors, or of which one has the name of a method of jlora.
    """
    methods = tuple(named_constructors(methods).values())
    if is_stored(folder):
        return _from_store(Store(folder), params, any_base, methods)
    folder = folder_of(folder)
    record, opened = _opened(folder)
    with opened:
        file = folder / record["tensors"]["file"]
        return _onto(params, record, functools.partial(read, opened, file), folder / NAME, file, any_base, methods)


def _onto(
    params: Any,
    record: dict[str, Any],
    content: Read,
    file: Path | str,
    tensors_file: Path | str,
    any_base: bool,
    methods: tuple[Constructor, ...],
) -> Adapted:
    """The adapter of a record and the tensors that belong to it, onto a base."""
    with naming(file):
        method, sites, extras = decode(record, methods)
    params = tree.canonical(params)
    named, _ = tree.leaves(params)
    _check_base(file, named, sites, extras, any_base)
    sites = _with_dtypes(sites, named)
    here = None if any_base else fingerprint(params, _replaced(extras))
    if here is not None and record["base"] != here:
        held = held_otherwise(record, named)
        raise ValueError(
            f"'{file}': the adapter was trained on another base: its fingerprint is {record['base']}, that of "
            f"these parameters {here}{held}. Load it onto its own base; any_base=True takes a cast or changed copy"
        )
    with naming(file):
        expected = expected_tensors(named, method, sites, extras)
    with together():
        tensors = read_tensors(content, tensors_file, record["tensors"]["sha256"], file, expected)
    factors: dict[str, dict[str, jax.Array]] = {}
    for name, value in tensors.items():
        path, part = name.rsplit("/", 1)
        factors.setdefault(path, {})[part] = jax.device_put(value)
    with naming(file):
        adapted = from_arrays(params, factors, method, sites, extras)
        check_activations(adapted)
    return adapted


def describe(adapted: Adapted, base: str | None = None) -> dict[str, Any]:
    """Description of an adapter as JSON: all but its tensors. `base` is the base's fingerprint, where it is known.

    The fingerprint is that of the values: quantised weights and what they stand for have one. "stored" says which
    were quantised, and how.
    """
    stored = _stored(tree.leaves(adapted.base)[0])
    return ({"stored": stored} if stored else {}) | {
        "format": FORMAT,
        "version": VERSION,
        "base": fingerprint(adapted.base, _replaced(adapted.extras)) if base is None else base,
        "method": to_json(adapted.method),
        "sites": [site.to_json() for site in _with_dtypes(adapted.sites, tree.leaves(adapted.base)[0])],
        "extras": [_extra(extra) for extra in adapted.extras],
    }


def _stored(named: Mapping[str, Any]) -> dict[str, str]:
    return {path: tree.stored_as(leaf) for path, leaf in named.items() if tree.is_stored(leaf)}


def held_otherwise(record: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    """Words for how an adapter's base was quantised, if these parameters are not, or otherwise; "" if they agree."""
    there, here = record.get("stored", {}), _stored(named)
    odd = [path for path in (*there, *here) if there.get(path) != here.get(path)]
    if not odd:
        return ""
    plain = lambda of: of.get(odd[0], "a plain array")
    return f" (it was trained with {odd[0]!r} as {plain(there)}, which is {plain(here)} here)"


def _extra(extra: Extra) -> dict[str, Any]:
    fields = dataclasses.asdict(extra)
    return fields if extra.added is not None else {name: x for name, x in fields.items() if name != "added"}


def _replaced(extras: tuple[Extra, ...]) -> set[str]:
    """The leaves of which nothing of the base is left: a new head may have any initial values."""
    return {extra.path for extra in extras if extra.rows is None and extra.added is None}


def _with_dtypes(sites: tuple[Target, ...], named: Mapping[str, Any]) -> tuple[Target, ...]:
    """The sites with the dtypes that the base has: it may be a cast copy of the one that the adapter was made for."""
    return tuple(site.of_dtype(_dtype(named[site.path])) for site in sites)


def _dtype(leaf: Any) -> str:
    return str(jax.dtypes.canonicalize_dtype(leaf.dtype))


# -- reading -----------------------------------------------------------------------------------------------------------


def _named(file: Path) -> str | None:
    """The file of tensors that the JSON names that is there now."""
    try:
        name = read_record(file)["tensors"]["file"]
    except FileNotFoundError:
        return None
    return str(name)


def _stored_record(store: Store) -> dict[str, Any]:
    return check_record(store.read(NAME, LARGEST, OF), store.file(NAME))


def _named_in(store: Store) -> str | None:
    """The same of a folder in an object store."""
    try:
        return str(_stored_record(store)["tensors"]["file"])
    except FileNotFoundError:
        return None


def _from_store(store: Store, params: Any, any_base: bool, methods: tuple[Constructor, ...]) -> Adapted:
    """The adapter in an object store. A writer may replace it after the JSON was read: then that is read again."""
    file, missing = store.file(NAME), None
    for _ in range(_ATTEMPTS):
        try:
            record = of_first(lambda: _stored_record(store))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no adapter in '{store.address}': there is no {NAME}") from error
        name = record["tensors"]["file"]
        try:
            content = functools.partial(store.read, name)
            return _onto(params, record, content, file, store.file(name), any_base, methods)
        except FileNotFoundError as error:
            if name == missing:
                raise ValueError(f"'{store.file(name)}' is missing: '{file}' names it") from error
            missing = name
    raise ValueError(f"'{file}' was replaced each of the {_ATTEMPTS} times that it was read")


def _opened(folder: Path) -> tuple[dict[str, Any], BinaryIO]:
    """The JSON of an adapter, and the file of tensors that it names, open: the same in all processes."""
    mine: list[BinaryIO] = []

    def record_here() -> dict[str, Any]:
        record, opened = _pair(folder)
        mine.append(opened)
        return record

    for attempt in range(1, _LOOKS + 1):
        record = of_first(record_here)
        file = folder / record["tensors"]["file"]
        try:
            with together():
                if not mine:
                    mine.append(_open_here(file))
            return record, mine[0]
        except FileNotFoundError:  # replaced since the first process has read the JSON, or not to be seen from here
            for opened in mine:
                opened.close()
            mine.clear()
            if attempt == _LOOKS:
                raise
            time.sleep(0.2)  # a network's file system shows a new file late
    raise AssertionError("unreachable")


def _open_here(file: Path) -> BinaryIO:
    try:
        return open_file(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"process {jax.process_index()} does not find '{file}', which process 0 does: several processes load an "
            "adapter from a folder that all of them see"
        ) from error


def _pair(folder: Path) -> tuple[dict[str, Any], BinaryIO]:
    """The JSON of an adapter, and the file of tensors that it names, open.

    A writer may replace both after the JSON was read. Then the files of tensors that are there are opened before the
    JSON is read again: those that are deleted in between stay readable.
    """
    if not os.path.exists(folder / NAME):  # Path.exists raises for a name that is too long
        near = sorted(path.parent.name for path in folder.glob(f"*/{NAME}")) if os.path.isdir(folder) else []
        hint = f"; its folders {', '.join(map(repr, near[:5]))} hold one" if near else ""
        raise FileNotFoundError(f"no adapter in '{folder}': there is no {NAME}{hint}")
    held: dict[str, BinaryIO] = {}
    missing = None
    try:
        for _ in range(_ATTEMPTS):
            record = read_record(folder / NAME)
            name = record["tensors"]["file"]
            opened = held.pop(name, None)
            with contextlib.suppress(FileNotFoundError):
                opened = opened or open_file(folder / name)
            if opened is not None:
                return record, opened
            if name == missing:
                raise ValueError(f"'{folder / name}' is missing: '{folder / NAME}' names it")
            _close(held)
            missing, held = name, open_tensors(folder)
    finally:
        _close(held)
    raise ValueError(f"'{folder / NAME}' was replaced each of the {_ATTEMPTS} times that it was read")


def _close(held: Mapping[str, BinaryIO]) -> None:
    for opened in held.values():
        opened.close()


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_loadable(
    file: Path | str, record: Mapping[str, Any], named: Mapping[str, Any], methods: Iterable[Constructor]
) -> None:
    """Raises ValueError for an adapter that `load` would refuse."""
    content = json.dumps(record, indent=1).encode()
    if len(content) > LARGEST // 2:
        raise ValueError(f"'{file}' would have {len(content)} bytes, and at most {LARGEST // 2} are written")
    with naming(file):
        _, sites, extras = decode(parse(content, file), methods)
    _check_base(file, named, sites, extras, any_base=False)


def _check_base(
    file: Path | str, named: Mapping[str, Any], sites: tuple[Target, ...], extras: tuple[Extra, ...], any_base: bool
) -> None:
    wrong: list[str] = []
    parts: tuple[Target | Extra, ...] = (*sites, *extras)
    for part in parts:
        if part.path not in named:
            near = difflib.get_close_matches(part.path, named, n=1, cutoff=0.0) if len(wrong) < 6 else []
            wrong.append(f"{part.path!r} is not among the parameters{f' (the closest is {near[0]!r})' if near else ''}")
            continue
        leaf = named[part.path]
        shape = tuple(np.shape(leaf))
        if isinstance(part, Target) and part.shape != shape:
            wrong.append(f"{part.path!r} has shape {shape} in the parameters and {part.shape} in the adapter")
        elif not is_trainable(leaf):
            dtype = getattr(leaf, "dtype", type(leaf).__name__)
            wrong.append(f"{part.path!r} has dtype {dtype} in the parameters, which cannot be trained")
        elif isinstance(part, Target) and not any_base and _dtype(leaf) != part.dtype:
            wrong.append(f"{part.path!r} has dtype {_dtype(leaf)} in the parameters and {part.dtype} in the adapter")
    if wrong:
        raise ValueError(f"'{file}': the adapter was trained on another base: {some(wrong)}")
    with naming(file):
        for extra in extras:
            check_rows(extra, named[extra.path])


# -- writing -----------------------------------------------------------------------------------------------------------


def _host(factors: Mapping[str, Mapping[str, jax.Array]]) -> Tensors:
    return {f"{path}/{name}": whole(value) for path, arrays in factors.items() for name, value in arrays.items()}


def _replace(folder: Path, digest: str, content: bytes, text: Callable[[str], bytes]) -> None:
    file = folder / NAME
    try:
        replace(folder, digest, content, text, lambda: _named(file))
    except OSError as error:
        words = f"saving the adapter: {error.strerror}; {_kept(file, digest)}"
        raise OSError(error.errno, words, str(folder)) from error


def _kept(file: Path, digest: str) -> str:
    """Content of a folder after a `save` that failed."""
    if not os.path.isfile(file):
        return "no adapter was written"
    try:
        there = read_record(file)["tensors"]["sha256"]
    except (OSError, ValueError):
        there = None
    if there == digest:
        return "the new adapter is there, perhaps not yet on the disk"
    return "the adapter that was there is unchanged"
