"""CLIP: what the golden checkpoints of `test_models.py` cannot show."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import models
from jlora.models.clip import CLIP, PRESETS, CLIPConfig, CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from jlora.models.clip.params import read, read_text, read_vision, write_text
from jlora.models.sizes import model_of
from tests.conformance import normal, randomised
from tests.tiers import thorough

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "golden" / "models"
END = 39
TEXT = CLIPTextConfig(vocab_size=40, context=16, width=16, layers=2, heads=2, hidden=24, end=END)
VISION = CLIPVisionConfig(image_size=8, patch_size=4, width=24, layers=2, heads=3, hidden=32)
SMALL = CLIPConfig(TEXT, VISION, projection=12)
TOKENS = jnp.asarray([[38, 5, 9, END, END, END], [38, 4, 7, 11, 5, END]], jnp.int32)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 3)), jnp.float32)


def built(config):
    model = {CLIPConfig: CLIP, CLIPTextConfig: CLIPText, CLIPVisionConfig: CLIPVision}[type(config)](config)
    images = jnp.zeros((1, 224, 224, 3)) if config in PRESETS.values() else IMAGES
    return model, {CLIPConfig: (TOKENS, images), CLIPTextConfig: (TOKENS,), CLIPVisionConfig: (images,)}[type(config)]


def shapes(config):
    model, inputs = built(config)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def parameters(config):
    """Random parameters, not the model's start, whose attention is nearly the same everywhere."""
    return jax.tree.map(lambda leaf: normal(*leaf.shape), shapes(config))


@functools.cache
def function(config):
    """The model as a function of its parameters."""
    model, inputs = built(config)
    return lambda params: model.apply({"params": params}, *inputs)


def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scan", "whole", "text", "vision"),  # transformers' CLIPModel, CLIPTextModel and CLIPVisionModel
    [
        ("clip-vit-base-patch32", False, 151_277_313, 63_165_952, 87_456_000),
        ("clip-vit-large-patch14", True, 427_616_513, 123_060_480, 303_179_776),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(name, scan, whole, text, vision):
    config = PRESETS[name]
    model, (tokens, images) = built(config)
    model = CLIP(dataclasses.replace(config, scan=scan))
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens, images)["params"]
    assert size(tree) == whole and tree["logit_scale"].shape == ()
    projections = [tree[tower].pop("projection")["kernel"] for tower in ("text", "vision")]
    assert [size(tree[tower]) for tower in ("text", "vision")] == [text, vision]
    widths = [config.text.width, config.vision.width]
    assert [kernel.shape for kernel in projections] == [(width, config.projection) for width in widths]


