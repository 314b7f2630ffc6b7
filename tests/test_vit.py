"""The Vision Transformer: its parameters counted, its layers scanned, and what LoRA finds in it."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import models
from jlora.models.vit import PRESETS, ViT, ViTConfig
from jlora.models.vit.params import read
from tests.conformance import filled

GOLDEN = Path(__file__).parent / "golden" / "models"
SMALL = ViTConfig(image_size=8, patch_size=2, channels=1, width=16, layers=3, heads=4, labels=10)


def shapes(config):
    images = jnp.zeros((1, config.image_size, config.image_size, config.channels))
    return jax.eval_shape(ViT(config).init, jax.random.key(0), images)["params"]


@functools.cache
def parameters(config=SMALL):
    return filled(shapes(config))


def forward(params, x, config=SMALL, **options):
    return ViT(config).apply({"params": params}, x, **options)


def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def images(count=2):
    return jax.random.normal(jax.random.key(7), (count, 8, 8, 1))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Hugging Face's ViTModel(add_pooling_layer=False), and its head of 1,000 classes
    [("vit-base", 85_798_656 + 768 * 1000 + 1000), ("vit-large", 303_301_632 + 1024 * 1000 + 1000)],
)
def test_a_preset_has_the_published_number_of_parameters(name, parameters):
    assert size(shapes(PRESETS[name])) == parameters
    body = dataclasses.replace(PRESETS[name], head="none")
    assert size(shapes(body)) == parameters - size(shapes(PRESETS[name])["head"])
    pooler = shapes(dataclasses.replace(body, pooler=True))["pooler"]
    assert size(pooler) == body.width**2 + body.width


def test_the_last_block_answers_for_the_first_token_alone_where_a_head_reads_no_other():
    """The last of three blocks computes keys and values of all tokens, and everything else of the first alone."""
    whole = dataclasses.replace(SMALL, head="none")
    run = lambda config: jax.jit(lambda params: forward(params, images(), config)).lower(shapes(config))
    flops = [run(config).cost_analysis()["flops"] for config in (whole, SMALL)]
    assert flops[1] < 0.8 * flops[0]


def test_the_parts_are_named_as_gpt2s():
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(shapes(SMALL))
    }
    assert paths["patch/kernel"] == (2, 2, 1, 16) and paths["cls"] == (1, 1, 16) and paths["positions"] == (1, 17, 16)
    block = {path.removeprefix("h_2/"): shape for path, shape in paths.items() if path.startswith("h_2/")}
    kernels = {f"attn/{name}/kernel": (16, 16) for name in ("query", "key", "value", "out")}
    kernels |= {"mlp/fc/kernel": (16, 64), "mlp/proj/kernel": (64, 16)}
    assert {path: shape for path, shape in block.items() if path.endswith("kernel")} == kernels
    assert {path for path in paths if not path.startswith("h_")} == {
        "patch/kernel", "patch/bias", "cls", "positions", "ln_f/scale", "ln_f/bias", "head/kernel", "head/bias",
    }  # fmt: skip


def test_lora_of_queries_and_values_has_the_published_size():
    adapted = jlora.apply(shapes(PRESETS["vit-base"]), rank=8, targets="attn/(query|value)")
    assert jlora.count(adapted).trainable == 294_912


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_equal_a_loop(remat):
    params = parameters()
    blocks = [params[f"h_{i}"] for i in range(3)]
    rest = {name: part for name, part in params.items() if not name.startswith("h_")}
    stacked = rest | {"h": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
    scanned = dataclasses.replace(SMALL, scan=True, remat=remat)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda leaf: leaf.shape, shapes(scanned))
    found = jax.jit(functools.partial(forward, config=scanned))(stacked, images())
    np.testing.assert_allclose(found, jax.jit(forward)(params, images()), atol=1e-5)


def test_patches_are_those_of_the_image():
    """A convolution with the patch as stride is a product of each patch with one matrix."""
    params = parameters()
    seen = lambda module, _: module.name == "patch"
    _, state = forward(params, images(), capture_intermediates=seen, mutable=["intermediates"])
    (made,) = state["intermediates"]["patch"]["__call__"]
    cut = np.asarray(images()).reshape(2, 4, 2, 4, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 4, 4)
    by_hand = cut @ np.asarray(params["patch"]["kernel"]).reshape(4, 16) + np.asarray(params["patch"]["bias"])
    np.testing.assert_allclose(made, by_hand, atol=1e-6)


def test_every_token_sees_every_other_and_positions_matter():
    x, run = images(), jax.jit(functools.partial(forward, parameters()))
    assert (jnp.abs(jax.jit(jax.grad(lambda x: run(x)[:, 3].sum()))(x)) > 0).all()  # [CLS] depends on every pixel
    assert jnp.abs(run(x) - run(jnp.roll(x, 2, axis=1))).max() > 1e-4  # the same patches elsewhere


@pytest.mark.loose_promotion  # Flax's LayerNorm promotes to float32
def test_it_computes_in_bfloat16_and_drops_out():
    config = dataclasses.replace(SMALL, dtype="bfloat16", dropout=0.5, layers=1)
    run = functools.partial(forward, parameters(config), images(), config)
    assert parameters(config)["head"]["kernel"].dtype == jnp.float32
    still, dropped = run(), run(deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert still.dtype == jnp.float32 and jnp.abs(still - dropped).max() > 0


def test_remat_has_the_same_gradients():
    plain = dataclasses.replace(SMALL, layers=1)
    again = dataclasses.replace(plain, remat="dots_saveable")
    loss = lambda params, config: jnp.sum(jnp.square(forward(params, images(), config)))
    of = lambda config: jax.jit(jax.grad(functools.partial(loss, config=config)))(parameters(plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), of(again), of(plain))


def test_without_a_head_the_last_norm_comes_out():
    params = parameters()
    body = dataclasses.replace(SMALL, head="none")
    out = forward({name: part for name, part in params.items() if name != "head"}, images(), body)
    logits = out[:, 0] @ params["head"]["kernel"] + params["head"]["bias"][None]
    np.testing.assert_allclose(logits, forward(params, images()), atol=1e-5)


def test_a_classifiers_body_has_no_pooler(tmp_path):
    """A classifier's body has no pooler, and one in the checkpoint is passed over."""
    body = models.load(GOLDEN / "vit_image_classification", head="none")
    assert not body.model.config.pooler and not body.fresh and body.unused == ("classifier.bias", "classifier.weight")
    models.save(tmp_path, body.model, body.params)
    assert models.load(tmp_path).model.config == dataclasses.replace(body.model.config, labels=2)
    pooled = models.load(GOLDEN / "vit_base")
    assert pooled.model.config.pooler
    assert set(pooled.params) - set(models.load(GOLDEN / "vit_base", pooler=False).params) == {"pooler"}
    classifier = models.load(GOLDEN / "vit_base", head="image_classification", labels=5)
    assert classifier.fresh == ("head/kernel", "head/bias") and classifier.params["head"]["bias"].shape == (5,)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": [8, 16]}, r"config.json has image_size=\[8, 16\]; jlora's model has squares, of one number"),
        ({"qkv_bias": False}, "config.json has qkv_bias=False; jlora's model has True"),
        ({"pooler_output_size": 8}, "config.json has pooler_output_size=8; jlora's model has 16 or None"),
    ],
)
def test_other_kinds_are_refused(setting, message):
    record = json.loads((GOLDEN / "vit_base" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        read(record | setting, "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30}, "width=30 is not a multiple of heads=4"),
        ({"patch_size": 3}, "image_size=8 is not a multiple of patch_size=3"),
        ({"head": "causal_lm"}, "head='causal_lm' is not one of 'none', 'image_classification'"),
        ({"remat": "all"}, "remat='all' is not False, True or one of dots_saveable"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_another_image_is_refused():
    with pytest.raises(ValueError, match=r"the images are \(8, 8, 3\), the model's are \(8, 8, 1\)"):
        jax.eval_shape(ViT(SMALL).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_the_model_is_lifted_without_building_a_weight():
    with pytest.warns(
        UserWarning, match=r"2 weights .* stay as they are.*: 'cls' \(1, 1, 16\), 'positions' \(1, 17, 16\)"
    ):
        adapted = jlora.apply(parameters(), rank=2)
    adapted = adapted.replace(factors=jax.tree.map(lambda x: x + 0.1, adapted.factors))
    lifted = jax.jit(jlora.lift(forward, strict=True))(adapted, images())
    np.testing.assert_allclose(lifted, jax.jit(forward)(jlora.merge(adapted), images()), atol=1e-5)
