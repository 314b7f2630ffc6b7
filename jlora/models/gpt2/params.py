"""GPT-2's checkpoints: Hugging Face's `GPT2LMHeadModel` and its kin, whose Conv1D keeps kernels as (in, out)."""

from collections.abc import Mapping
from typing import Any

from jlora.models.architecture import TOKENS, Architecture, Head, configured, unsupported
from jlora.models.gpt2.modeling import GPT2, GPT2Config
from jlora.models.tensors import Leaf, Part, embedding, layered, leaf, linear, norm

KEYS = {
    "vocab_size": "vocab_size",
    "context": "n_positions",
    "width": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "hidden": "n_inner",
    "nonlinearity": "activation_function",
    "epsilon": "layer_norm_epsilon",
}
OPTIONAL = {"hidden": None, "nonlinearity": "gelu_new", "epsilon": 1e-5}


def read(json: Mapping[str, Any], head: Head) -> GPT2Config:
    """A GPT-2's config.json."""
    unsupported(
        json, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
        tie_word_embeddings=True,
    )  # fmt: skip
    return configured(GPT2Config, json, KEYS, optional=OPTIONAL, head=head)


def write(c: GPT2Config) -> dict[str, Any]:
    """Keys that `read` reads."""
    return {key: getattr(c, name) for name, key in KEYS.items()}


def table(c: GPT2Config) -> list[Leaf]:
    """Its rows. The head is tied to the embedding."""
    block = [
        *norm("ln_1", "transformer.h.{i}.ln_1"),
        *_conv("attn/query", "transformer.h.{i}.attn.c_attn", 0),
        *_conv("attn/key", "transformer.h.{i}.attn.c_attn", 1),
        *_conv("attn/value", "transformer.h.{i}.attn.c_attn", 2),
        *_conv("attn/out", "transformer.h.{i}.attn.c_proj"),
        *norm("ln_2", "transformer.h.{i}.ln_2"),
        *_conv("mlp/fc", "transformer.h.{i}.mlp.c_fc"),
        *_conv("mlp/proj", "transformer.h.{i}.mlp.c_proj"),
    ]
    heads = {
        "sequence_classification": linear("score", "score", bias=False),
        "token_classification": linear("classifier", "classifier"),
    }
    return [
        *embedding("wte", "transformer.wte"),
        *embedding("wpe", "transformer.wpe"),
        *layered(block, c.layers, scan=c.scan),
        *norm("ln_f", "transformer.ln_f"),
        *heads.get(c.head, []),
    ]


def _conv(path: str, key: str, third: int | None = None) -> list[Leaf]:
    """The rows of a Conv1D, or of a third of one."""
    kernel, bias = (None, None) if third is None else (Part(1, third, 3), Part(0, third, 3))
    return [leaf(f"{path}/kernel", f"{key}.weight", None, kernel), leaf(f"{path}/bias", f"{key}.bias", None, bias)]


ARCHITECTURE = Architecture(
    model_type="gpt2",
    config=GPT2Config,
    classes={
        "none": "GPT2Model",
        "causal_lm": "GPT2LMHeadModel",
        "sequence_classification": "GPT2ForSequenceClassification",
        "token_classification": "GPT2ForTokenClassification",
    },
    read=read,
    write=write,
    build=GPT2,
    inputs=lambda c: (TOKENS,),
    table=table,
    prefix="transformer.",
    ignored=r"\.attn\.(masked_)?bias$|^lm_head\.weight$",
    layers=(("", "n_layer"),),
)
