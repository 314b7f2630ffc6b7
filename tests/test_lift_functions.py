"""`lift` on plain functions: every way in which a model may reach a weight, against the merged weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.conformance import Case, check, check_values, normal
from tests.tiers import others, thorough

MESH = Mesh(np.array(jax.devices()[:8]), ("model",))
POLICIES = jax.checkpoint_policies


def one(fn: Callable[..., Any], w: tuple[int, ...], *xs: tuple[int, ...], dense: bool = False) -> Case:
    """A case with a single weight: `fn(w, *xs)`, by shapes."""
    args = tuple(normal(*shape, seed=i + 1) for i, shape in enumerate(xs))
    return Case(lambda p, *args: fn(p["w"], *args), {"w": normal(*w)}, args, ("w",) if dense else ())


def einsum(spec: str, w: tuple[int, ...], *xs: tuple[int, ...], first: bool = False) -> Case:
    """`einsum(spec, x, ..., w)`, or with w first."""
    return one(lambda w, *xs: jnp.einsum(spec, *([w, *xs] if first else [*xs, w])), w, *xs)


def scan(body: Callable[..., Any], init: Any, xs: Any, **options: Any) -> Any:
    """The carry at the end of a `lax.scan` whose body returns the carry alone."""
    return lax.scan(lambda carry, x: (body(carry, x), None), init, xs, **options)[0]


def tanh_layer(w: jax.Array, h: jax.Array) -> jax.Array:
    return jnp.tanh(h @ w)


# -- products ----------------------------------------------------------------------------------------------------------

# In, out, batch, time, heads, head width, layers, experts. Not smaller: XLA compiles a loop over tiny arrays in another
# way, with other roundings, and the start is compared bit for bit.
I, O, B, T, H, K, L, E = 16, 24, 8, 4, 4, 6, 3, 4  # noqa: E741

PRODUCTS = {
    "x @ w": one(lambda w, x: x @ w, (I, O), (B, I)),
    "x @ w.T": one(lambda w, x: x @ w.T, (O, I), (B, I)),
    "w @ x": one(lambda w, x: w @ x, (O, I), (I, B)),
    "w.T @ x": one(lambda w, x: w.T @ x, (I, O), (I, B)),
    "vector @ w": one(lambda w, x: x @ w, (I, O), (I,)),
    "w @ vector": one(lambda w, x: w @ x, (O, I), (I,)),
    "x with batch axes": one(lambda w, x: x @ w, (I, O), (2, B, T, I)),
    "tensordot": one(lambda w, x: jnp.tensordot(x, w, ((1, 2), (0, 1))), (H, K, O), (B, H, K)),
    "inner": one(lambda w, x: jnp.inner(x, w), (O, I), (B, I)),
    "dot_general, weight first": one(lambda w, x: lax.dot_general(w, x, (((0,), (1,)), ((), ()))), (I, O), (B, I)),
    "one input": one(lambda w, x: x @ w, (1, O), (B, 1)),
    "one output": one(lambda w, x: x @ w, (I, 1), (B, I)),
    "einsum bi,io->bo": einsum("bi,io->bo", (I, O), (B, I)),
    "einsum io,bi->bo": einsum("io,bi->bo", (I, O), (B, I), first=True),
    "einsum bi,oi->bo": einsum("bi,oi->bo", (O, I), (B, I)),
    "einsum oi,bi->bo": einsum("oi,bi->bo", (O, I), (B, I), first=True),
    "einsum bi,io->ob": einsum("bi,io->ob", (I, O), (B, I)),
    "einsum io,ib->bo": einsum("io,ib->bo", (I, O), (I, B), first=True),
    "einsum of three, weight last": einsum("bi,b,io->bo", (I, O), (B, I), (B,)),
    "einsum of three, weight first": einsum("io,bi,bo->b", (I, O), (B, I), (B, O), first=True),
    "einsum heads": einsum("bti,ihk->bthk", (I, H, K), (B, T, I)),
    "einsum heads first": einsum("bti,hik->bhtk", (H, I, K), (B, T, I)),
    "einsum heads to out": einsum("bthk,hko->bto", (H, K, O), (B, T, H, K)),
    "einsum heads to out, out first": einsum("bthk,ohk->bto", (O, H, K), (B, T, H, K)),
    "einsum fused keys and values": einsum("bti,chik->cbthk", (2, H, I, K), (B, T, I)),
    "einsum gate and up": einsum("bti,coi->cbto", (2, O, I), (B, T, I)),
    "einsum bilinear form": einsum("bi,bj,ijo->bo", (I, T, O), (B, I), (B, T)),
    "grouped linear": einsum("bgi,gio->bgo", (E, I, O), (B, E, I)),
    "take rows": Case(
        lambda p, ids: jnp.take(p["w"], ids, axis=0), {"w": normal(9, I)}, (jnp.asarray([[1, 8], [1, 0]]),)
    ),
    "index rows": Case(lambda p, ids: p["w"][ids], {"w": normal(9, I)}, (jnp.asarray([3, 3, 0]),)),
    "one-hot rows": Case(
        lambda p, ids: jax.nn.one_hot(ids, 9) @ p["w"], {"w": normal(9, I)}, (jnp.asarray([3, 3, 0]),)
    ),
    "tied embedding": Case(
        lambda p, ids: jnp.tanh(p["w"][ids]) @ p["w"].T, {"w": normal(9, I)}, (jnp.asarray([[1, 8], [1, 0]]),)
    ),
}

# -- what is done to the weight before it is used ----------------------------------------------------------------------


def split_qkv(w: jax.Array, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split(w, 3, axis=1)
    return jnp.tanh(x @ q) * (x @ k) + x @ v


def sliced_qkv(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w[:, :O]) * (x @ w[:, O : 2 * O]) + x @ w[:, 2 * O :]


def indexed_qkv(w: jax.Array, x: jax.Array) -> jax.Array:
    fused = w.reshape(I, 3, O)
    return jnp.tanh(x @ fused[:, 0]) * (x @ fused[:, 1]) + x @ fused[:, 2]


def vector(n: int, seed: int = 5) -> jax.Array:
    return 1.0 + normal(n, seed=seed)


SHAPED = {
    "reshape of the outputs": one(lambda w, x: jnp.einsum("bi,ihk->bhk", x, w.reshape(I, H, K)), (I, H * K), (B, I)),
    "reshape of the inputs": one(lambda w, x: jnp.einsum("bhk,hko->bo", x, w.reshape(H, K, O)), (H * K, O), (B, H, K)),
    "flattened heads": one(lambda w, x: x @ w.reshape(I, H * K), (I, H, K), (B, I)),
    "transposed, then flattened": one(lambda w, x: x @ w.transpose(2, 0, 1).reshape(I, H * K), (H, K, I), (B, I)),
    "moveaxis": one(lambda w, x: jnp.einsum("bi,oi->bo", x, jnp.moveaxis(w, 0, 1)), (I, O), (B, I)),
    "new axis": one(lambda w, x: jnp.einsum("bi,zio->zbo", x, w[None]), (I, O), (B, I)),
    "squeeze": one(lambda w, x: x @ w.squeeze(1), (I, 1, O), (B, I)),
    "broadcast over the batch": one(
        lambda w, x: jnp.einsum("bi,bio->bo", x, jnp.broadcast_to(w, (B, I, O))), (I, O), (B, I)
    ),
    "flip": one(lambda w, x: x @ w[::-1] + x @ w[:, ::-1], (I, O), (B, I)),
    "strided columns": one(lambda w, x: x @ w[:, ::2], (I, O), (B, I)),
    "padded columns": one(lambda w, x: x @ jnp.pad(w, ((0, 0), (0, 2))), (I, O), (B, I)),
    "jnp.split of qkv": one(split_qkv, (I, 3 * O), (B, I)),
    "slices of qkv": one(sliced_qkv, (I, 3 * O), (B, I)),
    "reshaped and indexed qkv": one(indexed_qkv, (I, 3 * O), (B, I)),
    "dynamic_slice of rows": Case(
        lambda p, x, start: x @ lax.dynamic_slice_in_dim(p["w"], start, 3, 0),
        {"w": normal(I, O)},
        (normal(B, 3), jnp.int32(1)),
    ),
    "dynamic_slice of columns": Case(
        lambda p, x, start: x @ lax.dynamic_slice_in_dim(p["w"], start, 2, 1),
        {"w": normal(I, O)},
        (normal(B, I), jnp.int32(3)),
    ),
    "a number times w": one(lambda w, x: x @ (0.5 * w), (I, O), (B, I)),
    "traced scalar times w": one(lambda w, x, c: x @ (c * w), (I, O), (B, I), ()),
    "w over a number": one(lambda w, x: x @ (w / 1.7), (I, O), (B, I)),
    "minus w": one(lambda w, x: x @ -w, (I, O), (B, I)),
    "per-output scale": one(lambda w, x, c: x @ (c[None] * w), (I, O), (B, I), (O,)),
    "per-input scale": one(lambda w, x, c: x @ (w * c[:, None]), (I, O), (B, I), (I,)),
    "both scales": one(lambda w, x, c, d: x @ (c[:, None] * w * d[None]), (I, O), (B, I), (I,), (O,)),
    "per-output divisor": Case(lambda p, x, c: x @ (p["w"] / c[None]), {"w": normal(I, O)}, (normal(B, I), vector(O))),
    "scale, then transpose": one(lambda w, x, c: x @ (c[:, None] * w).T, (O, I), (B, I), (O,)),
    "equalised learning rate": one(lambda w, x: x @ (w * np.float32(1 / np.sqrt(I))), (I, O), (B, I)),
    "optimization_barrier": one(lambda w, x: x @ lax.optimization_barrier(w), (I, O), (B, I)),
    "checkpoint_name": one(lambda w, x: x @ checkpoint_name(w, "kernel"), (I, O), (B, I)),
    "copy": one(lambda w, x: x @ jnp.copy(w), (I, O), (B, I)),
    "stop_gradient of another use": one(lambda w, x: x @ w + lax.stop_gradient(x @ w), (I, O), (B, I)),
    "stop_gradient of w beside w": one(lambda w, x: jnp.tanh(x @ w) * (x @ lax.stop_gradient(w)), (I, O), (B, I)),
    "used twice": one(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w), (I, I), (B, I)),
    "used twice, once transposed": one(lambda w, x: jnp.tanh(x @ w) @ w.T, (I, O), (B, I)),
    "w @ w": one(lambda w, x: x @ (w @ w), (I, I), (B, I), dense=True),
    "with_sharding_constraint": one(
        lambda w, x: x @ lax.with_sharding_constraint(w, NamedSharding(MESH, P(None, "model"))), (I, 8), (B, I)
    ),
}

# -- control flow ------------------------------------------------------------------------------------------------------


@jax.jit
def inner_jit(w, x):
    return jnp.tanh(x @ w)


def nested_jit(w, x):
    named = jax.jit(lambda w, h: inner_jit(w, h) @ w, inline=False)
    return jax.jit(named)(w, x)


def remat(policy=None, **options):
    layer = jax.checkpoint(lambda w, h: checkpoint_name(jnp.tanh(h @ w), "hidden"), policy=policy, **options)
    return lambda w, x: layer(w, layer(w, x))


def branches(w, x, p):
    return lax.cond(p > 0, lambda w, x: jnp.tanh(x @ w), lambda w, x: x @ (2.0 * w), w, x)


def closed_branches(w, x, p):
    return lax.cond(p > 0, lambda: jnp.tanh(x @ w), lambda: jnp.zeros((B, O)))


def three_branches(w, x, i):
    return lax.switch(i, [lambda w: x @ w, lambda w: jnp.sin(x @ w), lambda w: -(x @ w)], w)


def python_loop(w, x):
    for i in range(L):
        x = tanh_layer(w[i], x)
    return x


def scan_of_cond_of_remat(w, x, flags):
    layer = jax.checkpoint(tanh_layer, policy=POLICIES.nothing_saveable)

    def body(h, row):
        flag, kernel = row
        return lax.cond(flag, layer, lambda w, h: h @ (0.5 * w), kernel, h)

    return scan(body, x, (flags, w))


def cond_of_scan(w, x, p):
    return lax.cond(p > 0, lambda: scan(lambda h, w: tanh_layer(w, h), x, w), lambda: x @ w[0])


def remat_of_scan_of_jit(w, x):
    return jax.checkpoint(lambda w, x: scan(lambda h, w: inner_jit(w, h), x, w))(w, x)


def scan_of_scan(w, x):
    return scan(lambda h, group: scan(lambda h, w: tanh_layer(w, h), h, group), x, w)


def scan_threading_the_weight(w, x):
    """NNX's form of a scan: the weight is carried, comes out unchanged, and is used again."""
    w, h = scan(lambda carry, _: (carry[0], tanh_layer(*carry)), (w, x), None, length=3)
    return h @ w


