"""`count_of_mean`: a loss that is a sum over a sum of the batch's own numbers, and nothing else."""

import jax
import jax.numpy as jnp
import pytest

from jlora.transform.jaxprs import opened_end
from jlora.transform.mean import count_of_mean

REAL = jnp.asarray([[True, False, True]])
FRACTIONS = jnp.asarray([[0.2, 0.3, 0.0]])
MEANS = {
    "mask": lambda w, x: jnp.sum(jnp.where(REAL, x * w, 0)) / jnp.sum(REAL.astype(jnp.float32)),
    "at least 1": lambda w, x: jnp.sum(jnp.where(REAL, x * w, 0)) / jnp.maximum(jnp.sum(REAL), 1).astype(jnp.float32),
    "where=": lambda w, x: jnp.mean(x * w, where=REAL),
    "fractions": lambda w, x: jnp.sum(x * w * FRACTIONS) / jnp.sum(FRACTIONS),
    "negative, scaled": lambda w, x: -(2.0 * jnp.sum(x * w)) / jnp.sum(REAL.astype(jnp.float32)),
}
MEANS["a batch without padding"] = lambda w, x: jnp.sum(x * w) / jnp.maximum(jnp.sum(jnp.ones((1, 3))), 1.0)
OTHERS = {
    "mean": lambda w, x: jnp.mean(x * w),
    "sum": lambda w, x: jnp.sum(x * w),
    "a root": lambda w, x: jnp.sqrt(jnp.sum(x * w)) / jnp.sum(REAL.astype(jnp.float32)),
    "a count plus something": lambda w, x: jnp.sum(x * w) / (jnp.sum(REAL.astype(jnp.float32)) + 1e-6),
    "a count that moves": lambda w, x: jnp.sum(x * w) / jnp.sum(w * x),
    "a number of the batch": lambda w, x: jnp.sum(x * w) / x[0, 0],
    "a sum of fractions, at least 1": lambda w, x: jnp.sum(x * w) / jnp.maximum(jnp.sum(FRACTIONS), 1.0),
    "a sum along one axis": lambda w, x: (jnp.sum(x * w, axis=0) / jnp.sum(REAL.astype(jnp.float32), axis=0))[0],
    "a mean plus something": lambda w, x: jnp.sum(x * w) / jnp.sum(REAL.astype(jnp.float32)) + jnp.sum(w**2),
}  # fmt: skip


def count(fn):
    x, w = jnp.ones((1, 3)), jnp.ones((1, 3))
    closed = jax.make_jaxpr(lambda w: fn(w, x))(w)
    jaxpr, consts = opened_end(closed.jaxpr, closed.consts)
    return count_of_mean(jaxpr, len(consts))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", MEANS)
def test_a_mean_shows_its_count(name, compiled):
    fn = jax.jit(jax.jit(MEANS[name])) if compiled else MEANS[name]
    variable, at_least_1 = count(fn)
    assert variable.aval.shape == ()
    assert at_least_1 == (name in ("at least 1", "a batch without padding"))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_mean_shows_none(name):
    assert count(OTHERS[name]) is None
