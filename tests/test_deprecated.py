"""Former names of public functions: each works, and says once per place what to write."""

import pickle
import warnings

import chex
import jax.numpy as jnp
import pytest

import jlora

PROMPTED = {"wte": {"embedding": jnp.ones((9, 4))}}
DENSE = {"kernel": jnp.ones((3, 2), jnp.bfloat16)}
FORMER = {
    "with_key": ("with_dropout", lambda: (jlora.apply(DENSE, method=jlora.lora(1, dropout=0.5)), 3)),
    "rounding": ("merge_error", lambda: (jlora.apply(DENSE, rank=1),)),
    "to_plain": ("bake_prompt", lambda: (jlora.apply(PROMPTED, method=jlora.p_tuning(2, hidden=3)),)),
}


@pytest.mark.parametrize("name", FORMER)
def test_a_former_name_works_and_says_what_to_write(name):
    new, arguments = FORMER[name]
    arguments = arguments()
    with pytest.warns(DeprecationWarning, match=" is jlora.") as warned:
        found = getattr(jlora, name)(*arguments)
    assert [(str(w.message), w.filename) for w in warned] == [
        (f"jlora.{name} is jlora.{new} now, and goes in jlora 0.2", __file__)
    ]
    chex.assert_trees_all_equal(found, getattr(jlora, new)(*arguments))


def test_it_warns_once_for_each_place():
    adapted = jlora.apply(DENSE, rank=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            jlora.rounding(adapted)
        jlora.rounding(adapted)
    assert len(caught) == 2


@pytest.mark.parametrize("name", FORMER)
def test_importing_or_naming_one_does_not_warn(name):
    former = getattr(jlora, name)
    assert pickle.loads(pickle.dumps(former)) is former
    assert former.__name__ == name in dir(jlora)


def test_they_stay_until_the_release_that_they_name():
    """Red once the version is 0.2: delete jlora/deprecated.py, this file, and `apply(fn=, batches=, mask=)` with it."""
    assert tuple(int(n) for n in jlora.__version__.split(".")[:2]) < (0, 2)
