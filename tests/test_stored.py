"""`tree.Stored`: a base leaf that is no plain array, here of 8-bit codes with one scale for each output."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import tree
from jlora.checkpoint.fingerprint import fingerprint
from jlora.transform.weight import Weight
from tests.tiers import thorough

IN, OUT, LAYERS = 6, 4, 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """`codes * scales`: int8 (..., in, out) and float32 (..., 1, out)."""

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        return self.scales.dtype

    @property
    def leading(self) -> int:
        return self.codes.ndim - 2

    def dequantise(self) -> jax.Array:
        return self.codes.astype(self.scales.dtype) * self.scales


def codes(seed: int, *shape: int) -> Codes:
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.01, 0.02, (*shape[:-2], 1, shape[-1])).astype(np.float32)
    return Codes(jnp.asarray(rng.integers(-127, 128, shape), jnp.int8), jnp.asarray(scales))


STORED = {
    "first": {"kernel": codes(1, IN, OUT), "bias": jnp.linspace(0.0, 1.0, OUT)},
    "layers": {"kernel": codes(2, LAYERS, OUT, OUT)},
    "still": {"kernel": codes(3, OUT, IN)},
    "last": {"kernel": codes(4, OUT, OUT)},
}
PLAIN = jax.tree.map(tree.dense, STORED, is_leaf=tree.is_stored)
X = jnp.asarray(np.random.default_rng(5).normal(size=(5, IN)), jnp.float32)


def predict(params: Any, x: jax.Array) -> jax.Array:
    """A matrix, a scanned stack, one that nobody adapts, and one that is cast, turned and cut into heads."""
    h = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["layers"]["kernel"])
    h = jnp.tanh(h @ params["layers"]["kernel"][1])  # a layer by its number
    h = h + 0.1 * (h @ params["still"]["kernel"])[:, :OUT]
    last = params["last"]["kernel"].astype(jnp.bfloat16).T.reshape(2, 2, OUT)
    return jnp.einsum("bi,hki->bhk", h.astype(jnp.bfloat16), last).astype(jnp.float32)


SITES = jlora.sites(predict, STORED, X)
ADAPTED_PATHS = ["first/kernel", "last/kernel", "layers/kernel"]


def adapt(params: Any, method: jlora.Method | None = None) -> jlora.Adapted:
    adapted = jlora.apply(
        params, method=method or jlora.lora(2), sites=SITES, targets=[f"^{path}$" for path in ADAPTED_PATHS]
    )
    factors = {
        path: {
            name: x if name != "B" else jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) / 8
            for name, x in part.items()
        }
        for path, part in adapted.factors.items()
    }
    return adapted.replace(factors=factors)


def loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(predict(params, x)))


def close(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), got, expected)


def test_sites_are_those_of_the_array() -> None:
    assert jlora.sites(predict, PLAIN, X) == SITES
    assert {s.path: (s.kind, s.in_axes, s.out_axes, s.stack_axes) for s in SITES if s.path in ADAPTED_PATHS} == {
        "first/kernel": ("linear", (0,), (1,), ()),
        "last/kernel": ("linear", (0,), (1,), ()),
        "layers/kernel": ("linear", (1,), (2,), (0,)),
    }
    assert list(tree.leaves(STORED)[0]) == [
        "first/bias",
        "first/kernel",
        "last/kernel",
        "layers/kernel",
        "still/kernel",
    ]


TRAINED = "test_a_step_trains_the_factors_and_keeps_the_codes"


@pytest.mark.parametrize("name", thorough(["lora", "dora", "pissa"], TRAINED, ["dora"]))
def test_function_and_gradient_are_those_of_the_dequantised_base(name: str) -> None:
    method = {"lora": jlora.lora(2), "dora": jlora.dora(2), "pissa": jlora.pissa(2)}[name]
    of_stored, of_plain = adapt(STORED, method), adapt(PLAIN, method)
    close(of_stored.factors, of_plain.factors)
    assert {type(leaf) for leaf in tree.leaves(of_stored.base)[0].values()} >= {Codes}

    @jax.jit
    def both(factors: Any, adapted: jlora.Adapted) -> Any:
        def of(factors: Any) -> jax.Array:
            return jlora.lift(loss, strict=name != "pissa")(adapted.replace(factors=factors), X)

        return jlora.lift(predict)(adapted, X), jax.value_and_grad(of)(factors)

    close(both(of_stored.factors, of_stored), both(of_plain.factors, of_plain), 1e-4)


def test_without_an_adapter_the_function_takes_the_base() -> None:
    close(jlora.lift(predict)(STORED, X), predict(PLAIN, X))
    gradient = jax.grad(lambda x: jlora.lift(loss)(STORED, x))(X)
    close(gradient, jax.grad(lambda x: loss(PLAIN, x))(X))
    with pytest.raises(TypeError, match="forward_mode=True"):
        jax.jvp(lambda x: jlora.lift(loss)(STORED, x), (X,), (X,))
    _, slope = jax.jvp(lambda x: jlora.lift(loss, forward_mode=True)(STORED, x), (X,), (X,))
    close(slope, jnp.vdot(gradient, X), 1e-2)  # of the part in bfloat16, 8 bits


def test_the_codes_are_kept_and_not_the_array() -> None:
    """The forward pass keeps no float array of a kernel's shape for the backward pass."""
    adapted = adapt(STORED)
    _, back = jax.vjp(lambda factors: jlora.lift(loss)(adapted.replace(factors=factors), X), adapted.factors)
    kept = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(back) if hasattr(x, "shape")]
    assert ((IN, OUT), "int8") in kept and ((OUT, IN), "int8") in kept
    assert not [kind for kind in kept if kind[0] in ((IN, OUT), (OUT, IN)) and kind[1] != "int8"]
    assert ((LAYERS, OUT, OUT), "float32") not in kept


