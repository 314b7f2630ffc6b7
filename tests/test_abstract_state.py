"""A step lowered for shapes: no byte is allocated, and the program is that of the arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.state import TrainState
from jlora.train import Step, train_step

IN, HIDDEN, OUT, BATCH = 4, 8, 2, 16
PARAMS = {
    "up": {"kernel": np.ones((IN, HIDDEN), np.float32), "bias": np.ones(HIDDEN, np.float32)},
    "down": {"kernel": np.ones((HIDDEN, OUT), np.float32)},
}
DATA = {"x": np.ones((BATCH, IN)), "y": np.ones((BATCH, OUT))}  # float64: JAX computes in float32
TX = optax.sgd(0.1, momentum=0.9)


def loss_fn(params: Any, batch: Any) -> jax.Array:
    hidden = jnp.tanh(batch["x"] @ params["up"]["kernel"] + params["up"]["bias"][None])  # (batch, hidden)
    return jnp.mean(jnp.square(hidden @ params["down"]["kernel"] - batch["y"]))


def shape(x: Any) -> jax.ShapeDtypeStruct:
    sharding = x.sharding if isinstance(x, jax.Array) and x.committed else None
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding)


def nowhere(x: Any, rows: bool) -> Any:
    return jnp.asarray(x) if not rows else x


def on_mesh(kinds: AxisType, x: Any, rows: bool) -> Any:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kinds, kinds))
    spec = P("data", None) if rows else P(None, "model") if x.ndim == 2 and x.shape[1] % 4 == 0 else P()
    return jax.device_put(x, NamedSharding(mesh, spec))


PLACES = {
    "nowhere": nowhere,
    "another device": lambda x, rows: jax.device_put(x, jax.devices()[3]) if not rows else x,
    "mesh": lambda x, rows: on_mesh(AxisType.Auto, x, rows),
    "mesh, batch nowhere": lambda x, rows: on_mesh(AxisType.Auto, x, rows) if not rows else x,
}
METHOD = jlora.lora(2, dropout=0.1)
ROWS: dict[str, tuple[str, jlora.Method, dict[str, Any]]] = {
    **{place: (place, METHOD, {}) for place in PLACES},
    "accumulate": ("mesh", METHOD, {"accumulate": 2}),
    "pmap": ("nowhere", METHOD, {"parallel": "pmap"}),
    "dora": ("nowhere", jlora.dora(2), {"nonfinite": "skip"}),
    "adalora": ("mesh", jlora.adalora(4, 2, total_steps=100), {}),
}


def texts(step: Step, states: list[TrainState], batches: list[Any]) -> list[str]:
    return [step.lower(state, batch).as_text() for state, batch in zip(states, batches, strict=True)]


@pytest.mark.parametrize("name", ROWS)
def test_the_program_is_that_of_the_arrays(name: str) -> None:
    place, method, options = ROWS[name]
    params = jax.tree.map(lambda x: PLACES[place](x, False), PARAMS)
    batch = jax.tree.map(lambda x: PLACES[place](x, True), DATA)
    step = train_step(loss_fn, TX, **options)
    apply = lambda params: jlora.apply(params, method=method, extras="up/bias")
    state = TrainState.create(apply(params), step.tx)
    before = len(jax.live_arrays())
    shapes = TrainState.create(apply(jax.tree.map(shape, params)), step.tx)
    assert len(jax.live_arrays()) == before
    assert {type(leaf) for leaf in jax.tree.leaves(shapes)} == {jax.ShapeDtypeStruct}
    abstract_batch = jax.tree.map(shape, batch)
    states, batches = [state, shapes, shapes, state], [batch, batch, abstract_batch, abstract_batch]
    expected, *others = texts(step, states, batches)
    assert [text == expected for text in others] == [True] * 3
    longer = jax.tree.map(lambda x: np.concatenate([x, x]), DATA)
    assert texts(step, [shapes], [longer]) != [expected]  # so that the comparison can fail


def test_shapes_under_eval_shape_and_their_dtypes_are_those_of_the_state() -> None:
    step = train_step(loss_fn, optax.chain(optax.clip(1.0), TX))
    make = lambda: TrainState.create(jlora.apply(jax.tree.map(jnp.asarray, PARAMS), rank=2), step.tx, key=7)
    adapted = jax.eval_shape(lambda: jlora.apply(jax.tree.map(jnp.asarray, PARAMS), rank=2))
    got, expected = TrainState.create(adapted, step.tx, key=7), make()
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    kinds = lambda state: [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in jax.tree.leaves(state)]
    assert kinds(got) == kinds(expected)
    assert got.key.dtype == expected.key.dtype
    assert step.lower(got, DATA).compile().memory_analysis().argument_size_in_bytes > 0


def test_what_is_kept_for_a_sharded_factor_lies_as_it_does() -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    params = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), PARAMS)
    adapted = jlora.apply(params, rank=2, targets="up")
    split = {"A": P(), "B": P(None, "model")}
    factors = {
        path: {name: jax.device_put(x, NamedSharding(mesh, split[name])) for name, x in arrays.items()}
        for path, arrays in adapted.factors.items()
    }
    adapted = adapted.replace(factors=factors)
    step = train_step(loss_fn, TX)
    state = TrainState.create(adapted, step.tx)
    shapes = TrainState.create(jax.tree.map(shape, adapted), step.tx)
    moments = lambda of, place: [place(x) for x in jax.tree.leaves(of.opt_state) if x.shape == (1, HIDDEN, 2)]
    expected: list[Sharding] = moments(state, lambda x: x.sharding)
    assert [sharding.spec for sharding in expected] == [split["B"]]
    assert moments(shapes, lambda x: x.sharding) == expected
    first, second = texts(step, [state, shapes], [DATA, DATA])
    assert first == second


@pytest.mark.parametrize("key", [3, jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0)], ids=["seed", "rbg", "old"])
def test_the_key_is_a_shape_of_its_kind(key: Any) -> None:
    adapted = jlora.apply(jax.tree.map(shape, PARAMS), rank=2)
    expected = jlora.tree.as_key(key)
    for given in (key, jax.ShapeDtypeStruct(key.shape, key.dtype)) if isinstance(key, jax.Array) else (key,):
        got = TrainState.create(adapted, optax.sgd(0.1), key=given).key
        assert (got.shape, got.dtype) == ((), expected.dtype)


def test_shapes_are_lowered_and_not_run() -> None:
    step = train_step(loss_fn, optax.sgd(0.1))
    shapes = TrainState.create(jlora.apply(jax.tree.map(shape, PARAMS), rank=2), step.tx)
    state = TrainState.create(jlora.apply(jax.tree.map(jnp.asarray, PARAMS), rank=2), step.tx)
    with pytest.raises(
        TypeError, match=r"^this state holds shapes \(jax.ShapeDtypeStruct\) and no arrays: a step with"
    ):
        step(shapes, DATA)
    with pytest.raises(TypeError, match=r"^this batch holds shapes .* can be lowered and compiled, step.lower"):
        step(state, jax.tree.map(shape, DATA))
    with pytest.raises(TypeError, match="^key is a seed or a key"):
        TrainState.create(jlora.apply(jax.tree.map(shape, PARAMS), rank=2), step.tx, key="0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which 2 micro-batches .accumulate=2. do not divide"):
        train_step(loss_fn, optax.sgd(0.1), accumulate=2).lower(shapes, jax.tree.map(lambda x: shape(x[:3]), DATA))


def test_pmap_refuses_the_shape_of_a_sharded_base() -> None:
    params = jax.tree.map(lambda x: shape(on_mesh(AxisType.Auto, x, False)), PARAMS)
    step = train_step(loss_fn, optax.sgd(0.1), parallel="pmap")
    state = TrainState.create(jlora.apply(params, rank=2), step.tx)
    with pytest.raises(ValueError, match="is sharded as .* parallel='pmap' keeps a whole copy on every device"):
        step.lower(state, DATA)
