"""Devices that need not be there, as their compilers see them.

All of it happens in this process and nothing at import. The compilers read their settings when they are first loaded:
what libtpu needs to be loaded on a machine without a TPU, and beside other processes that have it, is in the
environment just for that moment. What GPUs need is given to the compilation itself.
"""

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies

from jlora.planning.devices import Device, Wanted

_KINDS = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "7x": "tpu7x"}  # libtpu's names
_FLAT = ("v5e", "v6e")  # their chips lie on a plane, four or eight to a host
_LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_PER_HOST = 8  # GPUs

# Fields of XLA's GpuTargetConfigProto: numbers of the vendor's data sheets.
_FIELDS = ("cores", "lanes", "shared", "optin", "bandwidth", "l2", "clock", "major")
_GPU = {
    "a100": (108, 64, 167936, 166912, 2039, 41943040, 1.41, 8),
    "h100": (132, 128, 233472, 232448, 3352, 52428800, 1.98, 9),
    "h200": (132, 128, 233472, 232448, 4800, 52428800, 1.98, 9),
    "b200": (148, 128, 233472, 232448, 7672, 132644864, 1.965, 10),
}
_PROTO = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
  core_count: {cores} fpus_per_core: {lanes} shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  memory_bandwidth: {bandwidth}000000000 l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""


def has_compiler(device: Device) -> bool:
    """Whether the compiler of a device is installed."""
    if device.compiler == "cpu":
        return True
    if device.compiler == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    return bool(_cuda_plugins())


def _cuda_plugins() -> list[str]:
    if importlib.util.find_spec("jax_plugins") is None:
        return []
    names = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    return [name for name in names if importlib.util.find_spec(name)]


def check_compiler(device: Device) -> None:
    """Raises ImportError, with what to install, where the compiler of a device is not there."""
    if not has_compiler(device):
        extra, what = ("plan", "libtpu") if device.compiler == "tpu" else ("plan-gpu", "JAX's CUDA plugin")
        where = "Linux on x86-64" if device.compiler == "tpu" else "Linux"
        raise ImportError(
            f'a plan for {device.name!r} is made by its own compiler, {what}: pip install "jlora[{extra}]" ({where}; '
            "no device and no driver is needed). device='cpu' needs nothing"
        )