def scan_returning_its_rows(w, x):
    h, rows = lax.scan(lambda h, w: (tanh_layer(w, h), w), x, w)
    return scan(lambda h, w: tanh_layer(w, h), h, rows)


def remat_returning_the_weight(w, x):
    h, w = jax.checkpoint(lambda w, x: (tanh_layer(w, x), w))(w, x)
    return h @ w


STACK = {"w": normal(L, I, I)}
CONTROL = {
    "jit": one(inner_jit, (I, O), (B, I)),
    "nested and named jit": one(nested_jit, (I, I), (B, I)),
    "checkpoint": one(remat(), (I, I), (B, I)),
    "checkpoint, nothing_saveable": one(remat(POLICIES.nothing_saveable), (I, I), (B, I)),
    "checkpoint, everything_saveable": one(remat(POLICIES.everything_saveable), (I, I), (B, I)),
    "checkpoint, dots_saveable": one(remat(POLICIES.dots_saveable), (I, I), (B, I)),
    "checkpoint, dots with no batch axes": one(remat(POLICIES.dots_with_no_batch_dims_saveable), (I, I), (B, I)),
    "checkpoint, named": one(remat(POLICIES.save_only_these_names("hidden")), (I, I), (B, I)),
    "checkpoint, prevent_cse=False": one(remat(prevent_cse=False), (I, I), (B, I)),
    "named_call": one(jax.named_call(tanh_layer, name="layer"), (I, O), (B, I)),
    "named_scope": one(lambda w, x: jax.named_scope("layer")(tanh_layer)(w, x), (I, O), (B, I)),
    "cond": Case(lambda p, *a: branches(p["w"], *a), {"w": normal(I, O)}, (normal(B, I), jnp.int32(1))),
    "cond, the other branch": Case(lambda p, *a: branches(p["w"], *a), {"w": normal(I, O)}, (normal(B, I), jnp.int32(-1))),
    "cond, closed over": Case(lambda p, *a: closed_branches(p["w"], *a), {"w": normal(I, O)}, (normal(B, I), jnp.int32(1))),
    "switch": Case(lambda p, *a: three_branches(p["w"], *a), {"w": normal(I, O)}, (normal(B, I), jnp.int32(1))),
    "python loop over w[i]": one(python_loop, (L, I, I), (B, I)),
    "fori_loop over w[i]": one(lambda w, x: lax.fori_loop(0, L, lambda i, h: tanh_layer(w[i], h), x), (L, I, I), (B, I)),
    "fori_loop over dynamic_index": one(
        lambda w, x: lax.fori_loop(0, L, lambda i, h: tanh_layer(lax.dynamic_index_in_dim(w, i, keepdims=False), h), x),
        (L, I, I), (B, I),
    ),
    "fori_loop, one weight at all depths": one(
        lambda w, x: lax.fori_loop(0, 3, lambda i, h: tanh_layer(w, h), x), (I, I), (B, I)
    ),
    "scan over the stack": one(lambda w, x: scan(lambda h, w: tanh_layer(w, h), x, w), (L, I, I), (B, I)),
    "scan in reverse, unrolled": one(
        lambda w, x: scan(lambda h, w: tanh_layer(w, h), x, w, reverse=True, unroll=2), (L, I, I), (B, I)
    ),
    "scan over w[i]": one(lambda w, x: scan(lambda h, i: tanh_layer(w[i], h), x, jnp.arange(L)), (L, I, I), (B, I)),
    "scan over time, the weight closed over": one(
        lambda w, xs: scan(lambda h, x: jnp.tanh(x + h @ w), jnp.zeros((B, I)), xs), (I, I), (T, B, I)
    ),
    "scan with the weight in its carry": one(scan_threading_the_weight, (I, I), (B, I)),
    "scan that returns its rows": one(scan_returning_its_rows, (L, I, I), (B, I)),
    "remat that returns the weight": one(remat_returning_the_weight, (I, I), (B, I)),
    "scan over axis 1": one(
        lambda w, x: scan(lambda h, w: tanh_layer(w, h), x, jnp.moveaxis(w, 1, 0)), (I, L, I), (B, I)
    ),
    "scan of a remat": one(
        lambda w, x: scan(jax.checkpoint(lambda h, w: tanh_layer(w, h)), x, w), (L, I, I), (B, I)
    ),
    "scan of a scan": one(scan_of_scan, (2, L, I, I), (B, I)),
    "scan of a cond of a remat": Case(
        lambda p, *a: scan_of_cond_of_remat(p["w"], *a), STACK, (normal(B, I), jnp.asarray([True, False, True]))
    ),
    "cond of a scan": Case(lambda p, *a: cond_of_scan(p["w"], *a), STACK, (normal(B, I), jnp.int32(1))),
    "remat of a scan of a jit": one(remat_of_scan_of_jit, (L, I, I), (B, I)),
    "lax.map over the stack": one(lambda w, x: lax.map(lambda w: x @ w, w), (L, I, O), (B, I)),
}  # fmt: skip

