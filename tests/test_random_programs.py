"""Random programs: a weight of any shape and dtype, a chain of operations, a product; against the merged weight.

A program is drawn from its seed. One that fails is made smaller, step by step, as long as it fails; the message has the
seed and what is left. The default run has ten programs, the thorough tier ninety, `pytest -m endless` nine hundred more.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from jlora.transform.weight import Weight
from tests.tiers import thorough

METHODS = {
    "lora": jlora.lora(2, alpha=3),
    "dora": jlora.dora(2),
    "ia3": jlora.ia3(),
    "vera": jlora.vera(2),
    "loha": jlora.loha(2),
    "lokr": jlora.lokr(2),
    "oft": jlora.oft(2),
    "adalora": jlora.adalora(4, target_rank=2, total_steps=1000),
}
DTYPES = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2}  # of the largest value: the merge rounds to the dtype
Step = tuple[str, tuple[Any, ...]]


class Program(NamedTuple):
    """What a seed draws; `product` is the last step."""

    shape: tuple[int, ...]
    roles: str  # i, o or s for each axis: input, output, stack
    dtype: str
    method: str
    steps: tuple[Step, ...]
    product: Step


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape) * 0.5, jnp.float32)


# -- operations: (value, *arguments) -> value; and how their arguments are drawn, None where they do not fit -----------


@jax.custom_vjp
def _through(w: jax.Array) -> jax.Array:
    return w


_through.defvjp(lambda w: (w, None), lambda _, g: (2 * g,))


def _windowed(w: jax.Array, axis: int, at: tuple[int, ...], mode: str) -> jax.Array:
    return jnp.take(
        w, jnp.asarray(at, jnp.int32), axis=axis, mode=mode, **({"fill_value": 0} if mode == "fill" else {})
    )


def _fori(w: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 2, lambda _, x: x + w, jnp.zeros_like(w))


def _while(w: jax.Array) -> jax.Array:
    """Twice the weight by a while loop, behind stop_gradient: such loops have no reverse mode."""
    fixed = lax.stop_gradient(w)
    return w + lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] + fixed), (0, jnp.zeros_like(w)))[1]


OPS: dict[str, Callable[..., jax.Array]] = {
    "transpose": lambda w, order: jnp.transpose(w, order),
    "reshape": lambda w, shape: w.reshape(shape),
    "slice": lambda w, axis, start, stop, step: lax.slice_in_dim(w, start, stop, step, axis),
    "dynamic_slice": lambda w, axis, at, size: lax.dynamic_slice_in_dim(w, jnp.int32(at), size, axis),
    "index": lambda w, axis, at: lax.index_in_dim(w, at, axis, keepdims=False),
    "dynamic_index": lambda w, axis, at: lax.dynamic_index_in_dim(w, jnp.int32(at), axis, keepdims=False),
    "take": _windowed,
    "pad": lambda w, axis, low, high, value: lax.pad(
        w, jnp.asarray(value, w.dtype), [(low, high, 0) if i == axis else (0, 0, 0) for i in range(w.ndim)]
    ),
    "broadcast": lambda w, axis, n: jnp.broadcast_to(jnp.expand_dims(w, axis), (*w.shape[:axis], n, *w.shape[axis:])),
    "widen": lambda w, axis, n: jnp.broadcast_to(w, (*w.shape[:axis], n, *w.shape[axis + 1 :])),
    "rev": lambda w, axis: jnp.flip(w, axis),
    "concatenate": lambda w, axis: jnp.concatenate([w, 2 * w], axis),
    "stack": lambda w, axis: jnp.stack([w, w], axis),
    "cast": lambda w, dtype: w.astype(dtype),
    "scale": lambda w, shape: w * numbers(*shape, seed=3).astype(w.dtype),
    "divide": lambda w: w / jnp.asarray(2.0, w.dtype),
    "negate": lambda w: -w,
    "where": lambda w: jnp.where(numbers(*w.shape, seed=4) > 0, w, jnp.zeros_like(w)),
    "tanh": lambda w: jnp.tanh(w),
    "jit": lambda w: jax.jit(lambda w: jnp.swapaxes(w, 0, -1) * 1.0)(w),
    "remat": lambda w: jax.checkpoint(lambda w: jnp.sin(w))(w),
    "vmap": lambda w: jax.vmap(lambda row: row.T)(w),
    "custom_vjp": lambda w: _through(w),
    "scan": lambda w: lax.scan(lambda c, row: (c, row * 2.0), 0.0, w)[1],
    "map": lambda w: lax.map(lambda row: row.T, w),
    "fori": _fori,
    "while": _while,
    "cond": lambda w, at: lax.cond(jnp.int32(at) > 0, lambda: w, lambda: -w),
}
NEEDS_FLOAT32 = ("jit", "scan", "tanh", "remat")  # they hold constants of their own


def draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str) -> tuple[Any, ...] | None:
    """Arguments of an operation on a value of this shape."""
    ndim = len(shape)
    axis = int(rng.integers(ndim)) if ndim else 0
    n = shape[axis] if ndim else 0
    pick = lambda *values: values[int(rng.integers(len(values)))]
    if name in ("broadcast", "stack"):
        axis = int(rng.integers(ndim + 1))
        return None if ndim >= 5 else (axis, pick(0, 1, 2)) if name == "broadcast" else (axis,)
    if name == "cast":
        return (pick("float32", "float32", "bfloat16"),)
    if ndim == 0 or (name in NEEDS_FLOAT32 and dtype != "float32"):
        return None
    if name == "reshape":
        merged = tuple(int(np.prod(part)) for part in np.split(np.asarray(shape), [int(rng.integers(1, ndim + 1))]))
        flat = tuple(k for k in (shape[0], int(np.prod(shape[1:]))))
        return (
            pick(
                merged if len(merged) == 2 else shape, flat, (1, *shape), (*shape, 1), tuple(k for k in shape if k != 1)
            ),
        )
    if name == "widen":
        return (axis, pick(0, 2, 3)) if n == 1 else None
    if name in ("index", "dynamic_index"):
        return (axis, int(rng.integers(n))) if n else None
    arguments: dict[str, Callable[[], tuple[Any, ...]]] = {
        "transpose": lambda: (tuple(map(int, rng.permutation(ndim))),),
        "slice": lambda: (axis, min(1, n), n, pick(1, 2)),
        "dynamic_slice": lambda: (axis, int(rng.integers(-1, n + 2)), int(rng.integers(n + 1))),
        "take": lambda: (axis, pick((0,), (0, n - 1, n + 1), (-1, 0)), pick("fill", "clip")),
        "pad": lambda: (axis, pick(0, 1, 2), pick(0, 1), pick(0.0, 0.5)),
        "scale": lambda: (tuple(int(k) if rng.random() < 0.4 else 1 for k in shape),),
        "cond": lambda: (pick(0, 1),),
    }
    if name == "take" and n == 0:
        return None
    if name in ("rev", "concatenate"):
        return (axis,)
    return arguments[name]() if name in arguments else ()


# -- products ----------------------------------------------------------------------------------------------------------


def einsum(w: jax.Array, roles: str, first: bool) -> jax.Array:
    """Each axis of w is contracted, kept or a batch; the input has one axis of its own."""
    names = "abcdefg"[: w.ndim]
    mine = "".join(n for n, role in zip(names, roles, strict=True) if role != "o")
    out = "".join(n for n, role in zip(names, roles, strict=True) if role != "i")
    x = numbers(*(w.shape[names.index(n)] for n in mine), 2, seed=6).astype(w.dtype)
    spec = f"{names},{mine}x->{out}x" if first else f"{mine}x,{names}->x{out}"
    return jnp.einsum(spec, *((w, x) if first else (x, w)))


def conv(w: jax.Array) -> jax.Array:
    x = numbers(2, 4, w.shape[1], seed=6).astype(w.dtype)
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def ragged(w: jax.Array) -> jax.Array:
    sizes = jnp.asarray([2] + [1] * (w.shape[0] - 1), jnp.int32)
    return lax.ragged_dot(numbers(w.shape[0] + 2, w.shape[1], seed=6).astype(w.dtype), w, sizes)


def experts(w: jax.Array) -> jax.Array:
    at = jnp.asarray([0, w.shape[0] - 1, 0], jnp.int32)
    return jnp.einsum("bi,bi...->b...", numbers(3, w.shape[1], seed=6).astype(w.dtype), w[at])


PRODUCTS: dict[str, Callable[..., jax.Array]] = {
    "einsum": einsum,
    "conv": conv,
    "ragged": ragged,
    "experts": experts,
    "add": lambda w: numbers(*w.shape, seed=6).astype(w.dtype) + w,
}


def draw_product(rng: np.random.Generator, shape: tuple[int, ...]) -> Step:
    fitting = ["einsum", "einsum", "einsum", "add"]
    if len(shape) == 3 and all(shape):
        fitting += ["conv", "ragged", "experts"]
    name = str(rng.choice(fitting))
    if name != "einsum":
        return name, ()
    return name, ("".join(rng.choice(list("iiioos"), len(shape))), bool(rng.integers(2)))


# -- programs ----------------------------------------------------------------------------------------------------------


def run(program: Program, w: jax.Array) -> jax.Array:
    for name, arguments in program.steps:
        w = OPS[name](w, *arguments)
    name, arguments = program.product
    return PRODUCTS[name](w, *arguments)


def programs(seed: int) -> Program:
    rng = np.random.default_rng(seed)
    ndim = int(rng.choice([1, 2, 2, 2, 3, 3, 3, 4, 5]))
    shape = tuple(int(n) for n in rng.choice([0, 1, 1, 2, 3, 4] if rng.random() < 0.3 else [1, 2, 3, 4], ndim))
    roles = "".join(rng.permutation([*"io"[: min(ndim, 2)], *rng.choice(list("ios"), max(ndim - 2, 0))]))
    dtype = str(rng.choice(["float32", "float32", "bfloat16", "float16"]))
    steps: list[Step] = []
    value = jax.ShapeDtypeStruct(shape, dtype)
    for _ in range(int(rng.integers(0, 6))):
        name = str(rng.choice(list(OPS)))
        arguments = draw(rng, name, value.shape, str(value.dtype))
        if arguments is None or (value.size > 200 and name in ("broadcast", "stack", "concatenate")):
            continue
        value = jax.eval_shape(lambda w, name=name, arguments=arguments: OPS[name](w, *arguments), value)
        steps.append((name, arguments))
    return Program(shape, roles, dtype, str(rng.choice(list(METHODS))), tuple(steps), draw_product(rng, value.shape))


def adapted_of(program: Program) -> jlora.Adapted | None:
    """The weight with factors as after some training; None where the method does not take such a weight."""
    axes = [tuple(i for i, role in enumerate(program.roles) if role == kind) for kind in "ios"]
    site = jlora.Site("w", program.shape, program.dtype, *axes, "linear")
    params = {"w": numbers(*program.shape, seed=1).astype(program.dtype)}
    try:
        adapted = jlora.apply(params, method=METHODS[program.method], sites=(site,))
    except ValueError as error:
        if "does not divide" in str(error):  # a block of rotations
            return None
        raise
    moved = lambda f, i: (f + 0.3 * numbers(*f.shape, seed=i + 2)).astype(f.dtype)
    leaves, tree = jax.tree.flatten(adapted.factors)
    return adapted.replace(factors=jax.tree.unflatten(tree, [moved(f, i) for i, f in enumerate(leaves)]))


def difference(program: Program) -> str:
    """What is wrong with a program; "" where nothing is."""
    adapted = adapted_of(program)
    if adapted is None:
        return ""
    fn = lambda params: run(program, params["w"])

    def loss(factors: Any, of: Callable[[Any], jax.Array]) -> Any:
        value = of(jlora.combine(factors, adapted)).astype(jnp.float32)
        value = jnp.where(jnp.isfinite(value), value, 0.0)
        return jnp.vdot(numbers(*value.shape, seed=9), value), value

    sides = (jlora.lift(fn), lambda adapted: fn(jlora.merge(adapted)))

    @jax.jit
    def both(factors: Any) -> Any:
        return [jax.grad(functools.partial(loss, of=of), has_aux=True)(factors) for of in sides]

    try:
        got, expected = both(adapted.factors)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    if got[1].shape != expected[1].shape:
        return f"shape {got[1].shape}, expected {expected[1].shape}"
    tolerance = DTYPES["bfloat16" if ("cast", ("bfloat16",)) in program.steps else program.dtype]
    for name, *pair in zip(("gradient", "value"), got, expected, strict=True):
        size = max((float(np.max(np.abs(y), initial=0.0)) for y in jax.tree.leaves(pair[1])), default=0.0)
        for x, y in zip(*map(jax.tree.leaves, pair), strict=True):
            error = float(np.max(np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32)), initial=0.0))
            if not error <= tolerance * max(size, 1.0):
                return f"{name} off by {error:.3g} of {size:.3g}"
    return ""


def smaller(program: Program) -> list[Program]:
    """Programs with one step or one trait less."""
    steps = program.steps
    fewer = [program._replace(steps=steps[:i] + steps[i + 1 :]) for i in range(len(steps))]
    plain = [program._replace(**{name: to}) for name, to in (("method", "lora"), ("dtype", "float32"))]
    return fewer + [p for p in plain if p != program]


def is_valid(program: Program) -> bool:
    """Whether it runs on a plain weight."""
    try:
        jax.eval_shape(functools.partial(run, program), jax.ShapeDtypeStruct(program.shape, program.dtype))
    except (TypeError, ValueError, IndexError):
        return False
    return True


def check(seed: int) -> None:
    program = programs(seed)
    if not is_valid(program):
        return
    wrong = difference(program)
    if not wrong:
        return
    shrunk = program
    while found := [(p, w) for p in smaller(shrunk) if is_valid(p) and (w := difference(p))][:1]:
        shrunk, wrong = found[0]
    pytest.fail(f"seed {seed}: {wrong}\n  smallest: {shrunk}\n  drawn: {program}")


DRAWN = "test_a_hundred_programs_have_every_operation_product_and_method"


@pytest.mark.parametrize("ten", thorough(range(10), DRAWN, range(1)))
def test_random_programs(ten):
    for seed in range(10 * ten, 10 * ten + 10):
        check(seed)


@pytest.mark.endless
@pytest.mark.parametrize("ten", range(10, 100))
def test_more_random_programs(ten):
    for seed in range(10 * ten, 10 * ten + 10):
        check(seed)


def test_a_hundred_programs_have_every_operation_product_and_method():
    drawn = [programs(seed) for seed in range(100)]
    assert all(map(is_valid, drawn))  # `check` passes over others
    assert {name for program in drawn for name, _ in program.steps} == set(OPS)
    assert {program.product[0] for program in drawn} == set(PRODUCTS)
    assert {program.method for program in drawn} == set(METHODS)
    assert {len(program.shape) for program in drawn} == {1, 2, 3, 4, 5}
    assert {0, 1} <= {n for program in drawn for n in program.shape}


def test_a_fault_is_found_and_shrunk(monkeypatch):
    """A transpose that forgets a factor, in a program of three steps: it alone is left."""
    right = Weight.transpose

    def forgets(weight, permutation):
        moved = right(weight, permutation)
        return moved.replace(b=moved.b * 0)

    steps = (("negate", ()), ("transpose", ((1, 0),)), ("rev", (0,)))
    program = Program((3, 2), "io", "float32", "vera", steps, ("einsum", ("oi", False)))
    monkeypatch.setitem(globals(), "programs", lambda seed: program)
    monkeypatch.setattr(Weight, "transpose", forgets)
    with pytest.raises(pytest.fail.Exception) as failed:
        check(7)
    assert str(failed.value).startswith("seed 7: gradient off by ")
    assert "method='lora', steps=(('transpose', ((1, 0),)),)" in str(failed.value).split("drawn:")[0]
