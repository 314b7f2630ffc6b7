"""Llama, Mistral and Qwen: what the golden checkpoints of `test_models.py` cannot show."""

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
from jlora.models.llama import PRESETS, Llama, LlamaConfig
from jlora.models.llama.params import read_rope, write_rope
from jlora.models.llama.rope import Default, Dynamic, Linear, Llama3, Yarn, turn, turned
from tests.conformance import filled, randomised
from tests.tiers import thorough

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "golden" / "models"
SMALL = LlamaConfig(
    family="qwen3",
    vocab_size=40,
    context=16,
    width=16,
    layers=2,
    heads=4,
    key_heads=2,
    head_width=8,
    hidden=24,
    qk_norm=True,
)
WINDOWS = dataclasses.replace(SMALL, window=3, sliding=(True, False))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 7)), jnp.int32)
MASK = jnp.arange(7)[None] < jnp.asarray([[7], [4]])


def changed(config=SMALL, **fields):
    return Llama(dataclasses.replace(config, **fields))


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@functools.cache
def parameters(model):
    """Large enough for the attention to differ from place to place."""
    return filled(shapes(model))


@functools.cache
def function(model):
    """The model as a function of parameters, tokens and a mask."""
    return lambda params, tokens=TOKENS, mask=MASK: model.apply({"params": params}, tokens, mask=mask)


@functools.cache
def compiled(model):
    return jax.jit(function(model))


def forward(model, params, *args):
    return compiled(model)(params, *args)


# -- counts ------------------------------------------------------------------------------------------------------------


