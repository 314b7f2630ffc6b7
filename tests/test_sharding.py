"""Layouts: which axes of weights lie over which axes of a mesh, where factors and batches lie, and equal numbers in each."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from jlora import tree
from jlora.models.catalogue import ARCHITECTURES
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.sharding import MODELS, Layout, beside, put, put_rows, row_numbers
from tests.tiers import thorough

CONFIG = GPT2Config(vocab_size=64, context=16, width=32, layers=2, heads=4, scan=True)
MODEL = GPT2(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)


def mesh_of(kind=AxisType.Auto, **axes):
    count = int(np.prod([*axes.values()]))
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes), devices=jax.devices()[:count]
    )


@functools.cache
def parameters():
    return MODEL.init(jax.random.key(0), TOKENS)["params"]


def specs(places) -> dict:
    return {path: tuple(place.spec) for path, place in tree.leaves(places)[0].items()}


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_the_first_pattern_says_how_the_last_axes_are_split():
    layout = Layout(((r"a/", ("x", None)), (r"w$", (None, ("x", "y"))), (r"", ())))
    params = {"a": {"w": jnp.zeros((4, 8))}, "b": {"w": jnp.zeros((3, 4, 8))}, "bias": jnp.zeros(3)}
    found = specs(layout.shardings(params, mesh_of(x=2, y=2)))
    assert found == {"a/w": ("x", None), "b/w": (None, None, ("x", "y")), "bias": (None,)}
    alone = specs(layout.shardings(params, mesh_of(y=2)))  # an axis that the mesh has not
    assert alone == {"a/w": (None, None), "b/w": (None, None, "y"), "bias": (None,)}
    assert layout.axes == ["dcn", "data", "fsdp", "sequence", "x", "y"]
    assert layout.rows(mesh_of(x=2, y=2)).spec == PartitionSpec()
    assert MODELS.rows(mesh_of(fsdp=2, tp=2, data=2)).spec == PartitionSpec(("data", "fsdp"))


WEIGHT = {"w": jax.ShapeDtypeStruct((12, 8), jnp.float32)}
WRONG = {
    "uncovered": (
        Layout((("a", ()),), batch=("x",)), dict.fromkeys("wva", np.zeros(2)),
        "no rule of the layout covers 2 of 3 leaves: v, w. A last rule of ('', ()) leaves all others whole",
    ),
    "unknown": (
        Layout((("w", ("y",)),)), WEIGHT,
        "the mesh has the axis 'x', and the layout knows 'dcn', 'data', 'fsdp', 'sequence', 'y': rename it, or name it in "
        "the layout's rules or its batch=",
    ),
    "indivisible": (
        Layout((("w", ("x", None)),)), {"w": jax.ShapeDtypeStruct((6, 8), jnp.float32)},
        "'w' has shape (6, 8), and its axis 0 of 6 is not a multiple of 4, the devices of x: the nearest that fits is 3",
    ),
    "longer": (
        Layout((("w", ("x", None, None)),)), WEIGHT,
        "'w' has shape (12, 8), and its rule ('x', None, None) has more axes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_layouts_that_do_not_fit(name):
    layout, params, error = WRONG[name]
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        layout.shardings(params, mesh_of(x=4))


def test_a_lenient_leaf_stays_whole_where_the_mesh_does_not_divide_it():
    params = {"wte": {"embedding": jnp.zeros((7, 8))}}
    assert specs(MODELS.shardings(params, mesh_of(tp=2, fsdp=2))) == {"wte/embedding": (None, "fsdp")}


def test_a_quantised_weight_has_a_place_for_each_of_its_arrays():
    params = {"fc": {"kernel": jnp.ones((64, 128))}}
    held = jlora.quantize(params, "nf4", targets="kernel", block=64, double=False)
    layout = Layout(((r"kernel", (None, "x")),))
    mesh = mesh_of(x=4)
    placed = put(held, layout.shardings(held, mesh))
    leaf = placed["fc"]["kernel"]
    assert not leaf.codes.sharding.is_fully_replicated
    np.testing.assert_array_equal(leaf.dequantise(), held["fc"]["kernel"].dequantise())
    factors = {"fc/kernel": {"A": jnp.zeros((64, 1, 2)), "B": jnp.zeros((1, 128, 2))}}
    found = beside(factors, placed, ())["fc/kernel"]
    assert (tuple(found["A"].spec), tuple(found["B"].spec)) == ((None, None), (None, "x"))


@pytest.mark.parametrize("name", [a.model_type for a in ARCHITECTURES])
def test_the_layout_of_models_covers_them_all(name):
    """Every weight of two axes and more is split over fsdp but for the small ones; norms and biases are whole."""
    (architecture,) = [a for a in ARCHITECTURES if a.model_type == name]
    config = architecture.config()
    model = architecture.build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *architecture.inputs(config))["params"]
    leaves, found = tree.leaves(shapes)[0], specs(MODELS.shardings(shapes, mesh_of(data=2, fsdp=2, tp=2)))
    whole = [p for p, x in leaves.items() if x.ndim > 1 and "fsdp" not in found[p]]
    assert all(leaves[path].size < 5e5 or "position" in path or "conv" in path for path in whole), whole
    split = sum(leaves[path].size for path in leaves if "fsdp" in found[path])
    assert split > 0.97 * sum(x.size for x in leaves.values())
    heads = [path for path, spec in found.items() if "tp" in spec]
    assert heads or name == "AutoencoderKL"


# -- batches -----------------------------------------------------------------------------------------------------------


def test_rows_of_a_process():
    place = MODELS.rows(mesh_of(fsdp=4, tp=2))
    np.testing.assert_array_equal(row_numbers(place, 8), np.arange(8))
    error = "6 rows, not a multiple of 4, the devices of fsdp: take 4 or 8"
    with pytest.raises(ValueError, match=f"^a batch has {error}$"):
        row_numbers(place, 6)
    for rows in (TOKENS[:6], jnp.asarray(TOKENS[:6])):
        with pytest.raises(ValueError, match=rf"^batch\['x'\] has {error}$"):
            put_rows({"x": rows, "all": TOKENS}, place)
    placed = put_rows({"x": TOKENS}, place)["x"]
    assert placed.sharding == place
    np.testing.assert_array_equal(placed, TOKENS)


# -- factors -----------------------------------------------------------------------------------------------------------


def test_factors_follow_their_weights_but_for_the_axes_of_the_batch():
    mesh = mesh_of(fsdp=2, tp=2)
    base = placed(mesh)
    stack = {"A": jnp.zeros((2, 32, 1, 4)), "B": jnp.zeros((2, 1, 32, 4)), "scale": jnp.zeros(())}
    factors = {"h/attn/query/kernel": stack, "h/attn/out/kernel": stack, "elsewhere": {"A": jnp.zeros(2)}}
    factors |= {"h/mlp/fc/kernel": {"value": jnp.zeros((2, 32, 128))}}
    found = jax.tree.map(lambda place: tuple(place.spec), beside(factors, base, ("fsdp",)))
    assert found["h/attn/query/kernel"] == {"A": (None, None, None), "B": (None, None, "tp"), "scale": ()}
    assert found["h/attn/out/kernel"] == {"A": (None, "tp", None), "B": (None, None, None), "scale": ()}
    assert found["elsewhere"] == {"A": None}
    assert found["h/mlp/fc/kernel"] == {"value": (None, "fsdp", "tp")}  # trained whole
    over = beside(factors, base, ())["h/attn/query/kernel"]  # no batch is split: all axes are kept
    assert (tuple(over["A"].spec), tuple(over["B"].spec)) == ((None, "fsdp", None), (None, None, "tp"))


# -- training ----------------------------------------------------------------------------------------------------------


def loss(params, batch):
    logits = MODEL.apply({"params": params}, batch).astype(jnp.float32)
    hot = jax.nn.one_hot(batch[:, 1:], 64)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits)[:, :-1] * hot, -1))


@functools.cache
def sites():
    return jlora.sites(loss, parameters(), TOKENS)


def placed(mesh):
    return put(parameters(), MODELS.shardings(parameters(), mesh))


def trained(batch=TOKENS, steps=5, base=None, **options):
    """Losses of some steps, and the state after them."""
    adapted = jlora.apply(base or parameters(), rank=4, targets="attn|mlp", sites=sites(), key=0)
    step = jlora.train_step(loss, optax.rmsprop(1e-2), **options)
    state, losses = jlora.TrainState.create(adapted, step.tx), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


@functools.cache
def alone():
    losses, state = trained()
    assert losses[-1] < losses[0] - 0.1
    return losses, state.adapted.factors


LAYOUTS = {
    "data": ({"data": 8}, AxisType.Auto),
    "fsdp": ({"fsdp": 8}, AxisType.Explicit),
    "fsdp, auto": ({"fsdp": 8}, AxisType.Auto),
    "tp": ({"tp": 4}, AxisType.Explicit),
    "tp, auto": ({"tp": 4}, AxisType.Auto),
    "fsdp and tp": ({"fsdp": 4, "tp": 2}, AxisType.Explicit),
    "fsdp and tp, auto": ({"fsdp": 4, "tp": 2}, AxisType.Auto),
    "data, fsdp and tp": ({"data": 2, "fsdp": 2, "tp": 2}, AxisType.Explicit),
}


@pytest.mark.parametrize("name", thorough(LAYOUTS, "test_pmap_has_the_same_numbers", ("fsdp and tp", "data")))
def test_every_layout_has_the_numbers_of_one_device(name):
    axes, kind = LAYOUTS[name]
    mesh = mesh_of(kind, **axes)
    losses, state = trained(mesh=mesh)
    np.testing.assert_allclose(losses, alone()[0], rtol=1e-5)
    chex.assert_trees_all_close(jax.device_get(state.adapted.factors), alone()[1], atol=2e-5)
    kernel = state.adapted.base["h"]["attn"]["out"]["kernel"]
    assert kernel.sharding == MODELS.on(mesh)("h/attn/out/kernel", kernel)
    own = state.adapted.factors["h/attn/out/kernel"]
    moments = {part: [x for x in jax.tree.leaves(state.opt_state) if x.shape == own[part].shape] for part in own}
    parts = 1 if kind is AxisType.Explicit else axes.get("tp", 1)  # there they are whole
    assert own["A"].sharding.shard_shape(own["A"].shape) == (2, 32 // parts, 1, 4)
    assert own["B"].sharding.is_fully_replicated
    assert own["A"].sharding in [x.sharding for x in moments["A"]] and len(moments["A"]) > 1


def test_pmap_has_the_same_numbers():
    losses, state = trained(parallel="pmap")
    np.testing.assert_allclose(losses, alone()[0], rtol=1e-5)
    chex.assert_trees_all_close(jax.device_get(state.adapted.factors), alone()[1], atol=2e-5)
    error = "mesh= is for parallel='jit': parallel='pmap' keeps a whole copy on every local device"
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        jlora.train_step(loss, optax.sgd(1.0), parallel="pmap", mesh=mesh_of(data=2))


def arguments_of(base, batch, mesh, **options):
    """The arguments of a step of a base that the mesh may not have yet."""
    adapted = jlora.apply(base, rank=2, targets="attn/query", sites=sites())
    step = jlora.train_step(loss, optax.rmsprop(1.0), mesh=mesh)
    return step.arguments(jlora.TrainState.create(adapted, step.tx, **options), batch)


def test_what_lies_on_the_mesh_stays():
    """The step puts there what is elsewhere, leaf by leaf, and takes arrays as they lie on it."""
    mesh = mesh_of(data=2, tp=2)
    whole = NamedSharding(mesh, PartitionSpec())
    found = arguments_of(put(parameters(), whole), put_rows(TOKENS, whole), mesh)
    assert all(x.sharding.is_fully_replicated for x in (*jax.tree.leaves(found.kept), found.batch))
    mixed = parameters() | {"h": put(parameters()["h"], whole)}
    found = arguments_of(mixed, TOKENS, mesh)
    split = [x.shape for x in jax.tree.leaves(found.kept) if not x.sharding.is_fully_replicated]
    assert split == [(64, 32)] and not found.batch.sharding.is_fully_replicated  # wte alone


def test_shapes_are_laid_as_arrays_are():
    mesh = mesh_of(fsdp=2, tp=2)
    real = arguments_of(parameters(), TOKENS, mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parameters())
    found = arguments_of(shapes, jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype), mesh)
    for part in ("carry", "kept", "batch"):
        ours, theirs = (jax.tree.map(lambda x: x.sharding, getattr(each, part)) for each in (found, real))
        assert ours == theirs, part


def test_a_state_of_another_mesh_moves():
    first, second = mesh_of(fsdp=2, tp=2), mesh_of(AxisType.Explicit, fsdp=4)
    adapted = jlora.apply(parameters(), rank=2, targets="attn/query", sites=sites())
    step = jlora.train_step(loss, optax.rmsprop(1.0), mesh=first)
    state = jlora.TrainState.create(adapted, step.tx)
    carry = step.arguments(state, TOKENS).carry
    moved = dataclasses.replace(
        state, adapted=adapted.replace(factors=carry.factors), opt_state=carry.opt_state, step=carry.step
    )
    found = jlora.train_step(loss, optax.rmsprop(1.0), mesh=second).arguments(moved, TOKENS)
    assert {x.sharding.mesh for x in jax.tree.leaves((found.carry, found.kept, found.batch))} == {second}


def test_leaves_that_are_no_arrays():
    base = {"w": jnp.ones((4, 8)), "act": jnp.tanh}
    layout = Layout(((r"w", ("fsdp", None)),))
    mesh = mesh_of(fsdp=4)
    assert put(base, layout.shardings(base, mesh))["act"] is jnp.tanh
    of_base = lambda params, x: jnp.mean(params["act"](x @ params["w"]))
    adapted = jlora.apply(base, rank=2, sites=jlora.sites(of_base, base, jnp.ones((8, 4))))
    step = jlora.train_step(of_base, optax.sgd(1.0), mesh=mesh, layout=layout)
    state, _ = step(jlora.TrainState.create(adapted, step.tx), np.ones((8, 4), np.float32))
    assert state.adapted.base["act"] is jnp.tanh and not state.adapted.base["w"].sharding.is_fully_replicated


BATCHES = {
    "rows": (
        {"x": TOKENS[:6]},
        "the batch has 6 examples (batch['x'] (6, 16)), which 4 devices of fsdp do not divide",
    ),
    "no rows": (
        {"x": TOKENS, "mask": TOKENS[:1]},
        "the leaves of the batch have different leading axes: batch['mask'] (1, 16), batch['x'] (8, 16); all are divided "
        "over 4 devices of fsdp",
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_the_mesh_does_not_divide(name):
    batch, error = BATCHES[name]
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        arguments_of(parameters(), batch, mesh_of(fsdp=4))


def test_a_batch_may_be_of_arrays_keys_and_scalars():
    batch = {"x": jnp.asarray(TOKENS), "keys": jax.random.split(jax.random.key(0), 8), "rate": np.float32(0.1)}
    found = arguments_of(parameters(), batch, mesh_of(fsdp=4)).batch
    assert [found[name].sharding.spec for name in ("x", "keys")] == [PartitionSpec(("fsdp",))] * 2
    chex.assert_trees_all_equal(found["x"], batch["x"])
    np.testing.assert_array_equal(jax.random.key_data(found["keys"]), jax.random.key_data(batch["keys"]))
