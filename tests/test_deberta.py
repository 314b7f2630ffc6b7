"""DeBERTa: what the golden checkpoints of `test_models.py` cannot show."""

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
from jlora.models.deberta import PRESETS, Deberta, DebertaConfig
from jlora.models.deberta.params import read
from jlora.models.deberta.relative import bucketed, rows
from tests.conformance import normal, randomised

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "golden" / "models"
SHAPE = {"vocab_size": 40, "context": 16, "width": 16, "layers": 2, "heads": 2, "hidden": 24, "buckets": 8}
V3 = Deberta(DebertaConfig(**SHAPE))
XXL = Deberta(DebertaConfig(**SHAPE, convolution=3, conv_nonlinearity="gelu"))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(4, 40, (2, 7)), jnp.int32)
MASK = jnp.arange(7)[None] < jnp.asarray([[7], [4]])


def changed(model, **fields):
    return Deberta(dataclasses.replace(model.config, **fields))


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]


def parameters(model):
    """Random parameters, not the model's start, whose attention is nearly the same everywhere."""
    return jax.tree.map(lambda leaf: normal(*leaf.shape), shapes(model))


@functools.cache
def function(model):
    """The model as a function of parameters, tokens and a mask."""
    return lambda params, tokens=TOKENS, mask=MASK: model.apply({"params": params}, tokens, mask=mask)


@functools.cache
def compiled(model):
    return jax.jit(function(model))


