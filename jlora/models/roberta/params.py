"""RoBERTa's checkpoints: Hugging Face's `RobertaForMaskedLM` and its kin."""

from collections.abc import Mapping
from typing import Any

from jlora.models.architecture import TOKENS, Architecture, Head, configured, number_of
from jlora.models.bert.params import KEYS, POSITIONS, encoder, has_pooler, supported, write_encoder
from jlora.models.fields import TOKEN
from jlora.models.roberta.modeling import Roberta, RobertaConfig
from jlora.models.tensors import Leaf, leaf, linear, norm

BODY = "RobertaModel"


def read(json: Mapping[str, Any], head: Head) -> RobertaConfig:
    """A RoBERTa's config.json, whose number of positions counts those that no token has."""
    supported(json, head)
    pad, positions = number_of(json, "pad_token_id", TOKEN), number_of(json, POSITIONS, TOKEN)
    if positions < pad + 2:
        raise ValueError(f"config.json has pad_token_id={pad}, {POSITIONS}={positions}: tokens come after the padding")
    return configured(
        RobertaConfig, json, KEYS, optional={}, origins={"context": POSITIONS, "pad": "pad_token_id"},
        context=positions - pad - 1, pad=pad, pooler=has_pooler(json, head, BODY), head=head,
    )  # fmt: skip


def write(c: RobertaConfig) -> dict[str, Any]:
    """Keys that `read` reads."""
    return {POSITIONS: c.context + c.pad + 1, "pad_token_id": c.pad} | write_encoder(c)


def table(c: RobertaConfig) -> list[Leaf]:
    """Its rows. The decoder of a masked LM is tied to the embedding."""
    heads = {
        "none": linear("pooler", "roberta.pooler.dense") if c.pooler else [],
        "masked_lm": [
            *linear("lm_head/dense", "lm_head.dense"),
            *norm("lm_head/ln", "lm_head.layer_norm"),
            leaf("lm_head/bias", "lm_head.bias"),
        ],
        "sequence_classification": [
            *linear("classifier/dense", "classifier.dense"),
            *linear("classifier/out", "classifier.out_proj"),
        ],
        "token_classification": linear("classifier", "classifier"),
    }
    return [*encoder("roberta", c), *heads[c.head]]


ARCHITECTURE = Architecture(
    model_type="roberta",
    config=RobertaConfig,
    classes={
        "none": BODY,
        "masked_lm": "RobertaForMaskedLM",
        "sequence_classification": "RobertaForSequenceClassification",
        "token_classification": "RobertaForTokenClassification",
    },
    read=read,
    write=write,
    build=Roberta,
    inputs=lambda c: (TOKENS,),
    table=table,
    prefix="roberta.",
    # a buffer, the decoder's copies of the embedding and the bias, and a pooler where none is asked for
    ignored=r"(^|\.)embeddings\.position_ids$|^lm_head\.decoder\.|^roberta\.pooler\.",
    renamed=((r"^pooler\.", "roberta.pooler."),),  # by its full name in all classes, so that `ignored` knows it
)
