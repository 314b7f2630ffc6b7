"""The checks behind every `test_lift_*`: a lifted function against weights merged by hand, and nothing silent.

`check` is the whole of it, in six programs; `check_values` compiles one, for rows of which the default run has no more.
`check_found` traces alone, for rows whose products others of the table have by value.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import tree

RANK, ALPHA = 3, 6.0
SCALE = ALPHA / RANK
# Relative to the largest value of an array. The two sides sum in different orders: a few units of float32's 1.2e-7,
# times the square root of the length of the sums.
TOLERANCE = 1e-5


class Case(NamedTuple):
    """A function of parameters and its arguments.

    Attributes:
      fn, params, args: called as `fn(params, *args)`; the result is a tree of floating-point arrays.
      dense: paths of the weights that it takes materialised, by design. Everything else has to stay factored.
      targets: which of the sites to adapt; None for every one that a product contracts.
      sites: by hand, for weights whose axes no program shows (those that are only ever materialised).
      op_by_op: XLA's fusions sum in another order with the low-rank branch there: compare the start without `jit`.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    dense: tuple[str, ...] = ()
    targets: Any = None
    sites: tuple[jlora.Site, ...] | None = None
    op_by_op: bool = False


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Fixed numbers of a size that keeps deep chains near 1."""
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape) * 0.4, jnp.float32)


def filled(shapes: Any, size: float = 0.5) -> Any:
    """Normal numbers for a tree of shapes: a model's own `init` compiles a generator for every parameter."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, size, leaf.shape), leaf.dtype), shapes)


def adapt(case: Case) -> jlora.Adapted:
    """The case's parameters with every weight adapted that can be, its factors not zero but small."""
    sites = case.sites
    if sites is None:
        found = jlora.sites(case.fn, case.params, *case.args)
        sites = tuple(_by_hand(site) if site.path in case.dense else site for site in found)
    targets = case.targets or (lambda site: site.kind in ("linear", "conv", "embedding"))
    return jlora.apply(case.params, method=jlora.lora(RANK, ALPHA), sites=sites, targets=targets)


def measured(method: jlora.Method, fn: Callable, params: Any, batches: Any, sites: Any = None, **options: Any) -> dict:
    """The `statistics=` of `apply` for a method that starts from data; nothing for another."""
    kind = method.acts.statistic
    return {"statistics": jlora.measure(fn, params, batches, sites, kind, **options)} if kind else {}


def randomised(adapted: jlora.Adapted, size: float = 0.3) -> jlora.Adapted:
    """Factors as after some training: none of them zero."""
    factors = {
        path: {name: size * normal(*array.shape, seed=7 + i) for i, (name, array) in enumerate(arrays.items())}
        for path, arrays in adapted.factors.items()
    }
    return adapted.replace(factors=factors)


def merged_by_hand(params: Any, factors: Mapping[str, Mapping[str, jax.Array]], scale: float = SCALE) -> Any:
    """`W0 + (alpha/r) B A`, spelled out: not a line of the library under test takes part in the sum."""
    named, structure = tree.leaves(params)
    filled = {
        path: (leaf + (scale * jnp.sum(factors[path]["A"] * factors[path]["B"], axis=-1)).astype(leaf.dtype))
        if path in factors
        else leaf
        for path, leaf in named.items()
    }
    return jax.tree.unflatten(structure, filled.values())