# -- transformations inside the model, sharding, experts ---------------------------------------------------------------


def force(w, x):
    return -jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w) ** 2))(x)


def laplacian(w, x):
    return jnp.trace(jax.hessian(lambda x: jnp.sum(jnp.tanh(x @ w)))(x))


def inner_step(w, x):
    """One step of gradient descent inside the model: the weight meets its own gradient."""
    return x @ (w - 0.1 * jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w))


def sharded(in_specs: Any, out_specs: Any, body: Callable[..., Any]) -> Callable[..., Any]:
    return jax.shard_map(body, mesh=MESH, in_specs=in_specs, out_specs=out_specs)


def experts(w, x, gates):
    hidden = jnp.einsum("td,edf->tef", x, w)
    return jnp.einsum("tef,te->tf", jnp.tanh(hidden), gates)


def choice(w, x, ids):
    return jnp.einsum("td,tdf->tf", x, w[ids])


def fire_and_forget(w, x):
    return jnp.stack([jax.vmap(lambda row: row @ w)(x), jax.vmap(lambda row: row @ w, in_axes=0)(x)])


SIZES = jnp.asarray([2, 0, 3, 1], jnp.int32)
INSIDE = {
    "grad of the input": one(force, (I, O), (B, I)),
    "hessian of the input": one(laplacian, (I, O), (I,)),
    "jvp": one(lambda w, x, v: jax.jvp(lambda x: jnp.tanh(x @ w), (x,), (v,))[1], (I, O), (B, I), (B, I)),
    "vmap over rows": one(fire_and_forget, (I, O), (B, I)),
    "vmap over the stack": one(lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x), (L, I, O), (L, B, I)),
    "vmap over the last axis": one(
        lambda w, x: jax.vmap(lambda w, x: x @ w, in_axes=(2, 0))(w, x), (I, O, L), (L, B, I)
    ),
    "shard_map, replicated": one(sharded((P(), P("model")), P("model"), lambda w, x: jnp.tanh(x @ w)), (I, O), (8, I)),
    "shard_map, outputs": one(sharded((P(None, "model"), P()), P(None, "model"), lambda w, x: x @ w), (I, 32), (B, I)),
    "shard_map, inputs": one(
        sharded((P("model"), P(None, "model")), P(), lambda w, x: lax.psum(x @ w, "model")), (16, O), (B, 16)
    ),
    "shard_map, stacked over devices": one(
        sharded((P("model"), P("model")), P("model"), lambda w, x: jnp.einsum("ebi,eio->ebo", x, w)), (8, I, O), (8, B, I)
    ),
    "shard_map over a scan": one(
        sharded((P(), P("model")), P("model"), lambda w, x: scan(lambda h, w: tanh_layer(w, h), x, w)), (L, I, I), (8, I)
    ),
    "experts, all": one(experts, (E, I, O), (T, I), (T, E)),
    "experts, dispatched": einsum("ecd,edf->ecf", (E, I, O), (E, T, I)),
    "expert of each token": Case(
        lambda p, *a: choice(p["w"], *a), {"w": normal(E, I, O)}, (normal(T, I), jnp.asarray([3, 0, 0, 2]))
    ),
    "ragged_dot": Case(lambda p, x: lax.ragged_dot(x, p["w"], SIZES), {"w": normal(E, I, O)}, (normal(6, I),)),
}  # fmt: skip

