"""Quantised bases in the trees of libraries, in the models of jlora with a cache, and under PEFT's folders."""

import json
import re
from pathlib import Path

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import models, tree
from jlora.models.catalogue import ARCHITECTURES
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from tests.conformance import close, filled, normal, randomised

pytestmark = pytest.mark.once

X = normal(3, 32)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(32, name="b")(jnp.tanh(nn.Dense(64, kernel_init=init, name="a")(x)))


class Nnx(nnx.Module):
    def __init__(self):
        self.a, self.b = nnx.Linear(32, 64, rngs=nnx.Rngs(0)), nnx.Linear(64, 32, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


def linen():
    """Its kernels are in boxes (`nn.Partitioned`)."""
    return lambda params, x: Linen().apply(params, x), Linen().init(jax.random.key(0), X)


def of_nnx():
    graph, state = nnx.split(Nnx())
    return lambda state, x: nnx.merge(graph, state)(x), state


def equinox():
    arrays, rest = eqx.partition(eqx.nn.MLP(32, 32, 64, 1, key=jax.random.key(0)), eqx.is_array)
    return lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x), arrays


def haiku():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(32)(jnp.tanh(hk.Linear(64)(x)))))
    return network.apply, network.init(jax.random.key(0), X)


LIBRARIES = {"linen": linen, "nnx": of_nnx, "equinox": equinox, "haiku": haiku}


@pytest.mark.parametrize("name", LIBRARIES)
def test_trees_of_libraries(name):
    fn, params = LIBRARIES[name]()
    sites = jlora.sites(fn, params, X)
    base = jlora.quantize(params, block=32, sites=sites)
    plain = jlora.dequantize(base)
    assert sum(map(tree.is_stored, tree.leaves(base)[0].values())) == 2
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    close(jlora.lift(fn)(base, X), fn(plain, X), 1e-5)
    adapted, expected = (randomised(jlora.apply(base, 2, sites=sites)) for base in (base, plain))
    close(jax.jit(jlora.lift(fn))(adapted, X), fn(jlora.merge(expected), X), 1e-5)
    merged = jlora.merge(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    chex.assert_trees_all_equal(merged, jlora.merge(expected))
    chex.assert_trees_all_equal_structs(jlora.merge(adapted, requantize=True), base)


SIZES = {"vocab_size": 32, "context": 16, "width": 32, "layers": 2, "heads": 2}
MODELS = {
    "gpt2": GPT2(GPT2Config(**SIZES)),
    "llama, scanned": Llama(LlamaConfig(**SIZES, hidden=64, key_heads=1, scan=True)),
}
TOKENS = jnp.asarray([[5, 6, 7, 8], [0, 0, 9, 10]])
MASK = jnp.asarray([[True] * 4, [False, False, True, True]])


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_the_dequantised_base(name):
    model = MODELS[name]
    params = filled(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"])
    sites = jlora.sites(lambda p: model.apply({"params": p}, TOKENS), params)
    base = jlora.quantize(params, block=32, sites=sites)
    adapted, plain = (randomised(jlora.apply(base, 2, sites=sites)) for base in (base, jlora.dequantize(base)))
    options = {"new_tokens": 5, "mask": MASK, "apply": jlora.lift(model.apply)}
    texts = [models.generate(model, a, TOKENS, **options) for a in (adapted, plain)]
    chex.assert_trees_all_equal(*texts)
    lifted = jlora.lift(lambda p: model.apply({"params": p}, TOKENS))
    close(lifted(adapted), lifted(plain), 1e-4)


def test_a_model_on_explicit_axes_is_that_on_one_device():
    """Its kernels are cut along their last axes, in the middle of which heads begin."""
    model = GPT2(GPT2Config(**{**SIZES, "width": 64, "layers": 1}))
    params = filled(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"])
    sites = jlora.sites(lambda p: model.apply({"params": p}, TOKENS), params)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,))
    spec = lambda x: P(*[None] * (x.ndim - 1), "model") if x.ndim > 1 else P()

    def gradient(params):
        adapted = randomised(jlora.apply(jlora.quantize(params, block=32, sites=sites), 2, sites=sites))
        factors, frozen = jlora.partition(adapted)
        lifted = jlora.lift(model.apply)
        loss = lambda factors, frozen: jnp.mean(lifted({"params": jlora.combine(factors, frozen)}, TOKENS) ** 2)
        return jax.jit(jax.grad(loss))(factors, frozen)

    expected = gradient(params)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), params)
        found = gradient(placed)
    assert "model" in jax.typeof(placed["h_0"]["attn"]["query"]["kernel"]).sharding.spec
    close(jax.device_get(found), expected, 2e-5)


