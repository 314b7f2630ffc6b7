"""The residual that a method leaves of a weight when it takes its start out: PiSSA, OLoRA, CorDA, LoRA-GA."""

from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.methods import Method, dora, lora, tied, together
from jlora.methods.acts import Arrays, OnWeights
from jlora.methods.lora import low_rank
from jlora.methods.residual import minus_initial
from jlora.transform.sites import Target


def is_taken_out(method: Method) -> bool:
    """Whether a method takes its start out of the weight, as `minus_initial` does, inside of DoRA too."""
    return method != without_start(method)


def without_start(method: Method) -> Method:
    """The method for the residual `W - s A0 B0` as the base: plain LoRA in the place of each that takes its start out.

    DoRA, `tied` and `together` of such a one stay what they are, around a plain LoRA.
    """
    options = dict(method.config)
    if options["name"] == "dora":
        return dora(without_start(options["inner"]))
    if options["name"] == "tied":
        return tied(without_start(options["inner"]), options["groups"], options["names"])
    if isinstance(method.acts, OnWeights) and method.acts.weight is minus_initial:
        return lora(method.rank or 1, method.alpha)
    if len(method.parts) > 1:
        return together(
            *(without_start(part) if of is None else (without_start(part), of) for part, of in method.parts)
        )
    return method


def taken_out(w: Any, target: Target, buffers: Arrays) -> jax.Array:
    """The residual `W - alpha / r * A0 B0` in float32."""
    scale = jnp.asarray(target.alpha / target.rank, buffers["A0"].dtype)
    wide = tree.dense(w).astype(jnp.float32)
    return low_rank(wide, target, buffers["A0"] * -scale, buffers["B0"]).dense()
