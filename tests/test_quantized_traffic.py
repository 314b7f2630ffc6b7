"""Traffic of a quantised base that is fully sharded: codes and scales are gathered, and the numbers are those of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import jlora
from jlora import tree
from jlora.models.llama import Llama, LlamaConfig
from jlora.sharding import MODELS, put
from jlora.transform.trace import Trace
from tests.test_sharding import mesh_of

pytestmark = pytest.mark.once

MODEL = Llama(
    LlamaConfig(vocab_size=64, context=16, width=128, hidden=256, layers=2, heads=4, key_heads=4, scan=True, remat=True)
)
TOKENS = np.arange(8 * 17).reshape(8, 17) % 64
BATCH = {"tokens": TOKENS[:, :-1].astype(np.int32), "labels": TOKENS[:, 1:].astype(np.int32)}
TX = optax.sgd(0.1)


@functools.cache
def loss(**changes):
    """Of a model that differs from MODEL by these fields."""
    model = Llama(dataclasses.replace(MODEL.config, **changes))
    return lambda params, batch: jnp.mean(model.apply({"params": params}, batch["tokens"], labels=batch["labels"]))


@functools.cache
def adapted(form: str | None, double: bool = False, **changes):
    init = Llama(dataclasses.replace(MODEL.config, **changes)).init
    held = init(jax.random.key(0), BATCH["tokens"])["params"]
    sites = jlora.sites(loss(**changes), held, BATCH)
    if form is not None:
        options = {"block": 32, "double": double} if form == "nf4" else {}
        held = jlora.quantize(held, form, targets="attn|mlp", sites=sites, **options)
    found = jlora.apply(held, rank=2, targets="attn|mlp", sites=sites, key=jax.random.key(1))
    return found.replace(factors=jax.tree.map(lambda x: x + 0.01, found.factors))


def planned(form: str | None, double: bool = False, **changes):
    """A step on four devices."""
    return jlora.plan(loss(**changes), adapted(form, double, **changes), TX, BATCH, {"fsdp": 4}, "cpu", rule=MODELS)


def gathered(form: str | None, double: bool = False) -> int:
    """Bytes that a step gathers on four devices."""
    return planned(form, double).collectives["all-gather"].bytes


def codes_of(held) -> list:
    return [leaf for leaf in tree.leaves(held.base)[0].values() if tree.is_stored(leaf)]


def test_codes_are_gathered_and_not_the_weights_behind_them():
    """A plain base's weights twice, forward and backward, and codes no more often under a checkpoint without a policy."""
    held = adapted("nf4", double=True)
    stored = codes_of(held)
    number, own = sum(leaf.size for leaf in stored), sum(leaf.nbytes for leaf in stored)
    assert len(stored) == 7 and own < 0.3 * 4 * number
    rest = gathered(None) - 2 * 4 * number  # of the embedding and the head
    assert 0 < rest < 0.03 * 4 * number
    found = gathered("nf4", double=True)
    assert rest + 1.99 * own <= found <= rest + 2 * own  # scales of the second level lie on every device


def test_codes_of_an_unrolled_model_are_gathered_layer_by_layer():
    """What a step holds grows with each layer by the activations that are kept, and not by its codes."""

    def temporaries(layers: int) -> tuple[int, int]:
        changes = {"layers": layers, "scan": False, "width": 256, "hidden": 512}
        codes = sum(leaf.nbytes for leaf in codes_of(adapted("nf4", **changes)))
        return planned("nf4", **changes).temporaries, codes

    (few, codes), (many, all_codes) = temporaries(2), temporaries(6)
    assert many - few < 0.4 * (all_codes - codes)  # 0.79 where nothing holds the gathers back


@pytest.mark.parametrize(
    ("around", "again"),
    [
        ("", False), ("r", True), ("s", False), ("sr", True), ("rs", False), ("rsr", True), ("n", True), ("k", False),
        ("kr", False), ("ksr", False), ("rk", False),
    ],
)  # fmt: skip
def test_codes_are_gathered_early_where_nothing_of_them_is_kept(around, again):
    """r, n and k are checkpoints without a policy, with one that keeps nothing and one that keeps all; s is a scan."""
    policies = {
        "r": None,
        "n": jax.checkpoint_policies.nothing_saveable,
        "k": jax.checkpoint_policies.everything_saveable,
    }

    def equation(kind: str):
        @functools.partial(jax.checkpoint, policy=policies.get(kind))
        def checkpointed(x):
            return jnp.sin(x)

        scanned = lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=2)[0]
        (eqn,) = jax.make_jaxpr(scanned if kind == "s" else checkpointed)(1.0).eqns
        return eqn

    assert Trace(around=[equation(kind) for kind in around]).is_computed_again is again


@pytest.mark.parametrize("scan", [True, False])
def test_a_step_has_the_numbers_of_one_device(scan):
    """Split over the rows' axis and tensor parallel, scales in 8 bits."""
    start, fn = adapted("nf4", True, scan=scan), loss(scan=scan)
    step = jlora.train_step(fn, TX, donate=False)
    expected, metrics = step(jlora.TrainState.create(start, step.tx), BATCH)
    mesh = mesh_of(AxisType.Explicit, fsdp=2, tp=2)
    lying = start.replace(base=put(start.base, MODELS.shardings(start.base, mesh)))
    on_mesh = jlora.train_step(fn, TX, donate=False, mesh=mesh)
    found, of_mesh = on_mesh(jlora.TrainState.create(lying, on_mesh.tx), BATCH)
    np.testing.assert_allclose(of_mesh["loss"], metrics["loss"], rtol=1e-5)
    for got, want in zip(*map(jax.tree.leaves, (found.adapted.factors, expected.adapted.factors)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
