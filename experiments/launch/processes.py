"""Several processes of this machine as one: their lines told apart, and all of them ended when one fails."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TextIO

from experiments.launch.exits import GRACE, Preempted, preemptible

_LOOK = 0.05  # seconds between two looks at the processes


@dataclass(frozen=True)
class Process:
    """A command, and what its environment has beside that of this process."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def together(processes: Sequence[Process], *, out: TextIO | None = None, grace: float = 5.0) -> int:
    """Runs processes side by side until all have ended, or one has failed.

    Each line that one writes, to either of its outputs, is written to `out` as a whole, its number before it: `[0] `.
    When one ends with another code than 0 the others get SIGTERM, and SIGKILL `grace` seconds later; so they do, with
    their children, on Ctrl-C. When this process gets SIGTERM they get it, too, and as long as on a machine that is
    taken away (`exits.GRACE`) to keep what they have.

    Args:
      processes: in the order of their numbers.
      out: where their lines go; standard output if not given.
      grace: seconds.

    Returns:
      0 if all ended with 0; the code of the first that did not, 128 + the signal of one that a signal ended; 130 after
      Ctrl-C. After SIGTERM the code of the first process that then ended with another than 0.
    """
    out = sys.stdout if out is None else out
    lock, readers, started = threading.Lock(), [], list[subprocess.Popen[str]]()
    with preemptible():
        try:
            for number, process in enumerate(processes):
                started.append(_start(process))
                reader = threading.Thread(target=_copy, args=(number, started[-1].stdout, out, lock), daemon=True)
                reader.start()
                readers.append(reader)
            code = _first_failure(started)
        except KeyboardInterrupt:
            code = 130
        except Preempted:
            _end(started, GRACE)
            code = next((_code(p) for p in started if p.returncode), 0)
        finally:
            with _undisturbed():
                _end(started, grace)
    for reader in readers:
        reader.join(timeout=1.0)  # a grandchild may hold the pipe
    return code


def _start(process: Process) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        process.command,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **process.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # the terminal's Ctrl-C is ours, and a signal to its group reaches its children
    )


def _copy(number: int, source: IO[str], out: TextIO, lock: threading.Lock) -> None:
    with source:
        for line in source:
            with lock:
                out.write(f"[{number}] {line.rstrip()}\n")
                out.flush()


def _first_failure(started: "Sequence[subprocess.Popen[str]]") -> int:
    """The code of the first process that fails, or 0 when all have ended."""
    while True:
        running = False
        for process in started:
            if process.poll() is None:
                running = True
            elif process.returncode != 0:
                return _code(process)
        if not running:
            return 0
        time.sleep(_LOOK)


def _code(process: "subprocess.Popen[str]") -> int:
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _end(started: "Sequence[subprocess.Popen[str]]", grace: float) -> None:
    """Ends what still runs, and its children."""
    for process in started:
        if process.poll() is None:
            _signal(process, signal.SIGTERM)
    until = time.monotonic() + grace
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, until - time.monotonic()))
    for process in started:
        _signal(process, signal.SIGKILL)  # children that outlived their parent, too
        process.wait()


def _signal(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