# as the checkpoints on the hub have them; LLaMA's first 7B, 13B and 65B have the shapes of Llama 2, or its MLPs
@pytest.mark.parametrize(
    ("name", "changes", "parameters"),
    [
        ("llama-2-7b", {}, 6_738_415_616),
        ("llama-2-13b", {}, 13_015_864_320),
        ("llama-2-70b", {}, 68_976_648_192),
        ("llama-2-70b", {"key_heads": None, "hidden": 22016}, 65_285_660_672),
        ("llama-3.1-8b", {}, 8_030_261_248),
        ("llama-3.2-1b", {}, 1_235_814_400),
        ("llama-3.2-3b", {}, 3_212_749_824),
        ("mistral-7b", {}, 7_241_732_096),
        ("qwen2.5-0.5b", {}, 494_032_768),
        ("qwen2.5-7b", {}, 7_615_616_512),
        ("qwen3-0.6b", {}, 596_049_920),
        ("qwen3-8b", {}, 8_190_735_360),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(name, changes, parameters):
    assert size(shapes(changed(PRESETS[name], scan=True, **changes))) == parameters


ATTENTION, MLP = r"attn/(query|key|value|out)", r"mlp/(gate|up|down)"


@pytest.mark.parametrize(
    ("name", "method", "targets", "parameters"),
    [
        ("llama-2-7b", jlora.lora(8), (ATTENTION, MLP), 19_988_480),
        ("llama-2-7b", jlora.lora(64), (ATTENTION, MLP), 159_907_840),
        ("llama-2-7b", jlora.lora(32), (r"attn/(query|key|value)", r"mlp/(up|down)"), 56_098_816),
        ("llama-2-7b", jlora.dora(32), (r"attn/(query|key|value)", r"mlp/(up|down)"), 56_098_816 + 876_544),
        ("llama-3.2-3b", jlora.lora(32), (r"attn/(query|value)",), 9_175_040),
        ("llama-3.2-3b", jlora.dora(32), (r"attn/(query|value)",), 9_289_728),
        ("llama-3.1-8b", jlora.lora(1), (ATTENTION,), 851_968),
        ("llama-3.1-8b", jlora.lora(1), (MLP,), 1_769_472),
        ("llama-3.1-8b", jlora.lora(1), ("head",), 132_352),
    ],
)
def test_adapters_have_the_published_number_of_parameters(name, method, targets, parameters):
    params = presets_shapes(name)
    adapted = jax.eval_shape(lambda params: jlora.apply(params, method=method, targets=list(targets)), params)
    assert jlora.count(adapted).trainable == parameters


@functools.cache
def presets_shapes(name):
    """Shapes of a preset with unrolled layers, from those of one layer."""
    one = shapes(changed(PRESETS[name], layers=1))
    block = one.pop("h_0")
    return one | {f"h_{i}": block for i in range(PRESETS[name].layers)}


# -- adapters ----------------------------------------------------------------------------------------------------------


LIFTED = "tests/test_bert.py::test_lora_is_lifted_without_building_a_weight"  # scanned, as all models are, by stack.py


@pytest.mark.parametrize("scan", thorough([False, True], LIFTED, [False]), ids=["", "scanned"])
def test_lora_is_lifted_without_building_a_weight(scan):
    model = changed(WINDOWS, scan=scan)
    params = parameters(model)
    sites = jlora.sites(function(model), params) if scan else None
    adapted = randomised(jlora.apply(params, rank=4, targets=r"attn/(query|value)", sites=sites))
    assert sum(math.prod(site.shape[:-2]) for site in adapted.sites) == 2 * model.config.layers
    lifted = jax.jit(jlora.lift(function(model), strict=True))(adapted)
    np.testing.assert_allclose(lifted, forward(model, jlora.merge(adapted)), atol=2e-4, rtol=1e-4)
    assert jnp.abs(lifted - forward(model, params)).max() > 1e-1


@pytest.mark.parametrize(("head", "of_head"), [("none", 0), ("causal_lm", 1), ("token_classification", 1)])
def test_every_linear_layer_is_adapted_without_building_a_weight(head, of_head):
    model = changed(head=head)
    adapted = jax.eval_shape(lambda params: jlora.apply(params, rank=2), shapes(model))
    rows = jlora.explain(function(model), adapted).rows
    assert {row.path for row in rows} == {site.path for site in adapted.sites} and all(row.factored for row in rows)
    assert len(adapted.sites) == 7 * model.config.layers + of_head


PREFIXES = "tests/test_bert.py::test_prefixes_are_seen_and_padding_is_not"  # of a scanned model


@pytest.mark.parametrize("scan", thorough([False, True], PREFIXES, [False]), ids=["", "scanned"])
def test_prefixes_are_seen_and_padding_is_not(scan):
    model = changed(WINDOWS, scan=scan, head="token_classification")
    sites = jlora.sites(function(model), parameters(model)) if scan else None
    adapted = randomised(jlora.apply(parameters(model), method=jlora.prefix_tuning(3), sites=sites), 2.0)
    run = jax.jit(jlora.lift(function(model)))
    out = run(adapted)
    assert jnp.abs(out - forward(model, parameters(model))).max() > 1e-2
    other = run(adapted, jnp.where(MASK, TOKENS, 5))
    np.testing.assert_allclose(out[MASK], other[MASK], atol=1e-5)


# -- the computation ---------------------------------------------------------------------------------------------------


def test_bfloat16_is_close_to_float32():
    model = changed(WINDOWS, head="none", scan=True)
    params = parameters(model)
    full, half = forward(model, params), forward(changed(model.config, dtype="bfloat16"), params)
    assert half.dtype == jnp.float32
    assert jnp.abs(half - full)[MASK].mean() < 0.02 * jnp.abs(full).mean()


@functools.cache
def gradient(scan, remat):
    model, params = changed(WINDOWS, scan=scan, remat=remat), parameters(changed(WINDOWS))
    loss = lambda params: jax.nn.log_softmax(function(model)(params))[:, :, 0].mean()
    return jax.jit(jax.grad(loss))(stacked(params) if scan else params)


@pytest.mark.thorough("tests/test_bert.py::test_remat_changes_no_gradient")  # all go through jlora/models/stack.py
@pytest.mark.parametrize(("scan", "remat"), [(False, True), (True, "dots_with_no_batch_dims_saveable")])
def test_remat_changes_no_gradient(scan, remat):
    """Windows of single layers are numbers while tracing, unless layers are scanned or remat'ed: gradients are the same."""
    expected = stacked(gradient(False, False)) if scan else gradient(False, False)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), gradient(scan, remat), expected)


