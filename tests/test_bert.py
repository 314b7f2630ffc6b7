"""BERT and RoBERTa: what the golden checkpoints of `test_models.py` cannot show."""

import dataclasses
import functools
import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import models
from jlora.models import bert, roberta
from jlora.models.bert import Bert, BertConfig
from jlora.models.roberta import Roberta, RobertaConfig
from tests.conformance import normal, randomised

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "golden" / "models"
SHAPE = {"vocab_size": 40, "context": 16, "width": 16, "layers": 2, "heads": 2, "hidden": 24}
MODELS = {"bert": Bert(BertConfig(**SHAPE)), "roberta": Roberta(RobertaConfig(**SHAPE))}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(4, 40, (2, 7)), jnp.int32)
MASK = jnp.arange(7)[None] < jnp.asarray([[7], [4]])


def changed(model, **fields):
    return type(model)(dataclasses.replace(model.config, **fields))


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


def forward(model, params, *args):
    return compiled(model)(params, *args)


def without(adapted):
    return adapted.replace(factors=jax.tree.map(jnp.zeros_like, adapted.factors))


def size(model):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(model)))


# transformers' BertModel and RobertaModel, with their pooler, and what the masked LM of each has
@pytest.mark.parametrize(
    ("model", "with_pooler", "masked_lm"),
    [
        (Bert(bert.PRESETS["bert-base"]), 109_482_240, 109_514_298),
        (Bert(bert.PRESETS["bert-large"]), 335_141_888, 335_174_458),
        (Bert(bert.PRESETS["minilm-l6-h384"]), 22_713_216, None),
        (Roberta(roberta.PRESETS["roberta-base"]), 124_645_632, 124_697_433),
        (Roberta(roberta.PRESETS["roberta-large"]), 355_359_744, 355_412_057),
    ],
    ids=lambda x: None if x is None or isinstance(x, int) else f"{type(x).__name__} {x.config.width}",
)
def test_a_preset_has_the_published_number_of_parameters(model, with_pooler, masked_lm):
    width = model.config.width
    model = changed(model, scan=True, head="none", pooler=True)
    assert size(model) == with_pooler
    assert width > 768 or size(changed(model, scan=False)) == with_pooler
    assert size(changed(model, pooler=False)) == with_pooler - width * width - width
    if masked_lm is not None:
        assert size(changed(model, head="masked_lm")) == masked_lm


def test_lora_of_queries_and_values_of_roberta_with_its_head_has_the_published_size():
    model = changed(Roberta(roberta.PRESETS["roberta-base"]), head="sequence_classification")
    adapted = jlora.apply(shapes(model), rank=8, targets="attn/(query|value)", extras="classifier")
    assert jlora.count(adapted).trainable == 887_042


@pytest.mark.parametrize("name", MODELS)
def test_a_classifier_of_the_first_token_computes_no_other_in_the_last_block(name):
    """In the last block only keys and values of the other tokens are computed: 512 of 1,792 weights act on them."""
    flops = {
        head: compiled(model).lower(shapes(model)).cost_analysis()["flops"]
        for head in ("none", "sequence_classification")
        for model in [changed(MODELS[name], head=head)]
    }
    assert flops["sequence_classification"] < 0.75 * flops["none"]


@pytest.mark.parametrize(("name", "scan"), [("bert", False), ("roberta", True)])
def test_lora_is_lifted_without_building_a_weight(name, scan):
    model = changed(MODELS[name], scan=scan, head="sequence_classification")
    params = parameters(model)
    sites = jlora.sites(function(model), params) if scan else None
    adapted = randomised(jlora.apply(params, rank=4, targets=r"attn/(query|value)", sites=sites))
    assert sum(math.prod(site.shape[:-2]) for site in adapted.sites) == 2 * model.config.layers
    lifted = jax.jit(jlora.lift(function(model), strict=True))
    out = lifted(adapted)
    np.testing.assert_allclose(out, forward(model, jlora.merge(adapted)), atol=1e-5)
    assert jnp.abs(out - lifted(without(adapted))).max() > 1e-3


@pytest.mark.parametrize("head", bert.modeling.HEADS)
@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_is_adapted_without_building_a_weight(name, head):
    model = changed(MODELS[name], head=head)
    adapted = jax.eval_shape(lambda params: jlora.apply(params, rank=2), shapes(model))
    rows = jlora.explain(function(model), adapted).rows
    assert {row.path for row in rows} == {site.path for site in adapted.sites} and all(row.factored for row in rows)
    of_head = {"none": 0, "masked_lm": 1, "sequence_classification": 2, "token_classification": 1}[head]
    assert len(adapted.sites) == 6 * model.config.layers + of_head


def test_prefixes_are_seen_and_padding_is_not():
    model = changed(MODELS["roberta"], scan=True, head="token_classification")
    sites = jlora.sites(function(model), parameters(model))
    adapted = randomised(jlora.apply(parameters(model), method=jlora.prefix_tuning(3), sites=sites), 2.0)
    run = jax.jit(jlora.lift(function(model)))
    out = run(adapted)
    assert jnp.abs(out - run(without(adapted))).max() > 1e-2
    other = run(adapted, jnp.where(MASK, TOKENS, 5))
    np.testing.assert_allclose(out[MASK], other[MASK], atol=1e-6)


