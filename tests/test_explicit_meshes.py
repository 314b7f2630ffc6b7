"""JAX's explicit mesh mode, the default of `jax.make_mesh`: a lifted function works there as the function itself does."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from tests.conformance import close, merged_by_hand, normal

EXPLICIT = (AxisType.Explicit, AxisType.Explicit)
MESH = jax.make_mesh((2, 2), ("data", "model"), axis_types=EXPLICIT, devices=jax.devices()[:4])
reshard, auto_axes = jax.sharding.reshard, jax.sharding.auto_axes


def put(x: jax.Array, *spec: Any) -> jax.Array:
    return jax.device_put(x, NamedSharding(MESH, P(*spec)))


def einsum(numbers: str, *spec: Any) -> Callable[..., jax.Array]:
    return functools.partial(jnp.einsum, numbers, out_sharding=P(*spec))


def scanned(w: jax.Array, x: jax.Array) -> jax.Array:
    whole = jax.remat(lambda h, layer: jnp.tanh(h @ reshard(layer, P(None, None))))
    return lax.scan(lambda h, layer: (whole(h, layer), None), x, w)[0]


def convolved(w: jax.Array, x: jax.Array) -> jax.Array:
    numbers = lax.conv_dimension_numbers((4, 6, 8), (3, 8, 4), ("NWC", "WIO", "NWC"))
    return lax.conv_general_dilated(x, reshard(w, P(None, None, None)), (1,), "SAME", dimension_numbers=numbers)


def mapped(body: Callable[..., jax.Array], in_specs: Any, out_specs: Any, **options: Any) -> Callable[..., jax.Array]:
    return jax.shard_map(body, mesh=MESH, in_specs=in_specs, out_specs=out_specs, **options)


X, IDS, SEQUENCE = normal(4, 8), jnp.asarray([1, 7, 3, 3]), normal(4, 6, 8)
# (function of a weight and an input, the weight's shape and place, the input and its place, axes of the site)
CASES: dict[str, tuple[Any, ...]] = {
    "data-parallel": (lambda w, x: x @ w, (8, 6), (), X, ("data",), ((0,), (1,), ())),
    "outputs sharded": (lambda w, x: x @ w, (8, 6), (None, "model"), X, ("data",), ((0,), (1,), ())),
    "FSDP: resharded whole": (
        lambda w, x: x @ reshard(w, P(None, None)), (8, 6), ("data",), X, ("data",), ((0,), (1,), ()),
    ),
    "resharded to outputs": (
        lambda w, x: x @ reshard(w, P(None, "model")), (8, 6), ("model",), X, ("data",), ((0,), (1,), ()),
    ),
    "inputs sharded, out_sharding": (
        lambda w, x: einsum("bi,io->bo", "data")(x, w), (8, 6), ("model",), X, ("data", "model"), ((0,), (1,), ()),
    ),
    "weight first, out_sharding": (
        lambda w, x: einsum("oi,bi->ob", None, "data")(w, x), (6, 8), (None, "model"), X, ("data", "model"),
        ((1,), (0,), ()),
    ),
    "three axes, out_sharding": (
        lambda w, x: einsum("bi,ihk->bhk", "data", "model")(x, w), (8, 2, 4), (), X, ("data",), ((0,), (1, 2), ()),
    ),
    "experts, out_sharding": (
        lambda w, x: einsum("bi,eio->ebo", "model", "data")(x, w), (2, 8, 6), ("model",), X, ("data",),
        ((1,), (2,), (0,)),
    ),
    "look-up, out_sharding": (
        lambda w, i: w.at[i].get(out_sharding=P("data", None)), (8, 6), (), IDS, ("data",), ((0,), (1,), ()),
    ),
    "look-up in sharded rows": (
        lambda w, i: w.at[i].get(out_sharding=P("data", None)), (8, 6), ("model",), IDS, ("data",), ((0,), (1,), ()),
    ),
    "look-up by sharded columns": (
        lambda w, i: w.at[i].get(out_sharding=P("data", "model")), (8, 6), (None, "model"), IDS, ("data",),
        ((0,), (1,), ()),
    ),
    "auto_axes": (
        lambda w, x: auto_axes(lambda x, w: jnp.tanh(x @ w), out_sharding=P("data", None))(x, w),
        (8, 6), ("model",), X, ("data",), ((0,), (1,), ()),
    ),
    "one axis auto": (
        lambda w, x: auto_axes(lambda x, w: x @ w, axes="model", out_sharding=P("data", None))(x, w),
        (8, 6), (None, "model"), X, ("data",), ((0,), (1,), ()),
    ),
    "materialised in auto_axes": (
        lambda w, x: auto_axes(lambda x, w: x @ jnp.sin(w), out_sharding=P("data", None))(x, w),
        (8, 6), ("model",), X, ("data",), ((0,), (1,), ()),
    ),
    "materialised": (
        lambda w, x: x @ jnp.sin(reshard(w, P(None, None))), (8, 6), ("data",), X, ("data",), ((0,), (1,), ()),
    ),
    "reshape to a place": (
        lambda w, x: einsum("bi,ihk->bhk", "data")(x, jnp.reshape(w, (8, 2, 3), out_sharding=P(None, "model"))),
        (8, 6), (), X, ("data",), ((0,), (1,), ()),
    ),
    "broadcast to a place": (
        lambda w, x: einsum("bi,bio->bo", "data")(x, jnp.broadcast_to(w, (4, 8, 6), out_sharding=P("data"))),
        (8, 6), (), X, ("data",), ((0,), (1,), ()),
    ),
    "transposed": (lambda w, x: x @ w.T, (6, 8), ("model",), X, ("data",), ((1,), (0,), ())),
    "scan, remat, reshard": (scanned, (2, 8, 8), (None, "data"), X, ("data",), ((1,), (2,), (0,))),
    "convolution": (convolved, (3, 8, 4), (None, "model"), SEQUENCE, ("data",), ((0, 1), (2,), ())),
    "inside jit": (
        jax.jit(lambda w, x: x @ reshard(w, P(None, None))), (8, 6), ("data",), X, ("data",), ((0,), (1,), ()),
    ),
    "shard_map over all axes": (
        mapped(lambda x, w: x + w[None], (P("data"), P()), P("data")), (8, 6), (), normal(4, 8, 6), ("data",),
        ((0,), (1,), ()),
    ),
    "shard_map over one axis": (
        mapped(lambda x, w: jnp.tanh(x @ w), (P("data"), P()), P("data"), axis_names={"data"}),
        (8, 6), (), X, ("data",), ((0,), (1,), ()),
    ),
    "shard_map over one axis, in jit": (
        jax.jit(mapped(lambda x, w: jnp.tanh(x @ w) * w[:1], (P("data"), P()), P("data"), axis_names={"data"})),
        (8, 6), (), X, ("data",), ((0,), (1,), ()),
    ),
}  # fmt: skip
SWAPPED = {"shard_map over all axes", "shard_map over one axis", "shard_map over one axis, in jit"}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str):
    fn, shape, place, x, x_place, axes = CASES[name]
    call = (lambda p, x: fn(x, p["w"])) if name in SWAPPED else (lambda p, x: fn(p["w"], x))
    with jax.set_mesh(MESH):
        params, x = {"w": put(normal(*shape), *place)}, put(x, *x_place)
        site = jlora.Site("w", shape, "float32", *axes, "linear")
        adapted = jlora.apply(params, method=jlora.lora(3, 6.0), sites=(site,), targets="w")
        factors = {"w": {n: 0.3 * normal(*f.shape, seed=i) for i, (n, f) in enumerate(adapted.factors["w"].items())}}

        def of_factors(merged: bool, factors: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            if merged:
                update = put(6.0 / 3 * jnp.sum(factors["w"]["A"] * factors["w"]["B"], axis=-1), *place)
                out = call({"w": params["w"] + update}, x)
            else:
                out = jlora.lift(call)(jlora.combine(factors, adapted), x)
            return jnp.sum(jnp.sin(out)), out

        run = jax.jit(jax.value_and_grad(of_factors, argnums=1, has_aux=True), static_argnums=0)
        ((_, got), gradient), ((_, expected), by_hand) = run(False, factors, x), run(True, factors, x)
    assert jax.typeof(got).sharding.spec == jax.typeof(expected).sharding.spec
    close(got, expected)
    close(gradient, by_hand)


def test_fsdp_by_reshard_is_factored_found_and_dropped_out():
    def loss(params: Any, x: jax.Array) -> jax.Array:
        whole = lambda w: reshard(w, P(None, None))
        return jnp.mean(jnp.tanh(x @ whole(params["up"])) @ whole(params["down"]))

    with jax.set_mesh(MESH):
        params = {"up": put(normal(8, 6), "data"), "down": put(normal(6, 8), "data")}
        x = put(X, "data")
        found = jlora.sites(loss, params, x)
        assert [(site.kind, site.in_axes, site.out_axes) for site in found] == [("linear", (0,), (1,))] * 2
        adapted = jlora.apply(params, method=jlora.lora(2, dropout=0.5), sites=found)
        assert not jlora.explain(loss, adapted, x).materialised
        moved = adapted.replace(factors=jax.tree.map(lambda f: f + 0.3, adapted.factors))
        plain, dropped = jlora.lift(loss)(moved, x), jlora.lift(loss)(jlora.with_dropout(moved, 1), x)
    assert plain != dropped


def test_trained_rows_of_a_table_that_is_split_by_rows_are_scaled():
    params = {"table": put(normal(8, 6), "model"), "w": put(normal(8, 6), "data")}
    sites = (jlora.Site("w", (8, 6), "float32", (0,), (1,), (), "linear"),)
    adapted = jlora.apply(params, rank=2, sites=sites, targets="w", extras={"table": [1, 6]})
    moved = adapted.replace(factors=jax.tree.map(lambda x: x + 1.0, adapted.factors))
    close(jlora.scale(moved, 0.25).factors["table"]["rows"], normal(8, 6)[jnp.asarray([1, 6])] + 0.25)


AUTO = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto), devices=jax.devices()[:4])


@pytest.mark.parametrize("mesh", [AUTO, MESH], ids=["auto", "explicit"])
@pytest.mark.parametrize("axes", [("data",), ("data", "model")])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_inside_the_models_own_jit(mesh: jax.sharding.Mesh, axes: tuple[str, ...], check_vma: bool):
    """JAX 0.10.0 takes a shard_map over some of the axes under jit alone: a jit of the model's own stays in the lifted model."""
    body = lambda w, x: jnp.tanh(x @ w["k"] + w["t"]) * w["t"]
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
    fn = jax.jit(jax.shard_map(body, mesh=mesh, **specs, axis_names=set(axes), check_vma=check_vma))
    params = {"k": normal(8, 6), "t": normal(1, 6)}
    sites = (jlora.Site("k", (8, 6), "float32", (0,), (1,), (), "linear"),)
    sites += (jlora.Site("t", (1, 6), "float32", (0,), (1,), (), "linear"),)
    adapted = jlora.apply(params, method=jlora.lora(3, 6.0), sites=sites)
    adapted = adapted.replace(factors=jax.tree.map(lambda f: f + 0.2, adapted.factors))
    merged = merged_by_hand(params, adapted.factors)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    expected = fn(merged, x)
    close(jlora.lift(fn)(adapted, x), expected)
    close(jax.jit(jlora.lift(fn))(adapted, x), expected)
