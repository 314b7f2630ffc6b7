"""Axes of size 0, 1 and n, spanned or not: whatever a function does to a weight, it is right by value and gradient.

The numbers are small and whole, so that float32 sums are exact in any order and every comparison is of bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.lax import GatherScatterMode as Mode

import jlora
from jlora.transform.interpret import trace_weights
from jlora.transform.trace import Trace
from jlora.transform.weight import NotSeparable
from tests.test_weight import Form, built, make, whole


class Case(NamedTuple):
    """A function of one weight; whether the adapter stays apart in it."""

    fn: Callable[[jax.Array], jax.Array]
    factored: bool = True


def compare(cases: dict[Any, tuple[Form, Case]]) -> None:
    """Value and gradient of every part against the dense weight's, bit for bit. All cases are one program."""

    def sides(name: Any) -> Any:
        form, (fn, factored) = cases[name]
        weight = make(form)
        parts = {n: getattr(weight, n) for n in ("a", "b", "gain") if getattr(weight, n) is not None}

        def lazy(parts: Any) -> jax.Array:
            trace = Trace()
            value = trace_weights(fn, [weight.replace(**parts)], trace)
            assert all(use.factored or use.op == "return" for use in trace.uses) == factored, (name, trace.uses)
            return value

        def dense(parts: Any) -> jax.Array:
            value = weight.w + jnp.sum(parts["a"] * parts["b"], -1) if "a" in parts else weight.w
            return fn(value * parts["gain"] if "gain" in parts else value)

        def loss(of: Any, parts: Any) -> Any:
            value = of(parts)
            return jnp.vdot(whole(*value.shape, seed=5), jnp.where(jnp.isfinite(value), value, 0.0)), value

        both = [jax.grad(functools.partial(loss, of), has_aux=True)(parts) for of in (lazy, dense)]
        assert both[0][1].shape == both[1][1].shape, (name, both[0][1].shape, both[1][1].shape)
        return both

    assert cases
    every = jax.jit(lambda: [sides(name) for name in cases])()
    for name, both in zip(cases, every, strict=True):
        jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=str(name)), *both)


SIZES = [(1, 3), (3, 1), (1, 1), (0, 3), (3, 0), (0, 1), (2, 3)]
SPANS = [
    ((0,), (1,), None),
    ((0,), (1,), (1,)),
    ((1,), (0,), (0,)),
    ((), (0, 1), ()),
    ((0, 1), (1,), (0, 1)),
    ((), (1,), None),
]
every_size = pytest.mark.parametrize("shape", SIZES, ids=str)


def forms(shape: tuple[int, ...]) -> dict[str, Form]:
    return {f"{shape} a{a} b{b} gain{g}": Form(shape, a, b, g) for a, b, g in SPANS}


# -- structure ---------------------------------------------------------------------------------------------------------


def structures(shape: tuple[int, ...]) -> dict[str, tuple[Any, Any]]:
    """What stays in the form (or is refused), and what NumPy makes of it."""
    n, m = shape
    half = (max(n - 1, 0), m)
    factor = whole(n, 1, seed=8)
    return {
        "transpose": (lambda w: w.transpose((1, 0)), lambda w: w.T),
        "rev": (lambda w: w.rev((0, 1)), lambda w: w[::-1, ::-1]),
        "new axes": (lambda w: w.reshape((1, n, 1, m)), lambda w: w.reshape(1, n, 1, m)),
        "and back": (lambda w: w.reshape((n, 1, m)).reshape(shape), lambda w: w),
        "merged": (lambda w: w.reshape((n * m,)), lambda w: w.reshape(n * m)),
        "broadcast": (lambda w: w.broadcast_in_dim((2, n, m), (1, 2)), lambda w: np.broadcast_to(w, (2, n, m))),
        "empty": (lambda w: w.slice((0, 0), (n, 0), None), lambda w: w[:, :0]),
        "short": (lambda w: w.slice((0, 0), half, None), lambda w: w[: half[0]]),
        "dynamic": (lambda w: w.dynamic_slice((np.int32(5), np.int32(0)), half), lambda w: w[n - half[0] :]),
        "padded": (lambda w: w.pad(np.float32(2), ((1, 2, 0), (0, 0, 0))), lambda w: np.pad(w, ((1, 2), (0, 0)), constant_values=2)),
        "padded behind": (lambda w: w.pad(np.float32(0), ((0, 0, 0), (0, 1, 0))), lambda w: np.pad(w, ((0, 0), (0, 1)))),
        "scaled": (lambda w: w.scale(factor), lambda w: np.asarray(factor) * w),
        "scaled by one": (lambda w: w.scale(jnp.full((1, 1), 3.0)), lambda w: 3 * w),
        "broadcast and cut": (
            lambda w: w.broadcast_in_dim((2, n, m), (1, 2)).slice((1, 0, 0), (2, n, m), None).reshape(shape),
            lambda w: w,
        ),
    }  # fmt: skip


