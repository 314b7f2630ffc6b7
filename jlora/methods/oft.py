"""OFT: orthogonal fine-tuning, a rotation of the inputs block by block."""

import jax
import jax.numpy as jnp

from jlora.methods.acts import Arrays, OnWeights
from jlora.methods.checks import check_rank, check_whole
from jlora.methods.lora import low_rank
from jlora.methods.matrix import matrices, restore, sizes
from jlora.methods.method import Config, Method
from jlora.transform.sites import Target
from jlora.transform.weight import Weight

_MOST = 100  # terms, each of which is a product of the program


def oft(block_size: int, *, terms: int = 0) -> Method:
    """OFT: `R W`, R block-diagonal and orthogonal over the inputs.

    Each block is the Cayley transform of a skew-symmetric Q whose upper triangle is trained: `R = (I - Q) (I + Q)^-1`.
    Q starts at 0, R at I. R W is not `W + A B`: it is formed once per call, by inputs * block_size * outputs
    multiplications, and its gradient has the size of W.

    Args:
      block_size: the side of a block; it divides the number of inputs of every weight.
      terms: 0 for the transform itself; else of its Neumann series, `I - 2 Q + 2 Q^2 - ...`, whose last term counts
        half and which is orthogonal for small Q alone. PEFT trains with 5, with the sign of Q turned round, and its 3
        are 4.

    Raises:
      ValueError: if `block_size` is no integer of at least 2, or does not divide the inputs of a weight; if `terms` is
        no integer from 0 to 100.

    Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280, section 3.
    """
    block_size = check_rank(block_size, "block_size")
    if block_size < 2:
        raise ValueError("block_size must be at least 2: a block of 1 does not rotate")
    terms = check_whole(terms, "terms")
    if terms > _MOST:
        raise ValueError(f"terms must be at most {_MOST}, not {terms}; 0 for the transform itself")
    config: Config = (("name", "oft"), ("block_size", block_size), ("terms", terms))

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        stack, inputs, _ = sizes(target)
        if inputs % block_size:
            raise ValueError(f"oft: block_size={block_size} does not divide the {inputs} inputs of {target.path!r}")
        return {"Q": jnp.zeros((stack, inputs // block_size, block_size * (block_size - 1) // 2), jnp.float32)}

    def weight(w: jax.Array, target: Target, factors: Arrays, buffers: Arrays) -> Weight:
        rotation = cayley(factors["Q"], block_size, terms)  # (stack, blocks, block, block)
        stack, inputs, outputs = sizes(target)
        blocks = matrices(w, target).astype(jnp.float32).reshape(stack, inputs // block_size, block_size, outputs)
        turned = jnp.einsum("nbij,nbjo->nbio", rotation, blocks, precision="highest").reshape(stack, inputs, outputs)
        return low_rank(restore(turned, target).astype(w.dtype), target)

    return Method(config, None, None, OnWeights(init, weight))


def cayley(triangle: jax.Array, side: int, terms: int = 0) -> jax.Array:
    """Orthogonal matrices (..., side, side) from the upper triangles of skew-symmetric ones, or nearly: see `oft`."""
    upper = jnp.zeros((*triangle.shape[:-1], side, side), triangle.dtype)
    upper = upper.at[..., *jnp.triu_indices(side, 1)].set(triangle)
    skew = upper - jnp.swapaxes(upper, -1, -2)
    return series(skew, terms) if terms else rotation(skew)


def series(skew: jax.Array, terms: int) -> jax.Array:
    """The first terms of `(I - Q) (I + Q)^-1 = I - 2 Q + 2 Q^2 - ...`; the last one, from the third on, counts half."""
    turned = -skew
    total, power = jnp.broadcast_to(jnp.eye(skew.shape[-1], dtype=skew.dtype), skew.shape), turned
    if terms > 1:
        total = total + 2.0 * turned
    if terms > 2:
        for _ in range(2, max(terms, 4) - 1):
            power = jnp.matmul(power, turned, precision="highest")
            total = total + 2.0 * power
        total = total + jnp.matmul(power, turned, precision="highest")
    return total


@jax.custom_jvp
def rotation(skew: jax.Array) -> jax.Array:
    """`R = (I - Q) (I + Q)^-1 = 2 (I + Q)^-1 - I` of skew-symmetric matrices Q (..., n, n).

    The symmetric part of I + Q is I, and stays at least I in what elimination leaves: every pivot is at least 1, and
    Gauss-Jordan needs no exchange of rows. LAPACK's batched solver is not only more than is needed: on the CPU two of
    its calls in one program may wait for each other forever (see `one_by_one` in methods/matrix.py).
    """
    n = skew.shape[-1]
    one = jnp.broadcast_to(jnp.eye(n, dtype=skew.dtype), skew.shape)
    at = jnp.arange(n)

    def eliminate(k: jax.Array, m: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(m, k, axis=-2)  # (..., 1, n)
        column = jax.lax.dynamic_index_in_dim(m, k, axis=-1)  # (..., n, 1)
        pivot = jax.lax.dynamic_index_in_dim(row, k, axis=-1)  # (..., 1, 1)
        row = jnp.where(at == k, 1.0, row) / pivot
        return jnp.where((at == k)[:, None], row, jnp.where(at == k, 0.0, m) - column * row)

    return 2.0 * jax.lax.fori_loop(0, n, eliminate, one + skew) - one


@rotation.defjvp
def _rotation_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """`dR = -2 M dQ M`, M = (I + Q)^-1 = (R + I) / 2."""
    r = rotation(*primals)
    twice = r + jnp.broadcast_to(jnp.eye(r.shape[-1], dtype=r.dtype), r.shape)
    product = lambda x, y: jnp.matmul(x, y, precision="highest")
    return r, -0.5 * product(product(twice, *tangents), twice)