def test_what_acts_on_the_leading_axis_leaves_it_stored() -> None:
    stacked = codes(6, LAYERS, IN, OUT)
    seen: list[Any] = []
    real = Weight.dot

    def dot(self: Weight, *args: Any, **kwargs: Any) -> jax.Array:
        seen.append(self.w)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weight, "dot", dot)
        y = jlora.lift(lambda w, x: x @ w[1])({"w": stacked}["w"], X)
    close(y, X @ stacked.dequantise()[1])
    assert tree.is_stored(seen[0]) and jax.tree.leaves(seen[0])[0].shape == (1, IN, OUT)


def test_merge_gives_plain_arrays() -> None:
    merged = jlora.merge(adapt(STORED))
    assert all(isinstance(leaf, jax.Array) for leaf in tree.leaves(merged)[0].values())
    assert jax.tree.structure(merged) == jax.tree.structure(PLAIN)
    close(merged, jlora.merge(adapt(PLAIN)))


def test_counts_are_those_of_the_shape() -> None:
    assert jlora.count(adapt(STORED)) == jlora.count(adapt(PLAIN))
    assert (
        fingerprint(STORED)
        == fingerprint(PLAIN)
        != fingerprint({**PLAIN, "still": {"kernel": PLAIN["still"]["kernel"] + 1}})
    )
    abstract = jax.eval_shape(lambda: STORED)
    assert jlora.count(jlora.apply(abstract, method=jlora.dora(2), sites=SITES)).total > 0


def test_a_step_trains_the_factors_and_keeps_the_codes(tmp_path: Any) -> None:
    step = jlora.train_step(loss, optax.sgd(0.1))
    state, metrics = step(jlora.TrainState.create(adapt(STORED), step.tx), X)
    other = jlora.train_step(loss, optax.sgd(0.1))
    expected, plain = other(jlora.TrainState.create(adapt(PLAIN), other.tx), X)
    close(metrics["loss"], plain["loss"])
    close(state.adapted.factors, expected.adapted.factors, 1e-4)
    assert state.adapted.base["first"]["kernel"].codes is STORED["first"]["kernel"].codes
    jlora.save(tmp_path / "adapter", state.adapted)
    close(jlora.load(tmp_path / "adapter", STORED).factors, state.adapted.factors)


@pytest.mark.parametrize("statistic", ["covariance", "gradient"])
def test_statistics_are_those_of_the_dequantised_base(statistic: str) -> None:
    fn = predict if statistic == "covariance" else loss
    targets = [f"^{path}$" for path in ADAPTED_PATHS]
    of_stored, of_plain = (jlora.measure(fn, p, [X], SITES, statistic, targets=targets) for p in (STORED, PLAIN))
    close(of_stored, of_plain)


def test_conversions_are_those_of_the_dequantised_base() -> None:
    def adapted(params: Any) -> jlora.Adapted:
        return jlora.apply(params, method=jlora.pissa(2), sites=SITES, targets="first", extras={"still": [0, 3]})

    with pytest.raises(ValueError, match=r"first 'still/kernel' \(Codes\), and codes are not trained"):
        adapted(STORED)
    base = {**STORED, "still": PLAIN["still"]}
    of_stored, of_plain = adapted(base), adapted(PLAIN)
    close(jlora.to_lora(of_stored).factors, jlora.to_lora(of_plain).factors)
    doubled = [x.replace(factors=jax.tree.map(lambda x: 2 * x, x.factors)) for x in (of_stored, of_plain)]
    close(*(jlora.scale(x, 0.5).factors for x in doubled))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), of_plain.factors)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), adapted(jax.eval_shape(lambda: base)).factors) == shapes
