"""Methods that start A and B from the weight itself and take their product out of it: PiSSA, OLoRA, CorDA, LoRA-GA."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.methods.acts import Arrays
from jlora.methods.checks import check_alpha, check_number
from jlora.methods.lora import low_rank
from jlora.methods.matrix import a_form, b_form
from jlora.transform.sites import Target
from jlora.transform.weight import Weight

START = ("A0", "B0")  # the names of the frozen copies


def check_positive(alpha: Any, where: str = "alpha") -> float | None:
    """Returns a valid numerator of the scale, of a start that has the scale's root in each of A0 and B0.

    Raises:
      ValueError: if it is neither None nor a finite number above 0.
    """
    number = check_alpha(alpha, where)
    if number is not None and number < 0:
        raise ValueError(f"{where} must be positive, not {number!r}")
    return number


def minus_initial(w: jax.Array, target: Target, factors: Arrays, buffers: Arrays) -> Weight:
    """`W + alpha / r * (A B - A0 B0)`, A0 and B0 being the initial A and B: rank 2r on the base as it is.

    The papers store `W - alpha / r * A0 B0` as the base. In this form the base stays what it was, shared with other
    adapters and untouched by a rounding of the residual, and the adapter is a plain LoRA of rank 2r throughout.
    """
    scale = jnp.asarray(target.alpha / target.rank, factors["A"].dtype)
    a = jnp.concatenate([factors["A"] * scale, buffers["A0"] * -scale], axis=-1)
    b = jnp.concatenate([factors["B"], buffers["B0"]], axis=-1)
    return low_rank(w, target, a, b)


def rescaled(target: Target, factors: Arrays, buffers: Arrays, s: Any) -> tuple[Target, Arrays]:
    """`Method.rescale`: alpha times s, since A0 and B0 are frozen; A0 and B0 themselves for 0.

    Raises:
      ValueError: for a negative s, or one that is traced: alpha is a positive constant of the program.
    """
    s = check_number(s, "scale: s")
    if s < 0:
        raise ValueError(
            f"scale: s must be at least 0 for a method that starts from the weight itself, not {s!r}; "
            "jlora.to_lora(adapted) is a plain LoRA, which has any"
        )
    if s == 0:
        return target, {"A": jnp.array(buffers["A0"], copy=True), "B": jnp.array(buffers["B0"], copy=True)}
    return dataclasses.replace(target, alpha=target.alpha * s), factors


def from_initial(a: jax.Array, b: jax.Array, target: Target) -> Arrays:
    """The initial arrays from A (stack, inputs, r) and B (stack, r, outputs)."""
    a, b = a_form(a.astype(jnp.float32), target), b_form(b.astype(jnp.float32), target)
    return {"A": a, "B": b, "A0": jnp.array(a, copy=True), "B0": jnp.array(b, copy=True)}


def is_taken_out(method: Any) -> bool:
    """Whether a method takes its start out of the weight, so that quantising the rest makes it a plain one."""
    return bool(method.acts.without_start(method) != method)


def taken_out(w: Any, target: Target, buffers: Arrays) -> jax.Array:
    """The residual `W - alpha / r * A0 B0` in float32."""
    scale = jnp.asarray(target.alpha / target.rank, buffers["A0"].dtype)
    wide = tree.dense(w).astype(jnp.float32)
    return low_rank(wide, target, buffers["A0"] * -scale, buffers["B0"]).dense()
