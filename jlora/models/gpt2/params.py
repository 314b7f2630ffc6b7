"""GPT-2's checkpoints: Hugging Face's `GPT2LMHeadModel` and its kin, whose Conv1D keeps kernels as (in, out)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jlora.models.architecture import Architecture, Head, unsupported
from jlora.models.gpt2.modeling import GPT2, GPT2Config
from jlora.models.tensors import Leaf, Part, embedding, layered, leaf, linear, norm


def read(json: Mapping[str, Any], head: Head) -> GPT2Config:
    """A GPT-2's config.json."""
    unsupported(
        json, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
        tie_word_embeddings=True,
    )  # fmt: skip
    return GPT2Config(
        vocab_size=json["vocab_size"],
        context=json["n_positions"],
        width=json["n_embd"],
        layers=json["n_layer"],
        heads=json["n_head"],
        hidden=json.get("n_inner"),
        nonlinearity=json.get("activation_function", "gelu_new"),
        epsilon=json.get("layer_norm_epsilon", 1e-5),
        head=head,
    )


def write(c: GPT2Config) -> dict[str, Any]:
    """What `read` reads."""
    return {
        "vocab_size": c.vocab_size,
        "n_positions": c.context,
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.hidden,
        "activation_function": c.nonlinearity,
        "layer_norm_epsilon": c.epsilon,
    }


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
    inputs=lambda c: (jnp.zeros((1, 1), jnp.int32),),
    table=table,
    prefix="transformer.",
    ignored=r"\.attn\.(masked_)?bias$|^lm_head\.weight$",
)
