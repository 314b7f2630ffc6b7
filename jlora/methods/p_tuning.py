"""P-tuning: a prompt that a small network makes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.methods.acts import Arrays, Factors, OnActivations
from jlora.methods.checks import check_rank
from jlora.methods.method import Config, Method
from jlora.methods.prompt_tuning import NEEDS, TOKEN_TABLE, check_table, intercept, only_one, prompt_tuning
from jlora.transform.sites import Target

ENCODERS = ("mlp", "lstm")


def p_tuning(length: int, *, hidden: int = 128, encoder: str = "mlp") -> Method:
    """P-tuning: prompt tuning with `P = f(E)`, the embeddings E and the network f trained.

    f is applied to the whole prompt: "mlp" is `W3 relu(W2 relu(W1 E))`, each with a bias; "lstm" a bidirectional LSTM
    over the prompt and then `W2 relu(W1 h)`, so that its tokens depend on each other. After training `bake_prompt`
    keeps P alone. Of the paper's patterns there is the one with all of the prompt before the tokens.

    Args:
      length: of the prompt, in tokens.
      hidden: the width of f.
      encoder: "mlp" or "lstm".

    Raises:
      ValueError: for a length or hidden that is no integer of at least 1, or an unknown encoder.

    Source: Liu et al., "GPT Understands, Too", arXiv 2103.10385, section 3.2.

    Example:
      >>> import jlora
      >>> jlora.p_tuning(20, hidden=64)
      p_tuning(length=20, hidden=64, encoder='mlp')
    """
    length, hidden = check_rank(length, "length"), check_rank(hidden, "hidden")
    if encoder not in ENCODERS:
        raise ValueError(f"encoder must be one of {', '.join(map(repr, ENCODERS))}, not {encoder!r}")
    config: Config = (("name", "p_tuning"), ("length", length), ("hidden", hidden), ("encoder", encoder))

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        _, width = check_table(target, "p_tuning")
        embedding, *keys = jax.random.split(key, 10)
        arrays = {"embedding": jax.random.normal(embedding, (target.rank, width), jnp.float32)}
        if encoder == "mlp":
            layers = {"1": (width, hidden), "2": (hidden, hidden), "3": (hidden, width)}
        else:
            for i, way in enumerate(("forward", "backward")):
                bound = hidden**-0.5
                shapes = {"input": (width, 4 * hidden), "state": (hidden, 4 * hidden), "gates": (4 * hidden,)}
                for n, (name, shape) in enumerate(shapes.items()):
                    arrays[f"{way}_{name}"] = _uniform(jax.random.fold_in(keys[6 + i], n), shape, bound)
            layers = {"1": (2 * hidden, 2 * hidden), "2": (2 * hidden, width)}
        for i, (name, (inputs, outputs)) in enumerate(layers.items()):
            arrays[f"weight_{name}"] = _uniform(keys[2 * i], (inputs, outputs), inputs**-0.5)
            arrays[f"bias_{name}"] = _uniform(keys[2 * i + 1], (outputs,), inputs**-0.5)
        return arrays

    def prepare(factors: Factors, targets: Sequence[Target]) -> Factors:
        return {path: {"prompt": encoded(arrays)} for path, arrays in only_one(factors, targets).items()}

    acts = OnActivations(init, intercept, NEEDS, (TOKEN_TABLE,), prepare=prepare, plain=prompt_tuning(length))
    return Method(config, length, None, acts)


def encoded(arrays: Arrays) -> jax.Array:
    """The prompt (length, width) that the network makes of its embeddings."""
    h = arrays["embedding"]
    if "forward_input" in arrays:
        h = jnp.concatenate([_lstm(arrays, h, "forward"), _lstm(arrays, h[::-1], "backward")[::-1]], axis=-1)
    last = 3 if "weight_3" in arrays else 2
    for i in range(1, last + 1):
        h = h @ arrays[f"weight_{i}"] + arrays[f"bias_{i}"][None]
        h = nn.relu(h) if i < last else h
    return h


def _lstm(arrays: Arrays, x: jax.Array, way: str) -> jax.Array:
    """(length, width) -> (length, hidden), from a state of zeros; the gates are input, forget, cell, output."""
    state = arrays[f"{way}_state"]

    def cell(carry: tuple[jax.Array, jax.Array], gates: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        h, c = carry
        i, f, g, o = jnp.split(gates + h @ state, 4)
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
        h = nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros(state.shape[0], x.dtype)
    _, out = jax.lax.scan(cell, (zeros, zeros), x @ arrays[f"{way}_input"] + arrays[f"{way}_gates"][None])
    return out


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