def size(model):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(model)))


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "body", "scan"),  # transformers' DebertaV2Model
    [
        ("deberta-v3-base", 183_831_552, False),
        ("deberta-v3-large", 434_012_160, True),
        ("deberta-v2-xlarge", 884_593_152, True),
        ("deberta-v2-xxlarge", 1_564_549_632, True),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(name, body, scan):
    model = changed(Deberta(PRESETS[name]), scan=scan, head="none")
    width, words = model.config.width, model.config.vocab_size
    assert size(model) == body
    assert size(changed(model, head="masked_lm")) == body + width**2 + 3 * width + words
    assert size(changed(model, head="sequence_classification")) == body + width**2 + width + 2 * width + 2


@pytest.mark.parametrize(
    ("name", "rank", "targets", "trained"),
    [
        ("deberta-v2-xxlarge", 16, "attn/(query|value)", 4_718_592),  # LoRA, table 2: 4.7M
        ("deberta-v3-base", 8, "attn/(query|key|value|out)|mlp/", 1_327_104),  # AdaLoRA, table 1: 1.33M
        ("deberta-v3-base", 2, "attn/(query|key|value|out)|mlp/", 331_776),  # 0.33M
    ],
)
def test_lora_has_the_published_size(name, rank, targets, trained):
    model = Deberta(PRESETS[name])
    adapted = jax.eval_shape(lambda params: jlora.apply(params, rank=rank, targets=targets), shapes(model))
    assert jlora.count(adapted).trainable == trained


# -- relative positions ------------------------------------------------------------------------------------------------


def test_buckets_are_those_of_the_released_code():
    """Bounds of the buckets by transformers' `make_log_bucket_position`, for the 256 buckets and 512 tokens of all models."""
    far = [127, 128, 129, 130, 131, 132, 140, 200, 300, 400, 500, 505, 506, 511]
    steps = [127, 128, 129, 130, 131, 131, 137, 169, 207, 233, 254, 254, 255, 255]
    assert bucketed(np.array(far), 256, 512).tolist() == steps
    assert bucketed(-np.array(far), 256, 512).tolist() == [-step for step in steps]
    assert bucketed(np.arange(512), 256, 512).sum() == 87_297
    assert set(bucketed(np.arange(-511, 512), 256, 512)) == set(range(-255, 256))


@pytest.mark.parametrize("buckets", [8, 0])
@pytest.mark.parametrize("length", [1, 2, 9, 20])
def test_no_more_rows_than_a_sequence_needs(buckets, length):
    span = buckets or 6
    found = rows(length, span, buckets=buckets, reach=16)
    assert found.start >= 0 and found.stop <= 2 * span
    assert found.stop - found.start <= 2 * length - 1
    assert set(found.pairs.flat) == set(range(found.stop - found.start)) and found.pairs.shape == (length, length)
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    near = np.abs(distance) <= 4  # below half the buckets, and below the span
    assert (found.start + found.pairs == distance + span)[near].all()


@pytest.mark.parametrize(("terms", "others"), [(("c2p",), "query"), (("p2c",), "key")])
def test_a_model_of_one_term_has_one_kernel_for_positions(terms, others):
    kernels = shapes(changed(V3, terms=terms, shared=False))["h_0"]["attn"]
    assert [name for name in kernels if name.startswith("pos_")] == [f"pos_{({'query', 'key'} - {others}).pop()}"]


# -- adapters, and forms of the same model -----------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "scan"), [(V3, False), (XXL, True)], ids=["v3", "xxl scanned"])
def test_lora_is_lifted_without_building_a_weight(model, scan):
    model = changed(model, scan=scan, head="sequence_classification")
    params = parameters(model)
    sites = jlora.sites(function(model), params) if scan else None
    adapted = randomised(jlora.apply(params, rank=4, targets=r"attn/(query|value)", sites=sites))
    assert sum(math.prod(site.shape[:-2]) for site in adapted.sites) == 2 * model.config.layers
    lifted = jax.jit(jlora.lift(function(model), strict=True))(adapted)
    np.testing.assert_allclose(lifted, compiled(model)(jlora.merge(adapted)), atol=1e-5)
    assert jnp.abs(lifted - compiled(model)(params)).max() > 1e-3


@pytest.mark.parametrize("shared", [True, False])
def test_every_linear_layer_is_adapted_without_building_a_weight(shared):
    """The convolution and the tables too."""
    model = changed(XXL, shared=shared, absolute=True, types=2)
    sites = jlora.sites(function(model), shapes(model))
    adapted = jax.eval_shape(lambda params: jlora.apply(params, rank=2, sites=sites, targets="."), shapes(model))
    table = jlora.explain(function(model), adapted).rows
    assert {row.path for row in table} == {site.path for site in adapted.sites} and all(row.factored for row in table)
    assert len(adapted.sites) == (6 if shared else 8) * 2 + len(["wte", "wpe", "wtt", "wre", "conv", "lm_head"])


def test_prefixes_are_seen_and_padding_is_not():
    model = changed(XXL, head="token_classification", layers=1)
    adapted = randomised(jlora.apply(parameters(model), method=jlora.prefix_tuning(3)), 2.0)
    run = jax.jit(jlora.lift(function(model)))
    out = run(adapted)
    assert jnp.abs(out - compiled(model)(parameters(model))).max() > 1e-2
    other = run(adapted, jnp.where(MASK, TOKENS, 5))
    np.testing.assert_allclose(out[MASK], other[MASK], atol=1e-6)


@pytest.mark.loose_promotion  # Flax's LayerNorm promotes to float32
def test_bfloat16_is_close_to_float32():
    model = changed(XXL, head="none", scan=True)
    params = parameters(model)
    full, half = compiled(model)(params), compiled(changed(model, dtype="bfloat16"))(params)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half[MASK], full[MASK], atol=0.2)  # of values up to 4, at 8 bits, after 2 layers
    assert jnp.abs(half - full)[MASK].mean() < 0.02


@pytest.mark.thorough("tests/test_bert.py::test_remat_changes_no_gradient")  # all go through jlora/models/stack.py
def test_remat_changes_no_gradient():
    def gradient(remat):
        model = changed(XXL, remat=remat, head="sequence_classification", layers=1)
        loss = lambda params: jax.nn.log_softmax(function(model)(params))[:, 0].mean()
        return jax.jit(jax.grad(loss))(parameters(model))

    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), gradient(True), gradient(False))