@pytest.mark.parametrize(
    ("name", "parameters"),  # transformers' CLIPTextModel in Stable Diffusion 1.x and 2.x; SDXL's has a projection
    [("clip-vit-l-text", 123_060_480), ("openclip-vit-h-text", 340_387_840), ("openclip-vit-bigg-text", 694_659_840)],
)
def test_a_text_encoder_of_stable_diffusion_has_the_published_number_of_parameters(name, parameters):
    config = PRESETS[name]
    assert size(shapes(dataclasses.replace(config, scan=True))) == parameters
    nonlinearity = "quick_gelu" if name == "clip-vit-l-text" else "gelu"
    assert (config.width // config.heads, config.nonlinearity) == (64, nonlinearity)
    assert (config.epsilon, config.end, config.vocab_size, config.context) == (1e-5, 49407, 49408, 77)
    assert model_of(name)[0] == CLIPText(config)


@pytest.mark.parametrize("head", ["none", "projection"])
@pytest.mark.parametrize("name", ["clip-vit-l-text", "openclip-vit-h-text", "openclip-vit-bigg-text"])
def test_the_config_of_a_text_encoder_is_read_as_it_is_written(name, head):
    """With the eos_token_id of 2 of the published ones, too, which stands for the largest token."""
    config = dataclasses.replace(PRESETS[name], head=head)
    assert read_text(write_text(config), head) == config
    assert read_text(write_text(config) | {"eos_token_id": 2}, head) == dataclasses.replace(config, end=2)


@pytest.mark.parametrize(("rank", "trained"), [(4, 294_912), (8, 589_824)])
def test_lora_of_the_text_tower_of_stable_diffusion_has_the_published_size(rank, trained):
    tree = shapes(PRESETS["clip-vit-large-patch14"].text)
    adapted = jax.eval_shape(lambda params: jlora.apply(params, rank=rank, targets="attn/"), tree)
    assert jlora.count(adapted).trainable == trained


# -- what is pooled, and a tower alone ----------------------------------------------------------------------------------


def test_the_first_closing_token_is_pooled():
    out = jax.jit(function(TEXT))(parameters(TEXT))
    np.testing.assert_array_equal(out["pooled"], np.asarray(out["out"])[[0, 1], [3, 5]])
    largest = dataclasses.replace(TEXT, end=2)
    np.testing.assert_array_equal(jax.jit(function(largest))(parameters(TEXT))["pooled"], out["pooled"])


def test_padding_before_a_text_is_not_seen():
    """Padding on the left changes nothing: the mask hides it, and positions count real tokens alone."""
    run = jax.jit(
        lambda tokens, **options: CLIPText(TEXT).apply({"params": parameters(TEXT)}, tokens, **options)["out"]
    )
    mask, positions = jnp.asarray([[False, False, True, True, True]]), jnp.asarray([[0, 0, 0, 1, 2]])
    padded = run(jnp.asarray([[7, 7, 38, 5, END]]), mask=mask, positions=positions)
    np.testing.assert_allclose(padded[:, 2:], run(jnp.asarray([[38, 5, END]])), atol=1e-5)


def test_a_tower_alone_is_the_one_in_the_model():
    params = parameters(SMALL)
    whole = jax.jit(function(SMALL))(params)
    text = jax.jit(function(SMALL.text_tower))(params["text"])["out"]
    vision = jax.jit(function(SMALL.vision_tower))(params["vision"])["out"]
    cosine = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(whole["text_embeds"], cosine(text), atol=1e-6)
    by_hand = jnp.exp(params["logit_scale"]) * cosine(vision) @ cosine(text).T
    np.testing.assert_allclose(whole["out"], by_hand, atol=1e-5)


# -- hidden states -----------------------------------------------------------------------------------------------------


DEEP = dataclasses.replace(TEXT, layers=3, head="projection")


@functools.cache
def states(scan, remat=False):
    """Parameters of the same values in both forms, and a call with all hidden states."""
    params = parameters(DEEP)
    if scan:
        blocks = [params.pop(f"h_{i}") for i in range(DEEP.layers)]
        params["h"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    model = CLIPText(dataclasses.replace(DEEP, scan=scan, remat=remat))
    run = functools.partial(model.apply, {"params": params}, TOKENS)
    return run, run(states=True)


@pytest.mark.parametrize(("scan", "remat"), [(True, False), (False, True), (True, True), (True, "offload")])
def test_hidden_states_are_the_same_in_all_forms(scan, remat):
    (_, expected), (_, got) = states(False), states(scan, remat)
    assert got.keys() == {"out", "hidden", "states"} and got["states"].shape == (4, 2, 6, 16)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize("scan", [False, True], ids=["", "scanned"])
def test_skipped_blocks_leave_the_pooled_one_alone(scan):
    """The last norm takes an earlier state, as that of a shorter model, and the projection what it always takes."""
    run, whole = states(scan)
    params = states(False)[0].args[0]["params"]
    for skip in range(4):
        out = run(skip=skip)
        np.testing.assert_array_equal(out["out"], whole["out"])
        shorter = CLIPText(dataclasses.replace(DEEP, layers=3 - skip)) if skip < 3 else None
        h = whole["states"][-(skip + 1)]
        centred = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
        by_hand = centred * params["ln_f"]["scale"][None, None] + params["ln_f"]["bias"][None, None]
        np.testing.assert_allclose(out["hidden"], by_hand, rtol=1e-5, atol=1e-5)
        if shorter is not None:
            few = {key: value for key, value in params.items() if not (key[:2] == "h_" and int(key[2:]) >= 3 - skip)}
            alone = shorter.apply({"params": few}, TOKENS)["hidden"]
            np.testing.assert_allclose(out["hidden"], alone, rtol=1e-5, atol=1e-5)
    assert run(skip=2, states=True)["states"].shape == (4, 2, 6, 16)


def test_a_call_that_asks_for_no_states_makes_none():
    """The program is that of a stack of blocks that return nothing but the stream."""
    for scan in (False, True):
        run, _ = states(scan)
        program = str(jax.make_jaxpr(run)())
        assert ("4,2,6,16" in program, "3,2,6,16" in program) == (False, False)
        asked = str(jax.make_jaxpr(functools.partial(run, states=True))())
        assert "4,2,6,16" in asked
    with pytest.raises(ValueError, match="^skip=4, and the model has 3 blocks: expected 0 to 3"):
        states(False)[0](skip=4)
    with pytest.raises(ValueError, match="^skip=-1, and the model has 3 blocks: expected 0 to 3"):
        states(False)[0](skip=-1)


# -- adapters, and forms of the same model -----------------------------------------------------------------------------


LIFTED = "tests/test_bert.py::test_lora_is_lifted_without_building_a_weight"  # scanned, as all models are, by stack.py


@pytest.mark.parametrize("scan", thorough([False, True], LIFTED, [False]), ids=["", "scanned"])
def test_lora_is_lifted_without_building_a_weight(scan):
    config = dataclasses.replace(SMALL, scan=scan)
    fn = lambda params: function(config)(params)["out"]
    params = parameters(config)
    sites = jlora.sites(fn, params) if scan else None
    adapted = randomised(jlora.apply(params, rank=4, targets=r"attn/(query|value)", sites=sites))
    assert sum(math.prod(site.shape[:-2]) for site in adapted.sites) == 2 * (2 + 2)  # layers of both towers
    lifted = jax.jit(jlora.lift(fn, strict=True))(adapted)
    np.testing.assert_allclose(lifted, jax.jit(fn)(jlora.merge(adapted)), atol=1e-5)
    assert jnp.abs(lifted - jax.jit(fn)(params)).max() > 1e-3


def test_every_weight_is_adapted_without_building_it():
    fn = lambda params: function(SMALL)(params)["out"]
    adapted = jax.eval_shape(
        lambda params: jlora.apply(params, rank=2, sites=jlora.sites(fn, params), targets="."), shapes(SMALL)
    )
    table = jlora.explain(fn, adapted).rows
    assert {row.path for row in table} == {site.path for site in adapted.sites} and all(row.factored for row in table)
    assert len(adapted.sites) == 2 * (6 * 2 + 1) + len(["wte", "wpe", "wpe", "patch"])


def test_prefixes_are_seen():
    fn = lambda params: function(SMALL)(params)["out"]
    params = parameters(SMALL)
    adapted = randomised(jlora.apply(params, method=jlora.prefix_tuning(3)), 2.0)
    assert len(adapted.sites) == 2 * (2 + 2)
    assert jnp.abs(jax.jit(jlora.lift(fn))(adapted) - jax.jit(fn)(params)).max() > 1e-2


@pytest.mark.loose_promotion  # Flax's LayerNorm promotes to float32
def test_bfloat16_is_close_to_float32():
    params = parameters(SMALL)
    full, half = (
        jax.jit(function(dataclasses.replace(SMALL, dtype=dtype)))(params) for dtype in ("float32", "bfloat16")
    )
    assert all(value.dtype == jnp.float32 for value in half.values())
    for name in ("text_embeds", "image_embeds"):
        np.testing.assert_allclose(half[name], full[name], atol=0.03)  # of length 1, at 8 bits, after 2 layers


@pytest.mark.thorough("tests/test_bert.py::test_remat_changes_no_gradient")  # all go through jlora/models/stack.py
def test_remat_changes_no_gradient():
    def gradient(remat):
        config = dataclasses.replace(SMALL, scan=True, remat=remat, text=dataclasses.replace(TEXT, layers=1))
        loss = lambda params: jax.nn.log_softmax(function(config)(params)["out"])[:, 0].mean()
        return jax.jit(jax.grad(loss))(parameters(config))

    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), gradient(True), gradient(False))


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_a_tower_as_transformers_4_wrote_it(tower, tmp_path):
    """transformers 4 wrote the prefix for the class without a head, too, and a buffer."""
    folder = GOLDEN / f"clip_{tower}"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = {f"{tower}_model.{key}": tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    tensors[f"{tower}_model.embeddings.position_ids"] = np.arange(5)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    pretrained, golden = models.load(tmp_path), models.load(folder)
    assert pretrained.model == golden.model and not pretrained.unused
    jax.tree.map(np.testing.assert_array_equal, pretrained.params, golden.params)
    new = models.load(tmp_path, head="projection")
    assert new.fresh == ("projection/kernel",)


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_a_tower_is_written_as_transformers_4_reads_it(tower, tmp_path):
    pretrained = models.load(GOLDEN / f"clip_{tower}")
    models.save(tmp_path, pretrained.model, pretrained.params)
    assert all(key.startswith(f"{tower}_model.") for key in load_file(tmp_path / "model.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path).params, pretrained.params)


def test_old_configs_say_things_twice():
    """openai/clip-vit-large-patch14 has "text_config_dict" beside "text_config"; what it leaves out is transformers' default."""
    record = json.loads((GOLDEN / "clip" / "config.json").read_text())
    assert read(record, "none").text.end == 20
    record["text_config"]["eos_token_id"] = 2
    assert read(record | {"text_config_dict": None}, "none").text.end == 2
    config = read(record | {"text_config_dict": {"hidden_size": 768, "num_attention_heads": 12}}, "none")
    assert (config.text.width, config.text.end, config.vision.width) == (768, 49407, 24)


def test_a_model_saved_alone_has_the_configs_of_both_towers(tmp_path):
    pretrained = models.load(GOLDEN / "clip")
    models.save(tmp_path, pretrained.model, pretrained.params)
    assert models.load(tmp_path).model == pretrained.model
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["text_config"]["hidden_size"] == 16 and record["vision_config"]["model_type"] == "clip_vision_model"


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"config.json has eos_token_id=\[1, 2\]; jlora's model has one number"):
        read_text({"eos_token_id": [1, 2]}, "none")
    with pytest.raises(ValueError, match=r"config.json has image_size=\[8, 16\]; jlora's model has one number"):
        read_vision({"image_size": [8, 16]}, "none")
    with pytest.raises(ValueError, match="width=15 is not a multiple of heads=2"):
        dataclasses.replace(TEXT, width=15)
    with pytest.raises(ValueError, match="image_size=9 is not a multiple of patch_size=4"):
        dataclasses.replace(VISION, image_size=9)
    with pytest.raises(ValueError, match="head='causal_lm' is not one of 'none', 'projection'"):
        dataclasses.replace(TEXT, head="causal_lm")
    with pytest.raises(ValueError, match="the sequence has 17 tokens, the model's context is 16"):
        jax.eval_shape(CLIPText(TEXT).init, jax.random.key(0), jnp.ones((1, 17), jnp.int32))
    with pytest.raises(ValueError, match=r"the images are \(8, 8, 1\), the model's are \(8, 8, 3\)"):
        jax.eval_shape(CLIPVision(VISION).init, jax.random.key(0), IMAGES[..., :1])
