"""The start of several processes as one: `jax.distributed`, by our own variables or by JAX's detection.

| variable | |
|---|---|
| `JLORA_COORDINATOR` | host:port of process 0, which has to be reachable from all others |
| `JLORA_PROCESSES` | number of processes |
| `JLORA_PROCESS` | number of this one, from 0 |
| `JLORA_TIMEOUT` | seconds to wait for the others, 300 |
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from experiments.configfile import ConfigError

COORDINATOR, PROCESSES, PROCESS, TIMEOUT = "JLORA_COORDINATOR", "JLORA_PROCESSES", "JLORA_PROCESS", "JLORA_TIMEOUT"
WAIT = 300
"""Seconds that a process waits for the others, unless JLORA_TIMEOUT says otherwise: JAX's own default."""

_LOST: dict[str, Any] = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 60}
"""A process that dies ends the others within a minute; JAX's own defaults are 100 and 300 seconds."""

_ADVICE = (
    "Every process has to be started, all at about the same time and with the same number of them; the coordinator's "
    "address has to be one that the others reach (not localhost on several machines), its port free there and open in "
    "the firewall (TPUs: 8482)"
)


def initialise(*, detect: bool = False) -> bool:
    """Joins the processes of a run. To be called before anything touches a device, as an array does.

    Where JLORA_COORDINATOR, JLORA_PROCESSES and JLORA_PROCESS are set they say who is who, and JAX looks for nothing
    else; else JAX looks for itself if `detect` is true: on TPU VMs, GKE's TPUs, under srun and mpirun.

    Args:
      detect: have JAX look.

    Returns:
      Whether there are several processes.

    Raises:
      ConfigError: if some of the variables are missing or no numbers; or if JAX finds no cluster.
      TimeoutError: if the coordinator is not reached in time. Where it is, and another process is missing, the process
        ends with code 1, as `experiments.train` does after this error. Both say what that mostly comes from. (Where JAX
        looks for itself, it ends a process by itself.)
    """
    chosen = _variables(os.environ)
    if chosen is None:
        return _detected() if detect else False
    address, count, number, wait = chosen
    if count == 1:
        return False
    if number > 0:
        _reach(address, wait)
    late = f"process {number} of {count}: not all processes came within {wait} seconds (coordinator {address})"
    with _ended_after(wait, late):
        jax.distributed.initialize(
            address, count, number, initialization_timeout=wait + 60, cluster_detection_method="deactivate", **_LOST
        )
    return True


@contextlib.contextmanager
def _ended_after(wait: int, late: str) -> Iterator[None]:
    """Ends the process with a message after `wait` seconds. JAX would, too, by a dump of its stack and no exception."""

    def end() -> None:
        print(f"error: {_advised(late)}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(wait, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _advised(late: str) -> str:
    names = sorted(
        name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    )
    proxies = f". A proxy is set ({', '.join(names)}), which breaks the connection: unset it" if names else ""
    return f"{late}. {_ADVICE}{proxies}. {TIMEOUT} is the number of seconds"


def _variables(environment: Mapping[str, str]) -> tuple[str, int, int, int] | None:
    """Address, number of processes, own number and seconds; None where nothing is set."""
    names = (COORDINATOR, PROCESSES, PROCESS)
    given = {name: environment.get(name, "") for name in names}
    missing = [name for name, value in given.items() if not value]
    if len(missing) == len(names):
        return None
    if missing:
        there = ", ".join(name for name in names if name not in missing)
        raise ConfigError(
            f"{', '.join(missing)} not set, though {there} is: set {COORDINATOR}, {PROCESSES} and {PROCESS}, or none"
        )
    count, number = (_number(name, given[name]) for name in (PROCESSES, PROCESS))
    wait = _number(TIMEOUT, environment.get(TIMEOUT) or str(WAIT))
    host, _, port = given[COORDINATOR].rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{COORDINATOR}={given[COORDINATOR]!r} is no host:port")
    if not 0 <= number < count:
        raise ConfigError(f"{PROCESS}={number} is not below {PROCESSES}={count}: processes are numbered from 0")
    return given[COORDINATOR], count, number, wait


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} is no whole number")
    return int(text)


def _reach(address: str, wait: int) -> None:
    """Waits until the coordinator listens: JAX would wait without a word, and end the process without an exception."""
    host, _, port = address.rpartition(":")
    until, error = time.monotonic() + wait, OSError("no time to try")
    while time.monotonic() < until:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(5.0, wait)).close()
            return
        except OSError as found:
            error = found
        time.sleep(0.2)
    late = f"the coordinator {address} was not reached within {wait} seconds ({error})"
    raise TimeoutError(_advised(late)) from error


def _detected() -> bool:
    wait = _number(TIMEOUT, os.environ.get(TIMEOUT) or str(WAIT))
    try:
        with _ended_after(wait, f"--distributed: not all processes came within {wait} seconds"):
            jax.distributed.initialize(initialization_timeout=wait + 60, **_LOST)
    except ValueError as error:
        raise ConfigError(
            f"--distributed: JAX finds no cluster here ({error}). It knows TPU VMs, GKE's TPUs, and processes of srun "
            f"and mpirun; elsewhere set {COORDINATOR}, {PROCESSES} and {PROCESS}, or leave --distributed out"
        ) from error
    return jax.process_count() > 1
