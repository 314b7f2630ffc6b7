"""Quantised bases in the trees of libraries, in the models of jlora with a cache, and under PEFT's folders."""

import json
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
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from tests.conformance import close, filled, normal, randomised

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


def test_statistics_through_a_quantised_base():
    fn, params = of_nnx()
    base = jlora.quantize(params, block=32)
    plain = jlora.dequantize(base)
    batches = [X, -2 * X]
    of_base, of_plain = (jlora.measure(fn, params, batches, None, "covariance") for params in (base, plain))
    close(of_base, of_plain, 1e-5)
    outer = sum(np.asarray(x).T @ np.asarray(x) for x in batches)
    close(of_base["a/kernel"][0], jnp.asarray(outer / len(batches)), 1e-5)
