"""Prompts for Stable Diffusion 1.x, 2.x and SDXL: texts to tokens, tokens to the arrays that condition a UNet."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models import placed
from jlora.models.clip.modeling import CLIPText
from jlora.models.tokenizer import Tokenizer

Long = Literal["raise", "cut", "chunk"]
CONTEXT = 77  # tokens that CLIP's text encoders take, the two around a text included
AROUND = 2  # <|startoftext|> and <|endoftext|>
SHOWN = 200  # characters of a prompt in an error


class Encoded(NamedTuple):
    """Arrays that condition a UNet, float32.

    Attributes:
      context: (batch, length, width), what its cross-attention reads; of two encoders the widths are joined.
      pooled: (batch, projection), SDXL's vector of the whole text; None for Stable Diffusion 1.x and 2.x.
    """

    context: jax.Array
    pooled: jax.Array | None


# -- texts to tokens ---------------------------------------------------------------------------------------------------


def tokens_of(
    tokenizer: Tokenizer, prompts: Sequence[str], *, long: Long = "raise", context: int = CONTEXT, chunks: int = 1
) -> np.ndarray:
    """Tokens of prompts: <|startoftext|>, text, <|endoftext|>, padding, as CLIP's text encoders take them.

    Args:
      tokenizer: CLIP's.
      prompts: one for each row; "" is the unconditional one.
      long: what to do with a prompt of more than `context` tokens. "raise" refuses it; "cut" drops the end, as
        diffusers does; "chunk" splits it into pieces of `context - 2` tokens, which are encoded one by one.
      context: tokens that the encoder takes at once.
      chunks: with `long="chunk"`, the least number of pieces: for prompts whose contexts have to be as long as others'.

    Returns:
      (prompts, context), int32; with "chunk" (prompts, pieces * context), as many pieces as the longest prompt needs,
      the other prompts filled up with pieces that are empty texts.

    Raises:
      ValueError: for a prompt that is too long, with how many tokens it has and the text that would be cut; for no
        prompts, a tokenizer without the two tokens around a text or padding, and an unknown `long`.
      TypeError: for one string in the place of a list.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is a string, expected a list of them: pass [prompt]")
    if len(prompts) == 0:
        raise ValueError('prompts is empty: give at least one, "" for a picture of anything')
    if long not in ("raise", "cut", "chunk"):
        raise ValueError(f"long={long!r}, expected 'raise', 'cut' or 'chunk'")
    if chunks < 1 or (chunks > 1 and long != "chunk"):
        raise ValueError(f"chunks={chunks}: expected 1, or more with long='chunk'")
    room = context - AROUND
    if room < 1:
        raise ValueError(f"context={context} leaves no room for text beside the {AROUND} tokens around it")
    bos, eos, pad = (_needed(tokenizer, role) for role in ("bos", "eos", "pad"))
    texts = [tokenizer.encode(prompt, special=False) for prompt in prompts]
    if long == "raise":
        _check_lengths(tokenizer, texts, context)
    if long == "chunk":
        chunks = max(chunks, *(-(-len(text) // room) for text in texts))
    rows = np.full((len(texts), chunks, context), pad, np.int32)
    for row, text in zip(rows, texts, strict=True):
        for piece, start in zip(row, range(0, chunks * room, room), strict=True):
            around = [bos, *text[start : start + room], eos]
            piece[: len(around)] = around
    return rows.reshape(len(texts), chunks * context)


def _needed(tokenizer: Tokenizer, role: str) -> int:
    token: int | None = getattr(tokenizer, role)
    if token is None:
        raise ValueError(f"the tokenizer of '{tokenizer.source}' has no {role} token, so it is not CLIP's")
    return token


def _check_lengths(tokenizer: Tokenizer, texts: list[list[int]], context: int) -> None:
    room = context - AROUND
    over = [number for number, text in enumerate(texts) if len(text) > room]
    if over:
        text = texts[over[0]]
        lost = tokenizer.decode(text[room:], skip_special=False)
        lost = lost if len(lost) <= SHOWN else f"{lost[:SHOWN]}..."
        more = f" ({len(over)} of the {len(texts)} prompts are too long)" if len(over) > 1 else ""
        raise ValueError(
            f"prompts[{over[0]}] has {len(text) + AROUND} tokens, and the text encoder takes {context}{more}: "
            f"{lost!r} would be lost. Shorten the prompt, or pass long='chunk' to encode it in pieces of {room}, or "
            "long='cut' to drop the rest"
        )


# -- tokens to a UNet's conditions -------------------------------------------------------------------------------------


def with_tokenizer(encoder: CLIPText, tokenizer: Tokenizer) -> CLIPText:
    """The encoder that pools the first of the tokenizer's closing tokens.

    Published configs have an eos_token_id of 2, which stands for the largest token of a text. That is <|endoftext|>,
    unless tokens were added: those of textual inversion are larger, and would be pooled in its place.

    Raises:
      ValueError: if the tokenizer has tokens that the encoder has no embedding for, or no closing token.
    """
    tokenizer.check(encoder.config.vocab_size)
    return encoder.clone(config=dataclasses.replace(encoder.config, end=_needed(tokenizer, "eos")))


def encode(
    encoders: Sequence[CLIPText],
    params: Sequence[Any],
    tokens: Sequence[jax.Array | np.ndarray],
    *,
    xl: bool,
    clip_skip: int | None = None,
    lift: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Encoded:
    """Hidden states of one or two text encoders: a pure function of tokens and parameters, for use under jit.

    With h_0 the embedding, h_n the output of the n-th of N blocks and k = `clip_skip`:

    - Stable Diffusion 1.x and 2.x: context = ln_f(h_(N - k)).
    - SDXL: context = [h_(N - 1 - k) of each encoder], without ln_f, joined along the features;
      pooled = projection(ln_f(h_N)) of the last encoder at the closing token.

    Args:
      encoders: the modules, (text_encoder,) or (text_encoder, text_encoder_2).
      params: the parameters of each, in any dtype; adapted ones with `lift=jlora.lift`.
      tokens: for each encoder (batch, pieces * context), as `tokens_of` returns them.
      xl: SDXL's rule in place of that of 1.x and 2.x.
      clip_skip: k, as in diffusers; None for 0. "Clip skip n" of other programs is k = n - 1.
      lift: makes the function that is called out of each module's `apply`: `jlora.lift`.

    Returns:
      context (batch, pieces * context, width) and pooled (batch, projection) or None, both float32. Pieces are encoded
      one by one and their contexts joined; what is pooled is the first piece's.

    Raises:
      ValueError: if encoders, parameters and tokens differ in number, the tokens do not fit the encoders or each other,
        there are more blocks to skip than blocks, or SDXL's last encoder has no projection.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jlora.models.clip import CLIPText, CLIPTextConfig
      >>> encoder = CLIPText(CLIPTextConfig(vocab_size=64, context=8, width=16, layers=2, heads=2, hidden=32, end=63))
      >>> tokens = jnp.full((3, 8), 63)
      >>> params = encoder.init(jax.random.key(0), tokens)["params"]
      >>> encode((encoder,), (params,), (tokens,), xl=False).context.shape
      (3, 8, 16)
    """
    skip = clip_skip or 0
    _check(encoders, params, tokens, xl, skip)
    contexts, pooled = [], None
    for encoder, own, ids in zip(encoders, params, tokens, strict=True):
        (batch, length), context = ids.shape, encoder.config.context
        pieces = length // context
        rows = _in_pieces(partial(jnp.reshape, shape=(batch * pieces, context)), jnp.asarray(ids), pieces)
        call: Callable[..., Any] = encoder.apply if lift is None else lift(encoder.apply)
        out = call({"params": own}, rows, states=xl, skip=0 if xl else skip)
        h = out["states"][-(skip + 2)] if xl else out.get("hidden", out["out"])  # (batch * pieces, context, width)
        contexts.append(_in_pieces(partial(jnp.reshape, shape=(batch, length, -1)), h, pieces))
        if xl:
            pooled = _in_pieces(itemgetter(slice(None, None, pieces)), out["out"], pieces)  # the last encoder's
    return Encoded(contexts[0] if len(contexts) == 1 else placed.joined(contexts, axis=-1), pooled)


def _in_pieces(change: Callable[[jax.Array], jax.Array], x: jax.Array, pieces: int) -> jax.Array:
    """A change of the leading axis where there are several pieces; on a mesh of Explicit axes that lies as it did."""
    return x if pieces == 1 else placed.on_auto_axes(change, placed.rows_of(x))(x)


def _check(encoders: Sequence[CLIPText], params: Sequence[Any], tokens: Sequence[Any], xl: bool, skip: int) -> None:
    counts = (len(encoders), len(params), len(tokens))
    if len({*counts}) > 1 or not counts[0]:
        raise ValueError(
            f"{counts[0]} encoders, {counts[1]} trees of parameters and {counts[2]} arrays of tokens: expected one of "
            "each for every encoder"
        )
    if len(encoders) > 1 and not xl:
        raise ValueError(f"{len(encoders)} encoders are SDXL's: pass xl=True")
    for number, (encoder, ids) in enumerate(zip(encoders, tokens, strict=True)):
        c = encoder.config
        if ids.ndim != 2 or not ids.shape[1] or ids.shape[1] % c.context:
            raise ValueError(
                f"tokens[{number}] is {ids.shape}, expected (batch, {c.context}) or a multiple of that for pieces: "
                "tokens_of(tokenizer, prompts) makes it"
            )
        if not 0 <= skip <= c.layers - xl:
            raise ValueError(
                f"clip_skip={skip}, and encoder {number} has {c.layers} blocks: expected 0 to {c.layers - xl}"
            )
    shapes = [
        (ids.shape[0], ids.shape[1] // encoder.config.context) for encoder, ids in zip(encoders, tokens, strict=True)
    ]
    if len({*shapes}) > 1:
        raise ValueError(
            f"tokens are {' and '.join(map(str, shapes))} (prompts, pieces) for encoders 0 and 1: encode the same "
            f"prompts for both, with long='chunk', chunks={max(pieces for _, pieces in shapes)} where they are long"
        )
    if xl and encoders[-1].config.head != "projection":
        raise ValueError(
            f"SDXL's pooled text comes of the last encoder's projection, and that has head="
            f"{encoders[-1].config.head!r}: load it with head='projection', or pass the encoders in their order"
        )
