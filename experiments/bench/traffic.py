"""Bytes that a step sends over 16 and 64 GPUs that are not there: LoRA against full fine-tuning, by layout.

    JAX_PLATFORMS=cpu python -m experiments.bench.traffic            # needs "jlora[plan-gpu]"; half a minute a row

Each step is compiled on shapes by XLA's compiler for the H100 and nothing is run: 16 x 2,048 tokens in bfloat16, layers
scanned and computed again, LoRA of r=16 on all linear layers with factors in float32, AdamW in the dtype of what is
trained. Arrays lie as `jlora.sharding.MODELS` says. Wire: bytes that a device receives in a step, in rings.
"""

import argparse
import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from experiments.report.tables import markdown_table
from jlora.models.sizes import model_of
from jlora.planning.report import Plan
from jlora.sharding import MODELS

TOKENS = (16, 2048)
OPTIONS: dict[str, Any] = {
    "scan": True, "remat": True, "dtype": "bfloat16", "param_dtype": "bfloat16", "context": TOKENS[1],
}  # fmt: skip


class Row(NamedTuple):
    """A model on a mesh of so many H100."""

    model: str
    mesh: dict[str, int]

    @property
    def devices(self) -> int:
        """Their number."""
        return math.prod(self.mesh.values())

    def planned(self, method: str) -> Plan:
        """The step, as compiled."""
        module: Any
        module, inputs = model_of(self.model, **OPTIONS)
        params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
        batch = jax.ShapeDtypeStruct(TOKENS, jnp.int32)

        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            logits = module.apply({"params": params}, tokens)[:, :-1].astype(jnp.float32)
            return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

        if method == "full":
            adapted = jlora.apply(params, method=jlora.full())
        else:
            sites = jlora.sites(loss, params, batch)
            adapted = jlora.apply(params, rank=16, targets="attn|mlp", sites=sites)
        return jlora.plan(loss, adapted, optax.adamw(1e-4), batch, self.mesh, f"{self.devices}xh100", rule=MODELS)


ROWS = (
    Row("llama-7b", {"data": 16}),
    Row("llama-7b", {"fsdp": 16}),
    Row("llama-7b", {"fsdp": 4, "tp": 4}),
    Row("gpt3-175b", {"fsdp": 8, "tp": 8}),
)
COLUMNS = (
    "model",
    "layout",
    "method",
    "peak, GiB",
    "TFLOP",
    "gathers, GB",
    "sums, GB",
    "scatters, GB",
    "wire, GB",
    "÷ full",
)


def table(rows: tuple[Row, ...]) -> str:
    """Two lines a row, full fine-tuning first."""
    lines: list[list[str]] = []
    for row in rows:
        whole = 0.0
        for method in ("full", "lora"):
            plan = row.planned(method)
            wire = {kind: found.wire / 1e9 for kind, found in plan.collectives.items()}
            total = sum(wire.values())
            whole = whole or total
            parts = [f"{wire.get(kind, 0.0):.1f}" for kind in ("all-gather", "all-reduce", "reduce-scatter")]
            layout = ", ".join(f"{name} {size}" for name, size in row.mesh.items())
            lines.append(
                [row.model, layout, method, f"{plan.peak / 2**30:.1f}", f"{plan.flops / 1e12:.1f}", *parts,
                 f"{total:.1f}", f"{total / whole:.2f}"]
            )  # fmt: skip
            print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    return "\n".join(markdown_table([COLUMNS, *lines]))


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose names have this in them")
    args = parser.parse_args(argv)
    print(table(tuple(row for row in ROWS if args.only in row.model)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