def optimized(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` as a user has it, not with most XLA optimisations off as in conftest.py: for results that are compared bit for bit."""
    return jax.jit(
        fn, compiler_options={"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    )


def check(case: Case) -> None:
    """Bit for bit the base at the start; then values and gradients of the merged weights; nothing silent or dense."""
    start = adapt(case)
    lifted, base = optimized(jlora.lift(case.fn)), optimized(case.fn)
    # A weight that was just summed is fused into what follows, whose roundings XLA then orders anew: op by op there.
    with jax.disable_jit(case.op_by_op or bool(case.dense)):
        chex.assert_trees_all_equal(lifted(start, *case.args), base(case.params, *case.args))

    adapted = randomised(start)
    merged = merged_by_hand(case.params, adapted.factors)
    close(lifted(adapted, *case.args), base(merged, *case.args))
    close(jlora.merge(adapted), merged)

    def loss(factors: Any, merged: bool, *args: Any) -> jax.Array:
        args = jax.tree.map(lambda x: x, args)  # NNX: a variable is updated in the trace that made it
        if merged:
            out = case.fn(merged_by_hand(case.params, factors), *args)
        else:
            out = jlora.lift(case.fn)(jlora.combine(factors, adapted), *args)
        leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.vdot(normal(*x.shape, seed=3), x.astype(jnp.float32)) for x in leaves)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    close(gradient(adapted.factors, False, *case.args), gradient(adapted.factors, True, *case.args))
    check_uses(case, adapted)


def check_values(case: Case) -> set[str]:
    """The values of the base while B is zero, then those of the merged weights; every weight factored that can be.

    Returns the paths that were adapted.
    """
    adapted = randomised(adapt(case._replace(params=jax.eval_shape(lambda: case.params)))).replace(base=case.params)
    first = {"embedding": "A"}  # the factor that is zero at the start, as `jlora.lora` has it
    start = {site.path: {**adapted.factors[site.path]} for site in adapted.sites}
    for site in adapted.sites:
        start[site.path][first.get(site.kind, "B")] *= 0

    @jax.jit
    def both(factors: Any, params: Any, args: tuple[Any, ...]) -> Any:
        trained, merged = adapted.replace(base=params, factors=factors), merged_by_hand(params, factors)
        return (jlora.lift(case.fn)(trained, *args), jlora.merge(trained)), (case.fn(merged, *args), merged)

    lifted, base = both(start, case.params, case.args)
    close(lifted, base)
    chex.assert_trees_all_equal(base[1], case.params)
    lifted, merged = both(adapted.factors, case.params, case.args)
    close(lifted, merged)
    changed = [
        np.any(np.asarray(x) != np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (merged, base)), strict=True)
    ]
    assert any(changed[: len(jax.tree.leaves(merged[0]))]), "the results do not depend on the factors"
    check_explained(case, adapted)
    return set(adapted.factors)


def check_found(case: Case) -> set[str]:
    """Without a number: the weights are found, all of them that can be stay factored, and `strict` takes it.

    Returns the paths that were adapted.
    """
    adapted = adapt(case._replace(params=jax.eval_shape(lambda: case.params)))
    check_uses(case, adapted)
    return set(adapted.factors)


def check_explained(case: Case, adapted: jlora.Adapted) -> jlora.Explanation:
    """`explain` names every adapted weight, and as dense what the case says."""
    explanation = jlora.explain(case.fn, adapted, *case.args)
    assert {row.path for row in explanation.rows} == set(adapted.factors)
    assert {row.path for row in explanation.materialised} == set(case.dense), str(explanation)
    return explanation


def check_uses(case: Case, adapted: jlora.Adapted) -> None:
    """`explain` names every adapted weight; what is dense is what the case says, and `strict` refuses exactly that."""
    explanation = check_explained(case, adapted)
    strict = jlora.lift(case.fn, strict=True)
    if not case.dense:
        jax.eval_shape(lambda adapted: strict(adapted, *case.args), adapted)
        return
    once = [row.path for row in explanation.materialised]
    assert len(once) == len(set(once)), f"materialised more than once: {explanation}"
    with pytest.raises(jlora.MaterialisedError, match=r"strict: '.*' would be materialised by `\w+`"):
        jax.eval_shape(lambda adapted: strict(adapted, *case.args), adapted)


def close(got: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Every array within `tolerance` of the expected one, relative to that one's largest value."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    for (keys, mine), theirs in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        mine, theirs = (np.asarray(x, np.float64) for x in (mine, theirs))
        if theirs.size:
            error = np.abs(mine - theirs).max() / max(np.abs(theirs).max(), 1e-30)
            assert error < tolerance, f"{jax.tree_util.keystr(keys)}: relative error {error:.1e}"


def _by_hand(site: jlora.Site) -> jlora.Site:
    """Site of a weight whose last axis is the output and all others inputs."""
    axes = range(len(site.shape))
    return jlora.Site(site.path, site.shape, site.dtype, tuple(axes[:-1]), tuple(axes[-1:]), (), "linear")
