"""Each method against eight training steps of Hugging Face PEFT: losses, gradients and factors (golden/make_methods.py)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.optim import of_method
from tests.conformance import close

GOLDEN = np.load(Path(__file__).with_name("golden") / "methods.npz")
STEPS, LEARNING_RATE = 8, 0.2

METHODS = {
    "lora": jlora.lora(3, alpha=6),
    "rslora": jlora.rslora(4, alpha=3),
    "dora": jlora.dora(jlora.lora(3, alpha=6)),
    "adalora": jlora.adalora(4, 2, alpha=6, total_steps=STEPS, warmup=2, final=2, orthogonality=0.3),
    "ia3": jlora.ia3("down"),
    "vera": jlora.vera(5),
    "loha": jlora.loha(2, alpha=3),
    "lokr": jlora.lokr(1, alpha=3),
    "lokr, whole": jlora.lokr(2, alpha=3),
    "oft": jlora.oft(4),
}
STARTED = {"pissa": jlora.pissa(2, alpha=3), "olora": jlora.olora(2, alpha=3)}  # from the weight itself

# PEFT's arrays are (outputs, inputs); ours are in broadcast form for a kernel (inputs, outputs).
A_FORM = lambda x: x.T[:, None, :]  # (r, inputs)
B_FORM = lambda x: x[None]  # (outputs, r)
NAMES = {
    "lora_A": ("A", A_FORM),
    "lora_B": ("B", B_FORM),
    "lora_E": ("E", lambda x: x.T[None]),
    "lora_magnitude_vector": ("magnitude", lambda x: x[None]),
    "ia3_l": ("scale", lambda x: x.T),
    "vera_lambda_d": ("d", lambda x: x[None, None]),
    "vera_lambda_b": ("b", lambda x: x[None, :, None]),
    "hada_w1_b": ("A1", A_FORM),
    "hada_w1_a": ("B1", B_FORM),
    "hada_w2_b": ("A2", A_FORM),
    "hada_w2_a": ("B2", B_FORM),
    "lokr_w1": ("C", lambda x: x.T[None]),
    "lokr_w2": ("D", lambda x: x.T[None]),
    "lokr_w2_b": ("A", lambda x: x.T[None]),
    "lokr_w2_a": ("B", lambda x: x.T[None]),
    "oft_R": ("Q", lambda x: x[None]),
}


def golden(name: str, key: str) -> jax.Array:
    return jnp.asarray(GOLDEN[f"{name}/{key}"], jnp.float32)


def arrays(name: str, prefix: str) -> dict:
    """PEFT's arrays as ours, by path and name."""
    found: dict = {"up": {}, "down": {}}
    start = f"{name}/{prefix}/"
    for key in GOLDEN.files:
        if key.startswith(start):
            path, theirs = key.removeprefix(start).split("/")
            ours, form = NAMES[theirs]
            found[path][ours] = jnp.asarray(form(GOLDEN[key]), jnp.float32)
    return found


def forward(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def start(name: str, method: jlora.Method) -> jlora.Adapted:
    base = {path: golden(name, f"base/{path}").T for path in ("up", "down")}
    adapted = jlora.apply(base, method=method, sites=jlora.sites(forward, base, golden(name, "x")))
    if name == "vera":
        a, b = golden(name, "buffer/vera_A"), golden(name, "buffer/vera_B")  # for the widest weight; others have a part
        slices = {s.path: {"A": A_FORM(a[:, : s.shape[0]]), "B": B_FORM(b[: s.shape[1]])} for s in adapted.sites}
        adapted = adapted.replace(buffers=slices)
    return adapted


def steps(name: str, adapted: jlora.Adapted):
    """(step, factors, loss, gradient) before each of the steps, and the last factors."""
    x, target = golden(name, "x"), golden(name, "target")
    factors, frozen = jlora.partition(adapted)
    tx = of_method(optax.sgd(LEARNING_RATE), adapted)

    @jax.jit
    def advance(factors, state):
        def loss_fn(factors):
            y = jlora.lift(forward)(jlora.combine(factors, frozen), x)
            return jnp.mean((y - target) ** 2) + sum(adapted.method.regularisers(factors, adapted.sites).values())

        loss, gradient = jax.value_and_grad(loss_fn)(factors)
        updates, state = tx.update(gradient, state, factors)
        return loss, gradient, optax.apply_updates(factors, updates), state

    state = tx.init(factors)
    for step in range(STEPS):
        loss, gradient, after, state = advance(factors, state)
        yield step, factors, loss, gradient
        factors = after
    yield STEPS, factors, None, None


@pytest.mark.parametrize("name", METHODS)
def test_eight_steps_are_those_of_peft(name):
    adapted = start(name, METHODS[name]).replace(factors=arrays(name, "0/value"))
    close(jlora.lift(forward)(adapted, golden(name, "x")), golden(name, "y"))
    for step, factors, loss, gradient in steps(name, adapted):
        close(factors, arrays(name, f"{step}/value"), 1e-4)
        if step < STEPS:
            close(gradient, arrays(name, f"{step}/gradient"), 1e-4)
            assert float(loss) == pytest.approx(float(golden(name, f"{step}/loss")), rel=1e-5)
    close(jlora.lift(forward)(adapted.replace(factors=factors), golden(name, "x")), golden(name, f"{STEPS}/y"), 1e-4)


def test_adalora_pruned_as_peft_did():
    left = {path: np.flatnonzero(part["E"]) for path, part in arrays("adalora", f"{STEPS}/value").items()}
    assert sum(len(kept) for kept in left.values()) == 4
    *_, (_, factors, _, _) = steps(
        "adalora", start("adalora", METHODS["adalora"]).replace(factors=arrays("adalora", "0/value"))
    )
    for path, kept in left.items():
        np.testing.assert_array_equal(np.flatnonzero(factors[path]["E"]), kept)


@pytest.mark.parametrize("name", STARTED)
def test_what_starts_from_the_weight_trains_as_in_peft(name):
    """Singular vectors have no sign: products and losses are compared."""
    adapted = start(name, STARTED[name])
    delta = lambda factors, path: factors[path]["A"][:, 0] @ factors[path]["B"][0].T
    mine = {path: functools.partial(delta, path=path) for path in ("up", "down")}
    for step, factors, loss, _ in steps(name, adapted):
        theirs = arrays(name, f"{step}/value")
        for product in mine.values():
            close(product(factors), product(theirs), 1e-4)
        if step < STEPS:
            assert float(loss) == pytest.approx(float(golden(name, f"{step}/loss")), rel=1e-5)
    close(jlora.lift(forward)(adapted.replace(factors=factors), golden(name, "x")), golden(name, f"{STEPS}/y"), 1e-4)