def stacked(params):
    blocks = [params[f"h_{i}"] for i in range(WINDOWS.layers)]
    rest = {name: part for name, part in params.items() if not name.startswith("h_")}
    return rest | {"h": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def test_dropout_drops():
    model = changed(dropout=0.5, scan=True)
    run = jax.jit(
        lambda key: model.apply({"params": parameters(model)}, TOKENS, deterministic=False, rngs={"dropout": key})
    )
    assert jnp.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max() > 1e-3


def test_texts_that_share_a_row_do_not_see_each_other():
    """A mask of pairs, and positions that begin again."""
    model, params = changed(WINDOWS), parameters(changed(WINDOWS))
    text, places = jnp.asarray([0, 0, 0, 0, 1, 1, 1]), jnp.asarray([[0, 1, 2, 3, 0, 1, 2]])
    pairs = jnp.broadcast_to(text[:, None] == text[None], (2, 7, 7))
    run = jax.jit(lambda tokens, mask, at: model.apply({"params": params}, tokens, mask=mask, positions=at))
    packed = run(TOKENS, pairs, jnp.broadcast_to(places, (2, 7)))
    np.testing.assert_allclose(packed[:, 4:], forward(model, params, TOKENS[:, 4:], None), atol=1e-5, rtol=1e-5)


# -- positions ---------------------------------------------------------------------------------------------------------

# transformers 5.23, LlamaRotaryEmbedding(...).inv_freq of heads of 128 features, at these places, and attention_scaling
PLACES = [1, 20, 32, 40, 63]
FREQUENCIES = [
    (Default(), 4096, [0.8659643530845642, 0.05623412877321243, 0.009999999776482582, 0.003162277862429619, 0.00011547819303814322], 1.0),
    (Linear(4.0), 4096, [0.21649108827114105, 0.014058532193303108, 0.0024999999441206455, 0.0007905694656074047, 2.8869548259535804e-05], 1.0),
    (Dynamic(2.0), 4096, [0.8475170731544495, 0.0365569032728672, 0.005020546726882458, 0.0013364071492105722, 2.9740866011707112e-05], 1.0),
    (Llama3(8.0, 1.0, 4.0, 8192, 5e5), 131072, [0.8146172165870667, 0.016560440883040428, 0.0005248460220173001, 3.428102354519069e-05, 3.068925877869333e-07], 1.0),
    (Yarn(4.0, 32768, 1e6), 131072, [0.8058422207832336, 0.01333521492779255, 0.0006029411451891065, 4.4456985051510856e-05, 3.102344408034696e-07], 1.138629436111989),
    (Yarn(32.0, 4096, 15e4, mscale=1.0, mscale_all_dim=0.8, truncate=False), 131072, [0.8300869464874268, 0.019334999844431877, 0.0004564839182421565, 1.818833698052913e-05, 2.50977734594926e-07], 1.0542683394598802),
    (Yarn(40.0, 4096, attention_factor=1.25), 131072, [0.8659643530845642, 0.05623412877321243, 0.005500000435858965, 0.0007905694073997438, 2.886954689529375e-06], 1.25),
]  # fmt: skip


@pytest.mark.parametrize(("rope", "context", "expected", "amplitude"), FREQUENCIES, ids=lambda x: type(x).__name__)
def test_frequencies_are_those_of_transformers(rope, context, expected, amplitude):
    found, factor = rope.frequencies(128, context, jnp.arange(10_000)[None])
    assert found.shape == (64,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found[jnp.asarray(PLACES)], expected, rtol=3e-7)
    assert factor == pytest.approx(amplitude, abs=1e-12)


def test_dynamic_frequencies_are_the_plain_ones_within_the_context():
    within, beyond = (Dynamic(2.0).frequencies(8, 16, jnp.arange(n)[None])[0] for n in (16, 17))
    np.testing.assert_array_equal(within, Default().frequencies(8, 16, jnp.zeros((1, 1)))[0])
    assert (beyond[1:] < within[1:]).all()


def test_scores_depend_on_the_distance_of_two_tokens_alone():
    q, k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)), jnp.float32)
    at = lambda x, position: turned(x, turn(Default(), 8, 16, jnp.full((1, 1), position)))
    score = lambda i, j: float(jnp.sum(at(q, i) * at(k, j)))
    assert score(7, 3) == pytest.approx(score(14, 10), abs=1e-5) and abs(score(7, 3) - score(7, 4)) > 1e-2
    assert at(q.astype(jnp.bfloat16), 3).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        ({}, Default()),
        ({"rope_theta": 5e5, "rope_scaling": None}, Default(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, Linear(2.0, 5e5)),
        ({"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0}}, Dynamic(2.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 8.0}, Default(7.0)),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": None}},
            Yarn(4.0, rope_theta=1e6),
        ),
    ],
)
def test_frequencies_are_read_in_the_old_style_and_the_new_one(config, rope):
    assert read_rope(config) == rope
    assert read_rope(write_rope(rope)) == rope
    old = {key: value for key, value in write_rope(rope).items() if key != "rope_parameters"}
    new = {key: value for key, value in write_rope(rope).items() if key == "rope_parameters"}
    assert read_rope(old) == read_rope(new) == rope


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "config.json has rope_type='longrope'; jlora's model has 'default' or",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "RoPE of type 'linear' lacks 'factor'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "finetuned": True}},
            "RoPE of type 'linear' has 'finetuned', which is none of factor, rope_theta",
        ),
        ({"partial_rotary_factor": 0.5}, "config.json has partial_rotary_factor=0.5; jlora's model has None or 1.0"),
    ],
)
def test_other_frequencies_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        read_rope(config)


