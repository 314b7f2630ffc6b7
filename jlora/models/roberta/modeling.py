"""RoBERTa in Flax linen: BERT's blocks under positions that count from the padding's id on, and heads of its own.

Source: Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", arXiv 1907.11692; positions as in the
released code, `make_positions` of https://github.com/facebookresearch/fairseq.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models import fields, placed
from jlora.models.bert.modeling import BertConfig, MaskedLM, embedded, encoded, pooled
from jlora.models.layers import dense, embed


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The shape of a RoBERTa. The default is the "base" model; see `PRESETS` for the other.

    Attributes:
      pad: the id of the padding, and its position. That of the first token is `pad` + 1.
    """

    vocab_size: fields.Rows = 50265
    types: fields.Features = 1
    epsilon: fields.Epsilon = 1e-5
    pad: fields.Token = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad >= self.vocab_size:
            raise fields.FieldError(f"pad={self.pad} is no token of vocab_size={self.vocab_size}", "pad", "vocab_size")


PRESETS = {
    "roberta-base": RobertaConfig(),
    "roberta-large": RobertaConfig(width=1024, layers=24, heads=16, hidden=4096),
}


class Roberta(nn.Module):
    """tokens (batch, length) -> float32 logits (batch, length, vocab_size), or what `config.head` says; see `Bert`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = RobertaConfig(vocab_size=64, context=32, width=16, layers=2, heads=2, hidden=32)
      >>> tokens = jnp.full((1, 8), 5)
      >>> params = Roberta(config).init(jax.random.key(0), tokens)["params"]
      >>> Roberta(config).apply({"params": params}, tokens).shape
      (1, 8, 64)
    """

    config: RobertaConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        types: jax.Array | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array | dict[str, jax.Array]:
        """See the class.

        Args:
          tokens: (batch, length), int32.
          mask: (batch, length), False at padding; None for no padding.
          types: (batch, length), int32: the segment of each token; 0 when None.
          positions: (batch, length), int32: rows of the table of positions. When None they come from the tokens, not
            from the mask, as those of the pretrained models do: see `places`.
          deterministic: no dropout.
        """
        c = self.config
        rows = places(tokens, c.pad) if positions is None else positions
        wte = embed(c, c.vocab_size, "wte")
        h = embedded(c, wte, tokens, types, embed(c, c.context + c.pad + 1, "wpe")(rows))  # (batch, length, width)
        h = encoded(c, h, mask, deterministic)
        if c.head == "masked_lm":
            h = MaskedLM(c, "gelu", name="lm_head")(h, wte)  # (batch, length, vocab_size)
        elif c.head == "sequence_classification":
            h = Classifier(c, deterministic, name="classifier")(placed.token(h, 0))  # (batch, labels)
        elif c.head == "token_classification":
            h = placed.Dropout(c.dropout, deterministic=deterministic)(h)
            h = dense(c, c.labels, "classifier")(h)  # (batch, length, labels)
        elif c.pooler:
            return {"out": h.astype(jnp.float32), "pooled": pooled(c, h).astype(jnp.float32)}
        return placed.output(h)


class Classifier(nn.Module):
    """Two linear layers with tanh between them, of the first token: (batch, width) -> (batch, labels)."""

    config: RobertaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        drop = placed.Dropout(c.dropout, deterministic=self.deterministic)
        return dense(c, c.labels, "out")(drop(jnp.tanh(dense(c, c.width, "dense")(drop(x)))))


def places(tokens: jax.Array, pad: int) -> jax.Array:
    """Each token's row in the table of positions, (batch, length), int32: `pad` at padding, counted on from there.

    >>> places(jnp.asarray([[1, 7, 8, 1, 9]]), pad=1).tolist()
    [[1, 2, 3, 1, 4]]
    """
    real = (tokens != pad).astype(jnp.int32)
    before = placed.beside(jnp.cumsum(placed.whole_along(real, 1), axis=1), real)  # of all tokens, wherever they lie
    return before * real + pad
