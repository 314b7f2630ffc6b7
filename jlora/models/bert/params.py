"""BERT's checkpoints: Hugging Face's `BertForMaskedLM` and its kin."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jlora.models.architecture import Architecture, Head, unsupported
from jlora.models.bert.modeling import Bert, BertConfig
from jlora.models.tensors import Leaf, embedding, layered, leaf, linear, norm

BODY = "BertModel"


def read(json: Mapping[str, Any], head: Head) -> BertConfig:
    """A BERT's config.json."""
    supported(json, head)
    return BertConfig(
        context=json["max_position_embeddings"],
        pooler=has_pooler(json, head, BODY),
        head=head,
        **read_encoder(json),
    )


def write(c: BertConfig) -> dict[str, Any]:
    """What `read` reads."""
    return {"max_position_embeddings": c.context} | write_encoder(c)


def table(c: BertConfig) -> list[Leaf]:
    """Its rows. The decoder of a masked LM is tied to the embedding."""
    lm, transform = "cls.predictions", "cls.predictions.transform"
    pooler = linear("pooler", "bert.pooler.dense")
    heads = {
        "none": pooler if c.pooler else [],
        "masked_lm": [
            *linear("lm_head/dense", f"{transform}.dense"),
            *norm("lm_head/ln", f"{transform}.LayerNorm"),
            leaf("lm_head/bias", f"{lm}.bias"),
        ],
        "sequence_classification": [*pooler, *linear("classifier", "classifier")],
        "token_classification": linear("classifier", "classifier"),
    }
    return [*encoder("bert", c), *heads[c.head]]


# -- what RoBERTa's checkpoints have too -------------------------------------------------------------------------------


def supported(json: Mapping[str, Any], head: Head) -> None:
    """Raises a ValueError for what an encoder of this kind does not have here."""
    unsupported(json, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    if head == "masked_lm":
        unsupported(json, tie_word_embeddings=True)


def has_pooler(json: Mapping[str, Any], head: Head, body: str) -> bool:
    """Whether a checkpoint without a head holds a pooler. Without one it was saved here: see `write_encoder`."""
    return head == "none" and body in (json.get("architectures") or [body]) and json.get("add_pooling_layer", True)


def read_encoder(json: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the config that have the same names in config.json."""
    return {
        "vocab_size": json["vocab_size"],
        "width": json["hidden_size"],
        "layers": json["num_hidden_layers"],
        "heads": json["num_attention_heads"],
        "hidden": json["intermediate_size"],
        "types": json["type_vocab_size"],
        "nonlinearity": json["hidden_act"],
        "epsilon": json["layer_norm_eps"],
    }


def write_encoder(c: BertConfig) -> dict[str, Any]:
    """What `read_encoder` and `has_pooler` read; transformers passes over the latter, and makes a pooler of its own."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.hidden,
        "type_vocab_size": c.types,
        "hidden_act": c.nonlinearity,
        "layer_norm_eps": c.epsilon,
    } | ({"add_pooling_layer": False} if c.head == "none" and not c.pooler else {})


def encoder(name: str, c: BertConfig) -> list[Leaf]:
    """The rows of embeddings and blocks; `name` is that of the body in the classes with a head."""
    layer = f"{name}.encoder.layer.{{i}}"
    block = [
        *linear("attn/query", f"{layer}.attention.self.query"),
        *linear("attn/key", f"{layer}.attention.self.key"),
        *linear("attn/value", f"{layer}.attention.self.value"),
        *linear("attn/out", f"{layer}.attention.output.dense"),
        *norm("ln_1", f"{layer}.attention.output.LayerNorm"),
        *linear("mlp/fc", f"{layer}.intermediate.dense"),
        *linear("mlp/proj", f"{layer}.output.dense"),
        *norm("ln_2", f"{layer}.output.LayerNorm"),
    ]
    return [
        *embedding("wte", f"{name}.embeddings.word_embeddings"),
        *embedding("wpe", f"{name}.embeddings.position_embeddings"),
        *embedding("wtt", f"{name}.embeddings.token_type_embeddings"),
        *norm("ln_e", f"{name}.embeddings.LayerNorm"),
        *layered(block, c.layers, scan=c.scan),
    ]


ARCHITECTURE = Architecture(
    model_type="bert",
    config=BertConfig,
    classes={
        "none": BODY,
        "masked_lm": "BertForMaskedLM",
        "sequence_classification": "BertForSequenceClassification",
        "token_classification": "BertForTokenClassification",
    },
    read=read,
    write=write,
    build=Bert,
    inputs=lambda c: (jnp.zeros((1, 1), jnp.int32),),
    table=table,
    prefix="bert.",
    # a buffer, the decoder's copies of the embedding and the bias, and the head of the next sentence
    ignored=r"(^|\.)embeddings\.position_ids$|^cls\.predictions\.decoder\.|^cls\.seq_relationship\.",
    renamed=((r"\bLayerNorm\.gamma$", "LayerNorm.weight"), (r"\bLayerNorm\.beta$", "LayerNorm.bias")),
)
