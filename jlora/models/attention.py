"""Attention of queries, keys and values, as a module of its own: what acts on keys and values finds them there."""

import functools
import re
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models import attention_blocks, placed

Implementation = Literal["auto", "xla", "cudnn"]


class DotProductAttention(nn.Module):
    """`softmax(scale q k^T + bias) v`, without parameters, through `jax.nn.dot_product_attention`.

    Attributes:
      causal: a query sees the keys up to its own position. With more keys than queries the last ones belong together,
        and all keys before the first query's are seen, by all: a prefix.
      window: sliding window: each query attends to the last `window` keys, including itself. None for all.
      scale: 1 / sqrt(width) when None.
      dropout: of the attention weights, in [0, 1). In training it needs the plain form: no flash attention has it.
      deterministic: no dropout.
      implementation: "cudnn" is flash attention, "xla" the plain form. "auto": flash attention in a program that is
        compiled for CUDA, whatever devices there are here, if the operands allow it and cuDNN is installed where it is
        compiled (JAX's CUDA wheels bring it); every other platform's program has the plain form alone. Where the GPUs
        at hand are older than Ampere, the plain form, too, and where the tokens of a row lie on several devices, as
        the type of the query says on Explicit axes. On Auto axes nothing here knows that: say "xla".
      blocks: the plain form is that of `attention_blocks`: some queries at a time where there are many, and on a CPU
        all at once where there are few. Not where it is causal, with a mask, a bias or fewer key heads, nor where a
        row's tokens lie on several devices.
    """

    takes_prefix: ClassVar[bool] = True  # whoever puts keys before the others widens the mask, and nothing else
    causal: bool = False
    window: int | None = None
    scale: float | None = None
    dropout: float = 0.0
    deterministic: bool = True
    implementation: Implementation = "auto"
    blocks: bool = False

    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """(batch, length, heads, width) -> the same. The mask is True at the keys that are seen.

        Scores and softmax are float32 in any case. A query that sees no key gets the mean of all values.

        Args:
          query: (batch, length, heads, width).
          key, value: (batch, keys, key heads, width): each key head serves heads / key heads queries, in order.
          mask: broadcastable to (batch, heads, length, keys), bool.
          bias: added to the scores, broadcastable as the mask is. With fewer keys it is that of the last ones: a prefix
            has none.
        """
        length, keys = query.shape[1], key.shape[1]
        key, value = placed.whole_along(key, 1), placed.whole_along(value, 1)  # tokens may lie on other devices
        mask, bias = (x if x is None else placed.whole_along(x, -1) for x in (mask, bias))
        if bias is not None and bias.shape[-1] < keys:
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (keys - bias.shape[-1], 0)))
        drops = self.dropout > 0 and not self.deterministic
        causal, window = self.causal, self.window if self.causal else None
        if causal and (length != keys or drops):  # a prefix: it has to be spelt out
            past = causal_mask(length, keys, window)
            mask, causal, window = past if mask is None else mask & past, False, None
        if drops:
            weights = _weights(query, key, mask, bias, self.scale).astype(value.dtype)
            return _mixed(placed.Dropout(self.dropout, deterministic=False)(weights), value)
        attend = functools.partial(
            _attend, scale=self.scale, causal=causal, window=window, masked=mask is not None, biased=bias is not None
        )
        more = [x for x in (mask, bias) if x is not None]
        flash = placed.lying_as(query, functools.partial(attend, implementation="cudnn"))
        apart = placed.pieces(query, 1) > 1
        if self.implementation == "cudnn":
            if apart:
                raise ValueError(
                    "attention='cudnn' wants all tokens of a row on one device, and here they are split over "
                    f"{placed.pieces(query, 1)}: 'xla' and 'auto' take the plain form"
                )
            return flash(query, key, value, *more)
        plain: Callable[..., jax.Array] = functools.partial(attend, implementation="xla")
        if self.blocks and not (causal or more or apart) and key.shape == (len(query), keys, *query.shape[2:]):
            size = attention_blocks.size_of(length, keys) if length == keys else None
            if size is not None:
                plain = placed.lying_as(query, functools.partial(attention_blocks.attend, size=size, scale=self.scale))
            elif placed.explicit_mesh(query, key, value) is None:
                at_once = functools.partial(attention_blocks.at_once, scale=self.scale)
                plain = functools.partial(jax.lax.platform_dependent, cpu=at_once, default=plain)
        if self.implementation == "xla":
            return plain(query, key, value, *more)
        if apart or not (_fits_flash(query, keys, masked=bool(more)) and _has_flash()):
            return plain(query, key, value, *more)
        return jax.lax.platform_dependent(query, key, value, *more, cuda=flash, default=plain)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *more: jax.Array,
    scale: float | None,
    causal: bool,
    window: int | None,
    masked: bool,
    biased: bool,
    implementation: Literal["xla", "cudnn"],
) -> jax.Array:
    """`jax.nn.dot_product_attention`; `more` are the mask and the bias, those of them that there are."""
    mask, bias = more[0] if masked else None, more[-1] if biased else None
    if implementation == "cudnn" and mask is not None:  # which wants to see every query's row
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
    if implementation == "cudnn" and bias is not None:  # and a bias of the operands' dtype
        bias = bias.astype(query.dtype)
    length = query.shape[1]
    lengths: tuple[jax.Array | None, jax.Array | None] = (None, None)
    if implementation == "cudnn" and not more and (length % 2 or key.shape[1] % 2):
        (query, key, value), lengths = _even(query, key, value)
    try:
        with jax.numpy_dtype_promotion("standard"):  # inside, it promotes half operands to float32 by itself
            out = jax.nn.dot_product_attention(
                query, key, value, bias, mask, scale=scale, is_causal=causal,
                local_window_size=None if window is None else (window - 1, 0), implementation=implementation,
                query_seq_lengths=lengths[0], key_value_seq_lengths=lengths[1],
            )  # fmt: skip
            return out[:, :length]
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise RuntimeError(
            f"attention='cudnn' needs cuDNN's library where the program is made, which JAX's CUDA wheels bring "
            f"({error}); 'xla' is the plain form, 'auto' takes cuDNN's where it can"
        ) from error