PEFT = Path(__file__).with_name("golden") / "peft"
FOLDERS = Path(__file__).parent / "golden" / "models"
ROWS = ("lora", "dora_gpt2", "adalora", "pissa", "rslora", "lora_llama", "ia3_llama", "vera", "oft", "modules_to_save")


@pytest.mark.parametrize("row", ROWS)
def test_folders_of_peft_on_a_base_in_4_bits(row, tmp_path):
    name = json.loads((PEFT / row / "adapter_config.json").read_text())["base_model_name_or_path"].split("/")[1]
    own = models.load(PEFT.parent / "models" / name)
    base = jlora.quantize(own.params, block=32)
    adapted, plain = (jlora.peft.load(PEFT / row, params, model=own.model) for params in (base, jlora.dequantize(base)))
    assert any(map(tree.is_stored, tree.leaves(adapted.base)[0].values()))
    chex.assert_trees_all_equal(jlora.merge(adapted), jlora.merge(plain))
    for folder, of in (("stored", adapted), ("plain", plain)):
        jlora.peft.save(tmp_path / folder, of, model=own.model)
    written = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("stored", "plain")]
    assert written[0] == written[1]
    again = jlora.peft.load(tmp_path / "stored", base, model=own.model)
    close(jlora.merge(again), jlora.merge(plain), 1e-6)


STARTS = {
    "loftq": lambda params: jlora.loftq(jlora.apply(params, 2, targets="query"), block=32, iterations=2),
    "qpissa": lambda params: jlora.quantize(jlora.apply(params, method=jlora.pissa(2), targets="query"), block=32),
}


