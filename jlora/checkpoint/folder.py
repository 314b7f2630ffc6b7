"""An adapter's folder among processes: which files are opened, how one adapter takes another's place, what is swept.

`adapter.json` names the file of tensors that belongs to it, and is renamed into place when that file is whole. A
writer makes its file of tensors anew, under a name that no file has, and holds a lock on it until the JSON names it. So
whoever gets the lock of a file that the JSON does not name knows that nobody will name it any more: its writer was
killed, or its adapter replaced. Where there are no locks, the age of a file decides.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "adapter.json"
TENSORS = re.compile(r"factors-([0-9a-f]{16})\.safetensors")
GRACE = 3600.0  # seconds after which a file without a lock of its own, where there are no locks, is nobody's
_TEMPORARY = re.compile(rf"\.(?:{re.escape(NAME)}|{TENSORS.pattern})\.(\w+)\.tmp")

# -- reading -----------------------------------------------------------------------------------------------------------


def open_file(file: Path) -> BinaryIO:
    """Opens a regular file that lies in its folder, without waiting for anything.

    From a snapshot in a cache of the Hugging Face hub, whose files are links to ../../blobs, those of the same
    repository are opened too.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: for a folder, a pipe, a device, or a link that leads out of the folder.
    """
    real = os.path.realpath(file)
    folder = Path(os.path.realpath(file.parent))
    if not any(Path(real).is_relative_to(within) for within in (folder, *_blobs(folder))):
        raise ValueError(f"'{file}' is a link that leads out of its folder, to '{real}': put a copy in its place")
    if os.path.islink(real):
        raise ValueError(f"'{file}' is a link that leads to itself")
    if not stat.S_ISREG(os.stat(real).st_mode):
        raise ValueError(f"'{file}' is no regular file")
    flags = os.O_RDONLY | _flag("O_NONBLOCK") | _flag("O_NOFOLLOW") | _flag("O_CLOEXEC") | _flag("O_BINARY")
    descriptor = os.open(real, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"'{file}' is no regular file")
    return os.fdopen(descriptor, "rb")


def _blobs(folder: Path) -> Iterator[Path]:
    """Where the files of a hub's snapshot lie; `folder` has no links in it, and its blobs are to lie beside it."""
    return (parent.parent.parent / "blobs" for parent in (folder, *folder.parents) if parent.parent.name == "snapshots")


def read(opened: BinaryIO, file: Path, limit: int, of: str) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
      ValueError: if it is larger; it is not read then. `of` says what the limit is that of.
    """
    size = os.fstat(opened.fileno()).st_size
    if size > limit:
        raise ValueError(f"'{file}' has {size} bytes, and {of} at most {limit}")
    return opened.read(size)


def open_tensors(folder: Path) -> dict[str, BinaryIO]:
    """The files of tensors in a folder, by name, open: as long as they are, they can be read, deleted or not."""
    held = {}
    for name in sorted(os.listdir(folder))[:256]:
        if TENSORS.fullmatch(name):
            with contextlib.suppress(OSError, ValueError):
                held[name] = open_file(folder / name)
    return held


# -- writing -----------------------------------------------------------------------------------------------------------


def replace(folder: Path, digest: str, content: bytes, text: Callable[[str], bytes], named: Callable[[], Any]) -> None:
    """Puts an adapter in the place of the one that is there, or of none.

    Args:
      folder: made if absent.
      digest: of the content, in hexadecimal digits: the file of tensors is named by it, or, where there is one of that
        name, by chance.
      content: the tensors.
      text: file of tensors -> the JSON that names it.
      named: reads which file the JSON names that is there now; None if there is no JSON. What it raises means that this
        cannot be told, and nothing is swept then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / NAME).is_dir():  # found only by the last rename, when the tensors lie there
        raise IsADirectoryError(errno.EISDIR, f"'{NAME}' is a folder")
    sweep(folder, named)
    file, descriptor = _created(folder, digest[:16])
    temporary = _temporary(file)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as out:
            _filled(out, content)
        _settled(folder)
        _delete(temporary)
        with temporary.open("xb") as out:
            _filled(out, text(file.name))
        temporary.replace(folder / NAME)
        _settled(folder)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)
            if named() != file.name:
                file.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    sweep(folder, named)


def sweep(folder: Path, named: Callable[[], Any]) -> None:
    """Deletes what replaced adapters and killed writers left: no file that the JSON names or a writer is at work on."""
    with contextlib.suppress(OSError, ValueError):
        names, current = os.listdir(folder), named()
        for name in names:
            file = folder / name
            if TENSORS.fullmatch(name) and name != current:
                with _abandoned(file) as abandoned:
                    if abandoned and named() != name:  # read again: its writer may have ended in between
                        _delete(_temporary(file))
                        _delete(file)
        for name in names:
            owner = _TEMPORARY.fullmatch(name)  # written while the file of tensors of that name is there
            if owner and not (folder / f"factors-{owner[2]}.safetensors").exists():
                _delete(folder / name)


def _created(folder: Path, name: str) -> tuple[Path, int]:
    """A new file of tensors, and its descriptor, which holds its lock."""
    while True:
        file = folder / f"factors-{name}.safetensors"
        name = secrets.token_hex(8)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _flag("O_CLOEXEC") | _flag("O_BINARY")
        try:
            descriptor = os.open(file, flags, 0o666)
        except FileExistsError:
            continue
        mine = False
        try:
            mine = _locked(descriptor) is not False and _is_at(descriptor, file)
        finally:
            if not mine:
                os.close(descriptor)  # somebody who sweeps came first
        if mine:
            return file, descriptor


@contextlib.contextmanager
def _abandoned(file: Path) -> Iterator[bool]:
    """Whether nobody is at work on a file of tensors; while this is entered, nobody begins to."""
    flags = os.O_RDWR | _flag("O_NONBLOCK") | _flag("O_NOFOLLOW") | _flag("O_CLOEXEC") | _flag("O_BINARY")
    descriptor = None
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.lstat(file).st_mode):
            descriptor = os.open(file, flags)
    if descriptor is None:
        yield False
        return
    try:
        free = _locked(descriptor)
        if free is None:
            free = time.time() - os.fstat(descriptor).st_mtime > GRACE
        yield free and _is_at(descriptor, file)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool | None:
    """Takes a file's lock, until the descriptor is closed; False if another has it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except FileNotFoundError:
        return False


def _filled(out: BinaryIO, content: bytes) -> None:
    out.write(content)
    out.flush()
    os.fsync(out.fileno())


def _settled(folder: Path) -> None:
    """A name is on the disk when its folder is."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary(file: Path) -> Path:
    """The JSON's name while it is written by the writer of a file of tensors."""
    found = TENSORS.fullmatch(file.name)
    assert found
    return file.with_name(f".{NAME}.{found[1]}.tmp")


def _delete(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)


def _flag(name: str) -> int:
    return int(getattr(os, name, 0))