def _even(*operands: jax.Array) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array]]:
    """Query, key and value of even lengths, and the lengths that they had: for others flash attention has no gradient.

    That is JAX's check, which takes every program for one with a bias. A text of CLIP's has 77 tokens.
    """
    query, key, _ = (jnp.full(len(x), x.shape[1], jnp.int32) for x in operands)
    return [jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in operands], (query, key)


def causal_mask(length: int, keys: int, window: int | None = None) -> jax.Array:
    """Mask of the last `length` of `keys` positions: (1, 1, length, keys), bool. Keys before them are seen by all."""
    before = keys - length
    query = before + jax.lax.broadcasted_iota(jnp.int32, (length, keys), 0)  # in the program: no constant of this size
    key = jax.lax.broadcasted_iota(jnp.int32, (length, keys), 1)
    seen = key <= query
    if window is not None:
        seen &= (query - key < window) | (key < before)
    return seen[None, None]


def _fits_flash(query: jax.Array, keys: int, *, masked: bool) -> bool:
    """Whether cuDNN has flash attention, and its gradient, for such operands; with a mask, of even lengths alone."""
    width, odd = query.shape[-1], query.shape[1] % 2 or keys % 2
    return query.dtype in (jnp.bfloat16, jnp.float16) and not (width % 8 or width > 128 or (masked and odd))


@functools.cache
def _has_flash() -> bool:
    """Whether a program with flash attention can be made here: cuDNN is there, and no GPU at hand is too old for it.

    The devices at hand need not be those that the program is compiled for: without any, cuDNN alone decides.
    """
    x = jax.ShapeDtypeStruct((1, 2, 1, 8), jnp.bfloat16)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(lambda x: attend(x, x, x), x)
    except RuntimeError:  # "cuDNN is not detected."
        return False
    capabilities = [str(getattr(device, "compute_capability", "")) for device in jax.local_devices()]
    known = [float(found) for found in capabilities if re.fullmatch(r"\d+\.\d+", found)]  # CUDA's, as "9.0"
    return all(capability >= 8 for capability in known)


def _weights(
    query: jax.Array, key: jax.Array, mask: jax.Array | None, bias: jax.Array | None, scale: float | None
) -> jax.Array:
    """The attention weights, (batch, heads, length, keys), float32."""
    groups = query.shape[2] // key.shape[2]
    key = jnp.repeat(key, groups, axis=2) if groups > 1 else key
    scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return nn.softmax(scores)


def _mixed(weights: jax.Array, value: jax.Array) -> jax.Array:
    groups = weights.shape[1] // value.shape[2]
    value = jnp.repeat(value, groups, axis=2) if groups > 1 else value
    return jnp.einsum("bhts,bshd->bthd", weights, value)
