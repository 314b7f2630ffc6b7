"""Attention by blocks of queries: the numbers and gradients of the plain form, and less memory."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jlora.models import attention_blocks
from jlora.models.attention import DotProductAttention
from tests.conformance import close


def operands(length, heads=2, width=8, dtype=jnp.float32):
    return tuple(
        3 * jax.random.normal(key, (2, length, heads, width), dtype) for key in jax.random.split(jax.random.key(0), 3)
    )


def value_and_gradient(blocks, args, **options):
    attend = functools.partial(DotProductAttention(blocks=blocks, implementation="xla", **options).apply, {})
    out, back = jax.vjp(attend, *args)
    return out, back(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype))


@pytest.mark.parametrize(("length", "scale"), [(512, None), (640, 0.7)])
def test_numbers_and_gradients_are_those_of_the_plain_form(length, scale):
    args = operands(length)
    close(value_and_gradient(True, args, scale=scale), value_and_gradient(False, args, scale=scale))


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("keys", [64, 77])
def test_a_cpu_takes_few_queries_or_keys_at_once(keys, scale):
    q, k, v = operands(77)
    args = q[:, :64], k[:, :keys], v[:, :keys]
    close(value_and_gradient(True, args, scale=scale), value_and_gradient(False, args, scale=scale))
    attend = functools.partial(DotProductAttention(blocks=True, scale=scale).apply, {})
    divided = lambda platform: re.findall(
        r"stablehlo.divide .*tensor<\w*64x(\d+)xf32>\n",
        jax.jit(attend).trace(*args).lower(lowering_platforms=(platform,)).as_text(),
    )
    assert divided("cpu") == ["8"] and divided("tpu") == [str(keys)]


@pytest.mark.parametrize("axis", ["data", None])
@pytest.mark.parametrize("keys", [64, 77])
def test_few_queries_or_keys_on_explicit_axes(keys, axis):
    q, k, v = operands(77)
    args = q[:, :64], k[:, :keys], v[:, :keys]
    gradients = jax.grad(lambda args, blocks: jnp.sum(value_of(blocks, *args) ** 2))
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        found = jax.jit(gradients, static_argnums=1)(jax.device_put(args, PartitionSpec(axis)), True)
    close(jax.device_get(found), jax.device_get(gradients(args, False)))


@pytest.mark.loose_promotion  # the plain form, in its gradient
@pytest.mark.parametrize("length", [64, 512])
def test_half_precision_is_as_near_as_the_plain_form(length):
    exact = value_and_gradient(False, operands(length))
    args = operands(length, dtype=jnp.bfloat16)
    gap = lambda found: [
        float(jnp.abs(a.astype(jnp.float32) - b).max()) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    ]  # fmt: skip
    blocks, plain = gap(value_and_gradient(True, args)), gap(value_and_gradient(False, args))
    assert all(one < 1.5 * other for one, other in zip(blocks, plain, strict=True))
    assert value_and_gradient(True, args)[0].dtype == jnp.bfloat16


def test_scores_of_all_queries_are_nowhere():
    """16 x 1024 x 1024 scores are 64 MiB in float32; a block has 8."""
    args = tuple(jax.ShapeDtypeStruct((2, 1024, 8, 8), jnp.float32) for _ in range(3))
    loss = lambda blocks: lambda *args: jnp.sum(value_of(blocks, *args) ** 2)
    held = [
        jax.jit(jax.grad(loss(blocks), (0, 1, 2))).lower(*args).compile().memory_analysis().temp_size_in_bytes
        for blocks in (False, True)
    ]
    assert held[0] > 64 * 2**20 and held[1] < 40 * 2**20


def test_rows_and_heads_over_a_mesh_are_taken_by_blocks_where_they_lie():
    mesh = jax.make_mesh((2, 2), ("data", "tp"))
    place = NamedSharding(mesh, PartitionSpec("data", None, "tp"))
    args = operands(512)
    close(value_and_gradient(True, jax.device_put(args, place)), value_and_gradient(False, args))
    typed = (jax.ShapeDtypeStruct((2, 1024, 4, 8), jnp.float32, sharding=place),) * 3
    made = [
        jax.jit(jax.grad(lambda *args, blocks=blocks: value_of(blocks, *args).sum(), (0, 1, 2))).lower(*typed).compile()
        for blocks in (False, True)
    ]
    held = [program.memory_analysis().temp_size_in_bytes for program in made]
    assert held[0] > 24 * 2**20 and held[1] < 6 * 2**20  # 2 heads of a row: 8 MiB of scores each time
    assert not re.findall(r"all-\w+\(|collective-\w+\(", made[1].as_text())


def test_a_cpu_alone_takes_one_row_of_the_batch_after_another(monkeypatch):
    args = operands(512)
    loops = lambda platform: (
        jax.jit(functools.partial(value_of, True)).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    ).count("stablehlo.while")
    assert loops("cpu") == loops("tpu") == 1  # eight devices: the rows may lie on many
    many = [jnp.tile(x, (4, 1, 1, 1)) for x in operands(1024)]
    held = [held_by_gradient(many)]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert (loops("cpu"), loops("tpu")) == (2, 1)
    close(value_and_gradient(True, args), value_and_gradient(False, args))
    held.append(held_by_gradient(many))
    assert held[1] < 0.5 * held[0]  # 1 MiB of scores at a time and 8
    args = tuple(x[:1] for x in args)
    assert loops("cpu") == 1


def held_by_gradient(args):
    """Bytes of temporaries."""
    loss = lambda *args: value_of(True, *args).sum()
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile().memory_analysis().temp_size_in_bytes


def value_of(blocks, *args):
    return DotProductAttention(blocks=blocks).apply({}, *args)


def test_few_queries_texts_masks_and_lengths_without_divisors_are_taken_at_once():
    assert [attention_blocks.size_of(*sizes) for sizes in ((4096, 4096), (256, 256), (4096, 77), (521, 521), (576, 576))] == [
        128, None, None, None, 96,
    ]  # fmt: skip
    q, k, v = operands(512)
    has_loop = lambda *args, **options: (
        "scan" in str(jax.make_jaxpr(functools.partial(DotProductAttention(blocks=True, **options).apply, {}))(*args))
    )
    assert has_loop(q, k, v) and not has_loop(q, k[:, :77], v[:, :77])
    assert not has_loop(q, k, v, causal=True) and not has_loop(q, k, v, jnp.ones((1, 1, 512, 512), bool))
