"""Every method on a base in 4 bits: it is that on the dequantised base held as plain arrays; and the way back."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import jlora
from jlora import tree
from tests.conformance import close, normal, optimized, randomised
from tests.test_methods import IDS, METHODS, adapt, model, of_weights
from tests.tiers import thorough

WHOLE = ("full", "top_layers")  # they train the weights themselves


@functools.cache
def bases(name: str) -> tuple:
    """The parameters of a row in 4 bits, and what these stand for as plain arrays."""
    fn, base = model(name)
    quantised = jlora.quantize(
        base,
        "nf4",
        block=32,
        sites=jlora.sites(fn, base, IDS),
        targets=lambda site: site.kind in ("linear", "conv", "embedding"),
    )
    return quantised, jlora.dequantize(quantised)


ONE = "tests/test_methods.py::test_start_merged_weights_and_gradients_in_one_program"
DEFAULT = ("lora", "dora", "adalora", "pissa", "eva", "vera", "ia3", "oft", "together", "bitfit", "houlsby")
ROWS = [
    pytest.param(row, marks=pytest.mark.once) if row in DEFAULT and row not in ("lora", "dora", "together") else row
    for row in thorough([name for name in METHODS if name not in WHOLE], ONE, DEFAULT)
]


@pytest.mark.parametrize("name", ROWS)
def test_function_gradient_and_merged_weights_are_those_of_the_dequantised_base(name):
    row, (fn, _) = METHODS[name], model(name)
    start, plain = (adapt(name, base) for base in bases(name))
    assert any(tree.is_stored(leaf) for leaf in tree.leaves(start.base)[0].values())
    # The inverse of a covariance makes a rounding of it larger.
    close(start.factors, plain.factors, 1e-3 if row.make().acts.statistic else 2e-5)
    start = start.replace(buffers=plain.buffers)  # of those starts, too
    trained, of_plain = randomised(start, 0.2), randomised(plain, 0.2)
    factors, frozen = jlora.partition(trained)
    still = jlora.partition(of_plain)[1]

    def loss(factors, frozen):
        out = jlora.lift(fn)(jlora.combine(factors, frozen), IDS)
        return jnp.mean(out**2), out

    lifted = jax.jit(jax.value_and_grad(loss, has_aux=True))
    found = lifted(factors, frozen)
    if row.linen:
        close(found, lifted(factors, still), 2e-5)
        return
    weights, back = jax.vjp(jax.jit(lambda factors: jlora.merge(jlora.combine(factors, still))), factors)
    merged, of_merged = of_weights(fn)(weights, IDS)
    close(found, (merged, *back(of_merged)), 2e-5)
    close(jlora.merge(trained), weights, 1e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_a_quantised_leaf_is_not_trained_as_it_is(name):
    base = bases(name)[0]
    first = next(path for path, leaf in tree.leaves(base)[0].items() if tree.is_stored(leaf))
    with pytest.raises(
        ValueError, match=rf"^\d quantised leaves are to be trained as they are, first '{first}' \(nf4, "
    ):
        jlora.apply(base, method=jlora.full())
    if name == "top_layers":
        with pytest.raises(
            ValueError, match=r"first 'back' \(nf4, 32, twice\), and codes are not trained: jlora.dequantiz"
        ):
            adapt(name, base)


# -- a small model for all the rest ------------------------------------------------------------------------------------

PARAMS = {
    "first": {"kernel": normal(32, 64), "bias": normal(64)},
    "second": {"kernel": normal(64, 32, seed=1)},
    "head": {"kernel": normal(32, 8)},
}
X = normal(5, 32, seed=2)
BASE = jlora.quantize(PARAMS, block=32)
PLAIN = jlora.dequantize(BASE)


def predict(params, x):
    h = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return jnp.tanh(h @ params["second"]["kernel"]) @ params["head"]["kernel"]


def loss(params, x):
    return jnp.mean(predict(params, x) ** 2)


def trained(base, method=None, **options):
    return randomised(jlora.apply(base, method=method or jlora.lora(2), **options))


def is_plain(params) -> bool:
    return all(isinstance(leaf, jax.Array) for leaf in tree.leaves(params)[0].values())


def test_the_default_targets_are_the_linear_weights_without_the_head():
    stored = {path: tree.stored_as(leaf) for path, leaf in tree.leaves(BASE)[0].items()}
    assert stored == {
        "first/bias": "float32",
        "first/kernel": "nf4, 32, twice",
        "head/kernel": "float32",
        "second/kernel": "nf4, 32, twice",
    }


def test_dequantize_of_some_and_of_an_adapter():
    some = jlora.dequantize(BASE, targets="^second")
    assert tree.is_stored(some["first"]["kernel"]) and isinstance(some["second"]["kernel"], jax.Array)
    adapted = jlora.dequantize(trained(BASE), targets="^first")
    assert isinstance(adapted.base["first"]["kernel"], jax.Array) and tree.is_stored(adapted.base["second"]["kernel"])
    with pytest.raises(
        ValueError, match="targets='third' matches none of the 2 weights; the closest are 'first/kernel'"
    ):
        jlora.dequantize(BASE, targets="third")


def test_merge_gives_plain_arrays_or_codes_when_asked_to():
    adapted, plain = trained(BASE, targets="first|head"), trained(PLAIN, targets="first|head")
    merged = jlora.merge(adapted)
    assert is_plain(merged)
    chex.assert_trees_all_equal(merged, jlora.merge(plain))
    again = jlora.merge(adapted, requantize=True)
    assert {path for path, leaf in tree.leaves(again)[0].items() if tree.is_stored(leaf)} == {
        "first/kernel",
        "second/kernel",
    }
    chex.assert_trees_all_equal(again["second"]["kernel"], BASE["second"]["kernel"])  # which no factor changes
    expected = jlora.quantize(merged, block=32, targets="first")["first"]["kernel"]
    chex.assert_trees_all_equal(again["first"]["kernel"], expected)
    with pytest.raises(
        ValueError, match="^merge: requantize=True, and nothing in the base is quantised: leave it out$"
    ):
        jlora.merge(plain, requantize=True)


@pytest.mark.parametrize("options", [{"number_format": "int8"}, {"number_format": "int4", "double": False}])
def test_weights_are_quantised_again_as_they_were(options):
    base = jlora.quantize({"kernel": normal(3, 32, 4, 16)}, sites=[SITE], **options)
    again = jlora.merge(jlora.apply(base, 2, sites=[SITE]), requantize=True)["kernel"]
    chex.assert_trees_all_equal_structs(again, base["kernel"])
    close(again, base["kernel"], 1e-6)


SITE = jlora.Site("kernel", (3, 32, 4, 16), "float32", (1,), (2, 3), (0,), "linear")


def test_what_requantising_loses():
    adapted = trained(BASE)
    exact = jlora.merge(trained(PLAIN))
    lost = jlora.merge_error(adapted, requantize=True)
    merged = jlora.dequantize(jlora.merge(adapted, requantize=True))
    for name in ("first", "second"):
        w, w0, rounded = (np.asarray(of[name]["kernel"]) for of in (exact, PLAIN, merged))
        expected = np.linalg.norm(rounded - w) / np.linalg.norm(w - w0)
        np.testing.assert_allclose(lost[f"{name}/kernel"], expected, rtol=1e-5)
        assert 0.01 < expected < 10
    assert set(jlora.merge_error(adapted).values()) == {0.0}


def test_unmerge_gives_the_codes_back():
    adapted = trained(BASE, targets="first")
    merged = jlora.merge(adapted)
    chex.assert_trees_all_equal(jlora.unmerge(merged, adapted), adapted)
    changed = {**merged, "second": {"kernel": merged["second"]["kernel"] + 1}}
    kept = jlora.unmerge(changed, adapted).base
    assert kept["second"]["kernel"] is changed["second"]["kernel"]
    assert kept["first"]["kernel"] is BASE["first"]["kernel"]
    again = jlora.merge(adapted, requantize=True)
    with pytest.raises(
        ValueError, match=r"^unmerge: 'first/kernel' is quantised \(nf4, 32, twice\), and merge gives plain"
    ):
        jlora.unmerge(again, adapted)
    chex.assert_trees_all_equal(jlora.unmerge(again, adapted, requantized=True), adapted)
    with pytest.raises(ValueError, match="^unmerge: 'first/kernel' is not the merged weight of this adapter$"):
        jlora.unmerge(BASE, adapted, requantized=True)


def test_tables_and_counts_say_how_a_weight_is_held():
    adapted, plain = trained(BASE, targets="first|head"), trained(PLAIN, targets="first|head")
    rows = [re.split(" {2,}", line)[:2] for line in jlora.summary(adapted).splitlines()[:3]]
    assert rows == [["weight", "stored"], ["first/kernel", "nf4, 32, twice"], ["head/kernel", "float32"]]
    assert "frozen, of two axes or more: 'second/kernel' (64, 32) nf4, 32, twice" in jlora.summary(adapted)
    explained = jlora.explain(predict, adapted, X)
    assert [(row.path, row.stored) for row in explained.rows] == [
        ("first/kernel", "nf4, 32, twice"),
        ("head/kernel", "float32"),
    ]
    assert str(explained).splitlines()[0].split()[:3] == ["weight", "stored", "operation"]
    assert "stored" not in jlora.summary(plain) + str(jlora.explain(predict, plain, X))
    trainable, total = jlora.count(adapted)
    assert (trainable, total) == jlora.count(plain) == (2 * (32 + 64 + 32 + 8), 4 * 1024 + 64 + 256 + 272)
    # 2,048 codes in half as many bytes, a byte for each 32 of them, 256 of these to a float32, and their mean.
    codes = 2 * (1024 + 64 + 4 + 4)
    assert jlora.count(adapted).bytes == codes + 4 * (64 + 256 + 272)
    assert jlora.count(plain).bytes == 4 * total
    bits = 8 * codes / 4096
    assert jlora.count(adapted).bits == bits and jlora.count(plain).bits is None
    last = f"; {jlora.count(adapted).bytes:,} bytes, {bits:.3f} bits a quantised weight"
    assert jlora.summary(adapted).splitlines()[-1].endswith(last)
    assert repr(jlora.count(adapted)).endswith(f", bits={bits:.4g})") and "bits" not in repr(jlora.count(plain))


def test_files_say_how_the_base_was_held(tmp_path):
    adapted = trained(BASE)
    jlora.save(tmp_path, adapted)
    record = json.loads((tmp_path / "adapter.json").read_text())
    assert record["stored"] == {"first/kernel": "nf4, 32, twice", "second/kernel": "nf4, 32, twice"}
    for base in (BASE, PLAIN):  # one fingerprint: they have the same values
        chex.assert_trees_all_equal(jlora.load(tmp_path, base).factors, adapted.factors)
    for base, how in ((PARAMS, "a plain array"), (jlora.quantize(PARAMS, "int8"), "int8")):
        with pytest.raises(
            ValueError,
            match=rf"another base: .* \(it was trained with 'first/kernel' as nf4, 32, twice, which is {how} here\)",
        ):
            jlora.load(tmp_path, base)
    chex.assert_trees_all_equal(jlora.load(tmp_path, PARAMS, any_base=True).factors, adapted.factors)
    for spoilt in ([], {"first/kernel": 4}):
        (tmp_path / "adapter.json").write_text(json.dumps(record | {"stored": spoilt}))
        with pytest.raises(ValueError, match="'stored.*must be"):
            jlora.load(tmp_path, BASE)


def test_training_and_a_checkpoint(tmp_path):
    step = jlora.train_step(loss, optax.sgd(0.1, momentum=0.9))
    start = trained(BASE)
    state, _ = step(jlora.TrainState.create(start, step.tx), X)
    assert state.adapted.base["first"]["kernel"].codes is BASE["first"]["kernel"].codes
    with jlora.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        restored, *_ = checkpoints.restore(jlora.TrainState.create(jlora.apply(BASE, 2), step.tx))
        chex.assert_trees_all_equal(restored.adapted, state.adapted)
        of_plain, *_ = checkpoints.restore(jlora.TrainState.create(jlora.apply(PLAIN, 2), step.tx))
        chex.assert_trees_all_equal(of_plain.adapted.factors, state.adapted.factors)
        with pytest.raises(
            ValueError, match=r"belongs to another base: .* 'first/kernel' as nf4, 32, twice, which is a pl"
        ):
            checkpoints.restore(jlora.TrainState.create(jlora.apply(PARAMS, 2), step.tx))


def test_arithmetic_is_that_on_the_dequantised_base():
    of = lambda base: (trained(base), trained(base, jlora.rslora(3)))
    (one, other), (plain, plain_other) = of(BASE), of(PLAIN)
    pairs = [
        (jlora.combine_adapters([one, other], [0.5, 2.0]), jlora.combine_adapters([plain, plain_other], [0.5, 2.0])),
        (jlora.reduce_rank(one, 1), jlora.reduce_rank(plain, 1)),
        (jlora.scale(one, 0.5), jlora.scale(plain, 0.5)),
        (jlora.to_lora(trained(BASE, jlora.dora(2)), rank=4), jlora.to_lora(trained(PLAIN, jlora.dora(2)), rank=4)),
    ]
    for got, expected in pairs:
        assert tree.is_stored(got.base["first"]["kernel"])
        close(jlora.merge(got), jlora.merge(expected), 1e-5)
    fine = jlora.merge(trained(PLAIN, targets="first"))
    extracted = jlora.extract_lora(BASE, fine, rank=2)
    assert [site.path for site in extracted.sites] == ["first/kernel"]  # the others are what their codes stand for
    close(jlora.merge(extracted), fine, 1e-5)


def test_an_adapter_for_each_example_and_a_stack_of_bases():
    factors, frozen = jlora.partition(trained(BASE))
    several = jax.tree.map(lambda x: jnp.stack([x, -x, 2 * x]), factors)
    xs = jnp.stack([X, 2 * X, -X])
    run = lambda frozen: jax.vmap(lambda f, x: jlora.lift(predict)(jlora.combine(f, frozen), x))
    close(run(frozen)(several, xs), run(jlora.partition(trained(PLAIN))[1])(several, xs), 1e-5)
    other = jlora.quantize(jax.tree.map(lambda w: -2 * w, PARAMS), block=32)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), BASE, other)
    assert stacked["first"]["kernel"].shape == (2, 32, 64)
    got = jax.vmap(lambda base: jlora.lift(predict)(base, X))(stacked)
    close(got, jnp.stack([predict(PLAIN, X), predict(jlora.dequantize(other), X)]), 1e-5)


def test_the_norm_of_dora_opens_one_layer_at_a_time():
    layers, width = 8, 128
    params = {"stack": normal(layers, width, width)}

    def fn(params, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["stack"])
        return jnp.mean(h**2)

    x = normal(2, width)
    sites = jlora.sites(fn, params, x)
    base = jlora.quantize(params, sites=sites)

    def temporaries(method):
        factors, frozen = jlora.partition(jlora.apply(base, method=method, sites=sites))
        step = jax.grad(lambda factors, frozen: jlora.lift(fn)(jlora.combine(factors, frozen), x))
        return optimized(step).lower(factors, frozen).compile().memory_analysis().temp_size_in_bytes

    more = temporaries(jlora.dora(2)) - temporaries(jlora.lora(2))
    assert more < 2 * 4 * width**2, f"{more / (4 * width**2):.2f} layers more than LoRA's"


# -- errors ------------------------------------------------------------------------------------------------------------

KERNEL = BASE["first"]["kernel"]
CONTRADICTING = {
    "fewer scales": (dataclasses.replace(KERNEL, codes=KERNEL.codes[:3]), r"uint8 \[3, 16\] with \[64, 1\]"),
    "another dtype": (dataclasses.replace(KERNEL, codes=KERNEL.codes.astype(jnp.int8)), r"not int8 \[64, 16\]"),
    "fewer codes of scales": (
        dataclasses.replace(KERNEL, scales=dataclasses.replace(KERNEL.scales, scales=KERNEL.scales.scales[:0])),
        r"want scales of the second level of shape \(1,\)",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTING)
def test_codes_and_scales_that_contradict_each_other(name):
    kernel, message = CONTRADICTING[name]
    params = {**BASE, "first": {**BASE["first"], "kernel": kernel}}
    with pytest.raises(ValueError, match=f"^'first/kernel': .* contradict each other: .*{message}"):
        jlora.dequantize(params)


REFUSED = {
    "integers": (
        {"kernel": jnp.ones((4, 4), jnp.int32)},
        {},
        "none of the leaves is a linear weight of floating point",
    ),
    "integers, chosen": (
        {"kernel": jnp.ones((4, 4), jnp.int32)},
        {"targets": "kernel"},
        "dtype is int32: only floating",
    ),
    "complex": (
        {"kernel": jnp.ones((4, 4), jnp.complex64)},
        {"targets": "kernel"},
        "dtype is complex64: only floating",
    ),
    "a NaN": (
        {"kernel": np.full((4, 4), np.nan)},
        {},
        "'kernel' is not finite: a block with a NaN or an infinity has no",
    ),
    "twice": (BASE, {}, r"'first/kernel' is quantised already \(Quantised\(nf4, blocks of 32 twice"),
    "a scalar": ({"kernel": jnp.ones(())}, {}, r"Leaves: 'kernel' \(\)"),
    "nothing": ({}, {}, "quantize: the tree holds no arrays"),
    "format": (
        PARAMS,
        {"number_format": "nf5"},
        "unknown format 'nf5': it is one of nf4, fp4, int4, int8, fp8; the neare",
    ),
    "block": (PARAMS, {"block": 100}, "block=100 does not fit: it is a power of two from 32 to 4096"),
    "block of channels": (PARAMS, {"number_format": "int8", "block": 64}, "int8 has one scale for each output channel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantised(name):
    params, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        jlora.quantize(params, **options)


HELD = {"first/kernel": jlora.quantize({"kernel": jnp.ones((64, 32))})["kernel"], "last": jnp.ones(3)}
NOT_DEQUANTISED = {
    "nothing is quantised": (
        {"a": jnp.ones(3)}, "a", ValueError,
        "dequantize: none of the 1 leaves is quantised, and targets='a' is to name such: jlora.quantize(params) makes them",
    ),
    "a plain leaf": (
        HELD, ["first", "last"], ValueError,
        "dequantize: targets='last' matches 'last', which is not quantised; what is: 'first/kernel'",
    ),
    "a misspelt name": (
        HELD, "frist", ValueError, "targets='frist' matches none of the 1 weights; the closest are 'first/kernel'",
    ),
    "a number": (HELD, 3, TypeError, "dequantize: targets= is a pattern or a list of patterns, not 3"),
    "a list of numbers": (HELD, [3], TypeError, "dequantize: targets= is a pattern or a list of patterns, not [3]"),
    "bytes": (HELD, b"a", TypeError, "dequantize: targets= is a pattern or a list of patterns, not b'a'"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_DEQUANTISED)
def test_what_cannot_be_dequantised(name):
    params, targets, kind, message = NOT_DEQUANTISED[name]
    with pytest.raises(kind) as error:
        jlora.dequantize(params, targets)
    assert str(error.value) == message


def test_a_state_is_not_quantised():
    state = jlora.TrainState.create(jlora.apply(PARAMS, 2), optax.sgd(0.1))
    with pytest.raises(
        TypeError, match="^quantize: an Adapted is inside of what was given, TrainState: jlora.quantize"
    ):
        jlora.quantize(state)


def test_codes_have_no_gradient():
    with pytest.raises(TypeError, match="uint8"):
        jax.grad(lambda params: jlora.lift(loss)(params, X))(BASE)


# -- the page ----------------------------------------------------------------------------------------------------------

PAGE = (Path(jlora.__file__).parent / "quant" / "README.md").read_text()
TABLE = re.findall(r"^\| `(\w+)`(, `double=False`)?.* \| (\d\.\d+) \| (0\.\d+) \|$", PAGE, flags=re.MULTILINE)


def test_the_table_of_formats_has_all():
    assert {row[0] for row in TABLE} == {"nf4", "fp4", "int4", "int8", "fp8"} and len(TABLE) == 6


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0] + row[1][:1])
def test_bits_and_errors_of_the_formats_are_those_of_the_page(row):
    name, single, bits, error = row
    w = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 512)), jnp.float32)
    codes = jlora.quantize({"kernel": w}, name, double=False if single else None)["kernel"]
    assert round(8 * codes.nbytes / w.size, 3) == pytest.approx(float(bits), abs=1e-3)
    np.testing.assert_allclose(float(jnp.abs(codes.dequantise() - w).mean()), float(error), rtol=6e-3)


def test_exported_programs():
    """What the README says of jax.export: of a TPU's it asks to be told of the call that holds the codes' layout."""
    codes = jlora.quantize({"kernel": normal(64, 64)})
    arrays, structure = jax.tree.flatten(codes)
    fn = jlora.lift(lambda params, x: x @ params["kernel"])
    program = jax.jit(lambda arrays, x: fn(jax.tree.unflatten(structure, arrays), x))
    x = normal(3, 64)
    again = export.deserialize(export.export(program)(arrays, x).serialize())
    close(again.call(arrays, x), x @ codes["kernel"].dequantise(), 1e-5)
    with pytest.raises(ValueError, match="LayoutConstraint"):
        export.export(program, platforms=["tpu"])(arrays, x)
    told = [export.DisabledSafetyCheck.custom_call("LayoutConstraint")]
    assert export.export(program, platforms=["tpu"], disabled_checks=told)(arrays, x).platforms == ("tpu",)
