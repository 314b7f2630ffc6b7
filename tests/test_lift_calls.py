"""What a lifted function returns, several adapted trees in one call, and weights that no gradient reaches."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import TraceContextError
from jax import lax

import jlora
from jlora.transform.interpret import Trace
from jlora.transform.lift import check_reached, run
from tests.conformance import close, normal

SITE = (jlora.Site("k", (8, 6), "float32", (0,), (1,), (), "linear"),)
PARAMS, X = {"k": normal(8, 6)}, normal(4, 8)


def adapted(rank: int = 2, **options: Any) -> jlora.Adapted:
    made = jlora.apply(PARAMS, method=jlora.lora(rank, **options), sites=SITE)
    return made.replace(factors=jax.tree.map(lambda f: f + 0.2, made.factors))


# -- results -----------------------------------------------------------------------------------------------------------

RESULTS = {
    "a number": 3,
    "a string": "text",
    "a NumPy array": np.arange(3),
    "a NumPy scalar": np.float32(2),
    "an array": jnp.arange(3),
    "nothing": None,
    "a key": jax.random.key(3),
    "a function": jnp.tanh,
    "a shape": jax.ShapeDtypeStruct((2,), jnp.float32),
}


@pytest.mark.parametrize("name", RESULTS)
def test_what_is_no_result_of_the_weights_passes_through(name: str):
    beside = RESULTS[name]
    got, product = jlora.lift(lambda p, x: ({"beside": beside}, x @ p["k"]))(adapted(), X)
    assert type(got["beside"]) is type(beside)
    if isinstance(beside, jax.Array):
        assert got["beside"].dtype == beside.dtype
    else:
        assert got["beside"] is beside
    assert isinstance(product, jax.Array)


@pytest.mark.parametrize(
    "make", [lambda: jnp.float32(2.5), lambda: jnp.asarray(2.5), lambda: jnp.ones((2, 3), jnp.bfloat16)]
)
def test_constants_are_arrays_as_the_function_makes_them(make: Any):
    got, _ = jlora.lift(lambda p, x: (make(), x @ p["k"]))(adapted(), X)
    assert isinstance(got, jax.Array)
    assert (got.dtype, got.shape, got.weak_type) == (make().dtype, make().shape, make().weak_type)


# -- several adapted trees ---------------------------------------------------------------------------------------------


def distilled(student: Any, teacher: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((x @ student["k"] - x @ teacher["k"]) ** 2)


def test_uses_and_counts_of_two_trees_are_told_apart():
    student, teacher = adapted(2), adapted(4)
    explained = jlora.explain(distilled, student, teacher, X)
    assert [(row.path, row.tree, row.rank, row.parameters) for row in explained.rows] == [
        ("k", 0, 2, 28),
        ("k", 1, 4, 56),
    ]
    assert "k (tree 1)" in str(explained)
    assert "k (tree 2)" in str(explained)
    close(jlora.lift(distilled)(student, teacher, X), distilled(jlora.merge(student), jlora.merge(teacher), X))


@pytest.mark.parametrize(("fn", "missing"), [(lambda p, q, x: x @ p["k"], 2), (lambda p, q, x: x @ q["k"], 1)])
def test_the_tree_that_is_never_read_is_named(fn: Any, missing: int):
    with pytest.raises(
        ValueError, match=rf"1 of 2 adapted weights are never read by '<lambda>': 'k' of adapted tree {missing}"
    ):
        jlora.lift(fn)(adapted(2), adapted(4), X)


def test_one_tree_given_twice_is_one():
    same = adapted(2)
    close(jlora.lift(lambda p, q, x: x @ p["k"])(same, same, X), X @ jlora.merge(same)["k"])


def test_adapters_of_activations_are_told_apart():
    model = nn.Sequential([nn.Dense(6)])
    one = jlora.apply(model.init(jax.random.key(0), X)["params"], method=jlora.houlsby(2), targets="kernel")
    apply = lambda p: model.apply({"params": p}, X)
    with pytest.raises(ValueError, match="'layers_0/kernel' of adapted tree 2"):
        jlora.lift(lambda p, q: apply(p))(one, one.replace(key=None))
    assert [row.tree for row in jlora.explain(lambda p, q: apply(p) - apply(q), one, one.replace()).rows] == [0, 1]


# -- trained in name only ----------------------------------------------------------------------------------------------

CUT = {
    "stop_gradient": lambda p, x: lax.stop_gradient(x @ p["k"]),
    "of the weight": lambda p, x: x @ lax.stop_gradient(p["k"]),
    "in jit": jax.jit(lambda p, x: lax.stop_gradient(jnp.tanh(x @ p["k"]))),
    "in remat": jax.remat(lambda p, x: lax.stop_gradient(jnp.tanh(x @ p["k"]))),
    "in a scan": lambda p, x: lax.scan(lambda h, _: (h + lax.stop_gradient(x @ p["k"]), None), jnp.zeros((4, 6)), length=2)[0],
    "in both branches": lambda p, x: lax.cond(x[0, 0] > 0, lambda: lax.stop_gradient(x @ p["k"]), lambda: jnp.ones((4, 6))),
    "rounded": lambda p, x: jnp.round(x @ p["k"]),
    "chosen": lambda p, x: jnp.argmax(x @ p["k"], axis=1).astype(jnp.float32),
    "in a loop": lambda p, x: lax.fori_loop(0, 2, lambda _, h: h + lax.stop_gradient(x @ p["k"]), jnp.zeros((4, 6))),
}  # fmt: skip
REACHED = {
    "plain": lambda p, x: x @ p["k"],
    "straight through": lambda p, x: (lambda y: y + lax.stop_gradient(jnp.round(y) - y))(x @ p["k"]),
    "carried by a scan": lambda p, x: lax.scan(lambda h, _: (jnp.tanh(h + x @ p["k"]), None), jnp.zeros((4, 6)), length=2)[0],
    "in one branch": lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["k"], lambda: jnp.ones((4, 6))),
    "materialised": lambda p, x: x @ jnp.exp(p["k"]),
}  # fmt: skip


def checked(fn: Any) -> None:
    trace = Trace()
    jax.eval_shape(lambda a: run(lambda p, x: jnp.sum(fn(p, x)), (a, X), {}, trace), adapted())
    check_reached(fn, trace)


@pytest.mark.parametrize("name", CUT)
def test_a_weight_that_no_gradient_reaches_is_an_error(name: str):
    with pytest.raises(ValueError, match=r"no gradient of '.*' reaches 1 of 1 adapted weights: 'k'\. They are behind"):
        checked(CUT[name])


@pytest.mark.parametrize("name", REACHED)
def test_one_that_it_reaches_is_none(name: str):
    checked(REACHED[name])


def test_dropout_that_is_not_applied_is_an_error():
    one = adapted(dropout=0.5)
    fn = lambda p, x: x @ jnp.exp(p["k"])
    jlora.lift(fn)(one, X)  # it is off
    with pytest.raises(
        ValueError, match=r"dropout=0.5 cannot be applied to 'k': `exp` at test_lift_calls.py:\d+ materialises it"
    ):
        jlora.lift(fn)(jlora.with_dropout(one, 1), X)


def test_dropout_of_a_look_up_leaves_out_whole_rows():
    table = jlora.apply({"k": jnp.zeros((8, 6))}, method=jlora.lora(2, dropout=0.5), sites=SITE)
    table = table.replace(factors=jax.tree.map(lambda f: f + 1.0, table.factors))
    rows = jlora.lift(lambda p: p["k"][jnp.arange(200) % 8])(jlora.with_dropout(table, 1))
    whole = jlora.merge(table)["k"][jnp.arange(200) % 8]
    dropped = jnp.all(rows == 0, axis=1)
    assert 0.35 < float(dropped.mean()) < 0.65
    close(rows, jnp.where(dropped[:, None], 0, 2 * whole))


# -- Flax NNX ----------------------------------------------------------------------------------------------------------


def test_an_nnx_model_merged_without_a_copy_gets_a_hint():
    model = nnx.Sequential(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    one = jlora.apply(params, rank=2)
    with pytest.raises(TraceContextError, match=r"merge the model with copy=True inside the function: nnx.merge\("):
        jlora.lift(lambda p, x: nnx.merge(graph, p, rest)(x))(one, X)
    jlora.lift(lambda p, x: nnx.merge(graph, p, rest, copy=True)(x))(one, X)


def test_a_frozen_teacher_need_not_be_reached():
    trace = Trace()
    loss = lambda p, q, x: jnp.mean((x @ p["k"] - lax.stop_gradient(x @ q["k"])) ** 2)
    jax.eval_shape(lambda p, q: run(loss, (p, q, X), {}, trace), adapted(2), adapted(4))
    check_reached(loss, trace)