@every_size
def test_structural_operations(shape):
    expected, acts = {}, {}
    for name, form in forms(shape).items():
        weight = make(form)
        for op, (lazy, dense) in structures(shape).items():
            try:
                jax.eval_shape(lazy, weight)
            except NotSeparable:
                acts[name, op] = None
                continue
            acts[name, op] = functools.partial(lazy, weight)
            expected[name, op] = dense(built(weight))
    names = list(expected)
    got = dict(zip(names, jax.jit(lambda: [acts[name]() for name in names])(), strict=True))
    for name, weight in got.items():
        assert weight.shape == expected[name].shape, name
        for part in (weight.a, weight.b, weight.gain):
            assert part is None or all(n in (1, m) for n, m in zip(part.shape, weight.shape, strict=False)), name
        np.testing.assert_array_equal(np.broadcast_to(built(weight), weight.shape), expected[name], err_msg=str(name))
    refused = {op for (_, op), act in acts.items() if act is None}
    assert refused <= {"merged", "padded", "padded behind", "scaled"}
    if 1 in shape:  # what is constant along an axis of size 1 has it as well
        plain = f"{shape} a(0,) b(1,) gainNone"
        assert all(acts[plain, op] for op in structures(shape))


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("rank_of_one", [False, True])
def test_scans_over_stacked_weights(length, rank_of_one):
    """Scans of no, one and two layers: the carry through every layer, and the outputs that a scan stacks."""

    def chain(w):
        return lax.scan(lambda x, w: (x @ w, None), whole(2, 3, seed=6), w)[0]

    def rows(w):
        return lax.scan(lambda x, w: (x, w.T), 0.0, w)[1] @ whole(3, 2, seed=6)

    def both(w):
        end, ys = lax.scan(lambda x, w: (x, jnp.ones((2, 3)) @ w), 0.0, w, reverse=True)
        return ys + end

    cases = {
        (fn.__name__, spans): (Form((length, 3, 3), *spans), Case(fn))
        for fn in (chain, rows, both)
        for spans in (((0, 1), (0, 2)), ((1,), (2,)), ((1,), (0, 2)))
    }
    if rank_of_one:
        cases = {name: case for name, case in cases.items() if name[1] == ((0, 1), (0, 2))}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.test_weight.R", 1)
            compare(cases)
    else:
        compare(cases)


# -- look-ups ----------------------------------------------------------------------------------------------------------


