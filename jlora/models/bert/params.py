"""BERT's checkpoints: Hugging Face's `BertForMaskedLM` and its kin."""

from collections.abc import Mapping
from typing import Any

from jlora.models.architecture import TOKENS, Architecture, Head, configured, flag_of, names_of, unsupported
from jlora.models.bert.modeling import Bert, BertConfig
from jlora.models.tensors import Leaf, embedding, layered, leaf, linear, norm

BODY = "BertModel"
POSITIONS = "max_position_embeddings"
KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "types": "type_vocab_size",
    "nonlinearity": "hidden_act",
    "epsilon": "layer_norm_eps",
}  # of RoBERTa's, too


def read(json: Mapping[str, Any], head: Head) -> BertConfig:
    """A BERT's config.json."""
    supported(json, head)
    pooler = has_pooler(json, head, BODY)
    return configured(BertConfig, json, KEYS | {"context": POSITIONS}, optional={}, pooler=pooler, head=head)


def write(c: BertConfig) -> dict[str, Any]:
    """Keys that `read` reads."""
    return {POSITIONS: c.context} | write_encoder(c)


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
    has_pooler_layer = flag_of(json, "add_pooling_layer", default=True)
    return head == "none" and body in (names_of(json, "architectures") or [body]) and has_pooler_layer


def write_encoder(c: BertConfig) -> dict[str, Any]:
    """Entries of config.json: `KEYS`, and the one that `has_pooler` reads, which transformers passes over."""
    return {key: getattr(c, name) for name, key in KEYS.items()} | (
        {"add_pooling_layer": False} if c.head == "none" and not c.pooler else {}
    )


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
    inputs=lambda c: (TOKENS,),
    table=table,
    prefix="bert.",
    # a buffer, the decoder's copies of the embedding and the bias, and the head of the next sentence
    ignored=r"(^|\.)embeddings\.position_ids$|^cls\.predictions\.decoder\.|^cls\.seq_relationship\.",
    renamed=((r"\bLayerNorm\.gamma$", "LayerNorm.weight"), (r"\bLayerNorm\.beta$", "LayerNorm.bias")),
)
