"""A method that jlora does not know: trained, merged, saved, loaded, exported, pickled; and what a file may not do."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import jlora
from jlora.checkpoint.export import with_methods
from jlora.methods import OnWeights, from_json, low_rank, to_json
from tests.conformance import close, normal, randomised

PARAMS = {"attn": {"kernel": normal(6, 6)}, "mlp": {"kernel": normal(6, 8, seed=1)}}
X = normal(4, 6)


def gated(rank: int, alpha: float | None = None, *, start: tuple[float, ...] = (0.0,)) -> jlora.Method:
    """`W + alpha / r * A diag(g) B`."""

    def init(key, w, target):
        a_shape, b_shape = target.factor_shapes()
        gates = jnp.full((1,) * len(target.shape) + (target.rank,), start[0], jnp.float32)
        return {"A": jax.random.normal(key, a_shape, jnp.float32), "B": jnp.ones(b_shape, jnp.float32), "gates": gates}

    def weight(w, target, factors, buffers):
        return low_rank(w, target, target.alpha / target.rank * factors["A"] * factors["gates"], factors["B"])

    config = (("name", gated), ("rank", rank), ("alpha", alpha), ("start", tuple(start)))
    return jlora.Method(config, rank, alpha, OnWeights(init, weight))


def predict(params, x):
    return jnp.tanh(x @ params["attn"]["kernel"]) @ params["mlp"]["kernel"]


STEP = jlora.train_step(lambda params, x: jnp.mean(predict(params, x) ** 2), optax.adam(1e-1))
NESTED = {
    "alone": lambda: gated(2, 3.0, start=(0.0, 1.0)),
    "in dora": lambda: jlora.dora(gated(2)),
    "together": lambda: jlora.together((gated(2), "attn"), (jlora.ia3(), ("mlp", "nothing|mlp"))),
}


@pytest.fixture(scope="module")
def trained() -> jlora.TrainState:
    state = jlora.TrainState.create(jlora.apply(PARAMS, method=gated(2, 3.0)), STEP.tx)
    for _ in range(3):
        state, _ = STEP(state, X)
    return state


def test_it_trains_and_merges(trained):
    path = trained.adapted.sites[0].path
    assert bool((trained.adapted.factors[path]["gates"] != 0).all())
    a, b, gates = (np.asarray(trained.adapted.factors[path][name]) for name in ("A", "B", "gates"))
    merged = jlora.merge(trained.adapted)
    expected = np.asarray(PARAMS["attn"]["kernel"]) + 1.5 * np.sum(a * gates * b, axis=-1)
    np.testing.assert_allclose(merged["attn"]["kernel"], expected, atol=1e-5)
    close(jlora.lift(predict)(trained.adapted, X), predict(merged, X))


@pytest.mark.parametrize("name", NESTED)
def test_it_is_saved_and_loaded(name, tmp_path):
    adapted = randomised(jlora.apply(PARAMS, method=NESTED[name]()), 0.2)
    jlora.save(tmp_path, adapted)
    again = jlora.load(tmp_path, PARAMS, methods=(gated,))
    assert (again.method, hash(again.method), again.sites) == (adapted.method, hash(adapted.method), adapted.sites)
    chex.assert_trees_all_equal(again, adapted)
    with pytest.raises(ValueError, match=rf"^'{tmp_path}/adapter.json': (method 'together': )?unknown method 'gated'; the nearest is .* A method "
                       r"of your own has its constructor in its config, and is loaded with methods=\(constructor,\)$"):  # fmt: skip
        jlora.load(tmp_path, PARAMS)


def test_a_checkpoint_of_it_is_restored(trained, tmp_path):
    with jlora.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained)
        fresh = jlora.TrainState.create(jlora.apply(PARAMS, method=gated(2, 3.0), key=1), STEP.tx)
        restored, _ = checkpoints.restore(fresh)
    chex.assert_trees_all_equal(restored.adapted, trained.adapted)


def test_an_exported_function_of_it_is_read(trained):
    content = export.export(jax.jit(jlora.lift(predict)))(trained.adapted, X).serialize()
    with pytest.raises(ValueError, match="^unknown method 'gated'"):
        export.deserialize(content)
    with with_methods(gated):
        again = export.deserialize(content)
    close(again.call(trained.adapted, X), jlora.lift(predict)(trained.adapted, X))


@pytest.mark.parametrize("name", NESTED)
def test_it_is_pickled_and_copied(name):
    method = NESTED[name]()
    for again in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        assert again == method and hash(again) == hash(method) and repr(again) == repr(method)
    assert method != jlora.lora(2)


def test_another_process_unpickles_it_as_itself(tmp_path):
    file = tmp_path / "adapted.pickle"
    file.write_bytes(pickle.dumps([gated(2, 3.0, start=(1.0,)), jlora.dora(gated(3))]))
    read = (
        f"import pickle, sys; one, two = pickle.load(open(sys.argv[1], 'rb')); from {gated.__module__} import gated; "
        "assert dict(one.config)['name'] is gated and one == gated(2, 3.0, start=(1.0,)); print(two)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", read, str(file)], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == repr(jlora.dora(gated(3))), done.stderr


# -- what is refused ---------------------------------------------------------------------------------------------------


def named(name, method: jlora.Method) -> jlora.Method:
    return method._replace(config=(("name", name), *method.config[1:]))


def other() -> jlora.Method:
    return named(lora, jlora.lora(2))


def lora(rank):  # the name of one of jlora's
    return other()


def wrong(rank):
    return rank


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (gated, "methods= is a sequence of constructors, not <function gated at 0x"),
        (
            gated(2),
            "methods= is a sequence of constructors, not gated(rank=2, alpha=None, start=(0.0,)): (mine,) for one",
        ),
        ("gated", "methods= is a sequence of constructors, not 'gated': (mine,) for one"),
        (("gated",), "methods= are constructors, functions that give a Method, not 'gated'"),
        ((gated(2),), "methods= are constructors, functions that give a Method, not gated(rank=2"),
        ((lora,), f"{lora!r}: 'lora' is the name of a method of jlora; a file names a method by it: rename it"),
    ],
)
def test_methods_are_constructors_with_names_of_their_own(methods, message, tmp_path):
    jlora.save(tmp_path, jlora.apply(PARAMS, 1))
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        jlora.load(tmp_path, PARAMS, methods=methods)


def test_two_of_one_name_are_refused():
    def gated_too(rank):
        return gated(rank)

    gated_too.__name__ = "gated"
    with pytest.raises(ValueError, match=r"gated_too at 0x.*>: 'gated' is the name of two of them; a file names"):
        from_json({"name": "gated", "rank": 2}, (gated, gated_too))
    assert from_json({"name": "gated", "rank": 2}, (gated, gated)) == gated(2)
    assert from_json({"name": "lora", "rank": 2}, (jlora.lora,)) == jlora.lora(2)  # it is the same one


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "wrong", "rank": 2}, "method 'wrong': its constructor gives 2, not a Method"),
        ({"name": "gated", "rank": 2, "more": 1}, "method 'gated': gated() got an unexpected keyword argument 'more'"),
        ({"name": "dora", "inner": {"name": "gatd"}}, "unknown method 'gatd'; the nearest is 'gated' of "),
    ],
)
def test_what_a_constructor_refuses_is_said(data, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        from_json(data, (gated, wrong))


def test_the_name_of_one_of_jloras_is_not_written():
    with pytest.raises(ValueError, match="^<function lora at 0x.*>: 'lora' is the name of a method of jlora; a file n"):
        to_json(other())


def test_a_name_alone_is_neither_saved_nor_pickled(tmp_path):
    method = named("gated", gated(2))
    with pytest.raises(
        pickle.PicklingError, match=r"^'gated' is no method of jlora: one of your own is pickled by its const"
    ):
        pickle.dumps(method)
    with pytest.raises(ValueError, match="unknown method 'gated'; .* has its constructor in its config"):
        jlora.save(tmp_path, jlora.apply(PARAMS, method=method))
    assert list(tmp_path.iterdir()) == []


def test_what_pickle_cannot_find_is_said_by_pickle():
    here = lambda rank: named(here, jlora.lora(rank))
    with pytest.raises((pickle.PicklingError, AttributeError), match="<lambda>"):
        pickle.dumps(here(2))


@pytest.mark.parametrize(
    "name",
    ["antigravity", "tests.imported:mine", "tests.test_own_methods.gated", "builtins.exec", "__import__", "jlora.lora"],
)
def test_nothing_is_imported_because_a_file_names_it(name, tmp_path, monkeypatch):
    """A file that names an installed module as its method is refused, with or without methods of one's own."""
    jlora.save(tmp_path, jlora.apply(PARAMS, 1))
    record = json.loads((tmp_path / "adapter.json").read_text())
    asked = []

    class Finder:
        def find_spec(self, name, path=None, target=None):
            asked.append(name)

    for method in ({"name": name, "rank": 1}, {"name": "dora", "inner": {"name": name, "rank": 1}}):
        (tmp_path / "adapter.json").write_text(json.dumps(record | {"method": method}))
        before = set(sys.modules)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
            with pytest.raises(ValueError, match=f"adapter.json': unknown method {re.escape(repr(name))}"):
                jlora.load(tmp_path, PARAMS, methods=(gated,))
        assert set(sys.modules) == before and asked == []
