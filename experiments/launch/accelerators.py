"""Accelerators by the names that people give them, and by those that clouds know them by.

Kinds, numbers and topologies are those of `jlora.plan`: what is planned is what is launched.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from experiments.configfile import ConfigError
from jlora.planning import targets
from jlora.planning.devices import find


class Tpu(NamedTuple):
    """Names of a kind of TPU.

    Attributes:
      type: of Cloud's accelerator types, before the number.
      counts: units of that number to a device of JAX: v4 and v5p count TensorCores, of which JAX shows two as one.
      runtime: software version of its TPU VMs; "" where there are none.
      label: of GKE's nodes.
    """

    type: str
    counts: int
    runtime: str
    label: str


class Gpu(NamedTuple):
    """Names of a kind of GPU: SkyPilot's, and the label of GKE's nodes ("" where GKE has none)."""

    sky: str
    label: str


TPUS = {
    "v4": Tpu("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": Tpu("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Tpu("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Tpu("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    "7x": Tpu("tpu7x", 1, "", "tpu7x"),
}
GPUS = {
    "a100": Gpu("A100-80GB", "nvidia-a100-80gb"),
    "a100-40gb": Gpu("A100", "nvidia-tesla-a100"),
    "h100": Gpu("H100", "nvidia-h100-80gb"),
    "h200": Gpu("H200", "nvidia-h200-141gb"),
    "b200": Gpu("B200", "nvidia-b200"),
    "l4": Gpu("L4", "nvidia-l4"),
    "t4": Gpu("T4", "nvidia-tesla-t4"),
    "v100-16gb": Gpu("V100", "nvidia-tesla-v100"),
    "v100": Gpu("V100-32GB", ""),
    "l40s": Gpu("L40S", ""),
    "a6000": Gpu("A6000", ""),
    "rtx4090": Gpu("RTX4090", ""),
}
_SINGLE = {"v5e": (1, 4, 8), "v6e": (1, 4, 8)}  # chips of machines that are a slice by themselves


@dataclass(frozen=True)
class Accelerator:
    """A TPU slice, or the GPUs of a node.

    Attributes:
      given: the text that named it.
      kind: as `jlora.plan` calls it: "v5e", "h100".
      tpu: whether it is a TPU.
      devices: of a slice or node, as JAX counts them.
      hosts: machines of a slice, each with a process of its own; 1 of a node.
      topology: of a slice, "4x4"; "" of a node.
    """

    given: str
    kind: str
    tpu: bool
    devices: int
    hosts: int
    topology: str

    @property
    def chips(self) -> int:
        """Chips of a slice, or GPUs of a node: a chip of the 7x is two devices."""
        return self.devices // 2 if self.kind == "7x" else self.devices

    @property
    def per_host(self) -> int:
        """Chips or GPUs of a machine."""
        return self.chips // self.hosts

    @property
    def cloud(self) -> str:
        """Cloud's accelerator type: v5litepod-16, v5p-128."""
        names = TPUS[self.kind]
        return f"{names.type}-{self.devices * names.counts}"


def read(text: str) -> Accelerator:
    """The accelerator of a name: "v5e-16", "v5litepod-16", "v5e:4x4", "v5p-128", "h100:8", "8xh100".

    Raises:
      ConfigError: naming the nearest device; for a CPU; or where no number is said, or no topology has it.

    Example:
      >>> slice = read("v5e-16")
      >>> slice.cloud, slice.topology, slice.hosts, slice.per_host
      ('v5litepod-16', '4x4', 4, 4)
      >>> read("h100:8").devices
      8
    """
    try:
        wanted = find(re.sub(r":(\d+)$", r"-\1", text.strip()))
    except ValueError as error:
        raise ConfigError(f"--accelerator: {error}") from error
    kind, tpu = wanted.device.name, wanted.device.compiler == "tpu"
    if kind == "cpu":
        raise ConfigError(
            "--accelerator: 'cpu' is this machine: python -m experiments.launch local CONFIG --processes 2"
        )
    if wanted.slices > 1:
        one = re.sub(r"(?i)^\d+[\s_-]*x[\s_-]*", "", text.strip())
        raise ConfigError(f"--accelerator: {text!r} are {wanted.slices} slices: write {one!r} --slices {wanted.slices}")
    if not wanted.total:
        example = f"{TPUS[kind].type}-16" if tpu else f"{kind}:8"
        raise ConfigError(f"--accelerator: {text!r} says no number: write {example!r}")
    devices = wanted.total
    if not tpu:
        return Accelerator(text, kind, False, devices, 1, "")
    try:
        topology = targets.topology_of(wanted, devices)
    except ValueError as error:
        raise ConfigError(f"--accelerator: {text!r}: {error}") from error
    chips = devices // 2 if kind == "7x" else devices
    hosts = 1 if chips in _SINGLE.get(kind, (1, 2, 4)) else chips // 4
    return Accelerator(text, kind, True, devices, hosts, topology)
