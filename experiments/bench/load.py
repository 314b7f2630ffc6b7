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
from jlora.models.gpt2 import GPT2, PRESETS

# What runs in the other process: JAX is up before the first reading, so that it is not counted.
_CHILD = """
import json, sys
import jax, jax.numpy as jnp
from jlora import models
def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
folder, options = sys.argv[1], json.loads(sys.argv[2])
models.build(folder, **options)
jax.block_until_ready(jax.device_put(jnp.zeros((8, 8))) + 1)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = memory("VmRSS")
params = jax.block_until_ready(models.load(folder, **options).params)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"parameters": size, "peak": memory("VmHWM") - before, "after": memory("VmRSS") - before}))
"""


def measured(folder: Path, **options: Any) -> dict[str, int]:
    """Bytes of the parameters, and by how much the process grew: at its peak, and afterwards."""
    command = [sys.executable, "-c", _CHILD, str(folder), json.dumps(options)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m experiments.bench.load")
    parser.add_argument("--preset", default="gpt2", choices=sorted(PRESETS))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = GPT2(replace(PRESETS[options.preset], scan=True))
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        models.save(folder, model, params, largest_shard=10**9)
        for settings in ({}, {"scan": True}, {"param_dtype": "bfloat16"}):
            found = measured(Path(folder), **settings)
            print(
                f"{options.preset} {settings or ''}: {found['parameters'] / 1e6:,.0f} MB of parameters; at the peak "
                f"{found['peak'] / found['parameters']:.3f} times as much, afterwards "
                f"{found['after'] / found['parameters']:.3f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
