"""Attention's kernel is that of the devices which a program is compiled for, or the one that was asked for."""

import dataclasses
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import pytest

import jlora
from jlora.models import attention
from jlora.models.attention import DotProductAttention
from jlora.models.bert import Bert, BertConfig
from jlora.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from jlora.models.deberta import Deberta, DebertaConfig
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.roberta import Roberta, RobertaConfig
from jlora.models.vit import ViT, ViTConfig
from tests.conformance import close
from tests.tiers import thorough

PLAIN, HAS_FLASH = jax.nn.dot_product_attention, attention._has_flash


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with cuDNN's library and no GPU: a number in the program shows which branch was compiled."""

    def stand_in(query, key, value, *args, implementation, **options):
        out = PLAIN(query, key, value, *args, implementation="xla", **options)
        return out if implementation == "xla" else jnp.maximum(out, jnp.asarray(-2.0, out.dtype))

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    HAS_FLASH.cache_clear()
    yield
    HAS_FLASH.cache_clear()


def program(fn, *args, platform: str) -> str:
    return jax.export.export(jax.jit(fn), platforms=[platform])(*args).mlir_module()


def has_flash(text: str) -> bool:
    return re.search(r"dense<-2.000000e\+00> : tensor<b?f16>", text) is not None


def attend(dtype=jnp.bfloat16, width=8, **options):
    x = jnp.ones((1, 4, 2, width), dtype)
    return functools.partial(DotProductAttention(causal=True, **options).apply, {}), (x, x, x)


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize(
    ("options", "cuda"),
    [
        ({}, True),
        ({"dtype": jnp.float32}, False),
        ({"width": 12}, False),
        ({"window": 2}, True),
        ({"implementation": "xla"}, False),
    ],
)
def test_the_platform_that_is_compiled_for_chooses(options, cuda):
    fn, args = attend(**options)
    assert has_flash(program(fn, *args, platform="cuda")) == cuda
    for platform in ("cpu", "tpu"):
        assert not has_flash(program(fn, *args, platform=platform))


@pytest.mark.usefixtures("cudnn")
def test_what_was_asked_for_is_on_every_platform():
    fn, args = attend(implementation="cudnn")
    assert all(has_flash(program(fn, *args, platform=platform)) for platform in ("cpu", "cuda"))


def test_without_cudnn_the_plain_form_is_compiled_and_asking_for_the_other_is_an_error():
    HAS_FLASH.cache_clear()
    assert not attention._has_flash()
    fn, args = attend()
    assert "case" not in program(fn, *args, platform="cuda")
    fn, args = attend(implementation="cudnn")
    with pytest.raises(
        RuntimeError, match=r"^attention='cudnn' needs cuDNN's library where the program is made.* detect"
    ):
        fn(*args)