# -- materialised, exactly ---------------------------------------------------------------------------------------------


@jax.custom_vjp
def own_backward(w, x):
    return x @ w


own_backward.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T)
)  # fmt: skip


@jax.custom_jvp
def own_jvp(w, x):
    return jnp.tanh(x @ w)


@own_jvp.defjvp
def _own_jvp(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    y = jnp.tanh(x @ w)
    return y, (1 - y**2) * (dx @ w + x @ dw)


def weight_norm(w, x, g):
    return x @ (g[None] * w / jnp.linalg.norm(w, axis=0, keepdims=True))


def spectral_norm(w, x, u):
    for _ in range(2):
        v = u @ w
        v = v / jnp.linalg.norm(v)
        u = w @ v
        u = u / jnp.linalg.norm(u)
    sigma = lax.stop_gradient(u) @ w @ lax.stop_gradient(v)
    return x @ (w / sigma)


def standardised(w, x):
    """A kernel standardised as big_vision's BiT does it."""
    centred = w - jnp.mean(w, axis=0, keepdims=True)
    return x @ (centred / jnp.sqrt(jnp.var(w, axis=0, keepdims=True) + 1e-5))


def fixed_point(w, x):
    """A linear solve that differentiates implicitly."""
    return jax.scipy.sparse.linalg.cg(lambda h: h + w.T @ (w @ h), x, maxiter=20)[0]


DENSE = {
    "custom_vjp": one(own_backward, (I, O), (B, I), dense=True),
    "custom_jvp": one(own_jvp, (I, O), (B, I), dense=True),
    "weight norm": one(weight_norm, (I, O), (B, I), (O,), dense=True),
    # A chain of products, and a scale: factored after all.
    "spectral norm": one(spectral_norm, (I, O), (B, I), (I,))._replace(op_by_op=True),
    "standardised": one(standardised, (I, O), (B, I), dense=True),
    "a step of gradient descent": one(inner_step, (I, O), (B, I), dense=True),
    "implicit solve": one(fixed_point, (I, I), (I,), dense=True),
    "masked weight": one(lambda w, x: x @ (w * jnp.tril(jnp.ones((I, I)))), (I, I), (B, I), dense=True),
    "penalty on the weight": one(lambda w, x: jnp.sum(x @ w) + jnp.sum(w**2), (I, O), (B, I), dense=True),
    "exponential of the weight": one(lambda w, x: x @ jnp.exp(w), (I, O), (B, I), dense=True),
    "cond that picks a weight": Case(
        lambda p, x, c: x @ lax.cond(c > 0, lambda w: w, lambda w: 2.0 * w, p["w"]), {"w": normal(I, O)},
        (normal(B, I), jnp.int32(-1)), ("w",),
    ),
    "concatenated weights": Case(
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], axis=1), {"w": normal(I, O), "v": normal(I, T, seed=1)},
        (normal(B, I),), ("v", "w"),
    ),
}  # fmt: skip

CASES = {**PRODUCTS, **SHAPED, **CONTROL, **INSIDE, **DENSE}


# One row per class of rules, by primitive and by the role of the axis that it moves.
CLASSES = (
    "x @ w", "einsum bilinear form", "index rows", "tied embedding", "flattened heads", "both scales", "checkpoint, dots_saveable",
    "cond", "fori_loop over w[i]", "scan in reverse, unrolled", "shard_map over a scan", "ragged_dot", "custom_vjp",
)  # fmt: skip


@pytest.mark.parametrize("name", others(CASES, CLASSES))
def test_values_are_those_of_the_merged_weights(name):
    check_values(CASES[name])


@pytest.mark.parametrize("name", thorough(CASES, "test_values_are_those_of_the_merged_weights", CLASSES))
def test_agrees_with_the_merged_weights(name):
    check(CASES[name])


def test_the_table_is_wide_and_nearly_all_factored():
    dense = [name for name, case in CASES.items() if case.dense]
    assert len(CASES) >= 120 and len(dense) <= 14, dense
