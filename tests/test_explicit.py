"""Methods on a base that lies on a mesh: what they compute with the base is what they compute on one device.

The meshes are those of `jax.make_mesh`, whose axes are explicit: the types of arrays say how they are sharded.
"""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.checkpoint import fingerprint
from tests.conformance import close, measured, normal

D, F, B, L = 16, 8, 12, 2
# One kernel for each way to lie on the mesh. The stacked one is (layers, outputs, inputs).
PLACES = {
    "inputs": P(("data", "model"), None),
    "both": P("data", "model"),
    "stack": P("model", "data", None),
    "rows": P("data", None),  # of these some rows are trained
    "whole": P(None, "model"),  # and all of these
}
METHODS = {
    "lora": jlora.lora(3, alpha=6.0),
    "dora of rslora": jlora.dora(jlora.rslora(2)),
    "adalora": jlora.adalora(4, 2, total_steps=8),
    "pissa": jlora.pissa(3, alpha=2.0),
    "pissa, fast": jlora.pissa(2, iterations=2),
    "olora": jlora.olora(2),
    "eva": jlora.eva(2),
    "corda": jlora.corda(2),
    "lora_ga": jlora.lora_ga(2),
    "vera": jlora.vera(8),
    "lokr": jlora.lokr(1),
    "ia3": jlora.ia3("back"),
    "oft": jlora.oft(4),
    "full": jlora.full(),
}


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


def params() -> dict:
    return {path: normal(*((L, F, D) if path == "stack" else (D, F)), seed=i) for i, path in enumerate(PLACES)}


def loss_of(params, x):
    """A loss that uses each kernel alone. The stacked one meets inputs sharded as it is, as explicit axes require."""
    product = lambda path, w: jnp.einsum("ibd,ifd->ibf", x["layers"], w) if path == "stack" else x["all"] @ w
    return sum(jnp.mean((jnp.tanh(product(path, w)) - 0.3) ** 2) for path, w in params.items())


def batch() -> dict:
    return {"all": normal(B, D, seed=9), "layers": normal(L, B, D)}


def adapt(name: str, base: dict, x: dict) -> jlora.Adapted:
    method = METHODS[name]
    options = {}
    if name != "full":
        options |= {"extras": {"whole": None, "rows": [1, 5]}, "targets": ["inputs", "both", "stack"]}
    options |= measured(method, loss_of, base, [x], SITES, targets=options.get("targets"))
    return jlora.apply(base, method=method, sites=SITES, key=3, **options)


def trained(start: jlora.Adapted, x: dict) -> jlora.Adapted:
    step = jlora.train_step(loss_of, optax.sgd(0.3))
    state, _ = step(jlora.TrainState.create(start, step.tx), x)
    return state.adapted


SITES = jlora.sites(loss_of, params(), batch())


@functools.cache
def on_one_device(name: str) -> tuple[jlora.Adapted, jlora.Adapted]:
    start = adapt(name, params(), batch())
    return start, trained(start, batch())


def placed(mesh: jax.sharding.Mesh) -> tuple[dict, dict]:
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    base = {path: put(w, PLACES[path]) for path, w in params().items()}
    return base, {n: put(x, P("model") if n == "layers" else P()) for n, x in batch().items()}


ONE_PROGRAM = "tests/test_methods.py::test_start_merged_weights_and_gradients_in_one_program"  # on one device
ROWS = [
    *((name, AxisType.Explicit, False) for name in METHODS),
    *((name, AxisType.Explicit, True) for name in ("corda", "oft")),
    *((name, AxisType.Auto, False) for name in ("eva", "oft")),
]
DEFAULT = [
    ("lora", AxisType.Explicit, False),
    ("pissa", AxisType.Explicit, False),
    ("oft", AxisType.Explicit, True),
    ("eva", AxisType.Auto, False),
]


@pytest.mark.parametrize(
    ("name", "kind", "context"),
    [pytest.param(*row, marks=() if row in DEFAULT else pytest.mark.thorough(ONE_PROGRAM)) for row in ROWS],
)
def test_a_base_on_a_mesh_gives_the_numbers_of_one_device(name, kind, context):
    start, after = on_one_device(name)
    mesh = mesh_of(kind)
    base, x = placed(mesh)
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        theirs = adapt(name, base, x)
        assert all(theirs.base[path] is base[path] for path in base)
        close(jax.device_get((theirs.factors, theirs.buffers)), jax.device_get((start.factors, start.buffers)), 1e-4)
        moved = trained(theirs, x)
        close(jax.device_get(moved.factors), jax.device_get(after.factors), 1e-4)
        merged = jlora.merge(moved)
        close(jax.device_get(merged), jax.device_get(jlora.merge(after)), 1e-5)
        assert all(w.sharding.is_equivalent_to(base[path].sharding, w.ndim) for path, w in merged.items())
        if name == "pissa":
            chex.assert_trees_all_equal(jlora.unmerge(merged, moved).base, base)
            assert fingerprint(base) == fingerprint(params())
            assert max(jlora.merge_error(moved).values()) < 1e-6
        if name in ("pissa", "adalora", "lokr", "vera"):
            close(jax.device_get(jlora.merge(jlora.to_lora(moved))), jax.device_get(merged), 1e-5)
