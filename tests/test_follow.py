"""`sites` follows a weight to where it meets an input, whatever lies between; each of them adapts, exactly."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora
from tests.conformance import close, merged_by_hand, normal

X, W = normal(4, 8), (8, 6)
SCATTER_ADD = jax.make_jaxpr(lambda x: x.at[0].add(1.0))(jnp.ones(2)).eqns[-1].primitive.name  # a "-" or a "_" in it
IN_OUT = ("linear", (0,), (1,), ())
STACK = jax.make_jaxpr(jnp.stack)([1.0, 2.0]).eqns[-1].primitive.name  # a primitive of its own from JAX 0.12


@jax.custom_vjp
def rounded(w: jax.Array) -> jax.Array:
    return jnp.round(8 * w) / 8


rounded.defvjp(lambda w: (rounded(w), None), lambda _, g: (g,))


@jax.custom_jvp
def clipped(w: jax.Array) -> jax.Array:
    return jnp.clip(w, -0.5, 0.5)


clipped.defjvp(lambda primals, tangents: (clipped(*primals), tangents[0]))


def conv(x: jax.Array, w: jax.Array, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )


def centred(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    w = w - jnp.mean(w, axes, keepdims=True)
    return w / jnp.sqrt(jnp.mean(w**2, axes, keepdims=True) + 1e-3)


def int8_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Straight through: the product of int8 numbers forward, of the floats backward."""
    q = lambda v: jnp.round(20 * v).astype(jnp.int8)
    exact = x @ w
    quantised = lax.dot_general(q(x), q(w), (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return exact + lax.stop_gradient(quantised.astype(jnp.float32) / 400 - exact)


def layers(p: Any, x: jax.Array) -> jax.Array:
    stacked = jnp.stack([p["w"], p["v"]])
    return lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, stacked)[0]


def doubled(w: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda _, w: 0.5 * w + 0.1 * jnp.roll(w, 1, axis=0), w)


def straight_through(w: jax.Array) -> jax.Array:
    return w + lax.stop_gradient(jnp.round(w) - w)


# name: (function, shapes of the weights, {path: kind and axes}, {path: the operation that materialises it})
WAYS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]], dict[str, Any], dict[str, str]]] = {
    "exponential": (lambda p, x: x @ jnp.exp(p["w"]), {"w": W}, {"w": IN_OUT}, {"w": "exp"}),
    "weight norm": (
        lambda p, x: x @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)),
        {"w": W, "g": (1, 6)}, {"w": IN_OUT, "g": IN_OUT}, {"w": "mul", "g": "mul"},
    ),
    "spectral norm": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])), {"w": W}, {"w": IN_OUT}, {"w": ""},
    ),
    "standardised": (lambda p, x: x @ centred(p["w"], (0,)), {"w": W}, {"w": IN_OUT}, {"w": "reduce_sum"}),
    "standardised convolution": (
        lambda p, x: conv(x[:, None], centred(p["w"], (0, 1))), {"w": (3, 8, 6)},
        {"w": ("conv", (0, 1), (2,), ())}, {"w": "reduce_sum"},
    ),
    "computed mask": (
        lambda p, x: x @ (p["w"] * (jnp.abs(p["w"]) > 0.2).astype(jnp.float32)), {"w": W}, {"w": IN_OUT}, {"w": "abs"},
    ),
    "computed mask, select": (
        lambda p, x: x @ jnp.where(p["w"] > 0, p["w"], 0.1), {"w": W}, {"w": IN_OUT}, {"w": "gt"},
    ),
    "top half": (
        lambda p, x: x @ jnp.where(p["w"] >= jnp.sort(p["w"], axis=0)[4:5], p["w"], 0), {"w": W}, {"w": IN_OUT}, {"w": "sort"},
    ),
    "mask of a triangle": (lambda p, x: x @ jnp.tril(p["w"]), {"w": (8, 8)}, {"w": IN_OUT}, {"w": "select_n"}),
    "straight-through rounding": (
        lambda p, x: x @ straight_through(p["w"]), {"w": W}, {"w": IN_OUT}, {"w": "round"},
    ),
    "int8 training": (lambda p, x: int8_product(x, p["w"]), {"w": W}, {"w": IN_OUT}, {"w": ""}),
    "fake float8": (
        lambda p, x: x @ p["w"].astype(jnp.float8_e4m3fn).astype(jnp.float32), {"w": W}, {"w": IN_OUT}, {"w": "convert_element_type"},
    ),
    "custom_vjp": (lambda p, x: x @ rounded(p["w"]), {"w": W}, {"w": IN_OUT}, {"w": "custom_vjp_call"}),
    "custom_jvp": (lambda p, x: x @ clipped(p["w"]), {"w": W}, {"w": IN_OUT}, {"w": "custom_jvp_call"}),
    "wq | wk | wv": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], axis=1), {"w": W, "v": (8, 2)},
        {"w": IN_OUT, "v": IN_OUT}, {"w": "concatenate", "v": "concatenate"},
    ),
    "inputs concatenated": (
        lambda p, x: jnp.concatenate([x, x], axis=1) @ jnp.concatenate([p["w"], p["v"]], axis=0), {"w": W, "v": W},
        {"w": IN_OUT, "v": IN_OUT}, {"w": "concatenate", "v": "concatenate"},
    ),
    "layers stacked before a scan": (
        layers, {"w": (8, 8), "v": (8, 8)}, {"w": IN_OUT, "v": IN_OUT}, {"w": STACK, "v": STACK},
    ),
    "stacked layers, one by one": (
        lambda p, x: functools.reduce(lambda h, w: jnp.tanh(h @ w), jnp.unstack(p["w"]), x), {"w": (2, 8, 8)},
        {"w": ("linear", (1,), (2,), (0,))}, {"w": ""},
    ),
    "one output, squeezed": (lambda p, x: x @ p["w"][:, 0], {"w": (8, 1)}, {"w": IN_OUT}, {"w": ""}),
    "one input, squeezed": (lambda p, x: jnp.outer(x[:, 0], p["w"][0]), {"w": (1, 6)}, {}, {}),
    "one of each, batched": (
        lambda p, x: x @ p["w"], {"w": (1, 8, 1)}, {"w": ("linear", (1,), (0, 2), ())}, {"w": ""},
    ),
    "tiled": (lambda p, x: x @ jnp.tile(p["w"], (2, 1)), {"w": (4, 6)}, {"w": IN_OUT}, {"w": ""}),
    "layers set one by one": (
        lambda p, x: lax.scan(
            lambda h, w: (jnp.tanh(h @ w), None), x, jnp.zeros((2, 8, 8)).at[0].set(p["w"]).at[1].set(p["v"])
        )[0],
        {"w": (8, 8), "v": (8, 8)}, {"w": IN_OUT, "v": IN_OUT}, {"w": "scatter", "v": "scatter"},
    ),
    "rows added where indices say": (
        lambda p, x: x @ jnp.zeros((8, 6)).at[jnp.asarray([0, 1, 2, 3, 4, 5, 6, 7, 0, 1])].add(p["w"]), {"w": (10, 6)},
        {"w": IN_OUT}, {"w": SCATTER_ADD},
    ),
    "a product written as a sum": (
        lambda p, x: (x[:, :, None] * p["w"][None]).sum(1), {"w": W}, {"w": IN_OUT}, {"w": "mul"},
    ),
    "written into a larger one": (
        lambda p, x: x @ lax.dynamic_update_slice(jnp.ones((8, 6)), p["w"], (0, 2)), {"w": (8, 3)},
        {"w": IN_OUT}, {"w": "dynamic_update_slice"},
    ),
    "ensemble of convolutions": (
        lambda p, x: jax.vmap(conv)(x[:, None, None] * jnp.ones((1, 2, 5, 1)), p["w"]), {"w": (4, 3, 8, 6)},
        {"w": ("conv", (1, 2), (3,), (0,))}, {"w": "conv_general_dilated"},
    ),
    "kernel by kernel": (
        lambda p, x: jax.vmap(lambda w: conv(x[:, None], w))(p["w"]), {"w": (4, 3, 8, 6)},
        {"w": ("conv", (1, 2), (0, 3), ())}, {"w": ""},
    ),
    "product of two": (
        lambda p, x: x @ (p["a"] @ p["b"]), {"a": (8, 5), "b": (5, 6)},
        {"a": ("linear", (1,), (0,), ()), "b": IN_OUT}, {"a": "", "b": "dot_general"},
    ),
    "sum of two": (lambda p, x: x @ (p["w"] + p["v"]), {"w": W, "v": W}, {"w": IN_OUT, "v": IN_OUT}, {"w": "add", "v": "add"}),
    "noise on the weight": (
        lambda p, x: x @ (p["w"] + jnp.exp(p["s"]) * jax.random.normal(jax.random.key(0), W)),
        {"w": W, "s": W}, {"w": IN_OUT, "s": IN_OUT}, {"w": "add", "s": "exp"},
    ),
    "orthogonal by Cayley": (
        lambda p, x: x @ jnp.linalg.solve(jnp.eye(8) + p["w"] - p["w"].T, jnp.eye(8) - p["w"] + p["w"].T),
        {"w": (8, 8)}, {"w": IN_OUT}, {"w": "sub"},
    ),
    "cumulative": (lambda p, x: x @ jnp.cumsum(p["w"], axis=0), {"w": W}, {"w": IN_OUT}, {"w": "cumsum"}),
    "soft choice of experts": (
        lambda p, x: x @ jnp.sum(jax.nn.softmax(p["c"])[:, None, None] * p["w"], axis=0), {"w": (3, 8, 6), "c": (3,)},
        {"w": ("linear", (0, 1), (2,), ())}, {"w": "reduce_sum"},
    ),
    "Kronecker": (
        lambda p, x: x @ jnp.kron(p["a"], p["b"]), {"a": (2, 3), "b": (4, 2)}, {"a": IN_OUT, "b": IN_OUT},
        {"a": "mul", "b": "mul"},
    ),
    "branch": (
        lambda p, x: x @ lax.cond(x[0, 0] > 0, lambda w: w, lambda w: 2 * w, p["w"]), {"w": W}, {"w": IN_OUT}, {"w": "cond"},
    ),
    "loop": (lambda p, x: x @ doubled(p["w"]), {"w": W}, {"w": IN_OUT}, {"w": "scan"}),
    "rounded, then looked up": (
        lambda p, x: jnp.round(4 * p["w"])[jnp.asarray([1, 3, 3])], {"w": W},
        {"w": ("embedding", (0,), (1,), ())}, {"w": "round"},
    ),
    "solved for": (
        lambda p, x: jax.scipy.linalg.solve_triangular(p["w"] + 3 * jnp.eye(8), x.T, lower=True), {"w": (8, 8)},
        {"w": IN_OUT}, {"w": "add"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_it_is_found_and_adapts_exactly(name: str):
    fn, shapes, expected, through = WAYS[name]
    beside = lambda p, x: (x @ p["beside"], fn(p, x))
    params = {path: normal(*shape, seed=1) for path, shape in shapes.items()} | {"beside": normal(8, 5)}
    sites = {site.path: site for site in jlora.sites(beside, params, X)}
    found = {
        path: (sites[path].kind, sites[path].in_axes, sites[path].out_axes, sites[path].stack_axes) for path in expected
    }
    assert found == expected
    assert {path: sites[path].materialised for path in through} == through

    targets = lambda site: site.kind in ("linear", "conv", "embedding")
    adapted = jlora.apply(params, method=jlora.lora(2, 4.0), sites=sites.values(), targets=targets)
    assert {*expected, "beside"} <= {site.path for site in adapted.sites}
    factors = {
        path: {n: 0.2 * normal(*f.shape, seed=i) for i, (n, f) in enumerate(arrays.items())}
        for path, arrays in adapted.factors.items()
    }
    explained = jlora.explain(beside, adapted, X)
    assert {path for path, op in through.items() if op} <= {row.path for row in explained.materialised}

    def of_factors(factors: Any, by_hand: bool, x: jax.Array) -> tuple[jax.Array, Any]:
        out = (
            beside(merged_by_hand(params, factors, 2.0), x)
            if by_hand
            else jlora.lift(beside)(jlora.combine(factors, adapted), x)
        )
        return sum(jnp.vdot(normal(*y.shape, seed=3), y.astype(jnp.float32)) for y in jax.tree.leaves(out)), out

    gradient = jax.grad(of_factors, has_aux=True)
    lifted, merged = jax.jit(lambda f, x: [gradient(f, by_hand, x) for by_hand in (False, True)])(factors, X)
    close(lifted, merged)


def test_what_it_ends_in_is_noted():
    fn = lambda p, x: jnp.concatenate([p["cls"], x], 0) @ p["k"]
    sites = {site.path: site for site in jlora.sites(fn, {"cls": normal(1, 8), "k": normal(8, 6)}, X)}
    assert (sites["cls"].kind, sites["cls"].uses) == ("other", ("concatenate",))


def test_tables_alone_are_said_to_be_tables():
    fn, params = lambda p: p["table"][jnp.asarray([1, 2])], {"table": normal(8, 6)}
    with pytest.raises(ValueError, match="the program only looks rows up, .* choose them, as targets='table'"):
        jlora.apply(params, rank=1, sites=jlora.sites(fn, params))
