"""OFT: orthogonal fine-tuning, a rotation of the inputs block by block."""

import jax
import jax.numpy as jnp

from jlora.methods.lora import low_rank
from jlora.methods.matrix import matrices, restore, sizes
from jlora.methods.method import Arrays, Config, Method, check_rank
from jlora.sites import Site
from jlora.weight import Weight


def oft(block_size: int) -> Method:
    """OFT: `R W`, R block-diagonal and orthogonal over the inputs.

    Each block is the Cayley transform of a skew-symmetric Q whose upper triangle is trained: `R = (I - Q) (I + Q)^-1`.
    Q starts at 0, R at I. R W is not `W + A B`: it is formed once per call, by inputs * block_size * outputs
    multiplications, and its gradient has the size of W.

    Args:
      block_size: the side of a block; it divides the number of inputs of every weight.

    Raises:
      ValueError: if `block_size` is no integer of at least 2, or does not divide the inputs of a weight.

    Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280, section 3.
    """
    check_rank(block_size, "block_size")
    if block_size < 2:
        raise ValueError("block_size must be at least 2: a block of 1 does not rotate")
    config: Config = (("name", "oft"), ("block_size", block_size))

    def init(key: jax.Array, w: jax.Array, site: Site) -> Arrays:
        stack, inputs, _ = sizes(site)
        if inputs % block_size:
            raise ValueError(f"oft: block_size={block_size} does not divide the {inputs} inputs of {site.path!r}")
        return {"Q": jnp.zeros((stack, inputs // block_size, block_size * (block_size - 1) // 2), jnp.float32)}

    def weight(w: jax.Array, site: Site, factors: Arrays, buffers: Arrays) -> Weight:
        rotation = cayley(factors["Q"], block_size)  # (stack, blocks, block, block)
        stack, inputs, outputs = sizes(site)
        blocks = matrices(w, site).astype(jnp.float32).reshape(stack, -1, block_size, outputs)
        turned = jnp.einsum("nbij,nbjo->nbio", rotation, blocks).reshape(stack, inputs, outputs)
        return low_rank(restore(turned, site).astype(w.dtype), site)

    return Method(config, 0, None, init, weight)


def cayley(triangle: jax.Array, side: int) -> jax.Array:
    """Orthogonal matrices (..., side, side) from the upper triangles of skew-symmetric ones."""
    upper = jnp.zeros((*triangle.shape[:-1], side, side), triangle.dtype)
    upper = upper.at[..., *jnp.triu_indices(side, 1)].set(triangle)
    skew = upper - jnp.swapaxes(upper, -1, -2)
    one = jnp.broadcast_to(jnp.eye(side, dtype=triangle.dtype), skew.shape)
    # (I - Q) and (I + Q)^-1 commute, so that the solve may stand on the left.
    return jnp.linalg.solve(one + skew, one - skew)
