"""DeBERTa's checkpoints: Hugging Face's `DebertaV2ForMaskedLM` and its kin."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jlora.models.architecture import Architecture, Head, unsupported
from jlora.models.deberta.modeling import Deberta, DebertaConfig
from jlora.models.tensors import CONV_1D, Leaf, embedding, layered, leaf, linear, norm


def read(json: Mapping[str, Any], head: Head) -> DebertaConfig:
    """A DeBERTa's config.json."""
    width, heads = json["hidden_size"], json["num_attention_heads"]
    unsupported(
        {"relative_attention": False} | {**json}, relative_attention=True, norm_rel_ebd=("layer_norm", "none"),
        attention_head_size=width // heads, embedding_size=width, pooler_hidden_size=width, pooler_dropout=0,
        conv_groups=1, tie_word_embeddings=True,
    )  # fmt: skip
    terms: Any = json["pos_att_type"] or []
    if isinstance(terms, str):
        terms = terms.lower().split("|")
    return DebertaConfig(
        vocab_size=json["vocab_size"],
        context=json["max_position_embeddings"],
        width=width,
        layers=json["num_hidden_layers"],
        heads=heads,
        hidden=json["intermediate_size"],
        types=json["type_vocab_size"],
        absolute=json.get("position_biased_input", True),
        terms=tuple(term.strip() for term in terms),
        shared=json.get("share_att_key", False),
        buckets=json.get("position_buckets", -1),
        reach=json.get("max_relative_positions", -1),
        norm_positions=json.get("norm_rel_ebd", "none") == "layer_norm",
        convolution=json.get("conv_kernel_size", 0),
        nonlinearity=json["hidden_act"],
        conv_nonlinearity=json.get("conv_act", "tanh"),
        pooler_nonlinearity=json.get("pooler_hidden_act", "gelu"),
        epsilon=json["layer_norm_eps"],
        legacy=json.get("legacy", True),
        head=head,
    )


def write(c: DebertaConfig) -> dict[str, Any]:
    """What `read` reads."""
    return {
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.hidden,
        "type_vocab_size": c.types,
        "position_biased_input": c.absolute,
        "relative_attention": True,
        "pos_att_type": list(c.terms),
        "share_att_key": c.shared,
        "position_buckets": c.buckets,
        "max_relative_positions": c.reach,
        "norm_rel_ebd": "layer_norm" if c.norm_positions else "none",
        "hidden_act": c.nonlinearity,
        "pooler_hidden_act": c.pooler_nonlinearity,
        "layer_norm_eps": c.epsilon,
        "legacy": c.legacy,
    } | ({"conv_kernel_size": c.convolution, "conv_act": c.conv_nonlinearity} if c.convolution else {})


def table(c: DebertaConfig) -> list[Leaf]:
    """Its rows. The decoder of a masked LM is tied to the embedding."""
    body, layer = "deberta", "deberta.encoder.layer.{i}"
    own = [] if c.shared else [{"c2p": "key", "p2c": "query"}[term] for term in c.terms]
    block = [
        *linear("attn/query", f"{layer}.attention.self.query_proj"),
        *linear("attn/key", f"{layer}.attention.self.key_proj"),
        *linear("attn/value", f"{layer}.attention.self.value_proj"),
        *(row for name in own for row in linear(f"attn/pos_{name}", f"{layer}.attention.self.pos_{name}_proj")),
        *linear("attn/out", f"{layer}.attention.output.dense"),
        *norm("ln_1", f"{layer}.attention.output.LayerNorm"),
        *linear("mlp/fc", f"{layer}.intermediate.dense"),
        *linear("mlp/proj", f"{layer}.output.dense"),
        *norm("ln_2", f"{layer}.output.LayerNorm"),
    ]
    convolution = [
        leaf("conv/conv/kernel", f"{body}.encoder.conv.conv.weight", CONV_1D),
        leaf("conv/conv/bias", f"{body}.encoder.conv.conv.bias"),
        *norm("conv/ln", f"{body}.encoder.conv.LayerNorm"),
    ]
    lm = "cls.predictions" if c.legacy else "lm_predictions.lm_head"
    transform = f"{lm}.transform" if c.legacy else lm
    heads = {
        "masked_lm": [
            *linear("lm_head/dense", f"{transform}.dense"),
            *norm("lm_head/ln", f"{transform}.LayerNorm"),
            leaf("lm_head/bias", f"{lm}.bias"),
        ],
        "sequence_classification": [*linear("pooler", "pooler.dense"), *linear("classifier", "classifier")],
        "token_classification": linear("classifier", "classifier"),
    }
    return [
        *embedding("wte", f"{body}.embeddings.word_embeddings"),
        *(embedding("wpe", f"{body}.embeddings.position_embeddings") if c.absolute else []),
        *(embedding("wtt", f"{body}.embeddings.token_type_embeddings") if c.types else []),
        *norm("ln_e", f"{body}.embeddings.LayerNorm"),
        *embedding("wre", f"{body}.encoder.rel_embeddings"),
        *(norm("ln_r", f"{body}.encoder.LayerNorm") if c.norm_positions else []),
        *(convolution if c.convolution else []),
        *layered(block, c.layers, scan=c.scan),
        *heads.get(c.head, []),
    ]


ARCHITECTURE = Architecture(
    model_type="deberta-v2",
    config=DebertaConfig,
    classes={
        "none": "DebertaV2Model",
        "masked_lm": "DebertaV2ForMaskedLM",
        "sequence_classification": "DebertaV2ForSequenceClassification",
        "token_classification": "DebertaV2ForTokenClassification",
    },
    read=read,
    write=write,
    build=Deberta,
    inputs=lambda c: (jnp.zeros((1, 1), jnp.int32),),
    table=table,
    prefix="deberta.",
    # a buffer, positions that are not added, copies of the embedding and the bias, and heads of the pretraining
    ignored=r"(^|\.)embeddings\.position_ids$|^deberta\.embeddings\.position_|^cls\.|^(lm|mask)_predictions\.",
    # by its full name in all classes, so that `ignored` knows it
    renamed=((r"^embeddings\.position_embeddings\.", "deberta.embeddings.position_embeddings."),),
)