@pytest.mark.parametrize("rates", [{"dropout": 0.5, "head_dropout": 0.0}, {"head_dropout": 0.5}])
def test_dropout_drops(rates):
    model = changed(XXL, head="sequence_classification", layers=1, **rates)
    run = jax.jit(
        lambda key: model.apply({"params": parameters(model)}, TOKENS, deterministic=False, rngs={"dropout": key})
    )
    assert jnp.abs(run(jax.random.key(0, impl="rbg")) - run(jax.random.key(1, impl="rbg"))).max() > 1e-3


# -- checkpoints -------------------------------------------------------------------------------------------------------


def rewritten(name, folder, tensors, drop=(), **settings):
    """A golden checkpoint with other tensors and settings."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    record = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({k: v for k, v in record.items() if k not in drop}))
    return folder


def test_a_checkpoint_as_its_authors_published_it(tmp_path):
    """microsoft/deberta-v3-base names no class, has its terms in one string, and both heads of the pretraining."""
    tensors = load_file(GOLDEN / "deberta_v3_masked_lm" / "model.safetensors")
    tensors |= {
        "mask_predictions.dense.weight": np.ones((16, 16), "f"),
        "deberta.embeddings.position_ids": np.arange(24)[None],
        "deberta.embeddings.position_embeddings.weight": np.ones((24, 16), "f"),
    }
    folder = rewritten(
        "deberta_v3_masked_lm",
        tmp_path,
        tensors,
        ("architectures", "legacy", "pooler_hidden_size"),
        pos_att_type="c2p|p2c",
    )
    body = models.load(folder)
    assert body.model.config.head == "none" and body.model.config.terms == ("c2p", "p2c") and not body.fresh
    whole = models.load(folder, head="masked_lm", legacy=False)
    assert not whole.fresh
    golden = models.load(GOLDEN / "deberta_v3_masked_lm").params
    jax.tree.map(np.testing.assert_array_equal, whole.params, golden)
    assert set(whole.params) - set(body.params) == {"lm_head"}
    assert {path.split("/")[0] for path in models.load(folder, head="masked_lm").fresh} == {"lm_head"}
    assert models.load(folder, head="sequence_classification", labels=3).params["classifier"]["kernel"].shape == (16, 3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"relative_attention": False}, "config.json has relative_attention=False; jlora's model has True"),
        ({"pos_att_type": None}, r"terms=\(\) are not 'c2p', 'p2c' or both"),
        ({"pos_att_type": "c2p|p2p"}, r"terms=\('c2p', 'p2p'\) are not 'c2p', 'p2c' or both"),
        ({"attention_head_size": 4}, "config.json has attention_head_size=4; jlora's model has 8"),
        ({"norm_rel_ebd": "rms"}, "config.json has norm_rel_ebd='rms'; jlora's model has 'layer_norm' or 'none'"),
        ({"conv_kernel_size": 4}, "convolution=4 is not odd, nor 0 for none"),
        ({"hidden_act": "mish"}, "nonlinearity='mish' is not one of gelu, "),
    ],
)
def test_settings_that_are_not_supported_are_refused(setting, message):
    record = json.loads((GOLDEN / "deberta_v2_xxl_base" / "config.json").read_text())
    assert read(record, "none").convolution == 3
    with pytest.raises(ValueError, match=message):
        read(record | setting, "none")
    with pytest.raises(ValueError, match="relative_attention=False"):
        read({k: v for k, v in record.items() if k != "relative_attention"}, "none")


def test_calls_that_do_not_fit_are_refused():
    apply = lambda tokens, **options: jax.eval_shape(
        functools.partial(V3.apply, **options), {"params": shapes(V3)}, tokens
    )
    assert apply(jnp.ones((1, 16), jnp.int32)).shape == (1, 16, 40)
    with pytest.raises(ValueError, match="the sequence has 17 tokens, the model's context is 16"):
        apply(jnp.ones((1, 17), jnp.int32))
    with pytest.raises(ValueError, match="the model has no absolute positions: call it without positions="):
        apply(TOKENS, positions=jnp.zeros_like(TOKENS))
