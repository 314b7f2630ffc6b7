"""A step's program as its compiler makes it, or as it was kept from an earlier time.

JAX has a cache of its own (`jax_compilation_cache_dir`), which writes programs for devices that are not there and then
refuses to read them ("PjRtCompiler must be constructed with a Client to call DeserializeLoadedExecutable", JAX
0.12.0.1). Of a program a plan needs no more than its text and its sizes, and so these are kept.
"""

import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from jlora.planning import targets
from jlora.planning.devices import Device


class Memory(NamedTuple):
    """Sizes in bytes, as the compiler counts them: `compiled.memory_analysis()`."""

    arguments: int
    temporaries: int
    results: int
    aliased: int
    peak: int
    host: int


class Outcome(NamedTuple):
    """Outcome of a compilation: a program, or a compiler's refusal.

    Attributes:
      text: of the program (HLO); "" of a refusal.
      memory: its sizes; None of a refusal.
      needed: of a refusal the bytes that it names.
      said: lines that the compiler wrote to file descriptor 2.
    """

    text: str
    memory: Memory | None
    needed: int
    said: list[str]


_TOO_LARGE = re.compile(r"Ran out of memory.*?\(?([\d.]+)([KMGT]?)\)? (?:exceeds|of)", re.DOTALL)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compiled(traced: Any, device: Device, place: Mesh | SingleDeviceSharding, cache: Path | None) -> Outcome:
    """The program of a traced step, for devices.

    Args:
      traced: from `jax.jit(...).trace(...)`.
      device: that is compiled for.
      place: the mesh, or the one device's sharding, for which the name of what is kept differs.
      cache: folder of what is kept; None to keep nothing. It is made where it is not there.
    """
    lowered = traced.lower()
    if cache is None:
        return _compile(lowered, device)
    file = cache / f"{_name(lowered, device, place)}.json.gz"
    found = _kept(file)
    if found is None:
        found = _compile(lowered, device)
        _keep(file, found)
    return found


def folder() -> Path:
    """Where the command line keeps programs: `jlora/plans` in the user's folder of caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jlora" / "plans"


# -- compiling ---------------------------------------------------------------------------------------------------------


def _compile(lowered: Any, device: Device) -> Outcome:
    needed, said = 0, []
    found = None
    try:
        with targets.loading(device) as said:
            try:
                found = lowered.compile(targets.options_of(device))
            except jax.errors.JaxRuntimeError as error:
                large = _TOO_LARGE.search(str(error))
                if not large:
                    raise
                needed = int(float(large[1]) * _UNITS[large[2]])
    except jax.errors.JaxRuntimeError as error:
        if "ptxas" in str(error):
            raise ImportError(
                'the compiler of GPUs found no ptxas: pip install "jlora[plan-gpu]", which has it'
            ) from error
        if "CustomSPMDPartitioning" in str(error):
            raise RuntimeError(
                "JAX found no CUDA at its start, and left out what cuDNN's attention over several devices takes to "
                "compile: set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1, or JAX_PLATFORMS=cpu, before Python starts"
            ) from error
        raise
    if found is None:
        return Outcome("", None, needed, said)
    sizes = found.memory_analysis()
    memory = Memory(
        sizes.argument_size_in_bytes, sizes.temp_size_in_bytes, sizes.output_size_in_bytes, sizes.alias_size_in_bytes,
        sizes.peak_memory_in_bytes, sizes.host_argument_size_in_bytes + sizes.host_temp_size_in_bytes,
    )  # fmt: skip
    return Outcome(found.as_text(), memory, needed, said)


# -- keeping -----------------------------------------------------------------------------------------------------------


def _name(lowered: Any, device: Device, place: Mesh | SingleDeviceSharding) -> str:
    """A name that says all that a compilation depends on: program, devices in their order, options, versions."""
    of = place.devices.flat if isinstance(place, Mesh) else place.device_set
    devices = [(one.id, getattr(one, "coords", None)) for one in of]
    # A function of Python that places cuDNN's attention is named by its address, which is another one each time.
    text = re.sub(r'(@CustomSPMDPartitioning\(.*?backend_config = )"\d+"', r"\1", lowered.as_text())
    options = (device, devices, targets.options_of(device), os.environ.get("XLA_FLAGS"), _versions())
    return hashlib.sha256(f"{options}\n{text}".encode()).hexdigest()


def _versions() -> list[str]:
    names = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _kept(file: Path) -> Outcome | None:
    """The outcome that a file has; None where there is none, or where it is damaged."""
    try:
        told = json.loads(gzip.decompress(file.read_bytes()))
        memory = None if told["memory"] is None else Memory(**told["memory"])
        return Outcome(str(told["text"]), memory, int(told["needed"]), list(told["said"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def _keep(file: Path, found: Outcome) -> None:
    told = found._asdict() | {"memory": found.memory and found.memory._asdict()}
    with contextlib.suppress(OSError):  # a folder that cannot be written keeps nothing
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_bytes(gzip.compress(json.dumps(told).encode()))
        os.replace(temporary, file)  # whole, or not there
