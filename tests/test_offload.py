"""What waits in the host's memory: the optimizer's state between two steps, activations between two passes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import jlora
from jlora import host
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.stack import POLICIES

pytestmark = pytest.mark.loose_promotion  # Optax's Adam mixes integers and floats
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 37, (4, 9)), jnp.int32)


def runs_on_the_cpu() -> bool:
    """Whether this JAX has programs for the CPU that return what waits in the host's memory; 0.10 has none."""
    return tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)


on_the_cpu = pytest.mark.skipif(not runs_on_the_cpu(), reason="JAX 0.10's CPU has no programs that return host memory")


def model(**options: Any) -> GPT2:
    return GPT2(GPT2Config(vocab_size=37, context=9, width=8, layers=3, heads=2, **options))


def params_of(of: GPT2) -> Any:
    return jax.jit(of.init)(jax.random.key(0), TOKENS)["params"]


def loss_of(of: GPT2) -> Any:
    return lambda params, tokens: of.apply({"params": params}, tokens, labels=tokens).mean()


def adapt(of: GPT2) -> jlora.Adapted:
    params = params_of(of)
    sites = jlora.sites(loss_of(of), params, TOKENS)
    return jlora.apply(params, rank=2, sites=sites, targets="attn/(query|value)")


def kinds(opt_state: Any) -> set[tuple[bool, str]]:
    """(whether a scalar, memory kind) of the state's arrays."""
    return {(x.ndim == 0, x.sharding.memory_kind) for x in jax.tree.leaves(opt_state)}


WAITS = {(True, "device"), (False, "pinned_host")}


def same(got: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@on_the_cpu
@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}], ids=["raise", "skip"])
def test_a_step_updates_as_from_the_device_and_puts_the_state_back(options: dict[str, Any]) -> None:
    of = model()
    step = jlora.train_step(loss_of(of), optax.adamw(1e-2), **options)
    states = [jlora.TrainState.create(adapt(of), step.tx, **more) for more in ({}, {"memory_kind": "pinned_host"})]
    assert kinds(states[0].opt_state) == {(True, "device"), (False, "device")} and kinds(states[1].opt_state) == WAITS
    for _ in range(3):
        states = [step(state, TOKENS)[0] for state in states]
    same(states[1].adapted.factors, states[0].adapted.factors)
    same(states[1].opt_state, states[0].opt_state)
    assert kinds(states[1].opt_state) == WAITS
    assert not np.allclose(states[1].adapted.factors["h_0/attn/query/kernel"]["B"], 0)


@on_the_cpu
def test_a_step_that_is_left_out_leaves_what_waits() -> None:
    of = model()
    poisoned = lambda params, scale: loss_of(of)(params, TOKENS) * scale
    step = jlora.train_step(poisoned, optax.adam(1e-2), nonfinite="skip")
    state, _ = step(jlora.TrainState.create(adapt(of), step.tx, memory_kind="pinned_host"), jnp.float32(1.0))
    before = jax.device_get(state.opt_state)
    state, _ = step(state, jnp.float32(jnp.nan))
    same(state.opt_state, before)
    assert kinds(state.opt_state) == WAITS and int(state.skipped) == 1


@on_the_cpu
def test_on_a_mesh_and_from_a_checkpoint(tmp_path: Path) -> None:
    of = model()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = jlora.train_step(loss_of(of), optax.adam(1e-2))
    rows = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("data")))
    state, metrics = step(jlora.TrainState.create(adapt(of), step.tx, memory_kind="pinned_host"), rows)
    assert kinds(state.opt_state) == WAITS
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state.opt_state)} == {4}
    _, expected = step(jlora.TrainState.create(adapt(of), step.tx), TOKENS)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    with jlora.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        fresh = jlora.TrainState.create(adapt(of), step.tx, memory_kind="pinned_host")
        restored, _ = checkpoints.restore(fresh)
    assert kinds(restored.opt_state) == WAITS
    same(restored.opt_state, state.opt_state)
    on, further = (step(one, rows)[0] for one in (restored, state))
    assert kinds(on.opt_state) == WAITS
    same(on.adapted.factors, further.adapted.factors)


def test_a_state_of_shapes_says_where_its_arrays_will_lie() -> None:
    of = model()
    place = SingleDeviceSharding(jax.devices()[1])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), adapt(of))
    step = jlora.train_step(loss_of(of), optax.adam(1e-2))
    if not runs_on_the_cpu():
        with pytest.raises(
            ValueError, match=r"^JAX 0\.10\.\d does not tell a program that the array of a shape lies in"
        ):
            jlora.TrainState.create(shapes, step.tx, memory_kind="pinned_host")
        return
    state = jlora.TrainState.create(shapes, step.tx, memory_kind="pinned_host")
    arrays = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert kinds(arrays) == {(False, "pinned_host")}
    text = step.lower(state, TOKENS).as_text()
    # Arguments and results lie there and are brought to the device and back, those of one shape by one function.
    assert text.count('mhlo.memory_kind = "pinned_host"') == 2 * len(arrays)
    assert text.count("annotate_device_placement") > len(arrays)