@pytest.mark.loose_promotion  # Flax's LayerNorm promotes to float32
def test_bfloat16_is_close_to_float32():
    model = changed(MODELS["bert"], head="none", scan=True)
    params = parameters(model)
    full, half = forward(model, params), forward(changed(model, dtype="bfloat16"), params)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half[MASK], full[MASK], atol=0.2)  # of values up to 4, at 8 bits, after 2 layers
    assert jnp.abs(half - full)[MASK].mean() < 0.02


def test_remat_changes_no_gradient():
    def gradient(remat):
        model = changed(MODELS["bert"], scan=True, remat=remat, head="sequence_classification")
        loss = lambda params: jax.nn.log_softmax(function(model)(params))[:, 0].mean()
        return jax.jit(jax.grad(loss))(parameters(model))

    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), gradient(True), gradient(False))


def test_dropout_drops():
    model = changed(MODELS["roberta"], head="sequence_classification", dropout=0.5, layers=1)
    run = jax.jit(
        lambda key: model.apply({"params": parameters(model)}, TOKENS, deterministic=False, rngs={"dropout": key})
    )
    assert jnp.abs(run(jax.random.key(0, impl="rbg")) - run(jax.random.key(1, impl="rbg"))).max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_longer_than_the_context_is_refused(name):
    model = MODELS[name]
    apply = lambda tokens: jax.eval_shape(function(model), parameters(model), tokens, None)
    assert apply(jnp.ones((1, 16), jnp.int32)).shape == (1, 16, 40)
    with pytest.raises(ValueError, match="the sequence has 17 tokens, the model's context is 16"):
        apply(jnp.ones((1, 17), jnp.int32))


def test_the_last_position_of_roberta_is_in_its_table():
    assert shapes(MODELS["roberta"])["wpe"]["embedding"].shape == (16 + 2, 16)
    assert roberta.modeling.places(jnp.full((1, 16), 5), pad=1).tolist() == [list(range(2, 18))]


# -- checkpoints -------------------------------------------------------------------------------------------------------


def rewritten(name, folder, tensors, **settings):
    """A golden checkpoint with other tensors and settings."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    record = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_an_old_checkpoint_names_gamma_and_beta_and_has_more(tmp_path):
    """google-bert/bert-base-uncased has both heads of the pretraining, the tied decoder twice, and a buffer."""
    tensors = load_file(GOLDEN / "bert_masked_lm" / "model.safetensors")
    old = {re.sub(r"(LayerNorm)\.weight", r"\1.gamma", key): tensor for key, tensor in tensors.items()}
    old = {re.sub(r"(LayerNorm)\.bias", r"\1.beta", key): tensor for key, tensor in old.items()}
    assert len({key for key in old if key.endswith(("gamma", "beta"))}) == 12
    pooler = {"bert.pooler.dense.weight": np.eye(16, dtype="f"), "bert.pooler.dense.bias": np.ones(16, "f")}
    old |= pooler | {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
        "cls.seq_relationship.weight": np.ones((2, 16), "f"),
        "cls.seq_relationship.bias": np.ones(2, "f"),
        "bert.embeddings.position_ids": np.arange(24)[None],
    }
    folder = rewritten("bert_masked_lm", tmp_path, old)
    pretrained, golden = models.load(folder), models.load(GOLDEN / "bert_masked_lm")
    assert set(pretrained.unused) == set(pooler)
    same(pretrained.params, golden.params)
    classifier = models.load(folder, head="sequence_classification", labels=1)
    assert classifier.fresh == ("classifier/kernel", "classifier/bias")
    np.testing.assert_array_equal(classifier.params["pooler"]["kernel"], np.eye(16))
    assert jax.eval_shape(function(classifier.model), classifier.params).shape == (2, 1)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_pooler_is_left_out_where_it_is_not_asked_for(name, tmp_path):
    whole = models.load(GOLDEN / f"{name}_base")
    assert list(jax.eval_shape(function(whole.model), whole.params)) == ["out", "pooled"]
    plain = models.load(GOLDEN / f"{name}_base", pooler=False)
    same(plain.params, {part: value for part, value in whole.params.items() if part != "pooler"})
    assert jax.eval_shape(function(plain.model), plain.params).shape == (2, 7, 16)
    models.save(tmp_path, plain.model, plain.params, source=GOLDEN / f"{name}_base")
    again = models.load(tmp_path)
    assert again.model == plain.model
    same(again.params, plain.params)


def test_heads_go_onto_a_roberta_that_was_saved_with_another():
    with_pooler = models.load(GOLDEN / "roberta_base", head="sequence_classification", labels=3)
    assert [path.split("/")[1] for path in with_pooler.fresh] == ["dense", "dense", "out", "out"]
    body = models.load(GOLDEN / "roberta_masked_lm", head="none")
    assert body.fresh == () and {key.split(".")[0] for key in body.unused} == {"lm_head"}
    assert jax.eval_shape(function(body.model), body.params).shape == (2, 7, 16)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("is_decoder", True), ("position_embedding_type", "relative_key"), ("tie_word_embeddings", False)],
)
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_settings_that_are_not_supported_are_refused(name, setting, value, tmp_path):
    tensors = load_file(GOLDEN / f"{name}_masked_lm" / "model.safetensors")
    folder = rewritten(f"{name}_masked_lm", tmp_path, tensors, **{setting: value})
    with pytest.raises(ValueError, match=f"config.json has {setting}={value!r}; jlora's model has"):
        models.load(folder)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width=15 is not a multiple of heads=2"):
        changed(MODELS["bert"], width=15)
    with pytest.raises(ValueError, match="head='causal_lm' is not one of 'none', 'masked_lm'"):
        changed(MODELS["roberta"], head="causal_lm")
