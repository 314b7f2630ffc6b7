"""Parameter counts of published adapters, on abstract shapes: nothing is allocated, GPT-3 included."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora.models.gpt2 import GPT2, PRESETS, GPT2Config

GPT2_SIZES = {"gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def layers(depth: int, **matrices: tuple[int, int]) -> dict[str, Any]:
    """`depth` layers of matrices (in, out)."""
    return {f"layer_{i}": {name: {"kernel": shape(*sizes)} for name, sizes in matrices.items()} for i in range(depth)}


def squares(width: int, *names: str) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(names, (width, width))


def llama(depth: int, d: int, ff: int, kv: int | None = None) -> dict[str, Any]:
    kv = kv or d
    return layers(depth, q=(d, d), k=(d, kv), v=(d, kv), o=(d, d), gate=(d, ff), up=(d, ff), down=(ff, d))


def unet() -> dict[str, Any]:
    """Stable Diffusion 1.5: 16 transformer blocks with self-attention, and cross-attention to 768 numbers of text."""
    tree = {}
    for i, width in enumerate([320] * 5 + [640] * 5 + [1280] * 6):
        own, text = squares(width, "q", "k", "v", "out"), {"q": (width, width), "out": (width, width)}
        tree[f"block_{i}"] = {
            "attn1": layers(1, **own)["layer_0"],
            "attn2": layers(1, **text, k=(768, width), v=(768, width))["layer_0"],
        }
    return tree


ATTENTION = {
    "GPT-2 M": layers(24, **squares(1024, "q", "k", "v", "o")),
    "GPT-2 L": layers(36, **squares(1280, "q", "k", "v", "o")),
    "RoBERTa-base": layers(12, **squares(768, "q", "k", "v", "o")),
    "RoBERTa-large": layers(24, **squares(1024, "q", "k", "v", "o")),
    "DeBERTa-XXL": layers(48, **squares(1536, "q", "k", "v", "o")),
    "GPT-3": layers(96, **squares(12288, "q", "k", "v", "o")),
    "LLaMA-7B": llama(32, 4096, 11008),
    "LLaMA-13B": llama(40, 5120, 13824),
    "Llama-3.2-3B": llama(28, 3072, 8192, 1024),
    "DeBERTaV3-base": layers(12, **squares(768, "q", "k", "v", "o"), up=(768, 3072), down=(3072, 768)),
    "ViT-B": layers(12, **squares(768, "q", "k", "v", "o")),
    "ViT-L": layers(24, **squares(1024, "q", "k", "v", "o")),
    "SD 1.5": unet(),
    "CLIP text": layers(12, **squares(768, "q", "k", "v", "o")),
}
QV, ALL = "/[qv]/", ".*"
COUNTS = [
    ("GPT-2 M", jlora.lora(4), QV, 393_216),
    ("GPT-2 L", jlora.lora(4), QV, 737_280),
    ("RoBERTa-base", jlora.lora(8), QV, 294_912),
    ("RoBERTa-large", jlora.lora(8), QV, 786_432),
    ("DeBERTa-XXL", jlora.lora(16), QV, 4_718_592),
    ("GPT-3", jlora.lora(1), QV, 4_718_592),
    ("GPT-3", jlora.lora(4), QV, 18_874_368),
    ("GPT-3", jlora.rslora(8), QV, 37_748_736),
    ("GPT-3", jlora.lora(64), QV, 301_989_888),
    ("LLaMA-7B", jlora.lora(8), ALL, 19_988_480),
    ("LLaMA-7B", jlora.lora(16), ALL, 39_976_960),
    ("LLaMA-7B", jlora.pissa(64), ALL, 159_907_840),
    ("LLaMA-7B", jlora.lora(32), "/(q|k|v|up|down)/", 56_098_816),
    ("LLaMA-7B", jlora.dora(32), "/(q|k|v|up|down)/", 56_098_816 + 876_544),
    ("LLaMA-13B", jlora.lora(64), ALL, 250_347_520),
    ("Llama-3.2-3B", jlora.lora(32), QV, 9_175_040),
    ("Llama-3.2-3B", jlora.dora(32), QV, 9_289_728),
    ("DeBERTaV3-base", jlora.lora(2), ALL, 331_776),
    ("DeBERTaV3-base", jlora.lora(8), ALL, 1_327_104),
    ("DeBERTaV3-base", jlora.adalora(2, 1, total_steps=9), ALL, 331_776 + 12 * 6 * 2),  # and an entry of E per triplet
    ("RoBERTa-base", jlora.vera(1024), QV, 12 * 2 * (768 + 1024)),
    ("RoBERTa-large", jlora.vera(256), QV, 24 * 2 * (1024 + 256)),
    ("ViT-B", jlora.lora(8), QV, 294_912),
    ("ViT-L", jlora.lora(8), QV, 786_432),
    ("SD 1.5", jlora.lora(4), ALL, 797_184),
    ("SD 1.5", jlora.lora(4), "attn2", 397_824),
    ("CLIP text", jlora.lora(8), ALL, 589_824),
]


@pytest.mark.parametrize(
    ("model", "method", "targets", "count"), COUNTS, ids=lambda x: str(x) if isinstance(x, str) else None
)
def test_trainable_parameters_are_the_published_ones(model, method, targets, count):
    assert jlora.count(jlora.apply(ATTENTION[model], method=method, targets=targets)).trainable == count


@pytest.mark.parametrize("name", GPT2_SIZES)
def test_gpt2_has_its_parameters_and_its_two_last_layers(name):
    model = GPT2(PRESETS[name])
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert jlora.count(jlora.apply(params, method=jlora.full())) == (GPT2_SIZES[name], GPT2_SIZES[name])
    if name == "gpt2-medium":
        assert jlora.count(jlora.apply(params, method=jlora.top_layers(2))).trainable == 25_192_448


# -- methods on activations: 2 d r + r + d an adapter, and 2 d for its LayerNorm (arXiv 2106.09685, section 5.1) --------


def encoder(depth: int, d: int, ff: int) -> dict[str, Any]:
    """`depth` layers of an attention's and an MLP's last kernel."""
    attention, mlp = {"out": {"kernel": shape(d, d)}}, {"proj": {"kernel": shape(ff, d)}}
    return {f"layer_{i}": {"attention": attention, "mlp": mlp} for i in range(depth)}


GPT3 = GPT2Config(context=2048, width=12288, layers=96, heads=96, scan=True)
ENCODERS = {
    "GPT-2 M": encoder(24, 1024, 4096),
    "GPT-2 L": encoder(36, 1280, 5120),
    "RoBERTa-large": encoder(24, 1024, 4096),
    "DeBERTaV3-base": encoder(12, 768, 3072),
    "Llama-3.2-3B": llama(28, 3072, 8192, 1024) | {"embed_tokens": {"embedding": shape(128256, 3072)}},
}
ADAPTERS = [
    ("GPT-2 M", jlora.pfeiffer(6, layer_norm=True), 368_784),  # "Adapter_L" of table 3
    ("GPT-2 M", jlora.pfeiffer(224, layer_norm=True), 11_089_152),
    ("GPT-2 L", jlora.pfeiffer(8, layer_norm=True), 875_808),
    ("GPT-2 L", jlora.pfeiffer(248, layer_norm=True), 23_002_848),
    ("RoBERTa-large", jlora.houlsby(8), 835_968),  # 0.8M in table 2
    ("RoBERTa-large", jlora.pfeiffer(16), 811_392),  # 0.8M
    ("DeBERTaV3-base", jlora.houlsby(8), 313_536),  # .31M in AdaLoRA's table 1
    ("DeBERTaV3-base", jlora.houlsby(16), 608_640),  # .61M
    ("DeBERTaV3-base", jlora.pfeiffer(16), 304_320),  # .30M
    ("DeBERTaV3-base", jlora.pfeiffer(32), 599_424),  # .60M
    ("Llama-3.2-3B", jlora.prefix_tuning(50), 2_867_200),  # PEFT's comparison of methods
    ("Llama-3.2-3B", jlora.prompt_tuning(200), 614_400),
]


@pytest.mark.parametrize(("model", "method", "count"), ADAPTERS, ids=lambda x: x if isinstance(x, str) else None)
def test_adapters_prefixes_and_prompts_have_the_published_parameters(model, method, count):
    assert jlora.count(jlora.apply(ENCODERS[model], method=method)).trainable == count


def test_gpt3_with_every_kind_of_method():
    """Table 4 of the LoRA paper, on the shapes of the model with scanned layers."""
    model, tokens = GPT2(GPT3), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    sites = jlora.sites(lambda params, tokens: model.apply({"params": params}, tokens), params, tokens)
    count = lambda method, **options: jlora.count(jlora.apply(params, method=method, sites=sites, **options))
    assert count(jlora.full()).total == 174_604_259_328
    assert count(jlora.lora(4), targets="attn/(query|value)").trainable == 18_874_368
    adapters = {1: 7_078_080, 4: 21_234_432, 8: 40_109_568, 16: 77_859_840, 64: 304_361_472}
    assert {rank: count(jlora.houlsby(rank)).trainable for rank in adapters} == adapters
    assert count(jlora.prompt_tuning(264)).trainable == 3_244_032  # PreEmbed
    assert count(jlora.prefix_tuning(8)).trainable == 2 * 8 * 96 * 12288  # keys and values of every layer
