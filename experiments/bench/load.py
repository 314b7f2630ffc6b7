"""How much host memory the loading of a checkpoint takes, beside the bytes of its parameters.

    python -m experiments.bench.load --preset gpt2-medium

A random checkpoint of the shape is written to a temporary folder and loaded in a process of its own, whose resident
memory is read before, and at its peak. On the CPU the parameters themselves are host memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora import models
from jlora.models.gpt2 import GPT2, PRESETS, GPT2Config

# What runs in the other process: a tiny checkpoint is loaded before the first reading, so that JAX and its compiler are
# not counted.
_CHILD = """
import json, sys
import jax, jax.numpy as jnp
from jlora import models
def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
folder, small, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
jax.block_until_ready(models.load(small, **options).params)
models.build(folder, **{k: v for k, v in options.items() if k != "quantize"})
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = memory("VmRSS")
params = jax.block_until_ready(models.load(folder, **options).params)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"parameters": size, "peak": memory("VmHWM") - before, "after": memory("VmRSS") - before}))
"""


PLAIN: tuple[dict[str, Any], ...] = ({}, {"scan": True}, {"param_dtype": "bfloat16"})
QUANTISED: tuple[dict[str, Any], ...] = (
    {"scan": True, "param_dtype": "bfloat16", "quantize": "nf4"},
    {"param_dtype": "bfloat16", "quantize": "int8"},
)


def measured(folder: Path, **options: Any) -> dict[str, int]:
    """Bytes of the parameters, and by how much the process grew: at its peak, and afterwards."""
    with tempfile.TemporaryDirectory() as small:
        _write(Path(small), GPT2Config(vocab_size=64, context=16, width=64, layers=1, heads=2, scan=True))
        command = [sys.executable, "-c", _CHILD, str(folder), small, json.dumps(options)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return found


def _write(folder: Path, config: GPT2Config) -> None:
    model = GPT2(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    models.save(folder, model, params, largest_shard=10**9)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m experiments.bench.load")
    parser.add_argument("--preset", default="gpt2", choices=sorted(PRESETS))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), replace(PRESETS[options.preset], scan=True))
        for settings in (*PLAIN, *QUANTISED):
            found = measured(Path(folder), **settings)
            print(
                f"{options.preset} {settings or ''}: {found['parameters'] / 1e6:,.0f} MB of parameters; at the peak "
                f"{found['peak'] / found['parameters']:.3f} times as much, afterwards "
                f"{found['after'] / found['parameters']:.3f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