@pytest.mark.parametrize("start", STARTS)
def test_folders_of_a_start_that_changed_the_base(start, tmp_path):
    """They warn; what was learned, at twice the rank, fits the original base, and does not."""
    own = models.load(FOLDERS / "llama2_causal_lm")
    before = STARTS[start](own.params)
    adapted = randomised(before)
    file = tmp_path / "out" / "adapter_model.safetensors"
    text = (
        f"'{file}' fits this base alone, not the model that it was made from: the start (LoftQ, QPiSSA) changed "
        "2 weights, first 'h_0/attn/query/kernel'. Either save the base beside it and load the adapter onto that one: "
        "jlora.models.save(folder, model, adapted.base). Or save what was learned, of twice the rank, which fits the "
        "original weights: jlora.combine_adapters([adapted, start], [1, -1], 'cat').replace(base=params), `start` being "
        "the adapter before training"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$"):
        jlora.peft.save(tmp_path / "out", adapted, model=own.model)
    learned = jlora.combine_adapters([adapted, before], [1, -1], "cat").replace(base=own.params)
    jlora.peft.save(tmp_path / "learned", learned, model=own.model)
    again = jlora.peft.load(tmp_path / "learned", own.params, model=own.model)
    assert {site.rank for site in again.sites} == {4}
    path = "h_0/attn/query/kernel"
    of = lambda adapted: tree.leaves(jlora.merge(adapted))[0][path]
    close(of(again) - tree.leaves(own.params)[0][path], of(adapted) - of(before), 1e-4)


def test_a_residual_says_that_it_is_one():
    """A base that was quantised as it is, or again by merging, is none. Trees of both have one structure."""
    params = {"a": {"kernel": normal(64, 64)}, "b": {"kernel": normal(64, 64)}}
    start = jlora.apply(params, 2, targets="a")
    after, first = jlora.loftq(start, iterations=2), jlora.loftq(start, iterations=1)
    assert jax.tree.structure(after.base) == jax.tree.structure(jlora.quantize(params))
    assert not first.base["a"]["kernel"].remark.residual
    assert repr(after.base["a"]["kernel"]) == "Quantised(nf4, blocks of 64 twice, float32[64, 64], a residual)"
    assert not after.base["b"]["kernel"].remark.residual
    assert not jlora.merge(after, requantize=True)["a"]["kernel"].remark.residual
    assert not jlora.quantize(jlora.apply(params, 2)).base["a"]["kernel"].remark.residual


def test_statistics_through_a_quantised_base():
    fn, params = of_nnx()
    base = jlora.quantize(params, block=32)
    plain = jlora.dequantize(base)
    batches = [X, -2 * X]
    of_base, of_plain = (jlora.measure(fn, params, batches, None, "covariance") for params in (base, plain))
    close(of_base, of_plain, 1e-5)
    outer = sum(np.asarray(x).T @ np.asarray(x) for x in batches)
    close(of_base["a/kernel"][0], jnp.asarray(outer / len(batches)), 1e-5)


# -- every model of jlora.models ---------------------------------------------------------------------------------------

# Kernels that may be a convolution's, by names alone: no bias tells, or a window of one axis looks like a stack.
LEFT = {
    "gpt2_causal_lm": "", "llama2_causal_lm": "", "bert_base": "", "roberta_base": "", "deberta_v3_base": "",
    "deberta_v2_xxl_base": "conv/conv/kernel", "vit_base": "", "clip": "vision/patch/kernel", "clip_text": "",
    "clip_vision": "patch/kernel",
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_the_default_of_every_model(name):
    """The same weights by their names as by the program; and the function is that of the dequantised ones."""
    pretrained = models.load(FOLDERS / name, dtype="float32")
    model, params = pretrained.model, pretrained.params
    (architecture,) = [a for a in ARCHITECTURES if type(model.config) is a.config and a.fits(model.config)]
    inputs = [filled(x) for x in architecture.inputs(model.config)]
    fn = lambda params, *args: model.apply({"params": params}, *args)
    if LEFT[name]:
        left = rf"^quantize leaves 1 ambiguous kernels as they are, since their names do not tell .*: '{LEFT[name]}' \("
        with pytest.warns(UserWarning, match=left):
            quantised = jlora.quantize(params)
    else:
        quantised = jlora.quantize(params)
    held = [path for path, leaf in tree.leaves(quantised)[0].items() if tree.is_stored(leaf)]
    sites = jlora.sites(fn, params, *inputs)
    shapes = jax.eval_shape(lambda: params)  # whether a leaf is chosen is told of shapes, too
    by_program, _ = tree.leaves(jlora.quantize(shapes, sites=sites))
    assert held == [path for path, leaf in by_program.items() if tree.is_stored(leaf)] and len(held) >= 12
    expected = jax.jit(lambda params: fn(jlora.dequantize(params), *inputs))(quantised)
    close(jax.jit(jlora.lift(fn))(quantised, *inputs), expected, 1e-5)


AMBIGUOUS = {
    "layers in a stack": ({"a": {"kernel": (8, 8)}, "h": {"kernel": (2, 8, 8), "bias": (2, 8)}}, "'h/kernel' of shape"),
    "a stack of attention": ({"a": {"kernel": (8, 8)}, "query": {"kernel": (2, 8, 2, 4)}}, "'query/kernel' of shape"),
    "attention by another name": (
        {"a": {"kernel": (8, 8)}, "q_proj": {"kernel": (2, 8, 2, 4)}},
        "'q_proj/kernel' of shape",
    ),
    "outputs first": ({"a": {"kernel": (8, 4), "bias": (8,)}}, "'a/kernel' of shape"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_may_be_linear_is_not_left_silently(name):
    shapes, text = AMBIGUOUS[name]
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    with pytest.raises(ValueError, match=f"^{text} .* is ambiguous: its name and rank do not tell"):
        jlora.quantize(params)
    if name != "outputs first":
        adapted = jlora.apply(params, 2, targets="^a/")
        for call in (jlora.quantize, jlora.loftq):
            with pytest.raises(ValueError, match=f"^{text} .* is ambiguous: its name and rank do not tell"):
                call(adapted)


def test_a_window_is_left_of_an_adapter_too():
    """The warning points at the caller's line."""
    params = {"a": {"kernel": jnp.ones((64, 64))}, "patch": {"kernel": jnp.ones((2, 2, 3, 8))}}
    adapted = jlora.apply(params, 2, targets="^a/")
    for call, of in ((jlora.quantize, params), (jlora.quantize, adapted), (jlora.loftq, adapted)):
        with pytest.warns(
            UserWarning, match="^quantize leaves 1 ambiguous kernels as they are, since their names"
        ) as said:
            call(of)
        assert [one.filename for one in said] == [__file__]


def test_a_weight_used_in_two_ways_is_left():
    params = {"w": normal(4, 64, 8), "kernel": normal(64, 64)}
    fn = lambda p, x: (jnp.einsum("bd,ndh->bnh", x, p["w"]) * (x @ p["w"][0])[:, None], x @ p["kernel"])
    places = jlora.sites(fn, params, normal(3, 64))
    with pytest.warns(UserWarning, match=r"since the program uses their axes in several ways: 'w' \(4, 64, 8\)"):
        quantised = jlora.quantize(params, sites=places)
    assert not tree.is_stored(quantised["w"]) and tree.is_stored(quantised["kernel"])