def test_a_memory_that_is_not_there_is_named() -> None:
    text = r"^memory_kind='pinned-host' is not None or one of device, pinned_host; did you mean 'pinned_host'\?$"
    with pytest.raises(ValueError, match=text):
        jlora.TrainState.create(adapt(model()), optax.adam(1e-2), memory_kind="pinned-host")


def test_a_device_without_that_memory_says_what_it_has() -> None:
    class Device:
        def __str__(self) -> str:
            return "TFRT_CPU_0"

        def addressable_memories(self) -> list[Any]:
            return [SimpleNamespace(kind=kind) for kind in ("unpinned_host", "device")]

    text = (
        r"^memory_kind='pinned_host' is no memory of TFRT_CPU_0, which has device, unpinned_host: leave memory_kind out, "
        r"and the state lies on the device$"
    )
    with pytest.raises(ValueError, match=text):
        host._check_there("pinned_host", Device())  # type: ignore[arg-type]


def test_whether_programs_return_to_the_host_is_tried() -> None:
    host.check_programs(None)
    if runs_on_the_cpu():
        host.check_programs("pinned_host")
        return
    with pytest.raises(
        ValueError, match=r"^memory_kind='pinned_host': JAX 0\.10\.\d has no programs for cpu that return"
    ):
        host.check_programs("pinned_host")


def test_pmap_takes_no_state_that_waits() -> None:
    of = model()
    step = jlora.train_step(loss_of(of), optax.adam(1e-2), parallel="pmap")
    state = jlora.TrainState.create(adapt(of), step.tx, memory_kind="pinned_host")
    assert all(host.waits(x) for x in jax.tree.leaves(state.opt_state) if x.ndim)
    text = (
        r"^this state's optimizer waits in the host's memory \(memory_kind=\), which parallel='pmap' does not know: "
        r"use parallel='jit'$"
    )
    with pytest.raises(ValueError, match=text):
        step(state, jnp.tile(TOKENS, (2, 1)))


# -- activations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["offload", "offload_dots"])
@pytest.mark.parametrize("scan", [True, False])
def test_gradients_are_those_of_what_is_computed_again(scan: bool, name: str) -> None:
    """Of plain and of lifted parameters; what waits is a block's input, or the six products of its linear layers."""
    of, plain = model(scan=scan, remat=name), model(scan=scan, remat=True)
    adapted = adapt(of)
    factors = jax.tree.map(lambda x: x + 0.1, adapted.factors)

    def gradient(form: GPT2) -> Any:
        return jax.grad(
            lambda factors: jlora.lift(loss_of(form), strict=True)(adapted.replace(factors=factors), TOKENS)
        )

    same(jax.jit(gradient(of))(factors), jax.jit(gradient(plain))(factors))
    assert jax.tree.structure(params_of(of)) == jax.tree.structure(params_of(plain))
    found = {name: str(jax.make_jaxpr(gradient(form))(factors)).count("<host>") for name, form in
             (("here", of), ("without", plain))}  # fmt: skip
    assert found["without"] == 0 and found["here"] >= (2 if name == "offload" else 12)


def test_a_policy_that_is_not_there_is_named() -> None:
    text = f"remat='ofload' is not False, True or one of {', '.join(POLICIES)}; did you mean 'offload'?"
    with pytest.raises(ValueError, match=f"^{text.replace('?', '[?]')}$"):
        model(remat="ofload")


# -- factors of scanned layers -----------------------------------------------------------------------------------------


def test_the_scale_is_taken_inside_the_scan_over_layers() -> None:
    """Before it, every A would be there a second time until the backward pass ends."""
    of = model(scan=True, remat=True)
    params = params_of(of)
    sites = jlora.sites(loss_of(of), params, TOKENS)
    adapted = jlora.apply(params, method=jlora.lora(2, alpha=3), sites=sites, targets="attn/(query|value)")
    loss = lambda factors: jlora.lift(loss_of(of), strict=True)(adapted.replace(factors=factors), TOKENS)
    gradient = jax.make_jaxpr(jax.grad(loss))(adapted.factors)
    shapes = {arrays["A"].shape for arrays in adapted.factors.values()}
    scaled = [e for e in gradient.eqns if e.primitive.name == "mul" and e.outvars[0].aval.shape in shapes]
    assert scaled == [] and any(e.primitive.name == "scan" for e in gradient.eqns)
