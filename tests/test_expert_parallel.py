"""A mixture of experts over the devices of a mesh: each expert's factors lie where the expert lies."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from jlora import tree
from jlora.planning.collectives import collectives
from jlora.sharding import Layout
from jlora.transform.explicit import names_of
from tests.test_sharding import mesh_of

EXPERTS, WIDTH, HIDDEN, SLOTS = 4, 16, 32, 4
RULES = ((r"up$", ("expert", "fsdp", "tp")), (r"down$", ("expert", "tp", "fsdp")), (r"router$", ()))
X = np.random.default_rng(0).normal(size=(8, 8, WIDTH)).astype(np.float32)


def parameters():
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = {"router": (WIDTH, EXPERTS), "up": (EXPERTS, WIDTH, HIDDEN), "down": (EXPERTS, HIDDEN, WIDTH)}
    return {name: 0.3 * jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}


def loss(params, x, places=None):
    """Each token goes to one expert, and is left out where its expert has no slot free; the slots are an einsum's."""
    place = lambda x, name: x if places is None else jax.lax.with_sharding_constraint(x, places[name])
    gates = jax.nn.softmax(x @ params["router"])  # (rows, tokens, experts)
    chosen = jax.nn.one_hot(jnp.argmax(gates, -1), EXPERTS)
    slot = jnp.cumsum(chosen, 1) * chosen - 1  # -1: not this expert
    sent = jax.nn.one_hot(slot.astype(jnp.int32), SLOTS)  # (rows, tokens, experts, slots)
    given = place(jnp.einsum("btec,btd->ebcd", sent, x), "experts")
    h = jnp.tanh(jnp.einsum("ebcd,edh->ebch", given, params["up"]))
    out = place(jnp.einsum("ebch,ehd->ebcd", h, params["down"]), "experts")
    y = place(jnp.einsum("btec,bte,ebcd->btd", sent, gates, out), "rows")
    return jnp.mean((x + y - 1) ** 2)


def trained(mesh=None, layout=None):
    """Losses, the state after them, and what the compiled step sends."""
    places = None
    if mesh is not None:
        rows = names_of(layout.rows(mesh).spec[0])
        others = tuple(name for name in rows if name != "expert")
        specs = {"rows": (rows, None, None), "experts": ("expert", others, None, None)}
        places = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()}
    of_places = functools.partial(loss, places=places)
    params = parameters()
    adapted = jlora.apply(params, rank=2, targets="up|down", sites=jlora.sites(loss, params, X), key=0)
    assert {site.path: site.stack_axes for site in adapted.sites} == {"up": (0,), "down": (0,)}
    options = {} if mesh is None else {"mesh": mesh, "layout": layout}
    step = jlora.train_step(of_places, optax.rmsprop(3e-2), **options)
    state, found = jlora.TrainState.create(adapted, step.tx), []
    text = "" if mesh is None else step.lower(state, X).compile().as_text()
    for _ in range(5):
        state, metrics = step(state, X)
        found.append(float(metrics["loss"]))
    return found, state, text


@functools.cache
def alone():
    found, state, _ = trained()
    assert found[-1] < found[0] - 0.02
    return found, state.adapted.factors


LAYOUTS = {
    "rows over data": ({"expert": 2, "fsdp": 2, "tp": 2}, ("data", "fsdp")),
    "rows over the experts' axis, too": ({"expert": 4, "fsdp": 2}, ("fsdp", "expert")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_factors_lie_with_their_expert(name):
    axes, batch = LAYOUTS[name]
    found, state, text = trained(mesh_of(**axes), Layout(RULES, batch))
    np.testing.assert_allclose(found, alone()[0], rtol=1e-5)
    chex.assert_trees_all_close(jax.device_get(state.adapted.factors), alone()[1], atol=2e-5)
    tp = "tp" if "tp" in axes else None
    specs = {path: tuple(x.sharding.spec) for path, x in tree.leaves(state.adapted.factors)[0].items()}
    assert specs == {
        "up/A": ("expert", None, None),
        "up/B": ("expert", None, tp),
        "down/A": ("expert", tp, None),
        "down/B": ("expert", None, None),
    }
    sent = collectives(text, 8)
    own = 2 * WIDTH * HIDDEN * EXPERTS // axes["expert"] // axes.get("tp", 1)  # numbers of a device's own experts
    routing = 512
    assert 4 * own <= sent["all-gather"].bytes <= 4 * own + routing  # over fsdp, once: no other expert's weight
    if "expert" in batch:
        tokens = 4 * len(X) * SLOTS * EXPERTS * WIDTH // 8  # of all rows' slots a device's part
        assert sent["all-to-all"].bytes == 3 * tokens  # to the experts, back, and the gradient of what came back
        scalars = 64
        assert sent["all-reduce"].bytes <= jlora.count(state.adapted).trainable * 4 // axes["expert"] + scalars