def test_a_sequence_longer_than_the_context_is_refused():
    apply = lambda model, n: jax.eval_shape(function(model), shapes(model), jnp.ones((1, n), jnp.int32), None)
    assert apply(changed(), 16).shape == (1, 16, 40)
    with pytest.raises(ValueError, match="the sequence has 17 tokens, the model's context is 16"):
        apply(changed(), 17)
    assert apply(changed(rope=Dynamic(2.0)), 32).shape == (1, 32, 40)
    with pytest.raises(ValueError, match="the sequence has 33 tokens, the model's context is 32"):
        apply(changed(rope=Dynamic(2.0)), 33)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        (LlamaConfig(qk_norm=True), "a model of family 'llama' is not saved with qk_norm=True"),
        (LlamaConfig(qkv_bias=True), "a model of family 'llama' is not saved with out_bias=False"),
        (LlamaConfig(family="mistral", mlp_bias=True), "a model of family 'mistral' is not saved with mlp_bias=True"),
        (LlamaConfig(family="qwen2"), "a model of family 'qwen2' is not saved with qkv_bias=False"),
    ],
)
def test_what_a_family_cannot_say_is_not_saved(config, lost, tmp_path):
    model = changed(config, vocab_size=8, width=8, layers=1, heads=2, hidden=8)
    with pytest.raises(ValueError, match=lost):
        models.save(tmp_path, model, parameters(model))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in PRESETS),
        ("mistral-7b", {"window": None}),
        ("qwen2.5-7b", {"window": 3}),
        ("qwen3-8b", {"window": 3, "sliding": (True, False), "qkv_bias": True, "out_bias": True}),
    ],
)
def test_a_model_is_saved_and_loaded(name, changes, tmp_path):
    model = changed(PRESETS[name], vocab_size=8, width=2 * PRESETS[name].heads, layers=2, hidden=8, **changes)
    models.save(tmp_path, model, parameters(model))
    again = models.load(tmp_path)
    assert again.model.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, parameters(model))


def test_the_tokens_classifier_is_called_score_and_the_body_has_no_prefix(tmp_path):
    """Names of transformers, whose token classifier has a bias and whose sequence classifier has none."""
    for head, expected in {
        "token_classification": {"score.weight", "score.bias"},
        "sequence_classification": {"score.weight"},
    }.items():
        model = changed(head=head)
        models.save(tmp_path, model, parameters(model))
        keys = set(load_file(tmp_path / "model.safetensors"))
        assert {key for key in keys if not key.startswith("model.")} == expected
    body = changed(head="none")
    models.save(tmp_path, body, parameters(body))
    assert not any(key.startswith("model.") for key in load_file(tmp_path / "model.safetensors"))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3Model"]
    scored = models.load(tmp_path, head="token_classification", labels=5)
    assert scored.fresh == ("classifier/kernel", "classifier/bias")
    assert scored.params["classifier"]["kernel"].shape == (16, 5)


def rewritten(name, folder, tensors, **settings):
    """A golden checkpoint with more tensors and other settings."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    save_file(load_file(GOLDEN / name / "model.safetensors") | tensors, folder / "model.safetensors")
    record = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def test_an_old_checkpoint_has_buffers_and_a_tied_head_again(tmp_path):
    golden = models.load(GOLDEN / "llama3_causal_lm")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, "f"), "lm_head.weight": np.ones((48, 16), "f")}
    pretrained = models.load(rewritten("llama3_causal_lm", tmp_path, more))
    jax.tree.map(np.testing.assert_array_equal, pretrained.params, golden.params)
    untied = models.load(rewritten("llama3_causal_lm", tmp_path, more, tie_word_embeddings=False))
    assert (untied.params["head"]["kernel"] == 1).all()


def test_an_old_config_has_windows_from_a_layer_on(tmp_path):
    record = json.loads((GOLDEN / "qwen2_sliding" / "config.json").read_text())
    assert models.load(GOLDEN / "qwen2_sliding").model.config.sliding == (False, True, True)
    folder = rewritten("qwen2_sliding", tmp_path, {}, layer_types=None, max_window_layers=2)
    assert models.build(folder).config.sliding == (False, False, True)
    assert models.build(rewritten("qwen2_sliding", tmp_path, {}, use_sliding_window=False)).config.window is None
    folder = rewritten("qwen2_sliding", tmp_path, {}, layer_types=[*record["layer_types"][:2], "chunked_attention"])
    with pytest.raises(ValueError, match="config.json has layer_types='chunked_attention'; jlora's model has"):
        models.build(folder)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width=18 is not a multiple of heads=4, and there is no head_width"):
        changed(width=18, head_width=None)
    with pytest.raises(ValueError, match="head_width=7 is odd: it is turned in pairs"):
        changed(head_width=7)
    with pytest.raises(ValueError, match="heads=4 is not a multiple of key_heads=3"):
        changed(key_heads=3)
    with pytest.raises(ValueError, match="needs a window, and an element for each of 2 layers"):
        changed(window=3, sliding=(True, False, True))
    with pytest.raises(ValueError, match="head='masked_lm' is not one of 'none', 'causal_lm'"):
        changed(head="masked_lm")
    assert changed(key_heads=4, head_width=4, window=3, sliding=(True, True)) == changed(
        key_heads=None, head_width=None, window=3
    )
