"""`jlora.models.losses`: the loss in chunks of tokens is the plain one, and holds no logits of all of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from jlora.models import losses
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.losses import cross_entropy, head_cross_entropy
from jlora.planning.collectives import collectives
from tests.test_stored import Codes, codes
from tests.test_traffic import equations

ROWS, LENGTH, WIDTH, IDS = 3, 11, 8, 37


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


LABELS = jnp.asarray(np.random.default_rng(0).integers(0, IDS, (ROWS, LENGTH)), jnp.int32)
REAL = jnp.asarray(np.random.default_rng(1).integers(0, 2, (ROWS, LENGTH)), jnp.float32)


def plain(h: Any, kernel: Any, labels: Any, *, bias: Any = None, smoothing: float = 0.0, chunk: Any = None) -> Any:
    """The definition, with all logits."""
    z = h @ kernel if bias is None else h @ kernel + bias.astype(h.dtype)[None, None]
    log_probs = jax.nn.log_softmax(z.astype(jnp.float32))
    asked = jax.nn.one_hot(labels, z.shape[-1]) * (1 - smoothing) + smoothing / z.shape[-1]
    return -jnp.sum(asked * log_probs, axis=-1)


def mean(loss: Any, h: Any, kernel: Any, bias: Any, **options: Any) -> jax.Array:
    return jnp.sum(loss(h, kernel, LABELS, bias=bias, **options) * REAL) / jnp.sum(REAL)


def close(got: Any, expected: Any, rtol: float = 2e-5, atol: float = 2e-7) -> None:
    wide = lambda x: np.asarray(x, np.float32)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(wide(x), wide(y), rtol=rtol, atol=atol), got, expected)


@pytest.mark.parametrize("chunk", [1, 4, LENGTH, None])
def test_values_and_gradients_are_those_of_all_logits(chunk: int | None) -> None:
    """Four positions at a time do not divide eleven: the last chunk is filled, and its filling counts nowhere."""
    h, kernel, bias = normal(2, ROWS, LENGTH, WIDTH), normal(3, WIDTH, IDS), normal(4, IDS)

    @functools.partial(jax.jit, static_argnums=0)
    def both(loss: Any, h: Any, kernel: Any, bias: Any) -> Any:
        of = functools.partial(mean, loss, chunk=chunk, smoothing=0.1)
        return jax.value_and_grad(of, (0, 1, 2))(h, kernel, bias), loss(h, kernel, LABELS, chunk=chunk)

    close(both(head_cross_entropy, h, kernel, bias), both(plain, h, kernel, bias))


def test_in_half_precision_it_is_as_near_to_the_exact_loss_as_one_rounding() -> None:
    """The gradient of a trained kernel is summed over the chunks in float32, not in eight bits: 64 would show it."""
    length = 64
    labels = jnp.asarray(np.random.default_rng(0).integers(0, IDS, (ROWS, length)), jnp.int32)
    h, kernel = normal(2, ROWS, length, WIDTH, dtype=jnp.bfloat16), normal(3, WIDTH, IDS, dtype=jnp.bfloat16)

    def gradients(loss: Any, dtype: Any, **options: Any) -> Any:
        of = lambda h, kernel: loss(h, kernel, labels, **options).mean()
        return jax.jit(jax.value_and_grad(of, (0, 1)))(h.astype(dtype), kernel.astype(dtype))

    exact = gradients(plain, jnp.float32)
    got = gradients(head_cross_entropy, jnp.bfloat16, chunk=1)
    assert [x.dtype for x in jax.tree.leaves(got)] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]

    def error(found: Any) -> list[float]:
        off = jax.tree.map(lambda x, y: jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y), found, exact)
        return [float(x) for x in jax.tree.leaves(off)]

    # bfloat16 has 2^-8 between its numbers; the plain form's errors here are 0, 0.0024 and 0.0087.
    assert max(error(got)) < 5e-3, error(got)


def test_under_vmap_and_remat_and_in_a_scan() -> None:
    h, kernel = normal(2, 2, ROWS, LENGTH, WIDTH), normal(3, 2, WIDTH, IDS)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(loss: Any) -> Any:
        of = lambda h, kernel: loss(h, kernel, LABELS, chunk=4).mean()

        def scanned(h: Any, kernel: Any) -> Any:
            step = lambda total, each: (total + jax.checkpoint(of)(*each), None)
            return jax.lax.scan(step, jnp.float32(0.0), (h, kernel))[0]

        return jax.vmap(jax.grad(of, (0, 1)))(h, kernel), jax.grad(scanned, (0, 1))(h, kernel)

    close(gradients(head_cross_entropy), gradients(plain))


def test_forward_mode_and_second_derivatives_are_those_of_the_plain_loss() -> None:
    h, kernel, to = normal(2, LENGTH, WIDTH), normal(3, WIDTH, IDS), normal(5, LENGTH, WIDTH)

    @functools.partial(jax.jit, static_argnums=0)
    def along(loss: Any) -> Any:
        of = lambda h: loss(h, kernel, LABELS[0], chunk=4).mean()
        return jax.jvp(jax.grad(of), (h,), (to,))

    close(along(head_cross_entropy), along(plain))


def test_a_label_outside_gives_nan() -> None:
    labels = jnp.asarray([0, -1, IDS, IDS - 1])
    assert jnp.isnan(cross_entropy(normal(2, 4, IDS), labels)).tolist() == [False, True, True, False]


# -- adapted and quantised heads ---------------------------------------------------------------------------------------


def loss(params: Any, h: jax.Array, form: Any = head_cross_entropy) -> jax.Array:
    kernel = params["head"]["kernel"] if "head" in params else params["wte"]["embedding"].T
    return form(h, kernel, LABELS, chunk=4).mean()


HEADS = {
    "kernel": {"head": {"kernel": normal(3, WIDTH, IDS)}},
    "table": {"wte": {"embedding": normal(3, IDS, WIDTH)}},
    "stored": {"head": {"kernel": codes(3, WIDTH, IDS)}},
    "stored table": {"wte": {"embedding": codes(3, IDS, WIDTH)}},
}


@pytest.mark.parametrize("kind", HEADS)
def test_an_adapted_head_stays_factored_and_a_stored_one_stays_codes(kind: str) -> None:
    params, h = HEADS[kind], normal(2, ROWS, LENGTH, WIDTH)
    (site,) = jlora.sites(loss, params, h)
    assert (site.kind, site.path) == ("linear", "wte/embedding" if "table" in kind else "head/kernel")
    adapted = jlora.apply(params, method=jlora.lora(2), sites=(site,), targets=".*")
    factors = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), adapted.factors)
    adapted = adapted.replace(factors=factors)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(form: Any, factors: Any, h: Any) -> Any:
        lifted = jlora.lift(functools.partial(loss, form=form), strict=form is head_cross_entropy)
        return jax.value_and_grad(lambda factors, h: lifted(adapted.replace(factors=factors), h), (0, 1))(factors, h)

    close(gradients(head_cross_entropy, factors, h), gradients(plain, factors, h), 1e-4, 1e-6)
    _, back = jax.vjp(lambda h: jlora.lift(loss)(adapted, h), h)
    shape = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Codes))[0].shape
    kept = {str(x.dtype) for x in jax.tree.leaves(back) if getattr(x, "shape", ()) in (shape, shape[::-1])}
    assert kept == {"int8"} if "stored" in kind else kept <= {"float32"}


def test_dropout_of_an_adapted_head_is_that_of_the_forward_pass() -> None:
    """The backward pass computes a chunk again, and drops what was dropped."""
    params, h = HEADS["kernel"], normal(2, ROWS, LENGTH, WIDTH)
    adapted = jlora.apply(params, method=jlora.lora(2, dropout=0.5), sites=jlora.sites(loss, params, h), targets=".*")
    adapted = adapted.replace(factors=jax.tree.map(lambda x: x + 0.1, adapted.factors))
    of = jax.jit(lambda h: jlora.lift(loss)(jlora.with_dropout(adapted, jax.random.key(0)), h))
    to, step = normal(5, *h.shape), 1e-2
    slope = (of(h + step * to) - of(h - step * to)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(jax.grad(of)(h), to), slope, rtol=1e-2)


# -- models ------------------------------------------------------------------------------------------------------------

TINY = {"vocab_size": IDS, "context": LENGTH, "width": WIDTH, "layers": 2, "heads": 2}
MODELS = {
    "gpt2": GPT2(GPT2Config(**TINY)),
    "llama": Llama(LlamaConfig(**TINY, hidden=8)),
    "tied": Llama(LlamaConfig(**TINY, hidden=8, tied=True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_a_model_are_those_of_its_logits(name: str) -> None:
    model = MODELS[name]
    params = jax.jit(model.init)(jax.random.key(0), LABELS)["params"]
    in_chunks = jax.eval_shape(lambda: model.init(jax.random.key(0), LABELS, labels=LABELS)["params"])
    assert jax.tree.map(jnp.shape, in_chunks) == jax.tree.map(jnp.shape, params)

    @jax.jit
    def both(params: Any) -> Any:
        losses = lambda params: model.apply({"params": params}, LABELS, labels=LABELS, smoothing=0.1)
        logits = lambda params: model.apply({"params": params}, LABELS)
        asked = lambda params: cross_entropy(logits(params), LABELS, 0.1)
        return [jax.value_and_grad(lambda params, of=of: of(params).mean())(params) for of in (losses, asked)]

    close(*both(params))


def test_a_model_without_tokens_to_predict_has_no_losses() -> None:
    model = GPT2(dataclasses.replace(MODELS["gpt2"].config, head="none"))
    text = "labels= asks for the losses of a causal language model, and this one has head='none'"
    with pytest.raises(ValueError, match=rf"^{text}(\n|$)"):  # JAX may add what it did to the traceback
        jax.eval_shape(lambda: model.init(jax.random.key(0), LABELS, labels=LABELS))


# -- memory ------------------------------------------------------------------------------------------------------------


def test_no_logits_of_all_tokens_are_held() -> None:
    """Temporaries of value and gradient, 256 tokens of 4,096 ids: a chunk of 16 holds a sixteenth of 4 MiB."""
    rows, length, width, ids = 4, 64, 16, 4096
    h = jax.ShapeDtypeStruct((rows, length, width), jnp.float32)
    table, labels = jax.ShapeDtypeStruct((ids, width), jnp.float32), jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def temporaries(form: Any) -> int:
        of = lambda h, table, labels: form(h, table.T, labels, chunk=4).mean()
        program = jax.jit(jax.value_and_grad(of)).lower(h, table, labels).compile()
        return program.memory_analysis().temp_size_in_bytes

    logits = 4 * rows * length * ids
    assert temporaries(plain) >= logits
    assert temporaries(head_cross_entropy) <= logits / 2  # the gradient of the table, twice, and a chunk's, three times


def test_no_gradient_of_a_frozen_kernel_is_formed() -> None:
    """Two products forward and in the backward pass together with the third: a trained kernel has one more."""
    h, kernel = normal(2, ROWS, LENGTH, WIDTH), normal(3, WIDTH, IDS)
    of = lambda h, kernel: head_cross_entropy(h, kernel, LABELS, chunk=4).mean()
    count = lambda argnums: str(jax.make_jaxpr(jax.grad(of, argnums))(h, kernel)).count("dot_general")
    assert (count(0), count((0, 1))) == (3, 4)


# -- bad input ---------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a label too few": (
        {"labels": LABELS[:, 1:]},
        "each of the hidden states has a label, (..., length, width) and (..., length): got (3, 11, 8) and (3, 10)",
    ),
    "a table": (
        {"kernel": normal(3, IDS, WIDTH)},
        "the kernel is (width, vocabulary), got (37, 8) for a width of 8: pass table.T",
    ),
    "another width": ({"kernel": normal(3, 9, IDS)}, "the kernel is (width, vocabulary), got (9, 37) for a width of 8"),
    "a bias": ({"bias": normal(3, 5)}, "the bias is (vocabulary,), (37,), got (5,)"),
    "smoothing": ({"smoothing": 1.5}, "smoothing is a part of the probability, in [0, 1], got 1.5"),
    **{
        f"chunk {chunk!r}": (
            {"chunk": chunk},
            f"chunk is a number of positions, an integer of at least 1, or None, got {chunk!r}",
        )
        for chunk in (0, -1, 2.5, 4.0, "2", True)
    },
    "smoothing of text": ({"smoothing": "0.1"}, "smoothing is a part of the probability, in [0, 1], got '0.1'"),
    "floats": ({"labels": REAL}, "labels are ids, integers, got float32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_an_error_that_says_so(case: str) -> None:
    given, text = WRONG[case]
    arguments = {"h": normal(2, ROWS, LENGTH, WIDTH), "kernel": normal(3, WIDTH, IDS), "labels": LABELS, **given}
    with pytest.raises(TypeError if case == "floats" else ValueError) as error:
        head_cross_entropy(**arguments)
    assert str(error.value) == text


def test_labels_of_a_byte_are_ids_of_a_larger_vocabulary() -> None:
    h, kernel = jax.random.normal(jax.random.key(0), (1, 4, 8)), jax.random.normal(jax.random.key(1), (8, 320))
    labels = np.array([[3, 7, 1, 60]])
    expected = head_cross_entropy(h, kernel, jnp.asarray(labels, jnp.int32))
    for dtype in (np.uint8, np.int8, np.int16, np.uint32):
        np.testing.assert_array_equal(head_cross_entropy(h, kernel, jnp.asarray(labels, dtype)), expected)


def test_an_id_that_is_masked_out_by_minus_infinity_is_no_label() -> None:
    h, kernel = jax.random.normal(jax.random.key(0), (1, 4, 8)), jax.random.normal(jax.random.key(1), (8, 12))
    labels = jnp.array([[3, 7, 1, 0]])
    bias = jnp.zeros(12).at[5].set(-jnp.inf)
    kept = np.delete(np.arange(12), 5)
    expected = head_cross_entropy(h, kernel[:, kept], jnp.where(labels > 5, labels - 1, labels))
    np.testing.assert_allclose(head_cross_entropy(h, kernel, labels, bias=bias), expected, rtol=1e-5)


def test_on_a_mesh_a_chunk_is_that_of_one_device_and_the_kernel_is_gathered_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four chunks of a row a device; eight times as many where the rows of all devices were counted together."""
    rows, length, width, vocabulary = 8, 16, 32, 64
    monkeypatch.setattr(losses, "BUDGET", 4 * vocabulary * (length // 4))
    mesh = jax.make_mesh((8,), ("fsdp",))
    lying = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    h = jax.ShapeDtypeStruct((rows, length, width), jnp.float32, sharding=lying("fsdp"))
    kernel = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32, sharding=lying("fsdp"))
    labels = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=lying("fsdp"))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(lambda h, kernel, labels: head_cross_entropy(h, kernel, labels).sum()))
        traced = step.trace(h, kernel, labels)
        gathers = collectives(traced.lower().compile().as_text(), 8)["all-gather"]
    scans = [eqn.params["length"] for eqn in equations(traced.jaxpr.jaxpr) if eqn.primitive.name == "scan"]
    assert scans == [4, 4]
    assert gathers.bytes <= 2 * 4 * width * vocabulary + 64  # forward and backward, not in each of four chunks
