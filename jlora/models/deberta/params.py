"""DeBERTa's checkpoints: Hugging Face's `DebertaV2ForMaskedLM` and its kin."""

from collections.abc import Mapping
from typing import Any

from jlora.models.architecture import TOKENS, Architecture, Head, configured, names_of, unsupported, value_of
from jlora.models.deberta.modeling import Deberta, DebertaConfig
from jlora.models.tensors import CONV_1D, Leaf, embedding, layered, leaf, linear, norm

TERMS = "pos_att_type"
KEYS = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "types": "type_vocab_size",
    "absolute": "position_biased_input",
    "shared": "share_att_key",
    "buckets": "position_buckets",
    "reach": "max_relative_positions",
    "convolution": "conv_kernel_size",
    "nonlinearity": "hidden_act",
    "conv_nonlinearity": "conv_act",
    "pooler_nonlinearity": "pooler_hidden_act",
    "epsilon": "layer_norm_eps",
    "legacy": "legacy",
}
OPTIONAL = {
    "absolute": True, "shared": False, "buckets": -1, "reach": -1, "convolution": 0, "conv_nonlinearity": "tanh",
    "pooler_nonlinearity": "gelu", "legacy": True,
}  # fmt: skip
CONVOLUTION = ("convolution", "conv_nonlinearity")


def read(json: Mapping[str, Any], head: Head) -> DebertaConfig:
    """A DeBERTa's config.json."""
    unsupported(
        {"relative_attention": False} | {**json}, relative_attention=True, norm_rel_ebd=("layer_norm", "none"),
        pooler_dropout=0, conv_groups=1, tie_word_embeddings=True,
    )  # fmt: skip
    terms = value_of(json, TERMS)
    terms = terms.lower().split("|") if isinstance(terms, str) else names_of(json, TERMS)
    config = configured(
        DebertaConfig, json, KEYS, optional=OPTIONAL, origins={"terms": TERMS},
        terms=tuple(term.strip() for term in terms), head=head,
        norm_positions=json.get("norm_rel_ebd", "none") == "layer_norm",
    )  # fmt: skip
    width = config.width
    unsupported(json, attention_head_size=width // config.heads, embedding_size=width, pooler_hidden_size=width)
    return config


def write(c: DebertaConfig) -> dict[str, Any]:
    """Keys that `read` reads."""
    return {
        **{key: getattr(c, name) for name, key in KEYS.items() if name not in CONVOLUTION},
        "relative_attention": True,
        TERMS: list(c.terms),
        "norm_rel_ebd": "layer_norm" if c.norm_positions else "none",
    } | ({KEYS[name]: getattr(c, name) for name in CONVOLUTION} if c.convolution else {})


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
    inputs=lambda c: (TOKENS,),
    table=table,
    prefix="deberta.",
    # a buffer, positions that are not added, copies of the embedding and the bias, and heads of the pretraining
    ignored=r"(^|\.)embeddings\.position_ids$|^deberta\.embeddings\.position_|^cls\.|^(lm|mask)_predictions\.",
    # by its full name in all classes, so that `ignored` knows it
    renamed=((r"^embeddings\.position_embeddings\.", "deberta.embeddings.position_embeddings."),),
)
