"""Exit codes that launchers act on, and the SIGTERM that a preemption begins with.

| code | meaning | launchers |
|---:|---|---|
| 0 | done | end |
| 1 | an error, a loss that is not finite, another process that died or never came | end; GKE starts again |
| 2 | a config, data or folder that cannot be | end |
| 75 | preempted: `PREEMPTED` | start the same command again, which resumes |
| 130 | Ctrl-C | end |
| 143 | killed by SIGTERM before it could say 75 | as 75 |
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

PREEMPTED = 75
"""Exit code of a process that was told to stop and has to be started again: EX_TEMPFAIL of sysexits.h."""

KILLED = 128 + signal.SIGTERM
"""Exit code, as shells and container runtimes say it, of a process that SIGTERM ended."""

RESTARTED = (PREEMPTED, int(KILLED))
"""Exit codes after which launchers start the same command again."""

GRACE = 120
"""Seconds between SIGTERM and SIGKILL, where a launcher may choose them. Spot TPU VMs have 30."""


class Preempted(BaseException):
    """SIGTERM has come. Like KeyboardInterrupt it is no Exception: nothing but `main` takes it for an error."""


class _Notice:
    """SIGTERM that is held back: how many hold it, and whether it has come."""

    held, came = 0, False


_NOTICE = _Notice()


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within, a SIGTERM is remembered and not raised: what is computed here is whole afterwards. See `has_come`."""
    _NOTICE.held += 1
    try:
        yield
    finally:
        _NOTICE.held -= 1


def has_come() -> bool:
    """Whether a SIGTERM came while it was held back. The caller keeps what it has and raises `Preempted`."""
    return _NOTICE.came


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Raises `Preempted` in the main thread when SIGTERM comes; a second SIGTERM is ignored, so that it can clean up.

    For one process. Among several JAX's preemption service has the signal, and a handler here would take it away.
    In another thread than the main one, where no handler can be set, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _NOTICE.came = signal.signal(signal.SIGTERM, _raise), False
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _NOTICE.held:
        _NOTICE.came = True
    else:
        raise Preempted
