"""One writer per folder: a lock that ends with the process that holds it."""

import contextlib
import errno
import os
import socket
import time
import warnings
import weakref
from pathlib import Path
from typing import Self

NAME = ".lock"


class Lock:
    """Exclusive use of a folder, until `close`, the end of the object or that of the process, a killed one included.

    The operating system's lock (`flock`) on a file `.lock` in the folder, which is removed at `close`. A file that
    merely exists, with a process number in it, would survive a kill, and the number may belong to another process by
    then. Networks' file systems pass `flock` on to their server (NFS since version 4 or Linux 2.6.12). Where locks are
    not to be had, a warning says so and nothing is locked.

    Args:
      folder: made if absent.

    Raises:
      ValueError: if the folder is in use, by another process or by this one; it names the holder.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> with Lock(folder):
      ...     Lock(folder)
      Traceback (most recent call last):
      ValueError: '...' is in use by this process (...): ...
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(folder)
        self._end: weakref.finalize | None = None
        if descriptor is not None:
            self._end = weakref.finalize(self, _release, folder / NAME, descriptor, os.getpid())
            self._end.atexit = False  # the system does it, and a forked child at its end must not

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others have the folder. A second call does nothing."""
        if self._end is not None:
            self._end()


def _locked(folder: Path) -> int | None:
    """The descriptor of the lock file, locked; None where there are no locks."""
    file = folder / NAME
    try:
        import fcntl  # POSIX alone
    except ImportError:
        _warn(folder, "this system has no flock")
        return None
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            _warn(folder, error.strerror or str(error))
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(file, descriptor):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, _me().encode(), 0)
                return descriptor
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                _warn(folder, error.strerror or str(error))
                return None
            if _is(file, descriptor):
                holder = _holder(descriptor)
                os.close(descriptor)
                raise ValueError(
                    f"'{folder}' is in use by {holder}: two that write there would spoil each other's files. Wait for "
                    "the other one, close it, or choose another folder"
                ) from None
        os.close(descriptor)  # the file was removed by its last holder in between


def _is(file: Path, descriptor: int) -> bool:
    """Whether a name is still that of an open file."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    for _ in range(10):  # its name is written just after the lock was taken
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        if holder:
            return f"this process ({os.getpid()})" if holder == _me() else holder
        time.sleep(0.01)
    return "another process"


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _warn(folder: Path, reason: str) -> None:
    warnings.warn(
        f"'{folder}' cannot be locked ({reason}): see to it that nothing else writes there meanwhile",
        RuntimeWarning,
        stacklevel=6,  # that of Checkpoints(...)
    )


def _release(file: Path, descriptor: int, owner: int) -> None:
    """Removes the file while it is locked: whoever waits for this one sees that it is gone, and makes another."""
    if os.getpid() == owner and _is(file, descriptor):
        with contextlib.suppress(OSError):
            file.unlink()
    os.close(descriptor)
