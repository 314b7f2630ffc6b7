"""Layouts from a model's own annotations: Flax's logical axes, linen's boxes and NNX's metadata."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from jlora import tree
from jlora.sharding import Layout
from tests.test_sharding import mesh_of

RULES = (("batch", "fsdp"), ("layers", None), ("vocab", "tp"), ("embed", "fsdp"), ("mlp", "tp"))
WHOLE = Layout((("", ()),))
X = np.random.default_rng(0).integers(0, 12, (8, 4)).astype(np.int32)
Y = np.random.default_rng(1).normal(size=(8, 4, 8)).astype(np.float32)


# -- linen: three layers in a scan, logical names, activations placed by the model -------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        init = nn.initializers.lecun_normal()
        boxed = lambda *names: nn.with_logical_partitioning(init, names)
        h = nn.Dense(16, kernel_init=boxed("embed", "mlp"), name="fc")(x)
        h = nn.Dense(8, kernel_init=boxed("mlp", "embed"), use_bias=False, name="out")(jnp.tanh(h))
        return x + nn.with_logical_constraint(h, ("batch", None, None)), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, ids):
        init = nn.with_partitioning(nn.initializers.normal(), ("tp", None))  # an axis of the mesh itself
        x = nn.Embed(12, 8, embedding_init=init, name="wte")(ids)
        axes = {"params": 0}
        stack = nn.scan(
            Block, axes, split_rngs={"params": True}, length=3, metadata_params={nn.PARTITION_NAME: "layers"}
        )
        return stack(name="h")(x, None)[0]


@functools.cache
def linen():
    model = Linen()
    with nn.logical_axis_rules(RULES):
        params = model.init(jax.random.key(0), X)["params"]

    def loss(params, batch):
        with nn.logical_axis_rules(RULES):
            return jnp.mean((model.apply({"params": params}, batch[0]) - batch[1]) ** 2)

    return loss, params


# -- NNX: its variables' metadata --------------------------------------------------------------------------------------


class Nnx(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        said = lambda *names: nnx.with_partitioning(init, names)
        self.wte = nnx.Embed(12, 8, embedding_init=said("vocab", None), rngs=rngs)
        self.fc = nnx.Linear(8, 16, kernel_init=said("embed", "mlp"), rngs=rngs)
        kernel = nnx.with_partitioning(
            init, ("hidden", "embed"), sharding_rules=(("hidden", "tp"),)
        )  # a rule of its own
        self.out = nnx.Linear(16, 8, kernel_init=kernel, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        return self.out(jnp.tanh(self.fc(self.wte(ids))))


@functools.cache
def of_nnx():
    with nnx.use_eager_sharding(False):  # else NNX wants its mesh before there is a model
        graph, params, rest = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, batch):
        return jnp.mean((nnx.merge(graph, params, rest)(batch[0]) - batch[1]) ** 2)

    return loss, params


MODELS = {
    "linen": (
        linen,
        {
            "h/fc/bias": (None, None),
            "h/fc/kernel": (None, "fsdp", "tp"),
            "h/out/kernel": (None, "tp", "fsdp"),
            "wte/embedding": ("tp", None),
        },
    ),
    "nnx": (
        of_nnx,
        {
            "fc/bias": (None,),
            "fc/kernel": ("fsdp", "tp"),
            "out/kernel": ("tp", "fsdp"),
            "wte/embedding": ("tp", None),
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_annotations_say_where_weights_lie(name):
    make, expected = MODELS[name]
    _, params = make()
    mesh = mesh_of(fsdp=2, tp=2)
    layout = Layout.of(params, RULES, WHOLE)
    places = layout.shardings(params, mesh)
    assert {path: tuple(place.spec) for path, place in tree.leaves(places)[0].items()} == expected
    assert Layout.of(jax.eval_shape(lambda: params), RULES, WHOLE) == layout
    bare = nn.unbox(params) if name == "linen" else nnx.to_pure_dict(params)
    assert jax.tree.leaves(layout.shardings(bare, mesh)) == jax.tree.leaves(places)
    assert (layout.batch, layout.rules[-1]) == (("dcn", "data", "fsdp"), ("", ()))


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_one_device(name):
    loss, params = MODELS[name][0]()
    layout = Layout.of(params, RULES, WHOLE)
    mesh = mesh_of(fsdp=2, tp=2)
    sites = jlora.sites(loss, params, (X, Y))

    def trained(mesh=None, **options):
        adapted = jlora.apply(params, rank=2, targets="fc|out", sites=sites, key=0)
        step = jlora.train_step(loss, optax.rmsprop(1e-2), mesh=mesh, **options)
        state, losses = jlora.TrainState.create(adapted, step.tx), []
        with (
            contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
        ):  # where the model's own constraints find their mesh
            for _ in range(4):
                state, metrics = step(state, (X, Y))
                losses.append(float(metrics["loss"]))
        return losses, state

    alone, _ = trained()
    losses, state = trained(mesh, layout=layout)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert losses[-1] < losses[0]
    path = next(path for path in state.adapted.factors if path.endswith("out/kernel"))
    assert "tp" in tree.leaves(state.adapted.base)[0][path].sharding.spec
    specs = {part: [*x.sharding.spec] for part, x in state.adapted.factors[path].items()}
    assert specs["A"][-2:] == ["tp", None] and "fsdp" not in specs["B"]


NAMES = (("a", "b"), ("b", "a"), ("a", None), (None, "c", "b"), ("c", "d"), ("d",))
TABLE = (("b", "x"), ("a", ("x", "y")), ("a", "y"), ("c", None), ("c", "y"), ("d", "x"), ("d", "y"))


@pytest.mark.parametrize("names", NAMES, ids=str)
def test_rules_have_flaxs_own_precedence(names):
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4,) * len(names), jnp.float32), names)
    ((_, found),) = Layout.of({"w": box}, TABLE).rules
    assert PartitionSpec(*found) == nn.logical_to_mesh_axes(names, TABLE)


def test_nnx_takes_shardings_and_several_axes():
    mesh = mesh_of(fsdp=2, tp=2)
    for said in (PartitionSpec(("fsdp", "tp"), None), NamedSharding(mesh, PartitionSpec(("fsdp", "tp"), None))):
        param = nnx.Param(jnp.zeros((4, 4)), out_sharding=said, mesh=mesh, eager_sharding=False)
        place = Layout.of({"w": param}).on(mesh)
        assert place("w", jnp.zeros((4, 4))).spec == PartitionSpec(("fsdp", "tp"), None)
        with pytest.raises(ValueError, match="^no rule of the layout covers 'xw'$"):  # a path is one, not a pattern
            place("xw", jnp.zeros((4, 4)))


def box(*names, kind=nn.LogicallyPartitioned):
    return kind(jax.ShapeDtypeStruct((4,) * len(names), jnp.float32), names)


WRONG = {
    "nothing annotated": (
        {"v": jnp.ones(2), "w": jnp.ones(2)}, RULES,
        "none of the 2 leaves has an annotation (nn.with_logical_partitioning, nn.with_partitioning, "
        "nnx.with_partitioning): give the tree as model.init or nnx.split returns it, before nn.unbox",
    ),
    "no rule": (
        {"v": box("embed", "heads"), "w": box("heads", "kv")}, RULES,
        "rules= says nothing of the logical axes 'heads', 'kv': ('heads', None) leaves one whole, and another word than "
        "None is an axis of the mesh",
    ),
    "no rules at all": (
        {"v": box("embed", kind=nn.Partitioned), "w": box("kv", None)}, None,
        "rules= says nothing of the logical axes 'kv': ('kv', None) leaves one whole, and another word than None is an "
        "axis of the mesh",
    ),
    "twice": (
        {"w": box("embed", "embed")}, RULES,
        "'w' names 'embed' for two of its axes, (('embed',), ('embed',)): a name stands for one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_annotations_that_no_layout_follows_from(name):
    annotated, rules, error = WRONG[name]
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        Layout.of(annotated, rules)


def test_leaves_without_an_annotation_are_listed():
    _, params = linen()
    error = "no rule of the layout covers 1 of 4 leaves: h/fc/bias. A last rule of ('', ()) leaves all others whole"
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        Layout.of(params, RULES).shardings(params, mesh_of(fsdp=2, tp=2))
