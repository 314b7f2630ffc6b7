"""The index algebra against NumPy: groups of a reshape, products by label, axes put in and taken out."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jlora.transform import axes as ax


def whole(*shape: int, seed: int = 0) -> jax.Array:
    """Small whole numbers: float32 sums of them are exact in any order."""
    return jnp.asarray(np.random.default_rng((seed, *shape)).integers(-4, 5, shape), jnp.float32)


def check_groups(old, new) -> list:
    """Every axis in exactly one group, in order, with equal products."""
    groups = ax.reshape_groups(old, new)
    assert list(itertools.chain(*(left for left, _ in groups))) == list(range(len(old)))
    assert list(itertools.chain(*(right for _, right in groups))) == list(range(len(new)))
    for left, right in groups:
        assert math.prod(old[i] for i in left) == math.prod(new[j] for j in right)
    return groups


def factorization(rng: np.random.Generator, number: int) -> tuple[int, ...]:
    """The prime factors of `number`, grouped at random, with ones put in between at random."""
    primes = [p for p in (2, 3, 5, 7) for _ in range(9) if not number % p and (number := number // p)]
    cuts = np.flatnonzero(rng.random(len(primes)) < 0.5)
    sizes = [math.prod(part.tolist()) for part in np.split(rng.permutation(primes).astype(int), cuts)]
    for _ in range(rng.integers(0, 3)):
        sizes.insert(rng.integers(0, len(sizes) + 1), 1)
    return tuple(int(n) for n in sizes)


GROUPS = [
    ((4, 6, 5), (4, 2, 3, 5), [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]),
    ((4, 6), (24,), [((0, 1), (0,))]),
    ((24,), (4, 6), [((0,), (0, 1))]),
    ((4, 6), (6, 4), [((0, 1), (0, 1))]),
    ((2, 3, 4), (6, 2, 2), [((0, 1), (0,)), ((2,), (1, 2))]),
    ((2, 6), (4, 3), [((0, 1), (0, 1))]),
    ((), (), []),
    ((), (1,), [((), (0,))]),
    ((1,), (), [((0,), ())]),
    ((), (1, 1), [((), (0,)), ((), (1,))]),
    ((1,), (1,), [((0,), (0,))]),
    ((1, 3), (3,), [((0,), ()), ((1,), (0,))]),
    ((3, 1), (3,), [((0,), (0,)), ((1,), ())]),
    ((3,), (3, 1), [((0,), (0,)), ((), (1,))]),
    ((2, 1, 3), (2, 3), [((0,), (0,)), ((1,), ()), ((2,), (1,))]),
    ((1, 1), (1,), [((0,), (0,)), ((1,), ())]),
    ((0, 3), (0, 3), [((0,), (0,)), ((1,), (1,))]),
]


@pytest.mark.parametrize(("old", "new", "groups"), GROUPS)
def test_reshape_groups_are(old, new, groups):
    assert check_groups(old, new) == groups


@pytest.mark.parametrize(
    ("old", "new"),
    [((3,), (1, 3)), ((1, 1, 3), (3, 1)), ((2, 1, 3), (6,)), ((6,), (1, 2, 1, 3, 1)), ((1, 2, 1, 2), (2, 1, 2, 1)),
     ((1, 4, 1, 6), (2, 1, 2, 6))],
)  # fmt: skip
def test_reshape_groups_place_axes_of_size_one(old, new):
    check_groups(old, new)
    check_groups(new, old)


@pytest.mark.parametrize(
    ("old", "new"), [((0, 3), (3, 0)), ((0, 3), (0,)), ((0,), (2, 0)), ((3, 0), (0, 5)), ((2, 0), (0, 1))]
)
def test_reshape_groups_of_arrays_without_elements(old, new):
    check_groups(old, new)


@pytest.mark.parametrize("seed", range(20))
def test_reshape_groups_of_random_factorizations(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        number = int(rng.choice([1, 2, 12, 30, 60, 72, 210, 360]))
        check_groups(factorization(rng, number), factorization(rng, number))


@pytest.mark.parametrize("seed", range(5))
def test_reshape_groups_are_the_smallest(seed):
    rng, cuttable = np.random.default_rng(seed), 0
    for _ in range(50):
        number = int(rng.choice([12, 30, 60, 72, 210, 360]))
        old, new = (tuple(n for n in factorization(rng, number) if n > 1) for _ in range(2))
        for left, right in check_groups(old, new):
            cuttable += len(left) > 1 and len(right) > 1
            before = {math.prod(old[i] for i in left[:n]) for n in range(1, len(left))}
            assert not before & {math.prod(new[j] for j in right[:n]) for n in range(1, len(right))}
    assert cuttable > 10  # groups of one axis on a side have no smaller ones


PRODUCTS = [
    "ij,jk->ik", "ij,jk->ki", "ji,jk->ik", "ij,kj->ik", "ij,kj->ki",  # a matrix product, in every order
    "bij,bjk->bik", "bij,bjk->ibk", "bij,kbj->kib", "ibj,jkb->kbi", "abij,bajk->abik", "abij,bajk->kbia",  # batches
    "ijk,jkl->il", "ijk,kjl->li", "ijk,kij->", "ij,ij->", "i,i->",  # several axes contracted, or all
    "i,j->ij", "i,j->ji", "ij,k->kji", ",i->i", "i,->i", ",->",  # none
    "ij,ij->ij", "ij,ji->ij", "ij,ji->ji", "ij,j->ij", "ij,j->ji",  # none, all batch
    "ij,jk->k", "ij,jk->i", "ijz,jk->ik", "ij,jkz->ki", "zi,yj->ij", "zij,yj->", "bzij,bjy->b",  # sums over one's own
    "abcd,dbe->eca",
]  # fmt: skip


def letters(spec: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    operands, out = spec.split("->")
    left, right = operands.split(",")
    return tuple(left), tuple(right), tuple(out)


SIZES = {letter: 2 + i % 4 for i, letter in enumerate("abcdeijklyz")}


@pytest.mark.parametrize("spec", PRODUCTS)
def test_contract_is_einsum(spec):
    left, right, out = letters(spec)
    x, y = (whole(*(SIZES[n] for n in labels), seed=i) for i, labels in enumerate((left, right)))
    np.testing.assert_array_equal(ax.contract(x, left, y, right, out), jnp.einsum(spec, x, y))
    program = jax.make_jaxpr(lambda x, y: ax.contract(x, left, y, right, out))(x, y)
    assert [eqn.primitive.name for eqn in program.eqns].count("dot_general") == 1


def test_contract_takes_labels_of_any_kind():
    x, y = whole(2, 3), whole(3, 4)
    np.testing.assert_array_equal(
        ax.contract(x, (0, "rank"), y, ("rank", 7), (7, 0)), np.asarray(y).T @ np.asarray(x).T
    )


def test_contract_passes_precision_and_dtype_on():
    x, y = whole(2, 3).astype(jnp.bfloat16), whole(3, 4).astype(jnp.bfloat16)
    options = {"precision": lax.Precision.HIGHEST, "dtype": jnp.float32}
    program = jax.make_jaxpr(lambda x, y: ax.contract(x, ("i", "j"), y, ("j", "k"), ("i", "k"), **options))(x, y)
    (product,) = program.eqns
    assert product.params["precision"] == (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    assert product.params["preferred_element_type"] == product.outvars[0].aval.dtype == jnp.float32
    assert ax.contract(x, ("i", "j"), y, ("j", "k"), ("i", "k")).dtype == jnp.bfloat16


def test_permute_moves_axes_by_label():
    x = whole(2, 3, 4)
    np.testing.assert_array_equal(ax.permute(x, ("a", "b", "c"), ("c", "a", "b")), np.transpose(x, (2, 0, 1)))
    assert ax.permute(x, ("a", "b", "c"), ("a", "b", "c")) is x


@pytest.mark.parametrize(
    ("labels", "out", "shape"),
    [("ab", "ab", (2, 3)), ("ab", "ba", (3, 2)), ("ab", "xaybz", (1, 2, 1, 3, 1)), ("ab", "bxa", (3, 1, 2)), ("ab", "xba", (1, 3, 2))],
)  # fmt: skip
def test_expand_has_size_one_where_a_label_is_missing(labels, out, shape):
    x = whole(2, 3)
    got = ax.expand(x, tuple(labels), tuple(out))
    assert got.shape == shape
    np.testing.assert_array_equal(got.ravel(), np.einsum(f"ab->{''.join(n for n in out if n in labels)}", x).ravel())


def test_expand_of_a_scalar():
    assert ax.expand(jnp.float32(2), (), ("a", "b")).shape == (1, 1)
    assert ax.expand(jnp.float32(2), (), ()).shape == ()


def test_drop_ones_keeps_what_it_is_told_to():
    x = whole(1, 2, 1, 3, 1)
    labels = ("a", "b", "c", "d", "rank")
    dropped, left = ax.drop_ones(x, labels)
    assert (dropped.shape, left) == ((2, 3), ("b", "d"))
    dropped, left = ax.drop_ones(x, labels, keep=("rank", "b"))
    assert (dropped.shape, left) == ((2, 3, 1), ("b", "d", "rank"))
    np.testing.assert_array_equal(dropped.ravel(), x.ravel())
    np.testing.assert_array_equal(ax.expand(dropped, left, labels), x)


def test_fan_in_is_the_product_of_the_contracted_axes():
    assert ax.fan_in((5, 7), (0,)) == 5
    assert ax.fan_in((5, 7), (1,)) == 7
    assert ax.fan_in((3, 3, 4, 8), (0, 1, 2)) == 36
    assert ax.fan_in((4, 6, 10), (0, 1)) == 24
    assert ax.fan_in((5, 7), ()) == 1
