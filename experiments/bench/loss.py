"""Temporaries of a training step of GPT-2 medium: plain or chunked loss, and the attention kernel; what offload adds.

    python -m experiments.bench.loss                  # 8 x 1,024 tokens, compiled for an H100, which need not be there
    python -m experiments.bench.loss --scan --remat offload
    python -m experiments.bench.loss --cpu            # a small shape on the CPU's own compiler

LoRA on query and value as in configs/gpt2_medium_e2e_lora.py, AdamW, no dropout of the model; nothing is run. For the
H100 JAX's CUDA plugin is needed, and for its flash attention cuDNN: `pip install jax-cuda12-plugin==<jax's version>
jax-cuda12-pjrt==<the same> nvidia-cuda-nvcc-cu12 nvidia-cudnn-cu12`, and JAX_PLATFORMS=cpu
XLA_FLAGS=--xla_gpu_autotune_level=0 where there is no GPU.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jlora
from jlora.models.gpt2 import GPT2, GPT2Config

GIB = 2**30
MEDIUM = GPT2Config(width=1024, layers=24, heads=16)
SMALL = GPT2Config(width=64, layers=4, heads=4, context=256)
# As XLA's xla/backends/gpu/target_config/specs says it of this device.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Memory(NamedTuple):
    """Bytes of a compiled step: temporaries on the device and on the host, and the arguments."""

    device: int
    host: int
    arguments: int


def measure(
    config: GPT2Config,
    rows: int,
    *,
    in_chunks: bool,
    place: SingleDeviceSharding | None = None,
    rank: int = 4,
    targets: str = r"attn/(query|value)",
    memory_kind: str | None = None,
) -> Memory:
    """Compiles a step of `rows` whole contexts on shapes, for the device of `place`."""
    model = GPT2(config)

    def put(shapes: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        after = jnp.roll(tokens, -1, axis=1)
        if in_chunks:
            each: Any = model.apply({"params": params}, tokens, labels=after)
            return each[:, :-1].mean()
        logits: Any = model.apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], after[:, :-1]).mean()

    tokens = put(jax.ShapeDtypeStruct((rows, config.context), jnp.int32))
    params = put(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])
    sites = jlora.sites(lambda params, tokens: model.apply({"params": params}, tokens), params, tokens)
    adapted = put(jlora.apply(params, method=jlora.lora(rank, alpha=32), sites=sites, targets=targets))
    step = jlora.train_step(loss, optax.adamw(2e-4))
    state = jlora.TrainState.create(adapted, step.tx, memory_kind=memory_kind)
    found: Any = step.lower(state, tokens).compile().memory_analysis()
    return Memory(found.temp_size_in_bytes, found.host_temp_size_in_bytes, found.argument_size_in_bytes)


def h100() -> SingleDeviceSharding:
    """The place of an H100 that need not be there."""
    try:
        found = topologies.get_topology_desc("h100", "cuda", topology="1x1x1", target_config=H100)
    except Exception as error:
        raise SystemExit(f"no compiler for an H100 here ({error}): see this file's first lines, or --cpu") from error
    return SingleDeviceSharding(found.devices[0])


def table(of: Callable[..., Memory], kernels: tuple[str, ...]) -> str:
    """Loss and attention kernel in rows: temporaries, and what is left of those of the first."""
    lines = ["| loss | attention | temporaries GiB | of the first | on the host GiB |", "|---|---|---:|---:|---:|"]
    first = None
    for in_chunks in (False, True):
        for kernel in kernels:
            got = of(kernel, in_chunks)
            first = first or got.device
            lines.append(
                f"| {'in chunks' if in_chunks else 'plain'} | {kernel} | {got.device / GIB:.3f} "
                f"| {got.device / first:.0%} | {got.host / GIB:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="a small shape, for the CPU")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--remat", default="", help="True, or the name of a policy")
    parser.add_argument("--rows", type=int, default=8)
    arguments = parser.parse_args()
    config = dataclasses.replace(
        SMALL if arguments.cpu else MEDIUM, dtype=arguments.dtype, param_dtype=arguments.dtype, scan=arguments.scan,
        remat={"": False, "True": True}.get(arguments.remat, arguments.remat),
    )  # fmt: skip
    place = None if arguments.cpu else h100()
    flash = not arguments.cpu and arguments.dtype == "bfloat16"  # cuDNN's kernel is of half precision

    def of(kernel: str, in_chunks: bool) -> Memory:
        attention = cast(Literal["xla", "cudnn"], kernel)
        return measure(
            dataclasses.replace(config, attention=attention), arguments.rows, in_chunks=in_chunks, place=place
        )

    print(table(of, ("xla", "cudnn") if flash else ("xla",)))


if __name__ == "__main__":
    main()