@pytest.mark.parametrize(("length", "keys", "causal", "window"), [
    (8, 7, False, None), (5, 6, False, None), (5, 5, True, None), (7, 7, True, 3), (6, 6, True, None),
])  # fmt: skip
def test_flash_attention_sees_even_lengths_alone(length, keys, causal, window, monkeypatch):
    """JAX refuses the gradient of others; a text of CLIP's has 77 tokens. cuDNN's own form is JAX's plain one here."""
    seen = []

    def stand_in(query, key, value, *args, implementation, **options):
        assert query.shape[1] % 2 == key.shape[1] % 2 == 0
        seen.append([options[f"{of}_seq_lengths"] is not None for of in ("query", "key_value")])
        return PLAIN(query, key, value, *args, implementation="xla", **options)

    draw = jax.random.split(jax.random.key(length), 4)
    q, cotangent = (jax.random.normal(k, (2, length, 2, 8)) for k in draw[:2])
    k, v = (jax.random.normal(one, (2, keys, 2, 8)) for one in draw[2:])

    def value_and_gradient(implementation):
        attend = DotProductAttention(causal, window, implementation=implementation)
        out, back = jax.vjp(lambda *args: attend.apply({}, *args), q, k, v)
        return out, back(cotangent)

    expected = value_and_gradient("xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    close(value_and_gradient("cudnn"), expected)
    assert seen == [[bool(length % 2 or keys % 2)] * 2]


@pytest.mark.usefixtures("cudnn")
@pytest.mark.loose_promotion  # Flax's norms of bfloat16
@pytest.mark.parametrize("scan", thorough([False, True], "test_the_platform_that_is_compiled_for_chooses", [True]))
def test_a_lifted_training_step_has_the_kernel_of_its_target(scan, monkeypatch):
    """The kernel comes through lift, grad, scan and remat; the program for the CPU has the plain form's operations and numbers."""
    model = GPT2(
        GPT2Config(vocab_size=16, context=8, width=16, layers=1, heads=2, dtype="bfloat16", scan=scan, remat=scan)
    )
    ids = jnp.arange(8)[None]
    params = model.init(jax.random.key(0), ids)["params"]
    sites = jlora.sites(lambda p: model.apply({"params": p}, ids), params)
    adapted = jlora.apply(params, rank=2, sites=sites)
    factors, frozen = jlora.partition(adapted)

    def loss(factors, frozen):
        logits = jlora.lift(lambda p: model.apply({"params": p}, ids))(jlora.combine(factors, frozen))
        return jnp.mean(logits.astype(jnp.float32) ** 2)

    step = jax.value_and_grad(loss)
    assert has_flash(program(step, factors, frozen, platform="cuda"))
    assert not has_flash(program(step, factors, frozen, platform="cpu"))
    value, gradient = jax.jit(step)(factors, frozen)
    monkeypatch.setattr(attention, "_has_flash", lambda: False)
    close(jax.jit(lambda *a: loss(*a))(factors, frozen), value)
    assert any(jnp.any(g != 0) for g in jax.tree.leaves(gradient))


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert", "roberta", "deberta", "vit", "clip"])
@pytest.mark.loose_promotion
def test_every_config_can_say_which(architecture):
    """Compiled for CUDA on shapes alone: the program has the kernel that the config names."""
    kinds = {field.name: field for field in dataclasses.fields(CONFIGS[architecture][1])}
    assert kinds["attention"].default == "auto"
    found = {}
    for word in ("auto", "xla", "cudnn"):
        model, args = made(architecture, word)
        params = jax.eval_shape(model.init, jax.random.key(0), *args)
        found[word] = has_flash(program(model.apply, params, *args, platform="cuda"))
    assert found == {"auto": True, "xla": False, "cudnn": True}
    with pytest.raises(ValueError, match="attention='flash' is not one of 'auto', 'xla', 'cudnn'"):
        made(architecture, "flash")


TINY = {
    "vocab_size": 16,
    "context": 16,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "hidden": 16,
    "image_size": 8,
    "patch_size": 4,
}
CONFIGS = {
    "gpt2": (GPT2, GPT2Config), "llama": (Llama, LlamaConfig), "bert": (Bert, BertConfig), "roberta": (Roberta, RobertaConfig),
    "deberta": (Deberta, DebertaConfig), "vit": (ViT, ViTConfig), "clip": (CLIP, CLIPConfig),
}  # fmt: skip


def made(architecture: str, attention: str):
    """A tiny model in bfloat16, and what it is called with; lengths are even, as cuDNN wants them with a mask."""
    model, config = CONFIGS[architecture]
    names = {field.name for field in dataclasses.fields(config)}
    options = {name: value for name, value in TINY.items() if name in names} | {
        "dtype": "bfloat16",
        "attention": attention,
    }
    ids, image = jnp.ones((1, 8), int), jnp.ones((1, 8, 8, 3))
    if architecture == "clip":
        text = CLIPTextConfig(vocab_size=16, context=16, width=16, layers=1, heads=2, hidden=16, end=15)
        vision = CLIPVisionConfig(image_size=8, patch_size=4, width=16, layers=1, heads=2, hidden=16)
        return model(config(text, vision, projection=8, dtype="bfloat16", attention=attention)), (ids, image)
    return model(config(**options)), (image,) if architecture == "vit" else (ids,)
