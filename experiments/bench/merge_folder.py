"""How much memory and time the merge of an adapter into a large checkpoint takes.

    python -m experiments.bench.merge_folder --gigabytes 6 --rank 16

A base of one Llama's shapes, in bfloat16 and of holes (which take no room on the disk), and an adapter of all its
linear layers are merged in a process of its own, whose resident memory is read before, and at its peak. The merged
folder takes the whole room for as long as this runs.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jlora.interop import shards

SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
LARGEST = 10**9  # bytes of a file

# What runs in the other process: everything is imported before the first reading.
_CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np
from jlora.interop.layer import Layer
from jlora.interop.merge_folder import merge_folder
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
base, out, rank, shapes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
factors = {}
def ones(*shape):  # of each shape once: a real adapter's factors are small beside the base
    return factors.setdefault(shape, np.full(shape, 1e-2, np.float32))
layers = [
    Layer(key.removesuffix(".weight"), "lora", {"A": ones(rank, shape[1]), "B": ones(shape[0], rank)})
    for key, shape in shapes.items()
]
np.ones((64, 64), np.float32) @ np.ones((64, 64), np.float32)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before, start = memory("VmRSS"), time.perf_counter()
merge_folder(base, layers, out)
print(json.dumps({"peak": memory("VmHWM") - before, "seconds": time.perf_counter() - start}))
"""


def write_base(folder: Path, size: int) -> tuple[dict[str, tuple[int, ...]], list[int]]:
    """Writes a base of about `size` bytes, of holes. Returns its shapes and the bytes of each file."""
    keys: dict[str, tuple[int, ...]] = {}
    layer = 0
    while sum(2 * a * b for a, b in keys.values()) < size:
        keys |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
        layer += 1
    groups: list[list[str]] = [[]]
    for key, (a, b) in keys.items():
        if sum(2 * keys[k][0] * keys[k][1] for k in groups[-1]) + 2 * a * b > LARGEST:
            groups.append([])
        groups[-1].append(key)
    places: dict[str, str] = {}
    sizes = []
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        header = shards.header([(key, "BF16", keys[key]) for key in group], {"format": "pt"})
        data = sum(2 * keys[key][0] * keys[key][1] for key in group)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + data)
        places |= dict.fromkeys(group, name)
        sizes.append(data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return keys, sizes


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m experiments.bench.merge_folder")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 6.0])
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args(arguments)
    print("| base, GB | files | largest file, MB | peak beside the start, MB | of a file | seconds |")
    print("|---:|---:|---:|---:|---:|---:|")
    for size in options.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            base, out = Path(folder) / "base", Path(folder) / "out"
            base.mkdir()
            keys, sizes = write_base(base, int(size * 1e9))
            free = shutil.disk_usage(folder).free
            if free < sum(sizes):
                print(f"{size} GB need {sum(sizes):,} bytes on the disk, and {free:,} are free", file=sys.stderr)
                return 1
            command = [sys.executable, "-c", _CHILD, str(base), str(out), str(options.rank), json.dumps(keys)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(result.stdout.splitlines()[-1])
            share = found["peak"] / max(sizes)
            print(
                f"| {sum(sizes) / 1e9:.2f} | {len(sizes)} | {max(sizes) / 1e6:.0f} | {found['peak'] / 1e6:.0f} | "
                f"{share:.2f} | {found['seconds']:.0f} |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
