"""The algebra of `Weight`: what is done to the parts is what NumPy does to the dense array, exactly.

The numbers are small and whole, so that float32 sums are exact in any order and every comparison is of bits.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jlora.transform.product import ADAPTED, PLAIN
from jlora.transform.weight import NotSeparable, Place, Weight, drop
from tests.conformance import close
from tests.tiers import thorough

R = 3


def whole(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).integers(-4, 5, shape), jnp.float32)


class Form(NamedTuple):
    """Which axes a, b and the gain span; an axis may be in none of them."""

    shape: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]
    gain: tuple[int, ...] | None = None


PLACE = Place("w", ((0,), (1,)))  # of two axes


def spanning(shape, axes) -> tuple[int, ...]:
    return tuple(n if i in axes else 1 for i, n in enumerate(shape))


def make(form: Form, keyed: bool = False) -> Weight:
    shape, a, b, gain = form
    return Weight(
        whole(*shape, seed=1),
        whole(*spanning(shape, a), R, seed=2),
        whole(*spanning(shape, b), R, seed=3),
        None if gain is None else whole(*spanning(shape, gain), seed=4),
        jax.random.split(jax.random.key(0), spanning(shape, set(a) & set(b))) if keyed else None,
        place=Place("w", tuple((i,) for i in range(len(shape)))),
    )


def built(weight: Weight) -> np.ndarray:
    """`gain * (w + sum over r of a b)` in NumPy."""
    w, a, b = (np.asarray(part, np.float64) for part in (weight.w, weight.a, weight.b))
    gain = 1.0 if weight.gain is None else np.asarray(weight.gain, np.float64)
    return gain * (w + np.sum(a * b, axis=-1))


DENSE = Form((4, 6), (0,), (1,))
TRANSPOSED = Form((6, 4), (1,), (0,))
HEADS = Form((4, 2, 3), (0,), (1, 2))
OUT = Form((2, 3, 4), (0, 1), (2,))
STACKED = Form((3, 4, 6), (0, 1), (0, 2))
CONV = Form((2, 2, 4, 6), (0, 1, 2), (3,))
ONES = Form((1, 6), (0,), (1,))
FORMS = {
    "dense": DENSE,
    "dense, gain out": DENSE._replace(gain=(1,)),
    "dense, gain in": DENSE._replace(gain=(0,)),
    "dense, gain of both": DENSE._replace(gain=(0, 1)),
    "dense, gain scalar": DENSE._replace(gain=()),
    "transposed, gain": TRANSPOSED._replace(gain=(0,)),
    "heads, gain": HEADS._replace(gain=(1, 2)),
    "out, gain": OUT._replace(gain=(2,)),
    "stacked": STACKED,
    "stacked, gain": STACKED._replace(gain=(0, 2)),
    "stacked, gain in": STACKED._replace(gain=(1,)),
    "conv, gain": CONV._replace(gain=(3,)),
    "one input, gain": ONES._replace(gain=(1,)),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def check(weight: Weight, cases: dict[Any, tuple[Callable[[Weight], Weight], Any]]) -> dict[Any, Weight]:
    """Every operation against its NumPy result. All of them are one program: compiling is what takes the time."""
    got = dict(zip(cases, jax.jit(lambda weight: [act(weight) for act, _ in cases.values()])(weight), strict=True))
    for name, (_, expected) in cases.items():
        try:
            check_one(got[name], np.asarray(expected))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return got


def check_one(weight: Weight, expected: np.ndarray) -> None:
    """Still factored, each part in broadcast form, and dense as expected."""
    assert isinstance(weight, Weight)
    assert weight.shape == expected.shape
    assert weight.ndim == expected.ndim == len(weight.origin)
    assert weight.rank == R
    for part, trailing in ((weight.a, (R,)), (weight.b, (R,)), (weight.gain, ()), (weight.key, ())):
        if part is not None:
            assert part.ndim == weight.ndim + len(trailing)
            assert part.shape[weight.ndim :] == trailing
            assert all(n in (1, m) for n, m in zip(part.shape, weight.shape, strict=False))
    np.testing.assert_array_equal(built(weight), expected)


@every_form
def test_dense_is_the_definition(form):
    weight = make(form)
    for moved in (
        weight,
        weight.transpose(range(weight.ndim)[::-1]),
        weight.broadcast_in_dim((2, *form.shape), range(1, weight.ndim + 1)),
    ):
        np.testing.assert_array_equal(moved.dense(), built(moved))
    delta = np.sum(np.asarray(weight.a) * np.asarray(weight.b), axis=-1)
    np.testing.assert_array_equal(np.broadcast_to(weight.delta(), weight.shape), np.broadcast_to(delta, weight.shape))


def test_a_weight_without_factors_is_its_base():
    w = whole(4, 6)
    probe = Weight(w, place=PLACE)
    assert probe.rank == 0
    assert probe.dense() is w


def test_dense_of_a_gain_alone():
    weight = make(DENSE._replace(gain=(1,))).replace(a=None, b=None)
    np.testing.assert_array_equal(weight.dense(), np.asarray(weight.gain) * np.asarray(weight.w))


def test_dense_sums_in_float32_and_casts_once():
    base = jnp.full((4, 6), 256.0, jnp.bfloat16)  # whose neighbour is 258
    weight = Weight(base, jnp.full((4, 1, R), 0.3), jnp.ones((1, 6, R)), jnp.full((1, 6), 1.0015), place=PLACE)
    assert weight.dense().dtype == jnp.bfloat16
    np.testing.assert_array_equal(weight.dense(), 258.0)  # 256.9 * 1.0015 = 257.29; cast before, 256 * 1.0015 = 256.38
    np.testing.assert_array_equal(weight.replace(gain=None).dense(), 256.0)


def test_dense_takes_the_highest_precision():
    program = jax.make_jaxpr(lambda w: w.dense())(make(DENSE))
    (product,) = (eqn for eqn in program.eqns if eqn.primitive.name == "dot_general")
    assert product.params["precision"] == (lax.Precision.HIGHEST,) * 2


# -- operations that stay in the form ----------------------------------------------------------------------------------


@every_form
def test_astype(form):
    weight = make(form)
    cast = weight.astype(jnp.bfloat16)
    assert cast.w.dtype == jnp.bfloat16
    assert cast.a is weight.a and cast.b is weight.b and cast.gain is weight.gain
    np.testing.assert_array_equal(cast.dense(), jnp.asarray(built(weight), jnp.float32).astype(jnp.bfloat16))


@every_form
def test_transpose(form):
    weight = make(form, keyed=True)
    orders = list(itertools.permutations(range(weight.ndim)))
    moved = check(weight, {p: (lambda w, p=p: w.transpose(p), np.transpose(built(weight), p)) for p in orders})
    for order, result in moved.items():
        assert result.origin == tuple((i,) for i in order)


RESHAPES = [
    (DENSE, (2, 2, 6), ((0,), (0,), (1,))),
    (DENSE, (4, 3, 2), ((0,), (1,), (1,))),
    (DENSE, (2, 2, 2, 3), ((0,), (0,), (1,), (1,))),
    (DENSE, (4, 1, 6), ((0,), (), (1,))),
    (DENSE, (1, 4, 6, 1), ((), (0,), (1,), ())),
    (DENSE, (4, 6), ((0,), (1,))),
    (HEADS, (4, 6), ((0,), (1, 2))),
    (HEADS, (2, 2, 6), ((0,), (0,), (1, 2))),
    (HEADS, (4, 3, 2), ((0,), (1, 2), (1, 2))),
    (OUT, (6, 4), ((0, 1), (2,))),
    (OUT, (3, 2, 4), ((0, 1), (0, 1), (2,))),
    (STACKED, (3, 2, 2, 6), ((0,), (1,), (1,), (2,))),
    (STACKED, (1, 3, 4, 6), ((), (0,), (1,), (2,))),
    (CONV, (4, 4, 6), ((0, 1), (2,), (3,))),
    (CONV, (16, 6), ((0, 1, 2), (3,))),
    (ONES, (6,), ((1,),)),
    (ONES, (1, 1, 2, 3), ((0,), (), (1,), (1,))),
]


@pytest.mark.parametrize(("form", "shape", "origin"), RESHAPES)
def test_reshape(form, shape, origin):
    for gain in (None, form.a, form.b):
        weight = make(form._replace(gain=gain))
        there = (lambda w: w.reshape(shape), built(weight).reshape(shape))
        back = (lambda w: w.reshape(shape).reshape(form.shape), built(weight))
        changed = check(weight, {"there": there, "back": back})["there"]
        longer = [i for i, n in enumerate(shape) if n > 1]  # what an axis of size 1 comes from says nothing
        assert [changed.origin[i] for i in longer] == [origin[i] for i in longer]


@pytest.mark.parametrize(
    ("form", "shape"),
    [(DENSE, (24,)), (DENSE, (6, 4)), (DENSE, (2, 12)), (HEADS, (8, 3)), (OUT, (2, 12)), (STACKED, (12, 6)), (STACKED, (3, 24)),
     (CONV, (4, 24)), (CONV, (2, 2, 24))],
)  # fmt: skip
def test_reshape_that_merges_inputs_with_outputs_is_refused(form, shape):
    with pytest.raises(NotSeparable) as refused:
        make(form).reshape(shape)
    assert str(refused.value) == f"reshape of {form.shape} to {shape} merges an input with an output axis"


def test_reshape_that_merges_a_part_of_a_gain_is_refused():
    with pytest.raises(NotSeparable, match=r"^reshape of \(4, 2, 3\) to \(4, 6\) merges an input with an output axis$"):
        make(HEADS._replace(gain=(2,))).reshape((4, 6))


def test_reshape_of_a_weight_that_is_only_followed_is_never_refused():
    probe = Weight(whole(4, 6), place=PLACE)
    flat = probe.reshape((24,))
    np.testing.assert_array_equal(flat.w, np.ravel(probe.w))
    assert flat.origin == ((0, 1),)


@every_form
def test_broadcast_in_dim(form):
    weight, n = make(form), len(form.shape)
    first, middle = (5, *form.shape), (form.shape[0], 5, *form.shape[1:])
    cases = {
        "first": (lambda w: w.broadcast_in_dim(first, range(1, n + 1)), np.broadcast_to(built(weight), first)),
        "middle": (
            lambda w: w.broadcast_in_dim(middle, (0, *range(2, n + 1))),
            np.broadcast_to(built(weight)[:, None], middle),
        ),
    }
    got = check(weight, cases)
    assert got["first"].origin == ((), *weight.origin)
    assert got["middle"].origin == (weight.origin[0], (), *weight.origin[1:])


def test_broadcast_in_dim_of_an_axis_of_size_one():
    weight = make(Form((1, 6), (), (1,), (1,)))
    check(weight, {"": (lambda w: w.broadcast_in_dim((5, 6), (0, 1)), np.broadcast_to(built(weight), (5, 6)))})


@every_form
def test_slice(form):
    weight, cases = make(form, keyed=True), {}
    everything = [slice(0, n, 1) for n in form.shape]
    indices = [tuple(slice(0, max(n - 1, 1), 1) for n in form.shape)]
    for axis, n in enumerate(form.shape):
        for cut in {(0, n, 1), (0, max(n - 1, 1), 1), (n // 2, n, 1), (0, n, 2), (n - 1, n, 1)}:
            indices.append((*everything[:axis], slice(*cut), *everything[axis + 1 :]))
    for index in indices:
        at, to, by = zip(*((cut.start, cut.stop, cut.step) for cut in index), strict=True)
        cases[str(index)] = (lambda w, at=at, to=to, by=by: w.slice(at, to, by), built(weight)[index])
        if set(by) == {1}:
            cases[f"{index}, no strides"] = (lambda w, at=at, to=to: w.slice(at, to, None), built(weight)[index])
    check(weight, cases)


def test_a_slice_of_one_row_is_a_stacked_weight():
    row = make(STACKED._replace(gain=(0, 2)), keyed=True).slice((1, 0, 0), (2, 4, 6), None)
    assert row.stack == (0,)
    assert row.origin == ((), (1,), (2,))
    assert row.key.shape == (1, 1, 1)
    assert make(STACKED).slice((0, 0, 0), (2, 4, 6), None).stack == ()


@every_form
def test_dynamic_slice(form):
    weight, cases = make(form, keyed=True), {}
    for axis, n in enumerate(form.shape):
        for length, start in {(1, 0), (1, n - 1), (n, 0), (max(n - 1, 1), 0), (max(n - 1, 1), n - max(n - 1, 1))}:
            sizes = [length if i == axis else m for i, m in enumerate(form.shape)]
            at = [np.int32(start if i == axis else 0) for i in range(weight.ndim)]
            index = tuple(slice(i, i + m) for i, m in zip(at, sizes, strict=True))
            cases[axis, length, start] = (
                lambda w, at=at, sizes=sizes: w.dynamic_slice(at, sizes),
                built(weight)[index],
            )
    check(weight, cases)


def test_dynamic_slice_clamps_as_jax_does():
    weight, at = make(STACKED._replace(gain=(0, 2))), [np.int32(9), np.int32(0), np.int32(0)]
    row = check(weight, {"": (lambda w: w.dynamic_slice(at, (1, 4, 6)), built(weight)[2:])})[""]
    assert row.stack == (0,)


@every_form
def test_rev(form):
    weight, axes = make(form), range(len(form.shape))
    chosen = list(itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1)))
    check(weight, {some: (lambda w, some=some: w.rev(some), np.flip(built(weight), some)) for some in chosen})


def padded(array: np.ndarray, value: float, config) -> np.ndarray:
    """`lax.pad` in NumPy: before, after and between the elements is `value`; negative widths cut."""
    for axis, (low, high, interior) in enumerate(config):
        n = array.shape[axis]
        spread = np.full([*array.shape[:axis], n + (n - 1) * interior, *array.shape[axis + 1 :]], value)
        spread[(slice(None),) * axis + (slice(None, None, interior + 1),)] = array
        widths = [(max(low, 0), max(high, 0)) if i == axis else (0, 0) for i in range(array.ndim)]
        array = np.pad(spread, widths, constant_values=value)
        array = np.take(array, range(max(-low, 0), array.shape[axis] - max(-high, 0)), axis)
    return array


PADDED = {
    "dense": (DENSE, (0, 1)),
    "dense, gain out": (DENSE._replace(gain=(1,)), (1,)),
    "dense, gain in": (DENSE._replace(gain=(0,)), (0,)),
    "dense, gain of both": (DENSE._replace(gain=(0, 1)), (0, 1)),
    "heads": (HEADS, (0, 1, 2)),
    "stacked, gain": (STACKED._replace(gain=(0, 2)), (0, 2)),
    "conv": (CONV, (0, 1, 2, 3)),
}


@pytest.mark.parametrize("value", [0.0, -3.0])
@pytest.mark.parametrize(("form", "axes"), PADDED.values(), ids=PADDED)
def test_pad(form, axes, value):
    weight, ndim = make(form), len(form.shape)
    widths = [(1, 2, 0), (0, 1, 1), (2, 0, 0), (-1, 0, 0), (1, -1, 0)]
    configs = [tuple(c if i == axis else (0, 0, 0) for i in range(ndim)) for axis in axes for c in widths]
    configs += [tuple((1, 2, 0) if i in axes else (0, 0, 0) for i in range(ndim)), ((0, 0, 0),) * ndim]
    value = np.float32(value)
    check(weight, {c: (lambda w, c=c: w.pad(value, c), padded(built(weight), value, c)) for c in configs})


@pytest.mark.parametrize(
    ("form", "axis"),
    [
        (Form((4, 6), (), (1,)), 0),  # neither factor spans it
        (Form((4, 6), (0,), ()), 1),
        (DENSE._replace(gain=(1,)), 0),  # the gain does not
        (DENSE._replace(gain=(0,)), 1),
        (DENSE._replace(gain=()), 1),
        (STACKED._replace(gain=(0, 2)), 1),
    ],
)
def test_pad_of_an_axis_that_the_adapter_is_constant_on_is_refused(form, axis):
    config = [(1, 0, 0) if i == axis else (0, 0, 0) for i in range(len(form.shape))]
    with pytest.raises(NotSeparable, match="^pad along an axis that the adapter is constant on$"):
        make(form).pad(np.float32(0), config)


def test_pad_with_a_dropout_key_is_refused():
    with pytest.raises(NotSeparable, match="^pad of a weight with dropout$"):
        make(DENSE, keyed=True).pad(np.float32(0), [(1, 0, 0), (0, 0, 0)])


POWERS = np.array([1.0, 2.0, 4.0, 0.5, -1.0, -2.0])  # quotients are exact


@every_form
@pytest.mark.parametrize("divide", [False, True])
def test_scale(form, divide):
    weight = make(form)
    act, cases = (np.divide if divide else np.multiply), {}
    for axes in {(), *((i,) for i in range(weight.ndim)), form.a, form.b}:
        factor = np.resize(POWERS, spanning(form.shape, axes)).astype(np.float32)
        cases[axes] = (lambda w, factor=factor: w.scale(jnp.asarray(factor), divide), act(built(weight), factor))
    cases["scalar"] = (lambda w: w.scale(jnp.float32(4), divide), act(built(weight), 4.0))
    cases["literal"] = (lambda w: w.scale(np.float32(4), divide), act(built(weight), 4.0))
    check(weight, cases)


@pytest.mark.parametrize("form", [DENSE, TRANSPOSED, HEADS, OUT, CONV])
def test_scale_by_what_spans_inputs_and_outputs_is_refused(form):
    probe = Weight(whole(*form.shape), place=make(form).place)
    for weight in (make(form), make(form._replace(gain=form.b)), probe):
        with pytest.raises(NotSeparable, match="^product with an array that spans inputs and outputs$"):
            weight.scale(whole(*form.shape))


def test_scale_leaves_the_bits_of_the_base_as_the_model_has_them():
    weight = make(DENSE).replace(w=jnp.linspace(-1, 1, 24).reshape(4, 6).astype(jnp.bfloat16))
    factor = jnp.asarray([[0.3] * 6], jnp.bfloat16)
    np.testing.assert_array_equal(weight.scale(factor).w, weight.w * factor)
    np.testing.assert_array_equal(weight.scale(factor, divide=True).w, weight.w / factor)
    assert weight.scale(factor).b.dtype == jnp.float32


@every_form
def test_negate(form):
    weight = make(form)
    check(weight, {"": (lambda w: w.negate(), -built(weight))})


@every_form
def test_unstack_gives_the_rows_and_restack_the_weight(form):
    weight = make(form, keyed=True)

    def row(weight, i):
        varies, complete = weight.unstack()
        return complete(jax.tree.map(lambda x: x[i], varies))

    def back(weight):
        rows = [row(weight, i) for i in range(form.shape[0])]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *rows).restack((0,))

    cases = {i: (lambda w, i=i: row(w, i), built(weight)[i]) for i in range(form.shape[0])}
    got = check(weight, {**cases, "back": (back, built(weight))})
    assert got[0].stack == (0,)
    assert got[0].origin == weight.origin[1:]
    assert got["back"].stack == ()
    assert got["back"].origin == weight.origin


def test_unstack_moves_only_what_varies():
    varies, _ = make(HEADS._replace(gain=(1, 2))).unstack()
    assert varies.a.shape == (4, 1, 1, R)
    assert varies.b is None and varies.gain is None


def test_unstack_through_a_scan():
    weight = make(STACKED._replace(gain=(2,)))
    varies, complete = weight.unstack()
    _, rows = lax.scan(lambda _, row: (None, complete(row).dense()), None, varies)
    np.testing.assert_array_equal(rows, built(weight))


CHAINS = {
    "transpose, reshape, scale": (
        lambda w: w.transpose((2, 0, 1)).reshape((6, 2, 2, 3)).scale(np.float32(2)),
        lambda w: w.transpose(2, 0, 1).reshape(6, 2, 2, 3) * 2,
    ),
    "reshape, transpose, rev": (
        lambda w: w.reshape((2, 2, 3, 6)).transpose((3, 1, 0, 2)).rev((0,)),
        lambda w: w.reshape(2, 2, 3, 6).transpose(3, 1, 0, 2)[::-1],
    ),
    "negate, pad, slice": (
        lambda w: w.negate().pad(np.float32(5), [(0, 0, 0), (0, 0, 0), (2, 1, 0)]).slice((0, 0, 1), (4, 3, 9), (1, 1, 2)),
        lambda w: np.pad(-w, [(0, 0), (0, 0), (2, 1)], constant_values=5)[:, :, 1:9:2],
    ),
    "index, broadcast, transpose": (
        lambda w: w.slice((1, 0, 0), (2, 3, 6), None).reshape((3, 6)).broadcast_in_dim((3, 2, 6), (0, 2)).transpose((2, 1, 0)),
        lambda w: np.broadcast_to(w[1][:, None], (3, 2, 6)).T,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lazy", "dense"), CHAINS.values(), ids=CHAINS)
def test_chains_of_operations(lazy, dense):
    weight = make(Form((4, 3, 6), (0, 1), (2,), (2,)))
    check(weight, {"": (lazy, dense(built(weight)))})
    np.testing.assert_array_equal(jax.jit(lambda w: lazy(w).dense())(weight), dense(built(weight)))


# -- the product -------------------------------------------------------------------------------------------------------

ROLES = CONTRACTED, BATCH, FREE = range(3)
LETTERS = "ijkl"
REFUSED = "product of a weight whose gain spans inputs and outputs"


def product_of(shape, roles, weight_first):
    """An input with two axes of its own, its axes in a shuffled order; `dimension_numbers`; and the einsum."""
    mine = [i for i, role in enumerate(roles) if role != FREE]
    rng = np.random.default_rng((*roles, weight_first))
    letters = list(rng.permutation([*(LETTERS[i] for i in mine), "x", "y"]))
    sizes = {**{LETTERS[i]: shape[i] for i in mine}, "x": 2, "y": 3}
    x = whole(*(sizes[n] for n in letters), seed=9)
    contracted, batch = (
        [int(i) for i in rng.permutation(mine) if roles[int(i)] == role] for role in (CONTRACTED, BATCH)
    )
    at_x = tuple(tuple(letters.index(LETTERS[i]) for i in axes) for axes in (contracted, batch))
    at_w = (tuple(contracted), tuple(batch))
    left, right = (at_w, at_x) if weight_first else (at_x, at_w)
    own, free = [n for n in letters if n in "xy"], [LETTERS[i] for i, role in enumerate(roles) if role == FREE]
    out = [LETTERS[i] for i in batch] + (free + own if weight_first else own + free)
    spec = f"{''.join(letters)},{LETTERS[: len(shape)]}->{''.join(out)}"
    return x, ((left[0], right[0]), (left[1], right[1])), spec


def check_dots(form: Form, all_roles) -> None:
    """Every arrangement, the weight on either side, in either mode: the product of the dense weight, or refused."""
    weight = make(form)
    spanned = [i for i in form.gain or () if form.shape[i] > 1]
    xs, acts, expected, refusals = {}, {}, {}, 0
    for roles, weight_first in itertools.product(all_roles, (False, True)):
        x, numbers, spec = product_of(form.shape, roles, weight_first)

        def dot(weight, x, multiply=PLAIN, numbers=numbers, weight_first=weight_first):
            return weight.replace(multiply=multiply).dot(x, numbers, weight_first, None, jnp.float32)

        if {CONTRACTED, FREE} <= {roles[i] for i in spanned}:
            with pytest.raises(NotSeparable, match=f"^{REFUSED}$"):
                dot(weight, x)
            refusals += 1
            continue
        name = f"{roles} {spec}"
        xs[name], acts[name], expected[name] = x, dot, np.einsum(spec, x, built(weight))
    assert len(acts) + refusals == 2 * len(all_roles) and acts
    both = jax.jit(lambda w, xs: {name: [acts[name](w, x, how) for how in (PLAIN, ADAPTED)] for name, x in xs.items()})
    for name, ys in both(weight, xs).items():
        for y in ys:
            np.testing.assert_array_equal(y, expected[name], err_msg=name)


SPANS = [
    Form((4, 6), (0,), (1,)),
    Form((4, 6), (1,), (0,)),
    Form((4, 6), (), (1,)),
    Form((4, 6), (0,), (0, 1)),
    Form((4, 6), (0, 1), (0, 1)),
    Form((1, 6), (0,), (1,)),
]


FOUR = "test_dot_of_four_axes"


@pytest.mark.parametrize("gain", thorough([None, (0,), (1,), (0, 1)], FOUR, [(0, 1)]))
@pytest.mark.parametrize("form", SPANS)
def test_dot_of_a_matrix_in_every_arrangement(form, gain):
    check_dots(form._replace(gain=gain), list(itertools.product(ROLES, repeat=2)))


THREE = [
    HEADS,
    OUT._replace(gain=(2,)),
    STACKED._replace(gain=(0, 2)),
    STACKED._replace(gain=(1,)),
    Form((4, 2, 3), (1,), (2,)),
]


@pytest.mark.parametrize("form", thorough(THREE, FOUR, [STACKED._replace(gain=(0, 2))]))
def test_dot_of_three_axes_in_every_arrangement(form):
    check_dots(form, list(itertools.product(ROLES, repeat=3)))


def test_dot_of_four_axes():
    all_roles = [(BATCH, CONTRACTED, CONTRACTED, FREE), (CONTRACTED,) * 3 + (FREE,), (FREE,) * 3 + (CONTRACTED,)]
    check_dots(CONV._replace(gain=(3,)), all_roles)


GRADIENTS = [
    (DENSE._replace(gain=(1,)), (CONTRACTED, FREE)),
    (DENSE._replace(gain=(0,)), (CONTRACTED, FREE)),
    (DENSE._replace(gain=(1,)), (FREE, CONTRACTED)),
    (HEADS, (CONTRACTED, FREE, FREE)),
    (HEADS, (CONTRACTED, BATCH, FREE)),
    (HEADS, (FREE, CONTRACTED, CONTRACTED)),
    (OUT._replace(gain=(2,)), (CONTRACTED, CONTRACTED, FREE)),
    (STACKED._replace(gain=(0, 2)), (BATCH, CONTRACTED, FREE)),
    (STACKED, (FREE, CONTRACTED, FREE)),
    (STACKED, (CONTRACTED, CONTRACTED, FREE)),
    (Form((4, 6), (), (1,)), (CONTRACTED, FREE)),
    (Form((4, 6), (0,), ()), (CONTRACTED, FREE)),
    (Form((1, 6), (0,), (1,)), (CONTRACTED, FREE)),
    (Form((4, 1), (0,), (1,)), (CONTRACTED, FREE)),
]


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize(("form", "roles"), GRADIENTS)
def test_gradients_of_dot_are_those_of_the_dense_product(form, roles, weight_first):
    """Gradients with respect to x, the factors, the gain, and the base where it is differentiated."""
    x, numbers, spec = product_of(form.shape, roles, weight_first)
    weight = make(form)
    parts = {name: getattr(weight, name) for name in ("w", "a", "b", "gain") if getattr(weight, name) is not None}

    def factored(parts, x, multiply):
        lazy = weight.replace(**parts, multiply=multiply)
        y = lazy.dot(x, numbers, weight_first, lax.Precision.HIGHEST, jnp.float32)
        return jnp.vdot(whole(*y.shape, seed=5), y)

    def dense(parts, x):
        value = (parts["w"] + jnp.sum(parts["a"] * parts["b"], -1)) * parts.get("gain", jnp.ones((1,) * weight.ndim))
        y = jnp.einsum(spec, x, value, precision=lax.Precision.HIGHEST)
        return jnp.vdot(whole(*y.shape, seed=5), y)

    @jax.jit
    def gradients(parts, x):
        return jax.grad(dense, (0, 1))(parts, x), *(
            jax.grad(factored, (0, 1))(parts, x, multiply) for multiply in (PLAIN, ADAPTED)
        )

    expected, *got = gradients(parts, x)
    for each in got:
        close(each, expected, 1e-6)


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint], ids=["alone", "jit", "remat"])
def test_layers_that_share_a_trace_may_be_differentiated_by_different_things(around):
    """One traced product is differentiated by its input, its base and its factors in turn, and by the first ones again."""
    x, numbers, _ = product_of((4, 6), (CONTRACTED, FREE), False)
    weight = make(DENSE)
    parts = {"x": x, "w": weight.w, "a": weight.a, "b": weight.b}

    def of(multiply):
        dot = around(
            lambda x, w, a, b: Weight(w, a, b, place=PLACE, multiply=multiply).dot(x, numbers, False, None, None)
        )
        return lambda parts: jnp.sum(jnp.sin(dot(**parts)))

    by_hand, plain = of(ADAPTED), of(PLAIN)
    for names in (("a", "b"), ("w",), ("b",), ("x", "w", "b"), ("x", "a"), ("a", "b"), ("w",), ("b",)):
        mine = {name: parts[name] for name in names}
        rest = {name: part for name, part in parts.items() if name not in mine}
        gradients = [jax.grad(lambda mine, of=of, rest=rest: of({**rest, **mine}))(mine) for of in (by_hand, plain)]
        close(*gradients, 1e-5)


def test_forward_mode_differentiates_forward():
    x, numbers, _ = product_of((4, 6), (CONTRACTED, FREE), False)
    weight = make(DENSE)

    def of_a(a, multiply):
        return weight.replace(a=a, multiply=multiply).dot(x, numbers, False, None, None)

    _, tangent = jax.jvp(lambda a: of_a(a, PLAIN), (weight.a,), (weight.a,))
    np.testing.assert_array_equal(tangent, of_a(weight.a, PLAIN) - of_a(jnp.zeros_like(weight.a), PLAIN))
    with pytest.raises(TypeError, match="can't apply forward-mode (autodiff|differentiation)"):
        jax.jvp(lambda a: of_a(a, ADAPTED), (weight.a,), (weight.a,))


def shapes_made(jaxpr) -> set[tuple[int, ...]]:
    """The shapes of all results in a program, in its inner programs too."""
    found = {v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars}
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            found |= shapes_made(inner) if hasattr(inner, "eqns") else set()
    return found


@pytest.mark.parametrize("multiply", [ADAPTED, PLAIN], ids=["adapted", "plain"])
def test_dot_builds_nothing_of_the_weights_shape(multiply):
    weight = make(Form((32, 48), (0,), (1,), (1,))).replace(multiply=multiply)
    x = whole(5, 32)

    def loss(a, b, lazy):
        value = weight.replace(a=a, b=b)
        numbers = (((1,), (0,)), ((), ()))
        y = value.dot(x, numbers, False, None, None) if lazy else x @ value.dense()
        return jnp.sum(y**2)

    def made(lazy):
        return shapes_made(jax.make_jaxpr(jax.grad(lambda a, b: loss(a, b, lazy), (0, 1)))(weight.a, weight.b).jaxpr)

    assert not made(True) & {(32, 48), (32, 48, R)}
    assert not {shape for shape in made(True) if sorted(shape)[-2:] == [32, 48]} - {(48, 32)}
    assert (32, 48) in made(False)  # the walk sees it where it is


def test_dot_keeps_the_dtype_of_the_models_product():
    weight = make(DENSE._replace(gain=(1,))).astype(jnp.bfloat16)
    x = whole(5, 4).astype(jnp.bfloat16)
    numbers = (((1,), (0,)), ((), ()))
    assert weight.dot(x, numbers, False, None, None).dtype == jnp.bfloat16
    assert weight.dot(x, numbers, False, None, jnp.float32).dtype == jnp.float32


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_drop_keeps_or_zeroes_and_scales():
    x = jnp.full((1000,), 3.0)
    dropped = np.asarray(drop(x, jax.random.key(1), 0.25))
    assert set(dropped.tolist()) == {0.0, 4.0}
    assert abs((dropped == 0).mean() - 0.25) < 0.05  # 3.6 standard deviations
    assert drop(x, jax.random.key(1), 0.0) is x
    assert drop(x.astype(jnp.bfloat16), jax.random.key(1), 0.25).dtype == jnp.bfloat16


@pytest.mark.parametrize("multiply", [ADAPTED, PLAIN], ids=["adapted", "plain"])
def test_dot_drops_in_the_low_rank_branch_alone(multiply):
    weight = make(DENSE, keyed=True).replace(dropout=0.5, multiply=multiply)
    x = whole(50, 4)
    numbers = (((1,), (0,)), ((), ()))
    dropped = np.asarray(drop(x, weight.key.reshape(-1)[0], 0.5))
    expected = np.asarray(x) @ np.asarray(weight.w) + dropped @ np.sum(np.asarray(weight.a) * np.asarray(weight.b), -1)
    np.testing.assert_array_equal(weight.dot(x, numbers, False, None, None), expected)
    assert not np.array_equal(expected, np.asarray(x) @ built(weight))
