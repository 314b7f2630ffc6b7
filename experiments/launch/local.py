"""Processes of this machine, as a pod has them: `jax.distributed` over loopback, XLA's fake devices on the CPU."""

import os
import re
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.configfile import ConfigError
from experiments.launch.description import Launch
from experiments.launch.distributed import COORDINATOR, PROCESS, PROCESSES
from experiments.launch.launcher import Launcher, Setting
from experiments.launch.processes import Process, together
from experiments.launch.steps import Step

_FLAG = "--xla_force_host_platform_device_count"


def environment(number: int, count: int, port: str, devices: int, flags: str) -> dict[str, str]:
    """Variables of one process.

    Args:
      number: its own, from 0.
      count: of all processes.
      port: of the coordinator.
      devices: of each process.
      flags: XLA_FLAGS as they are; a number of devices among them is replaced.

    >>> environment(1, 2, "4000", 4, "--a=1 --xla_force_host_platform_device_count=8")["XLA_FLAGS"]
    '--a=1 --xla_force_host_platform_device_count=4'
    """
    kept = [flag for flag in flags.split() if not re.match(rf"{_FLAG}\b", flag)]
    found = {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": " ".join([*kept, f"{_FLAG}={devices}"]),
    }
    if count == 1:
        return found
    return found | {COORDINATOR: f"127.0.0.1:{port}", PROCESSES: str(count), PROCESS: str(number)}


@dataclass(frozen=True)
class Together:
    """The processes, as a step."""

    command: tuple[str, ...]
    variables: tuple[tuple[str, str], ...]
    count: int
    devices: int
    program: str = ""

    def text(self) -> str:
        """Each process's variables and command; the port is chosen when they are started."""
        flags = os.environ.get("XLA_FLAGS", "")
        lines = []
        for number in range(self.count):
            variables = environment(number, self.count, "PORT", self.devices, flags) | dict(self.variables)
            said = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
            lines.append(f"[{number}] $ {said} {shlex.join(self.command)}")
        return "\n".join(lines)

    def headline(self) -> str:
        """The same."""
        return self.text()

    def perform(self) -> int:
        """Runs them to their end."""
        port, flags = str(free_port()), os.environ.get("XLA_FLAGS", "")
        each = [environment(n, self.count, port, self.devices, flags) | dict(self.variables) for n in range(self.count)]
        return together([Process(self.command, variables) for variables in each])


def free_port() -> int:
    """A port of loopback that nobody listens at, now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _whole(launch: Launch, name: str) -> int:
    text = launch.settings[name]
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"local: --{name.replace('_', '-')} is a number from 1, got {text!r}")
    return int(text)


def _check(launch: Launch) -> None:
    if launch.accelerator is not None or launch.count > 1 or launch.spot:
        raise ConfigError("local: processes of this machine have no --accelerator, --slices, --nodes or --spot")
    if launch.folder.store:
        raise ConfigError(f"local: --folder {launch.folder.given!r} is a bucket: give a folder of this machine")
    _whole(launch, "processes"), _whole(launch, "devices_per_process")


def _launch(launch: Launch) -> Sequence[Step]:
    command = tuple(launch.train(sys.executable))
    variables = tuple(launch.variables().items())
    return [Together(command, variables, _whole(launch, "processes"), _whole(launch, "devices_per_process"))]


LAUNCHER = Launcher(
    "local",
    "several processes of this machine, on its CPU",
    (
        Setting("processes", "number of processes", default="2"),
        Setting("devices_per_process", "devices of each", default="1"),
    ),
    {"launch": _launch},
    _check,
    remote=False,
    clones=False,
)
