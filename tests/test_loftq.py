"""Starts that make up for what quantising loses: LoftQ, and PiSSA on a quantised base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import tree
from tests.conformance import close, normal

RANK = 4
# As of a trained model: singular values that fall, so that a few of them hold a good part of the weight.
_U, _V = (np.linalg.qr(np.asarray(normal(n, n, seed=n)))[0] for n in (32, 64))
_S = 3.0 * 0.85 ** np.arange(32)
MATRIX = jnp.asarray((_U * _S) @ _V[:32], jnp.float32)  # (32, 64)
PARAMS = {
    "dense": {"kernel": MATRIX, "bias": normal(64)},
    "stack": {"kernel": jnp.stack([MATRIX.T, -MATRIX.T + 0.1 * normal(64, 32)])},
    "head": {"kernel": normal(32, 8)},
}
SITES = [
    jlora.Site("dense/kernel", (32, 64), "float32", (0,), (1,), (), "linear"),
    jlora.Site("stack/kernel", (2, 64, 32), "float32", (1,), (2,), (0,), "linear"),
    jlora.Site("head/kernel", (32, 8), "float32", (0,), (1,), (), "linear"),
]
OPTIONS = {"block": 32, "sites": SITES}
QUANTISED = ["dense/kernel", "stack/kernel"]


def adapted(method: jlora.Method, targets: str = "dense|stack") -> jlora.Adapted:
    return jlora.apply(PARAMS, method=method, sites=SITES, targets=targets)


def numpy_loftq(w: np.ndarray, scale: float, iterations: int) -> np.ndarray:
    """Algorithm 1 of the paper on one matrix (inputs, outputs): Q + s A B."""
    product = np.zeros_like(w)
    for _ in range(iterations):
        quantised = jlora.quantize({"kernel": jnp.asarray(w - product)}, "nf4", block=32)
        q = np.asarray(jlora.dequantize(quantised)["kernel"])
        u, s, vt = np.linalg.svd(w - q, full_matrices=False)
        root = np.sqrt(s[:RANK] / scale)
        product = scale * (u[:, :RANK] * root) @ (root[:, None] * vt[:RANK])
    return q + product


@pytest.mark.parametrize(("method", "scale"), [(jlora.lora(RANK, 2.0), 0.5), (jlora.rslora(RANK, 6.0), 3.0)])
def test_loftq_is_the_algorithm_of_the_paper(method, scale):
    start = jlora.loftq(adapted(method), "nf4", iterations=2, **OPTIONS)
    assert start.method == method
    merged = jlora.merge(start)
    w = np.asarray(MATRIX)
    expected = numpy_loftq(w, scale, 2)
    close(merged["dense"]["kernel"], expected, 1e-5)
    for i in range(2):
        close(merged["stack"]["kernel"][i], numpy_loftq(np.asarray(PARAMS["stack"]["kernel"][i]), scale, 2), 1e-5)
    error = jlora.quantization_error(PARAMS, start)
    assert list(error) == QUANTISED
    np.testing.assert_allclose(error["dense/kernel"], np.linalg.norm(w - expected) / np.linalg.norm(w), rtol=1e-4)


def test_both_starts_lose_less_than_the_format_alone():
    plain = jlora.quantize(PARAMS, "nf4", **OPTIONS)
    starts = {
        "1": jlora.loftq(adapted(jlora.lora(RANK)), iterations=1, **OPTIONS),
        "5": jlora.loftq(adapted(jlora.lora(RANK)), **OPTIONS),
        "qpissa": jlora.quantize(adapted(jlora.pissa(RANK)), **OPTIONS),
    }
    for nuclear in (False, True):
        of = lambda x: jlora.quantization_error(PARAMS, x, nuclear=nuclear, sites=SITES)
        lost, errors = of(plain), {name: of(x) for name, x in starts.items()}
        assert list(lost) == QUANTISED
        for path in QUANTISED:
            assert errors["5"][path] < errors["1"][path] < 0.95 * lost[path]
            assert errors["qpissa"][path] < 0.95 * lost[path]
    rest = np.asarray(MATRIX - jlora.dequantize(plain)["dense"]["kernel"])
    values = np.linalg.svd(rest, compute_uv=False).sum() / np.linalg.svd(np.asarray(MATRIX), compute_uv=False).sum()
    np.testing.assert_allclose(lost["dense/kernel"], values, rtol=1e-4)
    # One step of the alternation leaves what the largest singular values of the loss do not hold.
    tail = np.sqrt(np.sum(np.linalg.svd(rest, compute_uv=False)[RANK:] ** 2)) / np.linalg.norm(MATRIX)
    np.testing.assert_allclose(jlora.quantization_error(PARAMS, starts["1"])["dense/kernel"], tail, rtol=1e-4)


START_OUT = {
    "pissa": (jlora.pissa(RANK, alpha=2.0), jlora.lora(RANK, 2.0)),
    "olora": (jlora.olora(RANK), jlora.lora(RANK)),
    "dora of pissa": (jlora.dora(jlora.pissa(RANK)), jlora.dora(jlora.lora(RANK))),
    "tied": (
        jlora.tied(jlora.pissa(RANK), [("dense/kernel", "head/kernel")]),
        jlora.tied(jlora.lora(RANK), [("dense/kernel", "head/kernel")]),
    ),
}


@pytest.mark.parametrize("name", START_OUT)
def test_a_start_that_is_taken_out_is_taken_out_before_quantising(name):
    method, plain = START_OUT[name]
    before = adapted(method, "dense|head")
    after = jlora.quantize(before, **OPTIONS)
    assert after.method == plain and after.sites == before.sites
    assert not {"A0", "B0"} & {part for arrays in after.buffers.values() for part in arrays}
    scale = before.sites[0].alpha / RANK
    taken = {path: scale * jnp.sum(part["A0"] * part["B0"], -1) for path, part in before.buffers.items()}
    residual = jlora.quantize({"dense": {"kernel": MATRIX - taken["dense/kernel"]}}, block=32)["dense"]["kernel"]
    close(after.base["dense"]["kernel"].dequantise(), residual.dequantise(), 2e-2)  # a rounding may turn a code
    close(after.base["head"]["kernel"], PARAMS["head"]["kernel"] - taken["head/kernel"], 1e-6)  # not quantised
    close(after.factors, before.factors, 0.0 + 1e-9)
    if "dora" not in name:
        close(jlora.merge(after)["head"]["kernel"], PARAMS["head"]["kernel"], 1e-5)


def test_together_takes_out_what_its_parts_do():
    method = jlora.together((jlora.pissa(RANK), "dense"), (jlora.lora(2), "head"))
    after = jlora.quantize(jlora.apply(PARAMS, method=method, sites=SITES), **OPTIONS)
    assert after.method == jlora.together((jlora.lora(RANK), "dense"), (jlora.lora(2), "head"))
    plain = jlora.quantization_error(PARAMS, jlora.quantize(PARAMS, **OPTIONS))
    assert jlora.quantization_error(PARAMS, after)["dense/kernel"] < 0.95 * plain["dense/kernel"]


def test_quantize_of_another_adapter_keeps_its_factors():
    before = adapted(jlora.dora(RANK), "dense")
    after = jlora.quantize(before.replace(key=jax.random.key(1)), **OPTIONS)
    assert after.method == before.method and after.key is not None
    close(after.factors, before.factors, 1e-9)
    w = after.base["dense"]["kernel"].dequantise()
    close(after.buffers["dense/kernel"]["square"], jnp.sum(w**2, 0, keepdims=True), 1e-5)
    assert tree.is_stored(after.base["stack"]["kernel"]) and not tree.is_stored(after.base["head"]["kernel"])


def test_a_base_of_16_bits_stays_one_of_16_bits():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    for start in (
        jlora.loftq(jlora.apply(half, RANK, sites=SITES, targets="dense"), iterations=2, **OPTIONS),
        jlora.quantize(jlora.apply(half, method=jlora.pissa(RANK), sites=SITES, targets="dense"), **OPTIONS),
    ):
        assert start.base["dense"]["kernel"].dtype == jnp.bfloat16
        lost = jlora.quantization_error(half, jlora.quantize(half, **OPTIONS))
        assert jlora.quantization_error(half, start)["dense/kernel"] < 0.95 * lost["dense/kernel"]


def test_what_quantising_keeps_exactly_leaves_the_start_as_it_was():
    exact = {"kernel": jlora.dequantize(jlora.quantize({"kernel": MATRIX}, double=False, block=32))["kernel"]}
    before = jlora.apply(exact, RANK)
    after = jlora.loftq(before, double=False, block=32)
    assert float(jnp.abs(after.factors["kernel"]["B"]).max()) < 1e-3
    assert float(jnp.abs(after.factors["kernel"]["A"]).max()) > 0  # or no gradient would reach B
    zero = jlora.loftq(jlora.apply({"kernel": jnp.zeros((32, 32))}, RANK), block=32)
    assert float(jnp.abs(zero.factors["kernel"]["A"]).max()) > 0 == float(jnp.abs(zero.factors["kernel"]["B"]).max())


def test_loftq_under_jit_is_loftq():
    """Codes may turn by a rounding, so that what is compared is the weight."""
    before = adapted(jlora.lora(RANK, 2.0), "dense")
    start = lambda adapted: jlora.loftq(adapted, iterations=2, **OPTIONS)
    now, traced = start(before), jax.jit(start)(before)
    close(jlora.merge(traced)["dense"]["kernel"], jlora.merge(now)["dense"]["kernel"], 1e-4)
    assert jax.tree.structure(jax.eval_shape(start, before)) == jax.tree.structure(now)


def _traced_error(params):
    return jax.jit(lambda p: jlora.quantization_error(p, jlora.quantize(PARAMS, **OPTIONS)))(params)


REFUSED = {
    "a method": (lambda: jlora.loftq(adapted(jlora.dora(2)), **OPTIONS), ValueError, "loftq: the weight of dora"),
    "a frozen A": (lambda: jlora.loftq(adapted(jlora.lora_fa(2)), **OPTIONS), ValueError, "with A and B trained: take"),
    "parameters": (lambda: jlora.loftq(PARAMS), TypeError, "loftq takes an Adapted"),
    "iterations": (
        lambda: jlora.loftq(adapted(jlora.lora(2)), iterations=0),
        ValueError,
        "loftq: iterations must be an integer from 1 to 100, not 0",
    ),
    "rank": (lambda: jlora.loftq(adapted(jlora.lora(40)), **OPTIONS), ValueError, "loftq: rank 40 exceeds 32"),
    "shapes": (
        lambda: jlora.loftq(jax.eval_shape(lambda: adapted(jlora.lora(2))), **OPTIONS),
        TypeError,
        "loftq: this adapter holds shapes",
    ),
    "extras": (
        lambda: jlora.quantize(jlora.apply(PARAMS, 2, sites=SITES, targets="dense", extras="head"), targets="head"),
        ValueError,
        "quantize: 'head/kernel' is trained as it is",
    ),
    "quantised": (
        lambda: jlora.loftq(jlora.quantize(adapted(jlora.lora(2)), **OPTIONS), **OPTIONS),
        ValueError,
        "'dense/kernel' is quantised already",
    ),
    "plain": (
        lambda: jlora.quantization_error(PARAMS, PARAMS),
        ValueError,
        "quantization_error: nothing in the second tree is quantised",
    ),
    "no numbers": (
        lambda: jlora.quantization_error(jax.eval_shape(lambda: PARAMS), jlora.quantize(PARAMS, **OPTIONS)),
        TypeError,
        r"^quantization_error: params holds shapes \(jax.ShapeDtypeStruct\), of which no error can be computed: pass arr",
    ),
    "no numbers of the second": (
        lambda: jlora.quantization_error(
            PARAMS, jlora.apply(jlora.quantize(jax.eval_shape(lambda: PARAMS), **OPTIONS), 2, sites=SITES)
        ),
        TypeError,
        "^quantization_error: the quantised tree holds shapes",
    ),
    "traced": (
        lambda: _traced_error(PARAMS),
        TypeError,
        r"^quantization_error: one of the trees is traced \(jit, grad, vmap\), and the errors are numbers of Python: call it",
    ),
    "an adapter first": (
        lambda: jlora.quantization_error(adapted(jlora.lora(2)), PARAMS),
        TypeError,
        "^quantization_error: the first argument is the tree of full weights, got an Adapted$",
    ),
    "another tree": (
        lambda: jlora.quantization_error({"dense": PARAMS["dense"]}, jlora.quantize(PARAMS, **OPTIONS)),
        ValueError,
        "quantization_error: two trees that differ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()
