"""Devices by the names that people give them: their memory and speeds, and the compiler that a plan for them asks."""

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

GIB = 2**30


class Speed(NamedTuple):
    """Speeds of a device at best; of a chip that JAX shows as two devices, half of it.

    Attributes:
      flops: of products in bfloat16, FLOP/s, without sparsity.
      memory: of its own memory (HBM), bytes/s, read and written together.
      link: to devices of its node or slice, bytes/s one way: of a GPU over NVLink in all, of a TPU over each link.
      dcn: to other nodes or slices, bytes/s one way: its share of the host's network.
      node: GPUs that NVLink joins; 0 for TPUs, whose slice is one network of links.
      ring: an axis of a TPU's torus is closed to a ring where its size is a multiple of this.

    Source: Google Cloud's pages on each TPU, NVIDIA's data sheets, and Austin et al., "How to Scale Your Model" (2025),
    chapters 2 and 12.
    """

    flops: float
    memory: float
    link: float
    dcn: float
    node: int = 0
    ring: int = 0


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
      name: as `plan` takes it.
      memory: bytes that a program may fill; 0 for "cpu", whose limit is this machine's memory.
      compiler: that makes its programs: "tpu" (libtpu), "cuda" (JAX's CUDA plugin) or "cpu".
      target: device that is compiled for: its own name, or the nearest one whose programs can be made.
      speed: what it can do at best; None where that is not known here.
    """

    name: str
    memory: int
    compiler: Literal["cpu", "tpu", "cuda"]
    target: str
    speed: Speed | None = None


class Wanted(NamedTuple):
    """A device, and how many of them.

    Attributes:
      device: the kind.
      number: of devices in all; None where it is not said, or the topology says it.
      topology: of a TPU's slice, "4x4"; "" for any.
      slices: of TPUs, which the data-center network joins.
    """

    device: Device
    number: int | None
    topology: str
    slices: int = 1

    @property
    def total(self) -> int | None:
        """Devices in all; None where the name does not say it."""
        if not self.topology:
            return self.number
        chips = math.prod(map(int, self.topology.split("x")))
        return self.slices * chips * (2 if self.device.name == "7x" else 1)  # whose chip is two


# What XLA:TPU itself allows, from its own message on programs that are too large; what XLA's descriptions of GPUs say.
_TPU = {"v4": 30.75, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "7x": 94.74}
_GPU = {"a100": 85100068864, "h100": 84942979072, "h200": 151397597184, "b200": 191514411008}
# GiB, as CUDA reports them: of what a device is sold with, error correction and the driver keep a part.
_NEAREST = {
    "a100": {
        "a100-40gb": 39.4, "a6000": 47.5, "a40": 44.4, "a10": 22.2, "rtx3090": 23.7, "rtx3080": 9.8, "rtx3060": 11.8,
        "v100": 31.7, "v100-16gb": 15.8, "t4": 14.7, "p100": 15.9, "titan": 23.6,
    },
    "h100": {
        "rtx6000-ada": 47.5, "l40s": 44.4, "l40": 44.4, "l4": 22.0, "rtx4090": 23.6, "rtx4080": 15.6, "h100-nvl": 93.1,
        "gh200": 94.5, "h20": 95.1, "mi300x": 191.9, "mi250x": 63.9,
    },
    "b200": {"gb200": 184.0, "rtx5090": 31.4, "rtx5080": 15.5, "rtx-pro-6000": 94.9, "b300": 267.0},
}  # fmt: skip
# For each device as JAX counts them. The network is 25 GB/s for the four chips of a v4's host, and so many Gb/s a chip:
# 25 (v5e), 50 (v5p), 100 (v6e, 7x), 200 (A100) or 400 (other GPUs). A chip of the 7x is two devices, which share its
# 2,307 TFLOP/s, 7,380 GB/s, links of 100 GB/s each way and 12.5 GB/s of network.
_SPEEDS = {
    "v4": Speed(275e12, 1228e9, 45e9, 6.25e9, ring=4),
    "v5e": Speed(197e12, 819e9, 50e9, 3.125e9, ring=16),
    "v5p": Speed(459e12, 2765e9, 100e9, 6.25e9, ring=4),
    "v6e": Speed(918e12, 1638e9, 100e9, 12.5e9, ring=16),
    "7x": Speed(1153.5e12, 3690e9, 50e9, 6.25e9, ring=4),
    "a100": Speed(312e12, 2039e9, 300e9, 25e9, node=8),
    "h100": Speed(989e12, 3352e9, 450e9, 50e9, node=8),
    "h200": Speed(989e12, 4800e9, 450e9, 50e9, node=8),
    "b200": Speed(2250e12, 7672e9, 900e9, 50e9, node=8),
}
DEVICES: dict[str, Device] = {
    "cpu": Device("cpu", 0, "cpu", "cpu"),
    **{name: Device(name, int(size * GIB), "tpu", name, _SPEEDS[name]) for name, size in _TPU.items()},
    **{name: Device(name, size, "cuda", name, _SPEEDS[name]) for name, size in _GPU.items()},
    **{
        name: Device(name, int(size * GIB), "cuda", target)
        for target, sizes in _NEAREST.items()
        for name, size in sizes.items()
    },
}
_ALSO = {
    "a100-80gb": "a100", "h100-80gb": "h100", "h200-141gb": "h200", "b200-192gb": "b200", "b200-180gb": "b200",
    "a6000-48gb": "a6000", "rtx-a6000": "a6000", "rtxa6000": "a6000", "a40-48gb": "a40", "l40s-48gb": "l40s",
    "v100-32gb": "v100", "t4-16gb": "t4", "l4-24gb": "l4", "a10-24gb": "a10", "a10g": "a10", "h100-94gb": "h100-nvl",
    "6000-ada": "rtx6000-ada", "rtx-6000-ada": "rtx6000-ada",
    **{f"rtx-{n}": f"rtx{n}" for n in (3060, 3080, 3090, 4080, 4090, 5080, 5090)},
    **{str(n): f"rtx{n}" for n in (3060, 3080, 3090, 4080, 4090, 5080, 5090)},
    "v5litepod": "v5e", "v5-lite": "v5e", "v5lite": "v5e", "v5": "v5p", "v6": "v6e", "v6-lite": "v6e",
    "trillium": "v6e", "ironwood": "7x", "tpu7x": "7x", "v7x": "7x", "v7": "7x",
}  # fmt: skip
_NAMES = {**{name: name for name in DEVICES}, **_ALSO}
_CORES = ("v4", "v5p")  # Cloud's names count their TensorCores, two to a chip, which JAX shows as one device


def find(name: str) -> Wanted:
    """The device of a name: "h100", "8xH100", "v5e-16" as Cloud counts it, "v5e:4x4", two slices "2xv5e-16", "cpu".

    Raises:
      ValueError: naming the nearest device.

    >>> find("NVIDIA H100 80GB").device.name, find("v5p-16").number, find("8xH100").number
    ('h100', 8, 8)
    >>> find("2xv5e-16").total, find("4xv5p:4x4x4").total
    (32, 256)
    """
    text = re.sub(r"[\s_]+", "-", str(name).strip().lower())
    text = re.sub(r"^(google-|cloud-)?tpu-|^(nvidia-)?(geforce-|tesla-)?|-(sxm\d?|pcie|hbm\d?e?)(?=-|$)", "", text)
    text = re.sub(r"(\d)-gb\b", r"\1gb", text)
    if text in _NAMES:
        return Wanted(DEVICES[_NAMES[text]], None, "")
    if (found := re.fullmatch(r"(\d+)-?x-?([a-z].*)", text)) and found[2] in _NAMES:
        return Wanted(DEVICES[_NAMES[found[2]]], int(found[1]), "")
    if found := re.fullmatch(r"(\d+)-?x-?(.*[a-z].*[-:]\d.*)", text):
        slices, one = int(found[1]), _of_slice(found[2])
        if one is not None and slices:
            return one._replace(number=None if one.number is None else slices * one.number, slices=slices)
    if (found := re.fullmatch(r"(.+):(\d+(?:x\d+)+)", text)) and found[1] in _NAMES:
        device = DEVICES[_NAMES[found[1]]]
        if device.compiler == "tpu":
            return Wanted(device, None, found[2])
    if (found := re.fullmatch(r"(.+)-(\d+)", text)) and found[1] in _NAMES:
        device, count = DEVICES[_NAMES[found[1]]], int(found[2])
        return Wanted(device, count // 2 if device.name in _CORES and count > 1 else count, "")
    near = difflib.get_close_matches(re.sub(r"[-:]\d[\dx]*$", "", text), _NAMES, 1, 0.0)[0]
    raise ValueError(
        f"device={name!r} is unknown; the nearest is {_NAMES[near]!r}. There are {', '.join(DEVICES)}; several as "
        "'v5e-16', 'v5e:4x4', '2xv5e-16' (slices) or '8xh100'"
    )


def _of_slice(text: str) -> Wanted | None:
    """The devices of one slice, "v5e-16"; None for what is none."""
    try:
        found = find(text)
    except ValueError:
        return None
    return found if found.device.compiler == "tpu" and found.slices == 1 and found.total else None