def look_up(w, ids, mode, fill_value=None):
    """Rows `w[ids]` by a raw gather."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(ids.ndim, ids.ndim + w.ndim - 1)), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    return lax.gather(w, ids[..., None], numbers, (1, *w.shape[1:]), mode=mode, fill_value=fill_value)


MODES = {
    "clip": (Mode.CLIP, None),
    "promised": (Mode.PROMISE_IN_BOUNDS, None),
    "nan": (Mode.FILL_OR_DROP, None),
    "seven": (Mode.FILL_OR_DROP, 7.0),
}


def ids(rows: int, mode: str) -> dict[str, jax.Array]:
    """Indices with any number of axes; those out of bounds on either side are treated as the mode says."""
    inside = {"one": 0, "table": [[0], [rows - 1]], "none": np.zeros((0,), int)}
    outside = {"out": rows, "some out": [0, rows + 3, rows - 1, -2]} if mode != "promised" else {}
    return {name: jnp.asarray(at, jnp.int32) for name, at in {**inside, **outside}.items()}


TABLES = [((0,), (1,), None), ((0,), (1,), (1,)), ((1,), (0,), (0, 1)), ((), (1,), (1,))]


@pytest.mark.parametrize("shape", [(1, 3), (1, 0), (4, 2)], ids=str)
def test_rows_of_a_table(shape):
    compare(
        {
            (mode, name, spans): (Form(shape, *spans), Case(lambda w, at=at, mode=mode: look_up(w, at, *MODES[mode])))
            for mode in MODES
            for name, at in ids(shape[0], mode).items()
            for spans in TABLES
        }
    )


@pytest.mark.parametrize("experts", [1, 3])
def test_experts_that_are_looked_up(experts):
    """One kernel per row of x: the batch comes from the look-up, also of one expert."""
    at = jnp.asarray([0, experts - 1, 0, 0])
    uses = {
        "einsum": lambda w: jnp.einsum("bi,bio->bo", whole(4, 2, seed=6), w[at]),
        "matmul": lambda w: whole(4, 1, 2, seed=6) @ w[at],
        "transposed": lambda w: jnp.einsum("bo,bio->bi", whole(4, 3, seed=6), w[at]),
        "scaled": lambda w: jnp.einsum("bi,bio->bo", whole(4, 2, seed=6), w[at] * 2.0),
        "one": lambda w: whole(4, 2, seed=6) @ w[at[1]],
        "out of bounds": lambda w: jnp.einsum("bi,bio->bo", whole(4, 2, seed=6), jnp.take(w, at + 1, 0, mode="fill", fill_value=1)),
        "mapped": lambda w: jax.vmap(lambda i, x: x @ w[i])(at, whole(4, 2, seed=6)),
        "mapped slice": lambda w: jax.vmap(lambda i, x: x @ lax.dynamic_index_in_dim(w, i, 0, False))(at, whole(4, 2, seed=6)),
        "taken": lambda w: jnp.einsum("bi,bio->bo", whole(4, 2, seed=6), jnp.take(w, at, axis=0, mode="clip")),
    }  # fmt: skip
    spans = [((0, 1), (0, 2), (0, 2)), ((1,), (0, 2), None), ((0, 2), (0, 1), (0, 1))]
    compare({(name, s): (Form((experts, 2, 3), *s), Case(fn)) for name, fn in uses.items() for s in spans})


WINDOWS = {
    # offset_dims, collapsed, start_index_map, slice_sizes
    "narrow, not looked up": ((1,), (0,), (0,), (1, 2)),
    "narrow, kept": ((1, 2), (), (0,), (1, 2)),
    "rows": ((1, 2), (), (0,), (2, 3)),
    "rows and columns": ((1, 2), (), (0, 1), (2, 2)),
    "one element": ((), (0, 1), (0, 1), (1, 1)),
    "one element, backwards": ((), (0, 1), (1, 0), (1, 1)),
    "all of it": ((1, 2), (), (0, 1), (4, 3)),
    "column": ((1,), (1,), (1,), (4, 1)),
    "nothing looked up": ((1, 2), (), (), (2, 3)),
    "empty": ((1, 2), (), (0,), (0, 3)),
}


FILLED = "test_an_index_of_few_bits_is_compared_as_it_is"  # the rule of "nan" and "seven"


@pytest.mark.parametrize(
    ("mode", "batch"),
    [
        pytest.param(
            mode, batch, marks=pytest.mark.thorough(FILLED) if (mode, batch) in [("nan", 1), ("seven", 0)] else ()
        )
        for mode, batch in [*((mode, 1) for mode in MODES), ("seven", 0)]
    ],
)
def test_windows_of_a_raw_gather(mode, batch):
    """Slices that are narrower than their axis, wherever the indices point."""
    cases = {}
    for name, (offset, collapsed, mapped, sizes) in WINDOWS.items():
        numbers = lax.GatherDimensionNumbers(tuple(i - 1 + batch for i in offset), collapsed, mapped)
        starts = np.asarray([[0, 1], [1, 0], [2, 1], [9, 0], [0, 9], [-1, 0]], np.int32)
        if mode == "promised":
            starts = np.stack([np.minimum(starts[:, k], (4, 3)[k] - sizes[k]) for k in (0, 1)], 1).clip(0)
        at = starts[:, list(mapped)] if batch else starts[1, list(mapped)]

        def fn(w, at=at, numbers=numbers, sizes=sizes):
            how, fill = MODES[mode]
            return lax.gather(w, jnp.asarray(at), numbers, sizes, mode=how, fill_value=fill)

        for spans in (((0,), (1,), (1,)), ((1,), (0,), None), ((), (1,), ())):
            cases[name, spans] = (Form((4, 3), *spans), Case(fn))
    compare(cases)


def test_an_index_of_few_bits_is_compared_as_it_is():
    """A table of 300 rows that is looked up by uint8, where row 299 is no uint8."""
    at = jnp.asarray([0, 255, 7], jnp.uint8)
    compare({"": (Form((300, 2), (), (1,), (1,)), Case(lambda w: look_up(w, at, *MODES["seven"])))})


# -- products ----------------------------------------------------------------------------------------------------------


def conv(x, w, padding="SAME", groups=1, numbers=("NWC", "WIO", "NWC")):
    return lax.conv_general_dilated(x, w, (1,), padding, dimension_numbers=numbers, feature_group_count=groups)


def test_convolutions_with_axes_of_size_one_and_broadcast_kernels():
    x = whole(2, 5, 4, seed=6)
    wide = lambda w: jnp.broadcast_to(w, (3, 4, 6))
    cases = {
        "window": (Form((4, 6), (0,), (1,)), lambda w: conv(x, wide(w))),
        "window to one": (Form((4, 6), (0,), (1,)), lambda w: conv(x[:, :3], wide(w), "VALID")),
        "window, gain": (Form((4, 6), (0,), (1,), (1,)), lambda w: conv(x, wide(w))),
        "inputs": (Form((3, 1, 6), (0, 1), (2,)), lambda w: conv(x, wide(w))),
        "outputs": (Form((3, 4, 1), (0, 1), (2,)), lambda w: conv(x, wide(w))),
        "outputs, gain": (Form((3, 4, 1), (0, 1), (2,), (2,)), lambda w: conv(x, wide(w))),
        "all but the outputs": (Form((1, 1, 6), (0, 1), (2,)), lambda w: conv(x, wide(w))),
        "all": (Form((1, 1, 1), (0, 1), (2,), ()), lambda w: conv(x, wide(w))),
        "inputs, transposed": (Form((3, 1, 6), (0, 2), (1,)), lambda w: conv(x, wide(w))),
        "outputs, transposed": (Form((3, 4, 1), (2, 0), (1,)), lambda w: conv(x, wide(w))),
        "window, transposed": (Form((1, 4, 6), (2,), (1,)), lambda w: conv(x, wide(w))),
        "depthwise blur": (Form((3, 1, 1), (0,), (1, 2)), lambda w: conv(x, jnp.broadcast_to(w, (3, 1, 4)), groups=4)),
        "depthwise": (Form((3, 1, 4), (0, 1), (2,), (2,)), lambda w: conv(x, w, groups=4)),
        "groups": (Form((1, 2, 6), (0, 1), (2,)), lambda w: conv(x, jnp.broadcast_to(w, (3, 2, 6)), groups=2)),
        "one of everything": (Form((1, 1, 1), (0, 1), (2,), (2,)), lambda w: conv(x[..., :1], w)),
        "one output": (Form((3, 4, 1), (0, 1), (2,), (1,)), lambda w: conv(x, w)),
        "no row": (Form((3, 4, 6), (0, 1), (2,), (2,)), lambda w: conv(x[:0], w)),
        "no output": (Form((3, 4, 0), (0, 1), (2,), (2,)), lambda w: conv(x, w)),
        "no input": (Form((3, 0, 6), (0, 1), (2,), (1,)), lambda w: conv(x[..., :0], w)),
    }
    compare({name: (form, Case(fn)) for name, (form, fn) in cases.items()})


def test_ragged_products():
    """Groups of one and of no row; one input, one output; factors that the groups share."""

    def dot(form, sizes):
        rows = whole(4, form.shape[1], seed=6)
        return form, Case(lambda w: lax.ragged_dot(rows, w, jnp.asarray(sizes, jnp.int32)))

    compare(
        {
            "plain": dot(Form((3, 2, 5), (0, 1), (0, 2)), [1, 0, 3]),
            "exchanged": dot(Form((3, 2, 5), (0, 2), (0, 1)), [1, 0, 2]),
            "one group": dot(Form((1, 2, 5), (0, 1), (0, 2)), [4]),
            "one input": dot(Form((2, 1, 5), (0, 1), (0, 2)), [2, 2]),
            "one output": dot(Form((2, 2, 1), (0, 2), (0, 1)), [2, 1]),
            "one of everything": dot(Form((1, 1, 1), (0, 1), (0, 2)), [3]),
            "shared inputs": dot(Form((3, 2, 5), (1,), (0, 2)), [1, 0, 3]),
            "shared outputs": dot(Form((3, 2, 5), (0, 1), (2,)), [1, 0, 3]),
            "constant inputs": dot(Form((3, 2, 5), (0,), (0, 2)), [1, 0, 3]),
        }
    )


def test_products_of_nothing():
    """Products whose weight has no input or no output, or whose input has no row or an empty batch."""
    x = lambda *shape: whole(*shape, seed=6)
    cases = {
        "no input": (Form((0, 3), (0,), (1,), (1,)), lambda w: x(2, 0) @ w),
        "no output": (Form((3, 0), (0,), (1,), (0,)), lambda w: x(2, 3) @ w),
        "no row": (Form((3, 2), (0,), (1,), (1,)), lambda w: x(0, 3) @ w),
        "nothing": (Form((0, 0), (0,), (1,)), lambda w: x(0, 0) @ w),
        "no expert": (Form((0, 3, 2), (0, 1), (0, 2), (0, 2)), lambda w: x(0, 4, 3) @ w),
        "one": (Form((1, 1), (0,), (1,), (0, 1)), lambda w: x(2, 1) @ w),
        "broadcast to none": (Form((1, 3, 2), (1,), (2,), (2,)), lambda w: x(0, 4, 3) @ jnp.broadcast_to(w, (0, 3, 2))),
        "broadcast inputs": (Form((1, 2), (0,), (1,)), lambda w: x(4, 3) @ jnp.broadcast_to(w, (3, 2))),
        "broadcast outputs": (Form((3, 1), (0,), (1,), (0,)), lambda w: x(4, 3) @ jnp.broadcast_to(w, (3, 2))),
        "no mapped row": (Form((3, 2), (0,), (1,)), lambda w: lax.map(lambda row: row @ w, x(0, 3))),
    }  # fmt: skip
    compare({name: (form, Case(fn)) for name, (form, fn) in cases.items()})


METHODS = (
    jlora.lora(2), jlora.lora(2, dropout=0.5), jlora.dora(2), jlora.ia3(), jlora.vera(2), jlora.loha(2), jlora.lokr(2),
    jlora.oft(2), jlora.adalora(8, total_steps=1000),
)  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 2)], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_on_weights_of_nothing(method, shape):
    """Methods on empty weights start, run, merge and have a gradient; only shapes are computed."""
    x = jnp.zeros((*shape[:-2], 3, shape[-2]))
    fn = lambda params, x: x @ params["w"]

    def run(w):
        params = {"w": w}
        adapted = jlora.apply(params, method=method, sites=jlora.sites(fn, params, x))
        loss = lambda factors: jnp.sum(jlora.lift(fn)(jlora.combine(factors, adapted), x))
        keyed = jlora.with_dropout(adapted, jax.random.key(0))
        return jlora.lift(fn)(keyed, x), jlora.merge(adapted)["w"], adapted.factors, jax.grad(loss)(adapted.factors)

    y, merged, factors, gradient = jax.eval_shape(run, jnp.zeros(shape))
    assert (y.shape, merged.shape) == ((*shape[:-2], 3, shape[-1]), shape)
    assert jax.tree.map(lambda f: f.shape, factors) == jax.tree.map(lambda g: g.shape, gradient)
