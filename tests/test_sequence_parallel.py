"""The tokens of a row over several devices: equal numbers, and what is sent for it."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import jlora
from jlora.models import attention, losses
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from jlora.planning.collectives import collectives
from jlora.sharding import MODELS, put_rows
from tests.test_sharding import TOKENS, arguments_of, mesh_of
from tests.tiers import thorough

pytestmark = pytest.mark.once

GPT = GPT2(GPT2Config(vocab_size=64, context=16, width=32, layers=2, heads=4, scan=True))
LLAMA = Llama(
    LlamaConfig(
        vocab_size=64, context=16, width=32, layers=2, heads=4, key_heads=2, hidden=48, window=5, scan=True, remat=True
    )
)
REAL = np.arange(16) < np.arange(9, 17)[:, None]  # (rows, tokens): padding at the ends
BATCH = {"tokens": TOKENS, "labels": np.roll(TOKENS, -1, 1), "real": REAL, "weight": np.ones(8, np.float32)}
MODELS_OF = {"gpt2": (GPT, True), "llama": (LLAMA, False)}


@functools.cache
def of(name):
    """Loss, parameters, sites, and five losses of one device with the factors after them."""
    model, masked = MODELS_OF[name]
    params = model.init(jax.random.key(0), TOKENS)["params"]

    def loss(params, batch):
        mask = batch["real"] if masked else None
        each = model.apply({"params": params}, batch["tokens"], mask=mask, labels=batch["labels"])
        real = jnp.where(batch["real"], batch["weight"][:, None], 0)
        return jnp.sum(jnp.where(batch["real"], each, 0)) / jnp.sum(real)

    return loss, params, jlora.sites(loss, params, BATCH)


def step_of(name, **options):
    loss, params, sites = of(name)
    step = jlora.train_step(loss, optax.rmsprop(1e-2), **options)
    adapted = jlora.apply(params, rank=4, targets="attn|mlp", sites=sites, key=0)
    return step, jlora.TrainState.create(adapted, step.tx)


def trained(name, **options):
    step, state = step_of(name, **options)
    found = []
    for _ in range(5):
        state, metrics = step(state, BATCH)
        found.append(float(metrics["loss"]))
    return found, jax.device_get(state.adapted.factors)


@functools.cache
def alone(name):
    found, factors = trained(name)
    assert found[-1] < found[0] - 0.05
    return found, factors


LAYOUTS = {
    "gpt2": ("gpt2", {"data": 2, "sequence": 2}, AxisType.Auto),
    "gpt2, explicit": ("gpt2", {"data": 2, "sequence": 2}, AxisType.Explicit),
    "llama": ("llama", {"data": 2, "sequence": 4}, AxisType.Auto),
    "llama, explicit": ("llama", {"fsdp": 2, "tp": 2, "sequence": 2}, AxisType.Explicit),
    "sequence alone": ("gpt2", {"sequence": 8}, AxisType.Explicit),
    "gpt2, accumulated": ("gpt2", {"data": 2, "sequence": 2}, AxisType.Auto, {"accumulate": 2}),
}
DEFAULT = ("gpt2", "llama, explicit")


@pytest.mark.parametrize("name", thorough(LAYOUTS, "test_keys_and_values_are_gathered_and_no_weight", DEFAULT))
def test_the_numbers_are_those_of_one_device(name):
    model, axes, kind, *options = LAYOUTS[name]
    found, factors = trained(model, mesh=mesh_of(kind, **axes), **dict(*options))
    np.testing.assert_allclose(found, alone(model)[0], rtol=1e-5)
    chex.assert_trees_all_close(factors, alone(model)[1], atol=3e-5)


def test_keys_and_values_are_gathered_and_no_weight():
    """Forward gathers K and V of each layer; backward sums their gradients, and those of the factors, in float32."""
    pair = 2 * 4 * (4 * 16 * 32)  # bytes of K and V of a layer: 4 rows of a device, 16 tokens, 32 features
    small = 2048  # ids, masks and losses
    for kind in (AxisType.Auto, AxisType.Explicit):
        step, state = step_of("gpt2", mesh=mesh_of(kind, data=2, sequence=2))
        found = collectives(step.lower(state, BATCH).compile().as_text(), 4)
        times = 1 if kind is AxisType.Explicit else 2  # on Auto axes backward has only its own part of them any more
        assert 2 * times * pair <= found["all-gather"].bytes <= 2 * times * pair + small
        sums = 2 * pair + 2 * 4 * jlora.count(state.adapted).trainable  # XLA sums over tokens first, then over rows
        assert sums <= found["all-reduce"].bytes <= sums + small
        assert sum(one.wire for name, one in found.items() if name not in ("all-gather", "all-reduce")) <= small
        _, metrics = step(state, BATCH)
        np.testing.assert_allclose(metrics["loss"], alone("gpt2")[0][0], rtol=1e-5)


def test_each_array_of_a_batch_lies_by_its_own_axes():
    mesh = mesh_of(data=2, sequence=2)
    place = MODELS.rows(mesh)
    assert place.spec == PartitionSpec(("data",), ("sequence",))
    assert MODELS.rows(mesh_of(sequence=2)).spec == PartitionSpec(None, ("sequence",))
    found = put_rows(BATCH | {"keys": jax.random.split(jax.random.key(0), 8), "rate": 0.1}, place)
    specs = {name: x.sharding.spec for name, x in found.items() if name != "rate"}
    rows, both = PartitionSpec(("data",)), place.spec
    assert specs == {"tokens": both, "labels": both, "real": both, "weight": rows, "keys": rows}
    chex.assert_trees_all_equal({name: found[name] for name in BATCH}, BATCH)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BATCH)
    step, state = step_of("gpt2", mesh=mesh)
    assert jax.tree.map(lambda x: x.sharding.spec, step.arguments(jax.eval_shape(lambda: state), shapes).batch) == {
        name: specs[name] for name in BATCH
    }


def test_tokens_that_the_mesh_does_not_divide():
    error = "batch (8, 15) has 15 tokens a row, which 4 devices of sequence do not divide: pad the rows to 16"
    params, mesh = of("gpt2")[1], mesh_of(data=2, sequence=4)
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        arguments_of(params, TOKENS[:, :15], mesh)
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        put_rows(TOKENS[:, :15], MODELS.rows(mesh))
    with pytest.raises(ValueError, match="^batch has 7 rows, not a multiple of 2, the devices of data: take 6 or 8$"):
        put_rows(TOKENS[:7], MODELS.rows(mesh))  # none is left out in silence


@pytest.mark.parametrize("chunk", [None, 4])
def test_losses_of_tokens_on_several_devices(chunk):
    """In chunks of each device's own tokens; a budget that is too small for one chunk does the same."""
    h, kernel = jax.random.normal(jax.random.key(0), (8, 16, 4)), jax.random.normal(jax.random.key(1), (4, 24))
    mean = lambda h, labels: jnp.mean(losses.head_cross_entropy(h, kernel, labels, chunk=chunk))
    expected = jax.value_and_grad(mean)(h, TOKENS % 24)
    on_mesh = put_rows((h, TOKENS % 24), MODELS.rows(mesh_of(AxisType.Explicit, data=2, sequence=2)))
    found = jax.jit(jax.value_and_grad(mean))(*on_mesh)
    chex.assert_trees_all_close(jax.device_get(found), expected, atol=1e-6)
    assert found[1].sharding.spec == PartitionSpec(("data",), ("sequence",), None)


def test_flash_attention_wants_the_tokens_together(monkeypatch):
    monkeypatch.setattr(attention, "_has_flash", lambda: True)  # as where CUDA's libraries are
    mesh = mesh_of(AxisType.Explicit, data=2, sequence=2)
    x = jax.ShapeDtypeStruct((4, 8, 2, 8), jnp.bfloat16, sharding=MODELS.rows(mesh))
    attend = attention.DotProductAttention(implementation="cudnn")
    error = (
        "attention='cudnn' wants all tokens of a row on one device, and here they are split over 2: 'xla' and 'auto' take "
        "the plain form"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(error)}"):
        jax.jit(lambda x: attend.apply({}, x, x, x)).trace(x)
    found = jax.jit(lambda x: attention.DotProductAttention().apply({}, x, x, x)).trace(x)
    assert "cudnn" not in str(found.jaxpr) and found.jaxpr.out_avals[0].sharding.spec == PartitionSpec(
        "data", "sequence", None, None
    )