def devices_of(wanted: Wanted, count: int) -> list[Any]:
    """That many devices, or stand-ins that programs can be compiled for.

    Raises:
      ValueError: if there are no so many, or no topology has them.
    """
    device = wanted.device
    if device.compiler == "cpu":
        found = jax.devices("cpu")
        if len(found) < count:
            raise ValueError(
                f"a plan for {count} CPU devices, and this process has {len(found)}: start it with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            )
        return found[:count]
    with loading(device):
        if device.compiler == "tpu":
            name, options = _tpu(device.name, count // wanted.slices, wanted.topology)
            options |= {"num_slices": wanted.slices} if wanted.slices > 1 else {}
            topology: Any = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        else:
            topology = _gpu(device, count)
    found = list(topology.devices)
    if len(found) < count:
        raise ValueError(f"{device.name}:{wanted.topology} has {len(found)} devices, and the mesh {count}")
    return found[:count]


def topology_of(wanted: Wanted, count: int) -> str:
    """A TPU's topology of so many devices, of one slice: the one that is named, or the most cubic one of whole hosts.

    Raises:
      ValueError: if no topology has them.

    >>> from jlora.planning.devices import find
    >>> topology_of(find("v5litepod-16"), 16), topology_of(find("v5p-128"), 64), topology_of(find("v6e:2x4"), 8)
    ('4x4', '4x4x4', '2x4')
    """
    return _tpu(wanted.device.name, count, wanted.topology)[0].partition(":")[2]


def slices_of(devices: Iterable[Any]) -> int:
    """In how many slices of TPUs devices are; 1 of others."""
    return len({getattr(device, "slice_index", 0) or 0 for device in devices})


def arranged(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """The devices as a mesh's array: a TPU's neighbours beside each other, slices along the first axes that fit."""
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.array(devices).reshape(sizes)
    slices, across = slices_of(devices), []
    for size in sizes:
        across.append(math.gcd(size, slices))
        slices //= across[-1]
    if math.prod(across) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    within = tuple(size // n for size, n in zip(sizes, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def _gpu(device: Device, count: int) -> Any:
    hosts, per_host = (1, count) if count <= _PER_HOST else (count // _PER_HOST, _PER_HOST)
    if hosts * per_host != count:
        raise ValueError(f"{count} GPUs are no whole hosts of {_PER_HOST}")
    spec = dict(zip(_FIELDS, _GPU[device.target], strict=True))
    described = functools.partial(
        topologies.get_topology_desc,
        platform="cuda",
        topology_name=device.target,
        topology=f"1x{hosts}x{per_host}",
        target_config=_PROTO.format(name=device.target, memory=device.memory, **spec),
    )
    try:
        return described()
    except NotImplementedError:  # JAX looked for CUDA's libraries at its start, which a compilation does without
        with _environment({"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}):
            importlib.import_module(_cuda_plugins()[0]).initialize()
        return described()


def _tpu(name: str, count: int, topology: str) -> tuple[str, dict[str, Any]]:
    """Libtpu's name of the smallest arrangement of so many devices, and its options."""
    chips = -(-count // 2) if name == "7x" else count
    axes = 2 if name in _FLAT else 3
    sizes = tuple(map(int, topology.split("x"))) if topology else _sizes(chips, axes, name)
    if len(sizes) != axes:
        raise ValueError(f"{name}:{topology}: a topology of {name} has {axes} axes")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name == "v4" else {}
    if math.prod(sizes) < 4:  # less than a host
        options["chips_per_host_bounds"] = (*sizes, 1)[:3]
    return f"{_KINDS[name]}:{'x'.join(map(str, sizes))}", options


def _sizes(chips: int, axes: int, name: str) -> tuple[int, ...]:
    """The most cubic arrangement of whole hosts, 2x2 chips each; of one or two chips a line."""
    if chips <= 2:
        return (1, chips) if axes == 2 else (chips, 1, 1)
    even = [n for n in range(2, chips + 1, 2) if chips % n == 0]
    if axes == 2:
        found: list[tuple[int, ...]] = [(a, chips // a) for a in even if a <= chips // a and (chips // a) % 2 == 0]
    else:
        found = [
            (a, b, chips // a // b) for a in even for b in even
            if a <= b and chips % (a * b) == 0 and (b <= chips // a // b or chips == a * b)
        ]  # fmt: skip
    if not found:
        raise ValueError(f"no topology has {chips} chips of {name}: whole hosts of 4 do, such as {-(-chips // 4) * 4}")
    return min(found, key=lambda sizes: max(sizes) / min(sizes))


# -- compiling ---------------------------------------------------------------------------------------------------------


def options_of(device: Device) -> dict[str, str]:
    """Options of a compilation: kernels are not timed on a GPU that is not there."""
    return {"xla_gpu_autotune_level": "0"} if device.compiler == "cuda" else {}


@contextlib.contextmanager
def loading(device: Device) -> Iterator[list[str]]:
    """The environment that a compiler is loaded in; gives what it wrote to file descriptor 2, at the end.

    libtpu writes errors there that are none: that there is no host, no TPU. Where it fails all is passed on.
    """
    said: list[str] = []
    if device.compiler == "cpu":
        yield said
        return
    with _environment(_LIBTPU if device.compiler == "tpu" else {}), tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        failed = True
        try:
            yield said
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said += file.read().decode(errors="replace").splitlines()
            if failed and said:
                print(*said, sep="\n", file=sys.stderr)


@contextlib.contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
